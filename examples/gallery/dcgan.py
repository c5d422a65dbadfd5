"""A convolutional GAN of digits, with an Adam for each network; after dcgan in pytorch/examples."""

from __future__ import annotations

import sys
from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import TrainLearner
from torch import nn, optim
from torchvision.utils import save_image

from ..datasets import digits

FIT: dict[str, Any] = {"n_epochs": 20, "valid": False}
N_Z = 16


def make_networks() -> nn.ModuleDict:
    """Return G, from noise (N, 16, 1, 1) to images (N, 1, 8, 8), and D, from these to (N,)."""
    generator = nn.Sequential(
        *(nn.ConvTranspose2d(N_Z, 64, 2, bias=False), nn.BatchNorm2d(64), nn.ReLU()),
        *(nn.ConvTranspose2d(64, 32, 4, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.ConvTranspose2d(32, 1, 4, 2, 1, bias=False), nn.Tanh()),
    )
    discriminator = nn.Sequential(
        *(nn.Conv2d(1, 32, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(32, 64, 4, 2, 1, bias=False), nn.BatchNorm2d(64), nn.LeakyReLU(0.2)),
        *(nn.Conv2d(64, 1, 2, bias=False), nn.Flatten(0), nn.Sigmoid()),
    )
    nets = nn.ModuleDict({"D": discriminator, "G": generator})
    for weights in nets.parameters():
        if weights.ndim == 4:  # of a convolution
            nn.init.normal_(weights, 0, 0.02)
    return nets


def loss_func(judged: torch.Tensor, real: float) -> torch.Tensor:
    """Return how far the discriminator is from taking all images for real (1) or not (0)."""
    return nn.functional.binary_cross_entropy(judged, torch.full_like(judged, real))


class GANLearner(TrainLearner):
    """Updates D, which tells images of G from real ones, and G, which is to deceive it."""

    model: nn.ModuleDict

    def predict(self) -> None:
        self.preds = self.model["G"](torch.randn(len(self.batch[0]), N_Z, 1, 1))

    def get_loss(self) -> None:
        judge = self.model["D"]
        self.real, fake = judge(self.batch[0]), judge(self.preds.detach())
        self.update(loss_func(self.real, 1) + loss_func(fake, 0), "D")
        self.fake = judge(self.preds)
        self.update(loss_func(self.fake, 1), "G")


def make_learner() -> GANLearner:
    """Return the learner."""
    nets = make_networks()
    opt = {n: optim.Adam(net.parameters(), 2e-3, betas=(0.5, 0.999)) for n, net in nets.items()}
    cbs = MetricsCB(real=lambda gan: gan.real.mean(), fake=lambda gan: gan.fake.mean())
    return GANLearner(nets, digits(), opt=opt, cbs=cbs)


def main() -> None:
    """Train, print what D says, and write images that G makes to a path if one is given."""
    torch.manual_seed(1)
    learner = make_learner()
    print("D(x) {real:.2f}, D(G(z)) {fake:.2f}".format(**learner.run(**FIT).history[-1]))
    for path in sys.argv[1:]:
        images = learner.model["G"].eval()(torch.randn(32, N_Z, 1, 1)) / 2 + 0.5
        save_image(nn.Upsample(scale_factor=4)(images), path)


if __name__ == "__main__":
    main()

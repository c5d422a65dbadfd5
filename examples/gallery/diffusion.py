"""Denoising diffusion of digits, with an average of the weights, as diffusers trains it."""

from __future__ import annotations

import sys
from typing import Any

import torch
from eventrain.callbacks import MetricsCB, SchedulerCB, ValidateCB
from eventrain.engine import TrainLearner
from eventrain.events import AfterStep, Callback
from torch import nn, optim
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.ops import MLP
from torchvision.utils import save_image

from ..datasets import digits

FIT: dict[str, Any] = {"max_steps": 2000, "epoch_length": 100}
LEFT = 1 - torch.linspace(1e-3, 0.12, 100)  # how much of an image each time leaves
KEPT = LEFT.cumprod(0)


class Diffusion(nn.Module):
    """Adds noise to images (N, 1, 8, 8); returns the error of what it takes for the noise."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Embedding(len(LEFT), 64)
        self.layers = MLP(128, [256, 256, 256, 64], activation_layer=nn.SiLU)

    def noise_in(self, x: torch.Tensor, time: torch.Tensor) -> Any:
        return self.layers(torch.cat([x, self.time(time)], dim=1))

    def forward(self, images: torch.Tensor) -> Any:
        x, time = images.flatten(1), torch.randint(len(LEFT), (len(images),))
        noise, kept = torch.randn_like(x), KEPT[time, None]
        return noise - self.noise_in(kept.sqrt() * x + (1 - kept).sqrt() * noise, time)

    @torch.no_grad()
    def sample(self, n: int) -> torch.Tensor:
        x = torch.randn(n, 64)
        for t in reversed(range(len(LEFT))):
            noise = self.noise_in(x, torch.full((n,), t)) * (1 - LEFT[t]) / (1 - KEPT[t]).sqrt()
            x = (x - noise) / LEFT[t].sqrt() + (t > 0) * (1 - LEFT[t]).sqrt() * torch.randn(n, 64)
        return x.view(n, 1, 8, 8)


class AverageCB(Callback):
    """Keeps an exponential moving average of the weights."""

    def __init__(self, model: nn.Module, decay: float = 0.995) -> None:
        self.model: Any = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))

    def after_step(self, event: AfterStep) -> None:
        self.model.update_parameters(event.learner.model)


def make_learner() -> TrainLearner:
    """Return the learner."""
    model, dls = Diffusion(), digits()
    average = AverageCB(model)
    validate = ValidateCB(dls.valid, name="average", model=average.model)
    warm_up = SchedulerCB(lambda opt, n_steps: LambdaLR(opt, lambda i: min(1, 9 * i / n_steps)))
    cbs = [MetricsCB(), average, validate, warm_up]
    return TrainLearner(model, dls, lambda e, _: (e**2).mean(), 1e-3, cbs=cbs, opt_func=optim.Adam)


def main() -> None:
    """Train, print the loss of the average, and write its samples to a path if one is given."""
    torch.manual_seed(1)
    learner = make_learner()
    print(f"loss {learner.run(**FIT).history[-1]['average.loss']:.3f}")
    [average] = [cb.model for cb in learner.cbs if isinstance(cb, AverageCB)]
    for path in sys.argv[1:]:
        save_image(nn.Upsample(scale_factor=4)(average.module.sample(32) / 2 + 0.5), path)


if __name__ == "__main__":
    main()

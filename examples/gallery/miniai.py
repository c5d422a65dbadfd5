"""A small ResNet for digits or, with --data, Fashion-MNIST, with one cycle of the learning rate.

After miniai of fastai's course, part 2.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from eventrain.callbacks import DeviceCB, MetricsCB, SchedulerCB, SingleBatchCB
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torcheval.metrics import MulticlassAccuracy

from ..datasets import digits, fashion_mnist

FIT: dict[str, Any] = {"n_epochs": 5}


def conv(n_in: int, n_out: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution with batch normalization, for a leaky ReLU to follow."""
    layer = nn.Conv2d(n_in, n_out, 3, stride, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, a=0.1)
    return nn.Sequential(layer, nn.BatchNorm2d(n_out))


class ResBlock(nn.Module):
    """Halves height and width of images (N, C, H, W)."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        act = nn.LeakyReLU(0.1)
        self.convs = nn.Sequential(conv(n_in, n_out), act, conv(n_out, n_out, stride=2))
        self.id = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(n_in, n_out, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.leaky_relu(self.convs(x) + self.id(x), 0.1)


def make_model() -> nn.Module:
    """Return a network from images (N, 1, H, W) to logits of 10 classes."""
    blocks = [ResBlock(n, 2 * n) for n in (8, 16, 32)]
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)
    return nn.Sequential(conv(1, 8), nn.LeakyReLU(0.1), *blocks, *end)


def one_cycle(opt: optim.Optimizer, n_steps: int) -> OneCycleLR:
    """Return a scheduler that goes up to the rate of the optimizer, and down again."""
    return OneCycleLR(opt, opt.param_groups[0]["lr"], total_steps=n_steps)


def make_learner(dls: DataLoaders | None = None) -> TrainLearner:
    """Return the learner, for digits by default."""
    schedule = SchedulerCB(one_cycle)
    cbs = [DeviceCB(), MetricsCB(accuracy=MulticlassAccuracy()), schedule]
    return TrainLearner(
        make_model(), dls or digits(), F.cross_entropy, lr=1e-2, cbs=cbs, opt_func=optim.AdamW
    )


def main() -> None:
    """Try one batch, find a learning rate, train, and print the accuracy."""
    torch.manual_seed(1)
    learner = make_learner(fashion_mnist(Path(sys.argv[2])) if "--data" in sys.argv else None)
    print("one batch:", learner.run(cbs=SingleBatchCB()).reason)
    lr = learner.run_lr_find().suggestion("valley")
    accuracy = learner.run(**FIT, lr=lr).history[-1]["accuracy"]
    print(f"accuracy {accuracy:.3f} with the rate {lr:.1e}")


if __name__ == "__main__":
    main()

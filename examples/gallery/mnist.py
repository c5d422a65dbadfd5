"""A convolutional network on digits or, with --data, on Fashion-MNIST.

After mnist in pytorch/examples.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from eventrain.callbacks import MetricsCB, SchedulerCB
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torcheval.metrics import MulticlassAccuracy

from ..datasets import digits, fashion_mnist

FIT: dict[str, Any] = {"n_epochs": 5}


def make_model() -> nn.Module:
    """Return a network from images of shape (N, 1, H, W) to log probabilities of 10 classes."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 64, 3), nn.ReLU()),
        *(nn.AdaptiveMaxPool2d(2), nn.Dropout(0.25), nn.Flatten()),
        *(nn.Linear(256, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10), nn.LogSoftmax(1)),
    )


def make_learner(dls: DataLoaders | None = None) -> TrainLearner:
    """Return the learner, for digits by default."""
    cbs = [
        MetricsCB(accuracy=MulticlassAccuracy()),
        SchedulerCB(lambda opt: StepLR(opt, step_size=1, gamma=0.7), every="epoch"),
    ]
    return TrainLearner(
        make_model(), dls or digits(), F.nll_loss, lr=1.0, cbs=cbs, opt_func=optim.Adadelta
    )


def main() -> None:
    """Train, and print the accuracy on images that it was not trained on."""
    torch.manual_seed(1)
    learner = make_learner(fashion_mnist(Path(sys.argv[2])) if "--data" in sys.argv else None)
    result = learner.run(**FIT)
    print(f"accuracy {result.history[-1]['accuracy']:.3f}")


if __name__ == "__main__":
    main()

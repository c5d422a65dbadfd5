"""A ResNet-18 from scratch, on digits or, with --data, on Fashion-MNIST.

After imagenet in pytorch/examples, and torchvision's references.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from eventrain.callbacks import ChannelLastCB, DeviceCB, MetricsCB, SchedulerCB
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torcheval.metrics import MulticlassAccuracy
from torchvision.models import resnet18

from ..datasets import digits, fashion_mnist

FIT: dict[str, Any] = {"n_epochs": 3}


def make_model() -> nn.Module:
    """Return a ResNet-18 from images of shape (N, 1, H, W) to logits of 10 classes."""
    model: nn.Module = resnet18(num_classes=10)
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3, bias=False)
    return model


def make_learner(dls: DataLoaders | None = None) -> TrainLearner:
    """Return the learner, for digits by default."""
    opt_func = partial(optim.SGD, momentum=0.9, weight_decay=1e-4)
    cbs = [
        DeviceCB(),
        ChannelLastCB(),
        MetricsCB(top1=MulticlassAccuracy(), top5=MulticlassAccuracy(k=5, num_classes=10)),
        SchedulerCB(lambda opt: StepLR(opt, step_size=2, gamma=0.1), every="epoch"),
    ]
    return TrainLearner(
        make_model(), dls or digits(), F.cross_entropy, lr=0.05, cbs=cbs, opt_func=opt_func
    )


def main() -> None:
    """Train, and print the accuracies on images that it was not trained on."""
    torch.manual_seed(1)
    learner = make_learner(fashion_mnist(Path(sys.argv[2])) if "--data" in sys.argv else None)
    last = learner.run(**FIT).history[-1]
    print(f"top-1 {last['top1']:.3f}, top-5 {last['top5']:.3f}")


if __name__ == "__main__":
    main()

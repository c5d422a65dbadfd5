"""A modern recipe for digits or, with --data, Fashion-MNIST: mixup, average of the weights.

After the classification references of torchvision.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from eventrain.callbacks import MetricsCB, SchedulerCB, ValidateCB
from eventrain.engine import DataLoaders, TrainLearner, no_decay_groups
from eventrain.events import AfterStep, Callback
from torch import nn, optim
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, default_collate
from torcheval.metrics import MulticlassAccuracy
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms.v2 import MixUp

from ..datasets import digits, fashion_mnist

FIT: dict[str, Any] = {"n_epochs": 12}


def make_model() -> nn.Module:
    """Return a network with batch normalization, from images (N, 1, H, W) to logits."""
    layers = [Conv2dNormActivation(i, o, stride=2) for i, o in [(1, 16), (16, 32), (32, 64)]]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def mixed_up(dls: DataLoaders) -> DataLoaders:
    """Return the loaders, with training images that are mixed, and soft targets (N, 10)."""
    mixup, train = MixUp(num_classes=10, alpha=0.2), dls.train.dataset  # type: ignore[union-attr]
    collate = lambda samples: mixup(*default_collate(samples))  # noqa: E731
    return DataLoaders(DataLoader(train, 64, True, collate_fn=collate), dls.valid)


def labels(targets: torch.Tensor) -> torch.Tensor:
    """Return the labels of soft targets, or the labels that they are."""
    return targets.argmax(1) if targets.ndim == 2 else targets


class AverageCB(Callback):
    """Keeps an exponential moving average of weights and buffers."""

    def __init__(self, model: nn.Module, decay: float = 0.98) -> None:
        average = get_ema_multi_avg_fn(decay)
        self.model: Any = AveragedModel(model, multi_avg_fn=average, use_buffers=True)

    def after_step(self, event: AfterStep) -> None:
        self.model.update_parameters(event.learner.model)


def make_learner(dls: DataLoaders | None = None) -> TrainLearner:
    """Return the learner, for digits by default."""
    model, dls = make_model(), mixed_up(dls or digits())
    average = AverageCB(model)
    accuracy = MulticlassAccuracy(), lambda learner: (learner.preds, labels(learner.batch[1]))
    cosine = SchedulerCB(lambda opt, n_steps: CosineAnnealingLR(opt, n_steps))
    validate = ValidateCB(dls.valid, name="average", model=average.model)
    cbs = [MetricsCB(accuracy=accuracy), average, cosine, validate]
    opt = optim.SGD(no_decay_groups(model, 1e-4), lr=0.1, momentum=0.9, nesterov=True)
    return TrainLearner(model, dls, nn.CrossEntropyLoss(label_smoothing=0.1), cbs=cbs, opt=opt)


def main() -> None:
    """Train, and print the accuracy of the averaged weights on images not trained on."""
    torch.manual_seed(1)
    learner = make_learner(fashion_mnist(Path(sys.argv[2])) if "--data" in sys.argv else None)
    last = learner.run(**FIT).history[-1]
    print(f"accuracy {last['accuracy']:.3f}, of the average {last['average.accuracy']:.3f}")


if __name__ == "__main__":
    main()

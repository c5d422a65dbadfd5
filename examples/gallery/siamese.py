"""A siamese network tells whether two images show the same digit.

After siamese_network in pytorch/examples.
"""

from __future__ import annotations

from typing import Any

import torch
from eventrain.callbacks import MetricsCB, SchedulerCB
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

from ..datasets import digits_in_memory

FIT: dict[str, Any] = {"n_epochs": 25}


class Pairs(Dataset[tuple[torch.Tensor, ...]]):
    """Pairs each image with a random one: of its own class for even indices, else of another."""

    def __init__(self, images: TensorDataset) -> None:
        self.images, self.labels = images.tensors

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, ...]:
        same = i % 2 == 0
        others = ((self.labels == self.labels[i]) == same).nonzero()
        other = others[torch.randint(len(others), ())].squeeze()
        return self.images[i], self.images[other], torch.tensor(float(same))


class Siamese(nn.Module):
    """Maps two batches of images (N, 1, 8, 8) to the probabilities (N,) of the same digit."""

    def __init__(self) -> None:
        super().__init__()
        conv = (nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten())
        self.features = nn.Sequential(*conv, nn.Linear(512, 64))
        self.head = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 1), nn.Sigmoid())

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        both = torch.cat([self.features(one), self.features(other)], dim=1)
        same: torch.Tensor = self.head(both)
        return same.squeeze(1)


def make_loaders() -> DataLoaders:
    """Return loaders of (images, other images, whether they are of the same class)."""
    train, valid = map(Pairs, digits_in_memory())
    return DataLoaders(DataLoader(train, 64, shuffle=True), DataLoader(valid, 64))


def accuracy(learner: Any) -> torch.Tensor:
    """Return the share of pairs in the batch that the model is right about."""
    right: torch.Tensor = learner.preds.round() == learner.batch[2]
    return right.float().mean()


def make_learner() -> TrainLearner:
    """Return the learner."""
    cbs = [
        MetricsCB(accuracy=accuracy),
        SchedulerCB(lambda opt: StepLR(opt, step_size=1, gamma=0.9), every="epoch"),
    ]
    model, opt_func = Siamese(), optim.Adadelta
    return TrainLearner(model, make_loaders(), nn.BCELoss(), 1.0, cbs, opt_func, n_inp=2)


def main() -> None:
    """Train, and print the accuracy on pairs of images that it was not trained on."""
    torch.manual_seed(1)
    print(f"accuracy {make_learner().run(**FIT).history[-1]['accuracy']:.3f}")


if __name__ == "__main__":
    main()

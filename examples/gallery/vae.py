"""A variational autoencoder of digits.

After vae in pytorch/examples.
"""

from __future__ import annotations

from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from ..datasets import digits_in_memory

FIT: dict[str, Any] = {"n_epochs": 20}


class VAE(nn.Module):
    """Returns images of shape (N, 64), and mean and log variance of their code, (N, 8) each."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 16))
        self.decoder = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 64), nn.Sigmoid())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, logvar = self.encoder(x).chunk(2, dim=1)
        code = mean + torch.randn_like(mean) * (logvar / 2).exp()
        return self.decoder(code), mean, logvar


def loss_func(preds: tuple[torch.Tensor, ...], x: torch.Tensor) -> torch.Tensor:
    """Return the mean over the images of reconstruction error and divergence."""
    images, mean, logvar = preds
    divergence = -0.5 * (1 + logvar - mean**2 - logvar.exp()).sum()
    return (F.binary_cross_entropy(images, x, reduction="sum") + divergence) / len(x)


def make_loaders() -> DataLoaders:
    """Return loaders of images between 0 and 1, as inputs and as targets."""
    flat = [(x.flatten(1) + 1) / 2 for x, _ in (data.tensors for data in digits_in_memory())]
    train, valid = (TensorDataset(x, x) for x in flat)
    return DataLoaders(DataLoader(train, 64, shuffle=True), DataLoader(valid, 64))


def make_learner() -> TrainLearner:
    """Return the learner."""
    return TrainLearner(
        VAE(), make_loaders(), loss_func, lr=1e-3, cbs=MetricsCB(), opt_func=optim.Adam
    )


def main() -> None:
    """Train, and print the loss of images that it was not trained on."""
    torch.manual_seed(1)
    print(f"loss {make_learner().run(**FIT).history[-1]['loss']:.2f}")


if __name__ == "__main__":
    main()

"""The image datasets of the examples, and the post's CNN."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from eventrain.engine import DataLoaders
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import transforms as T
from torchvision.datasets import FashionMNIST

BATCH_SIZE = 64


def get_model() -> nn.Module:
    """Return the post's CNN, from images of shape (N, 1, H, W) to logits of shape (N, 10)."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def digits_in_memory() -> tuple[TensorDataset, TensorDataset]:
    """Return scikit-learn's 1,797 real 8x8 digits, which are in its wheel; 1,437 to train on."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1  # 0..16 to -1..1
    labels = torch.tensor(data.target)
    split = 1437
    return (
        TensorDataset(images[:split], labels[:split]),
        TensorDataset(images[split:], labels[split:]),
    )


def digits() -> DataLoaders:
    """Return loaders of the digits."""
    train, valid = digits_in_memory()
    return DataLoaders(DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(valid, BATCH_SIZE))


def fashion_mnist(folder: Path) -> DataLoaders:
    """Return Fashion-MNIST as in the post, from `folder` or else downloaded into it.

    Raises:
        SystemExit: if it is not there and cannot be downloaded.
    """
    transform = T.Compose([T.ToTensor(), T.Normalize((0.5,), (0.5,))])
    try:
        train = FashionMNIST(folder, train=True, transform=transform, download=True)
        valid = FashionMNIST(folder, train=False, transform=transform, download=True)
    except (RuntimeError, OSError) as exc:
        raise SystemExit(
            f"Fashion-MNIST is not in {folder}/FashionMNIST/raw and could not be downloaded:"
            f" {exc}\nEither put its four files there (or point --data to where they are), or"
            " use --dataset digits, which needs no download."
        ) from exc
    return DataLoaders(DataLoader(train, BATCH_SIZE, shuffle=True), DataLoader(valid, BATCH_SIZE))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the data."""
    parser.add_argument("--dataset", choices=["digits", "fashion-mnist"], default="digits")
    parser.add_argument(
        "--data", type=Path, default=Path("data"), help="folder with Fashion-MNIST (default: data)"
    )


def load(args: argparse.Namespace) -> DataLoaders:
    """Return the loaders that the options select."""
    return digits() if args.dataset == "digits" else fashion_mnist(args.data)

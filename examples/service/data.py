"""The data that runs may ask for, in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST

from ..datasets import digits_in_memory
from .runs import Data


def loader(folder: Path) -> Callable[[str], Data]:
    """Make the function that loads a dataset by its name; Fashion-MNIST is in `folder`."""

    def load(name: str) -> Data:
        return digits_in_memory() if name == "digits" else _fashion_mnist(folder)

    return load


def _fashion_mnist(folder: Path) -> Data:
    try:
        halves = [FashionMNIST(folder, train=train, download=False) for train in (True, False)]
    except RuntimeError as exc:
        raise FileNotFoundError(
            "Fashion-MNIST is not on this server; it is found in the folder given with --data"
        ) from exc
    train, valid = (
        TensorDataset(half.data[:, None] / 127.5 - 1, half.targets)  # 0..255 to -1..1
        for half in halves
    )
    return train, valid

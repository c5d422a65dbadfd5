"""The datasets that runs may train on, in memory."""

from __future__ import annotations

from pathlib import Path

import structlog
from torch.utils.data import TensorDataset
from torchvision.datasets import FashionMNIST

from ..datasets import digits_in_memory
from .runs import Data

log = structlog.get_logger("eventrain.service")


def load(folder: Path) -> dict[str, Data]:
    """Load the available datasets, by name; Fashion-MNIST is searched for in `folder`."""
    data: dict[str, Data] = {"digits": digits_in_memory()}
    try:
        data["fashion-mnist"] = _fashion_mnist(folder)
    except (RuntimeError, OSError, ValueError) as exc:
        log.info("no_fashion_mnist", folder=str(folder), error=str(exc))
    return data


def _fashion_mnist(folder: Path) -> Data:
    halves = [FashionMNIST(folder, train=train, download=False) for train in (True, False)]
    train, valid = (
        TensorDataset(half.data[:, None] / 127.5 - 1, half.targets)  # 0..255 to -1..1
        for half in halves
    )
    return train, valid

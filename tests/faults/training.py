"""The trainings that are killed, and what of them must come out the same."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from eventrain.callbacks import CheckpointCB, GradientAccumulationCB, JournalCB, MetricsCB
from eventrain.engine import (
    DataLoaders,
    Learner,
    MomentumLearner,
    TrainLearner,
    seed_everything,
)
from eventrain.engine.checkpoint import writer
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from examples.datasets import get_model

EPOCHS = 3


class Noisy(Dataset[Any]):
    """Real digits, each with noise of its own, so that the random state is in the data, too."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = self.images[index]
        return image + 0.05 * torch.randn(image.shape), self.labels[index]


def cnn() -> Learner:
    """The post's CNN, with its learner."""
    return MomentumLearner(get_model(), _digits(), nn.functional.cross_entropy, 0.1)


def everything() -> Learner:
    """Dropout, running statistics, noise, momentum, groups that end in the middle of an epoch."""
    model = nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 100),
        nn.BatchNorm1d(100),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(100, 10),
    )
    accumulation = GradientAccumulationCB(3)
    opt = torch.optim.AdamW
    return TrainLearner(model, _digits(), nn.functional.cross_entropy, 0.01, accumulation, opt)


MADE: dict[str, Callable[[], Learner]] = {"cnn": cnn, "everything": everything}


def _digits() -> DataLoaders:
    data = load_digits()
    images = torch.tensor(data.images[:500], dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target[:500])
    train, valid = Noisy(images[:400], labels[:400]), TensorDataset(images[400:], labels[400:])
    return DataLoaders(DataLoader(train, 16, shuffle=True), DataLoader(valid, 50))


def train(kind: str, folder: Path, dies_at: int | None = None) -> None:
    """Train, or go on training; at the end write down what came out.

    Args:
        kind: which training.
        folder: for its checkpoints, journal and outcome.
        dies_at: die, as by SIGKILL, in this operation on the checkpoints' files.
    """
    torch.set_num_threads(1)
    if dies_at is not None:
        _die_at(dies_at)
    seed_everything(0)
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    checkpoints = folder / "checkpoints"
    saving = CheckpointCB(checkpoints, every_batches=4)
    journal = JournalCB(folder / "journal.jsonl", every=7)
    learner = MADE[kind]()
    learner.add_cbs([metrics, saving, journal])
    if any(checkpoints.glob("checkpoint-*")):
        seed_everything(os.getpid())  # what is resumed must not depend on it
    result = learner.run(EPOCHS, resume="last")
    outcome = {
        "weights": {k: _digest(v) for k, v in learner.model.state_dict().items()},
        "history": result.history,
        "metrics": metrics.history,
        "counts": [result.epochs, result.batches, result.valid_batches, result.steps],
        "status": result.status,
    }
    part = folder / "outcome.part"
    part.write_text(json.dumps(outcome))
    part.rename(folder / "outcome.json")


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def _die_at(n: int) -> None:
    """Have the n-th operation on the checkpoints' files be the last thing this process does."""
    left = [n]

    class Deadly:
        def __getattr__(self, name: str) -> Any:
            value = getattr(os, name)
            if name not in ("mkdir", "rename", "fsync", "open"):
                return value

            def call(*args: Any) -> Any:
                left[0] -= 1
                if left[0] <= 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return value(*args)

            return call

    writer.os = Deadly()  # type: ignore[attr-defined]

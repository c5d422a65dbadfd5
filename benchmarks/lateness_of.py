"""Ticks on the host's event loop while the engine works; in a process of its own.

Args: the backend, the megabytes of the large model, the batches of the small one. It prints one
JSON object: by the name of each work, by how many seconds each tick was late.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import torch
from eventrain.callbacks import (
    CheckpointCB,
    LossCurveCB,
    MetricsCB,
    OpenTelemetryCB,
    ProgressCB,
    PrometheusCB,
    StructlogCB,
    TensorBoardCB,
)
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import Event
from structlog.testing import capture_logs
from torch import nn

from .host import BACKENDS, tick_during

TICK = 0.005
"""Seconds."""

Work = Callable[[], Awaitable[object]]


def measure(backend: str, megabytes: int, n_batches: int) -> dict[str, list[float]]:
    """Run each work once, in turn."""
    late: dict[str, list[float]] = {}
    with capture_logs(), TemporaryDirectory() as folder:
        for name, work in _works(megabytes, n_batches, Path(folder)).items():
            late[name] = []
            anyio.run(partial(tick_during, work, late[name], TICK), **BACKENDS[backend])
    return late


def _works(megabytes: int, n_batches: int, folder: Path) -> dict[str, Work]:
    small = [(torch.ones(2, 3), torch.zeros(2, 1))] * n_batches
    large = nn.Sequential(*[nn.Linear(512, 512) for _ in range(megabytes)])
    rows = [(torch.ones(16, 512), torch.zeros(16, 512))] * 4
    wide = nn.Linear(3, 512 * megabytes // 4, bias=False)  # its predictions are as large
    samples = [(torch.ones(64, 3), torch.zeros(1))] * 8

    def learner(*cbs: Any) -> TrainLearner:
        return TrainLearner(nn.Linear(3, 1), DataLoaders(small, small), lr=1e-3, cbs=cbs)

    def observed() -> TrainLearner:
        observed = learner()
        for _ in range(10):
            observed.observe(lambda event: None, Event)
        return observed

    # Adam, whose state is twice as large as the model.
    big = TrainLearner(large, DataLoaders(rows, rows), lr=1e-5, opt_func=torch.optim.Adam)
    predicting = TrainLearner(wide, DataLoaders(None, samples))
    checkpointed = CheckpointCB(folder / "checkpoints")
    return {
        "nothing": partial(anyio.sleep, 0.5),
        "the first fit of the process": lambda: learner().fit(1),
        "the second fit": lambda: learner().fit(1),
        "a fit of the large model": lambda: big.fit(1),
        "`lr_find` of the large model": lambda: big.lr_find(max_epochs=1),
        "`validate` of the large model": big.validate,
        "`get_preds`, predictions of that size": predicting.get_preds,
        "a fit with a checkpoint of the large model": lambda: big.fit(1, cbs=checkpointed),
        "a fit that resumes from it": lambda: big.fit(2, cbs=checkpointed, resume="last"),
        "ten observers of every event": lambda: observed().fit(1),
        "all reporters": lambda: learner(*_reporters(folder)).fit(2),
        "all reporters, again": lambda: learner(*_reporters(folder)).fit(2),
    }


def _reporters(folder: Path) -> list[Any]:
    from prometheus_client import CollectorRegistry
    from rich.console import Console

    return [
        MetricsCB(),
        StructlogCB(format="json", file=io.StringIO()),
        ProgressCB(Console(file=io.StringIO(), force_terminal=True)),
        TensorBoardCB(folder / "tensorboard"),
        LossCurveCB(),
        PrometheusCB(CollectorRegistry()),
        OpenTelemetryCB(),
    ]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))

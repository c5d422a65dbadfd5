"""Ticks on the host's event loop while the engine works; in a process of its own.

Args: the backend, the megabytes of the large model, the batches of the small one. It prints one
JSON object: by the name of each work, by how many seconds each tick was late.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import torch
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import Event
from prometheus_client import CollectorRegistry
from rich.console import Console
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
        for name, work in _works(megabytes, n_batches, Path(folder)):
            late[name] = []
            anyio.run(partial(tick_during, work, late[name], TICK), **BACKENDS[backend])
    return late


def _works(megabytes: int, n_batches: int, folder: Path) -> Iterator[tuple[str, Work]]:
    small = [(torch.ones(2, 3), torch.zeros(2, 1))] * n_batches

    def learner(*cbs: Any) -> TrainLearner:
        return TrainLearner(nn.Linear(3, 1), DataLoaders(small, small), lr=1e-3, cbs=cbs)

    def observed() -> TrainLearner:
        observed = learner()
        for _ in range(10):
            observed.observe(lambda event: None, Event)
        return observed

    yield "nothing", partial(anyio.sleep, 0.5)
    yield "the first fit of the process", lambda: learner().fit(1)
    yield "the second fit", lambda: learner().fit(1)
    yield "ten observers of every event", lambda: observed().fit(1)
    yield from _large_works(megabytes, folder)
    for repeat in ("", ", again"):
        yield f"all reporters{repeat}", lambda: learner(*_reporters(folder)).fit(2)


def _large_works(megabytes: int, folder: Path) -> Iterator[tuple[str, Work]]:
    from eventrain.callbacks import CheckpointCB  # not earlier: it imports much of torch

    rows = [(torch.ones(4, 512), torch.zeros(4, 512))] * 2
    samples = [(torch.ones(64, 3), torch.zeros(1))] * 8
    model = nn.Sequential(*[nn.Linear(512, 512) for _ in range(megabytes)])
    # Adam, whose state is twice as large as the model.
    large = TrainLearner(model, DataLoaders(rows, rows), lr=1e-5, opt_func=torch.optim.Adam)
    wide = TrainLearner(nn.Linear(3, 512 * megabytes // 4), DataLoaders(None, samples))
    saved = CheckpointCB(folder / "checkpoints")

    yield "a fit of the large model", lambda: large.fit(1)
    yield "`lr_find` of the large model", lambda: large.lr_find(max_epochs=1)
    yield "`validate` of the large model", large.validate
    yield "`get_preds`, predictions of that size", wide.get_preds
    yield "a fit with a checkpoint of the large model", lambda: large.fit(1, cbs=saved)
    yield "a fit that resumes from it", lambda: large.fit(2, cbs=saved, resume="last")


def _reporters(folder: Path) -> list[Any]:
    from eventrain import callbacks

    return [
        callbacks.MetricsCB(),
        callbacks.StructlogCB(format="json", file=io.StringIO()),
        callbacks.ProgressCB(Console(file=io.StringIO(), force_terminal=True)),
        callbacks.TensorBoardCB(folder / "tensorboard"),
        callbacks.LossCurveCB(),
        callbacks.PrometheusCB(CollectorRegistry()),
        callbacks.OpenTelemetryCB(),
    ]


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], *map(int, sys.argv[2:]))))

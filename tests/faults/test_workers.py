"""Loaders that die or block."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import Checkpoint, DataLoaders, TrainLearner
from eventrain.events import AfterBatch, record_events
from structlog.testing import capture_logs
from torch import nn
from torch.utils.data import DataLoader, Dataset

Batch = tuple[torch.Tensor, torch.Tensor]


class Slow(Dataset[Batch]):
    """A dataset whose workers are still busy when one of them is killed."""

    def __len__(self) -> int:
        return 400

    def __getitem__(self, index: int) -> Batch:
        return torch.full((3,), float(index % 7)), torch.zeros(1)


def test_a_worker_that_is_killed_is_told_and_the_last_checkpoint_is_whole(
    make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    loader = DataLoader(Slow(), 4, num_workers=2)
    learner = TrainLearner(make_model(), DataLoaders(loader), lr=0.001)
    before = {process.pid for process in multiprocessing.active_children()}

    @learner.on(AfterBatch, where=lambda event: event.iter == 5)
    def kill(event: AfterBatch) -> None:
        killed = [each for each in multiprocessing.active_children() if each.pid not in before]
        for process in killed:
            os.kill(process.pid or 0, signal.SIGKILL)
        for process in killed:  # one that still dies is alive to torch, and has closed its sockets
            process.join()

    # On a thread that is not the main one torch looks for dead workers every 5 seconds; if the
    # main thread has made a loader with workers before, it is told there by a signal, at once.
    told = "exited unexpectedly|killed by signal"
    with record_events(learner) as events, pytest.raises(RuntimeError, match=told):
        learner.run(1, valid=False, cbs=CheckpointCB(tmp_path, every_batches=2))
    assert events.names[-2:] == ["CleanupEpoch", "CleanupFit"]
    assert Checkpoint.load(tmp_path).position.batches >= 4
    assert {process.pid for process in multiprocessing.active_children()} <= before


class Blocking:
    """A loader that waits in the middle of an epoch, until it is let go."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches
        self.blocks = threading.Event()
        self.go = threading.Event()

    def __iter__(self) -> Iterator[Batch]:
        yield self.batches[0]
        self.blocks.set()
        assert self.go.wait(30)
        yield self.batches[1]


async def test_a_loader_that_blocks_when_the_host_cancels_holds_the_fit_up_and_it_says_where(
    make_batches: Callable[..., list[Batch]],
    make_model: Callable[[], nn.Module],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eventrain.engine.run.thread.CANCEL_PATIENCE", 0.1)
    loader = Blocking(make_batches(2))
    learner = TrainLearner(make_model(), DataLoaders(loader))
    ended = False

    async def fit() -> None:
        nonlocal ended
        try:
            await learner.fit(1, valid=False)
        finally:
            ended = True

    with anyio.fail_after(30), capture_logs() as logs:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fit)
            while not loader.blocks.is_set():
                await anyio.sleep(0.01)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                while not any(line["event"] == "cancel_waits" for line in logs):
                    await anyio.sleep(0.01)
                assert not ended  # never before its thread
                loader.go.set()
    assert ended
    (said,) = [line for line in logs if line["event"] == "cancel_waits"]
    assert "__iter__" in str(said)
    assert learner.result is not None
    assert learner.result.status == "cancelled"
    assert not any(thread.name.startswith("eventrain") for thread in threading.enumerate())


def test_a_loader_with_a_timeout_ends_by_itself(make_model: Callable[[], nn.Module]) -> None:
    class Stuck(Slow):
        def __getitem__(self, index: int) -> Any:
            if index == 0:  # a batch before it could be late as well, on a busy machine
                threading.Event().wait(60)
            return super().__getitem__(index)

    loader = DataLoader(Stuck(), 4, num_workers=1, timeout=1)
    learner = TrainLearner(make_model(), DataLoaders(loader), lr=0.001)
    with pytest.raises(RuntimeError, match="timed out after 1 seconds") as raised:
        learner.run(1, valid=False)
    assert "raised while reading batch 0 of dls.train" in raised.value.__notes__

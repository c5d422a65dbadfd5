"""A fit keeps nothing of its batches, and many fits leave nothing behind."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import CheckpointCB, MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.run import forks
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    AfterLoss,
    AfterPredict,
    BeforeBatch,
    Callback,
    CancelBatchException,
    CleanupBatch,
    CleanupFit,
    Event,
    record_events,
)
from torch import nn

LONG = bool(os.environ.get("EVENTRAIN_LONG"))
N_BATCHES = 100_000 if LONG else 3_000
N_FITS = 500 if LONG else 60


@pytest.fixture(autouse=True, scope="module")
def _collect_quickly() -> Iterator[None]:
    """What was there before these tests, torch with its modules, is passed over by `gc.collect`."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def training_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("eventrain-")]


class Fresh:
    """A loader whose batches nobody else holds; it remembers them weakly."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.refs: list[weakref.ref[torch.Tensor]] = []

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for _ in range(self.n):
            x = torch.randn(4, 3)
            y = x.sum(1, keepdim=True)
            self.refs += [weakref.ref(x), weakref.ref(y)]
            yield x, y
            del x, y


def alive(refs: list[weakref.ref[torch.Tensor]]) -> list[int]:
    """The indices of those that still live."""
    return [index for index, ref in enumerate(refs) if ref() is not None]


class Watch(Callback):
    """Remembers predictions and losses weakly, and notes which of an earlier batch live on."""

    order = 100

    def __init__(self, loader: Fresh) -> None:
        self.loader = loader
        self.preds: list[weakref.ref[torch.Tensor]] = []
        self.losses: list[weakref.ref[torch.Tensor]] = []
        self.outlived: list[Any] = []

    def after_predict(self, event: AfterPredict) -> None:
        self.preds.append(weakref.ref(event.learner.preds))

    def after_loss(self, event: AfterLoss) -> None:
        self.losses.append(weakref.ref(event.learner.loss))
        self.outlived += alive(self.loader.refs[:-2])
        self.outlived += alive(self.preds[:-1])
        self.outlived += alive(self.losses[:-1])


@pytest.mark.parametrize("cut", [None, AfterBackward, AfterBatch])
async def test_no_event_keeps_a_batch_alive(
    make_model: Callable[[], nn.Module], cut: type[Event] | None
) -> None:
    """G12: with every event of the fit held, only the batch that is being trained is alive."""
    loader = Fresh(6)
    watch = Watch(loader)
    learner = TrainLearner(make_model(), DataLoaders(loader, loader))
    observed: list[Event] = []
    observer = learner.observe(observed.append, Event, buffer=10_000)
    if cut is not None:

        @learner.on(cut, where=lambda event: event.iter % 2)
        def cancel(event: Event) -> None:
            raise CancelBatchException

    gc.disable()  # nothing may wait for it
    try:
        with record_events(learner) as events:
            async with learner.events(buffer=10_000) as stream:
                await learner.fit(2, cbs=watch)
                held = [event async for event in stream]
        assert watch.outlived == []
        assert len(loader.refs) == 48
        learner.batch = learner.preds = learner.loss = None
        assert alive(loader.refs) == alive(watch.preds) == alive(watch.losses) == []
    finally:
        gc.enable()
    assert held == observed == list(events)
    losses = [event.loss for event in events if getattr(event, "loss", None) is not None]
    assert losses != []
    assert all(loss.grad_fn is None and not loss.requires_grad for loss in losses)
    observer.close()


async def test_a_batch_that_a_callback_replaces_is_released(
    make_model: Callable[[], nn.Module],
) -> None:
    """G12: where batches are converted or moved, only what they became is held."""
    refs: list[weakref.ref[torch.Tensor]] = []

    def make_batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.randn(4, 3)
        refs.append(weakref.ref(x))
        return x, x.sum(1, keepdim=True)

    learner = TrainLearner(make_model(), DataLoaders(map(make_batch, range(3))))
    outlived: list[int] = []

    @learner.on(BeforeBatch)
    def convert(event: BeforeBatch) -> None:
        learner.batch = tuple(part.clone() for part in learner.batch)

    learner.on(AfterPredict)(lambda event: outlived.extend(alive(refs)))
    await learner.fit(1, valid=False)
    assert (len(refs), outlived) == (3, [])


async def test_no_event_keeps_the_batch_of_a_failed_fit_alive(
    make_model: Callable[[], nn.Module],
) -> None:
    """G12: once its error is dealt with."""
    loader = Fresh(3)
    watch = Watch(loader)
    learner = TrainLearner(make_model(), DataLoaders(loader))
    with record_events(learner) as events:
        learner.on(AfterLoss, order=200, where=lambda event: event.iter == 1)(lambda event: 1 / 0)
        with suppress(ZeroDivisionError):
            await learner.fit(valid=False, cbs=watch)
    learner.batch = learner.preds = learner.loss = None
    gc.collect()
    assert alive(loader.refs) == alive(watch.preds) == alive(watch.losses) == []
    assert events.names[-1] == "CleanupFit"


async def test_a_learner_that_is_released_frees_everything_of_it(
    make_model: Callable[[], nn.Module], dls: DataLoaders
) -> None:
    """G9, G13: neither the runtime nor a thread nor the event loop holds it."""
    learner = TrainLearner(make_model(), dls)
    learner.observe(lambda event: None, Event)

    @learner.on(AfterBatch)
    async def receiver(event: AfterBatch) -> None:
        await anyio.lowlevel.checkpoint()

    await learner.fit()
    refs = [weakref.ref(learner), weakref.ref(learner.model), weakref.ref(learner.bus)]
    del learner, receiver
    gc.collect()
    assert [ref() for ref in refs] == [None] * 3
    assert forks.running == []


class Listening(Callback):
    """Hears all there is, in both lanes."""

    observes = (BeforeBatch, CleanupBatch)
    buffer = 64

    def event(self, event: Event) -> None: ...

    async def observe(self, event: Event) -> None: ...


def resident() -> int:
    """Bytes of this process in memory, where the system says."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


async def test_memory_is_flat_over_many_batches(
    make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    """G13: objects, threads and bytes, with streams unread, observers slow, and checkpoints."""
    blocks: list[int] = []
    counted: list[int] = []
    sizes: list[int] = []
    learner = TrainLearner(make_model(), DataLoaders(Fresh(N_BATCHES)), lr=0.001)
    learner.dls.train.refs = _Forgetful()

    @learner.on(AfterBatch, every=N_BATCHES // 10)
    def measure(event: AfterBatch) -> None:
        gc.collect()
        blocks.append(sys.getallocatedblocks())
        counted.append(len(training_threads()))
        sizes.append(resident())

    @learner.on(AfterBatch, every=50)
    async def receiver(event: AfterBatch) -> None:
        await anyio.lowlevel.checkpoint()

    async with learner.events(buffer=16), learner.events(overflow="latest"):
        saving = CheckpointCB(tmp_path, every_batches=N_BATCHES // 20)
        result = await learner.fit(valid=False, cbs=[Listening(), MetricsCB(), saving])
    assert result.batches == N_BATCHES
    assert set(counted) == {2}  # that of the fit, and that of its checkpoints
    assert max(blocks[2:]) - blocks[1] < 3_000
    assert max(sizes[2:]) - sizes[1] < 8 * 2**20


class _Forgetful(list[Any]):
    """A list that stays empty."""

    def __iadd__(self, other: Any) -> _Forgetful:
        return self


async def test_memory_and_threads_are_flat_over_many_fits(
    make_model: Callable[[], nn.Module], dls: DataLoaders
) -> None:
    """G13: fits that complete, are cancelled, fail, are stopped, with callbacks of their own."""
    learner = TrainLearner(make_model(), dls)
    blocks: list[int] = []
    subscriptions = learner.bus.subscriptions()
    tasks = set(anyio.get_running_tasks())
    statuses: set[str] = set()

    def fail(event: Event) -> None:
        raise ZeroDivisionError

    for index in range(N_FITS):
        with anyio.CancelScope() as scope, suppress(ZeroDivisionError):
            if index % 4 == 0:
                with learner.observe(lambda event: None, Event):
                    await learner.fit(cbs=Listening())
            elif index % 4 == 1:
                with learner.subscribe(AfterLoss, fail):
                    await learner.fit(cbs=Listening())
            elif index % 4 == 2:
                with learner.subscribe(BeforeBatch, lambda event: learner.stop() and None):
                    await learner.fit(cbs=Listening())
            else:
                scope.cancel()
                async with learner.events():
                    await learner.fit(cbs=Listening())
        statuses.add(learner.result.status)
        if index % 4 == 3:
            gc.collect()
            blocks.append(sys.getallocatedblocks())
            assert training_threads() == []
            assert set(anyio.get_running_tasks()) == tasks
            assert learner.bus.subscriptions() == subscriptions
            assert learner.streams == []
            assert forks.running == []
    assert statuses == {"completed", "cancelled", "failed"}
    quarter = len(blocks) // 4
    assert max(blocks[quarter:]) - blocks[quarter - 1] < 2_000


async def test_an_unread_stream_holds_no_more_than_its_buffer(
    make_model: Callable[[], nn.Module],
) -> None:
    """G8, G13: events that were dropped are gone."""
    refs: list[weakref.ref[torch.Tensor]] = []
    learner = TrainLearner(make_model(), DataLoaders(Fresh(50)))

    @learner.on(CleanupBatch)
    def note(event: CleanupBatch) -> None:
        refs.append(weakref.ref(event.loss))

    async with learner.events(CleanupBatch, CleanupFit, buffer=5) as stream:
        await learner.fit(valid=False)
        gc.collect()
        assert alive(refs) == [46, 47, 48, 49]
        assert [type(event) async for event in stream] == [CleanupBatch] * 4 + [CleanupFit]

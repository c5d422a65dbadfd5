"""G10: a callback that keeps the state of a fit is refused in a second one at the same time."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    ChannelLastCB,
    CheckpointCB,
    CompileCB,
    DeviceCB,
    EarlyStoppingCB,
    GradientAccumulationCB,
    GradientClippingCB,
    JournalCB,
    LRFinderCB,
    MetricsCB,
    MixedTrainingCB,
    PrometheusCB,
    RecordCB,
    SchedulerCB,
    SingleBatchCB,
    SingleEpochCB,
    StructlogCB,
    SummaryCB,
    TerminateOnNaNCB,
    TimeLimitCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.listeners import in_use
from eventrain.events import AfterBatch, AfterEpoch, BeforeEpoch, BeforeFit, Bus, Callback
from structlog.testing import capture_logs
from torch import nn

from tests.support.waiting import GUARD, until

BATCHES = [(torch.ones(2, 3), torch.zeros(2, 1))] * 3
Hold = Callable[[BeforeFit], Any]


def learner(cbs: Any = None, value: float = 1.0, bus: Bus | None = None) -> TrainLearner:
    """A learner whose loss is `value` in every batch."""
    return TrainLearner(
        nn.Linear(3, 1),
        DataLoaders(BATCHES, BATCHES),
        lambda preds, targets: preds.sum() * 0 + value,
        cbs=cbs,
        bus=bus,
    )


async def while_fitting(one: TrainLearner, work: Callable[[], Any], **options: Any) -> None:
    """Do some work while a learner is fitting; the fit waits for it."""
    begun, done = anyio.Event(), anyio.Event()

    async def hold(event: BeforeEpoch) -> None:
        begun.set()
        await done.wait()

    with anyio.fail_after(GUARD), one.subscribe(BeforeEpoch, hold, once=True):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: one.fit(1, **options))
            await begun.wait()
            try:
                await work()
            finally:
                done.set()


@pytest.mark.parametrize("shared_bus", [False, True])
async def test_a_second_fit_with_the_metrics_of_the_first_is_refused(shared_bus: bool) -> None:
    """Their losses, 1 and 100, were both reported as 50.5."""
    metrics = MetricsCB()
    bus = Bus() if shared_bus else None
    a, b = learner(metrics, 1.0, bus), learner(metrics, 100.0, bus)
    refused: list[BaseException] = []

    async def second() -> None:
        for call in (b.fit, b.validate, b.get_preds, b.lr_find):
            with pytest.raises(RuntimeError) as raised:
                await call()
            refused.append(raised.value)

    await while_fitting(a, second)
    assert len(refused) == 4
    message = str(refused[0])
    assert "cannot use this MetricsCB" in message
    assert f"run {a.run_id} is using it" in message
    assert "shareable = True" in message
    assert [row["loss"] for row in metrics.history] == [1.0, 1.0]
    await b.fit(1)
    assert [row["loss"] for row in metrics.history[2:]] == [100.0, 100.0]


async def test_both_runs_are_named() -> None:
    metrics = MetricsCB()
    b = learner(metrics)

    async def second() -> None:
        with pytest.raises(RuntimeError, match=r"run two cannot use .* because run one is using"):
            await b.fit(1, run_id="two")

    await while_fitting(learner(metrics), second, run_id="one")


async def test_the_callbacks_of_one_fit_and_those_added_on_the_way_are_checked_too() -> None:
    metrics, others = MetricsCB(), MetricsCB()
    a, b = learner(metrics), learner()

    async def second() -> None:
        with pytest.raises(RuntimeError, match="cannot use this MetricsCB"):
            await b.fit(1, cbs=[others, metrics])
        assert b.cbs == ()

        async def third() -> None:
            with pytest.raises(RuntimeError, match="cannot use this MetricsCB"):
                b.add_cbs(metrics)
            assert b.cbs == ()
            b.add_cbs(others)

        await while_fitting(b, third)

    await while_fitting(a, second)
    assert b.cbs == (others,)


@pytest.mark.parametrize("end", ["completed", "failed", "cancelled", "detached", "refused"])
async def test_a_callback_is_free_again_however_its_fit_ended(end: str) -> None:
    metrics = MetricsCB()
    a, b = learner(metrics), learner(metrics)
    if end == "failed":
        a.loss_func = lambda preds, targets: 1 / 0
        with pytest.raises(ZeroDivisionError):
            await a.fit(1)
    elif end == "cancelled":
        with anyio.CancelScope() as scope:

            async def cancel(event: AfterBatch) -> None:
                scope.cancel()

            a.subscribe(AfterBatch, cancel)
            await a.fit(10)
    elif end == "refused":
        a.dls = None
        with pytest.raises(ValueError, match="missing"):
            await a.fit(1)
    elif end == "detached":

        async def detach() -> None:
            a.remove_cbs(metrics)
            await b.fit(1)

        await while_fitting(a, detach)
    else:
        await a.fit(1)
    assert (await b.fit(1)).status == "completed"
    assert in_use._users == {}


async def test_a_search_that_is_refused_does_not_touch_what_another_fit_is_counting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would save and restore the state of the callback that the other fit uses."""
    metrics = MetricsCB()
    a, b = learner(metrics, 1.0), learner(metrics, 100.0)
    touched: list[Any] = []
    monkeypatch.setattr(metrics, "load_state_dict", touched.append)

    async def second() -> None:
        with pytest.raises(RuntimeError, match="cannot use this MetricsCB"):
            await b.lr_find()

    await while_fitting(a, second)
    assert touched == []
    await b.lr_find()
    assert len(touched) == 1


class Counts(Callback):
    """A callback of the user's own, that counts what it has seen."""

    def __init__(self) -> None:
        self.epochs = 0

    def after_epoch(self, event: AfterEpoch) -> None:
        self.epochs += 1


class SharedCounts(Counts):
    """One that is meant to count over all fits."""

    shareable = True


class Observes(Callback):
    observes = (AfterEpoch,)

    def __init__(self) -> None:
        self.epochs = 0

    def observe(self, event: AfterEpoch) -> None:
        self.epochs += 1


@pytest.mark.parametrize(("cls", "shared"), [(Counts, 0), (SharedCounts, 1), (Observes, 1)])
async def test_callbacks_of_ones_own_are_shared_if_they_say_so_or_only_observe(
    cls: Any, shared: bool
) -> None:
    callback = cls()

    async def second() -> None:
        if shared:
            await learner(callback).fit(1)
            await until(lambda: callback.epochs == 2)
        else:
            with pytest.raises(RuntimeError, match="cannot use this Counts"):
                await learner(callback).fit(1)

    await while_fitting(learner(callback), second)


KEEPS_STATE: dict[str, Callable[[Path], Callback]] = {
    "AccelerateCB": lambda _: AccelerateCB("no"),
    "CheckpointCB": CheckpointCB,
    "CompileCB": lambda _: CompileCB(),
    "EarlyStoppingCB": lambda _: EarlyStoppingCB("loss"),
    "GradientAccumulationCB": lambda _: GradientAccumulationCB(2),
    "GradientClippingCB": lambda _: GradientClippingCB(),
    "JournalCB": lambda folder: JournalCB(folder / "journal.jsonl"),
    "LRFinderCB": lambda _: LRFinderCB(),
    "MetricsCB": lambda _: MetricsCB(),
    "MixedTrainingCB": lambda _: MixedTrainingCB("bf16"),
    "SchedulerCB": lambda _: SchedulerCB(torch.optim.lr_scheduler.LinearLR),
    "SummaryCB": lambda _: SummaryCB(),
    "TerminateOnNaNCB": lambda _: TerminateOnNaNCB(),
    "TimeLimitCB": lambda _: TimeLimitCB(60),
}
KEEPS_NONE: dict[str, Callable[[], Callback]] = {
    "ChannelLastCB": ChannelLastCB,
    "DeviceCB": lambda: DeviceCB("cpu"),
    "RecordCB": lambda: StructlogCB(),
    "PrometheusCB": lambda: PrometheusCB(__import__("prometheus_client").CollectorRegistry()),
    "SingleBatchCB": SingleBatchCB,
    "SingleEpochCB": SingleEpochCB,
    "TrainCB": TrainCB,
}


@pytest.mark.parametrize("name", KEEPS_STATE)
def test_which_callbacks_keep_the_state_of_a_fit(name: str, tmp_path: Path) -> None:
    callback = KEEPS_STATE[name](tmp_path)
    one, other = learner(), learner()
    in_use.reserve([callback], one)
    in_use.reserve([callback], one)
    try:
        with pytest.raises(RuntimeError, match=f"cannot use this {name}"):
            in_use.reserve([callback], other)
    finally:
        in_use.release([callback], other)
        in_use.release([callback], one)
    assert in_use._users == {}


@pytest.mark.parametrize("name", KEEPS_NONE)
async def test_which_keep_none(name: str) -> None:
    callback = KEEPS_NONE[name]()
    with capture_logs():

        async def second() -> None:
            assert (await learner(callback).fit(1)).n_epochs == 1

        await while_fitting(learner(callback), second)
    assert isinstance(callback, RecordCB) or callback.shareable


def test_a_reservation_is_not_inherited_by_a_forked_process() -> None:
    """The fit that made it is not there."""
    metrics, one, other = MetricsCB(), learner(), learner()
    in_use.reserve([metrics], one)
    try:
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()

        def child() -> None:
            try:
                in_use.reserve([metrics], other)
                queue.put(os.getpid())
            except RuntimeError as exc:
                queue.put(str(exc))

        process = context.Process(target=child)
        process.start()
        pid = process.pid
        process.join(GUARD)
        assert queue.get() == pid
    finally:
        in_use.release([metrics], one)

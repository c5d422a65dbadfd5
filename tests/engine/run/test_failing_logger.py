"""G20: a fit ends as it would, whatever the host's logger does with the engine's own lines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
import torch
from eventrain.callbacks import CheckpointCB, StructlogCB
from eventrain.engine import DataLoaders, TrainLearner, log
from eventrain.engine.run import forks
from eventrain.engine.run.thread import TrainingThread
from eventrain.events import AfterBatch, BeforeBatch, BeforeFit, CleanupFit
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from tests.support.waiting import GUARD, thread_has_ended, wait_until


@pytest.fixture(params=["raises", "is async", "blocks"], autouse=True)
def logged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The events of the lines that reach a logger, which then raises, is async or blocks."""
    events: list[str] = []
    goes_on = threading.Event()

    def processor(logger: Any, method: str, record: Any) -> Any:
        events.append(record["event"])
        if request.param == "raises":
            raise BrokenPipeError(32, "Broken pipe")
        if request.param == "blocks":
            goes_on.wait(GUARD)
        raise structlog.DropEvent

    structlog.configure(processors=[processor])
    if request.param == "is async":
        structlog.configure(wrapper_class=structlog.stdlib.AsyncBoundLogger)
    if request.param == "blocks":
        monkeypatch.setattr(log, "PATIENCE", 0.01)
    yield events
    goes_on.set()
    wait_until(lambda: not any(t.name == "eventrain-log" for t in threading.enumerate()))
    assert forks.running == []


def fails(event: object) -> bool:
    raise KeyError("a bug in the observer")


async def test_a_fit_whose_observer_fails_completes(learner: TrainLearner, logged: Any) -> None:
    learner.observe(fails, BeforeFit)
    with anyio.fail_after(GUARD):
        result = await learner.fit()
    assert result.status == "completed"
    assert logged[0] == "observer_failed"


class Unprintable(Exception):
    def __repr__(self) -> str:
        raise AttributeError("args")

    __str__ = __repr__


async def test_a_fit_completes_though_the_error_of_an_observer_cannot_be_printed(
    learner: TrainLearner, logged: Any
) -> None:
    def fail(event: object) -> None:
        raise Unprintable

    learner.observe(fail, BeforeFit)
    with anyio.fail_after(GUARD):
        result = await learner.fit()
    assert result.status == "completed"
    assert logged[0] == "observer_failed"


async def test_a_fit_whose_observer_cannot_choose_completes(
    learner: TrainLearner, logged: Any
) -> None:
    """Its `where` is called in the training thread, where no event loop runs."""
    learner.observe(print, BeforeFit, where=fails)
    with anyio.fail_after(GUARD):
        result = await learner.fit()
    assert result.status == "completed"
    assert logged == ["observer_failed"]


async def test_a_fit_that_dropped_events_completes(learner: TrainLearner, logged: Any) -> None:
    with anyio.fail_after(GUARD):
        async with learner.events(AfterBatch, buffer=1):
            result = await learner.fit()
    assert result.status == "completed"
    assert logged == ["events_dropped"]


async def test_the_error_of_a_fit_that_dropped_events_comes_out(
    learner: TrainLearner, logged: Any
) -> None:
    """G5."""

    @learner.on(CleanupFit)
    def fail(event: CleanupFit) -> None:
        raise ZeroDivisionError("the training's own error")

    with anyio.fail_after(GUARD):
        async with learner.events(AfterBatch, buffer=1):
            with pytest.raises(ZeroDivisionError, match="the training's own error"):
                await learner.fit()
    assert learner.result.status == "failed"
    assert logged == ["events_dropped"]


async def test_a_cancelled_fit_that_dropped_events_is_cancelled(
    learner: TrainLearner, logged: Any
) -> None:
    """G4."""
    with anyio.fail_after(GUARD):
        async with learner.events(AfterBatch, buffer=1):
            with anyio.CancelScope() as scope:

                @learner.on(AfterBatch, every=3)
                async def cancel(event: AfterBatch) -> None:
                    scope.cancel()

                await learner.fit(100)
                pytest.fail("the cancellation was swallowed")
    assert scope.cancelled_caught
    assert learner.result.status == "cancelled"
    assert logged == ["events_dropped"]


async def test_a_cleanup_that_is_cut_short_ends_the_fit(learner: TrainLearner, logged: Any) -> None:
    """G4: it waited for ever for the receiver whose line could not be written."""
    learner.cleanup_timeout = 0.01
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learner.on(CleanupFit)
        async def upload(event: CleanupFit) -> None:
            await anyio.sleep_forever()

        @learner.on(AfterBatch, once=True)
        async def cancel(event: AfterBatch) -> None:
            scope.cancel()

        await learner.fit(100)
    assert scope.cancelled_caught
    assert learner.result.status == "cancelled"
    assert thread_has_ended(learner)
    assert logged == ["cleanup_cut_short"]


async def test_concurrent_fits_complete_and_are_forgotten(
    learner: TrainLearner, dls: DataLoaders, make_model: Any, logged: Any, monkeypatch: Any
) -> None:
    """G13."""
    monkeypatch.setattr(TrainingThread, "_warned_of_shared_rng", False)
    learners = [learner, TrainLearner(make_model(), dls)]
    together = threading.Barrier(2)
    for one in learners:
        one.on(BeforeBatch, once=True)(lambda event: together.wait(GUARD) and None)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            for one in learners:
                tasks.start_soon(one.fit)
    assert [one.result.status for one in learners] == ["completed", "completed"]
    assert logged == ["concurrent_fits_share_rng"]
    assert forks.running == []


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter([(torch.ones(3), torch.zeros(1))] * 3)


async def test_a_fit_that_saves_what_may_not_resume_exactly_completes(
    learner: TrainLearner, tmp_path: Path, logged: Any
) -> None:
    """The line is written in the training thread."""
    learner.dls = DataLoaders(DataLoader(Streamed()))
    with anyio.fail_after(GUARD):
        result = await learner.fit(valid=False, cbs=CheckpointCB(tmp_path, every_batches=1))
    assert result.status == "completed"
    assert logged == ["resume_may_not_be_exact"]


def test_loaders_are_made(digits: Any, logged: Any) -> None:
    data = TensorDataset(*digits)
    assert len(DataLoaders.from_dataset(data, data, batch_size=64).train) == 5
    assert logged[0] == "data_path"


async def test_a_fit_completes_though_its_own_records_cannot_be_written(
    learner: TrainLearner, request: pytest.FixtureRequest, logged: Any
) -> None:
    """As in `python train.py | head`."""
    if "raises" not in request.node.name:
        pytest.skip("a host whose own observer blocks its event loop")
    with anyio.fail_after(GUARD):
        result = await learner.fit(cbs=StructlogCB(every=1))
    assert result.status == "completed"
    assert logged[0] == "fit_started"
    assert "observer_failed" in logged

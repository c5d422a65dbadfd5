"""A cancelled fit that does not return says where its thread is, once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import structlog
import torch
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.run import thread as training_thread
from eventrain.events import (
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    record_events,
)
from structlog.testing import capture_logs
from torch.utils.data import DataLoader, Dataset

from tests.support import waiting
from tests.support.native import natively
from tests.support.waiting import GUARD, wait_until


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_thread, "CANCEL_PATIENCE", 0.05)


@pytest.fixture
def logs() -> Iterator[list[Any]]:
    with capture_logs() as logs:
        yield logs


class Hangs(Callback):
    """A batch that lasts until its host has lost patience."""

    def __init__(self, condition: Callable[[], object]) -> None:
        self._token = anyio.lowlevel.current_token()
        self.reached = anyio.Event()
        self.condition = condition

    def before_batch(self, event: BeforeBatch) -> None:
        anyio.from_thread.run_sync(self.reached.set, token=self._token)
        wait_until(self.condition)


async def cancelled(fit: Callable[[], Awaitable[Any]], hangs: Hangs) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(fit)
        await hangs.reached.wait()
        tg.cancel_scope.cancel()


async def test_a_batch_that_hangs_is_told_with_its_place(
    learner: TrainLearner, logs: list[Any]
) -> None:
    """The line of the user's code that it is at, innermost first."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        hangs = Hangs(lambda: logs)
        await cancelled(lambda: learner.fit(cbs=hangs), hangs)
    (line,) = logs
    (sleeping, batch, *_) = line.pop("where")
    file, _, place = sleeping.partition(":")
    assert file == waiting.__file__
    assert place.endswith(" in wait_until")
    assert batch.endswith(" in Hangs.before_batch")
    assert line == {
        "event": "cancel_waits",
        "log_level": "warning",
        "run_id": learner.run_id,
        "seconds": 0.05,
        "hint": "the fit was cancelled, and returns when its thread reaches its next event",
    }
    assert events.names[-4:] == ["BeforeBatch", "CleanupBatch", "CleanupEpoch", "CleanupFit"]
    assert (learner.result.status, learner.result.who) == ("cancelled", "host")


async def test_it_is_told_once_however_long_it_lasts(
    learner: TrainLearner, logs: list[Any]
) -> None:
    """G4: and the fit still returns only when its thread has ended."""
    hangs = Hangs(lambda: released)
    released: list[bool] = []
    returned: list[bool] = []

    async def fit() -> None:
        try:
            await learner.fit(cbs=hangs)
        finally:
            returned.append(bool(released))

    async with anyio.create_task_group() as tg:
        with anyio.fail_after(GUARD):
            tg.start_soon(fit)
            await hangs.reached.wait()
            tg.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                while not logs:
                    await anyio.sleep(0.01)
                await anyio.sleep(4 * training_thread.CANCEL_PATIENCE)
            released.append(True)
    assert returned == [True]
    assert [line["event"] for line in logs] == ["cancel_waits"]


async def test_a_fit_that_returns_in_time_says_nothing(
    learner: TrainLearner, logs: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_thread, "CANCEL_PATIENCE", GUARD)
    with anyio.fail_after(GUARD):
        hangs = Hangs(lambda: learner.stopping)
        await cancelled(lambda: learner.fit(cbs=hangs), hangs)
    assert logs == []


async def test_a_fit_that_nobody_cancels_may_take_its_time(
    learner: TrainLearner, logs: list[Any]
) -> None:
    learner.on(BeforeBatch, once=True)(
        lambda event: time.sleep(4 * training_thread.CANCEL_PATIENCE)
    )
    learner.on(AfterEpoch, once=True)(lambda event: learner.stop("epoch"))
    with anyio.fail_after(GUARD):
        assert (await learner.fit()).status == "completed"
    assert logs == []


class Blocks(Dataset[Any]):
    """A sample that comes when the host has lost patience."""

    def __init__(self, wait: Callable[[], object]) -> None:
        self._wait = wait

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> Any:
        with ThreadPoolExecutor(1) as pool:
            list(pool.map(lambda _: self._wait(), [None]))  # deep in the standard library
        return torch.ones(3), torch.ones(1)


async def where_it_waits_for(loader: Any, learner: TrainLearner, logs: list[Any]) -> list[str]:
    """What is told of a fit that is cancelled while it waits for its first batch."""
    learner.dls = DataLoaders(loader)
    waits = anyio.Event()
    token = anyio.lowlevel.current_token()
    learner.on(BeforeEpoch)(lambda event: anyio.from_thread.run_sync(waits.set, token=token))
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit, 1, True, False)
            await waits.wait()
            tg.cancel_scope.cancel()
    (line,) = logs
    assert (learner.result.status, learner.result.who) == ("cancelled", "host")
    return [place.rpartition(" in ")[2] for place in line["where"]]


async def test_a_loader_that_blocks_is_told_with_the_line_of_ones_own(
    learner: TrainLearner, logs: list[Any]
) -> None:
    """Beyond the innermost frames, which may all be torch's or the standard library's."""
    loader = DataLoader(Blocks(lambda: wait_until(lambda: logs)))
    *innermost, own, engines = await where_it_waits_for(loader, learner, logs)
    assert len(innermost) == 3
    assert (own, engines) == ("Blocks.__getitem__", "read_batches")


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that are forks of a fresh one, which has begun and imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["eventrain.engine"])
    first = context.Process(target=int)
    first.start()
    first.join()
    return context


async def test_a_worker_process_that_blocks_is_told_with_what_waits_for_it(
    learner: TrainLearner, logs: list[Any], processes: multiprocessing.context.ForkServerContext
) -> None:
    """None of the lines is the user's, but one says that it is the data that is waited for."""
    released = processes.Event()
    loader = DataLoader(
        Blocks(released.wait), num_workers=1, multiprocessing_context=processes, prefetch_factor=1
    )
    threading.Thread(target=lambda: (wait_until(lambda: logs), released.set())).start()
    *_, engines = await where_it_waits_for(loader, learner, logs)
    assert engines == "read_batches"


# --------------------------------------------------------------- nothing else is changed by it


@natively
def test_cancelling_again_and_again_neither_puts_it_off_nor_repeats_it(
    learner: TrainLearner, run_native: Callable[..., Any], logs: list[Any]
) -> None:
    """G4: a cancel a millisecond, from before the line until after it, and so in its very tick."""

    async def main() -> None:
        hangs = Hangs(lambda: released)
        released: list[bool] = []
        task = asyncio.create_task(learner.fit(cbs=hangs))
        await hangs.reached.wait()
        since = time.monotonic()
        async with asyncio.timeout(GUARD):
            while not logs or time.monotonic() < since + 4 * training_thread.CANCEL_PATIENCE:
                task.cancel()
                await asyncio.sleep(0.001)
        assert not task.done()
        released.append(True)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert asyncio.all_tasks() == {asyncio.current_task()}

    run_native(main)
    assert [line["event"] for line in logs] == ["cancel_waits"]


@natively
def test_it_is_told_also_when_every_task_of_the_loop_is_cancelled(
    learner: TrainLearner, run_native: Callable[..., Any], logs: list[Any]
) -> None:
    """G4: what is left of the fit then is the task that awaits it."""

    async def main() -> None:
        hangs = Hangs(lambda: logs)

        async def cancel_all() -> None:
            await hangs.reached.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        canceller = asyncio.create_task(cancel_all())
        try:
            await learner.fit(cbs=hangs)
        finally:
            assert canceller.done()

    with pytest.raises(asyncio.CancelledError):
        run_native(main)
    assert [line["event"] for line in logs] == ["cancel_waits"]


@natively
def test_the_task_knows_how_often_it_was_cancelled(
    learner: TrainLearner, run_native: Callable[..., Any], logs: list[Any]
) -> None:
    """`asyncio.timeout` counts on it: the wait cancels the task for itself, and takes it back."""

    async def main() -> None:
        hangs = Hangs(lambda: logs)

        async def fit_within_a_timeout() -> None:
            async with asyncio.timeout(None) as scope:

                async def expire() -> None:
                    await hangs.reached.wait()
                    scope.reschedule(0)

                expiring = asyncio.create_task(expire())
                try:
                    await learner.fit(cbs=hangs)
                finally:
                    assert expiring.done()

        with pytest.raises(TimeoutError):
            await fit_within_a_timeout()
        assert asyncio.current_task().cancelling() == 0

    run_native(main)
    assert [line["event"] for line in logs] == ["cancel_waits"]


def test_ctrl_c_is_still_a_keyboard_interrupt(
    learner: TrainLearner, backend: dict[str, Any], logs: list[Any]
) -> None:
    """G4."""

    @learner.on(BeforeFit)
    async def once_the_host_waits(event: BeforeFit) -> None:
        await anyio.lowlevel.checkpoint()

    @learner.on(BeforeBatch, once=True)
    def press(event: BeforeBatch) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: logs)

    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            learner.run(**backend)
    finally:
        signal.signal(signal.SIGINT, own)
    assert [line["event"] for line in logs] == ["cancel_waits"]


@natively
def test_a_logger_that_fails_does_not_take_the_place_of_the_cancel(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """G4: what the host gets is its own cancel, when the thread has ended."""
    failed: list[str] = []

    def fail(logger: Any, method: str, line: Any) -> Any:
        failed.append(line["event"])
        raise OSError("disk full")

    async def main() -> None:
        hangs = Hangs(lambda: failed)
        task = asyncio.create_task(learner.fit(cbs=hangs))
        await hangs.reached.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    structlog.configure(processors=[fail])
    run_native(main)
    assert failed == ["cancel_waits"]
    assert (learner.result.status, learner.result.who) == ("cancelled", "host")

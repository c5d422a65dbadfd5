"""However a host cancels a fit, the fit cleans up and returns when its thread has ended."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch
from eventrain.engine import DataLoaders, FitResult, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterLoss,
    BeforeBatch,
    BeforeFit,
    Callback,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    ScopeEnd,
    record_events,
)
from structlog.testing import capture_logs
from torch import nn

from tests.support.native import natively
from tests.support.training import TRAIN_BATCH, VALID_BATCH
from tests.support.waiting import GUARD, thread_has_ended, until, wait_until

VALID_EPOCH = ["BeforeEpoch", *VALID_BATCH * 2, "AfterEpoch", "CleanupEpoch"]
WHOLE_FIT = [
    "BeforeFit",
    *["BeforeEpoch", *TRAIN_BATCH * 3, "AfterEpoch", "CleanupEpoch"],
    *VALID_EPOCH,
    "AfterFit",
    "CleanupFit",
]
UP_TO_THE_SECOND_BATCH = ["BeforeFit", "BeforeEpoch", *TRAIN_BATCH, "BeforeBatch"]
CUT_IN_THE_SECOND_BATCH = [
    *UP_TO_THE_SECOND_BATCH,
    "CleanupBatch",
    "CleanupEpoch",
    "CleanupFit",
]
BY_THE_HOST = ScopeEnd("cancelled", "host", "the task that awaits the fit was cancelled")


class SlowBatch(Callback):
    """Makes the second training batch last until the training was asked to stop, and longer."""

    def __init__(self) -> None:
        self._token = anyio.lowlevel.current_token()
        self.reached = anyio.Event()
        self.released = threading.Event()
        self.released.set()

    def before_batch(self, event: BeforeBatch) -> None:
        if event.training and event.iter == 1:
            anyio.from_thread.run_sync(self.reached.set, token=self._token)
            wait_until(lambda: event.learner.stopping)
            assert self.released.wait(GUARD)
            time.sleep(0.02)  # a fit that did not wait for its thread would be back by now


def assert_cut_in_the_second_batch(learner: TrainLearner, events: record_events) -> None:
    """The whole event list, how each scope ended, and that the thread did."""
    assert events.names == CUT_IN_THE_SECOND_BATCH
    assert [event.end for event in events[-3:]] == [BY_THE_HOST] * 3
    assert thread_has_ended(learner)


# ------------------------------------------------------------------- the ways of any backend

Fit = Callable[[], Awaitable[FitResult]]


async def when(reached: anyio.Event, act: Callable[[], object]) -> None:
    await reached.wait()
    act()


async def by_cancel_scope(fit: Fit, reached: anyio.Event) -> None:
    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as scope:
            tg.start_soon(when, reached, scope.cancel)
            await fit()
    assert scope.cancelled_caught


async def by_move_on_after(fit: Fit, reached: anyio.Event) -> None:
    async with anyio.create_task_group() as tg:
        with anyio.move_on_after(GUARD) as scope:
            tg.start_soon(when, reached, lambda: setattr(scope, "deadline", anyio.current_time()))
            await fit()
    assert scope.cancelled_caught


async def by_fail_after(fit: Fit, reached: anyio.Event) -> None:
    async def within_a_deadline() -> None:
        with anyio.fail_after(GUARD) as scope:
            tg.start_soon(when, reached, lambda: setattr(scope, "deadline", anyio.current_time()))
            await fit()

    async with anyio.create_task_group() as tg:
        with pytest.raises(TimeoutError):
            await within_a_deadline()


async def by_failing_sibling(fit: Fit, reached: anyio.Event) -> None:
    async def fail() -> None:
        await reached.wait()
        raise ZeroDivisionError

    async def beside_it() -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(fail)
            await fit()

    with pytest.raises(ExceptionGroup) as caught:
        await beside_it()
    assert [type(exc) for exc in caught.value.exceptions] == [ZeroDivisionError]


async def by_group_of_the_fit(fit: Fit, reached: anyio.Event) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(fit)
        await reached.wait()
        tg.cancel_scope.cancel()


async def by_scope_around_a_scope(fit: Fit, reached: anyio.Event) -> None:
    async with anyio.create_task_group() as tg:
        with anyio.CancelScope() as outer:
            with anyio.CancelScope() as inner:
                tg.start_soon(when, reached, lambda: (inner.cancel(), outer.cancel()))
                await fit()
    assert outer.cancelled_caught


@pytest.mark.parametrize(
    "cancel",
    [
        by_cancel_scope,
        by_move_on_after,
        by_fail_after,
        by_failing_sibling,
        by_group_of_the_fit,
        by_scope_around_a_scope,
    ],
)
async def test_fit_returns_when_its_thread_has_ended(
    learner: TrainLearner, cancel: Callable[[Fit, anyio.Event], Awaitable[None]]
) -> None:
    """G4: anyio's scopes, timeouts and task groups."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        slow = SlowBatch()
        tasks = set(anyio.get_running_tasks())
        await cancel(lambda: learner.fit(cbs=slow), slow.reached)
        assert_cut_in_the_second_batch(learner, events)
        assert set(anyio.get_running_tasks()) == tasks
    assert learner.result is not None
    assert (learner.result.status, learner.result.batches) == ("cancelled", 1)
    assert not learner.fitting
    assert not learner.stopping


async def test_a_fit_in_a_cancelled_scope_trains_no_batch(learner: TrainLearner) -> None:
    """G4: the thread stops at the first event that it comes to when the cancel has arrived."""
    learner.on(BeforeFit)(lambda event: wait_until(lambda: event.learner.stopping))
    with record_events(learner) as events, anyio.CancelScope() as scope:
        scope.cancel()
        await learner.fit()
    assert scope.cancelled_caught
    # Or it arrives before the first event.
    assert events.names in (["BeforeFit", "CleanupEpoch", "CleanupFit"], ["CleanupFit"])
    assert thread_has_ended(learner)


# ------------------------------------------------------------------------- the ways of asyncio


async def cancel_once(task: asyncio.Task[Any]) -> None:
    task.cancel()


async def cancel_three_times_at_once(task: asyncio.Task[Any]) -> None:
    for _ in range(3):
        task.cancel()


async def cancel_again_and_again(task: asyncio.Task[Any]) -> None:
    for _ in range(5):
        task.cancel()
        await asyncio.sleep(0)


async def cancel_when_it_is_stopping_already(task: asyncio.Task[Any]) -> None:
    task.cancel()
    for _ in range(10):
        await asyncio.sleep(0)
    task.cancel()


@natively
@pytest.mark.parametrize(
    "cancel",
    [
        cancel_once,
        cancel_three_times_at_once,
        cancel_again_and_again,
        cancel_when_it_is_stopping_already,
    ],
)
def test_task_cancel_waits_for_the_thread(
    learner: TrainLearner,
    run_native: Callable[..., Any],
    cancel: Callable[[asyncio.Task[Any]], Awaitable[None]],
) -> None:
    """G4: `Task.cancel()`, once and often."""

    async def main() -> None:
        slow = SlowBatch()
        task = asyncio.create_task(learner.fit(cbs=slow))
        await slow.reached.wait()
        slow.released.clear()
        await cancel(task)
        assert not task.done()
        slow.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelled()
        assert_cut_in_the_second_batch(learner, events)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    with record_events(learner) as events:
        run_native(main)


@natively
def test_asyncio_timeout_waits_for_the_thread(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """G4: `asyncio.timeout`, which turns the cancel into a TimeoutError."""

    async def main() -> None:
        slow = SlowBatch()
        expire: asyncio.Task[None]

        async def within_a_timeout() -> None:
            nonlocal expire
            async with asyncio.timeout(GUARD) as scope:
                now = asyncio.get_running_loop().time
                expire = asyncio.create_task(when(slow.reached, lambda: scope.reschedule(now())))
                await learner.fit(cbs=slow)

        with pytest.raises(TimeoutError):
            await within_a_timeout()
        assert_cut_in_the_second_batch(learner, events)
        await expire
        assert asyncio.current_task().cancelling() == 0

    with record_events(learner) as events:
        run_native(main)


@natively
def test_wait_for_waits_for_the_thread(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """G4: `asyncio.wait_for`."""

    async def main() -> None:
        slow = SlowBatch()
        fit = asyncio.create_task(learner.fit(cbs=slow))
        await slow.reached.wait()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(fit, timeout=0.05)
        assert_cut_in_the_second_batch(learner, events)

    with record_events(learner) as events:
        run_native(main)


@natively
def test_a_failing_sibling_in_an_asyncio_task_group_waits_for_the_thread(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """G4: a task group reports the sibling's error alone, once the thread has ended."""

    async def main() -> None:
        slow = SlowBatch()

        async def fail() -> None:
            await slow.reached.wait()
            raise ZeroDivisionError

        async def both() -> None:
            async with asyncio.TaskGroup() as tg:
                tg.create_task(learner.fit(cbs=slow))
                tg.create_task(fail())

        with pytest.raises(ExceptionGroup) as caught:
            await both()
        assert [type(exc) for exc in caught.value.exceptions] == [ZeroDivisionError]
        assert_cut_in_the_second_batch(learner, events)

    with record_events(learner) as events:
        run_native(main)


@natively
@pytest.mark.parametrize("times", [1, 3])
def test_cancelling_every_task_of_the_loop_waits_for_the_thread(
    learner: TrainLearner, run_native: Callable[..., Any], times: int
) -> None:
    """G4: what `asyncio.run` does on its way out, and uvicorn after a second Ctrl-C."""

    async def main() -> None:
        slow = SlowBatch()
        slow.released.clear()

        async def cancel_all() -> None:
            await slow.reached.wait()
            for _ in range(times):
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()
                for _ in range(5):
                    await asyncio.sleep(0)
            slow.released.set()

        canceller = asyncio.create_task(cancel_all())
        try:
            await learner.fit(cbs=slow)
        finally:
            assert_cut_in_the_second_batch(learner, events)
            assert canceller.done()

    with record_events(learner) as events, pytest.raises(asyncio.CancelledError):
        run_native(main)
    assert thread_has_ended(learner)


@natively
@pytest.mark.filterwarnings(
    "ignore:coroutine 'TrainingThread._serve' was never awaited"
)  # and is told
@pytest.mark.parametrize("receiver_event", [BeforeBatch, CleanupBatch])
def test_cancelling_every_task_just_before_an_async_receiver_starts_does_not_hang(
    learner: TrainLearner, run_native: Callable[..., Any], receiver_event: type[Event]
) -> None:
    """G4: a task that is cancelled before its first step never runs a line of its own."""
    started = threading.Event()

    def cancel_all_as_soon_as_it_is_made(
        loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **kwargs: Any
    ) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=loop, **kwargs)
        if started.is_set():
            started.clear()
            for each in asyncio.all_tasks(loop):
                each.cancel()
        return task

    async def receiver(event: Event) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        asyncio.get_running_loop().set_task_factory(cancel_all_as_soon_as_it_is_made)
        await learner.fit()

    learner.on(receiver_event, order=-1, where=lambda event: event.iter == 1)(
        lambda event: started.set()
    )
    learner.on(receiver_event, where=lambda event: event.iter == 1)(receiver)
    with record_events(learner) as events, pytest.raises(asyncio.CancelledError):
        run_native(main)
    gc.collect()
    assert events.names[-2:] == ["CleanupEpoch", "CleanupFit"]
    assert thread_has_ended(learner)


Cancel = Callable[[anyio.CancelScope, asyncio.Task[Any]], object]


def cancel_twice(
    learner: TrainLearner, run_native: Callable[..., Any], cancel: Cancel, cancel_again: Cancel
) -> None:
    """Cancel a scope and the task that it is in, one after the other: the task is cancelled."""

    async def main() -> None:
        slow = SlowBatch()
        slow.released.clear()
        went_on = False

        async def host() -> None:
            nonlocal went_on
            with scope:
                await learner.fit(cbs=slow)
            await asyncio.sleep(0)
            went_on = True

        scope = anyio.CancelScope()
        task = asyncio.create_task(host())
        await slow.reached.wait()
        cancel(scope, task)
        await until(lambda: learner.stopping)
        cancel_again(scope, task)
        await asyncio.sleep(0)
        slow.released.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not went_on
        assert_cut_in_the_second_batch(learner, events)

    with record_events(learner) as events:
        run_native(main)


@natively
def test_a_native_cancel_after_one_of_anyio_is_not_swallowed(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """The scope catches its own cancel; the task is cancelled all the same."""
    cancel_twice(
        learner,
        run_native,
        lambda scope, task: scope.cancel(),
        lambda scope, task: task.cancel(),
    )


@natively
def test_an_anyio_cancel_after_a_native_one_does_not_swallow_it(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """The first cancel, of the task, wins over the second, of a scope in it."""
    cancel_twice(
        learner,
        run_native,
        lambda scope, task: task.cancel(),
        lambda scope, task: scope.cancel(),
    )


# ------------------------------------------------------------------------------ at every event


def expected_after(index: int) -> list[str]:
    """The events of a fit that is cancelled while the one at `index` is being received."""
    end = index + 1
    while WHOLE_FIT[end : end + 1] and WHOLE_FIT[end].startswith("Cleanup"):
        end += 1  # no cancel keeps a scope from being cleaned up
    opened = []
    for name in WHOLE_FIT[:end]:
        if name.startswith("Before"):
            opened.append(name.removeprefix("Before"))
        elif name.startswith("Cleanup"):
            opened.pop()
    left_a_scope = WHOLE_FIT[end - 1].startswith("Cleanup")  # where nothing more is entered
    if not left_a_scope and WHOLE_FIT[end].startswith("Before"):
        opened.append(WHOLE_FIT[end].removeprefix("Before"))  # entered, and left at once
    return WHOLE_FIT[:end] + [f"Cleanup{scope}" for scope in reversed(opened)]


class CancelAt(Callback):
    """Cancels at the event with this index, and goes on when the learner knows."""

    def __init__(self, index: int, cancel: Callable[[], object]) -> None:
        self._left = index
        self._cancel = cancel
        self._token = anyio.lowlevel.current_token()

    def event(self, event: Event) -> None:
        if self._left == 0:
            anyio.from_thread.run_sync(self._cancel, token=self._token)
            wait_until(lambda: event.learner.stopping)
        self._left -= 1


def weights(learner: TrainLearner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.model.parameters()]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


async def test_a_cancel_at_every_event_cleans_up_and_leaves_the_learner_as_new(
    learner: TrainLearner,
) -> None:
    """G1, G4, G9: each scope entered is left once, and a second fit is like a first one."""
    start = {name: value.clone() for name, value in learner.model.state_dict().items()}
    with record_events(learner) as events:
        await learner.fit()
    assert events.names == WHOLE_FIT
    first = weights(learner)
    subscriptions = learner.bus.subscriptions()
    tasks = set(anyio.get_running_tasks())
    for index in range(len(WHOLE_FIT)):
        learner.model.load_state_dict(start)
        with anyio.fail_after(GUARD), record_events(learner) as events:
            with anyio.CancelScope() as scope:
                await learner.fit(cbs=CancelAt(index, scope.cancel))
            assert scope.cancelled_caught
        assert (index, events.names) == (index, expected_after(index))
        assert thread_has_ended(learner)
        assert set(anyio.get_running_tasks()) == tasks
        assert (learner.bus.subscriptions(), learner.cbs) == (subscriptions, ())
        assert (learner.fitting, learner.stopping) == (False, False)
        learner.model.load_state_dict(start)
        learner.model.zero_grad()  # a batch cut after Backward leaves its gradients
        with anyio.fail_after(GUARD), record_events(learner) as events:
            assert (await learner.fit()).status == "completed"
        assert events.names == WHOLE_FIT
        assert_equal(weights(learner), first)


@natively
def test_a_native_cancel_at_every_event_cleans_up(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """G1, G4: the same with `Task.cancel()`."""

    async def main() -> None:
        for index in range(len(WHOLE_FIT)):
            with record_events(learner) as events:

                async def host(index: int = index) -> None:
                    task = asyncio.current_task()
                    await learner.fit(cbs=CancelAt(index, task.cancel))

                task = asyncio.create_task(host())
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert (index, events.names) == (index, expected_after(index))
            assert thread_has_ended(learner)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert learner.cbs == ()

    run_native(main)


async def test_a_receiver_that_cancels_the_scope_of_the_fit_ends_the_fit(
    learner: TrainLearner,
) -> None:
    """G4: an async receiver runs in the host's loop and may cancel its task."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        with anyio.CancelScope() as scope:

            @learner.on(AfterLoss, where=lambda event: event.iter == 1)
            async def cancel(event: AfterLoss) -> None:
                scope.cancel()

            learner.on(AfterLoss, order=1)(
                lambda event: wait_until(lambda: learner.stopping or event.iter == 0)
            )
            await learner.fit()
    assert events.names == [
        *UP_TO_THE_SECOND_BATCH,
        "AfterPredict",
        "AfterLoss",
        "CleanupBatch",
        "CleanupEpoch",
        "CleanupFit",
    ]


# ---------------------------------------------------------------------------- async receivers


async def test_a_receiver_that_awaits_forever_is_cancelled(learner: TrainLearner) -> None:
    """G1, G4: the receiver sees the cancel, the training thread leaves its scopes."""
    left: list[str] = []
    waiting = anyio.Event()

    @learner.on(AfterBatch)
    async def wait_forever(event: AfterBatch) -> None:
        try:
            waiting.set()
            await anyio.sleep_forever()
        finally:
            left.append("receiver")

    learner.on(CleanupFit)(lambda event: left.append("fit"))
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            await waiting.wait()
            tg.cancel_scope.cancel()
    assert events.names == [
        "BeforeFit",
        "BeforeEpoch",
        *TRAIN_BATCH,
        "CleanupEpoch",
        "CleanupFit",
    ]
    assert left == ["receiver", "fit"]
    assert [event.end for event in events[-2:]] == [BY_THE_HOST] * 2
    assert (learner.result.status, learner.result.who) == ("cancelled", "host")
    assert thread_has_ended(learner)


@natively
@pytest.mark.parametrize("times", [1, 3])
def test_a_receiver_that_awaits_forever_is_cancelled_natively(
    learner: TrainLearner, run_native: Callable[..., Any], times: int
) -> None:
    """G1, G4: so too when every task of the loop is cancelled, the receiver's own among them."""

    async def main() -> None:
        waiting = asyncio.Event()

        @learner.on(AfterBatch)
        async def wait_forever(event: AfterBatch) -> None:
            waiting.set()
            await asyncio.sleep(3600)

        async def cancel_all() -> None:
            await waiting.wait()
            for _ in range(times):
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()

        canceller = asyncio.create_task(cancel_all())
        try:
            await learner.fit()
        finally:
            assert canceller.done()

    with record_events(learner) as events, pytest.raises(asyncio.CancelledError):
        run_native(main)
    assert events.names == ["BeforeFit", "BeforeEpoch", *TRAIN_BATCH, "CleanupEpoch", "CleanupFit"]
    assert [event.end for event in events[-2:]] == [BY_THE_HOST] * 2
    assert thread_has_ended(learner)


CLEANUPS = [CleanupStep, CleanupBatch, CleanupEpoch, CleanupFit]


@pytest.mark.parametrize("cleanup", CLEANUPS)
async def test_an_async_cleanup_is_shielded(learner: TrainLearner, cleanup: type[Event]) -> None:
    """G1: a cancel that comes while cleanup awaits does not cut it; it comes afterwards."""
    cleaned: list[str] = []
    waiting = anyio.Event()

    @learner.on(cleanup)
    async def clean(event: Event) -> None:
        waiting.set()
        await until(lambda: learner.stopping)
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        cleaned.append(type(event).__name__)

    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            await waiting.wait()
            tg.cancel_scope.cancel()
    assert events.names == expected_after(WHOLE_FIT.index(cleanup.__name__))
    assert set(cleaned) == {cleanup.__name__}
    assert len(cleaned) == events.names.count(cleanup.__name__)


async def test_an_async_cleanup_is_shielded_when_the_cancel_came_before(
    learner: TrainLearner,
) -> None:
    """G1: each scope's cleanup still awaits to its end after the host has cancelled."""
    cleaned: list[str] = []

    async def clean(event: Event) -> None:
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        cleaned.append(type(event).__name__)

    for cleanup in CLEANUPS:
        learner.subscribe(cleanup, clean)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        slow = SlowBatch()
        await by_cancel_scope(lambda: learner.fit(cbs=slow), slow.reached)
        assert_cut_in_the_second_batch(learner, events)
    assert cleaned == ["CleanupStep", "CleanupBatch", "CleanupBatch", "CleanupEpoch", "CleanupFit"]


@pytest.mark.parametrize("cleanup", CLEANUPS)
async def test_an_async_cleanup_that_never_ends_is_cut_short_and_said(
    learner: TrainLearner, cleanup: type[Event]
) -> None:
    """G1, G4: a deadline, a warning that names the receiver; the scopes outside are cleaned up."""
    learner.cleanup_timeout = 0.02
    waiting = anyio.Event()
    after: list[str] = []

    @learner.on(cleanup)
    async def hang(event: Event) -> None:
        waiting.set()
        await anyio.sleep_forever()

    learner.on(cleanup, order=1)(lambda event: after.append(type(event).__name__))
    with capture_logs() as logs, anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            await waiting.wait()
            tg.cancel_scope.cancel()
    assert events.names == expected_after(WHOLE_FIT.index(cleanup.__name__))
    assert after == [name for name in events.names if name == cleanup.__name__]
    assert logs == [
        {
            "event": "cleanup_cut_short",
            "log_level": "warning",
            "run_id": learner.run_id,
            "receiver": hang.__qualname__,
            "cleanup": cleanup.__name__,
            "cleanup_timeout": 0.02,
        }
    ] * len(after)
    assert thread_has_ended(learner)


@natively
def test_cancelling_again_during_an_async_cleanup_does_not_prolong_it(
    learner: TrainLearner, run_native: Callable[..., Any]
) -> None:
    """G4: the deadline is set by the first cancel; later ones neither cut nor move it."""
    learner.cleanup_timeout = 2
    cleaned: list[str] = []

    async def main() -> None:
        waiting = asyncio.Event()

        @learner.on(CleanupBatch, once=True)
        async def clean(event: CleanupBatch) -> None:
            waiting.set()
            await until(lambda: learner.stopping)
            await asyncio.sleep(0.02)
            cleaned.append("awaited")
            await asyncio.sleep(3600)

        task = asyncio.create_task(learner.fit())
        await waiting.wait()
        while not task.done():
            task.cancel()
            await asyncio.sleep(0.005)
        assert task.cancelled()

    with capture_logs() as logs:
        run_native(main)
    assert cleaned == ["awaited"]
    assert [line["event"] for line in logs] == ["cleanup_cut_short"]
    assert thread_has_ended(learner)


async def test_an_error_in_cleanup_outweighs_the_cancel_and_all_is_cleaned_up(
    learner: TrainLearner,
) -> None:
    """G1, G5: what fails while the host cancels is not lost."""

    @learner.on(CleanupBatch, where=lambda event: event.end.status == "cancelled")
    def fail(event: CleanupBatch) -> None:
        raise OSError("disk full")

    with anyio.fail_after(GUARD), record_events(learner) as events:
        slow = SlowBatch()
        async with anyio.create_task_group() as tg:
            scope = anyio.CancelScope()
            tg.start_soon(when, slow.reached, scope.cancel)
            with scope, pytest.raises(OSError, match="disk full"):
                await learner.fit(cbs=slow)
    assert events.names == CUT_IN_THE_SECOND_BATCH
    assert learner.result.status == "failed"
    assert thread_has_ended(learner)


@dataclass(frozen=True, slots=True, eq=False)
class LockReleased(Event):
    """An event that a callback of these tests emits when it cleans up."""


async def test_an_event_that_a_cleanup_emits_is_sent_though_the_host_has_cancelled(
    learner: TrainLearner,
) -> None:
    """G1: a cancel that is still pending does not cut a cleanup in the middle."""
    cleaned: list[str] = []

    @learner.on(CleanupBatch, where=lambda event: event.end.status == "cancelled")
    def clean(event: CleanupBatch) -> None:
        event.learner.emit(LockReleased)
        cleaned.append("to the end")

    with anyio.fail_after(GUARD), record_events(learner) as events:
        slow = SlowBatch()
        await by_cancel_scope(lambda: learner.fit(cbs=slow), slow.reached)
    assert events.names == [
        *UP_TO_THE_SECOND_BATCH,
        *["CleanupBatch", "LockReleased", "CleanupEpoch", "CleanupFit"],
    ]
    assert cleaned == ["to the end"]


# -------------------------------------------------------------------------------- learner.stop

AFTER_STOP = {
    "fit": CUT_IN_THE_SECOND_BATCH,
    "epoch": [
        *UP_TO_THE_SECOND_BATCH,
        "CleanupBatch",
        "CleanupEpoch",
        *VALID_EPOCH,
        "AfterFit",
        "CleanupFit",
    ],
    "batch": [
        *UP_TO_THE_SECOND_BATCH,
        "CleanupBatch",
        *TRAIN_BATCH,
        "AfterEpoch",
        "CleanupEpoch",
        *VALID_EPOCH,
        "AfterFit",
        "CleanupFit",
    ],
}


async def from_a_task(stop: Callable[[], object], slow: SlowBatch) -> None:
    await slow.reached.wait()
    stop()


async def from_a_thread(stop: Callable[[], object], slow: SlowBatch) -> None:
    await slow.reached.wait()
    thread = threading.Thread(target=stop)
    thread.start()
    thread.join()


async def from_a_signal_handler(stop: Callable[[], object], slow: SlowBatch) -> None:
    await slow.reached.wait()
    before = signal.signal(signal.SIGTERM, lambda signum, frame: stop())
    try:
        signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("caller", [from_a_task, from_a_thread, from_a_signal_handler])
@pytest.mark.parametrize("scope", ["fit", "epoch", "batch"])
async def test_stop_leaves_the_scope_it_names(
    learner: TrainLearner,
    scope: str,
    caller: Callable[[Callable[[], object], SlowBatch], Awaitable[None]],
) -> None:
    """G3: stop ends the scope it names and nothing wider, and says who and why."""
    results: list[FitResult] = []

    async def fit() -> None:
        results.append(await learner.fit(cbs=slow))

    with anyio.fail_after(GUARD), record_events(learner) as events:
        slow = SlowBatch()
        async with anyio.create_task_group() as tg:
            tg.start_soon(fit)
            tg.start_soon(caller, lambda: learner.stop(scope, reason="enough"), slow)
    assert events.names == AFTER_STOP[scope]
    ends = {type(e).__name__: e.end for e in events if getattr(e, "end", None)}
    stopped = ScopeEnd("cancelled", "Learner.stop", "enough")
    assert ends["CleanupFit"] == (stopped if scope == "fit" else ScopeEnd("completed"))
    assert [event.end for event in events[len(UP_TO_THE_SECOND_BATCH) :][:1]] == [stopped]
    assert (results[0].status, results[0].who, results[0].reason) == (
        ("cancelled", "Learner.stop", "enough") if scope == "fit" else ("completed", None, None)
    )
    assert not learner.stopping
    assert thread_has_ended(learner)


@pytest.mark.parametrize("scope", ["fit", "epoch", "batch"])
async def test_a_receiver_may_call_stop(learner: TrainLearner, scope: str) -> None:
    """G3: the other receivers of that event still run; the next event is not emitted."""
    heard: list[int] = []

    @learner.on(BeforeBatch, where=lambda event: event.training and event.iter == 1)
    def stop(event: BeforeBatch) -> None:
        assert learner.stop(scope)
        assert learner.stopping

    learner.on(BeforeBatch, order=1, where=lambda event: event.training)(
        lambda event: heard.append(event.iter)
    )
    with record_events(learner) as events:
        await learner.fit()
    assert events.names == AFTER_STOP[scope]
    assert heard[:2] == [0, 1]


async def test_an_async_receiver_may_call_stop(learner: TrainLearner) -> None:
    """G3: on the event loop, as on any thread."""

    @learner.on(BeforeBatch, where=lambda event: event.iter == 1)
    async def stop(event: BeforeBatch) -> None:
        await anyio.lowlevel.checkpoint()
        learner.stop("fit")

    with anyio.fail_after(GUARD), record_events(learner) as events:
        result = await learner.fit()
    assert events.names == CUT_IN_THE_SECOND_BATCH
    assert result.status == "cancelled"


async def test_stop_before_and_after_a_fit_has_no_effect(learner: TrainLearner) -> None:
    """A stop is for the fit that runs: none waits for the next one."""
    assert not learner.stop()
    with record_events(learner) as events:
        await learner.fit()
    assert events.names == WHOLE_FIT
    assert not learner.stop()
    assert not learner.stopping


async def test_a_stop_of_a_batch_that_ends_by_itself_is_not_for_the_next(
    learner: TrainLearner,
) -> None:
    """A stop is for the scope that is open when it is called."""
    learner.on(CleanupBatch, where=lambda event: event.training and event.iter == 0)(
        lambda event: learner.stop("batch")
    )
    with record_events(learner) as events:
        result = await learner.fit()
    assert events.names == WHOLE_FIT
    assert (result.status, result.batches) == ("completed", 3)


async def test_a_stop_and_a_cancel_together_end_in_the_cancel(learner: TrainLearner) -> None:
    """G4: stop() must not swallow a cancellation of the host, which came with it."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        slow = SlowBatch()
        slow.released.clear()
        async with anyio.create_task_group() as tg:
            with anyio.CancelScope() as scope:

                async def stop_and_cancel() -> None:
                    await slow.reached.wait()
                    learner.stop("epoch")
                    scope.cancel()
                    for _ in range(5):
                        await anyio.lowlevel.checkpoint()
                    slow.released.set()

                tg.start_soon(stop_and_cancel)
                await learner.fit(cbs=slow)
    assert scope.cancelled_caught
    assert events.names == [
        *UP_TO_THE_SECOND_BATCH,
        *["CleanupBatch", "CleanupEpoch"],  # what was asked first
        "CleanupFit",  # no further epoch is entered
    ]
    assert learner.result.status == "cancelled"
    assert thread_has_ended(learner)


# -------------------------------------------------------------------------------------- Ctrl-C


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler, whatever runs the tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_training_before_it_reaches_the_caller(
    learner: TrainLearner, backend: dict[str, Any], times: int
) -> None:
    """G4: SIGINT out of `run`, also when pressed again and again."""

    @learner.on(BeforeFit)
    async def once_the_host_waits(event: BeforeFit) -> None:
        await anyio.lowlevel.checkpoint()

    @learner.on(BeforeBatch, where=lambda event: event.training and event.iter == 1)
    def press(event: BeforeBatch) -> None:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: learner.stopping)
            time.sleep(0.02)

    with record_events(learner) as events, pytest.raises(KeyboardInterrupt):
        learner.run(**backend)
    assert_cut_in_the_second_batch(learner, events)
    assert not learner.fitting


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_reaches_an_async_receiver_that_awaits_forever(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """G4: SIGINT while the training waits for the event loop."""

    @learner.on(AfterBatch)
    async def wait_forever(event: AfterBatch) -> None:
        await anyio.lowlevel.checkpoint()
        os.kill(os.getpid(), signal.SIGINT)
        await anyio.sleep_forever()

    with record_events(learner) as events, pytest.raises(KeyboardInterrupt):
        learner.run(**backend)
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", *TRAIN_BATCH],
        *["CleanupEpoch", "CleanupFit"],
    ]
    assert thread_has_ended(learner)


# ----------------------------------------------------------------------- beyond the training


async def test_a_cancel_while_observers_drain_is_not_swallowed(learner: TrainLearner) -> None:
    """G4, G8: the run is complete, the observers get their time, then the cancel is raised."""
    learner.drain_timeout = 0.1
    draining = anyio.Event()

    async def hang(event: Event) -> None:
        draining.set()
        await anyio.sleep_forever()

    learner.observe(hang, CleanupFit)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            with anyio.CancelScope() as scope:
                tg.start_soon(when, draining, scope.cancel)
                await learner.fit()
                await anyio.lowlevel.checkpoint()  # where trio delivers it
    assert scope.cancelled_caught
    assert events.names == WHOLE_FIT
    assert learner.result.status == "completed"


async def test_a_fit_that_fails_while_it_is_cancelled_raises_its_error(
    learner: TrainLearner,
) -> None:
    """G5: a failure is not hidden by a cancel that came a moment later."""
    with anyio.fail_after(GUARD):
        with anyio.CancelScope() as scope:

            @learner.on(AfterLoss)
            def fail(event: AfterLoss) -> None:
                anyio.from_thread.run_sync(scope.cancel, token=token)
                wait_until(lambda: learner.stopping)
                raise ZeroDivisionError

            token = anyio.lowlevel.current_token()
            with pytest.raises(ZeroDivisionError):
                await learner.fit()
            assert learner.result.status == "failed"


async def test_a_cancel_of_one_fit_leaves_its_neighbours_alone(
    make_model: Callable[[], nn.Module], dls: DataLoaders
) -> None:
    """G10: two fits in one loop; one is cancelled, the other goes on to its end."""
    one, other = (TrainLearner(make_model(), dls) for _ in range(2))
    with anyio.fail_after(GUARD), record_events(one) as events, record_events(other) as others:
        slow = SlowBatch()
        async with anyio.create_task_group() as tg:
            tg.start_soon(other.fit)
            await by_cancel_scope(lambda: one.fit(cbs=slow), slow.reached)
    assert events.names == CUT_IN_THE_SECOND_BATCH
    assert others.names == WHOLE_FIT
    assert thread_has_ended(one)


def test_a_cancel_between_two_epochs_enters_no_further_one(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """G4."""
    read: list[str] = []

    class Counted(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            read.append("read")
            return super().__iter__()

    learner.dls = DataLoaders(Counted(learner.dls.train), Counted(learner.dls.valid))

    async def main() -> None:
        with anyio.CancelScope() as scope:
            index = WHOLE_FIT.index("CleanupEpoch")
            await learner.fit(cbs=CancelAt(index, scope.cancel))

    with record_events(learner) as events:
        anyio.run(main, **backend)
    assert read == ["read"]
    assert [type(e) for e in events[-3:]] == [AfterEpoch, CleanupEpoch, CleanupFit]

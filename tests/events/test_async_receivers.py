"""Async receivers in a fit: awaited in their place in the order, on the caller's event loop."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterLoss,
    BeforeBatch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    Event,
    FitEvent,
    GetLoss,
    Predict,
    record_events,
)

from tests.support.waiting import GUARD

Called = list[tuple[str, int]]


@pytest.fixture
def learner(make_batches: Any, make_model: Any) -> TrainLearner:
    """Two training batches and one for validation."""
    return TrainLearner(make_model(), DataLoaders(make_batches(2), make_batches(1)))


def kinds(called: Called) -> dict[str, Callable[[Event], Awaitable[None]]]:
    """One receiver of each kind that is to be awaited."""

    async def function(event: Event, name: str = "function") -> None:
        await anyio.lowlevel.checkpoint()
        await anyio.lowlevel.checkpoint()
        called.append((name, threading.get_ident()))

    class CallableObject:
        async def __call__(self, event: Event) -> None:
            await function(event, "callable object")

        async def method(self, event: Event) -> None:
            await function(event, "method")

    return {
        "function": function,
        "callable object": CallableObject(),
        "method": CallableObject().method,
        "partial": partial(function, name="partial"),
        "lambda": lambda event: function(event, "lambda"),
    }


async def test_async_receivers_of_all_kinds_are_awaited_in_their_place(
    learner: TrainLearner,
) -> None:
    """G2: each is done before the next is called; plain ones run in the training thread."""
    called: Called = []

    def plain(event: Event, name: str) -> None:
        called.append((name, threading.get_ident()))

    receivers = kinds(called)
    for order, name in reversed(list(enumerate(receivers))):
        learner.subscribe(BeforeBatch, partial(plain, name=f"behind {name}"), order=order + 0.5)
        learner.subscribe(BeforeBatch, receivers[name], order=order)
    learner.subscribe(BeforeBatch, partial(plain, name="first"), order=-1)
    with anyio.fail_after(GUARD):
        await learner.fit()

    one_batch = ["first"]
    for name in receivers:
        one_batch += [name, f"behind {name}"]
    assert [name for name, _ in called] == one_batch * 3
    assert {thread for name, thread in called if name in receivers} == {threading.get_ident()}
    training = {thread for name, thread in called if name not in receivers}
    assert len(training) == 1
    assert threading.get_ident() not in training


def test_run_awaits_them_as_well(learner: TrainLearner, backend: dict[str, Any]) -> None:
    heard: list[str] = []

    @learner.on(Event)
    async def receiver(event: Event) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append(type(event).__name__)

    with record_events(learner) as events:
        learner.run(**backend)
    assert heard == events.names
    assert heard[-1] == "CleanupFit"


async def test_the_training_waits_and_the_loop_does_not(learner: TrainLearner) -> None:
    heard: list[str] = []
    asked, answered = anyio.Event(), anyio.Event()

    @learner.on(BeforeBatch, once=True)
    async def asks(event: BeforeBatch) -> None:
        asked.set()
        await answered.wait()
        heard.append("answered")

    @learner.on(AfterBatch, once=True)
    def batch_done(event: AfterBatch) -> None:
        heard.append("batch done")

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learner.fit)
            await asked.wait()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            heard.append("the loop ran on")
            answered.set()
    assert heard == ["the loop ran on", "answered", "batch done"]


async def test_every_once_and_where_hold_for_async_receivers(learner: TrainLearner) -> None:
    heard: list[tuple[str, int, int]] = []

    def receiver(name: str) -> Callable[[BeforeBatch], Awaitable[None]]:
        async def receive(event: BeforeBatch) -> None:
            await anyio.lowlevel.checkpoint()
            heard.append((name, event.epoch, event.iter))

        return receive

    learner.on(BeforeBatch, every=3)(receiver("every"))
    learner.on(BeforeBatch, once=True)(receiver("once"))
    learner.on(BeforeBatch, where=lambda e: e.epoch == 1)(receiver("where"))
    learner.on(BeforeBatch, where=lambda e: e.iter == 1, every=2, once=True)(receiver("all"))
    with anyio.fail_after(GUARD):
        await learner.fit(2, valid=False)
    assert heard == [
        ("once", 0, 0),
        ("every", 1, 0),
        ("where", 1, 0),
        ("where", 1, 1),
        ("all", 1, 1),
    ]


async def test_a_base_class_can_have_an_async_receiver(learner: TrainLearner) -> None:
    heard: list[str] = []

    @learner.on(FitEvent)
    async def receiver(event: FitEvent) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append(type(event).__name__)

    with anyio.fail_after(GUARD):
        await learner.fit()
    assert heard == ["BeforeFit", "AfterFit", "CleanupFit"]


async def test_methods_of_a_callback_and_actions_may_be_async(learner: TrainLearner) -> None:
    called: list[str] = []

    class Remote(Callback):
        async def before_fit(self, event: BeforeFit) -> None:
            await anyio.lowlevel.checkpoint()
            called.append("before_fit")

        async def predict(self, event: Predict) -> None:
            await anyio.lowlevel.checkpoint()
            called.append("predict")
            event.learner.preds = event.learner.model(event.learner.batch[0])

        def get_loss(self, event: GetLoss) -> None:
            called.append("get_loss")
            event.learner.loss = event.learner.preds.square().mean()

        async def cleanup_fit(self, event: CleanupFit) -> None:
            await anyio.lowlevel.checkpoint()
            called.append("cleanup_fit")

    with anyio.fail_after(GUARD):
        result = await learner.fit(cbs=Remote(), valid=False)
    assert result.status == "completed"
    assert called == ["before_fit", *["predict", "get_loss"] * 2, "cleanup_fit"]


async def test_an_error_of_an_async_receiver_is_raised_by_fit_with_a_note(
    learner: TrainLearner,
) -> None:
    """G5: of its own type, with receiver and event."""

    @learner.on(AfterLoss, where=lambda event: event.iter == 1)
    async def broken(event: AfterLoss) -> None:
        await anyio.lowlevel.checkpoint()
        raise KeyError("broken")

    with anyio.fail_after(GUARD), pytest.raises(KeyError) as caught:
        await learner.fit()
    assert caught.value.__notes__ == [
        f"raised by {broken.__qualname__} on AfterLoss, epoch 0, iter 1"
    ]


@pytest.mark.parametrize("wrapped", [False, True], ids=["raised", "in a task group"])
@pytest.mark.parametrize(
    ("cancel", "ends"),
    [
        (CancelBatchException, ["cancelled", "completed", "completed"]),
        (CancelEpochException, ["cancelled", "cancelled", "completed"]),
        (CancelFitException, ["cancelled", "cancelled", "cancelled"]),
    ],
)
async def test_an_async_receiver_can_cancel_also_from_a_task_group_of_its_own(
    learner: TrainLearner, cancel: type[BaseException], ends: list[str], wrapped: bool
) -> None:
    """G3: the group around the cancel is taken off before the scopes see it."""

    async def child() -> None:
        raise cancel("enough")

    @learner.on(AfterLoss, once=True)
    async def stops(event: AfterLoss) -> None:
        if not wrapped:
            await child()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
            tasks.start_soon(anyio.sleep_forever)

    with anyio.fail_after(GUARD), record_events(learner) as events:
        await learner.fit(valid=False)
    first = {t: next(e.end for e in events if type(e) is t) for t in
             (CleanupBatch, CleanupEpoch, CleanupFit)}  # fmt: skip
    assert [end.status for end in first.values()] == ends
    assert {(end.who, end.reason) for end in first.values() if end.status == "cancelled"} == {
        (stops.__qualname__, "enough")
    }


async def test_an_error_in_a_task_group_of_a_receiver_is_raised_unwrapped(
    learner: TrainLearner,
) -> None:
    """G5: `except KeyError` around `fit` catches it."""

    async def child() -> None:
        raise KeyError("child")

    @learner.on(AfterLoss)
    async def broken(event: AfterLoss) -> None:
        async with anyio.create_task_group() as outer, anyio.create_task_group() as inner:
            inner.start_soon(child)
            outer.start_soon(anyio.sleep_forever)

    with anyio.fail_after(GUARD), pytest.raises(KeyError, match="child"):
        await learner.fit()


async def test_all_async_receivers_of_a_cleanup_are_awaited_though_one_fails(
    learner: TrainLearner,
) -> None:
    """G1."""
    called: list[str] = []

    def receiver(name: str) -> Callable[[Event], Awaitable[None]]:
        async def receive(event: Event) -> None:
            await anyio.lowlevel.checkpoint()
            called.append(name)
            raise ValueError(name)

        return receive

    for name in ("one", "two", "three"):
        learner.subscribe(CleanupFit, receiver(name))
    with anyio.fail_after(GUARD), pytest.raises(ValueError, match=r"^one") as caught:
        await learner.fit()
    assert called == ["one", "two", "three"]
    assert [note.split(" (")[0] for note in caught.value.__notes__[1:]] == [
        "then also: ValueError('two')",
        "then also: ValueError('three')",
    ]


async def test_an_async_receiver_may_subscribe_and_close(learner: TrainLearner) -> None:
    heard: list[str] = []
    late = learner.subscribe(AfterEpoch, lambda _: heard.append("late"))

    @learner.on(BeforeFit)
    async def rearranges(event: BeforeFit) -> None:
        late.close()
        await anyio.lowlevel.checkpoint()
        learner.subscribe(AfterEpoch, lambda _: heard.append("new"))

    with anyio.fail_after(GUARD):
        await learner.fit()
    assert heard == ["new", "new"]

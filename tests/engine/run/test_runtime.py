"""One thread runs the fit: what it takes over from its host, what it leaves behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
import torch
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    ActionEvent,
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    BeforeBatch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    ScopeEnd,
    record_events,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.waiting import GUARD, in_a_thread, thread_has_ended

# ------------------------------------------------------------------------------------ the thread


async def test_the_whole_fit_runs_in_one_thread_of_its_own(learner: TrainLearner) -> None:
    """G2: receivers, model, loss and loader all run in it; it ends with the fit."""
    threads: list[threading.Thread] = []

    class Batches(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            threads.append(threading.current_thread())
            return super().__iter__()

    learner.dls = DataLoaders(Batches(learner.dls.train), Batches(learner.dls.valid))
    learner.model.register_forward_hook(
        lambda *_: threads.append(threading.current_thread()) and None
    )
    learner.on(Event)(lambda event: threads.append(threading.current_thread()))
    await learner.fit(2)
    assert len(set(threads)) == 1
    assert threads[0].name == f"eventrain-{learner.run_id}"
    assert threads[0] is not threading.current_thread()
    assert not threads[0].is_alive()


async def test_each_fit_has_a_thread_of_its_own(learner: TrainLearner) -> None:
    """Nothing that a fit left in its thread's state can reach the next one."""
    local = threading.local()
    found: list[Any] = []

    @learner.on(BeforeFit)
    def leave_something(event: BeforeFit) -> None:
        found.append(getattr(local, "left", None))
        local.left = event.run_id

    for _ in range(3):
        await learner.fit()
    assert found == [None, None, None]


async def test_async_receivers_run_on_the_hosts_event_loop_in_their_place(
    learner: TrainLearner,
) -> None:
    """G2: the training waits for each, between the receivers before and after it."""
    order: list[tuple[str, bool]] = []
    host = threading.get_ident()

    def note(name: str) -> None:
        order.append((name, threading.get_ident() == host))

    learner.on(AfterFit, order=1)(lambda event: note("before"))

    @learner.on(AfterFit, order=2)
    async def between(event: AfterFit) -> None:
        note("begins")
        for _ in range(5):
            await anyio.lowlevel.checkpoint()
        note("ends")

    learner.on(AfterFit, order=3)(lambda event: note("after"))
    with anyio.fail_after(GUARD):
        await learner.fit()
    assert order == [("before", False), ("begins", True), ("ends", True), ("after", False)]


@dataclass(frozen=True, slots=True, eq=False)
class WeightsUploaded(Event):
    """An event that an async receiver of these tests emits."""


def test_an_async_receiver_that_emits_to_another_is_an_error_not_a_hang(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """It runs on the event loop, and so would wait for what only the loop can do."""

    @learner.on(AfterEpoch)
    async def upload(event: AfterEpoch) -> None:
        event.learner.emit(WeightsUploaded)

    @learner.on(WeightsUploaded)
    async def tell(event: WeightsUploaded) -> None:
        await anyio.lowlevel.checkpoint()

    with pytest.raises(RuntimeError, match=r"await|blocking"):
        in_a_thread(lambda: learner.run(**backend))
    assert learner.result.status == "failed"


async def test_an_async_receiver_may_emit_to_plain_ones(learner: TrainLearner) -> None:
    """They are called at once, where it runs."""
    order: list[str] = []
    learner.on(WeightsUploaded)(lambda event: order.append("heard"))

    @learner.on(AfterFit)
    async def upload(event: AfterFit) -> None:
        order.append("begins")
        event.learner.emit(WeightsUploaded)
        order.append("ends")

    await learner.fit()
    assert order == ["begins", "heard", "ends"]


async def test_fits_do_not_use_the_hosts_worker_threads(
    make_model: Callable[[], nn.Module], dls: DataLoaders
) -> None:
    """A host whose only worker is busy still trains, and its worker stays its own."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    total, limiter.total_tokens = limiter.total_tokens, 1
    borrowed: list[float] = []
    try:
        await limiter.acquire()
        learners = [TrainLearner(make_model(), dls) for _ in range(3)]
        for learner in learners:
            learner.on(AfterBatch)(lambda event: borrowed.append(limiter.borrowed_tokens))
        with anyio.fail_after(GUARD):
            async with anyio.create_task_group() as tg:
                for learner in learners:
                    tg.start_soon(learner.fit)
        limiter.release()
    finally:
        limiter.total_tokens = total
    assert [learner.result.status for learner in learners] == ["completed"] * 3
    assert set(borrowed) == {1}


def test_a_thread_that_cannot_start_is_an_error_not_a_hang(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """G4, G9: the system's refusal reaches the caller; the learner can fit afterwards."""

    def without_memory_for_threads() -> None:
        threading.stack_size(1 << 46)
        learner.run(**backend)

    before = threading.stack_size()
    try:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            in_a_thread(without_memory_for_threads)
    finally:
        threading.stack_size(before)
    assert not learner.fitting
    assert learner.run(**backend).status == "completed"


# ---------------------------------------------------------------------------------------- errors

UP_TO_THE_FIRST_LOSS = ["BeforeFit", "BeforeEpoch", "BeforeBatch", "AfterPredict", "AfterLoss"]
CLEANED_UP = ["CleanupBatch", "CleanupEpoch", "CleanupFit"]


class Broken(nn.Module):
    """Raises the error that it was given."""

    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.error = error

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        raise self.error


async def failing_fit(learner: TrainLearner) -> tuple[BaseException, list[str]]:
    """What a fit raised, and the names of its events."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        with pytest.raises(Exception) as caught:  # noqa: PT011 - the caller looks at it
            await learner.fit()
    assert learner.result.status == "failed"
    assert learner.result.reason == f"{type(caught.value).__name__}: {caught.value}"
    assert [event.end.status for event in events if type(event) is CleanupFit] == ["failed"]
    assert thread_has_ended(learner)
    assert not learner.fitting
    return caught.value, events.names


async def test_an_error_of_the_model_reaches_the_caller(learner: TrainLearner) -> None:
    """G5: the object that was raised, with a note that says where."""
    error = ZeroDivisionError("in the model")
    learner.model = Broken(error)
    caught, names = await failing_fit(learner)
    assert caught is error
    assert error.__notes__ == ["raised by TrainLearner.predict on Predict, epoch 0, iter 0"]
    assert names == ["BeforeFit", "BeforeEpoch", "BeforeBatch", *CLEANED_UP]


async def test_an_error_of_the_loss_function_reaches_the_caller(learner: TrainLearner) -> None:
    """G5."""
    error = ZeroDivisionError("in the loss")
    learner.loss_func = Broken(error)
    caught, names = await failing_fit(learner)
    assert caught is error
    assert error.__notes__ == ["raised by TrainLearner.get_loss on GetLoss, epoch 0, iter 0"]
    assert names == [*UP_TO_THE_FIRST_LOSS[:4], *CLEANED_UP]


async def test_an_error_of_the_loader_reaches_the_caller(learner: TrainLearner) -> None:
    """G5: between two batches; only the epoch and the fit are open."""
    error = OSError("file is gone")

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            yield first
            raise error

    first = learner.dls.train[0]
    learner.dls = DataLoaders(Loader(), learner.dls.valid)
    caught, names = await failing_fit(learner)
    assert caught is error
    assert error.__notes__ == ["raised while reading batch 1 of dls.train"]
    assert names[-3:] == CLEANED_UP
    assert names.count("BeforeBatch") == names.count("CleanupBatch") == 1


async def test_an_error_of_the_optimizer_is_cleaned_up_from_the_step_outwards(
    learner: TrainLearner,
) -> None:
    """G1, G5."""
    error = ZeroDivisionError("in the step")

    class Optimizer(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise error

    learner.opt_func = Optimizer
    caught, names = await failing_fit(learner)
    assert caught is error
    assert names == [
        *[*UP_TO_THE_FIRST_LOSS, "AfterBackward", "BeforeStep"],
        *["CleanupStep", *CLEANED_UP],
    ]


async def test_an_error_of_a_receiver_reaches_the_caller(learner: TrainLearner) -> None:
    """G5: named by the receiver."""
    error = ZeroDivisionError("in a receiver")

    @learner.on(AfterLoss)
    def divide(event: AfterLoss) -> None:
        raise error

    caught, names = await failing_fit(learner)
    assert caught is error
    assert error.__notes__ == [
        f"raised by {divide.__qualname__} on AfterLoss, epoch 0, iter 0",
    ]
    assert names == [*UP_TO_THE_FIRST_LOSS, *CLEANED_UP]


async def test_an_error_of_an_async_receiver_reaches_the_caller(learner: TrainLearner) -> None:
    """G5: across the threads, the same object, and no exception group."""
    error = ZeroDivisionError("in an async receiver")

    @learner.on(AfterLoss)
    async def divide(event: AfterLoss) -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    caught, names = await failing_fit(learner)
    assert caught is error
    assert error.__notes__ == [
        f"raised by {divide.__qualname__} on AfterLoss, epoch 0, iter 0",
    ]
    assert names == [*UP_TO_THE_FIRST_LOSS, *CLEANED_UP]


async def test_an_error_of_a_callback_given_to_fit_reaches_the_caller(
    learner: TrainLearner,
) -> None:
    """G5, G9: and the callback is gone."""

    class Divide(Callback):
        def after_epoch(self, event: AfterEpoch) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        await learner.fit(cbs=Divide())
    assert caught.value.__notes__ == [
        f"raised by {Divide.__qualname__}.after_epoch on AfterEpoch, epoch 0"
    ]
    assert learner.cbs == ()


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_errors_of_cleanups_do_not_hide_the_first(
    learner: TrainLearner, asynchronous: bool
) -> None:
    """G1, G5: every scope is still cleaned up; the later errors are notes on the first."""
    first = ZeroDivisionError("first")
    learner.on(AfterLoss)(lambda event: (_ for _ in ()).throw(first))

    if asynchronous:

        async def fail(event: Event) -> None:
            raise KeyError(type(event).__name__)

    else:

        def fail(event: Event) -> None:
            raise KeyError(type(event).__name__)

    for cleanup in (CleanupBatch, CleanupEpoch, CleanupFit):
        learner.subscribe(cleanup, fail)
    caught, names = await failing_fit(learner)
    assert caught is first
    assert names == [*UP_TO_THE_FIRST_LOSS, *CLEANED_UP]
    assert first.__notes__[1:] == [f"then, in cleanup: KeyError({name!r})" for name in CLEANED_UP]


async def test_an_error_in_the_cleanup_of_a_good_batch_ends_the_fit(
    learner: TrainLearner,
) -> None:
    """G5: nothing came before it, so it is the first."""

    @learner.on(CleanupStep)
    def fail(event: CleanupStep) -> None:
        raise KeyError("cleanup")

    caught, names = await failing_fit(learner)
    assert isinstance(caught, KeyError)
    assert names[-5:] == ["AfterStep", "CleanupStep", *CLEANED_UP]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_exit_raised_in_a_receiver_cleans_up_and_leaves(
    learner: TrainLearner,
    backend: dict[str, Any],
    error: type[BaseException],
    asynchronous: bool,
) -> None:
    """G1, G5: not an Exception, and yet no scope is left without its cleanup."""

    def leave(event: AfterLoss) -> None:
        raise error("leaving")

    async def leave_async(event: AfterLoss) -> None:
        await anyio.lowlevel.checkpoint()
        raise error("leaving")

    learner.subscribe(AfterLoss, leave_async if asynchronous else leave)
    with record_events(learner) as events, pytest.raises(error) as caught:
        learner.run(**backend)
    assert events.names == [*UP_TO_THE_FIRST_LOSS, *CLEANED_UP]
    assert caught.value.args == ("leaving",)
    assert caught.value.__notes__[0].endswith("on AfterLoss, epoch 0, iter 0")
    assert thread_has_ended(learner)
    assert not learner.fitting


async def test_what_a_receivers_own_task_group_wrapped_is_unwrapped(
    learner: TrainLearner,
) -> None:
    """G5: callers catch what was raised, not the group around it."""
    error = ZeroDivisionError("in a child")

    async def child() -> None:
        await anyio.lowlevel.checkpoint()
        raise error

    @learner.on(AfterLoss)
    async def parent(event: AfterLoss) -> None:
        async with anyio.create_task_group() as outer:
            async with anyio.create_task_group() as inner:
                inner.start_soon(child)
                outer.start_soon(anyio.sleep_forever)

    caught, names = await failing_fit(learner)
    assert caught is error
    assert names == [*UP_TO_THE_FIRST_LOSS, *CLEANED_UP]


async def test_several_errors_of_a_receivers_task_group_stay_a_group(
    learner: TrainLearner,
) -> None:
    """G5: none of them is lost."""

    async def child(error: Exception) -> None:
        raise error

    @learner.on(AfterLoss)
    async def parent(event: AfterLoss) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(child, KeyError("one"))
            tg.start_soon(child, ValueError("other"))

    caught, names = await failing_fit(learner)
    assert isinstance(caught, ExceptionGroup)
    assert {type(exc) for exc in caught.exceptions} == {KeyError, ValueError}
    assert names == [*UP_TO_THE_FIRST_LOSS, *CLEANED_UP]


@pytest.mark.parametrize("cancel", [CancelBatchException, CancelEpochException, CancelFitException])
async def test_a_cancel_that_a_task_group_wrapped_ends_its_scope(
    learner: TrainLearner, cancel: type[CancelException]
) -> None:
    """G3: with the receiver's name and its reason."""

    async def child() -> None:
        raise cancel("enough")

    @learner.on(AfterLoss, once=True)
    async def parent(event: AfterLoss) -> None:
        async with anyio.create_task_group() as tg:
            tg.start_soon(child)
            tg.start_soon(anyio.sleep_forever)

    with anyio.fail_after(GUARD), record_events(learner) as events:
        result = await learner.fit(valid=False)
    cut = ScopeEnd("cancelled", parent.__qualname__, "enough")
    assert events.names[:6] == [*UP_TO_THE_FIRST_LOSS, "CleanupBatch"]
    assert events[5].end == cut
    assert events[-1].end == (cut if cancel is CancelFitException else ScopeEnd("completed"))
    assert (
        result.batches
        == {
            CancelBatchException: 2,
            CancelEpochException: 0,
            CancelFitException: 0,
        }[cancel]
    )


# ------------------------------------------------------------------------- what it takes along

word: ContextVar[str] = ContextVar("word", default="nothing")


async def test_the_callers_contextvars_are_seen_everywhere(learner: TrainLearner) -> None:
    """In receivers plain and async, in the model, in the loader, in observers."""
    seen: dict[str, str] = {}

    class Loader(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            seen["loader"] = word.get()
            return super().__iter__()

    async def receiver(event: BeforeFit) -> None:
        await anyio.lowlevel.checkpoint()
        seen["async receiver"] = word.get()

    async def observer(event: BeforeFit) -> None:
        await anyio.lowlevel.checkpoint()
        seen["async observer"] = word.get()

    learner.dls = DataLoaders(Loader(learner.dls.train))
    learner.model.register_forward_hook(lambda *_: seen.update(model=word.get()))
    learner.subscribe(BeforeFit, lambda event: seen.update({"receiver": word.get()}))
    learner.subscribe(BeforeFit, receiver)
    learner.observe(lambda event: seen.update({"observer": word.get()}), BeforeFit)
    learner.observe(observer, BeforeFit)
    token = word.set("the caller's")
    await learner.fit(valid=False)
    word.reset(token)
    places = ["async observer", "async receiver", "loader", "model", "observer", "receiver"]
    assert dict(sorted(seen.items())) == dict.fromkeys(places, "the caller's")


async def test_contextvars_set_in_the_training_do_not_reach_the_caller(
    learner: TrainLearner,
) -> None:
    """The thread has a copy: receivers share it, the host keeps its own."""
    seen: list[str] = []
    learner.on(BeforeFit)(lambda event: word.set("a receiver's") and None)
    learner.on(AfterFit)(lambda event: seen.append(word.get()))

    @learner.on(AfterFit, order=1)
    async def after(event: AfterFit) -> None:
        seen.append(word.get())
        word.set("an async receiver's")

    await learner.fit()
    assert seen == ["a receiver's", "a receiver's"]
    assert word.get() == "nothing"


def torch_state(event: Event) -> tuple[bool, bool, bool]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
    )


@pytest.mark.parametrize(
    "mode",
    [
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    ],
)
async def test_the_callers_modes_do_not_reach_the_training(
    learner: TrainLearner, mode: Callable[[], Any]
) -> None:
    """G9: a fit awaited under no_grad trains all the same; the caller's mode stays as it was."""
    states: list[tuple[bool, bool, bool]] = []
    learner.on(BeforeBatch)(lambda event: states.append(torch_state(event)))
    before = [p.detach().clone() for p in learner.model.parameters()]
    with mode():
        outside = torch_state(None)
        await learner.fit()
        assert torch_state(None) == outside
    training, validating = (True, False, False), (False, False, False)
    assert states == [training] * 3 + [validating] * 2
    assert not any(
        torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )


@pytest.mark.parametrize("ending", ["completed", "failed"])
async def test_modes_that_a_receiver_leaves_open_end_with_the_fit(
    learner: TrainLearner, ending: str
) -> None:
    """G9: neither the caller nor the next fit is touched."""
    states: list[tuple[bool, bool, bool]] = []
    learner.on(BeforeFit)(lambda event: states.append(torch_state(event)))

    @learner.on(BeforeFit, order=1)
    def leave_open(event: BeforeFit) -> None:
        torch.autocast("cpu", dtype=torch.bfloat16).__enter__()
        torch.inference_mode().__enter__()
        torch.set_grad_enabled(False)
        torch.set_default_device("meta")
        if ending == "failed":
            raise ZeroDivisionError
        raise CancelFitException

    for _ in range(2):
        if ending == "failed":
            with pytest.raises(ZeroDivisionError):
                await learner.fit()
        else:
            await learner.fit()
        assert torch_state(None) == (True, False, False)
        assert torch.empty(1).device.type == "cpu"
    assert states == [(True, False, False)] * 2


async def test_the_callers_default_device_is_taken_over(learner: TrainLearner) -> None:
    """Tensors that a receiver makes are where the caller's would be, in this fit alone."""
    devices: list[str] = []
    learner.on(BeforeFit)(lambda event: devices.append(torch.empty(1).device.type))
    with torch.device("meta"):
        await learner.fit()
    await learner.fit()
    assert devices == ["meta", "cpu"]
    assert torch.empty(1).device.type == "cpu"


@pytest.mark.parametrize(
    "run",
    [
        lambda fetch: asyncio.run(fetch()),
        lambda fetch: anyio.run(fetch, backend="asyncio"),
        lambda fetch: anyio.run(fetch, backend="trio"),
    ],
    ids=["asyncio.run", "anyio.run", "anyio.run on trio"],
)
def test_the_training_thread_may_run_an_event_loop_of_its_own(
    learner: TrainLearner, backend: dict[str, Any], run: Callable[[Any], Any]
) -> None:
    """A loader or a receiver that calls an async client blockingly is no business of ours."""

    async def fetch() -> str:
        await anyio.lowlevel.checkpoint()
        return "fetched"

    fetched: list[str] = []
    learner.on(BeforeFit)(lambda event: fetched.append(run(fetch)))

    @learner.on(BeforeFit, order=1)
    async def on_the_hosts_loop(event: BeforeFit) -> None:
        await anyio.lowlevel.checkpoint()
        fetched.append("and the host's loop is still known")

    assert learner.run(**backend).status == "completed"
    assert fetched == ["fetched", "and the host's loop is still known"]


@pytest.mark.parametrize("inner", ["asyncio", "trio"])
def test_a_receiver_may_run_another_learner(
    make_model: Callable[[], nn.Module],
    dls: DataLoaders,
    backend: dict[str, Any],
    inner: str,
) -> None:
    """A fit within a fit, such as a linear probe after each epoch."""
    outer, probe = (TrainLearner(make_model(), dls) for _ in range(2))
    results: list[str] = []
    outer.on(AfterEpoch)(lambda event: results.append(probe.run(backend=inner).status))
    assert outer.run(2, **backend).status == "completed"
    assert results == ["completed"] * 4


# --------------------------------------------------------------------------- who may call it


async def test_a_second_fit_of_the_same_learner_is_refused(learner: TrainLearner) -> None:
    """The first one goes on unharmed, and its callbacks stay."""
    refused: list[str] = []

    class Nested(Callback):
        async def before_fit(self, event: BeforeFit) -> None:
            with pytest.raises(RuntimeError) as caught:
                await learner.fit(cbs=Callback())
            refused.append(str(caught.value))

    nested = Nested()
    with anyio.fail_after(GUARD):
        result = await learner.fit(cbs=nested)
    assert result.status == "completed"
    assert refused == [
        f"this learner is fitting already (run {result.run_id}); await that fit, or use"
        " another learner: a learner runs one fit at a time"
    ]
    assert learner.cbs == ()


async def test_run_inside_an_event_loop_is_refused_with_the_way_out(
    learner: TrainLearner,
) -> None:
    """A notebook's cell runs in a loop: `await learner.fit()` is what works there."""
    with pytest.raises(RuntimeError, match=r"use `await learner\.fit\(\.\.\.\)` here"):
        learner.run()
    assert not learner.fitting
    assert (await learner.fit()).status == "completed"


def test_run_works_in_any_thread(learner: TrainLearner, backend: dict[str, Any]) -> None:
    """Not only the main thread can have an event loop."""
    assert in_a_thread(lambda: learner.run(**backend)).status == "completed"


@pytest.mark.parametrize("inner", ["asyncio", "trio"])
async def test_run_works_in_a_worker_thread_of_a_host(learner: TrainLearner, inner: str) -> None:
    """A sync endpoint of a web framework runs in such a thread."""
    with anyio.fail_after(GUARD):
        result = await anyio.to_thread.run_sync(lambda: learner.run(backend=inner))
    assert result.status == "completed"


# ------------------------------------------------------------------------- after it has ended


class Bystander(Callback):
    """A callback with receivers on everything, and an observer."""

    observes = (Event,)

    def event(self, event: Event) -> None: ...

    def observe(self, event: Event) -> None: ...


class End(Callback):
    """Ends the fit in its own way at the first loss."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error

    def after_loss(self, event: AfterLoss) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [None, CancelFitException(), ZeroDivisionError(), KeyboardInterrupt()],
    ids=["completed", "cancelled", "failed", "interrupted"],
)
def test_after_any_end_the_learner_is_as_it_was(
    learner: TrainLearner, backend: dict[str, Any], error: BaseException | None
) -> None:
    """G9: callbacks for the fit alone are gone with their subscriptions and observers."""
    kept = Bystander()
    learner.add_cbs(kept)
    subscriptions, streams = learner.bus.subscriptions(), tuple(learner.streams)
    with suppress(ZeroDivisionError, KeyboardInterrupt):
        learner.run(cbs=[Bystander(), End(error)], **backend)
    assert learner.cbs == (kept,)
    assert learner.bus.subscriptions() == subscriptions
    assert tuple(learner.streams) == streams
    assert (learner.fitting, learner.stopping) == (False, False)
    assert thread_has_ended(learner)
    with record_events(learner) as events:
        assert learner.run(**backend).status == "completed"
    assert events.names.count("BeforeBatch") == events.names.count("CleanupBatch") == 5


async def test_a_callback_of_one_fit_may_detach_itself(learner: TrainLearner) -> None:
    """G9: it is gone already when the fit would take it away."""

    class Once(Callback):
        def __init__(self) -> None:
            self.heard: list[int] = []

        def before_batch(self, event: BeforeBatch) -> None:
            self.heard.append(event.iter)
            event.learner.remove_cbs(self)

    once = Once()
    result = await learner.fit(cbs=once)
    assert result.status == "completed"
    assert once.heard == [0]
    assert learner.cbs == ()
    assert not learner.fitting
    assert (await learner.fit()).status == "completed"


async def test_a_fit_that_is_refused_leaves_no_callback_behind(learner: TrainLearner) -> None:
    """G9: wrong arguments are told before any work, and nothing stays attached."""
    subscriptions = learner.bus.subscriptions()
    with pytest.raises(ValueError, match="lr=-1"):
        await learner.fit(cbs=Bystander(), lr=-1)
    assert learner.cbs == ()
    assert learner.streams == []
    assert learner.bus.subscriptions() == subscriptions
    assert not learner.fitting
    assert (await learner.fit()).status == "completed"


# --------------------------------------------------------------------- nobody asks for numbers


class NumbersAsked(TorchDispatchMode):
    """Counts how often a tensor's number was asked for, which is when a host waits."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.asked += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


class Counting(Callback):
    """Has the training thread counted, and the events heard in every way there is."""

    observes = (Event,)
    order = -100

    def __init__(self) -> None:
        self.numbers = NumbersAsked()
        self.heard = 0

    def before_fit(self, event: BeforeFit) -> None:
        self.numbers.__enter__()

    def event(self, event: Event) -> None:
        self.heard += 1

    def observe(self, event: Event) -> None: ...

    def cleanup_fit(self, event: CleanupFit) -> None:
        self.numbers.__exit__(None, None, None)


@pytest.mark.parametrize("asked", [False, True])
async def test_the_engine_asks_no_tensor_for_its_number(learner: TrainLearner, asked: bool) -> None:
    """G14: as many numbers are read as receivers ask for, which may be none."""
    counting = Counting()
    learner.on(AfterBatch, every=2)(lambda event: event.loss)
    if asked:
        learner.on(AfterBatch)(lambda event: event.loss.item())
    async with learner.events(Event, where=lambda event: True) as stream:
        await learner.fit(2, cbs=counting)
        streamed = [type(event) async for event in stream]
    assert len(streamed) == counting.heard
    assert counting.numbers.asked == (10 if asked else 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
async def test_the_engine_never_waits_for_the_device(
    make_model: Callable[[], nn.Module], make_batches: Callable[..., Any]
) -> None:
    """G14: with a device that refuses to be waited for, the fit completes."""
    batches = [tuple(t.cuda() for t in batch) for batch in make_batches(3)]
    learner = TrainLearner(make_model().cuda(), DataLoaders(batches, batches))
    learner.on(Event)(lambda event: None)
    learner.observe(lambda event: None, Event)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = await learner.fit(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.steps == 6


def test_every_action_is_performed_by_a_receiver_in_the_same_thread(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """G2: also where a callback takes an action over."""
    threads: list[str] = []
    actions: list[type[ActionEvent]] = []

    class Own(Callback):
        def get_loss(self, event: ActionEvent) -> None:
            threads.append(threading.current_thread().name)
            actions.append(type(event))
            event.learner.get_loss()

        async def backward(self, event: ActionEvent) -> None:
            actions.append(type(event))
            event.learner.backward()

    learner.run(cbs=Own(), valid=False, **backend)
    assert [action.__name__ for action in actions] == ["GetLoss", "Backward"] * 3
    assert set(threads) == {f"eventrain-{learner.run_id}"}

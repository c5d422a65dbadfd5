"""One event class's signal: what sending does, what errors become, and blinker's own interface."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

import anyio
import blinker
import pytest
from eventrain.events import (
    AfterEpoch,
    AfterFit,
    AfterLoss,
    AfterStep,
    BeforeBatch,
    BeforeFit,
    Bus,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    EventSignal,
    FitEvent,
    Predict,
)

MakeEvent = Callable[..., Any]


def raising(exc: BaseException, called: list[str] | None = None) -> Callable[[Event], None]:
    """A receiver that raises."""

    def receiver(event: Event) -> None:
        if called is not None:
            called.append(type(exc).__name__)
        raise exc

    return receiver


# ------------------------------------------------------------------------------------- sending


def test_sending_returns_each_receiver_with_what_it_returned(
    bus: Bus, make_event: MakeEvent
) -> None:
    one, two = (lambda _: 1), (lambda _: "two")
    bus.subscribe(BeforeFit, two, order=1)
    bus.subscribe(BeforeFit, one)
    assert bus.signal(BeforeFit).send(make_event(BeforeFit)) == [(one, 1), (two, "two")]
    assert bus.signal(AfterFit).send(make_event(AfterFit)) == []


def test_the_signal_of_a_class_is_always_the_same(bus: Bus) -> None:
    signal = bus.signal(BeforeFit)
    assert bus.signal(BeforeFit) is signal
    assert bus.signal(FitEvent) is not signal
    assert Bus().signal(BeforeFit) is not signal
    assert (signal.event_type, signal.__doc__) == (BeforeFit, BeforeFit.__doc__)


def test_a_signal_has_receivers_while_somebody_listens(bus: Bus) -> None:
    signal = bus.signal(BeforeFit)
    assert not signal.receivers
    with bus.subscribe(Event, print):
        assert signal.receivers
    assert not signal.receivers


# -------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("event_type", "where"),
    [
        (BeforeFit, "BeforeFit"),
        (AfterEpoch, "AfterEpoch, epoch 1"),
        (AfterLoss, "AfterLoss, epoch 1, iter 3"),
        (AfterStep, "AfterStep, epoch 1, iter 3"),
        (Predict, "Predict, epoch 1, iter 3"),
        (CleanupEpoch, "CleanupEpoch, epoch 1"),
    ],
)
def test_an_error_carries_a_note_of_receiver_event_epoch_and_iteration(
    bus: Bus, make_event: MakeEvent, event_type: type[Event], where: str
) -> None:
    """G5: of its own type, the very object that was raised, and a note."""
    error = ValueError("bad")
    bus.subscribe(event_type, receiver := raising(error))
    with pytest.raises(ValueError, match="bad") as caught:
        bus.send(make_event(event_type))
    assert caught.value is error
    assert error.__notes__ == [f"raised by {receiver.__qualname__} on {where}"]


def test_an_error_ends_the_sending(bus: Bus, make_event: MakeEvent) -> None:
    called: list[str] = []
    bus.subscribe(BeforeFit, lambda _: called.append("a"), order=-1)
    bus.subscribe(BeforeFit, raising(KeyError("b"), called))
    bus.subscribe(BeforeFit, lambda _: called.append("c"), order=1)
    with pytest.raises(KeyError):
        bus.send(make_event(BeforeFit))
    assert called == ["a", "KeyError"]


def test_an_error_keeps_its_cause_context_and_traceback(bus: Bus, make_event: MakeEvent) -> None:
    cause = OSError("disk full")

    def receiver(event: Event) -> None:
        try:
            raise KeyError("x")
        except KeyError:
            raise ValueError("bad") from cause

    bus.subscribe(BeforeFit, receiver)
    with pytest.raises(ValueError, match="bad") as caught:
        bus.send(make_event(BeforeFit))
    assert caught.value.__cause__ is cause
    assert isinstance(caught.value.__context__, KeyError)
    assert caught.value.__context__.__context__ is None
    assert "receiver" in [entry.name for entry in caught.traceback]


def test_an_error_of_a_nested_sending_names_both_receivers(bus: Bus, make_event: MakeEvent) -> None:
    def outer(event: Event) -> None:
        bus.send(make_event(AfterLoss))

    bus.subscribe(BeforeFit, outer)
    bus.subscribe(AfterLoss, inner := raising(ValueError("inner")))
    with pytest.raises(ValueError, match="inner") as caught:
        bus.send(make_event(BeforeFit))
    assert caught.value.__notes__ == [
        f"raised by {inner.__qualname__} on AfterLoss, epoch 1, iter 3",
        f"raised by {outer.__qualname__} on BeforeFit",
    ]


@pytest.mark.parametrize(
    "cancel",
    [CancelFitException, CancelEpochException, CancelBatchException, CancelStepException],
)
def test_a_cancel_knows_who_raised_it(
    bus: Bus, make_event: MakeEvent, cancel: type[CancelException]
) -> None:
    bus.subscribe(AfterLoss, receiver := raising(cancel("enough")))
    with pytest.raises(cancel) as caught:
        bus.send(make_event(AfterLoss))
    assert (caught.value.who, caught.value.reason) == (receiver.__qualname__, "enough")


def test_a_cancel_that_names_somebody_keeps_that_name(bus: Bus, make_event: MakeEvent) -> None:
    cancel = CancelFitException("enough")
    cancel.who = "the operator"
    bus.subscribe(AfterLoss, raising(cancel))
    with pytest.raises(CancelFitException):
        bus.send(make_event(AfterLoss))
    assert cancel.who == "the operator"


@pytest.mark.parametrize("event_type", [AfterLoss, CleanupBatch])
@pytest.mark.parametrize("exc", [CancelBatchException, ValueError])
def test_what_a_receiver_raised_does_not_keep_its_locals_alive(
    bus: Bus, make_event: MakeEvent, event_type: type[Event], exc: type[BaseException]
) -> None:
    """G12: nothing of the sending refers back to the error, so what the receiver held, a batch
    or predictions, is freed with the error and does not wait for the garbage collector."""

    class Predictions:
        pass

    held = []

    @bus.on(event_type)
    def receiver(event: Event) -> None:
        preds = Predictions()
        held.append(weakref.ref(preds))
        raise exc

    gc.disable()
    try:
        for _ in range(2):
            with suppress(exc):
                bus.send(make_event(event_type))
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()


# ---------------------------------------------------------------------------- exception groups


class Finer(CancelEpochException):
    """A cancel of a user's own."""


VALUE, KEY, OS = ValueError("v"), KeyError("k"), OSError("o")
FIT, EPOCH, BATCH, STEP, FINER = (
    CancelFitException("f"),
    CancelEpochException("e"),
    CancelBatchException("b"),
    CancelStepException("s"),
    Finer("finer"),
)


def group(*excs: BaseException) -> BaseExceptionGroup[BaseException]:
    return BaseExceptionGroup("of a task group", excs)


@pytest.mark.parametrize(
    ("raised", "caught"),
    [
        (group(VALUE), VALUE),
        (group(group(group(VALUE))), VALUE),
        (group(BATCH), BATCH),
        (group(group(FINER)), FINER),
        (group(BATCH, FIT, STEP), FIT),
        (group(STEP, group(BATCH, group(EPOCH))), EPOCH),
        (group(EPOCH, FINER), EPOCH),
        (group(FINER, EPOCH), FINER),
        (group(FIT, VALUE), VALUE),
        (group(FIT, group(BATCH, group(VALUE))), VALUE),
    ],
    ids=repr,
)
@pytest.mark.parametrize("event_type", [AfterLoss, CleanupBatch])
def test_an_error_wrapped_by_a_task_group_is_unwrapped(
    bus: Bus,
    make_event: MakeEvent,
    event_type: type[Event],
    raised: BaseException,
    caught: BaseException,
) -> None:
    """G5: one error is that one; errors outweigh cancels; the widest cancel outweighs others."""
    bus.subscribe(event_type, raising(raised))
    with pytest.raises(type(caught)) as info:
        bus.send(make_event(event_type))
    assert info.value is caught


@pytest.mark.parametrize("raised", [group(VALUE, KEY), group(FIT, VALUE, group(BATCH, KEY))])
def test_several_errors_stay_a_group_without_the_cancels(
    bus: Bus, make_event: MakeEvent, raised: BaseException
) -> None:
    bus.subscribe(AfterLoss, receiver := raising(raised))
    with pytest.raises(ExceptionGroup) as info:
        bus.send(make_event(AfterLoss))
    assert info.group_contains(ValueError)
    assert info.group_contains(KeyError)
    assert not info.group_contains(CancelException)
    assert info.value.__notes__ == [
        f"raised by {receiver.__qualname__} on AfterLoss, epoch 1, iter 3"
    ]


def test_a_cancel_taken_out_of_a_group_knows_who_raised_it(bus: Bus, make_event: MakeEvent) -> None:
    bus.subscribe(AfterLoss, receiver := raising(group(CancelBatchException("b"))))
    with pytest.raises(CancelBatchException) as info:
        bus.send(make_event(AfterLoss))
    assert (info.value.who, info.value.reason) == (receiver.__qualname__, "b")


# --------------------------------------------------------------------------------- Cleanup* events


@pytest.mark.parametrize("event_type", [CleanupFit, CleanupEpoch, CleanupBatch, CleanupStep])
def test_a_cleanup_event_reaches_all_receivers_whatever_they_raise(
    bus: Bus, make_event: MakeEvent, event_type: type[Event]
) -> None:
    """G1: the cleanup of one does not depend on the one before it."""
    called: list[str] = []
    for exc in (ValueError("first"), CancelFitException(), KeyError("later"), SystemExit(1)):
        bus.subscribe(event_type, raising(exc, called))
    bus.subscribe(event_type, lambda _: called.append("good"))
    with pytest.raises(ValueError, match=r"^first"):
        bus.send(make_event(event_type))
    assert called == ["ValueError", "CancelFitException", "KeyError", "SystemExit", "good"]


def test_the_first_error_of_a_cleanup_has_notes_of_the_others(
    bus: Bus, make_event: MakeEvent
) -> None:
    """G5: the first one is raised, the others stand in its notes with their receivers."""
    first, second, third = ValueError("first"), KeyError("second"), CancelBatchException("third")
    for exc in (third, first, second):
        bus.subscribe(CleanupBatch, raising(exc))
    with pytest.raises(ValueError, match=r"^first") as caught:
        bus.send(make_event(CleanupBatch))
    where = f"raised by {raising(first).__qualname__} on CleanupBatch, epoch 1, iter 3"
    assert caught.value is first
    assert caught.value.__context__ is None
    assert caught.value.__notes__ == [
        where,
        f"then also: {third!r} ({where})",
        f"then also: {second!r} ({where})",
    ]


def test_of_cancels_in_a_cleanup_the_widest_is_raised(bus: Bus, make_event: MakeEvent) -> None:
    """G3: so that no scope that was to end goes on."""
    for cancel in (CancelBatchException, CancelFitException, CancelEpochException):
        bus.subscribe(CleanupBatch, raising(cancel()))
    with pytest.raises(CancelFitException):
        bus.send(make_event(CleanupBatch))


def test_two_receivers_that_raise_the_same_error_are_both_named_on_it_once(
    bus: Bus, make_event: MakeEvent
) -> None:
    def one(event: Event) -> None:
        raise error

    def two(event: Event) -> None:
        raise error

    error = ValueError("shared")
    bus.subscribe(CleanupFit, one)
    bus.subscribe(CleanupFit, two)
    with pytest.raises(ValueError, match=r"^shared"):
        bus.send(make_event(CleanupFit))
    assert error.__notes__ == [
        f"raised by {one.__qualname__} on CleanupFit",
        f"raised by {two.__qualname__} on CleanupFit",
    ]


# ------------------------------------------------------------------- async, without a learner


async def receiver_function(event: Event) -> None:
    raise AssertionError("not awaited by anybody")


class AsyncCallable:
    async def __call__(self, event: Event) -> None:
        raise AssertionError("not awaited by anybody")


@pytest.mark.parametrize(
    ("receiver", "name"),
    [
        (receiver_function, "receiver_function"),
        (AsyncCallable(), "AsyncCallable"),
        (partial(receiver_function), "receiver_function"),
        (lambda event: receiver_function(event), "<lambda>"),
    ],
)
def test_an_async_receiver_without_a_learner_is_an_error_and_no_warning(
    bus: Bus, make_event: MakeEvent, receiver: Any, name: str
) -> None:
    bus.subscribe(BeforeFit, receiver)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="async receiver of BeforeFit is awaited") as caught:
            bus.send(make_event(BeforeFit))
        gc.collect()
    assert warned == []
    assert caught.value.__notes__ == [f"raised by {name} on BeforeFit"]


def test_a_custom_wrapper_awaits_async_receivers_in_their_place(
    bus: Bus, make_event: MakeEvent, backend: dict[str, Any]
) -> None:
    """As with a plain blinker signal: `_async_wrapper`."""
    called: list[str] = []

    @bus.on(BeforeFit)
    async def awaited(event: Event) -> str:
        await anyio.lowlevel.checkpoint()
        called.append("async")
        return event.run_id

    bus.subscribe(BeforeFit, lambda _: called.append("before"), order=-1)
    bus.subscribe(BeforeFit, lambda _: called.append("after"), order=1)

    def wrapper(receiver: Callable[[Event], Coroutine[Any, Any, Any]]) -> Callable[[Event], Any]:
        return lambda event: anyio.run(receiver, event, **backend)

    results = bus.signal(BeforeFit).send(make_event(BeforeFit), _async_wrapper=wrapper)
    assert called == ["before", "async", "after"]
    assert results[1] == (awaited, "r1")


# ------------------------------------------------------------------------ blinker's own interface


def test_a_signal_is_a_blinker_signal(bus: Bus) -> None:
    assert isinstance(bus.signal(BeforeFit), EventSignal)
    assert isinstance(bus.signal(BeforeFit), blinker.Signal)


def test_connect_subscribes_strongly_at_order_0_and_decorates(
    bus: Bus, make_event: MakeEvent
) -> None:
    called: list[str] = []
    bus.subscribe(BeforeFit, lambda _: called.append("last"), order=1)
    signal = bus.signal(BeforeFit)

    def receiver(event: Event) -> None:
        called.append("connected")

    assert signal.connect(receiver) is receiver
    signal.connect(lambda _: called.append("a lambda"))
    bus.subscribe(BeforeFit, lambda _: called.append("first"), order=-1)
    gc.collect()
    signal.send(make_event(BeforeFit))
    assert called == ["first", "connected", "a lambda", "last"]
    assert [s.order for s in bus.subscriptions()] == [1, 0, 0, -1]


def test_connect_to_the_signal_of_a_base_class_gets_its_subclasses(
    bus: Bus, make_event: MakeEvent
) -> None:
    heard: list[Event] = []
    bus.signal(FitEvent).connect(heard.append)
    bus.send(event := make_event(BeforeFit))
    assert heard == [event]


@pytest.mark.parametrize("options", [{"sender": "a learner"}, {"sender": None}, {"weak": True}])
def test_connect_refuses_a_sender_and_weakness(bus: Bus, options: dict[str, Any]) -> None:
    signal = bus.signal(BeforeFit)
    with pytest.raises(ValueError, match=r"events of every sender.*where="):
        signal.connect(print, **options)
    assert not signal.receivers


def test_connect_via_gets_every_sender_or_is_refused(bus: Bus, make_event: MakeEvent) -> None:
    heard: list[Event] = []
    signal = bus.signal(BeforeFit)
    signal.connect_via(blinker.ANY)(heard.append)
    signal.send(event := make_event(BeforeFit))
    assert heard == [event]
    with pytest.raises(ValueError, match="the events of every sender"):
        signal.connect_via("a learner")(heard.append)


def test_disconnect_closes_the_subscriptions_of_a_receiver_to_that_class(
    bus: Bus, make_event: MakeEvent
) -> None:
    heard: list[Event] = []
    signal = bus.signal(BeforeFit)
    signal.connect(heard.append)
    once = bus.subscribe(BeforeFit, heard.append, once=True, order=-3)
    above = bus.subscribe(FitEvent, heard.append)
    other = bus.subscribe(BeforeFit, print)
    signal.disconnect(heard.append)
    assert once.closed
    assert bus.subscriptions() == (above, other)
    signal.disconnect(heard.append)
    bus.subscribe(BeforeFit, heard.append)
    other.close()
    bus.send(event := make_event(BeforeFit))
    assert heard == [event, event]


def test_connected_to_connects_for_a_with_block(bus: Bus, make_event: MakeEvent) -> None:
    heard: list[float] = []
    signal = bus.signal(BeforeFit)

    def receiver(event: Event) -> None:
        heard.append(event.time)

    with signal.connected_to(receiver):
        signal.send(make_event(BeforeFit, time=1.0))
    signal.send(make_event(BeforeFit, time=2.0))
    assert heard == [1.0]
    assert bus.subscriptions() == ()


def test_a_muted_signal_calls_nobody_and_the_others_go_on(bus: Bus, make_event: MakeEvent) -> None:
    heard: list[str] = []
    bus.subscribe(Event, lambda e: heard.append(type(e).__name__))
    signal = bus.signal(BeforeFit)
    with signal.muted():
        assert signal.send(make_event(BeforeFit)) == []
        bus.send(make_event(AfterFit))
    bus.send(make_event(BeforeFit))
    assert heard == ["AfterFit", "BeforeFit"]


def test_receivers_for_yields_those_that_would_be_called_in_order(
    bus: Bus, make_event: MakeEvent
) -> None:
    learner, other = object(), object()
    receivers = [lambda _: "a", lambda _: "b", lambda _: "c", lambda _: "d"]
    a, b, c, d = receivers
    bus.subscribe(BeforeFit, d, order=9)
    bus.subscribe(FitEvent, b)
    bus.subscribe(BeforeFit, a, order=-9)
    bus.subscribe(BeforeFit, c, order=1, learner=learner)
    closed = bus.subscribe(BeforeFit, print)
    closed.close()
    signal = bus.signal(BeforeFit)
    assert list(signal.receivers_for(make_event(BeforeFit, learner=learner))) == [a, b, c, d]
    assert list(signal.receivers_for(make_event(BeforeFit, learner=other))) == [a, b, d]
    assert list(bus.signal(BeforeBatch).receivers_for(make_event(BeforeBatch))) == []


def test_has_receivers_for_an_event_while_somebody_is_connected(
    bus: Bus, make_event: MakeEvent
) -> None:
    signal, event = bus.signal(BeforeFit), make_event(BeforeFit)
    assert not signal.has_receivers_for(event)
    with bus.subscribe(FitEvent, print):
        assert signal.has_receivers_for(event)
    assert not signal.has_receivers_for(event)


async def test_send_async_is_refused_as_it_would_go_round_every_once_and_where(
    bus: Bus, make_event: MakeEvent
) -> None:
    """Blinker's own would call receivers as they were subscribed, without what was asked for."""
    heard: list[Event] = []

    @bus.on(BeforeFit, where=lambda event: False)
    async def receiver(event: Event) -> None:
        heard.append(event)

    with pytest.raises(RuntimeError, match="send"):
        await bus.signal(BeforeFit).send_async(make_event(BeforeFit))
    assert heard == []

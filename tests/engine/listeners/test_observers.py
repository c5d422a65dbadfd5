"""Observers run on the host's event loop: what they lose is counted, and they change nothing."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch
from eventrain.engine import DataLoaders, EventStream, FitResult, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    BatchEvent,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelFitException,
    CleanupEpoch,
    CleanupFit,
    EpochEvent,
    Event,
    FitEvent,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn

from tests.support.waiting import GUARD, until, wait_until

POLICIES = ["drop_oldest", "latest", "block"]


@pytest.fixture
def learner(make_model: Callable[[], nn.Module], dls: DataLoaders) -> TrainLearner:
    learner = TrainLearner(make_model(), dls)
    learner.drain_timeout = 5  # none of these tests should need it, but on a slow machine
    return learner


def waiting(stream: EventStream[Any]) -> int:
    """How many events a stream holds for its reader."""
    return stream.emitted - stream.delivered - stream.dropped


async def names_of(stream: AsyncIterator[Event]) -> list[str]:
    return [type(event).__name__ async for event in stream]


async def read_into(stream: AsyncIterator[Event], heard: list[Event]) -> None:
    async for event in stream:
        heard.append(event)  # noqa: PERF401 - each as it comes


# -------------------------------------------------------------------------------------- streams


async def test_a_stream_gets_every_event_in_order(learner: TrainLearner) -> None:
    """G8: the very objects that receivers get, the last ones after the fit has ended."""
    heard: list[Event] = []
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with learner.events() as stream, anyio.create_task_group() as tg:
            tg.start_soon(read_into, stream, heard)
            result = await learner.fit(2)
    assert heard == list(events)
    assert (stream.emitted, stream.delivered, stream.dropped) == (len(events), len(events), 0)
    assert result.dropped == {}
    assert learner.streams == []


async def test_a_stream_is_read_after_the_fit_just_as_well(learner: TrainLearner) -> None:
    """The reader may be the task that awaited the fit."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with learner.events() as stream:
            await learner.fit()
            assert await names_of(stream) == events.names


@pytest.mark.parametrize("ending", ["completed", "cancelled", "failed"])
async def test_a_stream_ends_with_the_fit_however_that_ends(
    learner: TrainLearner, ending: str
) -> None:
    """Cleanup* events are in it, the last of them says how it ended."""
    error: BaseException = CancelFitException() if ending == "cancelled" else ZeroDivisionError()

    @learner.on(AfterLoss)
    def end(event: AfterLoss) -> None:
        if ending != "completed":
            raise error

    heard: list[Event] = []
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with learner.events() as stream, anyio.create_task_group() as tg:
            tg.start_soon(read_into, stream, heard)
            with suppress(ZeroDivisionError):
                await learner.fit()
    assert heard == list(events)
    assert heard[-1].end.status == ending


async def test_a_stream_gets_the_classes_it_names_and_their_subclasses_once(
    learner: TrainLearner,
) -> None:
    """A class and its base are not heard twice."""
    with record_events(learner) as events:
        async with (
            learner.events(FitEvent, AfterFit) as of_the_fit,
            learner.events(EpochEvent, BeforeFit) as of_both,
            learner.events(AfterBatch, where=lambda event: not event.training) as of_batches,
        ):
            await learner.fit()
            assert await names_of(of_the_fit) == ["BeforeFit", "AfterFit", "CleanupFit"]
            assert [e async for e in of_both] == [
                event for event in events if isinstance(event, EpochEvent | BeforeFit)
            ]
            assert [(e.training, e.iter) async for e in of_batches] == [(False, 0), (False, 1)]
    assert (of_batches.emitted, of_batches.dropped) == (2, 0)


async def test_a_stream_opened_during_the_fit_gets_the_rest(learner: TrainLearner) -> None:
    """It ends with the fit that it was opened in."""
    opened = threading.Event()
    learner.on(CleanupEpoch, once=True)(lambda event: opened.wait(GUARD))
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            await until(lambda: "CleanupEpoch" in events.names)
            async with learner.events() as stream:
                opened.set()
                heard = [event async for event in stream]
    begin = events.names.index("CleanupEpoch") + 1
    assert heard == events[begin:]
    assert heard[0].training is False


async def test_a_stream_left_early_lets_the_fit_go_on(learner: TrainLearner) -> None:
    """G8: what was in its buffer stays readable, and nothing more comes."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            async with learner.events(overflow="block", buffer=2) as stream:
                tg.start_soon(learner.fit)
                async for event in stream:
                    if type(event) is AfterBatch:
                        break
            subscriptions = learner.bus.subscriptions()
            rest = [event async for event in stream]
    assert events.names[-1] == "CleanupFit"
    assert learner.result.status == "completed"
    assert len(subscriptions) == 1
    assert stream.delivered == stream.emitted
    last = events.index(event)
    assert rest == events[last + 1 : last + 1 + len(rest)]


async def test_several_streams_read_side_by_side(learner: TrainLearner) -> None:
    """G8: each has a buffer of its own; a slow one costs the others nothing."""
    fast: list[Event] = []
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with (
            learner.events() as one,
            learner.events(buffer=3) as unread,
            learner.events(overflow="latest") as latest,
            anyio.create_task_group() as tg,
        ):
            tg.start_soon(read_into, one, fast)
            result = await learner.fit()
            assert await names_of(unread) == events.names[-3:]
            assert await names_of(latest) == events.names[-1:]
    assert fast == list(events)
    assert result.dropped == {"events(Event)": 2 * len(events) - 4}


async def test_a_stream_watches_one_fit(learner: TrainLearner) -> None:
    """The next fit is none of its business."""
    async with learner.events(FitEvent) as stream:
        first = await learner.fit()
        second = await learner.fit()
        ids = {event.run_id async for event in stream}
    assert ids == {first.run_id}
    assert first.run_id != second.run_id


async def test_a_stream_of_one_learner_gets_no_events_of_another_on_its_bus(
    learner: TrainLearner, make_model: Callable[[], nn.Module], dls: DataLoaders
) -> None:
    """G10: a shared bus, separate streams."""
    other = TrainLearner(make_model(), dls, bus=learner.bus)
    async with learner.events(FitEvent) as stream, other.events(FitEvent) as others:
        await other.fit()
        await learner.fit()
        assert {event.learner async for event in stream} == {learner}
        assert {event.learner async for event in others} == {other}


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"buffer": 0}, "buffer=0: give the number of events to hold, 1 or more"),
        ({"buffer": True}, "buffer=True"),
        ({"buffer": 2.5}, "buffer=2.5"),
        ({"overflow": "drop_newest"}, "overflow='drop_newest': choose 'drop_oldest', 'latest'"),
        ({"on_error": "ignore"}, "on_error='ignore': choose 'log' or 'raise'"),
    ],
)
def test_wrong_arguments_are_reported_when_they_are_given(
    learner: TrainLearner, arguments: dict[str, Any], error: str
) -> None:
    """And nothing is left behind."""
    with pytest.raises(ValueError, match=error.split(":")[0]) as caught:
        learner.observe(print, Event, **arguments)
    assert str(caught.value).startswith(error)
    assert learner.streams == []
    assert learner.bus.subscriptions() == ()


def test_a_stream_of_something_other_than_events_is_refused(learner: TrainLearner) -> None:
    """Before any fit."""
    with pytest.raises(TypeError, match="is not an event class"):
        learner.events(nn.Module)
    with pytest.raises(TypeError, match="cannot receive AfterBatch"):
        learner.observe(lambda: None, AfterBatch)
    assert learner.streams == []
    assert learner.bus.subscriptions() == ()


# ------------------------------------------------------------------------------------- policies


async def test_drop_oldest_keeps_the_newest_and_counts_the_rest(learner: TrainLearner) -> None:
    """G8: never more than the buffer holds; delivered + dropped = emitted."""
    held: list[int] = []
    stream = learner.events(Event, buffer=5)
    learner.on(Event)(lambda event: held.append(waiting(stream)))
    with record_events(learner) as events, capture_logs() as logs:
        async with stream:
            result = await learner.fit()
            assert await names_of(stream) == events.names[-5:]
    assert held == [min(i, 5) for i in range(1, len(events) + 1)]
    assert (stream.emitted, stream.delivered) == (len(events), 5)
    assert result.dropped == {stream.name: len(events) - 5}
    assert logs == [
        {
            "event": "events_dropped",
            "log_level": "warning",
            "run_id": result.run_id,
            "dropped": {stream.name: len(events) - 5},
        }
    ]


async def test_latest_delivers_the_newest(learner: TrainLearner) -> None:
    """G8: one event is held; whoever comes late gets that."""
    held: list[int] = []
    stream = learner.events(Event, overflow="latest", buffer=100)
    learner.on(Event)(lambda event: held.append(waiting(stream)))
    with record_events(learner) as events:
        async with stream:
            result = await learner.fit()
            assert [event async for event in stream] == [events[-1]]
    assert set(held) == {1}
    assert result.dropped == {stream.name: len(events) - 1}


async def test_latest_delivers_the_newest_event_to_a_slow_reader(
    learner: TrainLearner,
) -> None:
    """G8: never an event older than one it has had, and always the last."""
    heard: list[Event] = []

    async def slow(event: Event) -> None:
        heard.append(event)
        await anyio.sleep(0.002)

    learner.observe(slow, Event, overflow="latest")
    with anyio.fail_after(GUARD), record_events(learner) as events:
        await learner.fit(3)
    places = [events.index(event) for event in heard]
    assert places == sorted(set(places))
    assert heard[-1] is events[-1]


@pytest.mark.parametrize("buffer", [1, 2, 7])
async def test_block_loses_nothing_and_holds_no_more_than_its_buffer(
    learner: TrainLearner, buffer: int
) -> None:
    """G8: the training waits for the reader."""
    held: list[int] = []
    heard: list[Event] = []
    stream = learner.events(Event, overflow="block", buffer=buffer)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with stream, anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            await until(lambda: stream.emitted == buffer)
            for _ in range(5):
                await anyio.sleep(0.01)
                held.append(waiting(stream))
            await read_into(stream, heard)
    assert held == [buffer] * 5
    assert heard == list(events)
    assert learner.result.dropped == {}


async def test_block_with_a_reader_that_is_slow_loses_nothing(learner: TrainLearner) -> None:
    """G8: also at the end, where the drain delivers what is left."""
    heard: list[Event] = []

    async def slow(event: Event) -> None:
        await anyio.sleep(0.001)
        heard.append(event)

    learner.observe(slow, Event, overflow="block", buffer=3)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        result = await learner.fit(2)
    assert heard == list(events)
    assert result.dropped == {}


async def test_a_fit_is_cancelled_while_a_full_buffer_blocks_it(learner: TrainLearner) -> None:
    """G4, G8: the training goes on to its end at once; its last events are not lost."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with learner.events(overflow="block", buffer=4) as stream:
            async with anyio.create_task_group() as tg:
                tg.start_soon(learner.fit)
                await until(lambda: stream.emitted == 4)
                await anyio.sleep(0.02)
                tg.cancel_scope.cancel()
            assert learner.result.status == "cancelled"
            assert [event async for event in stream] == list(events)
    assert events.names[-3:] == ["CleanupBatch", "CleanupEpoch", "CleanupFit"]
    assert stream.dropped == 0


@pytest.mark.parametrize("scope", ["fit", "epoch", "batch"])
async def test_stop_takes_effect_while_a_full_buffer_blocks_the_training(
    learner: TrainLearner, scope: str
) -> None:
    """G8: nothing is lost, and with the reader back the rest of the fit goes on."""
    heard: list[Event] = []
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with (
            learner.events(overflow="block", buffer=4) as stream,
            anyio.create_task_group() as tg,
        ):
            tg.start_soon(learner.fit)
            await until(lambda: stream.emitted == 4)
            await anyio.sleep(0.02)
            learner.stop(scope)
            await until(lambda: stream.emitted > 4)
            await read_into(stream, heard)
    assert heard == list(events)
    assert learner.result.status == ("cancelled" if scope == "fit" else "completed")


async def test_a_blocked_training_goes_on_when_the_stream_is_closed(
    learner: TrainLearner,
) -> None:
    """G8: a reader that leaves holds nobody up."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            async with learner.events(overflow="block", buffer=2) as stream:
                tg.start_soon(learner.fit)
                await until(lambda: stream.emitted == 2)
                await anyio.sleep(0.02)
    assert events.names[-1] == "CleanupFit"
    assert learner.result.status == "completed"


async def test_a_blocked_training_goes_on_when_the_observer_fails(learner: TrainLearner) -> None:
    """G8: and the observer is detached."""

    async def fail(event: Event) -> None:
        await anyio.sleep(0.02)
        raise ZeroDivisionError

    learner.observe(fail, Event, overflow="block", buffer=2)
    with anyio.fail_after(GUARD), capture_logs() as logs:
        result = await learner.fit()
    assert result.status == "completed"
    assert [line["event"] for line in logs].count("observer_failed") == 1


@dataclass(frozen=True, slots=True, eq=False)
class ReportExported(Event):
    """An event that an async receiver of these tests emits."""


def test_an_async_receiver_that_emits_does_not_wait_for_a_full_buffer(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """G8: it is on the event loop, as the reader is: both would wait for each other."""
    heard: list[str] = []

    async def slow(event: ReportExported) -> None:
        await anyio.sleep(0.001)
        heard.append(type(event).__name__)

    @learner.on(AfterEpoch)
    async def upload(event: AfterEpoch) -> None:
        for _ in range(3):
            event.learner.emit(ReportExported)

    learner.observe(slow, ReportExported, overflow="block", buffer=1)
    future: Future[FitResult] = Future()
    threading.Thread(target=lambda: future.set_result(learner.run(**backend)), daemon=True).start()
    assert future.result(GUARD).dropped == {}
    assert heard == ["ReportExported"] * 6


# ---------------------------------------------------------------------------------- observers


async def test_observers_run_on_the_hosts_event_loop(learner: TrainLearner) -> None:
    """G8: plain and async ones, each event once, in order."""
    plain: list[Event] = []
    asynchronous: list[Event] = []
    threads: set[int] = set()

    def observe(event: Event) -> None:
        threads.add(threading.get_ident())
        plain.append(event)

    async def observe_async(event: Event) -> None:
        await anyio.lowlevel.checkpoint()
        threads.add(threading.get_ident())
        asynchronous.append(event)

    learner.observe(observe, Event)
    learner.observe(observe_async, Event)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        result = await learner.fit()
    assert plain == asynchronous == list(events)
    assert threads == {threading.get_ident()}
    assert result.dropped == {}


async def test_an_observer_lives_through_several_fits(learner: TrainLearner) -> None:
    """Its counts are those of the last fit; it is there until it is closed."""
    heard: list[tuple[str, str]] = []
    observer = learner.observe(
        lambda event: heard.append((event.run_id, type(event).__name__)), FitEvent
    )
    ids = [(await learner.fit()).run_id for _ in range(3)]
    assert heard == [
        (run_id, name) for run_id in ids for name in ("BeforeFit", "AfterFit", "CleanupFit")
    ]
    assert (observer.emitted, observer.delivered, observer.dropped) == (3, 3, 0)
    observer.close()
    observer.close()
    await learner.fit()
    assert len(heard) == 9
    assert learner.streams == []
    assert learner.bus.subscriptions() == ()


def test_an_observer_lives_through_fits_on_different_loops(learner: TrainLearner) -> None:
    """It belongs to the learner, not to the loop that it was first run on."""
    heard: list[str] = []
    learner.observe(lambda event: heard.append(event.run_id), FitEvent)
    ids = [learner.run(backend=name).run_id for name in ("asyncio", "trio", "asyncio")]
    assert heard == [run_id for run_id in ids for _ in range(3)]


async def test_an_observer_is_a_context_manager(learner: TrainLearner) -> None:
    """Outside of it, nothing is heard."""
    heard: list[str] = []
    with learner.observe(lambda event: heard.append(event.run_id), BeforeFit):
        first = await learner.fit()
    await learner.fit()
    assert heard == [first.run_id]


async def test_an_observer_closed_by_the_host_during_a_fit_gets_what_it_had(
    learner: TrainLearner,
) -> None:
    """The events up to then, and none after."""
    closed = threading.Event()
    learner.on(CleanupEpoch, once=True)(lambda event: closed.wait(GUARD))
    heard: list[Event] = []
    observer = learner.observe(heard.append, Event)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            await until(lambda: "CleanupEpoch" in events.names)
            observer.close()
            closed.set()
    end = events.names.index("CleanupEpoch") + 1
    assert heard == events[:end]
    assert (observer.emitted, observer.delivered, observer.dropped) == (end, end, 0)


@pytest.mark.parametrize("waits", [False, True])
async def test_an_observer_closed_in_the_training_thread_gets_what_it_had(
    learner: TrainLearner, waits: bool
) -> None:
    """A receiver may close it, also while it waits for more."""
    heard: list[Event] = []
    observer = learner.observe(heard.append, Event)

    @learner.on(CleanupEpoch, once=True)
    def close(event: CleanupEpoch) -> None:
        if waits:
            wait_until(lambda: len(heard) == observer.emitted)
            time.sleep(0.01)
        observer.close()

    with anyio.fail_after(GUARD), record_events(learner) as events:
        result = await learner.fit()
    assert result.status == "completed"
    assert heard == events[: events.names.index("CleanupEpoch") + 1]


async def test_a_stream_closed_in_the_training_thread_ends(learner: TrainLearner) -> None:
    """Its reader waits on another thread, and has to be woken there."""
    heard: list[Event] = []
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with learner.events() as stream, anyio.create_task_group() as tg:

            @learner.on(CleanupEpoch, once=True)
            def close(event: CleanupEpoch) -> None:
                wait_until(lambda: len(heard) == stream.emitted)
                time.sleep(0.01)
                stream.close()

            tg.start_soon(read_into, stream, heard)
            result = await learner.fit()
    assert result.status == "completed"
    assert heard == events[: events.names.index("CleanupEpoch") + 1]


async def test_an_observer_opened_by_a_callback_as_the_fit_begins_gets_its_events(
    learner: TrainLearner,
) -> None:
    """However short the fit is: from the next event to the last."""
    heard: list[Event] = []

    class Opens(Callback):
        def before_fit(self, event: BeforeFit) -> None:
            self.observer = event.learner.observe(heard.append, Event)

        def cleanup_fit(self, event: CleanupFit) -> None:
            self.observer.close()

    opens = Opens()
    with anyio.fail_after(GUARD), record_events(learner) as events:
        await learner.fit(cbs=opens)
    assert heard == events[1:]
    assert opens.observer.delivered + opens.observer.dropped == opens.observer.emitted
    assert learner.streams == []


async def test_an_observer_opened_by_the_host_during_a_fit_gets_the_rest(
    learner: TrainLearner,
) -> None:
    """From then on."""
    opened = threading.Event()
    learner.on(CleanupEpoch, once=True)(lambda event: opened.wait(GUARD))
    heard: list[Event] = []
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            await until(lambda: "CleanupEpoch" in events.names)
            learner.observe(heard.append, Event)
            opened.set()
    assert heard == events[events.names.index("CleanupEpoch") + 1 :]


async def test_a_callback_may_have_observers_and_receivers(learner: TrainLearner) -> None:
    """`observes` and `observe`, filtered by `wants`, for as long as it is attached."""

    class Watch(Callback):
        observes = (AfterBatch, CleanupFit)
        buffer = 3

        def __init__(self) -> None:
            self.heard: list[str] = []
            self.threads: set[int] = set()

        def wants(self, event: Event) -> bool:
            return type(event) is CleanupFit or event.training

        async def observe(self, event: Event) -> None:
            self.threads.add(threading.get_ident())
            self.heard.append(type(event).__name__)

    watch = Watch()
    with anyio.fail_after(GUARD):
        result = await learner.fit(cbs=watch)
        await learner.fit()
    name = f"{Watch.__qualname__}.observe"
    assert len(watch.heard) + result.dropped.get(name, 0) == 4
    assert watch.heard[-1] == "CleanupFit"
    assert watch.threads == {threading.get_ident()}
    assert learner.streams == []


# ---------------------------------------------------------------------- they cannot hurt the run


def weights(learner: TrainLearner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.model.parameters()]


@pytest.fixture
async def unobserved(
    make_model: Callable[[], nn.Module], dls: DataLoaders
) -> tuple[list[str], list[torch.Tensor]]:
    """The events and the weights of the same fit without observers."""
    learner = TrainLearner(make_model(), dls)
    with record_events(learner) as events:
        await learner.fit(2)
    return events.names, weights(learner)


async def test_a_fit_is_the_same_to_the_bit_observed_or_not(
    learner: TrainLearner, unobserved: tuple[list[str], list[torch.Tensor]]
) -> None:
    """G11: with observers of every policy, quick and slow."""

    async def slow(event: Event) -> None:
        await anyio.sleep(0.0005)

    for policy in POLICIES:
        learner.observe(slow, Event, overflow=policy, buffer=2)
        learner.observe(lambda event: event.time, Event, overflow=policy)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with learner.events(buffer=1) as stream:
            await learner.fit(2)
            assert await names_of(stream) == ["CleanupFit"]
    names, before = unobserved
    assert events.names == names
    assert all(torch.equal(a, b) for a, b in zip(weights(learner), before, strict=True))


async def fail_async(event: Event) -> None:
    await anyio.lowlevel.checkpoint()
    raise ZeroDivisionError("in an observer")


def fail(event: Event) -> None:
    raise ZeroDivisionError("in an observer")


def cancel(event: Event) -> None:
    raise CancelFitException("by an observer")


async def cancel_async(event: Event) -> None:
    raise CancelBatchException("by an observer")


async def cancel_in_a_task_group(event: Event) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(cancel_async, event)


async def fail_in_a_task_group(event: Event) -> None:
    async with anyio.create_task_group() as tg:
        tg.start_soon(fail_async, event)


async def cancel_its_own_scope(event: Event) -> None:
    with anyio.CancelScope() as scope:
        scope.cancel()
        await anyio.sleep_forever()
    raise ZeroDivisionError


async def time_out(event: Event) -> None:
    with anyio.fail_after(0):
        await anyio.sleep_forever()


BAD = [
    fail,
    fail_async,
    cancel,
    cancel_async,
    cancel_in_a_task_group,
    fail_in_a_task_group,
    cancel_its_own_scope,
    time_out,
]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("bad", BAD)
async def test_an_observer_that_raises_is_logged_and_detached(
    learner: TrainLearner,
    unobserved: tuple[list[str], list[torch.Tensor]],
    bad: Callable[[Event], Any],
    policy: str,
) -> None:
    """G8: an error or an attempt to cancel: the run goes on, to the same weights."""
    heard: list[Event] = []
    subscriptions = learner.bus.subscriptions()
    observer = learner.observe(bad, Event, overflow=policy, buffer=3)
    neighbour = learner.observe(heard.append, Event)
    with anyio.fail_after(GUARD), capture_logs() as logs, record_events(learner) as events:
        result = await learner.fit(2)
    names, before = unobserved
    assert (result.status, events.names) == ("completed", names)
    assert all(torch.equal(a, b) for a, b in zip(weights(learner), before, strict=True))
    assert heard == list(events)
    failures = [line for line in logs if line["event"] == "observer_failed"]
    assert [(line["observer"], line["log_level"]) for line in failures] == [(bad.__name__, "error")]
    assert observer.delivered + observer.dropped == observer.emitted
    assert observer.delivered == 1
    assert learner.streams == [neighbour]
    neighbour.close()
    assert learner.bus.subscriptions() == subscriptions
    assert (await learner.fit()).status == "completed"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
@pytest.mark.parametrize("how", ["cancels its task", "awaits what was cancelled", "raises it"])
def test_an_observer_cannot_end_the_fit_with_a_native_cancel(
    learner: TrainLearner, loop: str, how: str
) -> None:
    """G8: a CancelledError of its own is an error of the observer, as any other."""

    async def cancel_natively(event: Event) -> None:
        if how == "cancels its task":
            asyncio.current_task().cancel()
            await asyncio.sleep(0)
        elif how == "awaits what was cancelled":
            task = asyncio.create_task(asyncio.sleep(3600))
            task.cancel()
            await task
        else:
            raise asyncio.CancelledError

    heard: list[Event] = []
    learner.observe(cancel_natively, Event)
    learner.observe(heard.append, Event)
    learner.on(CleanupFit)(lambda event: wait_until(lambda: logs))  # it fails while training
    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None
    with capture_logs() as logs, record_events(learner) as events:
        with asyncio.Runner(loop_factory=factory) as runner:
            result = runner.run(learner.fit())
    assert result.status == "completed"
    assert heard == list(events)
    assert [line["event"] for line in logs][:1] == ["observer_failed"]
    assert logs[0]["observer"] == cancel_natively.__qualname__


@pytest.mark.parametrize("error", [ZeroDivisionError, CancelFitException])
@pytest.mark.parametrize("waits", [False, True])
async def test_a_filter_that_raises_is_logged_and_detached(
    learner: TrainLearner,
    unobserved: tuple[list[str], list[torch.Tensor]],
    error: type[BaseException],
    waits: bool,
) -> None:
    """G8: it runs in the training thread, and yet it cannot hurt it."""
    heard: list[str] = []

    def broken(event: Event) -> bool:
        if type(event) is AfterBatch:
            if waits:  # the reader is at rest: it has to be woken on its own thread
                wait_until(lambda: len(heard) == observer.emitted)
                time.sleep(0.01)
            raise error("in a filter")
        return True

    observer = learner.observe(
        lambda event: heard.append(type(event).__name__), Event, where=broken
    )
    with anyio.fail_after(GUARD), capture_logs() as logs, record_events(learner) as events:
        result = await learner.fit(2)
    names, before = unobserved
    assert (result.status, events.names) == ("completed", names)
    assert all(torch.equal(a, b) for a, b in zip(weights(learner), before, strict=True))
    assert heard == names[: names.index("AfterBatch")]
    assert [line["event"] for line in logs] == ["observer_failed"]
    assert learner.streams == []


async def test_an_event_cannot_be_changed_by_an_observer(learner: TrainLearner) -> None:
    """G8: events are frozen."""
    errors: list[type[BaseException]] = []

    def change(event: BatchEvent) -> None:
        try:
            event.iter = 7
        except AttributeError as exc:
            errors.append(type(exc))

    learner.observe(change, BeforeBatch)
    await learner.fit()
    assert len(errors) == 5


# ------------------------------------------------------------------------------ on_error="raise"


@pytest.mark.parametrize("bad", [fail, fail_async, fail_in_a_task_group])
async def test_an_observer_that_may_raise_ends_the_fit_with_its_error(
    learner: TrainLearner, bad: Callable[[Event], Any]
) -> None:
    """G5, G8: named in a note; the training has cleaned up."""
    observer = learner.observe(bad, BeforeFit, on_error="raise")
    learner.on(BeforeFit)(lambda event: wait_until(lambda: learner.stopping))
    with anyio.fail_after(GUARD), capture_logs() as logs, record_events(learner) as events:
        with pytest.raises(ZeroDivisionError, match="in an observer") as caught:
            await learner.fit()
    assert caught.value.__notes__[0] == f"raised by observer {bad.__name__} on BeforeFit"
    assert events.names == ["BeforeFit", "CleanupEpoch", "CleanupFit"]
    assert events[-1].end.status == "failed"
    assert [line["event"] for line in logs] == ["observer_failed"]
    assert observer.delivered + observer.dropped == observer.emitted
    assert learner.streams == []
    assert learner.result.status == "failed"


async def test_an_observer_that_may_raise_does_so_when_the_training_is_over(
    learner: TrainLearner,
) -> None:
    """G5: a short fit is over before its observers get the first event; their errors count too."""
    learner.observe(fail, AfterFit, on_error="raise")
    with anyio.fail_after(GUARD), capture_logs(), record_events(learner) as events:
        with pytest.raises(ZeroDivisionError, match="in an observer") as caught:
            await learner.fit()
    assert caught.value.__notes__[0] == "raised by observer fail on AfterFit"
    assert events.names[-2:] == ["AfterFit", "CleanupFit"]
    assert learner.streams == []


# ----------------------------------------------------------------------------- what is counted


async def by_nothing(fit: Callable[[], Awaitable[FitResult]], learner: TrainLearner) -> None:
    assert (await fit()).status == "completed"


async def by_a_receiver(fit: Callable[[], Awaitable[FitResult]], learner: TrainLearner) -> None:
    with learner.subscribe(AfterLoss, cancel, where=lambda event: event.iter == 1):
        assert (await fit()).status == "cancelled"


async def by_an_error(fit: Callable[[], Awaitable[FitResult]], learner: TrainLearner) -> None:
    with learner.subscribe(AfterLoss, fail, where=lambda event: event.iter == 1):
        with pytest.raises(ZeroDivisionError):
            await fit()


async def by_the_host(fit: Callable[[], Awaitable[FitResult]], learner: TrainLearner) -> None:
    def cancel_and_wait(event: AfterLoss) -> None:
        anyio.from_thread.run_sync(scope.cancel, token=token)
        wait_until(lambda: learner.stopping)

    token = anyio.lowlevel.current_token()
    with anyio.CancelScope() as scope:
        with learner.subscribe(AfterLoss, cancel_and_wait, where=lambda event: event.iter == 1):
            await fit()
    assert scope.cancelled_caught


@pytest.mark.parametrize("end", [by_nothing, by_a_receiver, by_an_error, by_the_host])
@pytest.mark.parametrize("policy", POLICIES)
async def test_delivered_and_dropped_make_up_emitted(
    learner: TrainLearner,
    policy: str,
    end: Callable[[Callable[[], Awaitable[FitResult]], TrainLearner], Awaitable[None]],
) -> None:
    """G8: for observers quick, slow, blocking, hanging and raising, however the fit ends."""
    checks_quick = policy == "drop_oldest" and end is not by_nothing
    learner.drain_timeout = 2 if checks_quick else 0.1
    quick: list[Event] = []

    async def slow(event: Event) -> None:
        await anyio.sleep(0.003)

    def blocking(event: Event) -> None:
        time.sleep(0.002)

    async def hanging(event: Event) -> None:
        await anyio.sleep_forever()

    kinds = [quick.append, slow, blocking, fail]
    if policy != "block":
        kinds.append(hanging)
    observers = [learner.observe(kind, Event, overflow=policy, buffer=8) for kind in kinds]
    with anyio.fail_after(GUARD), capture_logs(), record_events(learner) as events:
        await end(learner.fit, learner)
    for observer in observers:
        assert observer.delivered + observer.dropped == observer.emitted
        assert learner.result.dropped.get(observer.name, 0) == observer.dropped
    listening = [observer for observer in observers if observer.receiver is not fail]
    assert {observer.emitted for observer in listening} == {len(events)}
    assert learner.streams == listening
    if checks_quick:
        assert quick[-1] is events[-1]


async def test_an_observer_that_hangs_is_cut_at_the_deadline(learner: TrainLearner) -> None:
    """G8: the fit returns; what was left is dropped, counted and logged."""
    learner.drain_timeout = 0.05
    cut: list[bool] = []

    async def hang(event: Event) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            cut.append(True)

    observer = learner.observe(hang, Event)
    with anyio.fail_after(GUARD), capture_logs() as logs, record_events(learner) as events:
        result = await learner.fit()
    assert result.status == "completed"
    assert cut == [True]
    assert (observer.delivered, observer.dropped) == (1, len(events) - 1)
    assert result.dropped == {observer.name: len(events) - 1}
    assert [(line["event"], line["dropped"]) for line in logs] == [
        ("events_dropped", {observer.name: len(events) - 1})
    ]


async def test_an_observer_that_blocks_the_loop_is_cut_at_the_deadline_too(
    learner: TrainLearner,
) -> None:
    """G8: a plain function cannot be cancelled, but between two events it is."""
    learner.drain_timeout = 0.05
    trained = threading.Event()
    learner.on(CleanupFit)(lambda event: trained.set())

    def block(event: Event) -> None:
        assert trained.wait(GUARD)
        time.sleep(0.02)

    observer = learner.observe(block, Event)
    with anyio.fail_after(GUARD), capture_logs(), record_events(learner) as events:
        result = await learner.fit(2)
    assert observer.delivered + observer.dropped == observer.emitted == len(events)
    assert 0 < observer.delivered < len(events)
    assert result.dropped == {observer.name: observer.dropped}


async def test_a_stream_that_nobody_reads_is_counted_in_the_result(
    learner: TrainLearner,
) -> None:
    """G8: under its own name."""
    async with learner.events(BeforeEpoch, AfterEpoch, buffer=1) as stream:
        result = await learner.fit()
    assert result.dropped == {"events(BeforeEpoch, AfterEpoch)": 3}
    assert (stream.emitted, stream.dropped, waiting(stream)) == (4, 3, 1)


@given(
    policy=st.sampled_from(["drop_oldest", "latest"]),
    buffer=st.integers(1, 4),
    actions=st.lists(st.sampled_from(["emit", "read", "read all"]), max_size=30),
)
@settings(max_examples=40)
def test_a_stream_is_a_queue_that_forgets_its_oldest(
    policy: str, buffer: int, actions: list[str]
) -> None:
    """G8: for any order of events and reads, it holds and counts what a bounded deque would."""
    learner = TrainLearner(nn.Linear(1, 1))
    model: deque[Event] = deque(maxlen=1 if policy == "latest" else buffer)
    counts = {"emitted": 0, "delivered": 0, "dropped": 0}

    async def main() -> None:
        async with learner.events(buffer=buffer, overflow=policy) as stream:
            for action in actions:
                if action == "emit":
                    event = BeforeFit(learner, "by hand", 0.0, "fit", 1, None)
                    learner.bus.send(event)
                    counts["emitted"] += 1
                    counts["dropped"] += len(model) == model.maxlen
                    model.append(event)
                while model and action != "emit":
                    assert await anext(stream) is model.popleft()
                    counts["delivered"] += 1
                    if action == "read":
                        break
                assert waiting(stream) == len(model)
                assert {name: getattr(stream, name) for name in counts} == counts
            stream.close()
            assert [event async for event in stream] == list(model)

    anyio.run(main)

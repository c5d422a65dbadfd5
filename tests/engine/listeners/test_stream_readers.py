"""A stream has one reader and must be open: anything else is an error, not a hang."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from eventrain.engine import EventStream, TrainLearner
from eventrain.engine.listeners import event_buffer
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterFit,
    BeforeFit,
    CleanupFit,
    Event,
    record_events,
)
from structlog.testing import capture_logs

from tests.support.waiting import GUARD, in_a_thread, until, wait_until


async def names_of(stream: AsyncIterator[Event]) -> list[str]:
    return [type(event).__name__ async for event in stream]


def the_only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    (error,) = group.exceptions
    return error


# ---------------------------------------------------------------------------------- must be open


@pytest.mark.parametrize("read", [names_of, anext], ids=["async for", "anext"])
async def test_a_stream_that_was_not_opened_says_how_to_open_it(
    learner: TrainLearner, read: Callable[[EventStream[Event]], Awaitable[object]]
) -> None:
    with pytest.raises(RuntimeError) as caught:
        await read(learner.events(AfterEpoch))
    assert str(caught.value) == (
        "events(AfterEpoch) is not open: use `async with learner.events(...) as stream`"
    )


async def test_a_reader_that_forgot_to_open_its_stream_ends_the_fit_beside_it(
    learner: TrainLearner,
) -> None:
    """In a task group, as it is written at first: no hang, and the error comes out."""

    async def read() -> None:
        async for event in learner.events(AfterEpoch):
            pytest.fail(repr(event))

    async def main() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read)
            await learner.fit()

    with anyio.fail_after(GUARD), pytest.raises(BaseExceptionGroup) as caught:
        await main()
    assert "is not open" in str(the_only_error(caught.value))
    assert not learner.fitting


async def test_a_stream_that_was_read_to_its_end_is_not_read_again(learner: TrainLearner) -> None:
    """It would give nothing for the second fit, without a word."""
    async with learner.events(AfterEpoch) as stream:
        await learner.fit(1)
        assert await names_of(stream) == ["AfterEpoch"] * 2
        await learner.fit(1)
        with pytest.raises(RuntimeError, match="read to its end: a stream ends with its fit"):
            await names_of(stream)


async def test_the_iterator_of_a_stream_goes_on_saying_that_it_has_ended(
    learner: TrainLearner,
) -> None:
    """As every iterator does, for code that merges several of them."""
    async with learner.events(BeforeFit) as stream:
        await learner.fit()
        reader = aiter(stream)
        assert type(await anext(reader)) is BeforeFit
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(reader)


async def test_a_stream_may_be_opened_again_for_the_next_fit(learner: TrainLearner) -> None:
    """Its reader may be there before the fit begins."""
    stream = learner.events(AfterEpoch)
    counts: list[tuple[int, int, int]] = []

    async def read() -> None:
        heard = await names_of(stream)
        counts.append((len(heard), stream.emitted, stream.delivered))

    with anyio.fail_after(GUARD):
        for n_epochs in (1, 2):
            async with stream, anyio.create_task_group() as tasks:
                tasks.start_soon(read)
                await until(lambda: bool(stream._readers))
                await learner.fit(n_epochs)
    assert counts == [(2, 2, 2), (4, 4, 4)]
    assert learner.streams == []


async def test_a_stream_opened_again_in_the_same_fit_is_counted_once(
    learner: TrainLearner,
) -> None:
    stream = learner.events(AfterBatch, buffer=1)

    @learner.on(AfterBatch, once=True)
    async def reopen(event: AfterBatch) -> None:
        stream.close()
        stream.open()

    async with stream:
        result = await learner.fit()
    assert result.dropped == {stream.name: 3}  # of the 4 batches after that; one is held


async def test_a_stream_is_not_opened_twice_at_once(learner: TrainLearner) -> None:
    async with learner.events(AfterEpoch) as stream:
        with pytest.raises(RuntimeError, match=r"events\(AfterEpoch\) is open already"):
            stream.open()
        await learner.fit()
        assert len(await names_of(stream)) == 2
    assert learner.bus.subscriptions() == ()


async def test_an_observer_is_not_iterated(learner: TrainLearner) -> None:
    """It would take the events from its receiver."""
    heard: list[Event] = []
    observer = learner.observe(heard.append, AfterFit)
    for read in (names_of, anext):
        with pytest.raises(TypeError, match="an observer cannot be iterated: it passes its events"):
            await read(observer)
    await learner.fit()
    assert len(heard) == 1


async def test_a_fit_that_is_refused_leaves_a_waiting_reader_to_the_next_one(
    learner: TrainLearner,
) -> None:
    """Nothing has begun, so nothing has ended."""
    heard: list[str] = []

    async def read(stream: EventStream[Event]) -> None:
        heard.extend(await names_of(stream))

    with anyio.fail_after(GUARD):
        async with learner.events(BeforeFit) as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(read, stream)
            await until(lambda: bool(stream._readers))
            with pytest.raises(ValueError, match="lr=-1"):
                await learner.fit(lr=-1)
            assert heard == []
            await learner.fit()
    assert heard == ["BeforeFit"]


# ------------------------------------------------------------------------------------ one reader


@pytest.mark.parametrize("read", [names_of, anext], ids=["async for", "anext"])
async def test_a_second_reader_is_an_error(
    learner: TrainLearner, read: Callable[[EventStream[Event]], Awaitable[object]]
) -> None:
    """The first one goes on."""
    first: list[str] = []

    async def read_first(stream: EventStream[Event]) -> None:
        first.extend(await names_of(stream))

    with anyio.fail_after(GUARD):
        async with learner.events(AfterEpoch) as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(read_first, stream)
            await until(lambda: bool(stream._readers))
            with pytest.raises(RuntimeError, match="has a reader already, and each event goes to"):
                await read(stream)
            await learner.fit()
    assert first == ["AfterEpoch"] * 2


async def test_a_pool_of_readers_is_told_that_it_needs_a_stream_each(
    learner: TrainLearner,
) -> None:
    async def work(stream: EventStream[Event]) -> None:
        async for _ in stream:
            await anyio.sleep(0.001)

    async def main() -> None:
        async with anyio.create_task_group() as tasks, learner.events(AfterBatch) as stream:
            for _ in range(3):
                tasks.start_soon(work, stream)
            await learner.fit()

    with anyio.fail_after(GUARD), pytest.raises(BaseExceptionGroup) as caught:
        await main()
    assert all("has a reader already" in str(error) for error in caught.value.exceptions)
    assert not learner.fitting


async def test_one_task_may_read_a_stream_in_loops_within_loops(learner: TrainLearner) -> None:
    """Each event is read once, wherever it is read."""
    epochs: list[list[str]] = []
    with anyio.fail_after(GUARD):
        async with learner.events() as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(learner.fit)
            async for event in stream:
                if type(event).__name__ != "BeforeEpoch":
                    continue
                epochs.append([])
                async for inner in stream:
                    if type(inner).__name__ == "CleanupEpoch":
                        break
                    epochs[-1].append(type(inner).__name__)
    assert [names.count("AfterBatch") for names in epochs] == [3, 2]


async def test_a_reader_that_was_cancelled_may_be_followed_by_another(
    learner: TrainLearner,
) -> None:
    with anyio.fail_after(GUARD):
        async with learner.events(AfterEpoch) as stream, anyio.create_task_group() as tasks:
            with anyio.move_on_after(0.01):
                await names_of(stream)
            tasks.start_soon(learner.fit)
            assert await names_of(stream) == ["AfterEpoch"] * 2


# ----------------------------------------------------------------- a full buffer that nobody reads


async def leave_by_break(stream: EventStream[Event]) -> None:
    async for _ in stream:
        break


async def leave_by_an_error(stream: EventStream[Event]) -> None:
    try:
        async for _ in stream:
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


async def never_come(stream: EventStream[Event]) -> None:
    """The reader was to begin after the fit, as with the other policies."""


@pytest.mark.parametrize("leave", [leave_by_break, leave_by_an_error, never_come])
async def test_a_reader_that_has_left_does_not_stop_a_blocked_training_for_ever(
    learner: TrainLearner,
    leave: Callable[[EventStream[Event]], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G8: the stream is closed, and that is logged. Who comes back gets what it holds, and then
    the reason, but not an end that looks like that of the fit."""
    monkeypatch.setattr(event_buffer, "PATIENCE", 2)
    with anyio.fail_after(GUARD), capture_logs() as logs, record_events(learner) as events:
        async with learner.events(overflow="block", buffer=4) as stream:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(leave, stream)
                result = await learner.fit()
            rest = [await anext(stream) for _ in range(4)]
            with pytest.raises(RuntimeError, match="training, and nobody read it for 5 s"):
                await names_of(stream)
    assert result.status == "completed"
    left = 0 if leave is never_come else 1
    assert rest == events[left : left + 4]
    assert [(line["event"], line["log_level"]) for line in logs] == [("stream_not_read", "error")]
    assert logs[0]["observer"] == "events(Event)"


async def test_a_slow_reader_of_a_full_buffer_is_waited_for_and_logged_once(
    learner: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: nothing is lost."""
    monkeypatch.setattr(event_buffer, "PATIENCE", 2)
    heard: list[Event] = []

    async def slow(event: Event) -> None:
        if not heard:
            await until(lambda: bool(logs))
        heard.append(event)

    learner.observe(slow, Event, overflow="block", buffer=2)
    with anyio.fail_after(GUARD), capture_logs() as logs, record_events(learner) as events:
        await learner.fit()
    assert heard == list(events)
    assert [line["event"] for line in logs] == ["observer_blocks_training"]


async def test_a_host_that_holds_its_own_loop_is_not_taken_for_a_reader_that_has_left(
    learner: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader had no chance to come meanwhile."""
    monkeypatch.setattr(event_buffer, "PATIENCE", 2)
    times: list[Any] = []
    with anyio.fail_after(GUARD), capture_logs() as logs, record_events(learner) as events:
        async with (
            learner.events(overflow="block", buffer=2) as stream,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(learner.fit)
            await until(lambda: stream.emitted == 2)
            wait_until(lambda: times.append(0) or len(times) > 100)  # 200 ms, on the loop
            assert await names_of(stream) == events.names
    assert logs == []


def test_a_reader_on_another_event_loop_that_is_blocked_does_not_hold_up_the_fit(
    learner: TrainLearner, backend: Any
) -> None:
    """G6, G8: the fit's event loop waited until the reader's had woken it."""
    waits, ended = threading.Event(), threading.Event()
    heard: list[str] = []

    async def read() -> None:
        async with learner.events(CleanupFit) as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(take, stream)
            await until(lambda: stream._waiting)
            waits.set()
            assert ended.wait(GUARD)

    async def take(stream: Any) -> None:
        heard.extend(await names_of(stream))

    reader = threading.Thread(target=lambda: anyio.run(read, **backend))
    reader.start()
    assert waits.wait(GUARD)
    result = in_a_thread(lambda: learner.run(**backend))
    ended.set()
    reader.join()
    assert result.status == "completed"
    assert heard == ["CleanupFit"]

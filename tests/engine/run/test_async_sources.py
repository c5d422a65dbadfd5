"""Async iterables as loaders: read on the host's event loop, and bounded in both directions."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import suppress
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import CheckpointCB, MetricsCB, ValidateCB
from eventrain.engine import AsyncLoader, DataLoaders, Prefetcher, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    Callback,
    CancelEpochException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    record_events,
)
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn

from tests.support.native import natively
from tests.support.sources import Awaited, Source
from tests.support.training import line_model, weights
from tests.support.waiting import GUARD, in_a_thread, thread_has_ended, until, wait_until

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]


def by_hand(train: Batches, n_epochs: int = 1) -> torch.Tensor:
    """The weights of a plain loop."""
    model = line_model()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(n_epochs):
        for x, y in train:
            nn.functional.mse_loss(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    return weights(model)


async def tasks() -> int:
    """How many tasks the event loop has."""
    await anyio.lowlevel.checkpoint()
    if trio := sys.modules.get("trio"):
        try:
            return int(trio.lowlevel.current_statistics().tasks_living)
        except RuntimeError:
            pass
    return len(asyncio.all_tasks())


async def generate(batches: Batches) -> AsyncIterator[Any]:
    for batch in batches:
        await anyio.lowlevel.checkpoint()
        yield batch


# -------------------------------------------------------------------------------- the same batches

SOURCES: dict[str, Callable[[Batches], Any]] = {
    "an object": Awaited,
    "a loader": lambda batches: AsyncLoader(Awaited(batches), buffer=1),
    "a function": lambda batches: AsyncLoader(lambda: generate(batches), buffer=50),
    "a loader around one": lambda batches: Augmenting(AsyncLoader(Awaited(batches))),
}


class Augmenting:
    """A loader of the user's own, which reads another one."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __iter__(self) -> Any:
        yield from self.loader


@pytest.mark.parametrize("kind", SOURCES)
async def test_a_source_trains_and_validates_as_a_list_does(
    kind: str, make_batches: MakeBatches
) -> None:
    train, valid = make_batches(7), make_batches(3, seed=1)
    expected = TrainLearner(line_model(), DataLoaders(train, valid), cbs=MetricsCB())
    whole = await expected.fit(3)
    dls = DataLoaders(SOURCES[kind](train), SOURCES[kind](valid))
    learner = TrainLearner(line_model(), dls, cbs=MetricsCB())
    with anyio.fail_after(GUARD):
        result = await learner.fit(3)
    assert torch.equal(weights(learner.model), by_hand(train, 3))
    assert result.history == whole.history
    assert (result.status, result.batches, result.valid_batches) == ("completed", 21, 9)


async def test_a_generator_and_a_stream_of_anyio_are_read_once(make_batches: MakeBatches) -> None:
    batches = make_batches(5)
    learner = TrainLearner(line_model(), DataLoaders(generate(batches)))
    await learner.fit(valid=False)
    assert torch.equal(weights(learner.model), by_hand(batches))
    send, receive = anyio.create_memory_object_stream[Any](1)

    async def produce() -> None:
        with send:
            for batch in batches:
                await send.send(batch)

    learner = TrainLearner(line_model(), DataLoaders(receive))
    async with anyio.create_task_group() as producers:
        producers.start_soon(produce)
        await learner.fit(valid=False)
    assert torch.equal(weights(learner.model), by_hand(batches))
    with pytest.raises(anyio.ClosedResourceError):
        receive.receive_nowait()


def test_in_a_script_too(make_batches: MakeBatches, backend: dict[str, Any]) -> None:
    batches = make_batches(5)
    learner = TrainLearner(line_model(), DataLoaders(Awaited(batches)))
    learner.run(2, valid=False, **backend)
    assert torch.equal(weights(learner.model), by_hand(batches, 2))


async def test_validate_and_get_preds_take_a_source(make_batches: MakeBatches) -> None:
    batches = make_batches(4)
    learner = TrainLearner(line_model())
    preds, targets = await learner.get_preds(generate(batches), with_targets=True)
    assert torch.equal(preds, torch.cat([learner.model(x) for x, _ in batches]))
    assert torch.equal(targets, torch.cat([y for _, y in batches]))
    assert await learner.validate(Awaited(batches)) == await learner.validate(batches)


async def test_validate_cb_takes_a_source(make_batches: MakeBatches) -> None:
    history = []
    for loader in make_batches(3), Awaited(make_batches(3)):
        cbs = [MetricsCB(), ValidateCB(loader, every_steps=2, name="other")]
        learner = TrainLearner(line_model(), DataLoaders(make_batches(5, seed=1)), cbs=cbs)
        history.append((await learner.fit(valid=False)).history)
    assert history[0] == history[1]
    assert "other.loss" in history[0][0]


async def test_an_iterable_that_is_async_as_well_is_read_as_an_iterable() -> None:
    class Both(list[Any]):
        def __aiter__(self) -> Any:
            raise AssertionError("it was read on the event loop")

    batch = torch.ones(2, 3), torch.zeros(2, 1)
    assert (await TrainLearner(line_model(), DataLoaders(Both([batch]))).fit(valid=False)).steps


async def test_a_source_is_read_and_closed_on_the_hosts_event_loop(
    make_batches: MakeBatches,
) -> None:
    seen = contextvars.ContextVar("seen", default="nothing")
    seen.set("the caller's")
    found = []

    async def source() -> AsyncIterator[Any]:
        found.append((seen.get(), anyio.get_current_task().id))
        async for batch in generate(make_batches(3)):
            yield batch
        found.append((seen.get(), anyio.get_current_task().id))

    learner = TrainLearner(line_model(), DataLoaders(source(), Source(make_batches(2), ends=True)))
    await learner.fit()
    assert learner.dls.valid.threads == {threading.get_ident()}
    assert [value for value, _ in found] == ["the caller's"] * 2
    assert len(set(found)) == 1


async def test_a_source_with_a_length_tells_it(make_batches: MakeBatches) -> None:
    class Sized(Awaited):
        def __len__(self) -> int:
            return 3

    for source in Sized(make_batches(3)), AsyncLoader(Sized(make_batches(3))):
        learner = TrainLearner(line_model(), DataLoaders(source))
        with record_events(learner) as events:
            await learner.fit(2, valid=False)
        assert [e.n_iter for e in events if isinstance(e, BeforeEpoch)] == [3, 3]
        assert learner.n_steps == 6


# ------------------------------------------------------------------------------------ back-pressure


@pytest.mark.parametrize("buffer", [1, 2, 5])
async def test_a_source_is_asked_for_no_more_than_the_bound(
    buffer: int, make_batches: MakeBatches
) -> None:
    """While batch k is in use, k + buffer have been asked for: as many, and never one more."""
    source = Source(make_batches(20))
    learner = TrainLearner(line_model(), DataLoaders(AsyncLoader(source, buffer)))

    @learner.on(BeforeBatch)
    async def hold(event: BeforeBatch) -> None:
        expected = event.iter + 1 + buffer
        await until(lambda: source.asked == expected)
        for _ in range(50):
            await anyio.lowlevel.checkpoint()
        assert source.asked == expected

    with anyio.fail_after(GUARD):
        result = await learner.fit(epoch_length=8, valid=False)
    assert result.batches == 8


@given(
    n=st.integers(1, 12),
    buffer=st.integers(1, 6),
    turns=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    waits=st.lists(st.booleans(), min_size=1, max_size=6),
)
def test_never_more_than_the_bound_ahead_however_the_two_take_turns(
    n: int, buffer: int, turns: list[int], waits: list[bool]
) -> None:
    taken = asked = 0
    excess = []

    async def source() -> AsyncIterator[int]:
        nonlocal asked
        for i in range(n):
            asked += 1
            excess.append(asked - taken - buffer)
            for _ in range(turns[i % len(turns)]):
                await anyio.lowlevel.checkpoint()
            yield i

    class Counting:
        """Counts before it takes, so that it never counts too few."""

        def __iter__(self) -> Any:
            nonlocal taken
            batches = iter(AsyncLoader(source(), buffer))
            while True:
                taken += 1
                number = next(batches, None)
                if number is None:
                    return
                yield torch.full((1, 3), float(number)), torch.zeros(1, 1)

    learner = TrainLearner(line_model(), DataLoaders(Counting()))
    order = []

    @learner.on(BeforeBatch)
    def before(event: BeforeBatch) -> None:
        order.append(int(event.learner.batch[0][0, 0]))
        if waits[event.iter % len(waits)]:
            bound = min(n, event.iter + 1 + buffer)
            wait_until(lambda: asked >= bound)

    result = learner.run(valid=False)
    assert max(excess) <= 0
    assert order == list(range(n))
    assert result.batches == n


async def test_the_training_waits_for_its_source(make_batches: MakeBatches) -> None:
    send, receive = anyio.create_memory_object_stream[Any](0)
    learner = TrainLearner(line_model(), DataLoaders(receive))
    done = []
    learner.subscribe(AfterBatch, lambda event: done.append(event.iter))
    async with anyio.create_task_group() as group:
        group.start_soon(lambda: learner.fit(valid=False))
        for i, batch in enumerate(make_batches(3)):
            await send.send(batch)
            await until(lambda i=i: len(done) == i + 1)  # type: ignore[misc]
            assert learner.fitting
        send.close()
    assert learner.result.batches == 3


async def test_a_source_that_never_waits_leaves_the_event_loop_free(
    make_batches: MakeBatches,
) -> None:
    (batch,) = make_batches(1)
    turns = 0

    async def endless() -> AsyncIterator[Any]:
        while True:
            yield batch

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        learner = TrainLearner(line_model(), DataLoaders(AsyncLoader(endless(), 1000)))
        await learner.fit(max_steps=300, valid=False)
        group.cancel_scope.cancel()
    assert turns >= 300


async def test_a_batch_is_held_by_its_user_alone() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    class Fresh(Source):
        async def __anext__(self) -> Any:
            x = torch.ones(2, 3)
            kept.append(weakref.ref(x))
            return x, torch.zeros(2, 1)

    learner = TrainLearner(line_model(), DataLoaders(AsyncLoader(Fresh([]), buffer=1)))

    @learner.on(CleanupBatch)
    def free(event: CleanupBatch) -> None:
        event.learner.batch = event.learner.preds = event.learner.loss = None
        wait_until(lambda: kept[event.iter]() is None)

    assert (await learner.fit(max_steps=5, valid=False)).status == "completed"


# ---------------------------------------------------------------------------------- epochs and ends


async def test_epochs_of_a_length_continue_one_endless_source(make_batches: MakeBatches) -> None:
    batches = make_batches(12)
    source = Source(batches)
    learner = TrainLearner(line_model(), DataLoaders(source))
    result = await learner.fit(3, epoch_length=3, valid=False)
    assert (result.batches, source.closed) == (9, 1)
    assert torch.equal(weights(learner.model), by_hand(batches[:9]))


async def test_steps_end_an_endless_source(make_batches: MakeBatches) -> None:
    source = Source(make_batches(9))
    learner = TrainLearner(line_model(), DataLoaders(source))
    result = await learner.fit(max_steps=4, valid=False)
    assert (result.status, result.steps, source.closed) == ("completed", 4, 1)


async def test_validations_of_a_length_continue_one_source(make_batches: MakeBatches) -> None:
    seen = []
    source = Source(make_batches(6), ends=True)
    learner = TrainLearner(line_model(), DataLoaders(make_batches(1), source))
    learner.subscribe(
        BeforeBatch,
        lambda event: event.training or seen.append(event.learner.batch),  # type: ignore[func-returns-value]
    )
    await learner.fit(3, valid_length=2)
    assert [a is b for a, b in zip(seen, source.batches, strict=True)] == [True] * 6
    assert source.closed == 1


async def test_a_source_that_can_be_read_once_is_refused_for_two_epochs(
    make_batches: MakeBatches,
) -> None:
    for source in generate(make_batches(2)), AsyncLoader(generate(make_batches(2))):
        learner = TrainLearner(line_model(), DataLoaders(source, make_batches(1)))
        told = r"is an iterator, .* 2 epochs .* AsyncLoader\(function\).* or epoch_length=\.\.\."
        with pytest.raises(ValueError, match=told):
            await learner.fit(2)
        await (source.source if isinstance(source, AsyncLoader) else source).aclose()


async def test_an_empty_and_an_exhausted_source_are_errors(make_batches: MakeBatches) -> None:
    learner = TrainLearner(line_model(), DataLoaders(Awaited([])))
    with pytest.raises(ValueError, match=r"^dls\.train is empty: it has no batches"):
        await learner.fit(valid=False)
    learner.dls.train = source = generate(make_batches(2))
    await learner.fit(valid=False)
    with pytest.raises(ValueError, match="can be read only once, and it is exhausted"):
        await learner.fit(valid=False)
    assert learner.dls.train is source


async def test_the_error_of_a_source_is_raised_after_the_batches_before_it(
    make_batches: MakeBatches,
) -> None:
    closed = []

    async def source() -> AsyncIterator[Any]:
        try:
            for batch in make_batches(3):
                yield batch
            raise LookupError("the queue is gone")
        finally:
            await anyio.lowlevel.checkpoint()
            closed.append(True)

    learner = TrainLearner(line_model(), DataLoaders(AsyncLoader(source(), buffer=50)))
    with pytest.raises(LookupError, match="the queue is gone") as raised:
        await learner.fit(valid=False)
    assert raised.value.__notes__ == ["raised while reading batch 3 of dls.train"]
    assert "source" in [entry.name for entry in raised.traceback]
    assert learner.result.batches == 3
    assert learner.result.status == "failed"
    assert closed == [True]
    assert thread_has_ended(learner)


async def test_a_source_whose_iteration_cannot_begin() -> None:
    class Broken:
        def __aiter__(self) -> Any:
            raise OSError("no connection")

    for source in Broken(), AsyncLoader(lambda: None):  # type: ignore[arg-type, return-value]
        learner = TrainLearner(line_model(), DataLoaders(source))
        with pytest.raises((OSError, TypeError)) as raised:
            await learner.fit(valid=False)
        assert raised.value.__notes__ == ["raised while reading batch 0 of dls.train"]


# ----------------------------------------------------------------------------------------- closing

End = Callable[[TrainLearner, Source, anyio.CancelScope], None]


def stop(learner: TrainLearner, source: Source, scope: anyio.CancelScope) -> None:
    learner.stop()


def stop_gracefully(learner: TrainLearner, source: Source, scope: anyio.CancelScope) -> None:
    learner.stop(graceful=True)


def cancel(learner: TrainLearner, source: Source, scope: anyio.CancelScope) -> None:
    scope.cancel()


def report(learner: TrainLearner, source: Source, scope: anyio.CancelScope) -> None:
    learner.request_error(LookupError("of an observer"))


@pytest.mark.parametrize("end", [stop, stop_gracefully, cancel, report])
@pytest.mark.parametrize("n", [0, 1, 3])
async def test_a_fit_that_waits_for_a_batch_ends_however_it_is_asked_to(
    n: int, end: End, make_batches: MakeBatches
) -> None:
    source = Source(make_batches(n))
    learner = TrainLearner(line_model(), DataLoaders(source))
    before = await tasks()
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await until(lambda: source.waits and learner.fitting and learner.done.batches == n)
                end(learner, source, scope)

            group.start_soon(watch)
            with suppress(LookupError):
                await learner.fit(valid=False)
    assert scope.cancelled_caught == (end is cancel)
    assert learner.result.status == ("failed" if end is report else "cancelled")
    assert learner.result.batches == n
    assert source.closed == 1
    assert source.threads == {threading.get_ident()}
    assert thread_has_ended(learner)
    assert await tasks() == before


PLACES = [BeforeEpoch, BeforeBatch, AfterBatch, CleanupBatch, AfterEpoch, CleanupEpoch]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
@pytest.mark.parametrize("how", ["cancel", "receiver", "error"])
@pytest.mark.parametrize("once", [True, False])
async def test_a_source_is_closed_before_fit_returns_wherever_that_ends(
    place: type[Any], how: str, once: bool, make_batches: MakeBatches
) -> None:
    opened: list[Source] = []

    def open_one() -> Source:
        opened.append(Source(make_batches(3), ends=True))
        return opened[-1]

    loader = AsyncLoader(open_one() if once else open_one)
    learner = TrainLearner(line_model(), DataLoaders(loader))
    before = await tasks()
    token = anyio.lowlevel.current_token()
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learner.on(place)
        def end(event: Any) -> None:
            if getattr(event, "iter", None) == 0 and place in (AfterBatch, CleanupBatch):
                return
            if how == "receiver":
                raise CancelFitException("enough")
            if how == "error":
                raise LookupError("a bug")
            anyio.from_thread.run_sync(scope.cancel, token=token)
            wait_until(lambda: learner.stopping)

        with pytest.raises(LookupError) if how == "error" else anyio.CancelScope():
            await learner.fit(2 if not once else 1, valid=False)
    assert learner.result.status == ("failed" if how == "error" else "cancelled")
    assert scope.cancelled_caught == (how == "cancel")
    began = [source for source in opened if source.asked]
    assert [source.closed for source in began] == [1] * len(began)
    assert thread_has_ended(learner)
    assert await tasks() == before


async def test_a_source_that_is_left_is_closed_before_it_is_begun_again(
    make_batches: MakeBatches,
) -> None:
    facts = []

    class Exclusive:
        """Like a cursor, of which there may be one."""

        async def __aiter__(self) -> AsyncIterator[Any]:
            facts.append("open")
            try:
                for batch in make_batches(20):
                    yield batch
            finally:
                with anyio.CancelScope(shield=True):
                    for _ in range(5):
                        await anyio.lowlevel.checkpoint()
                facts.append("closed")

    learner = TrainLearner(line_model(), DataLoaders(Exclusive()))

    @learner.on(AfterBatch)
    def leave(event: AfterBatch) -> None:
        if event.iter == 1:
            raise CancelEpochException("enough")

    result = await learner.fit(3, valid=False)
    assert result.status == "completed"
    assert result.steps == 6
    assert facts == ["open", "closed"] * 3


async def test_one_source_may_be_read_by_training_and_validation(
    make_batches: MakeBatches,
) -> None:
    source = Awaited(make_batches(4))
    learner = TrainLearner(line_model(), DataLoaders(source, source))
    result = await learner.fit(2, epoch_length=2)  # the pass of the training stays open
    assert (result.batches, result.valid_batches) == (4, 8)


@natively
def test_native_cancellations_end_a_fit_that_waits(
    run_native: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    make_batches: MakeBatches,
) -> None:
    async def main() -> None:
        for all_of_them in False, True:
            source = Source(make_batches(2))
            learner = TrainLearner(line_model(), DataLoaders(source))
            task = asyncio.create_task(learner.fit(valid=False))
            await until(lambda source=source: source.waits)  # type: ignore[misc]
            await until(lambda learner=learner: learner.done.batches == 2)  # type: ignore[misc]
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for each in others if all_of_them else {task}:
                each.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert source.closed == 1
            assert learner.result.who == "host"
            assert thread_has_ended(learner)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run_native(main)


@natively
def test_a_source_that_raises_cancelled_error_does_not_look_like_a_cancelled_fit(
    run_native: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
) -> None:
    async def source() -> AsyncIterator[Any]:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        yield await future

    async def main() -> None:
        learner = TrainLearner(line_model(), DataLoaders(source()))
        with pytest.raises(RuntimeError, match="nobody has cancelled the fit"):
            await learner.fit(valid=False)
        assert learner.result.status == "failed"

    run_native(main)


def test_ctrl_c_ends_a_script_that_waits_for_its_source(
    make_batches: MakeBatches, backend: dict[str, Any]
) -> None:
    closed = []

    async def source() -> AsyncIterator[Any]:
        try:
            for batch in make_batches(2):
                yield batch
            signal.raise_signal(signal.SIGINT)
            await anyio.sleep_forever()
        finally:
            closed.append(True)

    learner = TrainLearner(line_model(), DataLoaders(source()))
    with pytest.raises(KeyboardInterrupt):
        learner.run(valid=False, **backend)
    assert closed == [True]
    assert thread_has_ended(learner)


async def test_a_source_that_does_not_close_in_time_is_left_and_told_of(
    make_batches: MakeBatches,
) -> None:
    class Slow(Source):
        async def aclose(self) -> None:
            await anyio.sleep_forever()

    learner = TrainLearner(line_model(), DataLoaders(Slow(make_batches(3))))
    learner.cleanup_timeout = 0.01
    with capture_logs() as logs, anyio.fail_after(GUARD):
        result = await learner.fit(max_steps=2, valid=False)
    assert result.status == "completed"
    (line,) = logs
    assert (line["event"], line["source"]) == ("source_not_closed", Slow.__qualname__)
    assert line["run_id"] == result.run_id


async def test_a_source_that_fails_to_close_is_told_of(make_batches: MakeBatches) -> None:
    async def source() -> AsyncIterator[Any]:
        try:
            for batch in make_batches(9):
                yield batch
        finally:
            raise OSError("cannot say goodbye")

    learner = TrainLearner(line_model(), DataLoaders(AsyncLoader(source(), buffer=1)))
    with capture_logs() as logs:
        await learner.fit(max_steps=2, valid=False)
    (line,) = logs
    assert (line["event"], line["reason"]) == ("source_not_closed", "OSError('cannot say goodbye')")
    assert learner.result.status == "completed"


async def test_many_fits_leave_no_thread_and_no_task(make_batches: MakeBatches) -> None:
    before, threads = await tasks(), threading.active_count()
    batches = make_batches(3)
    for _ in range(20):
        source = Source(batches)
        await TrainLearner(line_model(), DataLoaders(source)).fit(max_steps=2, valid=False)
        assert source.closed == 1
    assert await tasks() == before
    assert threading.active_count() == threads


async def test_a_source_is_freed_with_its_fit(make_batches: MakeBatches) -> None:
    source = Awaited(make_batches(3))
    kept = weakref.ref(source)
    learner = TrainLearner(line_model(), DataLoaders(source))
    await learner.fit(valid=False)
    learner.dls = None
    del source
    learner.dl = None
    gc.collect()
    assert kept() is None


# ------------------------------------------------------------------------------ graceful and resume


@pytest.mark.parametrize("length", [None, 5])
async def test_a_graceful_stop_saves_while_the_fit_waits_for_a_batch(
    length: int | None, make_batches: MakeBatches, tmp_path: Any
) -> None:
    batches = make_batches(8)
    source = Source(batches[:3])
    learner = TrainLearner(line_model(), DataLoaders(source), cbs=[MetricsCB()])
    saving = CheckpointCB(tmp_path)

    async def watch() -> None:
        await until(lambda: source.waits and learner.done.batches == 3)
        learner.stop(graceful=True)

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        result = await learner.fit(valid=False, cbs=saving, epoch_length=length)
    assert (result.status, result.batches) == ("cancelled", 3)
    assert saving.last is not None
    resumed = TrainLearner(line_model(), DataLoaders(Awaited(batches)), cbs=[MetricsCB()])
    again = await resumed.fit(
        valid=False, cbs=CheckpointCB(tmp_path), resume="last", epoch_length=length
    )
    assert torch.equal(weights(resumed.model), by_hand(batches[: length or 8]))
    assert len(again.history) == 1
    assert again.history[0].keys() == {"epoch", "train", "loss"}


async def test_it_is_told_that_a_source_cannot_be_positioned(
    make_batches: MakeBatches, tmp_path: Any
) -> None:
    learner = TrainLearner(line_model(), DataLoaders(Awaited(make_batches(3))))
    with capture_logs() as logs:
        await learner.fit(valid=False, cbs=CheckpointCB(tmp_path, every_batches=1))
    (line,) = logs
    assert line["event"] == "resume_may_not_be_exact"
    assert "async source" in line["reason"]


# ------------------------------------------------------------------------------------- first errors


async def test_what_cannot_be_a_source_is_refused_with_what_to_write(
    make_batches: MakeBatches,
) -> None:
    with pytest.raises(TypeError, match="neither an async iterable nor a function"):
        AsyncLoader([1])  # type: ignore[arg-type]
    for buffer in 0, -1, 1.5, True, None:
        with pytest.raises(ValueError, match=r"buffer=.*: give a number of batches, 1 or more"):
            AsyncLoader(Awaited([]), buffer)  # type: ignore[arg-type]
    learner = TrainLearner(line_model(), DataLoaders(lambda: generate([])))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"dls\.train cannot be iterated"):
        await learner.fit(valid=False)
    learner.dls.train = generate  # type: ignore[assignment]
    with pytest.raises(TypeError, match=r"use AsyncLoader\(it\)"):
        await learner.fit(valid=False)
    for source in Awaited([]), AsyncLoader(Awaited([])):
        with pytest.raises(TypeError, match=r"without a Prefetcher: use AsyncLoader"):
            Prefetcher(source)  # type: ignore[arg-type]


async def test_outside_of_a_fit_and_in_another_thread_it_cannot_be_read(
    make_batches: MakeBatches,
) -> None:
    loader = AsyncLoader(Awaited(make_batches(2)))
    with pytest.raises(RuntimeError, match="outside of one: use `async for batch in source`"):
        iter(loader)

    class InAnotherThread:
        def __iter__(self) -> Any:
            context = contextvars.copy_context()
            yield in_a_thread(lambda: context.run(lambda: list(loader)))

    learner = TrainLearner(line_model(), DataLoaders(InAnotherThread()))
    with pytest.raises(RuntimeError, match=r"by the fit's own thread.*Prefetcher: leave that out"):
        await learner.fit(valid=False)


async def test_an_iteration_that_outlives_its_fit_says_so(make_batches: MakeBatches) -> None:
    kept = []

    class Keeping(Callback):
        def before_epoch(self, event: BeforeEpoch) -> None:
            kept.append(iter(AsyncLoader(Source(make_batches(5)))))
            next(kept[0])

    await TrainLearner(line_model(), DataLoaders(make_batches(1)), cbs=Keeping()).fit(valid=False)
    with pytest.raises(RuntimeError, match="the fit that read this async source has ended"):
        next(kept[0])

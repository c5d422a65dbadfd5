"""`iter_preds`: predictions batch by batch, with bounded memory, on any event loop."""

from __future__ import annotations

import asyncio
import gc
import inspect
import sys
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing
from functools import partial
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import torch
from eventrain.engine import DataLoaders, PredictionStream, TrainLearner
from eventrain.events import (
    AfterPredict,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    CancelBatchException,
    CancelEpochException,
    CleanupEpoch,
    CleanupFit,
    Predict,
)
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn

from tests.support.native import natively
from tests.support.sources import Awaited, Source
from tests.support.training import line_model
from tests.support.waiting import GUARD, thread_has_ended, until, wait_until

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]


async def tasks() -> int:
    """How many tasks the event loop has."""
    await anyio.lowlevel.checkpoint()
    if trio := sys.modules.get("trio"):
        try:
            return int(trio.lowlevel.current_statistics().tasks_living)
        except RuntimeError:
            pass
    return len(asyncio.all_tasks())


class Several(nn.Module):
    """Two outputs, and something that is not one row per sample."""

    def __init__(self) -> None:
        super().__init__()
        self.line = line_model()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        y = self.line(x)
        return {"y": y, "twice": 2 * y, "norm": y.norm()}


# ----------------------------------------------------------------------------------- what it yields


async def test_it_yields_what_get_preds_joins_in_the_order_of_the_loader(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    batches = [*make_batches(4), *make_batches(1, size=3)]
    for loader in batches, Awaited(batches), None:
        learner.dls = DataLoaders(valid=batches)
        found = [preds async for preds in learner.iter_preds(loader)]
        assert [len(preds) for preds in found] == [4, 4, 4, 4, 3]
        assert torch.equal(torch.cat(found), await learner.get_preds(batches))
        assert not any(preds.requires_grad for preds in found)
        assert thread_has_ended(learner)
        assert learner.purpose == "predict"


async def test_targets_and_parts_are_chosen_as_for_get_preds(make_batches: MakeBatches) -> None:
    batches = make_batches(3)
    learner = TrainLearner(Several(), DataLoaders(valid=batches))
    choices: list[Any] = ["y", ("y", "twice"), lambda preds: preds["twice"] - preds["y"]]
    for keep in choices:
        whole = await learner.get_preds(keep=keep, with_targets=True)
        found = [pair async for pair in learner.iter_preds(keep=keep, with_targets=True)]
        assert torch.equal(torch.cat([targets for _, targets in found]), whole[1])
        several = keep == ("y", "twice")
        columns = zip(*(preds if several else (preds,) for preds, _ in found), strict=True)
        expected = whole[0] if several else (whole[0],)
        for column, joined in zip(columns, expected, strict=True):
            assert torch.equal(torch.cat(column), joined)


async def test_targets_of_several_inputs_and_of_keywords_are_those_of_get_preds() -> None:
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    forms: list[tuple[Any, Any]] = [((x, x, y), 2), ({"input": x, "y": y}, None), ((x, y, y), 1)]
    for batch, n_inp in forms:
        model = nn.Bilinear(3, 3, 1) if n_inp == 2 else nn.Linear(3, 1)
        learner = TrainLearner(model, DataLoaders(valid=[batch, batch]), n_inp=n_inp)
        preds, targets = await learner.get_preds(with_targets=True)
        found = [pair async for pair in learner.iter_preds(with_targets=True)]
        assert torch.equal(torch.cat([p for p, _ in found]), preds)
        several = isinstance(targets, tuple)
        columns = zip(*(t if several else (t,) for _, t in found), strict=True)
        joined = targets if several else (targets,)
        assert all(map(torch.equal, map(torch.cat, columns), joined))


async def test_what_cannot_be_joined_can_be_streamed(make_batches: MakeBatches) -> None:
    learner = TrainLearner(Several(), DataLoaders(valid=make_batches(2)))
    for x, _ in learner.dls.valid:
        expected = Several()(x)["norm"].item()
        break
    norms = [preds["norm"].item() async for preds in learner.iter_preds()]
    assert norms[0] == pytest.approx(expected)
    with pytest.raises(TypeError, match="is a scalar"):
        await learner.get_preds()


async def test_modes_loaders_and_callbacks_are_as_before(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    learner.model.train()
    dls = learner.dls
    async with learner.iter_preds(make_batches(9)) as stream:
        async for _ in stream:
            break
    assert learner.model.training
    assert learner.dls is dls
    assert learner.cbs == ()


def test_in_a_script_it_is_a_plain_iterator(
    make_batches: MakeBatches, backend: dict[str, Any]
) -> None:
    batches = make_batches(5)
    learner = TrainLearner(line_model(), DataLoaders(valid=batches))
    threads = threading.active_count()
    found = list(learner.run_iter_preds(**backend))
    assert torch.equal(torch.cat(found), learner.run_get_preds(**backend))
    assert threading.active_count() == threads
    for _ in learner.run_iter_preds(Awaited(batches), True, buffer=1, **backend):
        break
    assert not learner.fitting
    assert threading.active_count() == threads
    learner.model = Several()
    with pytest.raises(ValueError, match="there is no such part"):
        list(learner.run_iter_preds(keep="z", **backend))
    assert threading.active_count() == threads


async def test_the_script_form_says_what_to_write_on_an_event_loop(learner: TrainLearner) -> None:
    told = r"`async for \.\.\. in learner\.iter_preds\(\.\.\.\)` here"
    with pytest.raises(RuntimeError, match=told):
        learner.run_iter_preds()


def test_the_two_forms_take_the_same_arguments() -> None:
    one, other = (
        inspect.signature(method).parameters
        for method in (TrainLearner.iter_preds, TrainLearner.run_iter_preds)
    )
    assert [*one, "backend", "backend_options"] == [*other]
    assert all(other[name].default == parameter.default for name, parameter in one.items())


# ------------------------------------------------------------------------------------ back-pressure


@given(
    n=st.integers(1, 10),
    buffer=st.integers(1, 4),
    turns=st.lists(st.integers(0, 3), min_size=1, max_size=5),
)
def test_no_more_batches_are_predicted_ahead_than_the_bound(
    n: int, buffer: int, turns: list[int]
) -> None:
    learner = TrainLearner(line_model())
    taken = predicted = 0
    excess = []

    @learner.on(AfterPredict)
    def count(event: AfterPredict) -> None:
        nonlocal predicted
        predicted += 1
        excess.append(predicted - taken - buffer)

    async def main() -> None:
        nonlocal taken
        stream = learner.iter_preds([(torch.ones(1, 3), None)] * n, buffer=buffer)
        for i in range(n):
            taken += 1  # before it is taken, so that it is never too few
            await anext(stream)
            for _ in range(turns[i % len(turns)]):
                await anyio.lowlevel.checkpoint()
        assert [preds async for preds in stream] == []

    anyio.run(main)
    assert max(excess) <= 0
    assert predicted == n


async def test_the_fit_waits_for_its_reader(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    predicted = 0

    @learner.on(AfterPredict)
    def count(event: AfterPredict) -> None:
        nonlocal predicted
        predicted += 1

    async with learner.iter_preds(make_batches(20), buffer=3) as stream:
        for k in range(1, 5):
            await anext(stream)
            await until(lambda k=k: predicted == k + 3)  # type: ignore[misc]
            for _ in range(50):
                await anyio.lowlevel.checkpoint()
            assert predicted == k + 3


async def test_a_prediction_is_held_by_its_reader_alone(learner: TrainLearner) -> None:
    kept: list[weakref.ref[torch.Tensor]] = []
    async with learner.iter_preds([(torch.ones(2, 3), None)] * 10, buffer=1) as stream:
        async for preds in stream:
            kept.append(weakref.ref(preds))
            del preds
            with anyio.fail_after(GUARD):
                await until(lambda: kept[-1]() is None)


async def test_a_reader_that_never_waits_leaves_the_event_loop_free(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await anyio.lowlevel.checkpoint()

    async with anyio.create_task_group() as group:
        group.start_soon(count)
        n = len([preds async for preds in learner.iter_preds(make_batches(50), buffer=50)])
        group.cancel_scope.cancel()
    assert turns >= n == 50


# ----------------------------------------------------------------------------------------- the ends


@pytest.mark.parametrize("how", ["async with", "aclosing", "aclose"])
@pytest.mark.parametrize("n", [0, 1, 3])
async def test_closing_it_stops_the_fit_and_waits_for_its_thread(
    n: int, how: str, learner: TrainLearner
) -> None:
    source = Source([(torch.ones(2, 3), None)] * 6)
    before = await tasks()
    stream = learner.iter_preds(source)
    with anyio.fail_after(GUARD):
        if how == "aclose":
            for _ in range(n):
                await anext(stream)
            await stream.aclose()
        else:
            async with stream if how == "async with" else aclosing(stream):
                for _ in range(n):
                    await anext(stream)
        assert not learner.fitting
        assert source.closed == (n > 0)
        assert await tasks() == before
        if n:
            assert thread_has_ended(learner)
            assert learner.result.who == "host"
        assert [preds async for preds in stream] == []  # as of a closed generator
        await stream.aclose()
        assert len([preds async for preds in learner.iter_preds([torch.ones(1, 3)])]) == 1


@pytest.mark.parametrize("place", ["the body", "the source", "a model", "a receiver"])
async def test_a_cancelled_reader_leaves_nothing_behind(
    place: str, learner: TrainLearner, make_batches: MakeBatches
) -> None:
    source: Any = Source(make_batches(2)) if place == "the source" else make_batches(9)
    before = await tasks()
    token = anyio.lowlevel.current_token()
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learner.on(BeforeBatch)
        async def hang(event: BeforeBatch) -> None:
            if place == "a receiver" and event.iter == 2:
                scope.cancel()
                await anyio.sleep_forever()

        @learner.on(Predict)
        def predict(event: Predict) -> None:
            if place == "a model" and event.iter == 2:
                anyio.from_thread.run_sync(scope.cancel, token=token)
                wait_until(lambda: learner.stopping)
            event.proceed()

        async def watch() -> None:
            await until(lambda: source.waits)
            scope.cancel()

        async with anyio.create_task_group() as group:
            if place == "the source":
                group.start_soon(watch)
            async with learner.iter_preds(source) as stream:
                async for _ in stream:
                    if place == "the body":
                        scope.cancel()
                        await anyio.sleep_forever()
    assert scope.cancelled_caught
    assert not learner.fitting
    assert thread_has_ended(learner)
    assert learner.result.status == "cancelled"
    assert await tasks() == before


async def test_a_plain_async_for_that_is_cancelled_while_it_waits_has_ended_too(
    learner: TrainLearner,
) -> None:
    source = Source([torch.ones(2, 3)] * 2)
    n = 0
    with anyio.CancelScope() as scope:
        async with anyio.create_task_group() as group:

            async def watch() -> None:
                await until(lambda: source.waits and n == 2)
                scope.cancel()

            group.start_soon(watch)
            async for _ in learner.iter_preds(source):
                n += 1
    assert scope.cancelled_caught
    assert source.closed == 1
    assert thread_has_ended(learner)


async def test_a_loop_that_is_left_without_closing_ends_the_fit_soon(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    before = await tasks()
    async for _ in learner.iter_preds(make_batches(50)):
        break
    gc.collect()
    with anyio.fail_after(GUARD):
        await until(lambda: not learner.fitting)
        while await tasks() != before:
            await anyio.sleep(0.001)
    assert thread_has_ended(learner)


async def test_one_that_is_never_read_does_nothing(learner: TrainLearner) -> None:
    stream = learner.iter_preds()
    del stream
    await learner.iter_preds().aclose()
    async with learner.iter_preds():
        pass
    assert learner.result is None


def test_an_event_loop_that_ends_ends_the_fit(
    learner: TrainLearner, make_batches: MakeBatches, backend: dict[str, Any]
) -> None:
    kept = []

    async def main() -> None:
        kept.append(learner.iter_preds(make_batches(50)))
        await anext(kept[0])

    anyio.run(main, **backend)
    assert not learner.fitting
    assert thread_has_ended(learner)


@natively
def test_native_cancellations_of_the_reader_wait_for_the_thread(
    run_native: Callable[[Callable[[], Coroutine[Any, Any, None]]], None],
    make_batches: MakeBatches,
) -> None:
    def hold_up(held: threading.Event, released: threading.Event, event: CleanupEpoch) -> None:
        held.set()
        assert released.wait(GUARD)

    async def read(learner: TrainLearner) -> None:
        async with learner.iter_preds(make_batches(9)) as stream:
            async for _ in stream:
                await asyncio.sleep(60)

    def is_ahead(learner: TrainLearner) -> bool:
        return learner.fitting and learner.iter == 3

    async def main() -> None:
        for all_of_them in False, True:
            learner = TrainLearner(line_model())
            held, released = threading.Event(), threading.Event()

            hold = partial(hold_up, held, released)
            with learner.subscribe(CleanupEpoch, hold):
                task = asyncio.create_task(read(learner))
                await until(partial(is_ahead, learner))  # one in use, two ahead
                others = asyncio.all_tasks() - {asyncio.current_task()}
                for each in others if all_of_them else {task}:
                    each.cancel()
                await until(held.is_set)
                task.cancel()  # again
                await asyncio.sleep(0)
                assert not task.done()
                released.set()
                with pytest.raises(asyncio.CancelledError):
                    await task
            assert not learner.fitting
            assert thread_has_ended(learner)
            assert asyncio.all_tasks() == {asyncio.current_task()}

    run_native(main)


# ------------------------------------------------------------------------------------------- errors


async def read_to_its_end(stream: PredictionStream, found: list[Any]) -> None:
    async for preds in stream:
        found.append(preds)  # noqa: PERF401 - what came before an error is kept


async def test_errors_come_out_of_the_loop_after_the_predictions_before_them(
    learner: TrainLearner,
) -> None:
    found: list[Any] = []
    bad = [torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 4)]
    with pytest.raises(RuntimeError, match="shapes") as raised:
        await read_to_its_end(learner.iter_preds(bad, buffer=9), found)
    assert len(found) == 2
    assert any("Predict, epoch 0, iter 2" in note for note in raised.value.__notes__)
    assert thread_has_ended(learner)

    async def source() -> AsyncIterator[Any]:
        yield torch.ones(2, 3)
        raise LookupError("no more")

    with pytest.raises(LookupError, match="no more"):
        await read_to_its_end(learner.iter_preds(source()), [])
    assert not learner.fitting


async def test_arguments_are_checked_at_once_and_loaders_when_it_begins(
    learner: TrainLearner,
) -> None:
    for buffer in 0, None, 1.5:
        with pytest.raises(ValueError, match=r"buffer=.*: give a number of batches"):
            learner.iter_preds(buffer=buffer)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="keep="):
        learner.iter_preds(keep=1.5)  # type: ignore[arg-type]
    learner.dls = None
    with pytest.raises(ValueError, match=r"dls\.valid is missing"):
        await anext(learner.iter_preds())
    with pytest.raises(ValueError, match=r"dls\.valid is empty"):
        await anext(learner.iter_preds([]))


async def test_a_learner_that_fits_is_refused_and_is_one_meanwhile(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    async with learner.iter_preds(make_batches(9)) as stream:
        await anext(stream)
        for other in learner.fit(), anext(learner.iter_preds()):
            with pytest.raises(RuntimeError, match="is fitting already"):
                await other


async def test_two_readers_are_refused(learner: TrainLearner) -> None:
    source = Source([])
    stream = learner.iter_preds(source)
    async with stream, anyio.create_task_group() as group:

        async def read() -> None:
            await anext(stream)

        group.start_soon(read)
        await until(lambda: source.waits)
        with pytest.raises(RuntimeError, match="a reader already"):
            await anext(stream)
        group.cancel_scope.cancel()


async def test_predictions_that_are_not_complete_are_an_error(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    batches = make_batches(4)

    def end(event: BeforeBatch) -> None:
        if event.iter == 2:
            raise CancelEpochException("enough")

    found: list[Any] = []
    cut_short = pytest.raises(RuntimeError, match="did not see all batches: its epoch was cancel")
    with learner.subscribe(BeforeBatch, end), cut_short:
        await read_to_its_end(learner.iter_preds(batches), found)
    assert len(found) == 2

    class Stopping(list[Any]):
        def append(self, preds: Any) -> None:
            learner.stop()

    with pytest.raises(RuntimeError, match=r"Learner\.stop ended the run \(stop\(\) was called\)"):
        await read_to_its_end(learner.iter_preds(make_batches(20)), Stopping())


async def test_batches_that_a_receiver_skips_are_left_out(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    skipped = {1}

    @learner.on(BeforeBatch)
    def skip(event: BeforeBatch) -> None:
        if event.iter in skipped:
            raise CancelBatchException("not this one")

    assert len([preds async for preds in learner.iter_preds(make_batches(4))]) == 3
    skipped |= {0, 2, 3}
    with pytest.raises(RuntimeError, match="no predictions: every batch was skipped"):
        await anext(learner.iter_preds(make_batches(4)))


async def test_an_error_of_what_is_no_longer_wanted_is_logged(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    @learner.on(CleanupFit)
    def fail(event: CleanupFit) -> None:
        raise OSError("the disk is full")

    with capture_logs() as logs:
        async with learner.iter_preds(make_batches(9)) as stream:
            await anext(stream)
    (line,) = logs
    assert (line["event"], line["error"]) == (
        "predictions_ended_with_error",
        "OSError('the disk is full')",
    )
    assert learner.result.status == "failed"


async def test_async_receivers_and_streams_work_meanwhile(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    threads = []

    @learner.on(BeforeFit)
    async def note(event: BeforeFit) -> None:
        threads.append(threading.get_ident())

    async with learner.events(BeforeEpoch, AfterPredict) as events:
        found = [preds async for preds in learner.iter_preds(make_batches(4))]
        names = [type(event).__name__ async for event in events]
    assert len(found) == 4
    assert names == ["BeforeEpoch", *["AfterPredict"] * 4]
    assert threads == [threading.get_ident()]

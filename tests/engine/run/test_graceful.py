"""`learner.stop(graceful=True)`: the batch under way ends, is saved, and then the scope is left."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
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
    AfterFit,
    AfterLoss,
    AfterPredict,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    ScopeEnd,
    record_events,
)
from torch import nn

from tests.support.training import TRAIN_BATCH, VALID_BATCH
from tests.support.waiting import GUARD, wait_until

TRAIN_EPOCH = ["BeforeEpoch", *TRAIN_BATCH * 2, "AfterEpoch", "CleanupEpoch"]
VALID_EPOCH = ["BeforeEpoch", *VALID_BATCH * 2, "AfterEpoch", "CleanupEpoch"]
WHOLE_FIT = ["BeforeFit", *[*TRAIN_EPOCH, *VALID_EPOCH] * 2, "AfterFit", "CleanupFit"]
AFTER_THE_FIRST_BATCH = ["BeforeFit", "BeforeEpoch", *TRAIN_BATCH]
LEFT_AFTER_THE_FIRST_BATCH = [*AFTER_THE_FIRST_BATCH, "CleanupEpoch", "CleanupFit"]

COMPLETED = ScopeEnd("completed")
STOPPED = ScopeEnd("cancelled", "somebody", "enough")


@pytest.fixture
def learner(make_model: Callable[[], nn.Module], make_batches: Callable[..., Any]) -> TrainLearner:
    return TrainLearner(make_model(), DataLoaders(make_batches(2), make_batches(2, seed=1)))


def stop(learner: TrainLearner, scope: Any = "fit") -> None:
    assert learner.stop(scope, "enough", graceful=True, who="somebody")


class At(Callback):
    """Does something at the event with this index; notes at which ones a stop takes effect."""

    order = -math.inf

    def __init__(self, index: int, act: Callable[[], object]) -> None:
        self._at = index
        self._act = act
        self._index = -1
        self.ending: list[int] = []

    def event(self, event: Event) -> None:
        self._index += 1
        if event.learner.graceful_stop_due:
            self.ending.append(self._index)
        if self._index == self._at:
            self._act()


def ends(events: record_events, *kinds: type[Event]) -> list[ScopeEnd]:
    return [event.end for event in events if isinstance(event, kinds)]


# ------------------------------------------------------------------------------- at every event

BOUNDARIES = ("CleanupBatch", "CleanupEpoch")


def boundary_after(index: int) -> int | None:
    """The next Cleanup* of a batch or an epoch that begins when the event at `index` is over."""
    later = range(index + 1, len(WHOLE_FIT))
    return next((i for i in later if WHOLE_FIT[i] in BOUNDARIES), None)


def expected_of_fit(index: int) -> tuple[list[str], int | None]:
    """The events of a fit that is stopped at `index`, and where the stop takes effect."""
    at = boundary_after(index)
    if at is None:
        return WHOLE_FIT, None
    left = ["CleanupEpoch"] if WHOLE_FIT[at] == "CleanupBatch" else []
    return [*WHOLE_FIT[: at + 1], *left, "CleanupFit"], at


def expected_of_epoch(index: int) -> tuple[list[str], int | None]:
    """The same where the epoch is stopped: the one that is open, or the first."""
    at = boundary_after(index)
    if at is None or WHOLE_FIT[at] == "CleanupEpoch" or WHOLE_FIT[index] == "CleanupEpoch":
        return WHOLE_FIT, None  # it ends by itself, or is over already
    return [*WHOLE_FIT[: at + 1], *WHOLE_FIT[WHOLE_FIT.index("CleanupEpoch", at) :]], at


@pytest.mark.parametrize(
    ("scope", "expected_of"), [("fit", expected_of_fit), ("epoch", expected_of_epoch)]
)
async def test_a_graceful_stop_at_every_event_takes_effect_when_the_batch_is_done(
    learner: TrainLearner, scope: str, expected_of: Callable[[int], tuple[list[str], int | None]]
) -> None:
    """G1, G3: that batch is completed; every scope is left once, and none but those it names."""
    for index in range(len(WHOLE_FIT)):
        at = At(index, lambda: stop(learner, scope))
        with anyio.fail_after(GUARD), record_events(learner) as events:
            result = await learner.fit(2, cbs=at)
        names, boundary = expected_of(index)
        assert (index, events.names) == (index, names)
        assert (index, at.ending) == (index, [] if boundary is None else [boundary])
        assert set(ends(events, CleanupStep, CleanupBatch)) == {COMPLETED}
        in_a_batch = boundary is not None and WHOLE_FIT[boundary] == "CleanupBatch"
        epochs = ends(events, CleanupEpoch)
        assert epochs.count(STOPPED) == in_a_batch
        assert epochs.count(COMPLETED) == len(epochs) - in_a_batch
        of_fit = boundary is not None and scope == "fit"
        assert ends(events, CleanupFit) == [STOPPED if of_fit else COMPLETED]
        assert (result.status, result.who, result.reason) == (
            ("cancelled", "somebody", "enough") if of_fit else ("completed", None, None)
        )
        assert (learner.graceful_stop_due, learner.stopping, learner.fitting) == (
            False,
            False,
            False,
        )


async def test_after_a_graceful_stop_at_any_event_the_next_fit_is_a_whole_one(
    learner: TrainLearner,
) -> None:
    """G9: what came too late for one fit is not for the next."""
    for index, scope in [(0, "epoch"), (5, "fit"), (len(WHOLE_FIT) - 1, "fit")]:
        await learner.fit(2, cbs=At(index, lambda scope=scope: stop(learner, scope)))
        with record_events(learner) as events:
            assert (await learner.fit(2)).status == "completed"
        assert events.names == WHOLE_FIT


async def test_a_fit_that_only_validates_ends_with_its_batch(learner: TrainLearner) -> None:
    with record_events(learner) as events:
        result = await learner.fit(2, train=False, cbs=At(2, lambda: stop(learner)))
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", *VALID_BATCH],
        *["CleanupEpoch", "CleanupFit"],
    ]
    assert (result.status, result.valid_batches) == ("cancelled", 1)


async def test_an_epoch_that_is_stopped_before_it_begins_ends_with_its_first_batch(
    learner: TrainLearner,
) -> None:
    """Between two epochs, where none is open, the next one is meant, as by a plain stop."""

    class Loaders:
        train, loader = learner.dls.train, learner.dls.valid

        @property
        def valid(self) -> Any:  # asked for between two epochs
            if learner.history and not (learner.training or learner.stopping):
                stop(learner, "epoch")
            return self.loader

    learner.dls = Loaders()
    with record_events(learner) as events:
        result = await learner.fit()
    assert events.names == [
        *["BeforeFit", *TRAIN_EPOCH, "BeforeEpoch", *VALID_BATCH],
        *["CleanupEpoch", "AfterFit", "CleanupFit"],
    ]
    assert (result.status, result.valid_batches) == ("completed", 1)


async def test_get_preds_ends_with_its_batch(learner: TrainLearner) -> None:
    """Each of its batches is left by a cancel, and is done all the same."""
    at = At(2, lambda: stop(learner))
    learner.add_cbs(at)
    message = r"get_preds\(\) did not see all batches: somebody ended the run"
    with record_events(learner) as events, pytest.raises(RuntimeError, match=message):
        await learner.get_preds()
    batch = ["BeforeBatch", "AfterPredict", "CleanupBatch"]
    assert events.names == ["BeforeFit", "BeforeEpoch", *batch, "CleanupEpoch", "CleanupFit"]
    assert at.ending == [4]
    assert (learner.result.status, learner.result.who) == ("cancelled", "somebody")


async def test_a_batch_cannot_be_stopped_gracefully(learner: TrainLearner) -> None:
    @learner.on(BeforeBatch, once=True)
    def refuse(event: BeforeBatch) -> None:
        with pytest.raises(ValueError, match=r"a batch that may end is not stopped"):
            learner.stop("batch", graceful=True)

    with record_events(learner) as events:
        await learner.fit(2)
    assert events.names == WHOLE_FIT


# ------------------------------------------------------------------------------ and other cancels


@pytest.mark.parametrize("first", ["graceful", "plain"])
async def test_a_plain_stop_does_not_wait_for_a_graceful_one(
    learner: TrainLearner, first: str
) -> None:
    """What a second, impatient caller asks for; no checkpoint is to be taken in that batch."""

    def both() -> None:
        stops = [lambda: stop(learner), lambda: learner.stop("fit", "at once")]
        for each in stops if first == "graceful" else reversed(stops):
            each()

    at = At(2, both)
    with record_events(learner) as events:
        result = await learner.fit(2, cbs=at)
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch"],
        *["CleanupBatch", "CleanupEpoch", "CleanupFit"],
    ]
    assert (result.status, result.reason) == ("cancelled", "at once")
    assert at.ending == []


async def test_a_graceful_stop_of_the_fit_and_a_plain_one_of_the_epoch(
    learner: TrainLearner,
) -> None:
    """The epoch is left at once; then the fit, where that epoch is over."""
    at = At(2, lambda: (stop(learner), learner.stop("epoch", "no more of it")))
    with record_events(learner) as events:
        result = await learner.fit(2, cbs=at)
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch"],
        *["CleanupBatch", "CleanupEpoch", "CleanupFit"],
    ]
    of_epoch = ScopeEnd("cancelled", "Learner.stop", "no more of it")
    assert ends(events, CleanupBatch, CleanupEpoch, CleanupFit) == [of_epoch, of_epoch, STOPPED]
    assert (result.reason, at.ending) == ("enough", [4])


async def test_a_graceful_stop_of_the_fit_and_a_plain_one_of_the_batch(
    learner: TrainLearner,
) -> None:
    """A batch that is left by its own cancel is done."""
    at = At(2, lambda: (stop(learner), learner.stop("batch", "not this one")))
    with record_events(learner) as events:
        await learner.fit(2, cbs=at)
    of_batch = ScopeEnd("cancelled", "Learner.stop", "not this one")
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch"],
        *["CleanupBatch", "CleanupEpoch", "CleanupFit"],
    ]
    assert ends(events, CleanupBatch, CleanupEpoch, CleanupFit) == [of_batch, STOPPED, STOPPED]
    assert at.ending == [3]


@pytest.mark.parametrize("scopes", [("epoch", "fit"), ("fit", "epoch"), ("fit", "fit")])
async def test_of_two_graceful_stops_the_wider_one_is_not_lost(
    learner: TrainLearner, scopes: tuple[str, str]
) -> None:
    """G3: the fit ends with its first batch, whoever asked first."""
    with record_events(learner) as events:
        result = await learner.fit(2, cbs=At(2, lambda: [stop(learner, each) for each in scopes]))
    assert events.names == LEFT_AFTER_THE_FIRST_BATCH
    assert result.status == "cancelled"


async def test_an_epoch_that_two_have_stopped_is_left_once(learner: TrainLearner) -> None:
    """G3: and the next ones are whole."""
    at = At(2, lambda: [stop(learner, "epoch"), stop(learner, "epoch")])
    with record_events(learner) as events:
        result = await learner.fit(2, cbs=at)
    assert events.names == [*AFTER_THE_FIRST_BATCH, *WHOLE_FIT[len(TRAIN_EPOCH) :]]
    assert at.ending == [len(AFTER_THE_FIRST_BATCH) - 1]
    assert result.status == "completed"


@pytest.mark.parametrize(
    ("cancel", "events_left"),
    [
        (CancelStepException, ["CleanupStep", "AfterBatch", "CleanupBatch"]),
        (CancelBatchException, ["CleanupStep", "CleanupBatch"]),
    ],
)
async def test_a_batch_that_a_receiver_cuts_short_is_the_one_it_ends_with(
    learner: TrainLearner, cancel: type[BaseException], events_left: list[str]
) -> None:
    @learner.on(BeforeStep)
    def cut(event: BeforeStep) -> None:
        stop(learner)
        raise cancel

    with record_events(learner) as events:
        result = await learner.fit(2)
    begun = ["BeforeFit", "BeforeEpoch", *TRAIN_BATCH[: TRAIN_BATCH.index("BeforeStep") + 1]]
    assert events.names == [*begun, *events_left, "CleanupEpoch", "CleanupFit"]
    assert (result.status, result.who) == ("cancelled", "somebody")


async def test_an_epoch_that_a_receiver_cuts_short_is_the_one_it_ends_with(
    learner: TrainLearner,
) -> None:
    """A batch that was left from without is not done: nothing is to be saved there."""
    at = At(2, lambda: stop(learner))
    learner.on(AfterLoss, once=True)(cancels_the_epoch)
    with record_events(learner) as events:
        result = await learner.fit(2, cbs=at)
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch", "AfterPredict", "AfterLoss"],
        *["CleanupBatch", "CleanupEpoch", "CleanupFit"],
    ]
    assert at.ending == [6]
    assert (result.status, result.who) == ("cancelled", "somebody")


def cancels_the_epoch(event: Event) -> None:
    raise CancelEpochException


@pytest.mark.parametrize("event_type", [AfterBatch, CleanupBatch])
async def test_a_receiver_that_ends_the_fit_meanwhile_is_the_one_that_did(
    learner: TrainLearner, event_type: type[Event]
) -> None:
    def cancel(event: Event) -> None:
        raise CancelFitException("found it")

    learner.subscribe(event_type, cancel)
    with record_events(learner) as events:
        result = await learner.fit(2, cbs=At(2, lambda: stop(learner)))
    assert events.names == LEFT_AFTER_THE_FIRST_BATCH
    assert result.reason == "found it"
    assert not learner.graceful_stop_due


@pytest.mark.parametrize("event_type", [AfterPredict, CleanupBatch, CleanupEpoch])
async def test_an_error_outweighs_it(learner: TrainLearner, event_type: type[Event]) -> None:
    """G5: also one of the cleanup that precedes the stop."""
    error = ZeroDivisionError()

    def fail(event: Event) -> None:
        raise error

    learner.subscribe(event_type, fail)
    with pytest.raises(ZeroDivisionError), record_events(learner) as events:
        await learner.fit(2, cbs=At(2, lambda: stop(learner)))
    assert learner.result.status == "failed"
    cleaned = [name for name in events.names if name.startswith("Cleanup")]
    assert cleaned[-3:] == ["CleanupBatch", "CleanupEpoch", "CleanupFit"]
    assert not learner.graceful_stop_due


# ----------------------------------------------------------------------------- and the host


@pytest.mark.parametrize("first", ["graceful", "cancel"])
async def test_a_cancel_of_the_host_does_not_wait_for_it(learner: TrainLearner, first: str) -> None:
    """G4: the batch under way is left at its next event, and the cancel reaches the host."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        with anyio.CancelScope() as scope:
            token = anyio.lowlevel.current_token()

            def cancel() -> None:
                waiting = len(learner.pending_requests)
                anyio.from_thread.run_sync(scope.cancel, token=token)
                wait_until(lambda: len(learner.pending_requests) > waiting)

            steps = [lambda: stop(learner), cancel]
            both = steps if first == "graceful" else steps[::-1]
            at = At(2, lambda: [step() for step in both])
            await learner.fit(2, cbs=at)
    assert scope.cancelled_caught
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch"],
        *["CleanupBatch", "CleanupEpoch", "CleanupFit"],
    ]
    assert (learner.result.status, learner.result.who, at.ending) == ("cancelled", "host", [])


async def test_a_cancel_of_the_host_in_the_cleanup_that_precedes_it_is_not_swallowed(
    learner: TrainLearner,
) -> None:
    """G4: the fit is left by the stop, and the host gets its cancel."""
    with anyio.fail_after(GUARD), record_events(learner) as events:
        with anyio.CancelScope() as scope:
            token = anyio.lowlevel.current_token()

            @learner.on(CleanupBatch)
            def cancel(event: CleanupBatch) -> None:
                assert learner.graceful_stop_due
                anyio.from_thread.run_sync(scope.cancel, token=token)
                wait_until(lambda: len(learner.pending_requests) == 2)

            await learner.fit(2, cbs=At(2, lambda: stop(learner)))
    assert scope.cancelled_caught
    assert events.names == LEFT_AFTER_THE_FIRST_BATCH
    assert learner.result.status == "cancelled"


def from_a_thread(act: Callable[[], None]) -> None:
    thread = threading.Thread(target=act)
    thread.start()
    thread.join()


@pytest.mark.parametrize("scope", ["fit", "epoch"])
async def test_from_another_thread(learner: TrainLearner, scope: str) -> None:
    """At each event of the first batch: it ends with that, whoever asks."""
    for index in range(1, len(AFTER_THE_FIRST_BATCH) - 1):
        with record_events(learner) as events:
            await learner.fit(2, cbs=At(index, lambda: from_a_thread(lambda: stop(learner, scope))))
        epochs = WHOLE_FIT[len(TRAIN_EPOCH) :] if scope == "epoch" else None
        left = epochs or ["CleanupEpoch", "CleanupFit"]
        assert (index, events.names) == (index, [*AFTER_THE_FIRST_BATCH, *left])


async def test_from_the_event_loop_while_a_batch_is_slow(learner: TrainLearner) -> None:
    reached = anyio.Event()
    token = anyio.lowlevel.current_token()
    results: list[FitResult] = []

    @learner.on(AfterLoss)
    def slow(event: AfterLoss) -> None:
        anyio.from_thread.run_sync(reached.set, token=token)
        wait_until(lambda: learner.stopping)

    async def fit() -> None:
        results.append(await learner.fit(2))

    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(fit)
            await reached.wait()
            stop(learner)
    assert events.names == LEFT_AFTER_THE_FIRST_BATCH
    assert (results[0].status, results[0].who) == ("cancelled", "somebody")


@pytest.mark.parametrize("event_type", [BeforeFit, BeforeEpoch, AfterBatch, AfterEpoch, AfterFit])
async def test_a_stop_at_any_time_takes_effect_once(
    learner: TrainLearner, event_type: type[Event]
) -> None:
    """A thousand callers at once, from another thread, are one stop."""
    learner.on(event_type, once=True)(
        lambda event: from_a_thread(lambda: [stop(learner) for _ in range(1000)])
    )
    at = At(-1, lambda: None)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        await learner.fit(2, cbs=at)
    assert len(at.ending) == (event_type is not AfterFit)
    assert events.names.count("CleanupFit") == 1
    assert not learner.stopping


async def test_the_weights_are_those_of_the_batches_that_were_done(
    learner: TrainLearner, make_model: Callable[[], nn.Module]
) -> None:
    """G11: no half a step, nothing of the next batch."""
    await learner.fit(2, cbs=At(4, lambda: stop(learner)))
    x, y = learner.dls.train[0]
    model = make_model()
    opt = torch.optim.SGD(model.parameters(), learner.lr)
    nn.functional.mse_loss(model(x), y).backward()
    opt.step()
    for one, other in zip(learner.model.parameters(), model.parameters(), strict=True):
        assert torch.equal(one, other)

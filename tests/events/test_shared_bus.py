"""One bus for several learners: each gets its own events, the bus gets all."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from typing import Any

import anyio
import pytest
import torch
from eventrain.engine import DataLoaders, Learner, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterFit,
    BeforeBatch,
    BeforeFit,
    Bus,
    Callback,
    CancelFitException,
    CleanupFit,
    Event,
    FitEvent,
    Predict,
    record_events,
)

from tests.support.waiting import GUARD

BATCH = ["BeforeBatch", "AfterPredict", "AfterLoss"]
TRAIN_BATCH = [
    *BATCH, "AfterBackward", "BeforeStep", "AfterStep", "CleanupStep", "AfterBatch", "CleanupBatch"
]  # fmt: skip
VALID_BATCH = [*BATCH, "AfterBatch", "CleanupBatch"]


def fit_names(train: int, valid: int) -> list[str]:
    """The events of a fit of one epoch with so many batches."""
    return [
        "BeforeFit",
        *["BeforeEpoch", *TRAIN_BATCH * train, "AfterEpoch", "CleanupEpoch"],
        *["BeforeEpoch", *VALID_BATCH * valid, "AfterEpoch", "CleanupEpoch"],
        *["AfterFit", "CleanupFit"],
    ]


@pytest.fixture
def small(bus: Bus, make_batches: Any, make_model: Any) -> TrainLearner:
    """One batch of training, one of validation."""
    return TrainLearner(make_model(), DataLoaders(make_batches(1), make_batches(1)), bus=bus)


@pytest.fixture
def large(bus: Bus, make_batches: Any, make_model: Any) -> TrainLearner:
    """Three batches of training, two of validation."""
    return TrainLearner(make_model(), DataLoaders(make_batches(3), make_batches(2)), bus=bus)


def together(bus: Bus, learners: list[Learner]) -> None:
    """Have the fits of `learners` meet in each of their first events."""
    barrier = threading.Barrier(len(learners))
    for learner in learners:
        learner.subscribe(BeforeFit, lambda _: barrier.wait(GUARD))
        learner.subscribe(BeforeBatch, lambda _: barrier.wait(GUARD), once=True)


def test_a_learner_gets_its_own_events_and_the_bus_gets_all(
    bus: Bus, small: TrainLearner, large: TrainLearner
) -> None:
    """G10."""
    both, of_small, of_large = map(record_events, (bus, small, large))
    small.run()
    large.run()
    assert of_small.names == fit_names(1, 1)
    assert of_large.names == fit_names(3, 2)
    assert both == [*of_small, *of_large]
    assert {event.learner for event in of_small} == {small}
    assert {event.learner for event in of_large} == {large}


async def test_concurrent_fits_in_one_task_group_do_not_get_each_others_events(
    bus: Bus, small: TrainLearner, large: TrainLearner
) -> None:
    """G10: plain and async receivers, by `subscribe`, `on` and `record_events`."""
    both, of_small, of_large = map(record_events, (bus, small, large))
    heard: dict[Learner, list[Event]] = {small: [], large: []}
    for learner in (small, large):

        @learner.on(FitEvent)
        async def receiver(event: FitEvent, events: list[Event] = heard[learner]) -> None:
            await anyio.lowlevel.checkpoint()
            events.append(event)

    together(bus, [small, large])
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(small.fit)
            tasks.start_soon(large.fit)
    assert of_small.names == fit_names(1, 1)
    assert of_large.names == fit_names(3, 2)
    assert [event for event in both if event.learner is small] == of_small
    assert [event for event in both if event.learner is large] == of_large
    assert len(both) == len(of_small) + len(of_large)
    for learner, events in heard.items():
        assert [type(event) for event in events] == [BeforeFit, AfterFit, CleanupFit]
        assert {event.learner for event in events} == {learner}


async def test_concurrent_fits_on_one_bus_compute_what_they_compute_alone(
    bus: Bus, make_batches: Any, make_model: Any
) -> None:
    """G10: a callback that performs an action performs it for its own learner alone."""

    class Doubled(Callback):
        def predict(self, event: Predict) -> None:
            learner = event.learner
            learner.preds = 2 * learner.model(learner.batch[0])

    def learners(*buses: Bus) -> list[TrainLearner]:
        return [
            TrainLearner(make_model(), DataLoaders(make_batches(3)), lr=0.05, cbs=cbs, bus=b)
            for cbs, b in zip((Doubled(), None), buses, strict=True)
        ]

    alone, shared = learners(Bus(), Bus()), learners(bus, bus)
    for learner in alone:
        with anyio.fail_after(GUARD):
            await learner.fit(valid=False)
    together(bus, list(shared))
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            for learner in shared:
                tasks.start_soon(learner.fit, 1, True, False)
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.model.weight, other.model.weight)
    assert not torch.equal(shared[0].model.weight, shared[1].model.weight)


async def test_a_cancel_ends_the_fit_of_its_own_learner_only(
    bus: Bus, small: TrainLearner, large: TrainLearner
) -> None:
    """G3."""
    together(bus, [small, large])

    @bus.on(AfterBatch, where=lambda event: event.learner is large)
    def stop(event: AfterBatch) -> None:
        raise CancelFitException("large is done")

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(small.fit)
            tasks.start_soon(large.fit)
    assert small.result is not None
    assert large.result is not None
    assert (small.result.status, large.result.status) == ("completed", "cancelled")
    assert (large.result.reason, large.result.who) == ("large is done", stop.__qualname__)


def test_a_bus_can_be_asked_for_one_learner(
    bus: Bus, small: TrainLearner, large: TrainLearner
) -> None:
    heard: list[Event] = []
    subscription = bus.subscribe(FitEvent, heard.append, learner=large)
    small.run()
    large.run()
    assert [event.learner for event in heard] == [large] * 3
    assert [subscription.matches(learner) for learner in (small, large)] == [False, True]


def test_every_and_once_count_the_events_of_the_learner_subscribed_to(
    bus: Bus, small: TrainLearner, large: TrainLearner
) -> None:
    heard: list[tuple[str, Any]] = []
    large.subscribe(AfterBatch, lambda e: heard.append(("second", e.learner)), every=2)
    large.subscribe(AfterBatch, lambda e: heard.append(("once", e.learner)), once=True)
    bus.subscribe(AfterBatch, lambda e: heard.append(("of all", e.learner)), every=2)
    small.run(valid=False)
    assert heard == []
    large.run(valid=False)
    assert heard == [("once", large), ("of all", large), ("second", large), ("of all", large)]


def test_an_event_is_not_built_for_a_learner_that_nobody_listens_to(
    small: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only those that are listened to are made: `BeforeBatch.of` is not reached."""
    made: list[str] = []

    def of(cls: type[Event], learner: Any, *extra: Any) -> Any:
        made.append(cls.__name__)
        return original.__func__(cls, learner, *extra)

    original = FitEvent.of
    monkeypatch.setattr(FitEvent, "of", classmethod(of))
    small.run()
    assert made == []
    with small.subscribe(AfterFit, lambda _: None):
        small.run()
    assert made == ["AfterFit"]
    small.run()
    assert made == ["AfterFit"]


def test_closing_the_subscriptions_of_one_learner_leaves_the_other_ones(
    bus: Bus, small: TrainLearner, large: TrainLearner
) -> None:
    heard: list[Any] = []

    def receiver(event: Event) -> None:
        heard.append(event.learner)

    with small.subscribe(CleanupFit, receiver):
        large.subscribe(CleanupFit, receiver)
        small.run()
        large.run()
    small.run()
    large.run()
    assert heard == [small, large, large]


class Keeps(Callback):
    """Holds its learner, as the closures and callbacks of users do."""

    def before_fit(self, event: BeforeFit) -> None:
        self.learner = event.learner

    observes = (AfterFit,)

    def observe(self, event: Event) -> None:
        self.event = event


@pytest.mark.parametrize("shared", [True, False])
def test_a_bus_does_not_keep_its_learners_alive(
    bus: Bus, shared: bool, make_batches: Any, make_model: Any
) -> None:
    """G13: a server has one bus for all learners, and makes one for every request."""
    of_all: list[Any] = []
    bus.subscribe(CleanupFit, lambda event: of_all.append(event.run_id))
    dls, refs, blocks = DataLoaders(make_batches(1)), [], []

    def fit() -> None:
        learner = TrainLearner(make_model(), dls, cbs=Keeps(), bus=bus if shared else None)
        learner.on(AfterBatch)(lambda event: learner.model and None)
        learner.observe(lambda event: learner.model and None, AfterBatch)
        learner.run(valid=False)
        refs.append(weakref.ref(learner))
        refs.append(weakref.ref(learner.model))

    for _ in range(300):
        fit()
        if len(refs) % 100 == 0:
            gc.collect()
            assert {ref() for ref in refs} == {None}
            of_all.clear()
            blocks.append(sys.getallocatedblocks())
    assert len(bus.subscriptions()) == 1
    assert [len(signal.ordered) for signal in bus.signals.values() if signal.receivers] == [1]
    assert max(blocks[2:]) - blocks[1] < 5_000


def test_a_bus_forgets_only_the_learners_that_have_ended(
    bus: Bus, small: TrainLearner, make_batches: Any, make_model: Any
) -> None:
    heard: list[str] = []
    other = TrainLearner(make_model(), small.dls, bus=bus)
    other.on(AfterFit)(lambda event: heard.append("of the other"))
    small.on(AfterFit)(lambda event: heard.append("of small"))
    bus.on(AfterFit, order=-1)(lambda event: heard.append("of all"))
    other.run()
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
    small.run()
    after_fit = AfterFit(learner=small, run_id="r1", time=0.0, purpose="fit", n_epochs=1, n_steps=4)
    bus.send(after_fit)
    bus.signal(AfterFit).send(after_fit)
    assert heard == ["of all", "of the other", *["of all", "of small"] * 3]


def test_the_signals_of_a_bus_reach_the_receivers_of_every_learner(
    bus: Bus, small: TrainLearner, large: TrainLearner
) -> None:
    first = small.subscribe(AfterFit, lambda event: None)
    second = bus.subscribe(FitEvent, lambda event: None, learner=large, order=-1)
    third = bus.subscribe(AfterFit, lambda event: None)
    assert bus.signal(AfterFit).ordered == (second, first, third)
    assert bus.subscriptions() == (first, second, third)
    first.close()
    assert bus.signal(AfterFit).ordered == (second, third)
    assert bus.subscriptions() == (second, third)

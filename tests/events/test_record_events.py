"""`record_events`: what was emitted, as a list."""

from __future__ import annotations

from typing import Any

import pytest
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterFit,
    BeforeBatch,
    BeforeFit,
    Bus,
    CancelBatchException,
    CleanupFit,
    Predict,
    record_events,
)

from tests.support.training import TRAIN_BATCH


@pytest.fixture
def learner(make_batches: Any, make_model: Any) -> TrainLearner:
    """One training batch, no validation."""
    return TrainLearner(make_model(), DataLoaders(make_batches(1)))


ONE_BATCH = [
    *["BeforeFit", "BeforeEpoch", *TRAIN_BATCH],
    *["AfterEpoch", "CleanupEpoch", "AfterFit", "CleanupFit"],
]


def test_it_records_a_bus_for_a_with_block(make_event: Any) -> None:
    bus = Bus()
    with record_events(bus) as events:
        bus.send(one := make_event(BeforeFit))
        bus.send(two := make_event(AfterBatch))
        assert events == [one, two]
    bus.send(make_event(AfterFit))
    assert events == [one, two]
    assert events.names == ["BeforeFit", "AfterBatch"]
    assert bus.subscriptions() == ()


def test_it_records_a_learner_for_a_with_block(learner: TrainLearner) -> None:
    with record_events(learner) as events:
        learner.run(valid=False)
    learner.run(valid=False)
    assert events.names == ONE_BATCH


def test_without_a_with_block_it_records_until_it_is_closed(learner: TrainLearner) -> None:
    events = record_events(learner)
    learner.run(valid=False)
    learner.run(valid=False)
    events.close()
    events.close()
    learner.run(valid=False)
    assert events.names == ONE_BATCH * 2
    assert len({event.run_id for event in events}) == 2
    assert learner.bus.subscriptions() == ()


def test_it_stops_recording_when_the_with_block_fails(make_event: Any) -> None:
    bus = Bus()
    bus.subscribe(BeforeFit, lambda _: 1 / 0, order=1)
    with pytest.raises(ZeroDivisionError), record_events(bus) as events:
        bus.send(make_event(BeforeFit))
    bus.subscriptions()[0].close()
    bus.send(make_event(BeforeFit))
    assert events.names == ["BeforeFit"]


def test_the_fit_it_records_may_fail(learner: TrainLearner) -> None:
    learner.subscribe(BeforeBatch, lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError), record_events(learner) as events:
        learner.run(valid=False)
    assert events.names == [
        "BeforeFit", "BeforeEpoch", "BeforeBatch", "CleanupBatch", "CleanupEpoch", "CleanupFit"
    ]  # fmt: skip


def test_an_event_that_a_receiver_cancels_is_recorded_first(learner: TrainLearner) -> None:
    def cancel(event: BeforeBatch) -> None:
        raise CancelBatchException

    learner.subscribe(BeforeBatch, cancel, order=-1e9)
    with record_events(learner) as events:
        learner.run(valid=False)
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch", "CleanupBatch"],
        *["AfterEpoch", "CleanupEpoch", "AfterFit", "CleanupFit"],
    ]


def test_the_actions_are_performed_and_not_recorded(learner: TrainLearner, make_event: Any) -> None:
    with record_events(learner.bus) as events:
        learner.run(valid=False)
        learner.bus.send(make_event(Predict))
    assert events.names == ONE_BATCH


def test_two_records_of_one_bus_are_independent(make_event: Any) -> None:
    bus = Bus()
    first = record_events(bus)
    bus.send(make_event(BeforeFit))
    second = record_events(bus)
    bus.send(make_event(AfterFit))
    first.close()
    bus.send(make_event(CleanupFit))
    assert first.names == ["BeforeFit", "AfterFit"]
    assert second.names == ["AfterFit", "CleanupFit"]


def test_it_is_a_list_and_can_be_used_as_one(make_event: Any) -> None:
    bus = Bus()
    with record_events(bus) as events:
        bus.send(make_event(BeforeFit))
        events.clear()
        bus.send(kept := make_event(AfterFit))
    assert isinstance(events, list)
    assert events == [kept]
    assert events[-1] is kept


def test_recording_changes_nothing_about_the_training(make_batches: Any, make_model: Any) -> None:
    """G11: recorded or not, the weights are the same to the bit."""
    weights = []
    for recorded in (False, True):
        learner = TrainLearner(make_model(), DataLoaders(make_batches(3)))
        if recorded:
            record_events(learner)
        learner.run(2, valid=False)
        weights.append(learner.model.weight.tolist())
    assert weights[0] == weights[1]

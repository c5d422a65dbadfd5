"""Where a fit can be interrupted: no batch is trained twice, and none is left out."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
from eventrain.callbacks import (
    CheckpointCB,
)
from eventrain.engine import (
    TrainLearner,
)
from eventrain.events import (
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    CancelBatchException,
    CancelEpochException,
    CleanupEpoch,
)

from tests.support.resuming import (
    EPOCH,
    EPOCHS,
    KINDS,
    TRAIN,
    assert_same,
    disturb,
    in_pieces,
    outcome,
    undisturbed,
)


@pytest.mark.parametrize("event", [AfterEpoch, CleanupEpoch, BeforeEpoch])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_graceful_stop_between_batches_loses_nothing(event: type[Any], n: int) -> None:
    """After the n-th time that this was emitted: between batches, phases and epochs."""
    expected = undisturbed(KINDS["dropout-batchnorm"])

    def make() -> TrainLearner:
        learner = KINDS["dropout-batchnorm"]()
        seen = 0

        @learner.on(event)
        def stop(_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == n:
                learner.stop(graceful=True)

        return learner

    with tempfile.TemporaryDirectory() as folder:
        disturb(0)
        statuses = []
        for i in range(EPOCHS * (EPOCH + 2) + 1):
            learner = make()
            result = learner.run(EPOCHS, cbs=CheckpointCB(folder), resume="last")
            statuses.append(result.status)
            if result.status == "completed":
                break
            disturb(50 + i)
    assert statuses[0] == "cancelled"
    assert statuses[-1] == "completed"
    assert_same(outcome(learner, result), expected)


@pytest.mark.parametrize("skipped", [0, 2, 4])
def test_batches_that_are_skipped_are_skipped_once(skipped: int) -> None:
    def make() -> TrainLearner:
        learner = KINDS["dropout-batchnorm"]()

        @learner.on(BeforeBatch, where=lambda event: event.iter == skipped)
        def skip(event: BeforeBatch) -> None:
            raise CancelBatchException("not this one")

        return learner

    expected = undisturbed(make)
    assert expected["counts"][1] == EPOCHS * (TRAIN - 1)
    for place in (1, 3, TRAIN, EPOCH):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)
        assert_same(in_pieces(make, [(place, "error")], each={"every_batches": 1}), expected)


def test_an_epoch_that_was_left_is_not_taken_up_again() -> None:
    def make() -> TrainLearner:
        learner = KINDS["dropout-batchnorm"]()

        @learner.on(BeforeBatch, where=lambda event: event.training and event.iter == 3)
        def leave(event: BeforeBatch) -> None:
            raise CancelEpochException("enough")

        return learner

    expected = undisturbed(make)
    for place in (2, 4, 5, 7):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)

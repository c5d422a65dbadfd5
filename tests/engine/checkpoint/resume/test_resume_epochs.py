"""Resuming with more epochs than before, with fewer, and with or without validation."""

from __future__ import annotations

from pathlib import Path

import pytest
from eventrain.callbacks import (
    CheckpointCB,
    MetricsCB,
)
from eventrain.engine import (
    CheckpointMismatchError,
)
from eventrain.events import (
    record_events,
)

from tests.support.resuming import (
    EPOCH,
    EPOCHS,
    TRAIN,
    VALID,
    assert_same,
    disturb,
    interrupt,
    make_learner,
    outcome,
    undisturbed,
)


def test_where_all_is_done_nothing_is_trained(done: Path) -> None:
    expected = undisturbed(make_learner, 1)
    learner = make_learner()
    cb = CheckpointCB(done)
    with record_events(learner) as events:
        result = learner.run(1, cbs=cb, resume="last")
    assert events.names == ["BeforeFit", "AfterFit", "CleanupFit"]
    assert (result.status, result.epochs, result.batches) == ("completed", 1, TRAIN)
    assert_same(outcome(learner, result), expected)
    assert cb.last == done / "checkpoint-000001"
    assert [path.name for path in done.iterdir()] == ["checkpoint-000001"]


@pytest.mark.parametrize("batches", [EPOCH + 2, 2 * EPOCH])
def test_where_more_is_done_than_is_asked_for_it_is_said(tmp_path: Path, batches: int) -> None:
    learner = make_learner()
    interrupt(learner, batches, "graceful")
    learner.run(3, cbs=CheckpointCB(tmp_path))
    resumed = make_learner()
    before = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match="n_epochs=1, which includes the epochs"):
        resumed.run(1, resume=tmp_path)
    assert_same(resumed.model.state_dict(), before)


def test_more_epochs_than_before_are_those_of_one_longer_fit(done: Path) -> None:
    disturb(77)
    learner = make_learner()
    assert_same(outcome(learner, learner.run(3, resume=done)), undisturbed(make_learner, 3))


def test_a_fit_that_was_not_validated_may_be_from_now_on(tmp_path: Path) -> None:
    learner = make_learner()
    learner.run(1, valid=False, cbs=CheckpointCB(tmp_path))
    resumed = make_learner()
    result = resumed.run(2, resume=tmp_path)
    assert [(row["epoch"], row["train"]) for row in result.history] == [
        (0, "train"),
        (1, "train"),
        (1, "eval"),
    ]
    assert (result.epochs, result.batches, result.valid_batches) == (2, 2 * TRAIN, VALID)


def test_a_fit_that_was_validated_may_go_on_without(done: Path) -> None:
    result = make_learner().run(2, valid=False, resume=done)
    assert [(row["epoch"], row["train"]) for row in result.history] == [
        (0, "train"),
        (0, "eval"),
        (1, "train"),
    ]


def test_the_same_learner_may_resume_what_it_did_itself(tmp_path: Path) -> None:
    expected = undisturbed(make_learner)
    disturb(0)
    learner = make_learner()
    interrupt(learner, 4, "graceful")
    learner.run(EPOCHS, cbs=CheckpointCB(tmp_path))
    metrics = learner.cbs[0]
    assert isinstance(metrics, MetricsCB)
    result = learner.run(EPOCHS, cbs=CheckpointCB(tmp_path), resume="last")
    assert_same(outcome(learner, result), expected)
    assert metrics.history == list(result.history)


def test_a_fit_after_a_resumed_one_begins_anew(done: Path) -> None:
    learner = make_learner()
    assert learner.run(1, resume=done).resumed_from is not None
    result = learner.run(1)
    assert (result.resumed_from, learner.resumed_from) == (None, None)
    assert (result.epochs, result.batches) == (1, TRAIN)
    assert result.run_id != "done"

"""SingleBatchCB and SingleEpochCB: a fit that ends early, with its numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from eventrain.callbacks import MetricsCB, SingleBatchCB, SingleEpochCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, CancelEpochException, CleanupBatch, record_events
from torch import nn

from tests.support.training import TRAIN_BATCH, VALID_BATCH

MakeModel = Callable[[], nn.Module]


def epoch(batches: list[str]) -> list[str]:
    return ["BeforeEpoch", *batches, "AfterEpoch", "CleanupEpoch"]


def test_single_batch_ends_the_fit_after_the_first_batch(
    dls: DataLoaders, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=SingleBatchCB())
    with record_events(learner) as events:
        result = learner.run(3, **backend)
    assert events.names == ["BeforeFit", "BeforeEpoch", *TRAIN_BATCH, "CleanupEpoch", "CleanupFit"]
    assert (result.status, result.who, result.reason) == (
        "cancelled",
        "SingleBatchCB.after_batch",
        "one batch was asked for",
    )
    assert (result.steps, result.batches, result.epochs) == (1, 0, 0)


@pytest.mark.parametrize("first", [True, False])
def test_single_batch_comes_after_the_metrics_in_any_order_of_the_list(
    first: bool, dls: DataLoaders, make_model: MakeModel
) -> None:
    metrics = MetricsCB()
    cbs = [SingleBatchCB(), metrics]
    learner = TrainLearner(make_model(), dls, cbs=cbs if first else cbs[::-1])
    seen = []

    @learner.on(CleanupBatch)
    def look(event: CleanupBatch) -> None:
        state = metrics.state_dict()
        seen.append((state["n_samples"], state["loss_sum"].item(), event.loss.item() * 4))

    learner.run(1)
    assert [n for n, _, _ in seen] == [4]  # the batch was counted
    assert seen[0][1] == pytest.approx(seen[0][2])
    assert metrics.history == []  # and its epoch was left


@pytest.mark.parametrize("first", [True, False])
def test_single_epoch_trains_and_validates_once(
    first: bool, dls: DataLoaders, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    metrics = MetricsCB()
    cbs = [SingleEpochCB(), metrics]
    learner = TrainLearner(make_model(), dls, cbs=cbs if first else cbs[::-1])
    with record_events(learner) as events:
        result = learner.run(3, **backend)
    assert events.names == [
        "BeforeFit",
        *epoch(TRAIN_BATCH * 3),
        *epoch(VALID_BATCH * 2),
        "CleanupFit",
    ]
    assert [(row["epoch"], row["train"]) for row in metrics.history] == [(0, "train"), (0, "eval")]
    assert (result.status, result.who, result.reason) == (
        "cancelled",
        "SingleEpochCB.after_epoch",
        "one epoch was asked for",
    )


@pytest.mark.parametrize(
    ("train", "valid", "expected"),
    [(True, False, epoch(TRAIN_BATCH * 3)), (False, True, epoch(VALID_BATCH * 2))],
)
def test_single_epoch_ends_a_fit_of_one_phase_too(
    train: bool, valid: bool, expected: list[str], dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=[SingleEpochCB(), MetricsCB()])
    with record_events(learner) as events:
        result = learner.run(3, train=train, valid=valid)
    assert events.names == ["BeforeFit", *expected, "CleanupFit"]
    assert len(result.history) == 1


def test_single_epoch_still_ends_the_fit_when_its_training_was_left(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=SingleEpochCB())

    @learner.on(AfterBatch, where=lambda event: event.training)
    def leave(event: AfterBatch) -> None:
        raise CancelEpochException

    with record_events(learner) as events:
        learner.run(3)
    assert events.names == [
        "BeforeFit",
        *["BeforeEpoch", *TRAIN_BATCH, "CleanupEpoch"],
        *epoch(VALID_BATCH * 2),
        "CleanupFit",
    ]

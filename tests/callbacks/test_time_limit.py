"""TimeLimitCB: a fit ends with the batch in which its time is over."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB, MetricsCB, TimeLimitCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterPredict,
    BeforeBatch,
    CancelBatchException,
    CleanupBatch,
    Event,
    record_events,
)
from torch import nn

from tests.support.training import TRAIN_BATCH

MakeModel = Callable[[], nn.Module]

HOUR = 3600.0
AT_ONCE = 1e-9


def over_in(learner: TrainLearner, limit: TimeLimitCB, event_type: type[Event], n: int) -> None:
    """Let the time be over in the n-th event of a class."""
    seen = []

    @learner.on(event_type)
    def shorten(event: Event) -> None:
        seen.append(event)
        if len(seen) == n:
            limit.limit = AT_ONCE


def test_when_the_time_is_over_the_batch_ends_whole_and_the_fit_with_it(
    dls: DataLoaders, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    limit = TimeLimitCB(HOUR)
    learner = TrainLearner(make_model(), dls, cbs=limit)
    over_in(learner, limit, AfterPredict, 2)
    with record_events(learner) as events:
        result = learner.run(3, **backend)
    assert events.names == [
        "BeforeFit",
        "BeforeEpoch",
        *TRAIN_BATCH * 2,
        "CleanupEpoch",
        "CleanupFit",
    ]
    assert [e.end.status for e in events if isinstance(e, CleanupBatch)] == ["completed"] * 2
    assert (result.status, result.who) == ("cancelled", "TimeLimitCB")
    assert (result.batches, result.steps) == (2, 2)


def test_the_reason_says_the_limit(dls: DataLoaders, make_model: MakeModel) -> None:
    learner = TrainLearner(make_model(), dls, cbs=TimeLimitCB(AT_ONCE))
    assert learner.run(1).reason == "the time limit of 1e-09 s is over"


def test_a_checkpoint_is_saved_where_it_ends_and_a_resumed_fit_has_the_whole_time(
    tmp_path: Path, dls: DataLoaders, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    undisturbed = TrainLearner(make_model(), dls)
    undisturbed.run(2)
    batches = []
    for _ in range(10):
        learner = TrainLearner(make_model(), dls)
        limit = TimeLimitCB(HOUR)
        over_in(learner, limit, AfterPredict, 2)
        cbs = [CheckpointCB(tmp_path), limit]
        result = learner.run(2, cbs=cbs, resume="last", **backend)
        batches.append((result.batches, result.valid_batches))
        if result.status == "completed":
            break
    assert batches == [(2, 0), (3, 1), (4, 2), (6, 2), (6, 4), (6, 4)]
    for ours, theirs in zip(
        learner.model.parameters(), undisturbed.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_fit_within_its_time_is_left_alone(dls: DataLoaders, make_model: MakeModel) -> None:
    learner = TrainLearner(make_model(), dls, cbs=TimeLimitCB(HOUR))
    for _ in range(2):  # each fit has the whole time
        assert learner.run(2).status == "completed"


def test_every_fit_has_the_whole_time(dls: DataLoaders, make_model: MakeModel) -> None:
    limit = TimeLimitCB(AT_ONCE)
    learner = TrainLearner(make_model(), dls, cbs=limit)
    assert learner.run(1).status == "cancelled"
    limit.limit = HOUR
    assert learner.run(1).status == "completed"


def test_it_ends_a_fit_while_it_validates(dls: DataLoaders, make_model: MakeModel) -> None:
    limit = TimeLimitCB(HOUR)
    learner = TrainLearner(make_model(), dls, cbs=limit)
    over_in(learner, limit, AfterPredict, 4)  # of 3 batches to train on and 2 to validate
    result = learner.run(3)
    assert (result.status, result.who) == ("cancelled", "TimeLimitCB")
    assert (result.batches, result.valid_batches) == (3, 1)


def test_batches_that_are_all_cancelled_end_it_too(dls: DataLoaders, make_model: MakeModel) -> None:
    learner = TrainLearner(make_model(), dls, cbs=TimeLimitCB(AT_ONCE))
    seen = []

    @learner.on(BeforeBatch)
    def leave(event: BeforeBatch) -> None:
        seen.append(event.iter)
        raise CancelBatchException

    result = learner.run(50)
    assert (result.status, result.who) == ("cancelled", "TimeLimitCB")
    assert len(seen) <= 2


def test_it_does_not_end_the_batch_of_an_error_another_way(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=TimeLimitCB(AT_ONCE))

    @learner.on(AfterBatch, order=10)
    def fail(event: AfterBatch) -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        learner.run(1)
    assert learner.run(0).status == "completed"


async def test_validate_and_get_preds_are_never_cut(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=[TimeLimitCB(AT_ONCE), MetricsCB()])
    numbers = await learner.validate()
    assert numbers["loss"] > 0
    assert len(await learner.get_preds()) == 8
    assert learner.result is not None
    assert learner.result.status == "completed"


def test_the_limit_may_be_a_timedelta() -> None:
    assert TimeLimitCB(timedelta(hours=1, seconds=0.5)).limit == 3600.5
    assert TimeLimitCB(2).limit == 2.0


@pytest.mark.parametrize("limit", [0, -1.0, math.nan, math.inf, True, timedelta(0), timedelta(-1)])
def test_a_limit_that_is_no_time_is_refused(limit: Any) -> None:
    with pytest.raises(ValueError, match=r"limit=.*give seconds, more than 0"):
        TimeLimitCB(limit)


@pytest.mark.parametrize("limit", ["1h", None, [60]])
def test_a_limit_of_another_type_is_refused(limit: Any) -> None:
    with pytest.raises(TypeError, match=r"limit=.*seconds or a datetime\.timedelta"):
        TimeLimitCB(limit)

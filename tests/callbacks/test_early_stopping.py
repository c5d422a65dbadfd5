"""EarlyStoppingCB: ends the fit when a number has not improved for so many epochs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eventrain.callbacks import CheckpointCB, EarlyStoppingCB, LRFinderCB, MetricsCB
from eventrain.engine import DataLoaders, FitResult, TrainLearner
from eventrain.events import (
    AfterEpoch,
    CancelEpochException,
    CleanupEpoch,
    CleanupFit,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.support.training import weights

Digits = tuple[torch.Tensor, torch.Tensor]
MakeModel = Callable[[], nn.Module]
NAN = math.nan


def learner_with(values: Sequence[Any], training: bool = False) -> TrainLearner:
    """A learner whose epochs, validating or training ones, have these values as their `score`."""
    batches = [(torch.ones(2, 1), torch.ones(2, 1))]
    learner = TrainLearner(nn.Linear(1, 1), DataLoaders(batches, batches))

    @learner.on(AfterEpoch, where=lambda event: event.training == training)
    def put(event: AfterEpoch) -> None:
        learner.record["score"] = values[event.epoch]

    return learner


def play(values: Sequence[Any], stopping: EarlyStoppingCB, **options: Any) -> FitResult:
    return learner_with(values).run(len(values), cbs=stopping, **options)


# --------------------------------------------------------------------------------- when it ends


def test_it_ends_the_fit_when_the_number_has_not_improved_for_patience_epochs(
    backend: dict[str, Any],
) -> None:
    stopping = EarlyStoppingCB("score", patience=2)
    learner = learner_with([3.0, 1.25, 2.0, 1.25, 0.0, 0.0])
    with record_events(learner) as events:
        result = learner.run(6, cbs=stopping, **backend)
    assert (result.status, result.who, result.reason) == (
        "cancelled",
        "EarlyStoppingCB.cleanup_epoch",
        "score has not improved for 2 epochs: its best is 1.25, in epoch 1",
    )
    assert (stopping.best, stopping.best_epoch) == (1.25, 1)
    assert result.epochs == 4
    assert [type(event) for event in events[-2:]] == [CleanupEpoch, CleanupFit]
    assert events[-2].end.status == "completed"


def test_a_fit_that_goes_on_improving_is_left_alone() -> None:
    stopping = EarlyStoppingCB("score", patience=1)
    result = play([5.0, 4.0, 3.0, 2.0], stopping)
    assert (result.status, result.epochs) == ("completed", 4)
    assert (stopping.best, stopping.best_epoch) == (2.0, 3)


def test_with_mode_max_more_is_better() -> None:
    stopping = EarlyStoppingCB("score", mode="max", patience=1)
    result = play([0.5, 0.75, 0.7, 0.9], stopping)
    assert (result.epochs, stopping.best, stopping.best_epoch) == (3, 0.75, 1)
    assert result.reason == "score has not improved for 1 epoch: its best is 0.75, in epoch 1"


def test_an_improvement_must_be_above_min_delta() -> None:
    stopping = EarlyStoppingCB("score", patience=2, min_delta=0.5)
    result = play([4.0, 3.75, 3.5, 0.0], stopping)
    assert (result.epochs, stopping.best, stopping.best_epoch) == (3, 4.0, 0)
    assert result.reason == (
        "score has not improved by more than 0.5 for 2 epochs: its best is 4, in epoch 0"
    )


def test_nan_never_improves_and_never_spoils_the_best() -> None:
    stopping = EarlyStoppingCB("score", patience=2)
    assert play([NAN, 2.0, NAN, NAN, 0.0], stopping).epochs == 4
    assert (stopping.best, stopping.best_epoch) == (2.0, 1)


def test_a_number_that_was_never_one_ends_the_fit_too() -> None:
    stopping = EarlyStoppingCB("score", patience=2)
    result = play([NAN, NAN, 1.0], stopping)
    assert result.reason == "score has not improved for 2 epochs: it was nan in all of them"
    assert (stopping.best, stopping.best_epoch) == (None, None)


def expected_end(values: list[float], mode: str, patience: int, delta: float) -> int | None:
    """After how many epochs the fit ends, in the plainest words."""
    sign = 1 if mode == "max" else -1
    best, best_at = -math.inf, -1
    for i, value in enumerate(values):
        gain = sign * value - best if best > -math.inf else math.inf
        if not math.isnan(value) and gain > delta:
            best, best_at = sign * value, i
        if i - best_at >= patience:
            return i + 1
    return None


@settings(max_examples=60)
@given(
    values=st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.5, 2.0, NAN]), min_size=1, max_size=8),
    mode=st.sampled_from(["min", "max"]),
    patience=st.integers(1, 4),
    delta=st.sampled_from([0.0, 0.5]),
)
def test_any_row_of_numbers_ends_where_it_should(
    values: list[float], mode: Any, patience: int, delta: float
) -> None:
    stopping = EarlyStoppingCB("score", mode, patience, delta)
    result = play(values, stopping)
    expected = expected_end(values, mode, patience, delta)
    assert result.epochs == (expected or len(values))
    assert result.status == ("cancelled" if expected else "completed")


def test_real_digits_end_where_the_uninterrupted_fit_was_at_its_best(
    digits: Digits, make_cnn: MakeModel
) -> None:
    images, labels = digits
    batches = [(images[i : i + 40], labels[i : i + 40]) for i in range(0, 160, 40)]
    dls = DataLoaders(batches, [(images[160:], labels[160:])])

    def fit(n_epochs: int, *cbs: Any) -> tuple[nn.Module, FitResult]:
        learner = TrainLearner(make_cnn(), dls, F.cross_entropy, 0.8, [MetricsCB(), *cbs])
        return learner.model, learner.run(n_epochs)

    losses = [row["loss"] for row in fit(25)[1].history if row["train"] == "eval"]
    end = expected_end(losses, "min", 2, 0.0)
    assert end is not None  # this rate is too high for it to go on improving
    assert end < 25
    stopping = EarlyStoppingCB(patience=2)
    model, result = fit(25, stopping)
    assert result.epochs == end
    assert stopping.best == losses[stopping.best_epoch or 0] == min(losses[:end])
    assert torch.equal(weights(model), weights(fit(end)[0]))


# ------------------------------------------------------------------------- which epochs it sees


def test_without_validation_it_looks_at_training_epochs() -> None:
    stopping = EarlyStoppingCB("score", patience=1)
    result = learner_with([1.0, 2.0, 0.0], training=True).run(3, valid=False, cbs=stopping)
    assert (result.epochs, stopping.best) == (2, 1.0)


def test_with_validation_the_numbers_of_training_epochs_do_not_count() -> None:
    stopping = EarlyStoppingCB("score", patience=1)
    learner = learner_with([3.0, 2.0, 1.0])
    train_scores = [0.0, 9.0, 9.0]

    @learner.on(AfterEpoch, where=lambda event: event.training)
    def put(event: AfterEpoch) -> None:
        learner.record["score"] = train_scores[event.epoch]

    assert learner.run(3, cbs=stopping).status == "completed"
    assert (stopping.best, stopping.best_epoch) == (1.0, 2)


def test_an_epoch_that_was_cancelled_does_not_count() -> None:
    stopping = EarlyStoppingCB("score", patience=1)
    learner = learner_with([2.0, 9.0, 1.0])

    @learner.on(AfterEpoch, order=10, where=lambda event: not event.training and event.epoch == 1)
    def leave(event: AfterEpoch) -> None:
        raise CancelEpochException

    assert learner.run(3, cbs=stopping).status == "completed"
    assert (stopping.best, stopping.best_epoch) == (1.0, 2)


def test_it_does_not_act_in_validate(dls: DataLoaders, make_model: MakeModel) -> None:
    stopping = EarlyStoppingCB(patience=1)
    learner = TrainLearner(make_model(), dls, lr=0.0, cbs=[stopping, MetricsCB()])
    assert learner.run(5).epochs == 2  # at that rate nothing improves
    best = stopping.best, stopping.best_epoch
    for _ in range(3):
        result = learner.run(1, train=False)
        assert result.status == "completed"
    assert (stopping.best, stopping.best_epoch) == best


async def test_it_does_not_act_in_validate_and_in_lr_find(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    stopping = EarlyStoppingCB(patience=1)
    learner = TrainLearner(make_model(), dls, lr=0.0, cbs=[stopping, MetricsCB()])
    await learner.fit(5)
    best = stopping.best, stopping.best_epoch
    assert "loss" in await learner.validate()
    finder = await learner.lr_find(lr_mult=1.0001, max_epochs=4)  # so slowly that nothing improves
    assert len(finder.lrs) == 12
    assert (stopping.best, stopping.best_epoch) == best
    result = await learner.fit(4, valid=False, cbs=LRFinderCB(1.0001), lr=1e-5)
    assert (result.status, result.epochs) == ("completed", 4)


# ---------------------------------------------------------------------- values that are not numbers


def test_an_unknown_monitor_is_reported_with_the_known_ones(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=[MetricsCB(), EarlyStoppingCB("accuracy", "max")])
    with pytest.raises(ValueError, match=r"monitor='accuracy'.* but loss\. Callbacks such as") as e:
        learner.run(1)
    assert any("EarlyStoppingCB.cleanup_epoch" in note for note in e.value.__notes__)


def test_without_any_numbers_the_error_says_where_they_come_from(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=EarlyStoppingCB())
    with pytest.raises(ValueError, match=r"but none\. Callbacks such as MetricsCB"):
        learner.run(1)


NUMBERS = [2, 2.0, np.float32(2), np.array([2.0]), torch.tensor(2.0), torch.tensor([[2]])]
NOT_NUMBERS = [[0.5, 0.5], "0.5", None, True, torch.ones(2), torch.tensor(True), 1j]


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_a_value_that_is_not_a_number_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=r"monitor='score': .* is not a number"):
        play([value], EarlyStoppingCB("score"))


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_whole_numbers_and_tensors_of_one_are_numbers(value: Any) -> None:
    stopping = EarlyStoppingCB("score")
    play([value], stopping)
    assert stopping.best == 2.0
    assert type(stopping.best) is float


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_what_is_a_number_for_it_is_one_for_keep_best(value: Any, tmp_path: Path) -> None:
    cb = CheckpointCB(tmp_path, keep_last=1, keep_best=("score", "min"))
    learner_with([value, 3.0]).run(2, cbs=cb)
    assert cb.best == tmp_path / "checkpoint-000001"
    assert cb.last == tmp_path / "checkpoint-000002"


@pytest.mark.parametrize("value", NOT_NUMBERS, ids=repr)
def test_what_is_not_a_number_for_it_is_none_for_keep_best(value: Any, tmp_path: Path) -> None:
    cb = CheckpointCB(tmp_path, keep_best=("score", "min"))
    with pytest.raises(ValueError, match="has no metric 'score'"):
        learner_with([value]).run(1, cbs=cb)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"monitor": ""}, "monitor=''"),
        ({"monitor": None}, "monitor=None"),
        ({"mode": "least"}, "mode='least': choose 'min' or 'max'"),
        ({"patience": 0}, "patience=0"),
        ({"patience": 1.5}, r"patience=1\.5"),
        ({"patience": True}, "patience=True"),
        ({"min_delta": -0.1}, r"min_delta=-0\.1"),
        ({"min_delta": NAN}, "min_delta=nan"),
        ({"min_delta": math.inf}, "min_delta=inf"),
        ({"min_delta": "0.1"}, r"min_delta='0\.1'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyStoppingCB(**options)


# -------------------------------------------------------------------------------- again, and on


def test_a_fresh_fit_begins_anew() -> None:
    stopping = EarlyStoppingCB("score", patience=1)
    learner = learner_with([1.0, 2.0, 3.0])
    learner.add_cbs(stopping)
    assert learner.run(3).epochs == 2
    again = learner_with([9.0, 8.0, 7.0])
    assert again.run(3, cbs=stopping).status == "completed"
    assert (stopping.best, stopping.best_epoch) == (7.0, 2)


VALUES = [3.0, 2.0, 2.5, 2.5, 2.5, 0.0]


def play_on(folder: Path, n_epochs: int, stopping: EarlyStoppingCB) -> FitResult:
    """Go on with the run that is saved there, if there is one."""
    learner = learner_with(VALUES)
    return learner.run(n_epochs, cbs=[stopping, CheckpointCB(folder)], resume="last")


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_resumed_fit_ends_where_the_uninterrupted_one_does(at: int, tmp_path: Path) -> None:
    whole = EarlyStoppingCB("score", patience=3)
    undisturbed = play(VALUES, whole)
    play_on(tmp_path, at, EarlyStoppingCB("score", patience=3))
    resumed = EarlyStoppingCB("score", patience=3)
    result = play_on(tmp_path, len(VALUES), resumed)
    assert result.resumed_from is not None
    assert result.reason == undisturbed.reason
    assert result.epochs == undisturbed.epochs == 5
    assert resumed.state_dict() == whole.state_dict()


def test_resumed_where_it_had_ended_it_ends_again_before_any_batch(tmp_path: Path) -> None:
    ended = play_on(tmp_path, len(VALUES), EarlyStoppingCB("score", patience=3))
    assert ended.epochs == 5
    for _ in range(2):  # and again
        learner = learner_with(VALUES)
        cbs = [EarlyStoppingCB("score", patience=3), CheckpointCB(tmp_path)]
        with record_events(learner) as events:
            result = learner.run(len(VALUES), cbs=cbs, resume="last")
        assert events.names == ["BeforeFit", "BeforeEpoch", "CleanupEpoch", "CleanupFit"]
        assert (result.who, result.reason) == ("EarlyStoppingCB.before_epoch", ended.reason)


def test_resumed_with_more_patience_it_goes_on(tmp_path: Path) -> None:
    assert play_on(tmp_path, len(VALUES), EarlyStoppingCB("score", patience=1)).epochs == 3
    patient = EarlyStoppingCB("score", patience=10)
    assert play_on(tmp_path, len(VALUES), patient).status == "completed"
    assert (patient.best, patient.best_epoch) == (0.0, 5)

"""Several callbacks of one class: each gets its own state back, whatever their order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB, EarlyStoppingCB, MetricsCB, SchedulerCB
from eventrain.engine import CheckpointMismatchError, DataLoaders, TrainLearner
from eventrain.events import AfterEpoch, AfterStep, Callback
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.optim.swa_utils import AveragedModel

BATCHES = [(torch.ones(2, 3), torch.zeros(2, 1))] * 2


class Score(Callback):
    """Records a second number."""

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.record["score"] = 7.0


def run(*cbs: Callback, folder: Path, n_epochs: int = 1, resume: Any = None) -> None:
    torch.manual_seed(0)
    cbs = (MetricsCB(), Score(), *cbs, CheckpointCB(folder))
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(list(BATCHES)), cbs=cbs, lr=0.01)
    learner.run(n_epochs, valid=False, resume=resume)


def stopping(**kwargs: Any) -> tuple[EarlyStoppingCB, EarlyStoppingCB]:
    kwargs = {"patience": 5, **kwargs}
    score = EarlyStoppingCB("score", mode="max", **kwargs)
    return EarlyStoppingCB("loss", **kwargs), score


def test_they_are_told_apart_by_their_arguments(tmp_path: Path) -> None:
    run(*stopping(), folder=tmp_path)
    loss, score = stopping()
    run(score, loss, folder=tmp_path, resume="last")  # in another order
    assert score.best == 7.0
    assert loss.best != 7.0


def test_an_argument_that_all_have_may_change(tmp_path: Path) -> None:
    run(*stopping(), folder=tmp_path)
    loss, score = stopping(patience=9)
    run(score, loss, folder=tmp_path, resume="last")
    assert score.best == 7.0


def test_schedulers_are_told_apart_by_what_their_functions_use(tmp_path: Path) -> None:
    def schedules() -> list[SchedulerCB]:
        def decay(gamma: float) -> SchedulerCB:
            return SchedulerCB(lambda opt: StepLR(opt, 1, gamma))

        return [decay(0.5), decay(0.9), SchedulerCB(lambda opt: StepLR(opt, 7))]

    run(*schedules(), folder=tmp_path)
    half, ninety, seven = schedules()
    run(seven, ninety, half, folder=tmp_path, n_epochs=1, resume="last")
    assert (half.scheduler.gamma, ninety.scheduler.gamma) == (0.5, 0.9)
    assert (seven.scheduler.step_size, half.scheduler.step_size) == (7, 1)


def test_those_that_cannot_be_told_apart_are_an_error_that_names_them(tmp_path: Path) -> None:
    run(*stopping(), folder=tmp_path)
    told = (
        r"EarlyStoppingCB\(monitor='loss', mode='min', patience=2, .*\) and EarlyStoppingCB\("
        r"monitor='loss', mode='min', patience=3, .*\) cannot be told apart .* EarlyStoppingCB\("
        r"monitor='score', .* state_key"
    )
    first, second = EarlyStoppingCB(patience=2), EarlyStoppingCB(patience=3)
    with pytest.raises(CheckpointMismatchError, match=told):
        run(first, second, folder=tmp_path, resume="last")


def test_equal_ones_are_told_apart_by_their_order(tmp_path: Path) -> None:
    run(*stopping()[:1], *stopping()[:1], folder=tmp_path)
    run(*stopping()[:1], *stopping()[:1], folder=tmp_path, n_epochs=2, resume="last")


class Ema(Callback):
    """A callback without arguments and without a `state_dict`, that holds a module."""

    def __init__(self, model: nn.Module) -> None:
        self.average = AveragedModel(model)

    def after_step(self, event: AfterStep) -> None:
        self.average.update_parameters(event.learner.model)


def named_averages() -> list[Ema]:
    first, second = Ema(nn.Linear(3, 1)), Ema(nn.Linear(3, 1))
    first.state_key, second.state_key = "first", "second"
    return [first, second]


def test_a_state_key_tells_them_apart(tmp_path: Path) -> None:
    saved = named_averages()
    saved[1].average.n_averaged.fill_(10)
    run(*saved, folder=tmp_path)
    first, second = named_averages()
    run(second, first, folder=tmp_path, resume="last")
    assert (first.average.n_averaged, second.average.n_averaged) == (2, 12)


def test_a_state_key_is_given_once(tmp_path: Path) -> None:
    first, second = named_averages()
    second.state_key = "first"
    with pytest.raises(
        ValueError, match=r"two callbacks are Ema\['first'\]: give each a state_key"
    ):
        run(first, second, folder=tmp_path)

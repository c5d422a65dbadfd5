"""Parts of a model that are frozen at first; `requires_grad` in checkpoints and in lr_find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    CheckpointCB,
    GradientAccumulationCB,
    MetricsCB,
    SingleEpochCB,
    UnfreezeCB,
)
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import AfterBatch, BeforeEpoch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn, optim
from torch.nn import functional as F

from tests.support.training import weights

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def network() -> nn.Sequential:
    torch.manual_seed(4)
    model = nn.Sequential()
    model.add_module("body", nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    model.add_module("neck", nn.Linear(4, 4))
    model.add_module("head", nn.Linear(4, 1))
    return model


def adamw(parameters: Any, lr: float) -> optim.AdamW:
    return optim.AdamW(parameters, lr, weight_decay=0.1)


def learner(batches: Batches, *cbs: Any, **kwargs: Any) -> TrainLearner:
    kwargs = {"lr": 0.01, "opt_func": adamw, **kwargs}
    return TrainLearner(network(), DataLoaders(batches), cbs=cbs, **kwargs)


SCHEDULE: dict[int, Any] = {1: "neck", 2: ["body.0.weight", "body"]}


def by_hand(batches: Batches, epochs: int) -> nn.Module:
    """The recipe of tutorials: requires_grad, and one optimizer for all."""
    model = network()
    opt = adamw(model.parameters(), 0.01)
    model.body.requires_grad_(False)
    model.neck.requires_grad_(False)
    for epoch in range(epochs):
        if epoch == 1:
            model.neck.requires_grad_(True)
        if epoch == 2:
            model.body.requires_grad_(True)
        for x, y in batches:
            F.mse_loss(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    return model


def test_what_is_named_is_trained_from_its_epoch_on_as_by_hand(
    make_batches: Callable[..., Batches],
) -> None:
    batches = make_batches(4, size=8)
    learn = learner(batches, UnfreezeCB(SCHEDULE))
    states: list[int] = []
    learn.subscribe(BeforeEpoch, lambda event: states.append(len(learn.opt.state)))
    learn.run(4, valid=False)
    assert torch.equal(weights(learn.model), weights(by_hand(batches, 4)))
    assert states == [0, 2, 4, 8]  # made with the first step of each; the others' are kept


@pytest.mark.parametrize("at", [1, 4, 6, 8, 11])
def test_a_resumed_fit_has_frozen_what_was(
    at: int, make_batches: Callable[..., Batches], tmp_path: Path
) -> None:
    batches = make_batches(4, size=8)
    whole = learner(batches, UnfreezeCB(SCHEDULE))
    whole.run(4, valid=False)
    cut, n = learner(batches, UnfreezeCB(SCHEDULE)), 0

    @cut.on(AfterBatch)
    def stop(event: AfterBatch) -> None:
        nonlocal n
        n += 1
        if n == at:
            cut.stop(graceful=True)

    cut.run(4, valid=False, cbs=CheckpointCB(tmp_path))
    rest = learner(batches, UnfreezeCB(SCHEDULE))
    rest.run(4, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert torch.equal(weights(rest.model), weights(whole.model))


@pytest.mark.parametrize("frozen_there", [False, True])
def test_a_checkpoint_holds_what_is_frozen_whoever_froze_it(
    frozen_there: bool, make_batches: Callable[..., Batches], tmp_path: Path
) -> None:
    """A fit that unfroze by hand is not frozen again by a script that begins with freezing."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.scale * F.mse_loss(preds, targets)

    def make() -> TrainLearner:
        loss, extra = Scaled(), nn.Parameter(torch.ones(2))
        learn = TrainLearner(
            network(),
            DataLoaders(make_batches(2, size=8)),
            loss,
            opt_func=lambda params, lr: optim.SGD([*params, *loss.parameters(), extra], lr),
        )
        learn.extra = [extra]
        return learn

    def freezable(learn: TrainLearner) -> list[Any]:
        return [learn.model.body[0].weight, learn.loss_func.scale, learn.extra[0]]

    first, rest = make(), make()
    for p in freezable(first):
        p.requires_grad_(not frozen_there)
    first.run(1, valid=False, cbs=CheckpointCB(tmp_path))
    for p in freezable(rest):
        p.requires_grad_(frozen_there)
    rest.run(2, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert [p.requires_grad for p in freezable(rest)] == [not frozen_there] * 3
    assert rest.model.head.weight.requires_grad


def test_lr_find_applies_it_and_puts_back_what_is_frozen(
    make_batches: Callable[..., Batches],
) -> None:
    learn = learner(make_batches(30, size=8), UnfreezeCB({1: "body"}, freeze={1: "head.bias"}))
    learn.model.neck.bias.requires_grad_(False)
    before = weights(learn.model)
    frozen: list[bool] = []

    @learn.on(BeforeEpoch, order=100)
    def look(event: BeforeEpoch) -> None:
        frozen.append(learn.model.body[0].weight.requires_grad)

    learn.run_lr_find(max_epochs=2)
    assert frozen == [False, True]
    assert torch.equal(weights(learn.model), before)
    named = dict(learn.model.named_parameters())
    assert [name for name, p in named.items() if not p.requires_grad] == ["neck.bias"]


def test_what_is_frozen_later_stays_where_it_is(make_batches: Callable[..., Batches]) -> None:
    batches, seen = make_batches(3, size=8), []
    learn = MomentumLearner(
        network(),
        DataLoaders(batches),
        lr=0.01,
        cbs=[UnfreezeCB({}, freeze={1: "body"}), GradientAccumulationCB(2)],
    )
    learn.subscribe(BeforeEpoch, lambda event: seen.append(learn.model.body[0].weight.clone()))
    learn.run(3, valid=False)
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], learn.model.body[0].weight)
    assert learn.model.body[0].weight.grad is None
    assert not learn.model.body[0].weight.requires_grad
    assert learn.model.head.weight.requires_grad


@settings(max_examples=30, deadline=None)
@given(
    begins=st.none() | st.integers(0, 3),
    ends=st.none() | st.integers(0, 3),
    epochs=st.integers(1, 4),
)
def test_the_later_of_two_schedules_counts(
    begins: int | None, ends: int | None, epochs: int
) -> None:
    cb = UnfreezeCB(
        {} if begins is None else {begins: "body"},
        freeze=None if ends is None else {ends: "body"},
    )
    seen: list[bool] = []
    learn = learner([(torch.ones(2, 3), torch.ones(2, 1))], cb)
    learn.subscribe(
        BeforeEpoch, lambda event: seen.append(learn.model.body[0].weight.requires_grad), order=50
    )
    learn.run(epochs, valid=False)
    expected, trains = [], begins is None
    for epoch in range(epochs):
        if epoch == begins:
            trains = True
        if epoch == ends:
            trains = False
        expected.append(trains)
    assert seen == expected


@pytest.mark.parametrize("eval_norms", [False, True])
def test_the_running_statistics_of_frozen_norms(
    eval_norms: bool, make_batches: Callable[..., Batches]
) -> None:
    batches = make_batches(3, size=8)
    learn = learner(batches, UnfreezeCB({1: "body"}, eval_norms=eval_norms))
    counts: list[int] = []
    learn.subscribe(
        AfterBatch, lambda event: counts.append(int(learn.model.body[1].num_batches_tracked))
    )
    learn.run(2, valid=False)
    assert counts == ([0, 0, 0, 1, 2, 3] if eval_norms else [1, 2, 3, 4, 5, 6])


def test_validation_alone_changes_nothing(make_batches: Callable[..., Batches]) -> None:
    learn = learner(make_batches(2, size=8), UnfreezeCB({1: "body"}), MetricsCB())
    learn.dls.valid = learn.dls.train
    learn.run_validate()
    assert learn.model.body[0].weight.requires_grad
    learn.run(1, cbs=SingleEpochCB())
    assert not learn.model.body[0].weight.requires_grad


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: UnfreezeCB({"body": 1}), ValueError, "unfreeze: 'body' is not an epoch: give an"),
        (lambda: UnfreezeCB({-1: "body"}), ValueError, "unfreeze: -1 is not an epoch"),
        (lambda: UnfreezeCB("body"), TypeError, "give names by epoch, such as {1: 'backbone'}"),
        (lambda: UnfreezeCB({}, freeze=["a"]), TypeError, "freeze=.*: give names by epoch"),
    ],
)
def test_a_schedule_that_is_none_is_refused(make: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        make()


def test_an_unknown_name_and_a_parameter_without_an_optimizer_are_refused() -> None:
    batches = [(torch.ones(2, 3), torch.ones(2, 1))]
    with pytest.raises(
        ValueError, match=r"unfreeze: the model has no .* 'layer4' .* are 'body', 'neck', 'head'"
    ):
        learner(batches, UnfreezeCB({1: "layer4"})).run(1, valid=False)
    learn = learner(batches, UnfreezeCB({1: "body"}))
    learn.opt_func = lambda params, lr: optim.SGD(learn.model.head.parameters(), lr)
    with pytest.raises(ValueError, match=r"body.0.weight is to be unfrozen, but the optimizer"):
        learn.run(1, valid=False)

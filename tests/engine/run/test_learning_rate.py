"""The learning rate of a fit: given by the learner or the fit, and never changed there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eventrain.callbacks import SchedulerCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, BeforeStep
from torch import nn, optim
from torch.optim.lr_scheduler import ExponentialLR

MakeModel = Callable[[], nn.Module]

halve = SchedulerCB(lambda opt: ExponentialLR(opt, 0.5))
HALVED = pytest.approx([0.1, 0.05, 0.025])


def rates_of(learner: TrainLearner) -> list[float]:
    """The learning rate of every step, of the first group."""
    rates: list[float] = []
    learner.subscribe(
        BeforeStep, lambda event: rates.append(float(learner.opt.param_groups[0]["lr"]))
    )
    return rates


@pytest.mark.parametrize("where", ["Learner", "fit", "fit with a kept optimizer"])
async def test_a_tensor_that_is_given_is_not_changed_by_schedulers(
    where: str, dls: DataLoaders, make_model: MakeModel
) -> None:
    lr = torch.tensor(0.1)
    learner = TrainLearner(make_model(), dls, cbs=halve, opt_func=optim.Adam)
    if where == "Learner":
        learner.lr = lr
    elif where == "fit with a kept optimizer":
        learner.opt_func = None
        learner.opt = optim.Adam(learner.model.parameters(), torch.tensor(1.0))
    rates = rates_of(learner)
    for _ in range(2):
        await learner.fit(1, lr=None if where == "Learner" else lr)
        assert rates == HALVED
        rates.clear()
    assert lr == 0.1


async def test_the_tensor_of_an_optimizer_that_is_kept_is_back_after_the_fit(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    lr = torch.tensor(0.1)
    learner = TrainLearner(make_model(), dls, cbs=halve, opt_func=None)
    learner.opt = optim.Adam(learner.model.parameters(), lr)
    rates = rates_of(learner)
    for _ in range(2):
        await learner.fit(1)
        assert rates == HALVED
        rates.clear()
    assert learner.opt.param_groups[0]["lr"] is lr
    assert lr == 0.1


async def test_groups_of_a_kept_optimizer_do_not_share_a_tensor(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    model = make_model()
    learner = TrainLearner(model, dls, opt_func=None)
    learner.opt = optim.Adam([{"params": [p]} for p in model.parameters()], torch.tensor(1.0))
    seen: list[tuple[Any, Any]] = []

    @learner.on(AfterBatch, where=lambda event: event.training)
    def look(event: AfterBatch) -> None:
        one, other = (group["lr"] for group in learner.opt.param_groups)
        seen.append((one is other, float(one)))

    await learner.fit(1, lr=torch.tensor(0.5))
    assert seen == [(False, 0.5)] * 3


@pytest.mark.parametrize(
    ("own", "during"),
    [([0.1, 0.1], [0.5, 0.5]), ([0.01, 1.0], [0.5, 50.0]), ([0.0, 1.0], [0.5, 0.5])],
    ids=["equal", "a backbone", "first group at 0"],
)
async def test_groups_of_a_kept_optimizer_keep_their_ratio_under_another_lr(
    own: list[float], during: list[float], dls: DataLoaders, make_model: MakeModel
) -> None:
    model = make_model()
    learner = TrainLearner(model, dls, opt_func=None)
    groups = [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), own, strict=True)]
    learner.opt = optim.SGD(groups)
    seen: list[list[float]] = []

    @learner.on(AfterBatch, once=True)
    def look(event: AfterBatch) -> None:
        seen.append([group["lr"] for group in learner.opt.param_groups])

    await learner.fit(1, lr=0.5)
    assert seen == [during]
    assert [group["lr"] for group in learner.opt.param_groups] == own


async def test_a_kept_optimizer_has_its_lr_back_though_its_groups_were_replaced(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, opt_func=None)
    learner.opt = optim.SGD(learner.model.parameters(), 0.1)

    @learner.on(AfterBatch, once=True)
    def replace(event: AfterBatch) -> None:
        learner.opt.load_state_dict(learner.opt.state_dict())
        learner.opt.add_param_group({"params": [nn.Parameter(torch.ones(1))], "lr": 7.0})

    await learner.fit(1, lr=0.5)
    assert [group["lr"] for group in learner.opt.param_groups] == [0.1, 7.0]


@pytest.mark.parametrize("lr", [-0.1, float("nan")])
def test_a_tensor_below_zero_or_not_a_number_is_refused(lr: float, learner: TrainLearner) -> None:
    learner.lr = torch.tensor(lr)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"lr=tensor\(.*: give a learning rate of 0 or more"):
        learner.run(1)

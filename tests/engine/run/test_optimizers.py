"""Several optimizers, and one that is kept over all fits: `opt=`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB, SchedulerCB
from eventrain.engine import (
    CheckpointMismatchError,
    DataLoaders,
    MomentumLearner,
    Optimizers,
    TrainLearner,
)
from eventrain.events import BeforeStep
from torch import nn, optim
from torch.nn import functional as F

from tests.support.training import weights

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))


def named_optimizers(model: nn.Sequential) -> dict[str, optim.Optimizer]:
    return {
        "body": optim.Adam(model[0].parameters(), 0.01),
        "head": optim.SGD(model[1].parameters(), 0.1, momentum=0.9),
    }


def by_hand(
    batches: Batches, model: nn.Module, opts: list[optim.Optimizer], epochs: int = 1
) -> torch.Tensor:
    for x, y in batches * epochs:
        F.mse_loss(model(x), y).backward()
        for opt in opts:
            opt.step()
        for opt in opts:
            opt.zero_grad()
    return weights(model)


# ------------------------------------------------------------------------------------ one, kept


@pytest.mark.parametrize("cls", [TrainLearner, MomentumLearner])
def test_an_optimizer_that_is_given_is_kept_over_fits(
    cls: type[TrainLearner], make_batches: Callable[..., Batches]
) -> None:
    batches, model, hand = make_batches(5), two_layers(), two_layers()
    opt = optim.SGD(model.parameters(), 0.05, momentum=0.9)
    more = {"mom": 0.0} if cls is MomentumLearner else {}
    learner = cls(model, DataLoaders(batches), opt=opt, **more)
    for _ in range(2):
        learner.run(1, valid=False)
        assert learner.opt is opt
    right = by_hand(batches, hand, [optim.SGD(hand.parameters(), 0.05, momentum=0.9)], 2)
    assert torch.equal(weights(model), right)


def test_the_rate_of_a_fit_is_for_that_fit_alone(make_batches: Callable[..., Batches]) -> None:
    batches, model, hand = make_batches(5), two_layers(), two_layers()
    learner = TrainLearner(model, DataLoaders(batches), opt=optim.SGD(model.parameters(), 0.05))
    learner.run(1, valid=False, lr=0.01)
    assert learner.opt.param_groups[0]["lr"] == 0.05
    assert torch.equal(weights(model), by_hand(batches, hand, [optim.SGD(hand.parameters(), 0.01)]))


# -------------------------------------------------------------------------------------- several


@pytest.mark.parametrize("how", ["opt", "opt_func", "attribute"])
def test_several_are_stepped_as_by_hand(how: str, make_batches: Callable[..., Batches]) -> None:
    batches, model, hand = make_batches(6), two_layers(), two_layers()
    learner = TrainLearner(model, DataLoaders(batches))
    if how == "opt":
        learner = TrainLearner(model, DataLoaders(batches), opt=named_optimizers(model))
    elif how == "opt_func":
        learner.opt_func = lambda params, lr: named_optimizers(model)
    else:
        learner.opt_func, learner.opt = None, named_optimizers(model)
    assert learner.run(1, valid=False).steps == 6
    assert isinstance(learner.opt, Optimizers)
    right = by_hand(batches, hand, list(named_optimizers(hand).values()))
    assert torch.equal(weights(model), right)


def test_they_are_one_optimizer_with_names() -> None:
    model = two_layers()
    inner = named_optimizers(model)
    opt = Optimizers(inner)
    assert opt["head"] is inner["head"]
    assert (list(opt), opt.first, repr(opt)) == (
        ["body", "head"],
        "body",
        "Optimizers(body=Adam, head=SGD)",
    )
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.1]
    model(torch.ones(1, 3)).sum().backward()
    opt.step()
    assert set(opt.state) == set(model.parameters())
    opt.zero_grad(set_to_none=False)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())
    with pytest.raises(KeyError, match="there is no optimizer 'tail', but 'body', 'head'"):
        opt["tail"]
    with pytest.raises(ValueError, match="the optimizers are 'body', 'head', but"):
        opt.load_state_dict({"body": {}})


def test_the_rate_of_a_fit_keeps_the_ratio_of_all() -> None:
    model, rates = two_layers(), []
    learner = TrainLearner(
        model, DataLoaders([(torch.ones(2, 3), torch.ones(2, 1))]), opt=named_optimizers(model)
    )

    @learner.on(BeforeStep)
    def note(event: BeforeStep) -> None:
        rates.extend(group["lr"] for group in learner.opt.param_groups)

    learner.run(1, valid=False, lr=0.02)
    assert rates == [0.02, 0.2]
    assert [group["lr"] for group in learner.opt.param_groups] == [0.01, 0.1]


def test_several_are_saved_and_resumed_to_the_bit(
    make_batches: Callable[..., Batches], tmp_path: Path
) -> None:
    dls = DataLoaders(make_batches(6))

    def make() -> TrainLearner:
        model = two_layers()
        return TrainLearner(model, dls, opt=named_optimizers(model))

    whole = make()
    whole.run(3, valid=False)
    make().run(2, valid=False, cbs=CheckpointCB(tmp_path))
    rest = make()
    for p in rest.model.parameters():
        nn.init.zeros_(p)
    rest.run(3, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert torch.equal(weights(rest.model), weights(whole.model))
    assert torch.equal(
        torch.cat([s["momentum_buffer"].flatten() for s in rest.opt["head"].state.values()]),
        torch.cat([s["momentum_buffer"].flatten() for s in whole.opt["head"].state.values()]),
    )


@pytest.mark.parametrize(
    ("others", "says"),
    [
        (
            lambda model: {"head": optim.SGD(model.parameters(), 0.1)},
            r"the optimizer is Optimizers\(head=SGD\), but Optimizers\(body=Adam, head=SGD\)",
        ),
        (
            lambda model: (
                named_optimizers(model)
                | {"head": optim.SGD([{"params": [p]} for p in model[1].parameters()], 0.1)}
            ),
            r"learner.opt\['head'\] has groups of \[1, 1\] parameters, but \[2\]",
        ),
    ],
    ids=["names", "groups"],
)
def test_a_checkpoint_of_other_optimizers_is_refused_by_name(
    others: Any, says: str, make_batches: Callable[..., Batches], tmp_path: Path
) -> None:
    dls, model = DataLoaders(make_batches(3)), two_layers()
    learner = TrainLearner(model, dls, opt=named_optimizers(model))
    learner.run(1, valid=False, cbs=CheckpointCB(tmp_path))
    other = TrainLearner(model, dls, opt=others(model))
    with pytest.raises(CheckpointMismatchError, match=says):
        other.run(2, valid=False, cbs=CheckpointCB(tmp_path), resume="last")


def test_lr_find_raises_all_rates_together_and_puts_all_back(
    make_batches: Callable[..., Batches],
) -> None:
    model = two_layers()
    learner = TrainLearner(model, DataLoaders(make_batches(30)), opt=named_optimizers(model))
    learner.run(1, valid=False)
    before = weights(model)
    state = {name: opt.state_dict() for name, opt in learner.opt.items()}
    moments = [s["exp_avg"].clone() for s in learner.opt["body"].state.values()]
    opts = dict(learner.opt)
    finder = learner.run_lr_find(max_epochs=3)
    assert len(finder.lrs) > 20
    assert torch.equal(weights(model), before)
    assert all(learner.opt[name] is opt for name, opt in opts.items())
    assert [g["lr"] for g in learner.opt.param_groups] == [0.01, 0.1]
    assert learner.opt["body"].state_dict()["param_groups"] == state["body"]["param_groups"]
    now = [s["exp_avg"] for s in learner.opt["body"].state.values()]
    assert all(map(torch.equal, moments, now))


# --------------------------------------------------------------------------------------- errors


def one() -> optim.Optimizer:
    return optim.SGD([nn.Parameter(torch.ones(1))], 0.1)


@pytest.mark.parametrize(
    ("opt", "says"),
    [
        ({}, "the mapping of optimizers is empty"),
        ({3: one()}, "the name of an optimizer is text, but 3 is not"),
        ({"": one()}, "the name of an optimizer is empty"),
        ({"G": optim.SGD}, r"the optimizer 'G' is .*: it is a class; write SGD\(parameters"),
        ({"G": None}, "the optimizer 'G' is None, which is not one with step"),
        ([one(), one()], r"opt is a list of SGD, SGD.*: name several in a mapping, such as \{'G'"),
        (optim.AdamW, r"opt=AdamW is not an optimizer, but makes one: write opt_func=AdamW, or"),
        (3, "opt is 3, which is not an optimizer"),
        (
            (one(), optim.lr_scheduler.StepLR(one(), 1)),
            r"A learning-rate scheduler goes into the callbacks: cbs=SchedulerCB\(lambda opt",
        ),
    ],
    ids=lambda x: None if isinstance(x, str) else repr(x)[:15],
)
def test_what_cannot_be_the_optimizer_is_refused_with_what_to_write(opt: Any, says: str) -> None:
    with pytest.raises((TypeError, ValueError), match=says):
        TrainLearner(two_layers(), opt=opt)


def test_a_parameter_in_two_optimizers_is_refused_by_name() -> None:
    model = two_layers()
    both = {
        "all": optim.SGD(model.parameters(), 0.1),
        "head": optim.SGD(model[1].parameters(), 0.1),
    }
    with pytest.raises(ValueError, match=r"^1.weight is in two optimizers, 'all' and 'head'"):
        TrainLearner(model, opt=both)
    with pytest.raises(ValueError, match=r"^parameter 0 of 'head', \(1, 8\), is in two"):
        Optimizers(both)
    learner = TrainLearner(model, DataLoaders([torch.ones(1)]), opt_func=lambda params, lr: both)
    with pytest.raises(ValueError, match=r"1.weight is in two optimizers, 'all' and 'head'"):
        learner.run(1, valid=False)


def test_opt_and_opt_func_are_exclusive() -> None:
    model = two_layers()
    opt = optim.SGD(model.parameters(), 0.1)
    with pytest.raises(TypeError, match="give opt, an optimizer that is kept over all fits, or"):
        TrainLearner(model, opt=opt, opt_func=optim.Adam)
    assert TrainLearner(model, opt=opt, opt_func=None).opt is opt


def test_a_scheduler_for_several_is_told_to_name_one() -> None:
    model = two_layers()
    batches = [(torch.ones(2, 3), torch.ones(2, 1))]
    halve = partial(optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    for opt, says in (
        (None, r"learner.opt has several optimizers, 'body', 'head': name .* opt='body'\)"),
        ("tail", "opt='tail': there is no optimizer 'tail', but 'body', 'head'"),
    ):
        learner = TrainLearner(
            model,
            DataLoaders(batches),
            opt=named_optimizers(model),
            cbs=SchedulerCB(halve, opt=opt),
        )
        with pytest.raises(ValueError, match=says):
            learner.run(1, valid=False)
    learner = TrainLearner(model, DataLoaders(batches), cbs=SchedulerCB(halve, opt="head"))
    with pytest.raises(ValueError, match=r"opt='head': learner.opt is one SGD, without a name"):
        learner.run(1, valid=False)


def test_a_scheduler_changes_the_rate_of_its_optimizer_alone() -> None:
    model = two_layers()
    halve = partial(optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learner = TrainLearner(
        model,
        DataLoaders([(torch.ones(2, 3), torch.ones(2, 1))] * 2),
        opt_func=lambda params, lr: named_optimizers(model),
        cbs=[SchedulerCB(halve, opt="head")],
    )
    learner.run(1, valid=False)
    assert [group["lr"] for group in learner.opt.param_groups] == [0.01, 0.025]


@pytest.mark.parametrize(
    "make",
    [optim.lr_scheduler.StepLR(one(), 1), optim.lr_scheduler.StepLR],
    ids=["instance", "class"],
)
def test_a_scheduler_that_is_not_a_function_is_told_what_to_write(make: Any) -> None:
    if isinstance(make, type):
        learner = TrainLearner(
            two_layers(),
            DataLoaders([(torch.ones(2, 3), torch.ones(2, 1))]),
            cbs=SchedulerCB(make),
        )
        with pytest.raises(TypeError) as raised:
            learner.run(1, valid=False)
        assert "raised by make=" in raised.value.__notes__[0]
        return
    with pytest.raises(TypeError, match=r"is a scheduler.*SchedulerCB\(lambda opt: StepLR\(opt,"):
        SchedulerCB(make)

"""G9: gradients of a backward pass that no step has used do not survive the fit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import GradientAccumulationCB
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBackward,
    AfterPredict,
    BeforeStep,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CleanupFit,
    Event,
    ZeroGrad,
)
from torch import nn
from torch.nn import functional as F

from tests.support.waiting import GUARD

MakeModel = Callable[[], nn.Module]


def raise_it(exc: BaseException) -> Callable[[Event], None]:
    def receiver(event: Event) -> None:
        raise exc

    return receiver


ENDINGS = {
    "stop": lambda event: event.learner.stop(),
    "stop gracefully": lambda event: event.learner.stop(graceful=True),
    "cancel the fit": raise_it(CancelFitException()),
    "cancel the epoch": raise_it(CancelEpochException()),
    "cancel the batch": raise_it(CancelBatchException()),
    "cancel the step": raise_it(CancelStepException()),
    "fail": raise_it(ZeroDivisionError()),
}


@pytest.mark.parametrize("place", [AfterBackward, BeforeStep, ZeroGrad])
@pytest.mark.parametrize("how", ENDINGS)
def test_the_next_fit_begins_without_the_gradients_of_the_last(
    how: str, place: type[Event], make_model: MakeModel, dls: DataLoaders
) -> None:
    model = make_model()
    learner = TrainLearner(model, dls, lr=0.0)  # the weights stay, so the gradients are the same

    def end(event: Any) -> None:
        ENDINGS[how](event)
        if place is ZeroGrad:
            event.proceed()

    with learner.subscribe(place, end, once=True), suppress(ZeroDivisionError, RuntimeError):
        learner.run(1, valid=False)
    assert all(p.grad is None for p in model.parameters())

    seen: list[torch.Tensor] = []
    learner.subscribe(BeforeStep, lambda event: seen.append(model.weight.grad.clone()), once=True)
    learner.run(1, valid=False)
    x, y = dls.train[0]
    (right,) = torch.autograd.grad(F.mse_loss(model(x), y), [model.weight])
    assert torch.equal(seen[0], right)


async def test_nor_does_a_fit_whose_task_is_cancelled_leave_any(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learner.on(AfterBackward)
        async def cancel(event: AfterBackward) -> None:
            scope.cancel()

        await learner.fit(1)
    assert scope.cancelled_caught
    assert all(p.grad is None for p in learner.model.parameters())


def test_inside_a_fit_a_cancelled_step_leaves_them_for_the_next_one(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    model, seen = make_model(), []
    learner = TrainLearner(model, dls, lr=0.0)

    @learner.on(BeforeStep)
    def skip_the_first(event: BeforeStep) -> None:
        seen.append(model.weight.grad.clone())
        if event.iter == 0:
            raise CancelStepException

    learner.run(1, valid=False)
    for x, y in dls.train[:2]:
        F.mse_loss(model(x), y).backward()
    assert torch.equal(seen[1], model.weight.grad)


def test_the_gradients_are_there_until_the_last_receiver_has_run(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """A checkpoint in the middle of an accumulated group holds them."""
    learner = TrainLearner(make_model(), dls, cbs=GradientAccumulationCB(3))
    there: list[bool] = []
    learner.subscribe(AfterBackward, raise_it(CancelFitException()))
    learner.subscribe(CleanupFit, lambda event: there.append(learner.model.weight.grad is not None))
    learner.run(1, valid=False)
    assert there == [True]
    assert learner.model.weight.grad is None


def test_momentum_is_kept_by_a_fit_that_ends_between_steps(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """The post's MomentumLearner goes on with it; half a batch on top of it is dropped."""
    learner = MomentumLearner(make_model(), dls, mom=0.5)
    learner.run(1, valid=False)
    assert learner.model.weight.grad is not None
    with learner.subscribe(AfterBackward, lambda event: learner.stop()):
        learner.run(1, valid=False)
    assert learner.model.weight.grad is None


def test_gradients_of_parameters_that_are_not_optimized_are_dropped(dls: DataLoaders) -> None:
    """Nothing zeroes those of a backbone whose head alone is trained."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
    head: dict[str, Any] = {"opt_func": lambda _, lr: torch.optim.SGD(model[1].parameters(), lr)}
    TrainLearner(model, dls, **head).run(1, valid=False)
    assert all(p.grad is None for p in model.parameters())


def test_nor_do_gradients_of_another_network_of_the_learner(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    class Two(TrainLearner):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.critics = {"one": nn.Linear(1, 1)}

        def get_loss(self) -> None:
            self.loss = self.critics["one"](self.preds).mean()

    learner = Two(make_model(), dls)
    learner.run(1, valid=False)
    assert learner.critics["one"].weight.grad is None
    learner.subscribe(AfterBackward, lambda event: learner.stop())
    learner.run(1, valid=False)
    assert learner.critics["one"].weight.grad is None


def test_an_error_stays_the_first_where_the_optimizer_is_gone(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)

    @learner.on(AfterBackward)
    def lose(event: AfterBackward) -> None:
        learner.opt = None
        raise ZeroDivisionError("first")

    with pytest.raises(ZeroDivisionError, match="first"):
        learner.run(1)


class Beside(Callback):
    """Trains a network of its own, with an optimizer of its own."""

    def __init__(self) -> None:
        self.net = nn.Linear(1, 1)
        self.opt = torch.optim.SGD(self.net.parameters(), 0.0)

    def after_predict(self, event: AfterPredict) -> None:
        self.net(event.learner.preds.detach()).mean().backward()
        if event.iter == 1:
            raise CancelFitException
        self.opt.step()
        self.opt.zero_grad()


def test_gradients_of_a_callbacks_own_network_are_dropped_too(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    beside = Beside()
    learner = TrainLearner(make_model(), dls, cbs=beside)

    @learner.on(BeforeStep)
    def wait(event: BeforeStep) -> None:
        raise CancelStepException

    assert learner.run(1).status == "cancelled"
    assert all(p.grad is None for p in beside.net.parameters())

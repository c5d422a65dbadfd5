"""Optimizers that want a closure: LBFGS, and SAM as an example of one's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterLoss,
    BatchEvent,
    BeforeFit,
    Callback,
    StepEvent,
    record_events,
)
from torch import nn, optim
from torch.nn import functional as F

from tests.support.training import weights

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Waves(nn.Module):
    """The task of pytorch/examples' time_sequence_prediction, with a smaller network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.linear = nn.LSTM(1, 12, batch_first=True), nn.Linear(12, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out, _ = self.lstm(x[..., None])
        return self.linear(out)[..., 0]


def waves() -> Batches:
    g = torch.Generator().manual_seed(2)
    shift = torch.randint(-40, 40, (8, 1), generator=g)
    data = ((torch.arange(30) + shift) / 5.0).sin()
    return [(data[:, :-1], data[:, 1:])]


def lbfgs(parameters: Any, lr: float = 0.8) -> optim.LBFGS:
    return optim.LBFGS(parameters, lr=lr, max_iter=6)


class SAM(optim.Optimizer):
    """Sharpness-aware minimization: the gradient at the worst point nearby.

    Source: Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization".
    """

    def __init__(self, parameters: Any, lr: float, rho: float = 0.05) -> None:
        super().__init__(parameters, {"lr": lr, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor]) -> None:
        (group,) = self.param_groups
        trained = [p for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in trained]
        norm = torch.stack([p.grad.norm() for p in trained]).norm()
        for p in trained:
            p += p.grad * (group["rho"] / (norm + 1e-12))
        closure()
        for p, was in zip(trained, before, strict=True):
            p.copy_(was - group["lr"] * p.grad)


def by_hand(
    model: nn.Module, batches: Batches, opt: optim.Optimizer, epochs: int, first: bool = False
) -> list[float]:
    losses = []
    for x, y in batches * epochs:

        def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
            with torch.enable_grad():
                opt.zero_grad()
                loss = F.mse_loss(model(x), y)
                loss.backward()
                return loss

        if first:
            losses.append(closure().item())
            opt.step(closure)
        else:
            losses.append(opt.step(closure).item())
        opt.zero_grad()
    return losses


@pytest.mark.parametrize("how", ["TrainLearner", "TrainCB", "opt", "accelerate", "own step"])
def test_lbfgs_trains_as_by_hand_to_the_bit(how: str) -> None:
    model, hand = Waves(), Waves()
    dls = DataLoaders(waves())
    if how == "TrainCB":
        learner: Learner = Learner(model, dls, lr=0.8, opt_func=lbfgs, cbs=TrainCB())
    elif how == "opt":
        learner = TrainLearner(model, dls, opt=lbfgs(model.parameters()))
    elif how == "own step":

        class Own(TrainLearner):
            def step(self) -> None:
                self.opt.step(self.closure)

        learner = Own(model, dls, lr=0.8, opt_func=lbfgs)
    else:
        cbs = AccelerateCB("no") if how == "accelerate" else None
        learner = TrainLearner(model, dls, lr=0.8, opt_func=lbfgs, cbs=cbs)
    result = learner.run(3, valid=False, cbs=MetricsCB())
    losses = by_hand(hand, waves(), lbfgs(hand.parameters()), 3)
    assert torch.equal(weights(model), weights(hand))
    assert [row["loss"] for row in result.history] == pytest.approx(losses, abs=0)
    assert result.steps == 3


def test_sam_trains_as_by_hand_to_the_bit(make_batches: Callable[..., Batches]) -> None:
    batches, model, hand = make_batches(5), nn.Linear(3, 1), nn.Linear(3, 1)
    hand.load_state_dict(model.state_dict())
    learner = TrainLearner(model, DataLoaders(batches), lr=0.05, opt_func=SAM)
    assert learner.run(2, valid=False).steps == 10
    by_hand(hand, batches, SAM(hand.parameters(), 0.05), 2, first=True)
    assert torch.equal(weights(model), weights(hand))


def test_lbfgs_is_resumed_to_the_bit(tmp_path: Path) -> None:
    def make() -> TrainLearner:
        return TrainLearner(Waves(), DataLoaders(waves()), lr=0.8, opt_func=lbfgs)

    whole, rest = make(), make()
    whole.run(4, valid=False)
    make().run(2, valid=False, cbs=CheckpointCB(tmp_path))
    rest.run(4, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert torch.equal(weights(rest.model), weights(whole.model))


def test_lr_find_with_lbfgs_restores_it() -> None:
    model = Waves()
    learner = TrainLearner(model, DataLoaders(waves() * 10), opt=lbfgs(model.parameters()))
    learner.run(1, valid=False)
    before, evals = weights(model), learner.opt.state_dict()["state"][0]["func_evals"]
    learner.run_lr_find(max_epochs=1)
    assert torch.equal(weights(model), before)
    assert learner.opt.state_dict()["state"][0]["func_evals"] == evals


def test_each_evaluation_has_the_events_of_a_loss_and_the_batch_keeps_its_own() -> None:
    model, seen = nn.Linear(3, 1), []
    learner = TrainLearner(
        model, DataLoaders([(torch.ones(2, 3), torch.zeros(2, 1))]), lr=0.05, opt_func=SAM
    )
    learner.subscribe(AfterLoss, lambda event: seen.append(event.loss.item()))
    learner.subscribe(AfterBatch, lambda event: seen.append(event.loss.item()))
    with record_events(learner) as recorded:
        learner.run(1, valid=False)
    assert [type(e).__name__ for e in recorded if isinstance(e, BatchEvent | StepEvent)] == [
        "BeforeBatch",
        *("AfterPredict", "AfterLoss", "AfterBackward"),
        "BeforeStep",
        *("AfterPredict", "AfterLoss", "AfterBackward"),
        *("AfterStep", "CleanupStep"),
        *("AfterBatch", "CleanupBatch"),
    ]
    first, again, of_batch = seen
    assert first == of_batch < again


def test_what_a_receiver_adds_to_the_loss_is_in_every_evaluation() -> None:
    class Penalty(Callback):
        def after_loss(self, event: AfterLoss) -> None:
            learner = event.learner
            learner.loss = learner.loss + 0.1 * learner.model.weight.square().sum()

    data = [(torch.eye(3), torch.ones(3, 1))]
    torch.manual_seed(0)
    model, hand = nn.Linear(3, 1), nn.Linear(3, 1)
    hand.load_state_dict(model.state_dict())
    TrainLearner(model, DataLoaders(data), lr=0.5, opt_func=lbfgs, cbs=Penalty()).run(
        1, valid=False
    )
    opt = lbfgs(hand.parameters(), 0.5)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = F.mse_loss(hand(data[0][0]), data[0][1]) + 0.1 * hand.weight.square().sum()
        loss.backward()
        return loss

    opt.step(closure)
    assert torch.equal(weights(model), weights(hand))


def test_an_optional_closure_is_not_given(make_batches: Callable[..., Batches]) -> None:
    got: list[Any] = []

    class Optional(optim.SGD):
        def step(self, closure: Any = None) -> Any:
            got.append(closure)
            return super().step()

    TrainLearner(nn.Linear(3, 1), DataLoaders(make_batches(2)), opt_func=Optional).run(
        1, valid=False
    )
    assert got == [None, None]


# --------------------------------------------------------------------------------------- errors


def scaled_by_accelerate() -> AccelerateCB:
    cb = AccelerateCB("no")
    cb.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return cb


@pytest.mark.parametrize(
    "make",
    [
        lambda: MixedTrainingCB("fp16"),
        lambda: MixedTrainingCB("bf16"),
        lambda: GradientAccumulationCB(2),
        GradientClippingCB,
        scaled_by_accelerate,
    ],
)
def test_what_cannot_work_with_a_closure_is_refused_with_both_names(
    make: Callable[[], Callback],
) -> None:
    cb = make()
    batches = [(torch.ones(2, 3), torch.ones(2, 1))]
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(batches, batches), opt_func=lbfgs, cbs=cb)
    begun: list[Any] = []
    learner.subscribe(BeforeFit, begun.append)
    name = type(cb).__name__
    with pytest.raises(ValueError, match=f"^{name} cannot work with LBFGS, which computes"):
        learner.run(1)
    assert begun == []
    assert learner.run_validate()["loss"] > 0


def test_momentum_of_gradients_and_a_closure_are_refused() -> None:
    learner = MomentumLearner(Waves(), DataLoaders(waves()), opt_func=lbfgs)
    with pytest.raises(ValueError, match="MomentumLearner cannot work with LBFGS"):
        learner.run(1, valid=False)


def test_one_that_wants_a_closure_cannot_be_one_of_several() -> None:
    model = Waves()
    opt = {
        "body": optim.SGD(model.lstm.parameters(), 0.1),
        "head": lbfgs(model.linear.parameters()),
    }
    learner = TrainLearner(model, DataLoaders(waves()), opt=opt)
    with pytest.raises(ValueError, match="'head' is LBFGS, which wants a closure, and cannot"):
        learner.run(1, valid=False)


def test_an_update_with_a_closure_is_refused() -> None:
    class Updating(TrainLearner):
        def get_loss(self) -> None:
            super().get_loss()
            self.update(self.loss)

    learner = Updating(Waves(), DataLoaders(waves()), opt_func=lbfgs)
    with pytest.raises(RuntimeError, match="LBFGS wants a closure"):
        learner.run(1, valid=False)

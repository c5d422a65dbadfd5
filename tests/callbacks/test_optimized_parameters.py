"""G17: what looks at gradients looks at those that the optimizer steps with, in its order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    GradientAccumulationCB,
    GradientClippingCB,
    MixedTrainingCB,
    TerminateOnNaNCB,
)
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import AfterStep, BeforeEpoch
from torch import nn
from torch.nn import functional as F

from tests.support.training import weights

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def two_layers() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 1))


def head_only(model: nn.Sequential) -> Callable[[Any, float], torch.optim.Optimizer]:
    return lambda _, lr: torch.optim.SGD(model[1].parameters(), lr)


def test_clipping_a_head_ignores_the_gradients_that_nobody_zeroes(
    make_batches: Callable[..., Batches],
) -> None:
    batches, model, clip = make_batches(20), two_layers(), GradientClippingCB(0.1)
    learner = TrainLearner(
        model, DataLoaders(batches), lr=0.05, cbs=clip, opt_func=head_only(model)
    )
    norms: list[float] = []
    learner.subscribe(AfterStep, lambda event: norms.append(clip.total_norm.item()))
    learner.run(1, valid=False)

    hand, right = two_layers(), []
    opt = torch.optim.SGD(hand[1].parameters(), 0.05)
    for x, y in batches:
        opt.zero_grad()
        F.mse_loss(hand(x), y).backward()
        right.append(nn.utils.clip_grad_norm_(hand[1].parameters(), 0.1).item())
        opt.step()
    assert norms == right
    assert torch.equal(weights(model), weights(hand))


def test_clipping_adds_up_in_the_order_of_the_optimizer(
    make_batches: Callable[..., Batches],
) -> None:
    """Another order rounds differently in the last bit."""
    batches, model, clip = make_batches(10, size=64), two_layers(), GradientClippingCB(1e-3)

    def backwards(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(list(parameters)[::-1], lr)

    learner = TrainLearner(model, DataLoaders(batches), lr=0.05, cbs=clip, opt_func=backwards)
    learner.run(1, valid=False)
    hand = two_layers()
    opt = backwards(hand.parameters(), 0.05)
    for x, y in batches:
        opt.zero_grad()
        F.mse_loss(hand(x), y).backward()
        nn.utils.clip_grad_norm_(opt.param_groups[0]["params"], 1e-3)
        opt.step()
    assert torch.equal(weights(model), weights(hand))


def test_a_gradient_that_no_step_uses_does_not_end_the_fit(dls: DataLoaders) -> None:
    model = two_layers()
    learner = TrainLearner(model, dls, cbs=TerminateOnNaNCB(), opt_func=head_only(model))
    model[0].weight.register_hook(lambda gradient: gradient * float("nan"))
    assert learner.run(1, valid=False).status == "completed"


def test_a_gradient_of_the_loss_that_is_not_finite_ends_it_by_name(dls: DataLoaders) -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.scale.register_hook(lambda gradient: gradient * float("inf"))

        def forward(self, preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return self.scale * F.mse_loss(preds, targets)

    loss = Scaled()
    learner = TrainLearner(
        two_layers(),
        dls,
        loss,
        cbs=TerminateOnNaNCB(),
        opt_func=lambda params, lr: torch.optim.SGD([*params, *loss.parameters()], lr),
    )
    result = learner.run(1, valid=False)
    assert result.reason is not None
    assert result.reason.startswith("the gradient of loss_func.scale is not finite in 1 of 1")


@pytest.mark.parametrize("cls", [TrainLearner, MomentumLearner])
def test_a_layer_that_is_frozen_on_the_way_stays_where_it_is(
    cls: type[TrainLearner], dls: DataLoaders
) -> None:
    model, frozen_at = two_layers(), []
    learner = cls(model, dls, lr=0.01)

    @learner.on(BeforeEpoch, where=lambda event: event.epoch == 1 and event.training)
    def freeze(event: BeforeEpoch) -> None:
        model[0].requires_grad_(False)
        frozen_at.append(model[0].weight.clone())

    learner.run(3, valid=False)
    assert torch.equal(model[0].weight, frozen_at[0])
    assert model[0].weight.grad is None


def test_momentum_of_a_sparse_gradient_does_not_grow_and_is_that_of_a_dense_one() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 50, (4, 2), generator=g), torch.randn(4, 1, generator=g))
        for _ in range(60)
    ]
    trained = {}
    for sparse in (False, True):
        torch.manual_seed(0)
        table = nn.Embedding(50, 4, sparse=sparse)
        model = nn.Sequential(table, nn.Flatten(), nn.Linear(8, 1))
        MomentumLearner(model, DataLoaders(batches), lr=0.05).run(1, valid=False)
        trained[sparse] = model
    gradient = trained[True][0].weight.grad
    assert gradient.is_sparse
    assert gradient._nnz() <= 50
    assert torch.allclose(weights(trained[True]), weights(trained[False]), atol=1e-6)
    assert torch.allclose(gradient.to_dense(), trained[False][0].weight.grad, atol=1e-6)


def test_accumulation_and_scaling_leave_the_other_gradients_alone() -> None:
    """A loader without a length: the tail's gradients are corrected afterwards."""

    class Endless:
        def __iter__(self) -> Any:
            g = torch.Generator().manual_seed(0)
            for _ in range(5):
                yield torch.randn(4, 3, generator=g), torch.randn(4, 1, generator=g)

    model = two_layers()
    model[0].weight.grad = torch.full_like(model[0].weight, 5.0)
    seen: list[torch.Tensor] = []
    learner = TrainLearner(
        model,
        DataLoaders(Endless()),
        cbs=[GradientAccumulationCB(2), MixedTrainingCB("fp16", init_scale=8.0)],
        opt_func=head_only(model),
    )
    model[0].requires_grad_(False)
    learner.subscribe(AfterStep, lambda event: seen.append(model[0].weight.grad.clone()))
    learner.run(1, valid=False)
    assert len(seen) == 3
    assert all(torch.equal(gradient, torch.full((8, 3), 5.0)) for gradient in seen)

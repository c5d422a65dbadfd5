"""GradientClippingCB: what the step uses has a norm of at most so much."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eventrain.callbacks import GradientAccumulationCB, GradientClippingCB, MixedTrainingCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBackward, BeforeStep
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeModel = Callable[[], nn.Module]


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def norm(gradients: list[torch.Tensor], p: float = 2.0) -> float:
    return torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]), p).item()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf])
def test_gradients_are_scaled_down_to_the_norm(
    norm_type: float, dls: DataLoaders, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    clipping = GradientClippingCB(0.5, norm_type)
    learner = TrainLearner(make_model(), dls, cbs=clipping)
    before, after, said = [], [], []
    learner.subscribe(AfterBackward, lambda event: before.append(gradients(learner.model)))

    @learner.on(BeforeStep, order=80)
    def look(event: BeforeStep) -> None:
        after.append(gradients(learner.model))
        said.append(clipping.total_norm)

    learner.run(1, **backend)
    assert len(after) == 3
    for raw, clipped, total in zip(before, after, said, strict=True):
        assert norm(raw, norm_type) > 0.5
        assert norm(clipped, norm_type) == pytest.approx(0.5, rel=1e-4)
        assert total.item() == pytest.approx(norm(raw, norm_type), rel=1e-5)
        factor = 0.5 / norm(raw, norm_type)
        for a, b in zip(raw, clipped, strict=True):  # only the length is changed
            assert torch.allclose(a * factor, b, rtol=1e-4)


def test_small_gradients_are_left_to_the_bit(dls: DataLoaders, make_model: MakeModel) -> None:
    weights = []
    for cbs in ([], [GradientClippingCB(math.inf)], [GradientClippingCB(1e9)]):
        model = make_model()
        TrainLearner(model, dls, cbs=cbs).run(2)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])


@settings(max_examples=25)
@given(max_norm=st.floats(1e-3, 1e3), norm_type=st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_no_step_is_taken_with_more_than_the_norm(max_norm: float, norm_type: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3)
    learner = TrainLearner(
        nn.Linear(3, 1),
        DataLoaders([(x, x.sum(1, keepdim=True))]),
        lr=0.0,
        cbs=GradientClippingCB(max_norm, norm_type),
    )
    norms = []
    learner.subscribe(
        BeforeStep, lambda event: norms.append(norm(gradients(learner.model), norm_type)), order=80
    )
    learner.run(1, valid=False)
    assert norms[0] <= max_norm * 1.0001


def test_the_norm_stays_a_tensor_on_the_device(
    make_model: MakeModel, make_batches: Callable[..., Batches]
) -> None:
    """G14: reading its number is left to whoever wants it."""
    clipping = GradientClippingCB(0.5)
    assert clipping.total_norm is None
    model = make_model().to("meta")  # a device without numbers: reading one would fail
    batches = [(x.to("meta"), y.to("meta")) for x, y in make_batches(2)]
    result = TrainLearner(model, DataLoaders(batches), cbs=clipping).run(1, valid=False)
    assert result.steps == 2
    assert isinstance(clipping.total_norm, torch.Tensor)
    assert clipping.total_norm.device.type == "meta"
    assert clipping.total_norm.shape == ()


@pytest.mark.parametrize("max_norm", [0, -1.0, math.nan])
def test_a_norm_that_is_not_positive_is_refused(max_norm: float) -> None:
    with pytest.raises(ValueError, match="give a positive number"):
        GradientClippingCB(max_norm)


@pytest.mark.parametrize("clipping_first", [True, False])
def test_clipping_sees_unscaled_gradients(
    clipping_first: bool, dls: DataLoaders, make_model: MakeModel
) -> None:
    clipping = GradientClippingCB(0.5)
    cbs = [clipping, MixedTrainingCB("fp16", init_scale=2.0**12)]
    learner = TrainLearner(make_model(), dls, cbs=cbs if clipping_first else cbs[::-1])
    scaled, said = [], []
    learner.subscribe(AfterBackward, lambda event: scaled.append(norm(gradients(learner.model))))
    learner.subscribe(BeforeStep, lambda event: said.append(clipping.total_norm.item()), order=80)
    assert learner.run(1).steps == 3
    assert said == pytest.approx([n / 2**12 for n in scaled], rel=1e-4)


@pytest.mark.parametrize("clipping_first", [True, False])
def test_clipping_sees_the_mean_of_all_accumulated_batches(
    clipping_first: bool, make_model: MakeModel, make_batches: Callable[..., Batches]
) -> None:
    batches = make_batches(4)
    clipping = GradientClippingCB(0.5)
    cbs = [clipping, GradientAccumulationCB(4)]
    learner = TrainLearner(
        make_model(), DataLoaders(batches), cbs=cbs if clipping_first else cbs[::-1]
    )
    learner.run(1, valid=False)
    model = make_model()
    for x, y in batches:
        (F.mse_loss(model(x), y) / 4).backward()
    assert clipping.total_norm.item() == pytest.approx(norm(gradients(model)), rel=1e-5)

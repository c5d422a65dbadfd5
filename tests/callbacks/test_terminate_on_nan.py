"""TerminateOnNaNCB: a loss or a gradient that is not finite ends the fit before the step."""

from __future__ import annotations

import math
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
    TerminateOnNaNCB,
)
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    AfterLoss,
    BeforeBatch,
    CancelBatchException,
    CleanupStep,
    record_events,
)
from torch import nn
from torch.nn import functional as F

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]
MakeModel = Callable[[], nn.Module]
Digits = tuple[torch.Tensor, torch.Tensor]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def spoiled(batches: Batches, i: int, value: float) -> Batches:
    x, y = batches[i]
    return [*batches[:i], (x, y * value), *batches[i + 1 :]]


def spoil_gradient(learner: TrainLearner, at: int, value: float = math.nan, n: int = 1) -> None:
    """Put a value into the first `n` of the last parameter's gradients, in one batch."""

    @learner.on(AfterBackward, where=lambda event: event.iter == at)
    def spoil(event: AfterBackward) -> None:
        *_, parameter = (p for p in learner.model.parameters() if p.grad is not None)
        parameter.grad.view(-1)[:n] = value


def cut(model: nn.Module, batches: Batches, lr: float = 0.1) -> torch.Tensor:
    """The weights after a plain loop over these batches."""
    TrainLearner(model, DataLoaders(batches), lr=lr).run(1, valid=False)
    return weights(model)


# ----------------------------------------------------------------------------------- the loss


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf")])
def test_a_loss_that_is_not_finite_ends_the_fit_before_its_backward_pass(
    value: float,
    text: str,
    make_batches: MakeBatches,
    make_model: MakeModel,
    backend: dict[str, Any],
) -> None:
    batches = make_batches(4)
    learner = TrainLearner(
        make_model(), DataLoaders(spoiled(batches, 2, value)), cbs=TerminateOnNaNCB()
    )
    with record_events(learner) as events:
        result = learner.run(2, valid=False, **backend)
    assert (result.status, result.who, result.reason) == (
        "cancelled",
        "TerminateOnNaNCB.after_loss",
        f"the loss is {text} in batch 2 of epoch 0",
    )
    assert events.names[-4:] == ["AfterLoss", "CleanupBatch", "CleanupEpoch", "CleanupFit"]
    assert result.steps == 2
    assert torch.equal(weights(learner.model), cut(make_model(), batches[:2]))


def test_it_names_the_epoch(make_batches: MakeBatches, make_model: MakeModel) -> None:
    learner = TrainLearner(make_model(), DataLoaders(make_batches(2)), cbs=TerminateOnNaNCB())

    @learner.on(AfterLoss, where=lambda event: event.epoch == 3)
    def spoil(event: AfterLoss) -> None:
        learner.loss = learner.loss * math.nan

    assert learner.run(5, valid=False).reason == "the loss is nan in batch 0 of epoch 3"


def test_a_diverging_fit_on_real_digits_keeps_the_last_finite_weights(digits: Digits) -> None:
    images, labels = digits
    batches = [(images[i : i + 32], labels[i : i + 32, None].float()) for i in range(0, 320, 32)]
    ends = []
    for cbs in ([], [TerminateOnNaNCB()]):
        torch.manual_seed(42)
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 1))
        learner = TrainLearner(model, DataLoaders(batches), F.mse_loss, lr=1.0, cbs=cbs)
        result = learner.run(10, valid=False)
        ends.append((result.status, bool(weights(model).isfinite().all())))
    assert ends == [("completed", False), ("cancelled", True)]
    assert (result.reason or "").startswith("the loss is inf in batch")


@pytest.mark.parametrize("train", [True, False])
def test_the_losses_of_validation_are_not_its_business(
    train: bool, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(2)
    dls = DataLoaders(batches, spoiled(batches, 0, math.nan))
    learner = TrainLearner(make_model(), dls, cbs=TerminateOnNaNCB())
    result = learner.run(2, train=train)
    assert (result.status, result.valid_batches) == ("completed", 4)


def test_a_loss_of_shape_1_is_looked_at_too(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    def loss_func(preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(preds, targets).reshape(1)

    batches = make_batches(2)
    for spoil, status in ((1.0, "completed"), (math.nan, "cancelled")):
        dls = DataLoaders(spoiled(batches, 1, spoil))
        learner = TrainLearner(make_model(), dls, loss_func, cbs=TerminateOnNaNCB())
        assert learner.run(1, valid=False).status == status


@pytest.mark.parametrize(
    ("loss_func", "error", "message"),
    [
        (lambda p, y: (p - y) ** 2, ValueError, "the loss must be a scalar"),
        (lambda p, y: (F.mse_loss(p, y), 1), TypeError, "the loss must be a tensor"),
    ],
)
def test_a_loss_that_is_none_says_so_as_without_it(
    loss_func: Any,
    error: type[Exception],
    message: str,
    dls: DataLoaders,
    make_model: MakeModel,
) -> None:
    for cbs in ([], [TerminateOnNaNCB()]):
        with pytest.raises(error, match=message):
            TrainLearner(make_model(), dls, loss_func, cbs=cbs).run(1)


# --------------------------------------------------------------------------------- gradients


def test_a_gradient_that_is_not_finite_ends_the_fit_before_the_step(
    make_batches: MakeBatches, backend: dict[str, Any]
) -> None:
    def model() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 5, bias=False))

    batches = [(x, x.repeat(1, 2)[:, :5]) for x, _ in make_batches(4)]
    learner = TrainLearner(model(), DataLoaders(batches), cbs=TerminateOnNaNCB())
    spoil_gradient(learner, 2, n=3)
    with record_events(learner) as events:
        result = learner.run(1, valid=False, **backend)
    assert (result.status, result.who, result.reason) == (
        "cancelled",
        "TerminateOnNaNCB.before_step",
        "the gradient of 2.weight is not finite in 3 of 50 values, in batch 2 of epoch 0",
    )
    assert events.names[-5:] == [
        *["BeforeStep", "CleanupStep", "CleanupBatch", "CleanupEpoch", "CleanupFit"]
    ]
    assert torch.equal(weights(learner.model), cut(model(), batches[:2]))


def test_of_several_gradients_the_first_is_named_and_the_others_counted(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=TerminateOnNaNCB())

    @learner.on(AfterBackward)
    def spoil(event: AfterBackward) -> None:
        for p in learner.model.parameters():
            p.grad.fill_(-math.inf)

    assert learner.run(1).reason == (
        "the gradient of weight is not finite in 3 of 3 values (nor that of 1 other parameter),"
        " in batch 0 of epoch 0"
    )


def test_a_finite_loss_with_a_gradient_of_nan_is_found() -> None:
    """The root of a sum of squares, where it is zero."""
    model = nn.Linear(2, 1, bias=False)
    nn.init.zeros_(model.weight)
    batches = [(torch.ones(4, 2), torch.zeros(4, 1))]
    learner = TrainLearner(
        model,
        DataLoaders(batches),
        lambda preds, targets: (preds - targets).pow(2).sum().sqrt(),
        cbs=TerminateOnNaNCB(),
    )
    assert learner.run(1, valid=False).reason == (
        "the gradient of weight is not finite in 2 of 2 values, in batch 0 of epoch 0"
    )
    assert torch.equal(weights(model), torch.zeros(2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_finite_gradients_whose_norm_overflows_are_no_end(dtype: torch.dtype) -> None:
    model = nn.Linear(50, 40, bias=False, dtype=dtype)
    batches = [(torch.ones(4, 50, dtype=dtype), torch.zeros(4, 40, dtype=dtype))]
    learner = TrainLearner(model, DataLoaders(batches), lr=0.0, cbs=TerminateOnNaNCB())
    largest = torch.finfo(dtype).max

    @learner.on(AfterBackward)
    def grow(event: AfterBackward) -> None:
        model.weight.grad.fill_(largest)
        assert torch.nn.utils.get_total_norm([model.weight.grad]).isinf()

    assert learner.run(1, valid=False).steps == 1


def test_complex_gradients_whose_absolute_value_overflows_are_no_end() -> None:
    model = nn.Linear(3, 1, bias=False, dtype=torch.complex64)
    batches = [(torch.ones(2, 3, dtype=torch.complex64), torch.zeros(2, 1))]
    learner = TrainLearner(
        model,
        DataLoaders(batches),
        lambda preds, targets: (preds.abs() - targets).pow(2).mean(),
        lr=0.0,
        cbs=TerminateOnNaNCB(),
    )
    with learner.subscribe(AfterBackward, lambda e: model.weight.grad.fill_(3e38 + 3e38j)):
        assert learner.run(1, valid=False).steps == 1
    with learner.subscribe(AfterBackward, lambda e: model.weight.grad.fill_(complex(0, math.inf))):
        assert "in 3 of 3 values" in (learner.run(1, valid=False).reason or "")


def test_it_looks_before_clipping_which_would_spread_it(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    for first in (True, False):
        clipping = GradientClippingCB(0.5)
        cbs = [clipping, TerminateOnNaNCB()]
        learner = TrainLearner(make_model(), dls, cbs=cbs if first else cbs[::-1])
        spoil_gradient(learner, 0, math.inf)
        assert "gradient of bias is not finite in 1 of 1 values" in (learner.run(1).reason or "")
        assert clipping.total_norm is None


def test_parameters_that_are_frozen_unused_or_empty_are_passed_over(
    make_batches: MakeBatches,
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.Linear(3, 1)
            self.unused = nn.Linear(3, 1)
            self.frozen = nn.Linear(3, 1).requires_grad_(False)
            self.empty = nn.Parameter(torch.zeros(0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.used(x) + self.frozen(x) + self.empty.sum()

    learner = TrainLearner(Model(), DataLoaders(make_batches(3)), cbs=TerminateOnNaNCB())
    assert learner.run(1, valid=False).steps == 3

    @learner.on(AfterBackward)
    def spoil(event: AfterBackward) -> None:
        learner.model.used.bias.grad.fill_(math.nan)

    assert "gradient of used.bias is" in (learner.run(1, valid=False).reason or "")


def test_a_model_whose_gradients_are_all_missing_is_the_optimizers_business(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=TerminateOnNaNCB())

    @learner.on(AfterBackward)
    def drop(event: AfterBackward) -> None:
        learner.model.zero_grad()

    assert learner.run(1).steps == 3


def test_sparse_gradients_are_looked_at() -> None:
    model = nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(8, 1))
    batches = [(torch.tensor([[1, 2], [2, 2]]), torch.ones(2, 1))] * 3
    learner = TrainLearner(model, DataLoaders(batches), cbs=TerminateOnNaNCB())
    assert learner.run(1, valid=False).steps == 3
    before = weights(model)

    @learner.on(AfterBackward)
    def spoil(event: AfterBackward) -> None:
        grad = model[0].weight.grad.coalesce()
        values = grad.values().clone()
        values[1, :2] = math.nan
        model[0].weight.grad = torch.sparse_coo_tensor(
            grad.indices(), values, grad.shape, check_invariants=True
        )

    assert learner.run(1, valid=False).reason == (
        "the gradient of 0.weight is not finite in 2 of 80 values, in batch 0 of epoch 0"
    )
    assert torch.equal(weights(model), before)


@pytest.mark.parametrize("learner_type", [TrainLearner, MomentumLearner])
def test_the_next_fit_is_not_spoiled_by_the_gradients_of_the_last(
    learner_type: type[TrainLearner], make_batches: MakeBatches, make_model: MakeModel
) -> None:
    """G9: the gradients of the batch that ended the fit are dropped."""
    learner = learner_type(make_model(), DataLoaders(make_batches(3)), cbs=TerminateOnNaNCB())
    with learner.subscribe(AfterBackward, lambda e: learner.model.bias.grad.fill_(math.nan)):
        assert learner.run(1, valid=False).status == "cancelled"
    result = learner.run(1, valid=False)
    assert (result.status, result.steps) == ("completed", 3)
    assert bool(weights(learner.model).isfinite().all())


# --------------------------------------------------------------------- with other callbacks


def fp16_accelerate() -> AccelerateCB:
    """accelerate refuses float16 on a CPU when it is made; what follows is the same there."""
    cb = AccelerateCB("no")
    cb.accelerator.state._mixed_precision = "fp16"
    cb.accelerator.native_amp = True
    cb.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    return cb


@pytest.fixture(params=["MixedTrainingCB", "AccelerateCB"])
def scaling(request: pytest.FixtureRequest) -> Any:
    if request.param == "MixedTrainingCB":
        yield MixedTrainingCB("fp16", init_scale=1024.0)
        return
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield fp16_accelerate()
    state.AcceleratorState._reset_state(reset_partial_state=True)


def test_where_a_scaler_skips_steps_gradients_are_left_to_it(
    scaling: Any, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(
        make_model(), DataLoaders(make_batches(3)), cbs=[TerminateOnNaNCB(), scaling]
    )
    spoil_gradient(learner, 0, math.inf)
    with record_events(learner) as events:
        result = learner.run(1, valid=False)
    ends = [event.end.status for event in events if isinstance(event, CleanupStep)]
    assert ends == ["cancelled", "completed", "completed"]
    assert result.status == "completed"


def test_the_loss_is_looked_at_with_a_scaler_too(
    scaling: Any, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = spoiled(make_batches(3), 1, math.nan)
    learner = TrainLearner(make_model(), DataLoaders(batches), cbs=[TerminateOnNaNCB(), scaling])
    assert learner.run(1, valid=False).reason == "the loss is nan in batch 1 of epoch 0"


@pytest.mark.parametrize("make", [lambda: MixedTrainingCB("bf16"), lambda: AccelerateCB("bf16")])
def test_without_a_scaler_mixed_precision_is_looked_at(
    make: Callable[[], Any], make_batches: MakeBatches, make_model: MakeModel
) -> None:
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        dls = DataLoaders(make_batches(3))
        learner = TrainLearner(make_model(), dls, cbs=[TerminateOnNaNCB(), make()])
        spoil_gradient(learner, 1)
        result = learner.run(1, valid=False)
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    assert "the gradient of bias is not finite" in (result.reason or "")


def test_with_accumulation_the_gradients_of_the_step_are_looked_at(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(
        make_model(),
        DataLoaders(make_batches(6)),
        cbs=[TerminateOnNaNCB(), GradientAccumulationCB(2), MetricsCB()],
    )
    spoil_gradient(learner, 2)
    result = learner.run(1, valid=False)
    assert "in batch 3 of epoch 0" in (result.reason or "")
    assert result.steps == 1


# ------------------------------------------------------------------------------ every n-th


@pytest.mark.parametrize(("every", "ends_in"), [(1, 1), (2, 1), (3, 2), (5, 4), (7, None)])
def test_every_nth_batch_is_looked_at(
    every: int, ends_in: int | None, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = [(x, y * math.nan if i else y) for i, (x, y) in enumerate(make_batches(6))]
    learner = TrainLearner(make_model(), DataLoaders(batches), cbs=TerminateOnNaNCB(every))
    reason = None if ends_in is None else f"the loss is nan in batch {ends_in} of epoch 0"
    assert learner.run(1, valid=False).reason == reason


def test_batches_are_counted_over_the_fit_and_anew_in_the_next(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(
        make_model(), DataLoaders(make_batches(3)), lr=0.0, cbs=TerminateOnNaNCB(every=4)
    )

    @learner.on(AfterLoss)
    def spoil(event: AfterLoss) -> None:
        learner.loss = learner.loss * math.nan

    for _ in range(2):
        assert learner.run(2, valid=False).reason == "the loss is nan in batch 0 of epoch 1"


def test_gradients_are_looked_at_in_the_step_that_follows_the_nth_batch(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(
        make_model(),
        DataLoaders(make_batches(8)),
        lr=0.0,
        cbs=[TerminateOnNaNCB(every=5), GradientAccumulationCB(2)],
    )

    @learner.on(AfterBackward, where=lambda event: event.iter > 3)
    def spoil(event: AfterBackward) -> None:
        learner.model.bias.grad.fill_(math.nan)

    assert "in batch 5 of epoch 0" in (learner.run(1, valid=False).reason or "")


def test_batches_left_before_their_loss_do_not_count(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(
        make_model(), DataLoaders(make_batches(6)), lr=0.0, cbs=TerminateOnNaNCB(every=3)
    )

    @learner.on(BeforeBatch, where=lambda event: event.iter == 1)
    def leave(event: BeforeBatch) -> None:
        raise CancelBatchException

    @learner.on(AfterLoss)
    def spoil(event: AfterLoss) -> None:
        learner.loss = learner.loss * math.nan

    assert learner.run(1, valid=False).reason == "the loss is nan in batch 3 of epoch 0"


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_resumed_fit_looks_at_the_same_batches(
    at: int, tmp_path: Path, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    """Batch 4 is due, the fifth; the step that follows comes with batch 5."""

    def learner_of_two_groups() -> TrainLearner:
        cbs = [TerminateOnNaNCB(every=5), GradientAccumulationCB(3), CheckpointCB(tmp_path)]
        return TrainLearner(make_model(), DataLoaders(make_batches(6)), lr=0.0, cbs=cbs)

    learner = learner_of_two_groups()

    @learner.on(AfterBatch, where=lambda event: event.iter == at - 1)
    def stop(event: AfterBatch) -> None:
        learner.stop(graceful=True)

    learner.run(1, valid=False)
    learner = learner_of_two_groups()

    @learner.on(AfterBackward, where=lambda event: event.iter > 2)
    def spoil(event: AfterBackward) -> None:
        learner.model.bias.grad.fill_(math.nan)

    result = learner.run(1, valid=False, resume="last")
    assert result.resumed_from is not None
    assert "in batch 5 of epoch 0" in (result.reason or "")


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2"])
def test_a_bad_every_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=r"every=.*number of batches"):
        TerminateOnNaNCB(every)

"""MixedTrainingCB: autocast that is always closed, gradients that are always true."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import (
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
    def_device,
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    AfterLoss,
    AfterPredict,
    BeforeBatch,
    BeforeFit,
    BeforeStep,
    Callback,
    CancelBatchException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    record_events,
)
from torch import nn
from torch.nn import functional as F

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]
MakeModel = Callable[[], nn.Module]
LR = 0.05
SCALE = 1024.0  # a power of two that does not overflow here: scaling changes no bit


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_hand(
    model: nn.Module,
    groups: list[Batches],
    *,
    scale: float = SCALE,
    mom: float = 0.0,
    clip: float = math.inf,
) -> tuple[nn.Module, torch.amp.GradScaler, list[bool]]:
    """The recipe of torch's documentation; returns which of the steps were skipped, too."""
    opt = torch.optim.SGD(model.parameters(), LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    skipped = []
    for group in groups:
        for x, y in group:
            with torch.autocast("cpu", dtype=torch.float16):
                loss = F.mse_loss(model(x), y)
            scaler.scale(loss / len(group)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        skipped.append(scaler.get_scale() < before)
        for p in model.parameters():
            p.grad = scaler.scale(p.grad * mom) if mom and not skipped[-1] else None
    return model, scaler, skipped


def autocast() -> torch.dtype | None:
    """What this thread computes in."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


class Probed(nn.Module):
    """A model that notes what it is computed in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[torch.dtype | None] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(autocast())
        return self.model(x)


# ---------------------------------------------------------------------------------- autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_prediction_and_loss_are_under_autocast_and_nothing_else_is(
    dtype: torch.dtype, dls: DataLoaders, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    model, in_loss = Probed(make_model()), []

    def loss_func(preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        in_loss.append((autocast(), preds.dtype))
        return F.mse_loss(preds, targets)

    learner = TrainLearner(model, dls, loss_func, LR, MixedTrainingCB(dtype, init_scale=SCALE))
    seen: list[tuple[str, torch.dtype | None]] = []
    learner.subscribe(Event, lambda e: seen.append((type(e).__name__, autocast())), order=100)
    learner.run(1, **backend)

    assert model.seen == [dtype] * 5
    assert in_loss == [(dtype, dtype)] * 5
    batch = [("BeforeBatch", dtype), ("AfterPredict", dtype), ("AfterLoss", None)]
    step = ["AfterBackward", "BeforeStep", "AfterStep", "CleanupStep"]
    end = [("AfterBatch", None), ("CleanupBatch", None)]
    around = [("AfterEpoch", None), ("CleanupEpoch", None)]
    assert seen == [
        *[("BeforeFit", None), ("BeforeEpoch", None)],
        *[*batch, *[(name, None) for name in step], *end] * 3,
        *[*around, ("BeforeEpoch", None)],
        *[*batch, *end] * 2,
        *[*around, ("AfterFit", None), ("CleanupFit", None)],
    ]
    assert autocast() is None


def fail() -> Exception:
    return KeyError("broken")


LEFT_AT = [
    (BeforeBatch, 0),  # before autocast is entered
    (BeforeBatch, 61),
    (AfterPredict, 0),
    (AfterLoss, 0),  # before it is left
    (AfterLoss, 61),
    (AfterBatch, 0),
]


@pytest.mark.parametrize("make", [CancelBatchException, CancelFitException, fail])
@pytest.mark.parametrize(
    ("event_type", "order", "training"),
    [
        *((event_type, order, True) for event_type, order in LEFT_AT),
        (AfterBackward, 0, True),
        (BeforeStep, 61, True),
        *((event_type, order, False) for event_type, order in LEFT_AT),
    ],
)
def test_autocast_is_closed_wherever_the_batch_is_left(
    event_type: type[Event],
    order: int,
    make: Callable[[], BaseException],
    training: bool,
    dls: DataLoaders,
    make_model: MakeModel,
) -> None:
    """G9: looked at in the training thread, where it would stay on."""
    learner = TrainLearner(make_model(), dls, cbs=MixedTrainingCB("bf16"))

    def leave(event: Event) -> None:
        raise make()

    learner.subscribe(event_type, leave, order=order, where=lambda event: event.iter == 1)
    seen = []
    for cleanup in (CleanupBatch, CleanupEpoch, CleanupFit):
        learner.subscribe(cleanup, lambda _: seen.append(autocast()), order=100)
    if make is fail:
        with pytest.raises(KeyError, match="broken"):
            learner.run(1, train=training, valid=not training)
    else:
        learner.run(1, train=training, valid=not training)
    n_batches = 2 if make is not CancelBatchException or not training else 3
    assert seen == [None] * (n_batches + 2)


@pytest.mark.parametrize("where", ["predict", "get_loss"])
def test_autocast_is_closed_when_model_or_loss_fail(
    where: str, dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=MixedTrainingCB("fp16"))

    def broken() -> None:
        raise ZeroDivisionError(where)

    setattr(learner, where, broken)
    seen = []
    learner.subscribe(CleanupBatch, lambda _: seen.append(autocast()), order=100)
    with pytest.raises(ZeroDivisionError, match=where):
        learner.run(1)
    assert seen == [None]


# --------------------------------------------------------------------- who performs the actions


class Counting(TrainLearner):
    calls: Any = ()

    def backward(self) -> None:
        self.calls += ("backward",)
        super().backward()

    def step(self) -> None:
        self.calls += ("step",)
        super().step()


def test_bfloat16_leaves_backward_and_step_to_whoever_performs_them(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    mixed = MixedTrainingCB("bf16")
    learner = Counting(make_model(), dls, cbs=mixed)
    learner.run(1)
    assert learner.calls == ("backward", "step") * 3
    assert mixed.scaler is None


def test_float16_wraps_a_backward_and_a_step_of_the_learners_own(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    """G18."""
    mixed = MixedTrainingCB("fp16", init_scale=SCALE)
    learner = Counting(make_model(), dls, cbs=mixed)
    assert learner.run(1).steps == 3
    assert learner.calls == ("backward", "step") * 3
    assert mixed.scaler is not None
    assert mixed.scaler.get_scale() == SCALE


def test_a_learner_that_never_trained_predicts_and_validates_under_float16(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    """It has no optimizer whose gradients could be scaled."""
    learner = TrainLearner(make_model(), dls, cbs=MixedTrainingCB("fp16"))
    assert anyio.run(learner.validate)["loss"] > 0
    assert len(anyio.run(learner.get_preds)) == 8


# ----------------------------------------------------------------------------------- overflow


def test_a_step_that_overflows_is_skipped_and_says_so(
    make_batches: MakeBatches, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    batches, scale = make_batches(8), 2.0**20
    mixed = MixedTrainingCB("fp16", init_scale=scale)
    learner = TrainLearner(make_model(), DataLoaders(batches), lr=LR, cbs=mixed)
    after_each: list[torch.Tensor] = []
    learner.subscribe(CleanupStep, lambda _: after_each.append(weights(learner.model)), order=100)
    with record_events(learner) as events:
        result = learner.run(1, valid=False, **backend)

    reference, scaler, skipped = by_hand(make_model(), [[b] for b in batches], scale=scale)
    n_skipped = sum(skipped)
    assert 0 < n_skipped < 8
    assert skipped == [True] * n_skipped + [False] * (8 - n_skipped)
    ends = [event.end for event in events if isinstance(event, CleanupStep)]
    assert [(end.status, end.who, end.reason) for end in ends] == [
        *(
            (
                "cancelled",
                "MixedTrainingCB.step",
                "gradients overflowed: step skipped,"
                f" scale {scale / 2**i:g} -> {scale / 2 ** (i + 1):g}",
            )
            for i in range(n_skipped)
        ),
        *[("completed", None, None)] * (8 - n_skipped),
    ]
    assert events.names.count("AfterStep") == 8 - n_skipped
    assert events.names.count("AfterBatch") == 8
    assert mixed.skipped_steps == n_skipped
    assert (result.batches, result.steps) == (8, 8 - n_skipped)
    for seen in after_each[:n_skipped]:
        assert torch.equal(seen, weights(make_model()))
    assert torch.equal(weights(learner.model), weights(reference))
    assert mixed.scaler is not None
    assert mixed.scaler.get_scale() == scaler.get_scale() == scale / 2**n_skipped


def test_one_overflow_in_a_group_skips_the_group(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(6)
    mixed = MixedTrainingCB("fp16", init_scale=SCALE)
    learner = MomentumLearner(
        make_model(), DataLoaders(batches), lr=LR, cbs=[mixed, GradientAccumulationCB(2)]
    )

    @learner.on(AfterBackward, where=lambda event: event.iter == 2)
    def overflow(event: AfterBackward) -> None:
        learner.model.bias.grad += math.inf

    result = learner.run(1, valid=False)
    first = by_hand(make_model(), [batches[:2]])[0]
    # The skipped step forgets momentum: there is none of it that is finite.
    reference = by_hand(first, [batches[4:]])[0]
    assert torch.allclose(weights(learner.model), weights(reference), rtol=1e-4)
    assert (result.steps, mixed.skipped_steps) == (2, 1)
    assert torch.isfinite(gradients(learner.model)).all()


def test_steps_are_skipped_even_when_no_scale_is_left(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    """A loss that is NaN for good halves the scale down to nothing."""
    mixed = MixedTrainingCB("fp16", init_scale=1e-44)
    learner = TrainLearner(
        make_model(), DataLoaders(make_batches(8)), lambda p, y: F.mse_loss(p, y) * math.nan, LR
    )
    result = learner.run(1, valid=False, cbs=mixed)
    assert mixed.scaler is not None
    assert mixed.scaler.get_scale() == 0
    assert (result.steps, mixed.skipped_steps) == (0, 8)
    assert torch.equal(weights(learner.model), weights(make_model()))


# ------------------------------------------------------------------------------ true gradients


def test_receivers_of_before_step_see_unscaled_gradients(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, lr=LR, cbs=MixedTrainingCB("fp16", init_scale=SCALE))
    scaled, unscaled = [], []
    learner.subscribe(AfterBackward, lambda _: scaled.append(gradients(learner.model)))
    learner.subscribe(BeforeStep, lambda _: unscaled.append(gradients(learner.model)), order=61)
    learner.run(1)
    assert len(scaled) == len(unscaled) == 3
    for there, here in zip(scaled, unscaled, strict=True):
        assert torch.equal(there / SCALE, here)
    model, (x, y) = make_model(), dls.train[0]
    F.mse_loss(model(x), y).backward()
    assert torch.allclose(unscaled[0], gradients(model), rtol=1e-2)  # those of float32, about


@pytest.mark.parametrize("order", [61, 80])
@pytest.mark.parametrize("cancel", [CancelStepException, CancelBatchException])
def test_a_step_cancelled_after_unscaling_is_taken_with_the_next_batch(
    cancel: type[CancelException],
    order: int,
    make_batches: MakeBatches,
    make_model: MakeModel,
    backend: dict[str, Any],
) -> None:
    batches = make_batches(4)
    mixed = MixedTrainingCB("fp16", init_scale=SCALE)
    learner = TrainLearner(make_model(), DataLoaders(batches), lr=LR, cbs=mixed)

    @learner.on(BeforeStep, order=order, where=lambda event: event.iter == 1)
    def leave(event: BeforeStep) -> None:
        raise cancel("not now")

    result = learner.run(1, valid=False, **backend)
    assert (result.status, result.steps, mixed.skipped_steps) == ("completed", 3, 0)
    # Nobody zeroed the gradients of batch 1, so its sum with those of batch 2 is stepped with.
    model = by_hand(make_model(), [batches[:1]])[0]
    opt = torch.optim.SGD(model.parameters(), LR)
    for x, y in batches[1:3]:
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.mse_loss(model(x), y)
        loss.mul(SCALE).backward()
    for p in model.parameters():
        p.grad /= SCALE
    opt.step()
    opt.zero_grad()
    reference = by_hand(model, [batches[3:]])[0]
    assert torch.allclose(weights(learner.model), weights(reference), rtol=1e-4)


@pytest.mark.parametrize("end", ["completed", "cancelled", "failed"])
def test_after_any_end_the_gradients_are_true_ones(
    end: str, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    """G9: without the callback, the momentum of the fit can be trained on with."""
    batches = make_batches(4)
    learner = MomentumLearner(make_model(), DataLoaders(batches), lr=LR, mom=0.9)

    def leave(event: AfterBatch) -> None:
        if end == "cancelled":
            raise CancelFitException
        if end == "failed":
            raise KeyError("broken")

    mixed = MixedTrainingCB("fp16", init_scale=SCALE)
    with learner.subscribe(AfterBatch, leave, where=lambda event: event.iter == 3):
        if end == "failed":
            with pytest.raises(KeyError):
                learner.run(1, valid=False, cbs=mixed)
        else:
            assert learner.run(1, valid=False, cbs=mixed).status == end
    reference = by_hand(make_model(), [[b] for b in batches], mom=0.9)[0]
    assert torch.equal(weights(learner.model), weights(reference))
    assert torch.equal(gradients(learner.model), gradients(reference) / SCALE)


def test_momentum_is_carried_from_fit_to_fit(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(3)
    mixed = MixedTrainingCB("fp16", init_scale=SCALE)
    learner = MomentumLearner(make_model(), DataLoaders(batches, batches), lr=LR, cbs=mixed)
    learner.run(1, valid=False)
    learner.run(1, train=False)  # and a fit without steps in between
    learner.run(1, valid=False)
    reference = by_hand(make_model(), [[b] for b in batches] * 2, mom=learner.mom)[0]
    assert torch.equal(weights(learner.model), weights(reference))


def test_a_fit_that_ends_before_it_begins_leaves_the_gradients_as_they_were(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    mixed = MixedTrainingCB("fp16", init_scale=SCALE)
    learner = MomentumLearner(make_model(), DataLoaders(make_batches(3)), lr=LR, cbs=mixed)
    learner.run(1, valid=False)
    carried = gradients(learner.model)

    def leave(event: BeforeFit) -> None:
        raise CancelFitException

    with learner.subscribe(BeforeFit, leave):
        learner.run(1, valid=False)
    assert torch.equal(gradients(learner.model), carried)


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_of_the_list_trains_the_same(
    order: tuple[int, ...], make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(5)
    cbs: list[Callback] = [
        MixedTrainingCB("fp16", init_scale=SCALE),
        GradientClippingCB(0.5),
        GradientAccumulationCB(2),
        MetricsCB(),
    ]
    learner = MomentumLearner(
        make_model(), DataLoaders(batches), lr=LR, cbs=[cbs[i] for i in order], mom=0.9
    )
    learner.run(2, valid=False)
    groups = [batches[:2], batches[2:4], batches[4:]]
    reference = by_hand(make_model(), groups * 2, mom=0.9, clip=0.5)[0]
    assert torch.equal(weights(learner.model), weights(reference))


# ------------------------------------------------------------------------------------ the rest


def test_the_dtype_is_that_of_the_device_or_the_one_asked_for() -> None:
    default = torch.float16 if def_device == "cuda" else torch.bfloat16
    asked = [None, "fp16", "bf16", torch.float16, torch.bfloat16]
    assert [MixedTrainingCB(dtype).dtype for dtype in asked] == [
        default,
        torch.float16,
        torch.bfloat16,
        torch.float16,
        torch.bfloat16,
    ]


@pytest.mark.parametrize("dtype", ["fp32", "float16", "", 16, torch.float32, torch.int8])
def test_another_dtype_is_refused(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"choose 'fp16' or 'bf16'"):
        MixedTrainingCB(dtype)


def test_two_that_scale_are_refused(dls: DataLoaders, make_model: MakeModel) -> None:
    learner = TrainLearner(
        make_model(), dls, cbs=[MixedTrainingCB("fp16"), MixedTrainingCB("fp16")]
    )
    with pytest.raises(ValueError, match="both perform Backward at order 60"):
        learner.run(1)


def test_the_state_is_the_scale_and_the_count_of_skipped_steps(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    mixed = MixedTrainingCB("fp16", init_scale=2.0**20)
    assert mixed.state_dict() == {"skipped_steps": 0}
    assert MixedTrainingCB("bf16").state_dict() == {"skipped_steps": 0}
    TrainLearner(make_model(), DataLoaders(make_batches(8)), cbs=mixed).run(1, valid=False)
    state = mixed.state_dict()
    assert state["skipped_steps"] == mixed.skipped_steps > 0

    resumed = MixedTrainingCB("fp16")
    learner = TrainLearner(make_model(), DataLoaders(make_batches(1)), cbs=resumed)
    learner.subscribe(BeforeFit, lambda _: resumed.load_state_dict(state), order=70)
    seen = []
    learner.subscribe(BeforeFit, lambda _: seen.append(resumed.state_dict()), order=71)
    learner.run(1, valid=False)
    assert seen == [state]
    assert state["scaler"]["scale"] < 2.0**20


async def test_lr_find_leaves_scale_and_counts_as_they_were(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    mixed = MixedTrainingCB("fp16", init_scale=2.0**20)
    learner = TrainLearner(make_model(), DataLoaders(make_batches(8)), cbs=mixed)
    await learner.fit(1, valid=False)
    state = mixed.state_dict()
    mixed.init_scale = 2.0**24  # more to skip
    await learner.lr_find(max_epochs=2)
    assert mixed.state_dict() == state


def test_the_events_are_those_of_a_fit_without_it(dls: DataLoaders, make_model: MakeModel) -> None:
    names = []
    for cbs in ([], [MixedTrainingCB("fp16", init_scale=SCALE)]):
        learner: Learner = TrainLearner(make_model(), dls, cbs=cbs)
        with record_events(learner) as events:
            learner.run(2)
        names.append(events.names)
    assert names[0] == names[1]

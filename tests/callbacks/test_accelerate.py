"""AccelerateCB: Hugging Face's accelerate for the length of a fit, and no trace of it after."""

from __future__ import annotations

import gc
import itertools
import math
import sys
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    AfterFit,
    AfterPredict,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    Callback,
    CancelFitException,
    CancelStepException,
    CleanupEpoch,
    CleanupStep,
    Event,
    record_events,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

pytest.importorskip("accelerate")
from accelerate import optimizer, state

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]
MakeModel = Callable[[], nn.Module]
Digits = tuple[torch.Tensor, torch.Tensor]
LR = 0.05
SCALE = 1024.0


@pytest.fixture(autouse=True)
def _fresh_accelerate() -> Iterator[None]:
    """Its state is one per process, precision included."""
    state.AcceleratorState._reset_state(reset_partial_state=True)
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> Iterator[None]:
    """accelerate collects garbage after every fit: of ours, not of all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def by_hand(
    model: nn.Module,
    groups: list[Batches],
    *,
    dtype: torch.dtype | None = None,
    mom: float = 0.0,
    clip: float = math.inf,
) -> nn.Module:
    """What accelerate does: the model under autocast, the loss in float32."""
    opt = torch.optim.SGD(model.parameters(), LR)
    for group in groups:
        for x, y in group:
            with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                preds = model(x)
            (F.mse_loss(preds.float(), y) / len(group)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        for p in model.parameters():
            p.grad = p.grad * mom if mom else None
    return model


# ------------------------------------------------------------------------------ what it computes


@pytest.mark.parametrize(("precision", "dtype"), [("no", None), ("bf16", torch.bfloat16)])
def test_it_is_all_that_a_plain_learner_needs(
    precision: str,
    dtype: torch.dtype | None,
    make_batches: MakeBatches,
    make_model: MakeModel,
    backend: dict[str, Any],
) -> None:
    batches, metrics = make_batches(3), MetricsCB()
    learner = Learner(
        make_model(), DataLoaders(batches, batches), lr=LR, cbs=[AccelerateCB(precision), metrics]
    )
    result = learner.run(2, **backend)
    reference = by_hand(make_model(), [[b] for b in batches] * 2, dtype=dtype)
    assert torch.equal(weights(learner.model), weights(reference))
    assert (result.steps, result.valid_batches) == (6, 6)
    assert [row["train"] for row in metrics.history] == ["train", "eval"] * 2


def test_it_prepares_a_loader_of_the_host_and_leaves_its_batches_as_they_were(
    digits: Digits, make_cnn: MakeModel
) -> None:
    images, labels = digits
    dataset = TensorDataset(images[:60], labels[:60])
    runs = []
    for cbs in ([], [AccelerateCB("no")]):
        torch.manual_seed(7)
        loader = DataLoader(dataset, 16, shuffle=True)
        learner = TrainLearner(
            make_cnn(), DataLoaders(loader, loader), F.cross_entropy, cbs=[MetricsCB(), *cbs]
        )
        result = learner.run(2)
        runs.append((weights(learner.model), result.history))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_every_fit_has_the_precision_that_was_asked_for(
    precision: str, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    dtype = torch.bfloat16 if precision == "bf16" else None
    batches = make_batches(3)
    learner = MomentumLearner(
        make_model(), DataLoaders(batches, batches), lr=LR, cbs=AccelerateCB(precision), mom=0.9
    )
    seen = set()

    def look(event: AfterPredict) -> None:
        # accelerate hands out float32, with fewer bits in it
        seen.add(bool(torch.equal(learner.preds, learner.preds.bfloat16().float())))

    learner.subscribe(AfterPredict, look)
    for _ in range(3):
        learner.run(1)
    assert seen == {precision == "bf16"}
    reference = by_hand(make_model(), [[b] for b in batches] * 3, dtype=dtype, mom=0.9)
    assert torch.equal(weights(learner.model), weights(reference))  # its momentum is kept, too


@pytest.mark.parametrize("order", list(itertools.permutations(range(4))))
def test_any_order_of_the_list_trains_the_same(
    order: tuple[int, ...], make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(3)
    cbs: list[Callback] = [
        AccelerateCB("bf16"),
        GradientAccumulationCB(2),
        GradientClippingCB(0.5),
        MetricsCB(),
    ]
    learner = Learner(make_model(), DataLoaders(batches), lr=LR, cbs=[cbs[i] for i in order])
    learner.run(2, valid=False)
    groups = [batches[:2], batches[2:]]
    reference = by_hand(make_model(), groups * 2, dtype=torch.bfloat16, clip=0.5)
    assert torch.equal(weights(learner.model), weights(reference))


class Stream(IterableDataset[Any]):
    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_a_loader_without_a_length_is_prepared_too(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(3)
    loader = DataLoader(Stream(batches), batch_size=None)
    learner = TrainLearner(make_model(), DataLoaders(loader), lr=LR, cbs=AccelerateCB("no"))
    result = learner.run(1, valid=False)
    assert result.steps == 3
    reference = by_hand(make_model(), [[b] for b in batches])
    assert torch.equal(weights(learner.model), weights(reference))
    assert learner.dls.train is loader


def test_loaders_may_be_any_object_that_has_what_is_asked_for(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    dls = SimpleNamespace(train=make_batches(3))
    learner = TrainLearner(make_model(), dls, cbs=AccelerateCB("no"))
    assert learner.run(1, valid=False).steps == 3
    assert learner.dls is dls


# ------------------------------------------------------------------------------ before and after


class Ended(Exception):
    """What the host's own code raised."""


def cancelled() -> BaseException:
    return CancelFitException("enough")


def failed() -> BaseException:
    return Ended()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("event_type", "order", "make"),
    [
        (AfterFit, 0, None),
        *(
            (event_type, order, make)
            for event_type, order in [
                (BeforeFit, 0),  # before it has prepared anything
                (BeforeFit, 61),
                (BeforeEpoch, 0),
                (AfterPredict, 0),
                (BeforeStep, 61),
                (AfterBatch, 0),
                (CleanupEpoch, 0),
            ]
            for make in (cancelled, failed)
        ),
    ],
)
def test_after_any_end_everything_is_the_learners_own(
    event_type: type[Event],
    order: int,
    make: Callable[[], BaseException] | None,
    precision: str,
    make_batches: MakeBatches,
    make_model: MakeModel,
) -> None:
    """G9: model, optimizer and loaders; the model without a trace; a fit possible again."""
    model, dls = make_model(), DataLoaders(make_batches(2), make_batches(2))
    cb = AccelerateCB(precision)
    learner = TrainLearner(model, dls, lr=LR, cbs=cb)
    attributes = set(vars(model))
    prepared = []

    @learner.on(BeforeEpoch, order=-1)
    def look(event: BeforeEpoch) -> None:
        own = learner.opt.optimizer
        assert isinstance(learner.opt, optimizer.AcceleratedOptimizer)
        assert learner.dls is not dls
        prepared.append(own)

    def leave(event: Event) -> None:
        if make is not None:
            raise make()

    with learner.subscribe(event_type, leave, order=order):
        if make is failed:
            with pytest.raises(Ended):
                learner.run(1)
        else:
            learner.run(1)
    assert learner.model is model
    assert set(vars(model)) == attributes
    assert learner.dls is dls
    assert type(learner.opt) is torch.optim.SGD
    assert prepared in ([], [learner.opt], [learner.opt] * 2)
    assert cb.accelerator._models == cb.accelerator._optimizers == cb.accelerator._dataloaders == []
    assert learner.run(1).status == "completed"


def test_a_forward_of_the_instance_is_kept(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    model = make_model()
    calls = []

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(torch.is_autocast_enabled("cpu"))
        return F.linear(x, model.weight, model.bias)

    model.forward = forward
    learner = TrainLearner(model, DataLoaders(make_batches(2)), cbs=AccelerateCB("bf16"))
    for _ in range(2):
        learner.run(1, valid=False)
        assert model.forward is forward
    assert calls == [True] * 4


def test_a_model_that_the_host_prepared_stays_prepared(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    cb = AccelerateCB("bf16")
    model = cb.accelerator.prepare(make_model())
    forward = model.forward
    learner = TrainLearner(model, DataLoaders(make_batches(2)), cbs=cb)
    learner.run(1, valid=False)
    assert model.forward is forward
    assert model._is_accelerate_prepared


def test_the_model_is_not_held_when_the_learner_is_gone(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    """G12: accelerate remembers all that it prepared, unless it is told not to."""
    cb = AccelerateCB("bf16")
    learner = TrainLearner(make_model(), DataLoaders(make_batches(2)), cbs=cb)
    learner.run(1, valid=False)
    model, opt = weakref.ref(learner.model), weakref.ref(learner.opt)
    del learner
    gc.collect()
    assert model() is None
    assert opt() is None
    assert cb.accelerator is not None


# ------------------------------------------------------------------------------------ scaling


@pytest.fixture
def fp16() -> AccelerateCB:
    """accelerate refuses float16 on a CPU when it is made; what follows is the same there."""
    cb = AccelerateCB("no")
    cb.accelerator.state._mixed_precision = "fp16"
    cb.accelerator.native_amp = True
    cb.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=SCALE)
    return cb


def test_gradients_are_unscaled_before_the_step(
    fp16: AccelerateCB, make_batches: MakeBatches, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    batches = make_batches(4)
    learner = MomentumLearner(
        make_model(), DataLoaders(batches), lr=LR, cbs=[GradientClippingCB(0.5), fp16], mom=0.9
    )
    scaled, unscaled = [], []
    learner.subscribe(AfterBackward, lambda _: scaled.append(gradients(learner.model)))
    learner.subscribe(BeforeStep, lambda _: unscaled.append(gradients(learner.model)), order=61)
    learner.run(1, valid=False, **backend)
    learner.run(1, valid=False, **backend)  # momentum goes from fit to fit
    for there, here in zip(scaled, unscaled, strict=True):
        assert torch.equal(there / SCALE, here)
    reference = by_hand(
        make_model(), [[b] for b in batches] * 2, dtype=torch.float16, clip=0.5, mom=0.9
    )
    assert torch.allclose(weights(learner.model), weights(reference), rtol=1e-4)
    assert torch.allclose(gradients(learner.model), gradients(reference), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("make", [None, cancelled, failed])
def test_after_any_end_the_gradients_are_true_ones(
    make: Callable[[], BaseException] | None,
    fp16: AccelerateCB,
    make_batches: MakeBatches,
    make_model: MakeModel,
) -> None:
    """G9: without the callback, the momentum of the fit can be trained on with."""
    batches = make_batches(3)
    learner = MomentumLearner(make_model(), DataLoaders(batches), lr=LR, mom=0.9)

    def leave(event: AfterBatch) -> None:
        if make is not None and event.iter == 2:
            raise make()

    with learner.subscribe(AfterBatch, leave):
        if make is failed:
            with pytest.raises(Ended):
                learner.run(1, valid=False, cbs=fp16)
        else:
            learner.run(1, valid=False, cbs=fp16)
    reference = by_hand(make_model(), [[b] for b in batches], dtype=torch.float16, mom=0.9)
    assert torch.allclose(gradients(learner.model), gradients(reference), rtol=1e-3, atol=1e-5)

    def before(event: BeforeFit) -> None:
        raise CancelFitException

    carried = gradients(learner.model)
    with learner.subscribe(BeforeFit, before):  # a fit that ends before it has scaled them
        learner.run(1, valid=False, cbs=fp16)
    assert torch.equal(gradients(learner.model), carried)


def test_a_step_that_overflows_is_skipped_and_says_so(
    fp16: AccelerateCB, make_batches: MakeBatches, make_model: MakeModel, backend: dict[str, Any]
) -> None:
    batches = make_batches(3)
    learner = TrainLearner(make_model(), DataLoaders(batches), lr=LR, cbs=fp16)

    @learner.on(AfterBackward, where=lambda event: event.iter == 1)
    def overflow(event: AfterBackward) -> None:
        learner.model.bias.grad += math.inf

    with record_events(learner) as events:
        result = learner.run(1, valid=False, **backend)
    ends = [event.end for event in events if isinstance(event, CleanupStep)]
    assert [(end.status, end.who, end.reason) for end in ends] == [
        ("completed", None, None),
        ("cancelled", "AccelerateCB.step", "gradients overflowed: step skipped by accelerate"),
        ("completed", None, None),
    ]
    assert events.names.count("AfterStep") == result.steps == 2
    reference = by_hand(make_model(), [[batches[0]], [batches[2]]], dtype=torch.float16)
    assert torch.allclose(weights(learner.model), weights(reference), rtol=1e-4)
    assert fp16.accelerator.scaler.get_scale() == SCALE / 2


def test_a_step_cancelled_after_unscaling_is_taken_with_the_next_batch(
    fp16: AccelerateCB, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(3)
    learner = TrainLearner(make_model(), DataLoaders(batches), lr=LR, cbs=fp16)

    @learner.on(BeforeStep, order=61, where=lambda event: event.iter == 0)
    def leave(event: BeforeStep) -> None:
        raise CancelStepException("not now")

    result = learner.run(1, valid=False)
    assert (result.status, result.steps) == ("completed", 2)
    model = make_model()
    opt = torch.optim.SGD(model.parameters(), LR)
    for group in (batches[:2], batches[2:]):
        for x, y in group:
            with torch.autocast("cpu", dtype=torch.float16):
                preds = model(x)
            F.mse_loss(preds.float(), y).backward()
        opt.step()
        opt.zero_grad()
    assert torch.allclose(weights(learner.model), weights(model), rtol=1e-4)


# ----------------------------------------------------------------------------------- refusals


def test_it_and_mixed_training_are_not_both_to_scale(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=[AccelerateCB("no"), MixedTrainingCB("fp16")])
    with pytest.raises(
        ValueError, match=r"AccelerateCB\.backward and MixedTrainingCB\.backward both perform"
    ):
        learner.run(1)


def test_without_accelerate_installed_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"pip install 'eventrain\[accelerate\]'"):
        AccelerateCB()


def test_the_default_precision_is_that_of_the_device() -> None:
    expected = "fp16" if torch.cuda.is_available() else "no"
    assert AccelerateCB().accelerator.mixed_precision == expected


def test_other_arguments_are_those_of_accelerator() -> None:
    assert AccelerateCB("no", cpu=True, step_scheduler_with_optimizer=False).accelerator.device == (
        torch.device("cpu")
    )
    with pytest.raises(TypeError, match="nonsense"):
        AccelerateCB("no", nonsense=1)

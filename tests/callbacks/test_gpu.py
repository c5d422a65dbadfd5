"""On a real GPU: the loop by hand, metrics that never wait, scaling, pinned memory, checkpoints."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    ChannelLastCB,
    CheckpointCB,
    DeviceCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
    to_cpu,
)
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.engine.checkpoint.snapshot import Snapshot
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    BeforeBatch,
    BeforeStep,
    Callback,
    CleanupBatch,
    CleanupStep,
    record_events,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy, MulticlassAUROC, functional

from tests.support.training import gradients, weights

DEVICE = "cuda"

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA can use"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

Batches = list[tuple[torch.Tensor, torch.Tensor]]
LR = 0.05
SCALE = 1024.0  # a power of two that does not overflow here: scaling changes no bit


def make_model() -> nn.Module:
    """No convolution: matrix products are the same to the bit, run after run."""
    torch.manual_seed(42)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def make_batches(n: int = 6, *, pinned: bool = False) -> Batches:
    """16 samples each, on the host; ten classes that can be told apart."""
    generator = torch.Generator().manual_seed(n)
    centers = torch.randn(10, 64, generator=generator)
    batches = []
    for _ in range(n):
        y = torch.randint(10, (16,), generator=generator)
        x = centers[y] + torch.randn(16, 64, generator=generator)
        batches.append((x.pin_memory(), y.pin_memory()) if pinned else (x, y))
    return batches


def there(batches: Batches) -> Batches:
    return [(x.to(DEVICE), y.to(DEVICE)) for x, y in batches]


def groups_of(batches: Batches, n: int) -> list[Batches]:
    return [batches[i : i + n] for i in range(0, len(batches), n)]


def by_hand(
    groups: list[Batches],
    *,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
    mom: float = 0.0,
    clip: float = math.inf,
    loss_in_float32: bool = False,
) -> tuple[nn.Module, list[bool]]:
    """A training loop in plain PyTorch; returns which of its steps were skipped, too.

    With `loss_in_float32` as accelerate does it: only the model is under autocast.
    """
    model = make_model().to(DEVICE)
    opt = torch.optim.SGD(model.parameters(), LR)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=scale or 1.0, enabled=scale is not None)
    skipped = []
    for group in groups:
        for x, y in there(group):
            with torch.autocast(DEVICE, dtype=dtype, enabled=dtype is not None):
                preds = model(x)
                loss = F.cross_entropy(preds, y)
            if loss_in_float32:
                loss = F.cross_entropy(preds.float(), y)
            scaler.scale(loss / len(group)).backward()
        scaler.unscale_(opt)
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        before = scaler.get_scale()
        scaler.step(opt)
        scaler.update()
        skipped.append(scaler.get_scale() < before)
        for p in model.parameters():
            p.grad = scaler.scale(p.grad * mom) if mom and not skipped[-1] else None
    return model, skipped


# ------------------------------------------------------------------------------------- weights

FP16 = {"dtype": torch.float16, "scale": SCALE}
BF16 = {"dtype": torch.bfloat16}

CASES: dict[str, tuple[list[Callable[[], Callback]], dict[str, Any], int]] = {
    "plain": ([], {}, 1),
    "momentum": ([], {"mom": 0.85}, 1),
    "bf16": ([lambda: MixedTrainingCB("bf16")], BF16, 1),
    "fp16": ([lambda: MixedTrainingCB("fp16", SCALE)], FP16, 1),
    "fp16, momentum": ([lambda: MixedTrainingCB("fp16", SCALE)], {**FP16, "mom": 0.85}, 1),
    "accumulation, clipping, fp16, momentum": (
        [
            lambda: MixedTrainingCB("fp16", SCALE),
            lambda: GradientClippingCB(0.5),
            lambda: GradientAccumulationCB(4),
        ],
        {**FP16, "clip": 0.5, "mom": 0.85},
        4,  # of six batches: a group and a tail
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_the_loop_written_by_hand(case: str, seed: int) -> None:
    """In any order of the list."""
    extra, options, n = CASES[case]
    batches = make_batches()
    cbs = [DeviceCB(DEVICE), MetricsCB(MulticlassAccuracy()), *(make() for make in extra)]
    random.Random(seed).shuffle(cbs)
    learner = MomentumLearner(
        make_model(),
        DataLoaders(batches, batches[:1]),
        F.cross_entropy,
        LR,
        cbs,
        mom=options.get("mom", 0.0),
    )
    result = learner.run(2)
    reference, skipped = by_hand(groups_of(batches, n) * 2, **options)
    assert skipped == [False] * result.steps
    assert {p.device.type for p in learner.model.parameters()} == {DEVICE}
    assert torch.equal(weights(learner.model), weights(reference))
    assert result.history[-1]["loss"] < result.history[1]["loss"]


@pytest.fixture
def accelerate() -> Iterator[None]:
    """Its state is one per process, precision included."""
    pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate")
def test_accelerate_in_fp16_keeps_the_momentum_of_the_learner() -> None:
    """Fit after fit; and afterwards the gradients are true ones."""
    batches = make_batches()
    dataset = TensorDataset(*(torch.cat(column) for column in zip(*batches, strict=True)))
    loader = DataLoader(dataset, 16)
    cb = AccelerateCB("fp16")
    assert cb.accelerator.scaler is not None
    learner = MomentumLearner(
        make_model(), DataLoaders(loader, loader), F.cross_entropy, LR, cb, mom=0.85
    )
    model = learner.model
    scale = cb.accelerator.scaler.get_scale()
    steps = [learner.run(1).steps for _ in range(2)]
    reference, skipped = by_hand(
        [[b] for b in batches] * 2,
        dtype=torch.float16,
        scale=scale,
        mom=0.85,
        loss_in_float32=True,
    )
    assert skipped == [False] * 12
    assert steps == [6, 6]
    assert learner.model is model
    assert torch.allclose(weights(model), weights(reference), rtol=1e-4, atol=1e-6)
    assert torch.allclose(gradients(model), gradients(reference) / scale, rtol=1e-3, atol=1e-6)


def test_the_optimizer_has_the_parameters_that_were_moved() -> None:
    learner = TrainLearner(
        make_model(), DataLoaders(make_batches(1)), F.cross_entropy, LR, DeviceCB(DEVICE)
    )
    learner.run(1, valid=False)
    (group,) = learner.opt.param_groups
    for own, moved in zip(group["params"], learner.model.parameters(), strict=True):
        assert own is moved
        assert moved.device.type == DEVICE


def test_channels_last_and_device_train_a_convolution() -> None:
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 10))
    learner = TrainLearner(model, DataLoaders([(x, y)] * 3), F.cross_entropy, LR)
    learner.add_cbs([ChannelLastCB(), DeviceCB(DEVICE)])
    seen = []

    @learner.on(AfterBatch)
    def look(event: AfterBatch) -> None:
        images = learner.batch[0]
        seen.append((images.device.type, images.is_contiguous(memory_format=torch.channels_last)))

    assert learner.run(1, valid=False).steps == 3
    assert seen == [(DEVICE, True)] * 3


# ------------------------------------------------------------------------------------- waiting


def never_wait(learner: TrainLearner, on: type = BeforeBatch, order: float = -100) -> list[int]:
    """From the second batch on, whatever makes the host wait for the device is an error.

    It is set in the training thread, and reset at the end of the batch. Not for the first batch,
    in which metrics move to the device, and libraries prepare themselves.
    """
    watched: list[int] = []

    def begin(event: Any) -> None:
        if event.iter:
            watched.append(event.iter)
            torch.cuda.set_sync_debug_mode("error")

    learner.subscribe(on, begin, order=order)
    learner.subscribe(CleanupBatch, lambda _: torch.cuda.set_sync_debug_mode(0), order=1000)
    return watched


METRICS: dict[str, Callable[[], MetricsCB]] = {
    "loss": MetricsCB,
    "accuracy": lambda: MetricsCB(MulticlassAccuracy()),
    "accuracy of each class": lambda: MetricsCB(MulticlassAccuracy(average=None, num_classes=10)),
    "stored predictions": lambda: MetricsCB(MulticlassAUROC(num_classes=10)),
}


@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter:UserWarning")
@pytest.mark.parametrize("metrics", METRICS)
@pytest.mark.parametrize("mixed", [False, True])
def test_no_batch_makes_the_host_wait(metrics: str, mixed: bool) -> None:
    """G14: not the loop, the copy of the batch, accumulation, clipping, bf16, nor the metrics."""
    batches = make_batches(pinned=True)
    learner = MomentumLearner(
        make_model(),
        DataLoaders(batches, batches),
        F.cross_entropy,
        LR,
        [
            METRICS[metrics](),
            DeviceCB(DEVICE, non_blocking=True),
            GradientAccumulationCB(2),
            GradientClippingCB(0.5),
            *([MixedTrainingCB("bf16")] if mixed else []),
        ],
    )
    watched = never_wait(learner)
    result = learner.run(2)
    assert (result.status, len(result.history)) == ("completed", 4)
    assert watched == [1, 2, 3, 4, 5] * 4


def test_reading_a_number_does_make_it_wait() -> None:
    """What the test above would say if a callback did so."""
    learner = TrainLearner(make_model().to(DEVICE), DataLoaders(there(make_batches(2))))
    learner.loss_func = F.cross_entropy
    never_wait(learner)
    learner.subscribe(AfterBatch, lambda event: event.loss.item())
    with pytest.raises(RuntimeError, match="synchronizing CUDA operation"):
        learner.run(1, valid=False)
    assert torch.cuda.get_sync_debug_mode() == 0


@pytest.mark.parametrize(
    ("pinned", "non_blocking", "waits"), [(True, True, False), (False, False, True)]
)
def test_a_batch_is_copied_beside_the_host_from_pinned_memory(
    pinned: bool, non_blocking: bool, waits: bool
) -> None:
    batches = make_batches(pinned=pinned)
    learner = TrainLearner(
        make_model(), DataLoaders(batches), F.cross_entropy, LR, DeviceCB(DEVICE, non_blocking)
    )
    watched = never_wait(learner)
    with pytest.raises(RuntimeError, match="synchronizing") if waits else nullcontext():
        learner.run(1, valid=False)
    assert watched == ([1] if waits else [1, 2, 3, 4, 5])
    if not waits:
        reference, _ = by_hand([[b] for b in batches])
        assert torch.equal(weights(learner.model), weights(reference))


# ------------------------------------------------------------------------------------- metrics


def test_metrics_are_accumulated_where_the_predictions_are() -> None:
    batches = make_batches(4)
    metrics = MetricsCB(accuracy=MulticlassAccuracy(), auroc=MulticlassAUROC(num_classes=10))
    learner = TrainLearner(
        make_model(), DataLoaders(valid=batches), F.cross_entropy, LR, [metrics, DeviceCB(DEVICE)]
    )
    preds, targets, losses, places = [], [], [], set()

    @learner.on(AfterBatch, order=1)
    def look(event: AfterBatch) -> None:
        preds.append(to_cpu(learner.preds))
        targets.append(to_cpu(learner.batch[1]))
        losses.append(event.loss.item())
        accuracy, auroc = metrics.metrics.values()
        kept = [accuracy.num_correct, accuracy.num_total, *auroc.inputs, *auroc.targets]
        places.update(t.device.type for t in [*kept, metrics.state_dict()["loss_sum"]])

    learner.run(1, train=False)
    assert places == {DEVICE}
    x, y = torch.cat(preds), torch.cat(targets)
    assert metrics.history == [
        {
            "epoch": 0,
            "train": "eval",
            "accuracy": pytest.approx(functional.multiclass_accuracy(x, y).item(), abs=5e-4),
            "auroc": pytest.approx(
                functional.multiclass_auroc(x, y, num_classes=10).item(), abs=5e-4
            ),
            "loss": pytest.approx(sum(losses) / 4, rel=1e-6),
        }
    ]


def test_no_batch_stays_in_the_memory_of_the_device() -> None:
    """G12: from batch to batch there is not a byte more."""
    batches = make_batches(20)
    learner = TrainLearner(
        make_model(),
        DataLoaders(batches),
        F.cross_entropy,
        LR,
        [DeviceCB(DEVICE), MetricsCB(MulticlassAccuracy())],
    )
    allocated = []
    learner.subscribe(
        BeforeBatch, lambda _: allocated.append(torch.cuda.memory_allocated()), order=-100
    )
    learner.run(1, valid=False)
    assert len(set(allocated[3:])) == 1


# ------------------------------------------------------------------------------------- scaling


def test_a_step_that_overflows_is_skipped_and_says_so() -> None:
    batches, scale = make_batches(24), 2.0**30
    mixed = MixedTrainingCB("fp16", init_scale=scale)
    learner = TrainLearner(
        make_model(), DataLoaders(batches), F.cross_entropy, LR, [mixed, DeviceCB(DEVICE)]
    )
    with record_events(learner) as events:
        result = learner.run(1, valid=False)
    reference, skipped = by_hand([[b] for b in batches], dtype=torch.float16, scale=scale)
    n_skipped = sum(skipped)
    assert 0 < n_skipped < 24
    ends = [event.end for event in events if isinstance(event, CleanupStep)]
    assert [end.status == "cancelled" for end in ends] == skipped
    assert (ends[0].who, ends[0].reason) == (
        "MixedTrainingCB.step",
        f"gradients overflowed: step skipped, scale {scale:g} -> {scale / 2:g}",
    )
    assert (result.batches, result.steps, mixed.skipped_steps) == (24, 24 - n_skipped, n_skipped)
    assert events.names.count("AfterStep") == 24 - n_skipped
    assert torch.equal(weights(learner.model), weights(reference))


def test_receivers_of_before_step_see_unscaled_gradients() -> None:
    learner = TrainLearner(make_model(), DataLoaders(make_batches(3)), F.cross_entropy, LR)
    learner.add_cbs([MixedTrainingCB("fp16", SCALE), DeviceCB(DEVICE)])
    scaled, unscaled = [], []
    learner.subscribe(AfterBackward, lambda _: scaled.append(gradients(learner.model)))
    learner.subscribe(BeforeStep, lambda _: unscaled.append(gradients(learner.model)), order=61)
    learner.run(1, valid=False)
    assert len(scaled) == 3
    for before, after in zip(scaled, unscaled, strict=True):
        assert torch.equal(before / SCALE, after)


# ------------------------------------------------------------------------------------- lr_find


def test_lr_find_restores_the_random_state_of_the_device() -> None:
    """G11: a fit after it, with dropout on the device, is the fit without it."""
    ends = []
    for find in (False, True):
        torch.manual_seed(42)
        model = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
        learner = TrainLearner(
            model, DataLoaders(make_batches()), F.cross_entropy, LR, DeviceCB(DEVICE)
        )
        torch.manual_seed(7)
        if find:
            finder = anyio.run(learner.lr_find)
            assert len(finder.losses) > 5
        learner.run(2, valid=False)
        ends.append(weights(model))
    assert torch.equal(*ends)


# --------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("batches", [2, 6, 8])
def test_a_resumed_fit_is_the_undisturbed_one_to_the_bit(tmp_path: Path, batches: int) -> None:
    """Dropout draws from the device's random state; metrics are on the device."""

    def make() -> TrainLearner:
        torch.manual_seed(42)
        model = nn.Sequential(nn.Linear(64, 32), nn.Dropout(0.5), nn.Linear(32, 10))
        cbs = [DeviceCB(DEVICE), MetricsCB(accuracy=MulticlassAccuracy())]
        opt = torch.optim.AdamW
        return TrainLearner(
            model, DataLoaders(make_batches()), F.cross_entropy, 0.01, cbs, opt_func=opt
        )

    alone = make()
    expected = alone.run(2, valid=False)
    first = make()
    first.subscribe(AfterBatch, lambda event: first.stop(graceful=True), every=batches)
    first.run(2, valid=False, cbs=CheckpointCB(tmp_path))
    again = make()
    torch.cuda.manual_seed(99)
    result = again.run(2, valid=False, resume=tmp_path)
    assert result.history == expected.history
    for one, two in zip(alone.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_a_snapshot_does_not_make_the_host_wait() -> None:
    model = make_model().to(DEVICE)
    Snapshot(model.state_dict()).wait()  # what is done once, is done
    weights = model[0].weight.detach().clone()
    state = model.state_dict()
    torch.cuda.set_sync_debug_mode("error")
    try:
        snapshot = Snapshot(state)
    finally:
        torch.cuda.set_sync_debug_mode(0)
    with torch.no_grad():
        model[0].weight.zero_()  # queued behind the copy
    copy = snapshot.wait()["0.weight"]
    assert copy.is_pinned()
    assert torch.equal(copy, weights.cpu())

"""Weights, to the bit, against plain PyTorch written out by hand."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    ChannelLastCB,
    DeviceCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
    SingleBatchCB,
    SingleEpochCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from eventrain.events import Callback
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy

Digits = tuple[torch.Tensor, torch.Tensor]
LR = 0.1
MOM = 0.85


def loaders(digits: Digits, size: int = 32) -> DataLoaders:
    """Seven shuffled training batches, two for validation."""
    images, labels = digits
    train = TensorDataset(images[:210], labels[:210])
    valid = TensorDataset(images[256:], labels[256:])
    return DataLoaders(DataLoader(train, size, shuffle=True), DataLoader(valid, size))


def by_hand(
    model: nn.Module,
    dls: DataLoaders,
    n_epochs: int = 2,
    *,
    mom: float | None = None,
    clip: float | None = None,
    n: int = 1,
    dtype: torch.dtype | None = None,
    scale: float | None = None,
) -> nn.Module:
    """A training loop in plain PyTorch, with momentum, clipping, accumulation and scaling."""
    opt = torch.optim.SGD(model.parameters(), LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
    for _ in range(n_epochs):
        model.train()
        batches = list(dls.train)
        for start in range(0, len(batches), n):
            group = batches[start : start + n]
            for x, y in group:
                with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
                    loss = F.cross_entropy(model(x), y)
                scaler.scale(loss / len(group)).backward()
            scaler.unscale_(opt)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(opt)
            scaler.update()
            if mom is None:
                opt.zero_grad()
            else:
                for p in model.parameters():
                    p.grad = scaler.scale(p.grad * mom)
        model.eval()
        with torch.no_grad():
            for x, y in dls.valid:
                F.cross_entropy(model(x), y)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} differs by {(p - q).abs().max():.2e}"


def trained(
    learner_type: type[Learner],
    model: nn.Module,
    dls: DataLoaders,
    cbs: list[Callback],
    n_epochs: int = 2,
) -> nn.Module:
    torch.manual_seed(7)
    learner_type(model, dls, F.cross_entropy, LR, cbs).run(n_epochs)
    return model


CASES: dict[str, tuple[type[Learner], Callable[[], list[Callback]], dict[str, Any]]] = {
    "plain": (TrainLearner, list, {}),
    "momentum": (MomentumLearner, list, {"mom": MOM}),
    "single epoch": (MomentumLearner, lambda: [SingleEpochCB()], {"mom": MOM, "n_epochs": 1}),
    "device": (MomentumLearner, lambda: [DeviceCB("cpu")], {"mom": MOM}),
    "TrainCB": (Learner, lambda: [TrainCB(), DeviceCB("cpu")], {}),
    "clipping": (TrainLearner, lambda: [GradientClippingCB(0.1)], {"clip": 0.1}),
    "bf16": (TrainLearner, lambda: [MixedTrainingCB("bf16")], {"dtype": torch.bfloat16}),
    "accelerate": (Learner, lambda: [AccelerateCB("no")], {}),
    "accelerate, momentum": (MomentumLearner, lambda: [AccelerateCB("no")], {"mom": MOM}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_loop_written_by_hand(
    case: str, digits: Digits, make_cnn: Callable[[], nn.Module]
) -> None:
    learner_type, cbs, options = CASES[case]
    ours = trained(learner_type, make_cnn(), loaders(digits), [*cbs(), MetricsCB()])
    reference, dls = make_cnn(), loaders(digits)
    torch.manual_seed(7)
    assert_same(ours, by_hand(reference, dls, **options))


COMBINATIONS = [
    {"n": n, "clip": clip, "mom": mom, **precision}
    for n, clip, mom, precision in itertools.product(
        (1, 2, 3, 7),  # of seven batches: no accumulation, a tail of one, one again, no tail
        (None, 0.1),
        (None, MOM),
        (
            {},
            {"dtype": torch.bfloat16},
            {"dtype": torch.float16, "scale": 1024.0},
        ),
    )
]


@pytest.mark.parametrize(
    "options", COMBINATIONS, ids=lambda o: "-".join(f"{k}={v}" for k, v in o.items())
)
def test_callbacks_in_any_order_compose_to_the_loop_written_by_hand(
    options: dict[str, Any], digits: Digits, make_cnn: Callable[[], nn.Module]
) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    cbs: list[Callback] = [metrics, DeviceCB("cpu")]
    if options["n"] > 1:
        cbs.append(GradientAccumulationCB(options["n"]))
    if options["clip"]:
        cbs.append(GradientClippingCB(options["clip"]))
    if "dtype" in options:
        cbs.append(MixedTrainingCB(options["dtype"], init_scale=options.get("scale", 1.0)))
    random.Random(repr(options)).shuffle(cbs)
    learner_type = MomentumLearner if options["mom"] else TrainLearner
    ours = trained(learner_type, make_cnn(), loaders(digits), cbs)
    reference, dls = make_cnn(), loaders(digits)
    torch.manual_seed(7)
    assert_same(ours, by_hand(reference, dls, **options))
    assert [row["train"] for row in metrics.history] == ["train", "eval"] * 2


def test_single_batch_takes_one_step(digits: Digits, make_cnn: Callable[[], nn.Module]) -> None:
    ours = trained(TrainLearner, make_cnn(), loaders(digits), [SingleBatchCB()])
    reference, dls = make_cnn(), loaders(digits)
    torch.manual_seed(7)
    x, y = next(iter(dls.train))
    opt = torch.optim.SGD(reference.parameters(), LR)
    F.cross_entropy(reference(x), y).backward()
    opt.step()
    assert_same(ours, reference)


@pytest.mark.parametrize("batch_type", [tuple, list])
def test_channels_last_trains_a_model_in_that_format(
    batch_type: type, digits: Digits, make_cnn: Callable[[], nn.Module]
) -> None:
    def as_type(batch: Any) -> Any:
        return batch_type(torch.utils.data.default_collate(batch))

    dls = loaders(digits)
    dls.train = DataLoader(dls.train.dataset, 32, shuffle=True, collate_fn=as_type)
    ours = trained(TrainLearner, make_cnn(), dls, [ChannelLastCB(), DeviceCB("cpu")])

    reference = make_cnn().to(memory_format=torch.channels_last)
    opt = torch.optim.SGD(reference.parameters(), LR)
    torch.manual_seed(7)
    for _ in range(2):
        for x, y in dls.train:
            x = x.contiguous(memory_format=torch.channels_last)
            F.cross_entropy(reference(x), y).backward()
            opt.step()
            opt.zero_grad()
        list(dls.valid)  # draws a seed from the global random state, as any loader does
    assert_same(ours, reference)

"""The duration of the post's whole training, by hand and with eventrain, and ways to shorten it.

Epochs of the post's CNN on Fashion-MNIST, training and validation, with SGD, the post's momentum,
the accuracy and the mean loss; by hand they are measured as in the post. The time includes the
creation of the loaders. The contenders of the first table must have the same results: weights to
the bit, accuracies exactly, losses within 1e-4. Those of the second may change the results. All
have trained once before: that first fit, which includes any compilation, has its own column.

The remarks in `benchmarks.overhead` on glibc, and in `benchmarks.data` on busy cores, apply here.
"""

from __future__ import annotations

import argparse
import gc
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from eventrain.callbacks import (
    ChannelLastCB,
    CompileCB,
    DeviceCB,
    MetricsCB,
    MixedTrainingCB,
    to_cpu,
    to_device,
)
from eventrain.engine import DataLoaders, MomentumLearner
from eventrain.events import Callback
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torcheval.metrics import Mean, MulticlassAccuracy
from torchvision.datasets import FashionMNIST

from examples.datasets import BATCH_SIZE, get_model

from .data import SEED, add_data_arguments, fashion_mnist
from .report import Report, Table, interleaved, over

LR, MOMENTUM = 0.1, 0.85
Numbers = list[dict[str, Any]]
"""The "accuracy" and the "loss" of every epoch and phase."""
Load = Callable[[FashionMNIST, FashionMNIST, str], DataLoaders]
Train = Callable[[nn.Module, DataLoaders, str, int], Numbers]
Contender = tuple[Load, Train]


class Fit(NamedTuple):
    """The duration of a fit, its metrics, and its final weights."""

    seconds: float
    numbers: Numbers
    weights: dict[str, torch.Tensor]


def of_the_post(train: FashionMNIST, valid: FashionMNIST, device: str) -> DataLoaders:
    """Return the post's own loaders."""
    shuffled = DataLoader(train, BATCH_SIZE, shuffle=True)
    return DataLoaders(shuffled, DataLoader(valid, BATCH_SIZE))


def from_dataset(train: FashionMNIST, valid: FashionMNIST, device: str) -> DataLoaders:
    """Return the engine's loaders for the same datasets."""
    with capture_logs():  # about the way that it chose
        return DataLoaders.from_dataset(train, valid, BATCH_SIZE, device=device)


def by_hand(model: nn.Module, dls: DataLoaders, device: str, epochs: int) -> Numbers:
    """Train with the post's loop in plain PyTorch; its metrics copy every batch to the CPU."""
    opt, mean, metric = torch.optim.SGD(model.parameters(), LR), Mean(), MulticlassAccuracy()
    numbers: Numbers = []
    model.to(device)
    for training in [True, False] * epochs:
        loader: Any = dls.train if training else dls.valid
        model.train(training)
        mean.reset()
        metric.reset()
        with torch.set_grad_enabled(training):
            for batch in loader:
                x, y = to_device(batch, device)
                preds = model(x)
                loss = F.cross_entropy(preds, y)
                if training:
                    loss.backward()
                    opt.step()
                    for p in model.parameters():
                        if p.grad is not None:
                            p.grad *= MOMENTUM
                metric.update(to_cpu(preds), to_cpu(y))
                mean.update(to_cpu(loss), weight=len(x))
        numbers.append({"accuracy": float(metric.compute()), "loss": float(mean.compute())})
    return numbers


def eventrain(*cbs: Callable[[], Callback]) -> Train:
    """Return the training of a MomentumLearner with MetricsCB, DeviceCB, and other callbacks."""

    def train(model: nn.Module, dls: DataLoaders, device: str, epochs: int) -> Numbers:
        metrics = MetricsCB(accuracy=MulticlassAccuracy())
        learner = MomentumLearner(model, dls, F.cross_entropy, LR, metrics, mom=MOMENTUM)
        learner.run(epochs, cbs=[DeviceCB(device), *(make() for make in cbs)])
        return metrics.history

    return train


BY_HAND, EVENTRAIN = "by hand, the post's DataLoaders", "eventrain, DataLoaders.from_dataset"
EQUAL: dict[str, Contender] = {
    BY_HAND: (of_the_post, by_hand),
    f"{BY_HAND}, again": (of_the_post, by_hand),
    "by hand, DataLoaders.from_dataset": (from_dataset, by_hand),
    "eventrain, the post's DataLoaders": (of_the_post, eventrain()),
    EVENTRAIN: (from_dataset, eventrain()),
}
BF16 = partial(MixedTrainingCB, "bf16")
CHANGED: dict[str, Contender] = {
    "ChannelLastCB()": (from_dataset, eventrain(ChannelLastCB)),
    "CompileCB()": (from_dataset, eventrain(CompileCB)),
    'MixedTrainingCB("bf16")': (from_dataset, eventrain(BF16)),
}
CHANGED_ON_GPU = {"channels last and bf16": (from_dataset, eventrain(ChannelLastCB, BF16))}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_data_arguments(parser)
    parser.add_argument("--epochs", type=int, default=2, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--device", default="cpu", help="default: cpu")


def run(args: argparse.Namespace) -> Report:
    """Train with all contenders."""
    data = fashion_mnist(args, train=True), fashion_mnist(args, train=False)
    changed = CHANGED | (CHANGED_ON_GPU if args.device != "cpu" else {})
    report, first, turns = Report("endtoend"), dict[str, Fit](), dict[str, Callable[[], float]]()
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        for name, contender in (EQUAL | changed).items():
            train = partial(_fit, *contender, *data, args.device, args.epochs)
            try:
                first[name] = train()
            except RuntimeError as exc:
                if name in EQUAL:
                    raise
                report.notes.append(f"Left out: {name}, as {' '.join(str(exc).split())}")
            else:
                right = first[BY_HAND] if name in EQUAL else None
                turns[name] = partial(_turn, name, train, right)
        times = interleaved(turns, args.repeats)

    trained = f"{args.epochs} epochs of {len(data[0])} images on {args.device}"
    for title, base, rows in (
        ("The same to the bit", BY_HAND, list(EQUAL)),
        ("What may change the numbers", EVENTRAIN, [EVENTRAIN, *changed]),
    ):
        speed = f"as fast as {base}, median"
        columns = ("contender", "first fit, s", "seconds, least", speed, "accuracy", "loss")
        table = Table(f"{title}: {trained}, {args.repeats} repeats in turn", columns)
        for name in [name for name in rows if name in times]:
            fit, ratio = first[name], over(times[base], times[name])[2]
            last = fit.numbers[-1]["accuracy"], fit.numbers[-1]["loss"]
            table.rows.append((name, fit.seconds, min(times[name]), ratio, *last))
        report.tables.append(table)
    report.notes.append("Accuracy and loss are those of the last validation.")
    return report


def _fit(
    load: Load, fit: Train, train: FashionMNIST, valid: FashionMNIST, device: str, epochs: int
) -> Fit:
    gc.collect()  # garbage of the previous turn
    torch.manual_seed(SEED)
    model = get_model()
    start = time.perf_counter()
    dls = load(train, valid, device)
    torch.manual_seed(SEED)
    numbers = fit(model, dls, device, epochs)
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return Fit(time.perf_counter() - start, numbers, model.state_dict())


def _turn(name: str, train: Callable[[], Fit], right: Fit | None) -> float:
    """Return the seconds of a fit, whose results must be those of `right`."""
    fit = train()
    if right is None:
        return fit.seconds
    for key, value in fit.weights.items():
        assert torch.equal(value, right.weights[key]), f"{name} ends with other weights"
    for mine, its in zip(fit.numbers, right.numbers, strict=True):
        for key, tolerance in {"accuracy": 0, "loss": 1e-4}.items():
            message = f"{name}: {key} {mine[key]}, not {its[key]}"
            assert math.isclose(mine[key], its[key], rel_tol=tolerance), message
    return fit.seconds

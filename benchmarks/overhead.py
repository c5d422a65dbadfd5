"""What the engine costs over a loop written by hand: python -m benchmarks.overhead.

Every contender trains the same model on the same batches in memory, in turn, many times, in
one process; all must end with the same weights. A figure is the time per batch over the loop
written by hand, by the minimum and by the median of all repeats: absolute times mean little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from tempfile import mkdtemp

import torch
from eventrain.callbacks import (
    MetricsCB,
    OpenTelemetryCB,
    PrometheusCB,
    StructlogCB,
    TensorBoardCB,
)
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, AfterLoss
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from torch import nn
from torch.nn import functional as F
from torcheval.metrics import Mean

from examples.datasets import get_model

Batches = list[tuple[torch.Tensor, torch.Tensor]]
LR = 0.01


def linear() -> tuple[nn.Module, Batches, int]:
    """The smallest model: nn.Linear(4, 2) on batches of 8, in memory."""
    batch = torch.randn(8, 4), torch.randn(8, 2)
    return nn.Linear(4, 2), [batch] * 2000, 2000


def cnn() -> tuple[nn.Module, Batches, int]:
    """The post's CNN on batches of 64 images of 28x28."""
    batch = torch.randn(64, 1, 28, 28), torch.randn(64, 10)
    return get_model(), [batch] * 100, 100


def by_hand(model: nn.Module, batches: Batches) -> float:
    """Plain PyTorch."""
    opt = torch.optim.SGD(model.parameters(), LR)
    start = time.perf_counter()
    model.train()
    for x, y in batches:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return time.perf_counter() - start


def by_hand_with_metrics(model: nn.Module, batches: Batches) -> float:
    """Plain PyTorch that updates torcheval's Mean of the loss every batch."""
    opt = torch.optim.SGD(model.parameters(), LR)
    mean = Mean()
    start = time.perf_counter()
    model.train()
    for x, y in batches:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        mean.update(loss.detach(), weight=len(x))
    mean.compute()
    return time.perf_counter() - start


def engine(prepare: Callable[[TrainLearner], object]) -> Callable[[nn.Module, Batches], float]:
    """A TrainLearner that `prepare` has attached something to."""

    def run(model: nn.Module, batches: Batches) -> float:
        learner = TrainLearner(model, DataLoaders(batches), lr=LR)
        prepare(learner)
        return learner.run(1, valid=False).seconds

    return run


def _subscribe(n: int) -> Callable[[TrainLearner], None]:
    def prepare(learner: TrainLearner) -> None:
        for _ in range(n):
            learner.subscribe(AfterBatch, lambda event: None)

    return prepare


def _observers(learner: TrainLearner) -> None:
    """All that report a run, as a service would set them up."""
    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    learner.add_cbs(
        [
            StructlogCB(format="json", file=open("/dev/null", "w")),  # noqa: SIM115
            OpenTelemetryCB(tracer_provider=provider, meter_provider=MeterProvider()),
            PrometheusCB(CollectorRegistry()),
            TensorBoardCB(mkdtemp()),
        ]
    )


def _everywhere(learner: TrainLearner) -> None:
    for event_type in (AfterBatch, AfterLoss):
        learner.subscribe(event_type, lambda event: None)


CONTENDERS: dict[str, Callable[[nn.Module, Batches], float]] = {
    "by hand": by_hand,
    "by hand, again": by_hand,
    "eventrain, no subscriber": engine(lambda learner: None),
    "eventrain, 1 receiver": engine(_subscribe(1)),
    "eventrain, 8 receivers of one event": engine(_subscribe(8)),
    "eventrain, 2 receivers of two events": engine(_everywhere),
    "by hand, updating torcheval's Mean": by_hand_with_metrics,
    "eventrain, MetricsCB": engine(lambda learner: learner.add_cbs(MetricsCB())),
    "eventrain, StructlogCB": engine(
        lambda learner: learner.add_cbs(StructlogCB(format="json", file=open("/dev/null", "w")))  # noqa: SIM115
    ),
    "eventrain, logs, traces, Prometheus and TensorBoard": engine(_observers),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="benchmarks.overhead", description=__doc__)
    parser.add_argument("--model", choices=["linear", "cnn"], default="linear")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), help="names, or parts")
    args = parser.parse_args()
    torch.manual_seed(0)
    model, batches, n = {"linear": linear, "cnn": cnn}[args.model]()
    start = {k: v.clone() for k, v in model.state_dict().items()}

    chosen = {
        name: contender
        for name, contender in CONTENDERS.items()
        if name == "by hand" or any(part in name for part in args.only)
    }
    times: dict[str, list[float]] = {name: [] for name in chosen}
    reference: dict[str, torch.Tensor] = {}
    for _ in range(args.repeats):
        for name, contender in chosen.items():
            model.load_state_dict(start)
            times[name].append(contender(model, batches) / n * 1e6)
            reference = reference or {k: v.clone() for k, v in model.state_dict().items()}
            for key, value in model.state_dict().items():
                assert torch.equal(value, reference[key]), f"{name} ends with other weights"

    base = times["by hand"]
    print(f"{args.model}: {args.repeats} interleaved repeats of {n} batches")
    print(f"by hand: {min(base):.0f} us a batch by minima, {statistics.median(base):.0f} median\n")
    print("| over the loop by hand, us a batch | by minima | paired median | median ratio |")
    print("|---|---|---|---|")
    for name, measured in times.items():
        over = statistics.median(a - b for a, b in zip(measured, base, strict=True))
        ratio = statistics.median(a / b for a, b in zip(measured, base, strict=True))
        print(f"| {name} | {min(measured) - min(base):+.1f} | {over:+.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()

"""The cost of the engine, and of other libraries, over a loop written by hand.

The contenders train the same model on the same batches in memory. They take turns, many times, in
one process. All must end with the same weights, and all metrics must have the same values. Figures
are times per batch over a loop written by hand. The time of eventrain is that of the whole fit,
including the start and the end of its thread; the clocks of the others run in their loops only. On
a GPU, the time is that which the host takes to launch the work of the GPU.

With --model cnn, the largest differences are caused by glibc, which returns freed memory to the
system and requests it again, thousands of pages per batch, sometimes for one contender, sometimes
for another. MALLOC_TRIM_THRESHOLD_=1000000000 MALLOC_MMAP_THRESHOLD_=33554432 in the environment
prevent that.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from eventrain.callbacks import (
    MetricsCB,
    OpenTelemetryCB,
    PrometheusCB,
    StructlogCB,
    TensorBoardCB,
)
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch

from .by_hand import (
    CALLS,
    LR,
    Outcome,
    Task,
    by_hand,
    by_hand_calling,
    by_hand_with_mean,
    by_hand_with_metric,
    cnn,
    empty_function,
    linear,
    torcheval,
)
from .peers import PEERS, quiet
from .report import Cell, Report, Table, interleaved, over

Contender = Callable[[Task], Outcome]
COLUMNS = ("us a batch", "over", "by minima", "paired median", "median ratio")


def eventrain(prepare: Callable[[TrainLearner, Task, ExitStack], object]) -> Contender:
    """Return a contender: a TrainLearner to which `prepare` attaches something."""

    def train(task: Task) -> Outcome:
        with ExitStack() as stack:
            learner = TrainLearner(task.model, DataLoaders(task.batches), task.loss_func, LR)
            prepare(learner, task, stack)
            result = learner.run(1, valid=False)
        return Outcome(result.seconds, result.history[0] if result.history else {})

    return train


def peer(train: Callable[[Task, bool], Outcome], measured: bool) -> Contender:
    """Return a contender of `benchmarks.peers`, without its output."""

    def quietly(task: Task) -> Outcome:
        with quiet():
            return train(task, measured)

    return quietly


def _receivers(n: int) -> Contender:
    def subscribe(learner: TrainLearner, task: Task, stack: ExitStack) -> None:
        for _ in range(n):
            learner.subscribe(AfterBatch, empty_function())

    return eventrain(subscribe)


def _mean(learner: TrainLearner, task: Task, stack: ExitStack) -> None:
    learner.add_cbs(MetricsCB())


def _metric(learner: TrainLearner, task: Task, stack: ExitStack) -> None:
    learner.add_cbs(MetricsCB(metric=torcheval(task)[1]))


def _logs(learner: TrainLearner, task: Task, stack: ExitStack) -> None:
    file = stack.enter_context(open(os.devnull, "w"))  # noqa: SIM115 - closed by the stack
    learner.add_cbs(StructlogCB(format="json", file=file))


def _observers(learner: TrainLearner, task: Task, stack: ExitStack) -> None:
    """Add all callbacks that report a run, as a service would set them up."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from prometheus_client import CollectorRegistry

    tracers, meters = TracerProvider(shutdown_on_exit=False), MeterProvider(shutdown_on_exit=False)
    tracers.add_span_processor(BatchSpanProcessor(InMemorySpanExporter()))
    stack.callback(tracers.shutdown)
    stack.callback(meters.shutdown)
    folder = stack.enter_context(TemporaryDirectory())
    _logs(learner, task, stack)
    learner.add_cbs(
        [
            OpenTelemetryCB(tracer_provider=tracers, meter_provider=meters),
            PrometheusCB(CollectorRegistry()),
            TensorBoardCB(folder),
        ]
    )


PLAIN, MEAN, METRIC = "by hand", "by hand, Mean", "by hand, Mean and metric"
BASES: dict[str, Contender] = {
    PLAIN: by_hand,
    MEAN: by_hand_with_mean,
    METRIC: by_hand_with_metric,
}
CALLING, ONE, ALL = (
    f"by hand, calling {CALLS} empty functions",
    "eventrain, 1 receiver",
    f"eventrain, {CALLS} receivers of one event",
)
Rows = dict[str, tuple[Contender, str]]  # the second is the base that the row is compared with
ENGINE: Rows = {
    "by hand, again": (by_hand, PLAIN),
    CALLING: (by_hand_calling, PLAIN),
    "eventrain": (eventrain(lambda *_: None), PLAIN),
    ONE: (_receivers(1), PLAIN),
    ALL: (_receivers(CALLS), PLAIN),
    "eventrain, StructlogCB": (eventrain(_logs), PLAIN),
    "eventrain, logs, OTel, Prometheus and TensorBoard": (eventrain(_observers), PLAIN),
}
METRICS: Rows = {
    "eventrain, MetricsCB()": (eventrain(_mean), MEAN),
    "eventrain, MetricsCB(metric)": (eventrain(_metric), METRIC),
}
OTHERS: Rows = {
    "eventrain": ENGINE["eventrain"],
    **{name: (peer(train, measured=False), PLAIN) for name, train in PEERS.items()},
    "eventrain, MetricsCB(metric)": METRICS["eventrain, MetricsCB(metric)"],
    **{f"{name}, its metrics": (peer(train, True), METRIC) for name, train in PEERS.items()},
}
OWN = {"The engine": ENGINE, "Its metrics": METRICS}
TABLES = {**OWN, "Other libraries": OTHERS}
MODELS = {"linear": linear, "cnn": cnn}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--model", choices=list(MODELS), default="linear")
    parser.add_argument("--device", default="cpu", help="default: cpu; others have no peers")
    parser.add_argument("--batches", type=int, metavar="N", help="default: 2000, or 100 for cnn")
    parser.add_argument("--repeats", type=int, default=20, metavar="N")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="parts of names")


def run(args: argparse.Namespace) -> Report:
    """Time all contenders."""
    torch.manual_seed(0)
    n = args.batches or (2000 if args.model == "linear" else 100)
    task, report = MODELS[args.model](n, args.device), Report("overhead")
    tables = TABLES if args.device == "cpu" else OWN  # the peers are set up for the CPU
    contenders = _chosen(args.only, tables, task, report)
    trained = _fresh(task)
    numbers = by_hand_with_metric(trained).numbers
    turns = {
        name: partial(_turn, name, contender, task, trained, numbers)
        for name, contender in contenders.items()
    }
    gc.freeze()  # so that no turn scans the objects of the libraries for garbage
    try:
        times = interleaved(turns, args.repeats)
    finally:
        gc.unfreeze()

    about = f"{args.model} on {args.device}, {args.repeats} repeats in turn of {n} batches"
    for title, rows in tables.items():
        table = Table(f"{title}: {about}", COLUMNS)
        for name, (_, base) in rows.items():
            if name in times:
                table.rows.append((name, base, *over(times[name], times[base])))
        if table.rows:
            report.tables.append(table)
    if {CALLING, ONE, ALL} <= set(times):
        report.tables[0].rows.append(_one_receiver(times))
        report.notes.append(
            f"The last row of the first table is ({CALLS} receivers - 1) / {CALLS - 1} - "
            f"({CALLS} calls by hand - none) / {CALLS}, by minima."
        )
    low, middle = min(times[PLAIN]), statistics.median(times[PLAIN])
    report.notes.append(
        f"The loop by hand took {low:.4g} us per batch by minima, {middle:.4g} median."
    )
    return report


def _fresh(task: Task, batches: int | None = None) -> Task:
    return replace(task, model=deepcopy(task.model), batches=task.batches[:batches])


def _chosen(
    only: Sequence[str], tables: Mapping[str, Rows], task: Task, report: Report
) -> dict[str, Contender]:
    """Return the installed contenders that `only` selects; each has run once, on two batches."""
    rows = {name: row for table in tables.values() for name, row in table.items()}
    for part in only:
        if not any(part in name for name in rows):
            raise SystemExit(f"--only {part!r} is not part of any of {', '.join(map(repr, rows))}")
    chosen = dict(BASES)
    for name, (contender, _) in rows.items():
        if not any(part in name for part in only):
            continue
        try:
            contender(_fresh(task, batches=2))
            chosen[name] = contender
        except ImportError as exc:
            missing = exc.name and exc.name.partition(".")[0]
            why = f"{missing} is not installed: pip install 'eventrain[bench]'" if missing else exc
            report.notes.append(f"{name}: {why}")
    return chosen


def _turn(
    name: str, contender: Contender, task: Task, trained: Task, numbers: Mapping[str, Any]
) -> float:
    """Return microseconds per batch; the results must be those of the loop by hand."""
    mine = _fresh(task)
    gc.collect()  # garbage of the previous turn
    outcome = contender(mine)
    weights = trained.model.state_dict()
    for key, value in mine.model.state_dict().items():
        assert torch.equal(value, weights[key]), f"{name} ends with other weights"
    for key in numbers.keys() & outcome.numbers.keys():
        measured, right = float(outcome.numbers[key]), float(numbers[key])
        assert math.isclose(measured, right, rel_tol=1e-4), f"{name}: {key} {measured}, not {right}"
    return outcome.seconds / len(task.batches) * 1e6


def _one_receiver(times: Mapping[str, Sequence[float]]) -> tuple[Cell, ...]:
    """Return the row with the cost of one receiver, in its place in the order, over a call."""
    plain, calling, one, many = (min(times[name]) for name in (PLAIN, CALLING, ONE, ALL))
    cost = (many - one) / (CALLS - 1) - (calling - plain) / CALLS
    return "one receiver, beyond its own body", "an empty call by hand", cost, None, None

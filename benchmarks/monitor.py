"""The speed, the delay and the cost of watching a training: by events, logs and ticks.

While a model trains, observers receive its events and a log writes one line per batch to a file. A
tick of 1 ms on the host's event loop shows how late other tasks get their turn. Every training must
end with the weights of a loop by hand, watched or not. The cost of watching is measured from
BeforeFit to AfterFit; the rates also count events that are delivered later.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import torch
from eventrain.callbacks import StructlogCB
from eventrain.engine import DataLoaders, Observer, TrainLearner
from eventrain.events import AfterBatch, AfterFit, BeforeFit, Event
from structlog.testing import capture_logs
from torch import nn

from .by_hand import LR, Task, by_hand, cnn, linear
from .host import BACKENDS, delivery_rate, milliseconds, tick_during
from .report import Cell, Report, Table, interleaved, over

MODELS = {"linear": (linear, 3000), "cnn": (cnn, 100)}
ALONE = 50_000
"""Events in the buffer that the host empties while nothing trains."""
PATIENCE = 60.0
"""Seconds after a fit in which events left in the buffers may still be delivered."""
RATE_AND_DELAY = ("events or lines a second", "dropped, %", "delay p50, ms", "p99, ms")


Attach = Callable[["Watch", TrainLearner, ExitStack], object]


@dataclass
class Watch:
    """One way to watch a training, and its results over all runs.

    Attributes:
        attach: attaches it to a learner, and puts checks to make after the fit on the stack.
        seconds: duration of its fits, including the last delivery.
        delivered: events that it received, or lines that it wrote.
        dropped: events that it lost.
        delays: seconds from the creation of each event to its delivery.
    """

    attach: Attach
    seconds: float = 0.0
    delivered: int = 0
    dropped: int = 0
    delays: list[float] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """Observe one event."""
        self.delays.append(time.time() - event.time)
        self.delivered += 1

    def train(self, task: Task, trained: Task, backend: dict[str, Any]) -> float:
        """Return microseconds per batch of one fit; the weights must be those of `trained`."""
        moments: list[float] = []
        learner = _learner(task)
        for moment in (BeforeFit, AfterFit):
            learner.subscribe(moment, lambda event: moments.append(time.perf_counter()))
        gc.collect()  # garbage of the previous turn
        with ExitStack() as stack:
            self.attach(self, learner, stack)
            result = learner.run(1, valid=False, **backend)
        self.seconds += result.seconds
        self.dropped += sum(result.dropped.values())
        for mine, right in zip(learner.model.parameters(), trained.model.parameters(), strict=True):
            assert torch.equal(mine, right), "a watched training ends with other weights"
        began, ended = moments
        return (ended - began) / len(task.batches) * 1e6

    def found(self) -> list[Cell]:
        """Return its cells in the table."""
        if not self.delivered:
            return [None for _ in RATE_AND_DELAY]
        share = 100 * self.dropped / (self.delivered + self.dropped)
        return [self.delivered / self.seconds, share, *milliseconds(self.delays, 0.5, 0.99)]


def nothing(watch: Watch, learner: TrainLearner, stack: ExitStack) -> None:
    """The training alone."""


def batches(watch: Watch, learner: TrainLearner, stack: ExitStack) -> None:
    """An observer of one event per batch."""
    stack.callback(_check_counts, learner.observe(watch.take, AfterBatch))


def every_event(watch: Watch, learner: TrainLearner, stack: ExitStack) -> None:
    """An observer of all events, with the default buffer and policy."""
    stack.callback(_check_counts, learner.observe(watch.take, Event))


def lossless(watch: Watch, learner: TrainLearner, stack: ExitStack) -> None:
    """The same, but it slows the training rather than lose an event."""
    observer = learner.observe(watch.take, Event, overflow="block")
    stack.callback(_check_counts, observer, loses=False)


def log(watch: Watch, learner: TrainLearner, stack: ExitStack) -> None:
    """One JSON line per batch, in a real file."""
    path = Path(stack.enter_context(TemporaryDirectory())) / "training.jsonl"
    stack.callback(_check_lines, path, learner, watch)
    file = stack.enter_context(path.open("w"))
    learner.add_cbs(StructlogCB(every=1, format="json", file=file))


WATCHES = {
    "nothing": nothing,
    "nothing, again": nothing,
    "an observer of AfterBatch": batches,
    "an observer of every event, 'drop_oldest'": every_event,
    "an observer of every event, 'block'": lossless,
    "StructlogCB, a JSON line a batch to a file": log,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    default = ", ".join(f"{n} for {name}" for name, (_, n) in MODELS.items())
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--batches", type=int, metavar="N", help=f"default: {default}")
    parser.add_argument("--repeats", type=int, default=10, metavar="N")
    parser.add_argument("--backend", choices=list(BACKENDS), default="asyncio")


def run(args: argparse.Namespace) -> Report:
    """Watch the models train, then measure what the event loop can take on its own."""
    torch.manual_seed(0)
    report = Report("monitor")
    with capture_logs():  # about dropped events, which are in the tables
        for name in args.model:
            make, n = MODELS[name]
            n = args.batches or n
            about = f"{name}, {args.backend}, {args.repeats} repeats in turn of {n} batches"
            for measure in (_watching, _ticks):
                report.tables.append(measure(make(n), about, args.repeats, BACKENDS[args.backend]))
        n = min(ALONE, 10 * args.batches) if args.batches else ALONE
        report.tables.append(_host_alone(n, args.repeats, BACKENDS[args.backend]))
    return report


def _watching(task: Task, about: str, repeats: int, backend: dict[str, Any]) -> Table:
    trained = replace(task, model=deepcopy(task.model))
    by_hand(trained)
    watches = {name: Watch(attach) for name, attach in WATCHES.items()}
    turns = {name: partial(w.train, task, trained, backend) for name, w in watches.items()}
    times = interleaved(turns, repeats)
    columns = ("us a batch over nothing", "by minima", "paired median", "median ratio")
    table = Table(f"Watching: {about}", (*columns, *RATE_AND_DELAY))
    for name, watch in watches.items():
        table.rows.append((name, *over(times[name], times["nothing"]), *watch.found()))
    return table


def _ticks(task: Task, about: str, repeats: int, backend: dict[str, Any]) -> Table:
    seconds = by_hand(replace(task, model=deepcopy(task.model))).seconds
    works: dict[str, Callable[[], Awaitable[object]]] = {
        "no training": partial(anyio.sleep, seconds),
        "training": partial(_fit, task),
        "training, every event observed, a line a batch": partial(_fit, task, every_event, log),
    }
    late: dict[str, list[float]] = {name: [] for name in works}
    turns = {
        name: partial(anyio.run, tick_during, work, late[name], **backend)
        for name, work in works.items()
    }
    interleaved(turns, repeats)
    table = Table(f"Ticks: {about}", ("a tick of 1 ms is late by, ms", "p50", "p99", "max"))
    table.rows += [(name, *milliseconds(values, 0.5, 0.99, 1)) for name, values in late.items()]
    return table


async def _fit(task: Task, *attach: Attach) -> None:
    learner = _learner(task)
    with ExitStack() as stack:
        for each in attach:
            each(Watch(each), learner, stack)
        await learner.fit(1, valid=False)


def _host_alone(n: int, repeats: int, backend: dict[str, Any]) -> Table:
    turns = {
        "events to an observer": partial(_rate, n, False, backend),
        "JSON lines to a file": partial(_rate, n, True, backend),
    }
    rates = interleaved(turns, repeats)
    table = Table(f"The host alone: {repeats} repeats in turn of {n}", ("a second", "most"))
    table.rows += [(name, max(measured)) for name, measured in rates.items()]
    return table


def _rate(n: int, logged: bool, backend: dict[str, Any]) -> float:
    learner = TrainLearner(nn.Linear(4, 2))
    with TemporaryDirectory() as folder, Path(folder, "log").open("w") as file:
        if logged:
            learner.add_cbs(StructlogCB(every=1, format="json", file=file))
        else:
            learner.observe(Watch(nothing).take, AfterBatch, buffer=n)
        return delivery_rate(learner, n, backend)


def _learner(task: Task) -> TrainLearner:
    learner = TrainLearner(deepcopy(task.model), DataLoaders(task.batches), task.loss_func, LR)
    learner.drain_timeout = PATIENCE
    return learner


def _check_counts(observer: Observer[Any], loses: bool = True) -> None:
    assert observer.delivered + observer.dropped == observer.emitted > 0
    assert loses or not observer.dropped, "overflow='block' lost events"


def _check_lines(path: Path, learner: TrainLearner, watch: Watch) -> None:
    """Check that there is a valid line for every batch, the epoch, and both ends of the fit."""
    events = [json.loads(line)["event"] for line in path.read_text().splitlines()]
    result = learner.result
    assert result is not None
    if not result.dropped:
        assert events == ["fit_started", *["batch"] * result.batches, "epoch", "fit_ended"]
    watch.delivered += len(events)

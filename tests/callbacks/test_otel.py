"""OpenTelemetryCB: spans and metrics as the real SDK gets them, on every backend."""

from __future__ import annotations

import contextvars
import itertools
import math
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
import structlog
import torch
from eventrain.callbacks import MetricsCB, OpenTelemetryCB
from eventrain.callbacks.reporting import _sampling, otel
from eventrain.callbacks.reporting._pending_scalar import PendingScalar
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterFit,
    BatchEvent,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    Event,
    Watcher,
    record_events,
)
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from structlog.testing import capture_logs
from torch import nn

E = "eventrain."


class Telemetry:
    """A host's SDK, exporting to memory."""

    def __init__(self) -> None:
        self.exporter = InMemorySpanExporter()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self.exporter))
        self.reader = InMemoryMetricReader()
        self.meters = MeterProvider([self.reader], shutdown_on_exit=False)

    def callback(
        self, every: int = 100, cls: type[OpenTelemetryCB] = OpenTelemetryCB, **kwargs: Any
    ) -> Any:
        return cls(every, tracer_provider=self.tracers, meter_provider=self.meters, **kwargs)

    @property
    def batches(self) -> list[tuple[int, int]]:
        """Those that have a span: (epoch, iter)."""
        batches = [span.attributes for span in self.spans if "batch" in span.name]
        return [(found[f"{E}epoch"], found[f"{E}iter"]) for found in batches]

    @property
    def spans(self) -> list[ReadableSpan]:
        """All that ended, by when they began: outer ones first."""
        ended = self.exporter.get_finished_spans()[::-1]
        return sorted(ended, key=lambda span: span.start_time or 0)

    @property
    def tree(self) -> list[Any]:
        """The spans' names, each root as [name, child, child, ...]."""
        nodes = {span.context.span_id: [span.name] for span in self.spans}
        roots = []
        for span in self.spans:
            parent = nodes.get(span.parent.span_id) if span.parent else None
            (roots if parent is None else parent).append(nodes[span.context.span_id])
        return roots

    def points(self) -> dict[str, dict[tuple[str, ...], Any]]:
        """By instrument, its points by the values of their attributes, the keys sorted."""
        data = self.reader.get_metrics_data()
        if data is None:
            return {}
        (resource,) = data.resource_metrics
        (scope,) = resource.scope_metrics
        assert scope.scope.name == "eventrain"
        return {
            metric.name: {
                tuple(str(value) for _, value in sorted(point.attributes.items())): point
                for point in metric.data.data_points
            }
            for metric in scope.metrics
        }

    def numbers(self, name: str) -> dict[tuple[str, ...], Any]:
        """The values of a counter or gauge, the counts of a histogram."""
        return {
            key: point.count if hasattr(point, "count") else point.value
            for key, point in self.points().get(name, {}).items()
        }


@pytest.fixture
def host() -> Iterator[Telemetry]:
    telemetry = Telemetry()
    yield telemetry
    telemetry.tracers.shutdown()
    telemetry.meters.shutdown()


def line_model() -> nn.Module:
    torch.manual_seed(42)
    return nn.Linear(3, 1)


def learner(train: int = 3, valid: int = 2, *cbs: Any, **kwargs: Any) -> TrainLearner:
    def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(n)
        inputs = [torch.randn(4, 3, generator=generator) for _ in range(n)]
        return [(x, x.sum(1, keepdim=True)) for x in inputs]

    return TrainLearner(
        line_model(), DataLoaders(batches(train), batches(valid)), cbs=cbs, **kwargs
    )


class WrappedWatcher:
    """The watcher that the callback makes for a fit, for tests to add to."""

    def __init__(self, watcher: Watcher) -> None:
        self.watcher = watcher

    def wants(self, event: Event) -> bool:
        return self.watcher.wants(event)

    def observe(self, event: Event) -> None:
        self.watcher.observe(event)


def watched_by(cls: type[WrappedWatcher]) -> type[OpenTelemetryCB]:
    """The callback with its watchers wrapped in a class of the test's."""

    class Watched(OpenTelemetryCB):
        def watcher(self, event: Event) -> Watcher:
            return cls(super().watcher(event))

    return Watched


class StoppedLearner(TrainLearner):
    """Is stopped before its fit has begun."""

    def one_fit(self) -> None:
        self.stop(reason="not today")
        super().one_fit()


def nanoseconds(event: Event) -> int:
    return int(event.time * 1e9)


# ------------------------------------------------------------------------------------ the spans


def test_every_scope_is_a_span_in_its_parent_with_the_times_of_its_events(
    backend: dict[str, Any], host: Telemetry
) -> None:
    learn = learner(3, 2, MetricsCB(), host.callback(every=3))
    with record_events(learn) as events:
        result = learn.run(2, **backend)
    epoch = [["train epoch", ["train batch"]], ["valid epoch"]]
    assert host.tree == [["fit", *epoch, *epoch]]

    expected: list[tuple[Any, ...]] = []
    opened: dict[type[Event], list[Any]] = {}
    for event in events:
        match event:
            case BeforeFit():
                opened[CleanupFit] = [
                    nanoseconds(event),
                    {"n_epochs": 2, "n_steps": 6, "purpose": "fit"},
                ]
            case BeforeEpoch():
                where = {"phase": "train" if event.training else "valid", "epoch": event.epoch}
                size = {"n_iter": 3 if event.training else 2}
                opened[CleanupEpoch] = [nanoseconds(event), {**where, **size}]
            case BeforeBatch(training=True, iter=2):
                opened[CleanupBatch] = [nanoseconds(event), {**where, "iter": 2}]
            case CleanupBatch(training=True, iter=2):
                assert event.loss is not None
                found = {"n_samples": 12, "lr": 0.1, "loss": event.loss.item()}
                expected.append(("train batch", event, found))
            case CleanupEpoch():
                n_samples = 12 if event.training else 8
                found = {"n_samples": n_samples, "metric.loss": event.metrics["loss"]}
                expected.append((f"{where['phase']} epoch", event, found))
            case CleanupFit():
                expected.append(("fit", event, {}))
        if expected and len(expected[-1]) == 3:
            name, end, found = expected.pop()
            began, attributes = opened[type(end)]
            attributes |= {"run_id": result.run_id, "status": "completed", **found}
            expected.append((name, began, nanoseconds(end), attributes))
    got = host.exporter.get_finished_spans()
    assert [
        (s.name, s.start_time, s.end_time, {k.removeprefix(E): v for k, v in s.attributes.items()})
        for s in got
    ] == expected
    assert len(got) == 7
    for span in got:
        assert all(key.startswith(E) for key in span.attributes)
        assert span.status.status_code is StatusCode.UNSET
        assert span.events == ()
        assert span.instrumentation_scope.name == "eventrain"


@pytest.mark.parametrize(
    ("every", "iters"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4]), (6, []), (0, [])]
)
def test_every_is_every_how_many_training_batches(
    every: int, iters: list[int], host: Telemetry
) -> None:
    learner(5, 5).run(1, cbs=host.callback(every))
    sampled = [span for span in host.spans if "batch" in span.name]
    assert [span.attributes[f"{E}iter"] for span in sampled] == iters
    assert host.tree == [
        ["fit", ["train epoch", *[["train batch"]] * len(iters)], ["valid epoch"]],
    ]
    assert host.numbers("eventrain.batch.duration") == (
        {("train", "completed"): len(iters)} if iters else {}
    )


@pytest.mark.parametrize(
    ("every", "expected"),
    [(2, [(0, 1), (1, 0), (1, 2)]), (3, [(0, 2), (1, 2)]), (4, [(1, 0)]), (6, [(1, 2)]), (7, [])],
)
def test_every_counts_over_all_epochs_of_a_fit(
    every: int, expected: list[tuple[int, int]], host: Telemetry
) -> None:
    learn = learner(3, 2, host.callback(every))
    learn.run(2)
    assert host.batches == expected
    learn.run(2)
    assert host.batches == expected * 2


def test_every_seconds_leaves_out_those_that_come_too_soon(host: Telemetry) -> None:
    learn = learner(5, 1, host.callback(2, every_seconds=3600))
    for n_fits in (1, 2):
        learn.run(2)
        assert host.batches == [(0, 1)] * n_fits
    assert all(span.attributes[f"{E}status"] == "completed" for span in host.spans)
    assert host.numbers("eventrain.batch.duration") == {("train", "completed"): 2}


def test_a_batch_that_was_stopped_before_it_began_takes_nothing_of_the_one_before_it(
    host: Telemetry,
) -> None:
    """Of the second there is only its CleanupBatch."""

    class Stopping(TrainLearner):
        def one_batch(self) -> None:
            if (self.epoch, self.iter) == (0, 1):
                self.stop("epoch", "seen enough")
            super().one_batch()

    handed_over = []

    class Told(WrappedWatcher):
        def observe(self, event: Event) -> None:
            super().observe(event)
            if isinstance(event, CleanupBatch):
                handed_over.append((event.epoch, event.iter))

    learn = Stopping(line_model(), learner(4, 1).dls, cbs=host.callback(1, watched_by(Told)))
    learn.run(2, valid=False)
    assert handed_over == host.batches == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 3)]
    assert host.numbers("eventrain.batches") == {
        ("train", "completed"): 5,
        ("train", "cancelled"): 1,
    }


def test_the_losses_start_on_their_way_in_the_training_thread(
    host: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the event loop only waits for them, and gives the device nothing to do."""
    threads = set()

    def starts(event: BatchEvent) -> PendingScalar | None:
        threads.add(threading.get_ident())
        return _sampling.pending_loss(event)

    monkeypatch.setattr(otel, "pending_loss", starts)
    learn, in_training = learner(4, 1), set()
    learn.subscribe(AfterBatch, lambda event: in_training.add(threading.get_ident()))
    events: list[CleanupBatch] = []
    learn.on(CleanupBatch)(events.append)
    learn.run(1, valid=False, cbs=(callback := host.callback(every=2)))
    assert threads == in_training != {threading.get_ident()}
    losses = [span.attributes[f"{E}loss"] for span in host.spans if "batch" in span.name]
    assert losses == [event.loss.item() for event in events][1::2]
    assert callback._fit is None


def test_a_host_that_hears_too_late_has_the_losses_of_the_batches_it_hears_of(
    host: Telemetry,
) -> None:
    """And what waits for it is bounded, as the buffer is."""
    learn, free, waiting = learner(50, 1), threading.Event(), []

    class Busy(WrappedWatcher):
        def observe(self, event: Event) -> None:
            if isinstance(event, BeforeFit):
                assert free.wait(60)
            super().observe(event)

    callback = host.callback(1, watched_by(Busy))
    callback.buffer = 10

    @learn.on(AfterEpoch)
    def go_on(event: AfterEpoch) -> None:
        waiting.append(len(callback._fit.losses))
        free.set()

    events: list[CleanupBatch] = []
    learn.on(CleanupBatch)(events.append)
    with capture_logs():
        result = learn.run(1, valid=False, cbs=callback)
    assert result.dropped
    assert waiting[0] <= 11
    losses = {event.iter: event.loss.item() for event in events}
    sampled = [span for span in host.spans if span.attributes.get(f"{E}loss") is not None]
    assert len(sampled) >= 3
    for span in sampled:
        assert span.attributes[f"{E}loss"] == losses[span.attributes[f"{E}iter"]]


def test_a_loss_without_a_number_ends_nothing(host: Telemetry) -> None:
    learn = learner(2, 1)
    learn.model = line_model().to("meta")
    learn.subscribe(BeforeBatch, lambda event: to_meta(learn))
    result = learn.run(1, valid=False, cbs=host.callback(every=1))
    assert result.status == "completed"
    assert host.batches == [(0, 0), (0, 1)]
    assert [span.attributes[f"{E}status"] for span in host.spans] == ["completed"] * 4
    assert not any(f"{E}loss" in span.attributes for span in host.spans)


def to_meta(learn: TrainLearner) -> None:
    learn.batch = tuple(tensor.to("meta") for tensor in learn.batch)


def test_without_batch_spans_no_batch_is_observed(host: Telemetry) -> None:
    learn = learner(5, 5)
    learn.run(1, cbs=(callback := host.callback(every=0)))
    assert BeforeBatch not in callback.observes
    assert host.numbers("eventrain.batches") == {
        ("train", "completed"): 5,
        ("valid", "completed"): 5,
    }


def test_each_fit_is_a_trace_of_its_own(host: Telemetry) -> None:
    learn = learner(1, 1, host.callback())
    runs = [learn.run(1).run_id for _ in range(2)]
    assert host.tree == [["fit", ["train epoch"], ["valid epoch"]]] * 2
    assert [span.attributes[f"{E}run_id"] for span in host.spans] == [
        *[runs[0]] * 3,
        *[runs[1]] * 3,
    ]
    traces = {span.context.trace_id for span in host.spans}
    assert len(traces) == 2


def test_a_loader_without_a_length_has_no_n_iter(host: Telemetry) -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter([(torch.ones(4, 3), torch.ones(4, 1))])

    learn = learner()
    learn.dls = DataLoaders(Unsized())
    learn.run(1, valid=False, cbs=host.callback())
    epoch = host.spans[1]
    assert f"{E}n_iter" not in epoch.attributes
    assert epoch.attributes[f"{E}n_samples"] == 4


# ----------------------------------------------------------------------------- the caller's span


async def test_the_fit_is_a_child_of_the_span_current_where_it_was_called(host: Telemetry) -> None:
    """Of two fits at the same time, each of its own; what is current on the loop stays so."""
    tracer = host.tracers.get_tracer("host")
    runs: dict[str, str] = {}
    both = {"a": anyio.Event(), "b": anyio.Event()}

    async def request(name: str, other: str) -> None:
        learn = learner(2, 1, host.callback(every=1))

        @learn.on(BeforeBatch, once=True)
        async def overlap(event: BeforeBatch) -> None:
            both[name].set()
            await both[other].wait()

        with tracer.start_as_current_span(f"request {name}") as span:
            runs[name] = (await learn.fit(1)).run_id
            assert trace.get_current_span() is span

    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(request, "a", "b")
            tasks.start_soon(request, "b", "a")
    fit = ["fit", ["train epoch", ["train batch"], ["train batch"]], ["valid epoch"]]
    assert sorted(host.tree) == [["request a", fit], ["request b", fit]]
    for name, run_id in runs.items():
        (request_span,) = (s for s in host.spans if s.name == f"request {name}")
        mine = [s for s in host.spans if s.attributes.get(f"{E}run_id") == run_id]
        assert len(mine) == 5
        assert {s.context.trace_id for s in mine} == {request_span.context.trace_id}


async def test_spans_made_in_receivers_and_observers_are_not_the_fits_children(
    host: Telemetry,
) -> None:
    tracer = host.tracers.get_tracer("host")
    learn = learner(1, 1, host.callback(every=1))

    @learn.on(AfterBatch, once=True)
    def in_training(event: AfterBatch) -> None:
        tracer.start_span("by a receiver").end()

    def beside(event: AfterEpoch) -> None:
        tracer.start_span("by an observer").end()

    learn.observe(beside, AfterEpoch)
    with anyio.fail_after(60), tracer.start_as_current_span("request"):
        await learn.fit(1, valid=False)
    (request,) = host.tree
    assert request[0] == "request"
    assert sorted(request[1:]) == [
        ["by a receiver"],
        ["by an observer"],
        ["fit", ["train epoch", ["train batch"]]],
    ]


async def test_the_context_of_the_caller_reaches_the_hosts_span_processors(host: Telemetry) -> None:
    tenant = contextvars.ContextVar[str]("tenant")
    seen = []

    class Tenants(SpanProcessor):
        def on_start(self, span: Any, parent_context: Any = None) -> None:
            seen.append((span.name, tenant.get()))

    host.tracers.add_span_processor(Tenants())
    tenant.set("t1")
    with anyio.fail_after(60):
        await learner(1, 1).fit(1, cbs=host.callback())
    assert seen == [("fit", "t1"), ("train epoch", "t1"), ("valid epoch", "t1")]


# -------------------------------------------------------------------------------- how it ended


@pytest.mark.parametrize(
    ("cancel", "cancelled"),
    [
        (CancelBatchException, ["train batch"]),
        (CancelEpochException, ["train epoch", "train batch"]),
        (CancelFitException, ["fit", "train epoch", "train batch"]),
    ],
)
def test_a_cancel_is_an_event_and_no_error(
    cancel: type[BaseException], cancelled: list[str], backend: dict[str, Any], host: Telemetry
) -> None:
    learn = learner(2, 1)

    @learn.on(BeforeBatch, once=True)
    def enough(event: BeforeBatch) -> None:
        raise cancel("seen enough")

    with record_events(learn) as events:
        learn.run(1, cbs=host.callback(every=1), **backend)
    ends = {"train batch": CleanupBatch, "train epoch": CleanupEpoch, "fit": CleanupFit}
    told = [span for span in host.spans if span.attributes[f"{E}status"] == "cancelled"]
    assert [span.name for span in told] == cancelled
    for span in told:
        who = span.attributes[f"{E}who"]
        assert who.endswith(".enough")
        assert span.attributes[f"{E}reason"] == "seen enough"
        (event,) = span.events
        assert event.name == "eventrain.cancelled"
        assert dict(event.attributes) == {f"{E}who": who, f"{E}reason": "seen enough"}
        when = next(nanoseconds(e) for e in events if type(e) is ends[span.name])
        assert event.timestamp == span.end_time == when
    for span in host.spans:
        assert span.status.status_code is StatusCode.UNSET
        assert "error.type" not in span.attributes
        if span not in told:
            assert span.attributes[f"{E}status"] == "completed"
            assert span.events == ()


def test_what_failed_is_an_error_with_its_description(
    backend: dict[str, Any], host: Telemetry
) -> None:
    learn = learner(2, 1)

    @learn.on(AfterBatch)
    def broken(event: AfterBatch) -> None:
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        learn.run(1, cbs=host.callback(every=1), **backend)
    assert host.tree == [["fit", ["train epoch", ["train batch"]]]]
    for span in host.spans:
        assert span.status.status_code is StatusCode.ERROR
        assert span.status.description == "KeyError: 'broken'"
        assert span.attributes["error.type"] == "KeyError"
        assert span.attributes[f"{E}status"] == "failed"
        assert span.attributes[f"{E}who"].endswith(".broken")
        assert span.attributes[f"{E}reason"] == "KeyError: 'broken'"


def test_what_failed_after_its_epochs_leaves_those_completed(host: Telemetry) -> None:
    learn = learner(1, 1)

    @learn.on(AfterFit)
    def broken(event: AfterFit) -> None:
        raise ValueError("too late")

    with pytest.raises(ValueError, match="too late"):
        learn.run(1, cbs=host.callback())
    codes = {span.name: span.status.status_code for span in host.spans}
    assert codes == {
        "fit": StatusCode.ERROR,
        "train epoch": StatusCode.UNSET,
        "valid epoch": StatusCode.UNSET,
    }
    assert host.numbers("eventrain.fits") == {("failed",): 1}


def test_a_fit_that_was_stopped_before_it_began_has_a_span_of_no_length(
    backend: dict[str, Any], host: Telemetry
) -> None:
    learn = StoppedLearner(line_model(), learner().dls, cbs=host.callback())
    with record_events(learn) as events:
        learn.run(3, **backend)
    (end,) = events
    (fit,) = host.spans
    assert (fit.name, fit.start_time, fit.end_time) == ("fit", nanoseconds(end), nanoseconds(end))
    assert {key.removeprefix(E): value for key, value in fit.attributes.items()} == {
        "run_id": learn.run_id,
        "n_epochs": 3,
        "n_steps": 9,
        "purpose": "fit",
        "status": "cancelled",
        "who": "Learner.stop",
        "reason": "not today",
    }
    assert [event.name for event in fit.events] == ["eventrain.cancelled"]
    assert host.numbers("eventrain.fits") == {("cancelled",): 1}


async def test_the_spans_end_when_the_host_cancels_the_fit(host: Telemetry) -> None:
    learn = learner()
    with anyio.fail_after(60), anyio.CancelScope() as scope:

        @learn.on(AfterBatch)
        async def by_host(event: AfterBatch) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await learn.fit(5, cbs=host.callback(every=1))
    assert scope.cancelled_caught
    assert host.tree == [["fit", ["train epoch", ["train batch"]]]]
    for span in host.spans:
        assert span.attributes[f"{E}status"] == "cancelled"
        assert span.attributes[f"{E}who"] == "host"
        assert span.status.status_code is StatusCode.UNSET


# ------------------------------------------------------------------------------- what was missed


def deaf_to(*missed: type[Event]) -> type[OpenTelemetryCB]:
    """The callback as it is where the buffer lost events of these classes."""

    class Deaf(WrappedWatcher):
        def wants(self, event: Event) -> bool:
            return super().wants(event) and not isinstance(event, missed)

    return watched_by(Deaf)


def test_a_span_whose_end_was_lost_ends_with_the_one_around_it(
    backend: dict[str, Any], host: Telemetry
) -> None:
    learn = learner(2, 1)
    with record_events(learn) as events:
        learn.run(1, cbs=host.callback(1, deaf_to(CleanupBatch, CleanupEpoch)), **backend)
    batches = [["train batch"], ["train batch"]]
    assert host.tree == [["fit", ["train epoch", *batches], ["valid epoch"]]]
    statuses = [span.attributes[f"{E}status"] for span in host.spans]
    assert statuses == ["completed", *["unknown"] * 4]
    fit = host.spans[0]
    assert fit.end_time == nanoseconds(events[-1])
    for span in host.spans[1:]:
        assert fit.start_time <= span.start_time <= span.end_time <= fit.end_time
    # Nothing is known of how long they took; how many batches there were, is.
    assert "eventrain.epoch.duration" not in host.points()
    assert host.numbers("eventrain.batches") == {
        ("train", "completed"): 2,
        ("valid", "completed"): 1,
    }


def test_a_fit_whose_end_was_lost_ends_when_the_next_begins(host: Telemetry) -> None:
    learn = learner(1, 1, callback := host.callback(100, deaf_to(CleanupEpoch, CleanupFit)))
    learn.run(1, valid=False)
    assert host.spans == []
    learn.run(1, valid=False)
    assert host.tree == [["fit", ["train epoch"]]]
    callback.close()
    callback.close()
    assert host.tree == [["fit", ["train epoch"]]] * 2
    first = host.spans[0]
    assert first.attributes[f"{E}status"] == "unknown"
    assert first.end_time < host.spans[2].start_time
    assert "eventrain.fits" not in host.points()


def test_an_end_without_its_beginning_is_no_span(host: Telemetry) -> None:
    learner(2, 1).run(1, cbs=host.callback(1, deaf_to(BeforeBatch, BeforeEpoch)))
    assert host.tree == [["fit"]]
    assert "eventrain.batch.duration" not in host.points()
    assert "eventrain.epoch.duration" not in host.points()
    assert host.numbers("eventrain.samples") == {("train",): 8, ("valid",): 4}


def test_a_fit_it_came_late_to_has_no_spans(host: Telemetry) -> None:
    learn = learner(2, 1)

    @learn.on(BeforeBatch, once=True)
    def attach(event: BeforeBatch) -> None:
        learn.add_cbs(host.callback(every=1))

    learn.run(1)
    assert host.spans == []
    assert "eventrain.fits" not in host.points()
    learn.run(1)
    batches = [["train batch"], ["train batch"]]
    assert host.tree == [["fit", ["train epoch", *batches], ["valid epoch"]]]
    assert host.numbers("eventrain.fits") == {("completed",): 1}


@pytest.mark.parametrize("when", [AfterEpoch, AfterFit])
def test_a_run_id_that_is_used_again_does_not_mix_two_fits(
    when: type[Event], host: Telemetry
) -> None:
    """It has heard of the first from its beginning, and comes late to the second."""
    callback = host.callback(every=1)
    learner(1, 1).run(1, cbs=callback, run_id="again")
    first = host.tree
    assert first == [["fit", ["train epoch", ["train batch"]], ["valid epoch"]]]
    late = learner(2, 1)
    late.subscribe(when, lambda event: late.add_cbs(callback), once=True)
    late.run(1, run_id="again")
    assert host.tree == first
    assert host.numbers("eventrain.fits") == {("completed",): 1}


async def test_of_two_fits_at_once_with_one_run_id_it_watches_the_later(host: Telemetry) -> None:
    seen = anyio.Event()

    class Told(WrappedWatcher):
        def observe(self, event: Event) -> None:
            super().observe(event)
            if isinstance(event, CleanupBatch):
                seen.set()

    callback = host.callback(3, watched_by(Told))
    first, second = learner(4, 1, callback), learner(2, 1, callback)

    @first.on(BeforeBatch, where=lambda event: event.iter == 3)
    async def meanwhile(event: BeforeBatch) -> None:
        await seen.wait()
        await second.fit(1, run_id="same")

    with anyio.fail_after(60):
        await first.fit(1, run_id="same")
    whole = ["fit", ["train epoch"], ["valid epoch"]]
    assert host.tree == [["fit", ["train epoch", ["train batch"]]], whole]
    assert [span.attributes[f"{E}status"] for span in host.spans if span.name == "fit"] == [
        "unknown",
        "completed",
    ]
    assert host.numbers("eventrain.fits") == {("completed",): 1}
    # Twelve of the first, up to its third batch; all of the later.
    assert host.numbers("eventrain.samples") == {("train",): 12 + 8, ("valid",): 4}


def test_a_fit_whose_beginning_was_lost_begins_with_the_first_that_is_heard(
    host: Telemetry,
) -> None:
    learn = learner(1, 1)
    with record_events(learn) as events:
        learn.run(1, cbs=host.callback(1, deaf_to(BeforeFit)))
    assert host.tree == [["fit", ["train epoch", ["train batch"]], ["valid epoch"]]]
    first = next(event for event in events if isinstance(event, BeforeEpoch))
    assert host.spans[0].start_time == nanoseconds(first)
    assert host.numbers("eventrain.fits") == {("completed",): 1}


def test_a_processor_of_the_hosts_that_fails_ends_the_spans_and_not_the_fit(
    backend: dict[str, Any], host: Telemetry
) -> None:
    class Broken(SpanProcessor):
        def on_end(self, span: ReadableSpan) -> None:
            if span.name != "fit":
                raise OSError("no room")

    host.tracers.add_span_processor(Broken())
    learn = learner(2, 1)
    with capture_logs() as logs:
        result = learn.run(1, cbs=host.callback(every=1), **backend)
    assert result.status == "completed"
    (failed,) = (line for line in logs if line["event"] == "observer_failed")
    assert failed["observer"] == "OpenTelemetryCB.observe"
    assert "no room" in failed["error"]
    assert host.tree == [["fit", ["train epoch", ["train batch"]]]]
    statuses = [span.attributes[f"{E}status"] for span in host.spans]
    assert statuses == ["unknown", "unknown", "completed"]


def test_a_clock_that_is_set_back_makes_no_span_of_negative_length(
    host: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count(2_000_000_000, -1)
    monkeypatch.setattr("eventrain.events.base.time", lambda: float(next(clock)))
    learner(1, 1).run(1, cbs=host.callback(every=1))
    spans = host.exporter.get_finished_spans()
    assert [span.name for span in spans] == ["train batch", "train epoch", "valid epoch", "fit"]
    assert all(span.end_time == span.start_time for span in spans)
    (point,) = host.points()["eventrain.batch.duration"].values()
    assert (point.count, point.sum) == (1, 0)


# ----------------------------------------------------------------------------------- the metrics


def test_the_counts_are_those_of_the_results(backend: dict[str, Any], host: Telemetry) -> None:
    """Over several fits, whatever `every` samples; skipped batches are told apart."""
    learn = learner(5, 2, host.callback(every=3))
    learn.subscribe(
        BeforeBatch,
        CancelBatchAtIter(1),
        where=lambda event: event.training and event.epoch == 0,
    )
    results = [learn.run(2, **backend), learn.run(1, **backend)]

    @learn.on(AfterBatch)
    def leave(event: AfterBatch) -> None:
        raise CancelFitException("enough")

    results.append(learn.run(1, **backend))
    assert [result.status for result in results] == ["completed", "completed", "cancelled"]
    completed = sum(result.batches for result in results)
    assert completed == 4 + 5 + 4
    assert host.numbers("eventrain.batches") == {
        ("train", "completed"): completed,
        ("train", "cancelled"): 3,
        ("valid", "completed"): sum(result.valid_batches for result in results),
    }
    assert host.numbers("eventrain.samples") == {
        ("train",): 4 * (5 + 5 + 5 + 1),
        ("valid",): 4 * 2 * 3,
    }
    assert host.numbers("eventrain.fits") == {("completed",): 2, ("cancelled",): 1}
    assert host.numbers("eventrain.epoch.duration") == {
        ("train", "completed"): 3,
        ("valid", "completed"): 3,
        ("train", "cancelled"): 1,
    }
    assert host.numbers("eventrain.batch.duration") == {("train", "completed"): 3 + 1}


class CancelBatchAtIter:
    def __init__(self, iter: int) -> None:  # noqa: A002 - the event's name of it
        self.iter = iter

    def __call__(self, event: BeforeBatch) -> None:
        if event.iter == self.iter:
            raise CancelBatchException("not this one")


async def test_a_long_epoch_is_counted_while_it_runs(host: Telemetry) -> None:
    learn = learner(6, 1)
    seen: list[dict[tuple[str, ...], Any]] = []
    counted = anyio.Event()

    class Told(WrappedWatcher):
        def observe(self, event: Event) -> None:
            super().observe(event)
            if isinstance(event, CleanupBatch):
                seen.append(host.numbers("eventrain.samples"))
                counted.set()

    @learn.on(BeforeBatch, where=lambda event: event.training and event.iter == 4)
    async def wait(event: BeforeBatch) -> None:
        await counted.wait()
        assert host.numbers("eventrain.batches") == {("train", "completed"): 4}

    with anyio.fail_after(60):
        await learn.fit(1, valid=False, cbs=host.callback(4, watched_by(Told)))
    assert seen == [{("train",): 16}]
    assert host.numbers("eventrain.batches") == {("train", "completed"): 6}
    assert host.numbers("eventrain.samples") == {("train",): 24}


def test_durations_are_seconds_from_event_to_event(host: Telemetry) -> None:
    learn = learner(2, 1, host.callback(every=2))
    with record_events(learn) as events:
        learn.run(1, valid=False)
    times = {type(event): event.time for event in events}  # of each class the last one
    for name, begin, end in [
        ("eventrain.batch.duration", BeforeBatch, CleanupBatch),
        ("eventrain.epoch.duration", BeforeEpoch, CleanupEpoch),
    ]:
        (point,) = host.points()[name].values()
        assert point.sum == times[end] - times[begin]


def test_units_and_names_are_those_of_the_conventions(host: Telemetry) -> None:
    learn = learner(1, 1, MetricsCB(), loss_func=lambda p, y: p.mean() * math.nan)
    learn.run(1, valid=False, cbs=host.callback(every=1))
    learn.loss_func = nn.functional.mse_loss
    learn.model = line_model()
    learn.run(1, valid=False, cbs=host.callback(every=1))
    data = host.reader.get_metrics_data()
    (scope,) = data.resource_metrics[0].scope_metrics
    assert {metric.name: metric.unit for metric in scope.metrics} == {
        "eventrain.fits": "{fit}",
        "eventrain.batches": "{batch}",
        "eventrain.samples": "{sample}",
        "eventrain.epoch.duration": "s",
        "eventrain.batch.duration": "s",
        "eventrain.metric": "",
        "eventrain.nonfinite": "{value}",
    }
    for metric in scope.metrics:
        for point in metric.data.data_points:
            assert set(point.attributes) <= {f"{E}phase", f"{E}status", f"{E}metric.name"}


def test_gauges_hold_the_numbers_of_the_last_epoch(host: Telemetry) -> None:
    learn = learner(3, 2, MetricsCB())

    @learn.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        learn.record["Top-5 accuracy %"] = event.epoch

    result = learn.run(3, cbs=host.callback())
    *_, train, valid = result.history
    assert host.numbers("eventrain.metric") == {
        ("loss", "train"): train["loss"],
        ("loss", "valid"): valid["loss"],
        ("Top-5 accuracy %", "train"): 2.0,
        ("Top-5 accuracy %", "valid"): 2.0,
    }
    assert "eventrain.metrics.left_out" not in host.points()


def test_of_too_many_names_the_first_are_shown_and_the_rest_counted(host: Telemetry) -> None:
    learn = learner(1, 1)

    @learn.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        first = 0 if event.training else 20
        learn.record.update({f"class {i}": i for i in range(first, first + 40)})

    learn.run(2, cbs=host.callback())
    shown = host.numbers("eventrain.metric")
    assert shown == {
        **{(f"class {i}", "train"): i for i in range(40)},
        **{(f"class {i}", "valid"): i for i in range(20, 50)},
    }
    data = host.reader.get_metrics_data()
    (scope,) = data.resource_metrics[0].scope_metrics
    assert host.numbers("eventrain.metrics.left_out") == {("valid",): 20}
    assert {metric.name: metric.unit for metric in scope.metrics}["eventrain.metrics.left_out"] == (
        "{value}"
    )
    epoch = next(span for span in host.spans if span.name == "valid epoch")
    assert epoch.attributes[f"{E}metric.class 59"] == 59


# --------------------------------------------------------------------------- whatever the values


def test_only_finite_scalars_are_numbers(host: Telemetry) -> None:
    learn = learner(1)
    values = {
        "int": 3,
        "huge": -(10**400),
        "tensor": torch.tensor(0.5, dtype=torch.bfloat16),
        "numpy": np.float32(0.25),
        "counted": np.int64(7),
        "nan": math.nan,
        "inf": torch.tensor(math.inf),
        "flag": True,
        "text": "good",
        "list": [1.0, 2.0],
        "matrix": torch.eye(2),
        "nothing": None,
        "complex": 1j,
        "n_samples": 0.125,
    }
    learn.subscribe(AfterEpoch, lambda event: learn.record.update(values))
    learn.run(1, valid=False, cbs=host.callback())
    epoch = host.spans[1]
    numbers = {"int": 3, "tensor": 0.5, "numpy": 0.25, "counted": 7, "n_samples": 0.125}
    assert {k: v for k, v in epoch.attributes.items() if "metric." in k or "nonfinite" in k} == {
        **{f"{E}metric.{name}": number for name, number in numbers.items()},
        f"{E}nonfinite.huge": "-inf",
        f"{E}nonfinite.nan": "nan",
        f"{E}nonfinite.inf": "inf",
    }
    assert all(type(epoch.attributes[f"{E}metric.{name}"]) is float for name in numbers)
    assert epoch.attributes[f"{E}n_samples"] == 4
    assert host.numbers("eventrain.metric") == {
        (name, "train"): number for name, number in numbers.items()
    }
    assert host.numbers("eventrain.nonfinite") == {("train",): 3}


def test_a_loss_that_is_not_finite_is_told_apart(host: Telemetry) -> None:
    learn = learner(1, 1, MetricsCB(), loss_func=lambda p, y: p.mean() * math.inf)
    learn.run(1, valid=False, cbs=host.callback(every=1))
    _, epoch, batch = host.spans
    for span in (epoch, batch):
        assert span.attributes[f"{E}nonfinite.loss"] in ("inf", "-inf", "nan")
        assert not any(key.endswith(("metric.loss", "eventrain.loss")) for key in span.attributes)


@pytest.mark.parametrize("text", ["\ud800", "a\x00b\x1b[2J\n", "x" * 10_000, ""])
def test_any_text_can_be_exported(text: str, host: Telemetry) -> None:
    """As reason, and as a metric's name: exporters encode it as UTF-8, or lose the batch."""
    learn = learner(1)

    @learn.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        learn.record[text] = 0.5
        learn.record[f"{text}nan"] = math.nan

    @learn.on(AfterFit)
    def leave(event: AfterFit) -> None:
        raise CancelFitException(text)

    result = learn.run(1, valid=False, cbs=host.callback())
    assert dict(result.dropped) == {}
    assert host.tree == [["fit", ["train epoch"]]]
    assert [span.attributes[f"{E}status"] for span in host.spans] == ["cancelled", "completed"]
    for span in host.spans:
        for key, value in span.attributes.items():
            assert f"{key}={value}".encode()
    ((name, phase),) = host.numbers("eventrain.metric")
    assert name == text.encode(errors="backslashreplace").decode()
    assert phase == "train"


# -------------------------------------------------------------------------------------- the rest


def test_weights_are_the_same_to_the_bit_with_and_without_it(
    backend: dict[str, Any], host: Telemetry
) -> None:
    """G11"""

    def weights(*cbs: Any) -> list[torch.Tensor]:
        learn = learner(5, 2, MetricsCB(), *cbs)
        learn.run(3, **backend)
        return [p.detach().clone() for p in learn.model.parameters()]

    plain, watched = weights(), weights(host.callback(every=1))
    assert len(host.spans) == 1 + 2 * 3 + 5 * 3
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_a_host_without_an_sdk_trains_as_ever(backend: dict[str, Any]) -> None:
    """The global providers make nothing until a host sets them."""
    learn = learner(2, 1)

    @learn.on(AfterBatch)
    def broken(event: AfterBatch) -> None:
        if event.epoch == 1:
            raise CancelFitException("enough")

    with capture_logs() as logs:
        result = learn.run(3, cbs=OpenTelemetryCB(every=1), **backend)
    assert (result.status, result.reason) == ("cancelled", "enough")
    assert not [line for line in logs if line["event"] == "observer_failed"]


def test_by_default_it_goes_to_the_hosts_global_providers() -> None:
    """Also where these are set after it was made. In a process of its own: they are set once."""
    code = """
import torch
from eventrain.callbacks import OpenTelemetryCB
from eventrain.engine import DataLoaders, TrainLearner
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

callback = OpenTelemetryCB()
exporter, reader = InMemorySpanExporter(), InMemoryMetricReader()
provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
metrics.set_meter_provider(MeterProvider([reader]))
batches = [(torch.ones(2, 3), torch.zeros(2, 1))]
TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches)).run(1, valid=False, cbs=callback)
print([span.name for span in exporter.get_finished_spans()])
print(len(reader.get_metrics_data().resource_metrics[0].scope_metrics[0].metrics) > 0)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "['train epoch', 'fit']\nTrue\n"


def test_without_opentelemetry_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "opentelemetry.trace")
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"pip install 'eventrain\[otel\]'"):
        OpenTelemetryCB()


def test_importing_it_does_not_import_opentelemetry() -> None:
    """G7: who does not use it, need not have it."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None;"
        " import eventrain.callbacks.reporting.otel; print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "fine\n"


@pytest.mark.parametrize("every", [-1, True, 1.5, "1", None])
def test_a_number_that_is_no_count_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every={every!r}: give a number of batches"):
        OpenTelemetryCB(every)


@pytest.mark.parametrize("every_seconds", [-1, True, math.inf, "1", None])
def test_a_number_that_is_no_seconds_is_refused(every_seconds: Any) -> None:
    with pytest.raises(ValueError, match=f"every_seconds={every_seconds!r}: give seconds"):
        OpenTelemetryCB(every_seconds=every_seconds)


def test_nothing_is_logged_for_a_fit_that_is_watched(host: Telemetry) -> None:
    assert not structlog.is_configured()
    with capture_logs() as logs:
        learner(2, 1).run(2, cbs=host.callback(every=1))
    assert logs == []

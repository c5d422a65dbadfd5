"""OpenTelemetryCB: spans and metrics as the real SDK gets them, on every backend."""

from __future__ import annotations

import contextvars
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import anyio
import numpy as np
import pytest
import structlog
import torch
from eventrain.callbacks import MetricsCB, OpenTelemetryCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterFit,
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

    def callback(self, every: int = 100, cls: type[OpenTelemetryCB] = OpenTelemetryCB) -> Any:
        return cls(every, tracer_provider=self.tracers, meter_provider=self.meters)

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


def nanoseconds(event: Event) -> int:
    return int(event.time * 1e9)


# ------------------------------------------------------------------------------------ the spans


def test_every_scope_is_a_span_in_its_parent_with_the_times_of_its_events(
    backend: dict[str, Any], host: Telemetry
) -> None:
    learn = learner(3, 2, MetricsCB(), host.callback(every=2))
    with record_events(learn) as events:
        result = learn.run(2, **backend)
    epoch = [["train epoch", ["train batch"]], ["valid epoch"]]
    assert host.tree == [["fit", *epoch, *epoch]]

    expected: list[tuple[Any, ...]] = []
    opened: dict[type[Event], list[Any]] = {}
    for event in events:
        match event:
            case BeforeFit():
                opened[CleanupFit] = [nanoseconds(event), {"n_epochs": 2}]
            case BeforeEpoch():
                where = {"phase": "train" if event.training else "valid", "epoch": event.epoch}
                size = {"n_iter": 3 if event.training else 2}
                opened[CleanupEpoch] = [nanoseconds(event), {**where, **size}]
            case BeforeBatch(training=True, iter=1):
                opened[CleanupBatch] = [nanoseconds(event), {**where, "iter": 1}]
            case CleanupBatch(training=True, iter=1):
                assert event.loss is not None
                found = {"n_samples": 8, "lr": 0.1, "loss": event.loss.item()}
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

    class Deaf(OpenTelemetryCB):
        def wants(self, event: Event) -> bool:
            return super().wants(event) and not isinstance(event, missed)

    return Deaf


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
    learn.run(1)
    batches = [["train batch"], ["train batch"]]
    assert host.tree == [["fit", ["train epoch", *batches], ["valid epoch"]]]


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
    monkeypatch.setattr("eventrain.events.types.time", lambda: float(next(clock)))
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
    assert host.numbers("eventrain.batch.duration") == {("train", "completed"): 3}


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

    class Told(OpenTelemetryCB):
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
        await learn.fit(1, valid=False, cbs=host.callback(4, Told))
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
        "eventrain.metric.loss": "",
        "eventrain.nonfinite": "{value}",
    }
    for metric in scope.metrics:
        for point in metric.data.data_points:
            assert set(point.attributes) <= {f"{E}phase", f"{E}status"}


def test_gauges_hold_the_numbers_of_the_last_epoch(host: Telemetry) -> None:
    learn = learner(3, 2, MetricsCB())

    @learn.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        learn.record["Top-5 accuracy %"] = event.epoch

    result = learn.run(3, cbs=host.callback())
    *_, train, valid = result.history
    assert host.numbers("eventrain.metric.loss") == {
        ("train",): train["loss"],
        ("valid",): valid["loss"],
    }
    assert host.numbers("eventrain.metric.top-5_accuracy__") == {("train",): 2.0, ("valid",): 2.0}


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
    points = host.points()
    gauges = {name: p[("train",)].value for name, p in points.items() if "metric." in name}
    assert gauges == {f"{E}metric.{name}": number for name, number in numbers.items()}
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
    def leave(event: AfterEpoch) -> None:
        learn.record[text] = 0.5
        learn.record[f"{text}nan"] = math.nan
        raise CancelFitException(text)

    result = learn.run(1, valid=False, cbs=host.callback())
    assert dict(result.dropped) == {}
    assert host.tree == [["fit", ["train epoch"]]]
    for span in host.spans:
        assert span.attributes[f"{E}status"] == "cancelled"
        for key, value in span.attributes.items():
            assert f"{key}={value}".encode()
    (point,) = next(p for name, p in host.points().items() if "metric." in name).values()
    assert point.value == 0.5


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
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ImportError, match=r"pip install 'eventrain\[otel\]'"):
        OpenTelemetryCB()


def test_importing_it_does_not_import_opentelemetry() -> None:
    """G7: who does not use it, need not have it."""
    code = (
        "import sys; sys.modules['opentelemetry'] = None; import eventrain.callbacks.otel;"
        " print('fine')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "fine\n"


@pytest.mark.parametrize("every", [-1, True, 1.5, "1", None])
def test_a_number_that_is_no_count_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every={every!r}: give a number of batches"):
        OpenTelemetryCB(every)


def test_nothing_is_logged_for_a_fit_that_is_watched(host: Telemetry) -> None:
    assert not structlog.is_configured()
    with capture_logs() as logs:
        learner(2, 1).run(2, cbs=host.callback(every=1))
    assert logs == []

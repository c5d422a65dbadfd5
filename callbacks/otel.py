"""The run as OpenTelemetry spans and metrics, made beside the training."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from numbers import Real
from typing import TYPE_CHECKING, Any

from ..events import (
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    Event,
    ScopeEnd,
)

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

EPOCH_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
BATCH_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
"""Bounds of the histograms' buckets, in seconds; a view of the host's may set others."""

_FIT, _EPOCH, _BATCH = range(3)


class OpenTelemetryCB(Callback):
    """Makes a span for the fit, for each epoch in it, and for every n-th training batch in that;
    and counts, times and reports the numbers of the epochs as metrics.

    It observes: everything happens on the host's event loop, in batches, with the times that the
    events carry. The fit's span is a child of the span that is current where `fit` is called. It
    is never current itself, as the observers of others run on that loop too: a span made in a
    receiver is its sibling, not its child.

    | span | attributes, each beginning with `eventrain.` |
    |---|---|
    | fit | run_id, n_epochs |
    | train epoch, valid epoch | run_id, epoch, phase, n_iter; n_samples, metric.NAME |
    | train batch | run_id, epoch, phase, iter; n_samples, lr, loss |
    | all | status; who and reason unless completed |

    What failed has the status ERROR, with the error as its description and its class as
    `error.type`. Being cancelled is no error: it is an event `eventrain.cancelled`, with who and
    why, and leaves the status unset, as completing does. A span whose end was not heard of, as
    the event was dropped, ends with the one around it, the fit's own when the next fit begins or
    by `close()`; its `eventrain.status` is "unknown".

    | instrument | unit | by `eventrain.` |
    |---|---|---|
    | eventrain.fits | {fit} | status |
    | eventrain.batches | {batch} | phase, status |
    | eventrain.samples | {sample} | phase |
    | eventrain.epoch.duration | s | phase, status |
    | eventrain.batch.duration, of the batches that have a span | s | phase, status |
    | eventrain.metric.NAME, of the last epoch | | phase |
    | eventrain.nonfinite, numbers that were left out of those | {value} | phase |

    Numbers are scalars, as doubles. One that is not finite, over which exporters lose whole
    batches of spans, is left out, and stands as text in `eventrain.nonfinite.NAME` of its span.

    Providers, exporters, flushing and shutdown are the host's. Export in the background
    (`BatchSpanProcessor`): a `SimpleSpanProcessor` holds up the event loop. An instance watches
    one fit at a time, from its beginning: give each of two learners its own.

    Args:
        every: a span for every n-th training batch; 0 for none.
        tracer_provider: where spans go, by default the global one.
        meter_provider: where metrics go, by default the global one.

    Raises:
        ImportError: opentelemetry-api is not installed.
        ValueError: `every` is negative or no number.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import OpenTelemetryCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> from opentelemetry.sdk.trace import TracerProvider
        >>> from opentelemetry.sdk.trace.export import SimpleSpanProcessor
        >>> from opentelemetry.sdk.trace.export.in_memory_span_exporter import (
        ...     InMemorySpanExporter,
        ... )
        >>> exporter, provider = InMemorySpanExporter(), TracerProvider()
        >>> provider.add_span_processor(SimpleSpanProcessor(exporter))
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
        >>> result = learner.run(1, cbs=OpenTelemetryCB(every=2, tracer_provider=provider))
        >>> for span in exporter.get_finished_spans():
        ...     print(span.name, span.attributes["eventrain.status"])
        train batch completed
        train batch completed
        train epoch completed
        valid epoch completed
        fit completed

    Source: names, units and statuses follow OpenTelemetry's semantic conventions.
    """

    observes: tuple[type[Event], ...] = (
        BeforeFit,
        BeforeEpoch,
        BeforeBatch,
        CleanupBatch,
        CleanupEpoch,
        CleanupFit,
    )
    buffer = 100_000  # what begins and ends is not to be lost, however long the host is busy

    def __init__(
        self,
        every: int = 100,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"every={every!r}: give a number of batches, 0 for no batch spans")
        try:
            from opentelemetry import metrics, trace
        except ImportError as exc:
            raise ImportError(
                "OpenTelemetryCB needs opentelemetry-api: pip install 'eventrain[otel]'"
            ) from exc
        self.every = every
        if not every:
            self.observes = tuple(t for t in self.observes if t is not BeforeBatch)
        self._spans = _Spans(trace.get_tracer("eventrain", tracer_provider=tracer_provider))
        self._meters = _Meters(metrics.get_meter("eventrain", meter_provider=meter_provider))
        self._run_id = ""

    def wants(self, event: Event) -> bool:
        """All but most of the batches, which are only counted."""
        if isinstance(event, CleanupBatch):
            self._meters.done[event.training, event.end.status] += 1
        elif not isinstance(event, BeforeBatch):
            return True
        return bool(self.every) and event.training and (event.iter + 1) % self.every == 0

    def observe(self, event: Event) -> None:
        """Begin or end a span, and record what is known by then."""
        try:
            if isinstance(event, BeforeFit):
                self.close()  # those of a fit whose end we did not hear of
                self._run_id = event.run_id
            if event.run_id == self._run_id:
                self._record(event)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the spans that are still open.

        The end of the fit does; so does an observer that failed, and the next fit. Again is
        harmless.
        """
        while self._spans.open:
            with suppress(Exception):  # of each, what a processor of the host's may raise
                self._spans.leave(_FIT)

    def _record(self, event: Event) -> None:
        spans, meters = self._spans, self._meters
        match event:
            case BeforeFit():
                spans.begin(_FIT, "fit", event, {"eventrain.n_epochs": event.n_epochs})
            case BeforeEpoch():
                known = {} if event.n_iter is None else {"eventrain.n_iter": event.n_iter}
                spans.begin(_EPOCH, f"{_phase(event)} epoch", event, {**_place(event), **known})
            case BeforeBatch():
                place = {**_place(event), "eventrain.iter": event.iter}
                spans.begin(_BATCH, f"{_phase(event)} batch", event, place)
            case CleanupBatch():
                # The event loop waits for the device here, for the batches that were asked for.
                loss = None if event.loss is None else event.loss.float().mean().item()
                found = _numbers("eventrain.", {"lr": event.lr, "loss": loss})
                found["eventrain.n_samples"] = event.n_samples
                meters.end_batch(event, spans.end(_BATCH, event, event.end, found))
            case CleanupEpoch():
                found = _numbers("eventrain.metric.", event.metrics)
                meters.set_gauges(event, found)
                found["eventrain.n_samples"] = event.n_samples
                meters.end_epoch(event, spans.end(_EPOCH, event, event.end, found))
            case CleanupFit():
                spans.end(_FIT, event, event.end, {})
                meters.end_fit(event)


class _Spans:
    """The open spans: of the fit, of an epoch in it, of a batch in that."""

    def __init__(self, tracer: Tracer) -> None:
        self.open: dict[int, tuple[Span, float]] = {}
        self._tracer = tracer
        self._now = 0.0

    def begin(self, depth: int, name: str, event: Event, attributes: dict[str, Any]) -> None:
        self.leave(depth)
        self._now = event.time
        span = self._tracer.start_span(
            name,
            self._context(),
            attributes={"eventrain.run_id": event.run_id, **attributes},
            start_time=_nanoseconds(event.time),
        )
        self.open[depth] = span, event.time

    def end(
        self, depth: int, event: Event, end: ScopeEnd, attributes: dict[str, Any]
    ) -> float | None:
        """End a span; return its seconds, None if its beginning was not heard of."""
        self._now = event.time
        self.leave(depth + 1)
        if depth not in self.open:
            return None
        span, began = self.open.pop(depth)
        now = max(began, event.time)  # the clock may have been set back
        said = {"eventrain.who": end.who, "eventrain.reason": end.reason}
        ending = {key: _text(text) for key, text in said.items() if text is not None}
        span.set_attributes({**attributes, **ending, "eventrain.status": end.status})
        if end.status == "cancelled":
            span.add_event("eventrain.cancelled", ending, _nanoseconds(now))
        elif end.status == "failed":
            from opentelemetry.trace import Status, StatusCode

            error = _text(end.reason or "")
            span.set_attribute("error.type", error.partition(":")[0] or "_OTHER")
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(_nanoseconds(now))
        return now - began

    def leave(self, depth: int) -> None:
        """End the spans from `depth` inwards: we did not hear how they ended."""
        while self.open and (inner := max(self.open)) >= depth:
            span, began = self.open.pop(inner)
            span.set_attribute("eventrain.status", "unknown")
            span.end(_nanoseconds(max(began, self._now)))

    def _context(self) -> Context | None:
        """That of the innermost open span; for the first None, which is that of this task: the
        task of an observer begins with the context variables of whoever called `fit`."""
        if not self.open:
            return None
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(self.open[max(self.open)][0])


class _Meters:
    """The instruments, and what they were told so far."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._fits = meter.create_counter("eventrain.fits", "{fit}", "Fits that ended")
        self._batches = meter.create_counter("eventrain.batches", "{batch}", "Batches that ended")
        self._samples = meter.create_counter("eventrain.samples", "{sample}", "Samples read")
        self._nonfinite = meter.create_counter(
            "eventrain.nonfinite", "{value}", "Numbers of epochs that were NaN or infinite"
        )
        self._epochs = meter.create_histogram(
            "eventrain.epoch.duration",
            "s",
            "Duration of epochs",
            explicit_bucket_boundaries_advisory=EPOCH_BUCKETS,
        )
        self._sampled = meter.create_histogram(
            "eventrain.batch.duration",
            "s",
            "Duration of the batches that have a span",
            explicit_bucket_boundaries_advisory=BATCH_BUCKETS,
        )
        self._gauges: dict[str, Any] = {}
        statuses = ("completed", "cancelled", "failed")
        # Batches that ended, over all fits: counted in the training thread, told here.
        self.done = {(training, status): 0 for training in (True, False) for status in statuses}
        self._told = dict(self.done)
        self._n_samples = 0  # of this epoch

    def end_batch(self, event: CleanupBatch, seconds: float | None) -> None:
        self._count(event)
        if seconds is not None:
            self._sampled.record(seconds, _kind(event.training, event.end.status))

    def end_epoch(self, event: CleanupEpoch, seconds: float | None) -> None:
        self._count(event)
        self._n_samples = 0
        if seconds is not None:
            self._epochs.record(seconds, _kind(event.training, event.end.status))

    def set_gauges(self, event: CleanupEpoch, numbers: dict[str, Any]) -> None:
        phase = {"eventrain.phase": _phase(event)}
        for name, number in numbers.items():
            if isinstance(number, str):
                self._nonfinite.add(1, phase)
                continue
            # The SDK refuses other characters, and longer names, and lowers the case.
            name = re.sub(r"[^a-z0-9_./-]", "_", name.lower())[:255]
            if name not in self._gauges:
                self._gauges[name] = self._meter.create_gauge(name, "", "That of the last epoch")
            self._gauges[name].set(number, phase)

    def end_fit(self, event: CleanupFit) -> None:
        self._count_batches()
        self._fits.add(1, {"eventrain.status": event.end.status})

    def _count(self, event: CleanupBatch | CleanupEpoch) -> None:
        self._count_batches()
        new, self._n_samples = event.n_samples - self._n_samples, event.n_samples
        if new > 0:
            self._samples.add(new, {"eventrain.phase": _phase(event)})

    def _count_batches(self) -> None:
        for (training, status), n in self.done.items():
            new = n - self._told[training, status]
            if new:
                self._told[training, status] = n
                self._batches.add(new, _kind(training, status))


def _phase(event: BeforeEpoch | BeforeBatch | CleanupBatch | CleanupEpoch) -> str:
    return "train" if event.training else "valid"


def _place(event: BeforeEpoch | BeforeBatch) -> dict[str, Any]:
    return {"eventrain.epoch": event.epoch, "eventrain.phase": _phase(event)}


def _kind(training: bool, status: str) -> dict[str, str]:
    return {"eventrain.phase": "train" if training else "valid", "eventrain.status": status}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _text(value: object) -> str:
    """`value` as text that can be encoded: over half a surrogate pair exporters lose a batch."""
    return str(value).encode("utf-8", "backslashreplace").decode()


def _numbers(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The scalars of `values` as attributes; those that are not finite as text, apart."""
    numbers: dict[str, Any] = {}
    for name, value in values.items():
        if getattr(value, "ndim", None) == 0 and callable(tolist := getattr(value, "tolist", None)):
            value = tolist()  # a tensor, for which the event loop waits, or a number of numpy's
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number:
            continue
        try:
            number = float(value)
        except OverflowError:  # an int beyond all floats
            number = math.inf if value > 0 else -math.inf
        if math.isfinite(number):
            numbers[prefix + _text(name)] = number
        else:
            numbers["eventrain.nonfinite." + _text(name)] = str(number)
    return numbers

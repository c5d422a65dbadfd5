"""The run as OpenTelemetry spans and metrics, made while the training runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ...events import (
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    Event,
    ScopeEnd,
    Watcher,
)
from .._checks import check_installed
from ._otel_meters import Meters, numbers_of
from ._pending_scalar import PendingScalar
from ._sampling import Sampler, check_sampling, pending_loss
from .jsonable import escape_surrogates

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, Tracer, TracerProvider

_FIT, _EPOCH, _BATCH = range(3)


class OpenTelemetryCB(Callback):
    """Makes a span for the fit, for each epoch in it, and for every n-th training batch; and
    reports counts, durations and the numbers of the epochs as metrics.

    It observes: everything happens on the host's event loop, several events at a time, with the
    times of the events. The fit's span is a child of the span that is current where `fit` is
    called. It never becomes the current span, because other observers run on that loop, too: a
    span made in a receiver is its sibling, not its child.

    | span | attributes, each beginning with `eventrain.` |
    |---|---|
    | fit, or validate, predict, lr_find | run_id, purpose; n_epochs, n_steps |
    | train epoch, valid epoch | run_id, epoch, phase, n_iter; n_samples, metric.NAME |
    | train batch | run_id, epoch, phase, iter; n_samples, lr, loss; lrs, if several |
    | all | status; who and reason unless completed |

    A failed scope has the status ERROR, with the error as its description and its class as
    `error.type`. A cancel is not an error: it is an event `eventrain.cancelled`, with who and
    reason, and the status is unset, as for a completed scope. A fit that was stopped before it
    began has a span of zero length. A span whose end was not observed, because the event was
    dropped, ends with the span around it; that of the fit when the next fit begins or by
    `close()`. Its `eventrain.status` is "unknown".

    | instrument | unit | by `eventrain.` |
    |---|---|---|
    | eventrain.fits | {fit} | status |
    | eventrain.batches | {batch} | phase, status |
    | eventrain.samples | {sample} | phase |
    | eventrain.epoch.duration | s | phase, status |
    | eventrain.batch.duration, of the batches that have a span | s | phase, status |
    | eventrain.metric, numbers of the last epoch | | metric.name, phase |
    | eventrain.metrics.left_out, as there are 50 other names already | {value} | phase |
    | eventrain.nonfinite, numbers left out because they are not finite | {value} | phase |

    Instruments count fits alone, not runs of `validate`, `get_preds` and `lr_find`; and
    `eventrain.metric` shows epochs that were completed.

    Numbers are scalars, as doubles. A number that is not finite makes exporters lose whole batches
    of spans: it is left out, and its text is `eventrain.nonfinite.NAME` of the span.

    Providers, exporters, flushing and shutdown are up to the host. Export in the background
    (`BatchSpanProcessor`): a `SimpleSpanProcessor` blocks the event loop. An instance watches one
    fit at a time, from its beginning: give each learner its own instance.

    Args:
        every: make a span for every n-th training batch of the fit; 0 for none.
        tracer_provider: the provider for spans, by default the global one.
        meter_provider: the provider for metrics, by default the global one.
        every_seconds: leave out batches within this many seconds of the last one with a span.

    Raises:
        ImportError: opentelemetry-api is not installed.
        ValueError: `every` or `every_seconds` is negative or not a number.

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
    buffer = 100_000  # beginnings and ends must not be lost, however long the host is busy

    def __init__(
        self,
        every: int = 100,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        *,
        every_seconds: float = 0,
    ) -> None:
        check_sampling(every, every_seconds)
        check_installed("OpenTelemetryCB", "opentelemetry-api", "otel", "opentelemetry.trace")
        self.every = every
        self.every_seconds = every_seconds
        if not every:
            self.observes = tuple(t for t in self.observes if t is not BeforeBatch)
        self._made: tuple[_Spans, Meters] | None = None
        if tracer_provider is not None or meter_provider is not None:
            self._made = _make(tracer_provider, meter_provider)
        self._fit: _FitWatcher | None = None  # the one whose spans are made

    def watcher(self, event: Event) -> Watcher:
        """The object that makes the spans of one fit."""
        if self._made is None:  # here, in the training thread: the first import may take long
            self._made = _make(None, None)
        fit = _FitWatcher(self, *self._made)
        # A fit that was stopped before it began has no other event, and no epoch in its history.
        not_begun = isinstance(event, CleanupFit) and not event.learner.history
        if not_begun or isinstance(event, BeforeFit):
            self._fit = fit
        return fit

    def close(self) -> None:
        """End the spans that are still open, and do not watch the rest of the fit.

        This happens by itself at the end of the fit and when the observer fails. Closing again is
        harmless.
        """
        self._fit = None
        if self._made is not None:
            self._made[0].close()


_Loss = tuple[tuple[int, int], PendingScalar]
"""The loss of the batch (epoch, iter), which is being copied to the host."""


class _FitWatcher:
    """Makes the spans of one fit, if it was attached at its beginning and no other has begun since.

    `wants` runs in the training thread: it chooses the batches, and starts to copy their losses to
    the host. `observe` runs on the event loop.
    """

    def __init__(self, callback: OpenTelemetryCB, spans: _Spans, meters: Meters) -> None:
        self._callback = callback
        self._spans, self._meters = spans, meters
        self._sampler = Sampler(callback.every, callback.every_seconds)
        self.losses = deque[_Loss](maxlen=callback.buffer + 1)  # + the one being observed
        self._begun = False
        self._has_span = False  # whether this batch has one

    def wants(self, event: Event) -> bool:
        """All events but most of the batches, which are only counted."""
        if isinstance(event, CleanupBatch):
            self._meters.done[event.training, event.end.status] += event.purpose == "fit"
        if self._callback._fit is not self:
            return False
        if isinstance(event, BeforeBatch):
            self._has_span = event.training and self._sampler.takes_next()
            return self._has_span
        if not isinstance(event, CleanupBatch):
            return True
        chosen, self._has_span = self._has_span, False
        if chosen:
            with suppress(RuntimeError):  # such as that of a device that failed
                if (loss := pending_loss(event)) is not None:
                    self.losses.append(((event.epoch, event.iter), loss))
        return chosen

    def observe(self, event: Event) -> Awaitable[None] | None:
        """Begin or end a span, and record counts and numbers."""
        loss = self._loss_of(event) if isinstance(event, CleanupBatch) else None
        number: float | None = None
        if loss is not None:
            with suppress(RuntimeError):  # such as that of a device that failed
                if (number := loss.get()) is None:
                    return self._when_arrived(event, loss)
        self._end_or_begin(event, number)
        return None

    async def _when_arrived(self, event: Event, loss: PendingScalar) -> None:
        number: float | None = None
        with suppress(RuntimeError):
            number = await loss.arrival()
        self._end_or_begin(event, number)

    def _end_or_begin(self, event: Event, loss: float | None) -> None:
        if self._callback._fit is not self:
            return
        try:
            self._record(event, loss)
        except BaseException:
            self._callback.close()
            raise

    async def close(self) -> None:
        if self._callback._fit is self:
            self._callback._fit = None

    def _record(self, event: Any, loss: float | None) -> None:
        spans = self._spans
        meters = self._meters if event.purpose == "fit" else None
        if not self._begun:  # also where its BeforeFit was not emitted, or dropped
            self._begun = True
            spans.close()  # those of a fit whose end was not observed
            self._meters.n_samples = 0
            about = {"eventrain.purpose": event.purpose}
            sizes = {"n_epochs": event.n_epochs, "n_steps": event.learner.n_steps}
            about |= {f"eventrain.{k}": n for k, n in sizes.items() if n is not None}
            spans.begin(_FIT, event.purpose, event, about)
        match event:
            case BeforeEpoch():
                known = {} if event.n_iter is None else {"eventrain.n_iter": event.n_iter}
                spans.begin(_EPOCH, f"{event.phase} epoch", event, {**_place(event), **known})
            case BeforeBatch():
                place = {**_place(event), "eventrain.iter": event.iter}
                spans.begin(_BATCH, f"{event.phase} batch", event, place)
            case CleanupBatch():
                found = numbers_of("eventrain.", {"lr": event.lr, "loss": loss})
                if len(event.lrs) > 1:
                    found["eventrain.lrs"] = [float(lr) for lr in event.lrs if lr is not None]
                found["eventrain.n_samples"] = event.n_samples
                seconds = spans.end(_BATCH, event, event.end, found)
                if meters is not None:
                    meters.end_batch(event, seconds)
            case CleanupEpoch():
                found = numbers_of("eventrain.metric.", event.metrics)
                measured = dict(found)
                found["eventrain.n_samples"] = event.n_samples
                seconds = spans.end(_EPOCH, event, event.end, found)
                if meters is not None:
                    meters.end_epoch(event, seconds, measured)
            case CleanupFit():
                spans.end(_FIT, event, event.end, {})
                if meters is not None:
                    meters.end_fit(event)
                self._callback.close()

    def _loss_of(self, event: CleanupBatch) -> PendingScalar | None:
        place = event.epoch, event.iter
        while self.losses and self.losses[0][0] <= place:  # the events of earlier ones were dropped
            at, loss = self.losses.popleft()
            if at == place:
                return loss
        return None


def _make(
    tracer_provider: TracerProvider | None, meter_provider: MeterProvider | None
) -> tuple[_Spans, Meters]:
    """The spans and meters of one callback; of the global providers, where one is None."""
    from opentelemetry import metrics, trace

    return (
        _Spans(trace.get_tracer("eventrain", tracer_provider=tracer_provider)),
        Meters(metrics.get_meter("eventrain", meter_provider=meter_provider)),
    )


class _Spans:
    """The open spans: of the fit, an epoch in it, and a batch in that."""

    def __init__(self, tracer: Tracer) -> None:
        self.open: dict[int, tuple[Span, float]] = {}
        self._tracer = tracer
        self._now = 0.0

    def __deepcopy__(self, memo: object) -> _Spans:
        return _Spans(self._tracer)

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
        """End a span; return its seconds, None if its beginning was not observed."""
        self._now = event.time
        self.leave(depth + 1)
        if depth not in self.open:
            return None
        span, began = self.open.pop(depth)
        now = max(began, event.time)  # the clock may have been set back
        said = {"eventrain.who": end.who, "eventrain.reason": end.reason}
        ending = {key: escape_surrogates(text) for key, text in said.items() if text is not None}
        span.set_attributes({**attributes, **ending, "eventrain.status": end.status})
        if end.status == "cancelled":
            span.add_event("eventrain.cancelled", ending, _nanoseconds(now))
        elif end.status == "failed":
            from opentelemetry.trace import Status, StatusCode

            error = escape_surrogates(end.reason or "")
            span.set_attribute("error.type", error.partition(":")[0] or "_OTHER")
            span.set_status(Status(StatusCode.ERROR, error))
        span.end(_nanoseconds(now))
        return now - began

    def close(self) -> None:
        while self.open:
            with suppress(Exception):  # a processor of the host may raise for each of them
                self.leave(_FIT)

    def leave(self, depth: int) -> None:
        """End the spans from `depth` inwards, whose own ends were not observed."""
        while self.open and (inner := max(self.open)) >= depth:
            span, began = self.open.pop(inner)
            span.set_attribute("eventrain.status", "unknown")
            span.end(_nanoseconds(max(began, self._now)))

    def _context(self) -> Context | None:
        """The context of the innermost open span. None, for the first span, is the context of this
        task: the task of an observer starts with the context variables of the caller of `fit`."""
        if not self.open:
            return None
        from opentelemetry.trace import set_span_in_context

        return set_span_in_context(self.open[max(self.open)][0])


def _place(event: BeforeEpoch | BeforeBatch) -> dict[str, Any]:
    return {"eventrain.epoch": event.epoch, "eventrain.phase": event.phase}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)

"""The counts and durations of `OpenTelemetryCB`, as the instruments of one meter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from copy import copy
from typing import TYPE_CHECKING, Any

from ...events import CleanupBatch, CleanupEpoch, CleanupFit
from .._checks import is_number
from .jsonable import escape_surrogates

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

EPOCH_BUCKETS = (0.1, 0.5, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
BATCH_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60)
"""Bounds of the histograms' buckets, in seconds; a view of the host may set others."""
MAX_METRICS = 50
"""Metric names that the gauge of one instance shows; spans have all of them."""


class Meters:
    """The instruments, and the counts reported so far."""

    def __init__(self, meter: Meter) -> None:
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
        self._metric = meter.create_gauge("eventrain.metric", "", "Those of the last epoch")
        self._left_out = meter.create_counter(
            "eventrain.metrics.left_out", "{value}", "Numbers not shown: there are too many names"
        )
        self._names: set[str] = set()
        statuses = ("completed", "cancelled", "failed")
        # Batches that ended, over all fits: counted in the training thread, reported here.
        self.done = {(training, status): 0 for training in (True, False) for status in statuses}
        self._reported = dict(self.done)
        self.n_samples = 0  # of this epoch

    def __deepcopy__(self, memo: object) -> Meters:
        """With the same instruments, and counts of its own."""
        copied = copy(self)
        copied.done, copied._reported = dict.fromkeys(self.done, 0), dict.fromkeys(self.done, 0)
        copied._names = set(self._names)
        return copied

    def end_batch(self, event: CleanupBatch, seconds: float | None) -> None:
        self._count(event)
        if seconds is not None:
            self._sampled.record(seconds, _kind(event.training, event.end.status))

    def end_epoch(
        self, event: CleanupEpoch, seconds: float | None, numbers: dict[str, Any]
    ) -> None:
        self._count(event)
        if event.all_read:
            self._set_gauges(event, numbers)
        self.n_samples = 0
        if seconds is not None:
            self._epochs.record(seconds, _kind(event.training, event.end.status))

    def _set_gauges(self, event: CleanupEpoch, numbers: dict[str, Any]) -> None:
        which = {"eventrain.phase": event.phase}
        for key, number in numbers.items():
            if isinstance(number, str):
                self._nonfinite.add(1, which)
                continue
            name = key.removeprefix("eventrain.metric.")
            if len(self._names) < MAX_METRICS:
                self._names.add(name)
            if name in self._names:
                self._metric.set(number, {**which, "eventrain.metric.name": name})
            else:
                self._left_out.add(1, which)

    def end_fit(self, event: CleanupFit) -> None:
        self._count_batches()
        self._fits.add(1, {"eventrain.status": event.end.status})

    def _count(self, event: CleanupBatch | CleanupEpoch) -> None:
        self._count_batches()
        new, self.n_samples = event.n_samples - self.n_samples, event.n_samples
        if new > 0:
            self._samples.add(new, {"eventrain.phase": event.phase})

    def _count_batches(self) -> None:
        for (training, status), n in self.done.items():
            new = n - self._reported[training, status]
            if new:
                self._reported[training, status] = n
                self._batches.add(new, _kind(training, status))


def _kind(training: bool, status: str) -> dict[str, str]:
    return {"eventrain.phase": "train" if training else "valid", "eventrain.status": status}


def numbers_of(prefix: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The finite scalars of `values` as attributes; the other scalars as text, by other keys."""
    numbers: dict[str, Any] = {}
    for name, value in values.items():
        if getattr(value, "ndim", None) == 0 and callable(tolist := getattr(value, "tolist", None)):
            value = tolist()  # a numpy number, or a tensor, for which the event loop waits
        if not is_number(value):
            continue
        try:
            number = float(value)
        except OverflowError:  # an int that no float can hold
            number = math.inf if value > 0 else -math.inf
        if math.isfinite(number):
            numbers[prefix + escape_surrogates(name)] = number
        else:
            numbers["eventrain.nonfinite." + escape_surrogates(name)] = str(number)
    return numbers

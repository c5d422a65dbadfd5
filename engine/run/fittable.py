"""A loop with subscriptions, and the settings of its fits."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..checkpoint.resume import ResumableBatchReader
from ..listeners.source import EventSource
from ..loop.updates import UpdatingLoop
from .result import FitResult


class Fittable(UpdatingLoop, EventSource):
    """A loop with subscriptions, and the settings of its fits.

    Attributes:
        lr: the learning rate for `opt_func`.
        fit_lr: that of the running fit, or of the last one: `lr` of `fit`, or else the learner's;
            None if the optimizer is kept and has its own.
        opt_func: makes the optimizer of a fit; None keeps the current optimizer.
        cleanup_timeout: seconds that an async Cleanup* receiver gets after the host has cancelled.
        drain_timeout: seconds that observers get for their buffers after the fit has ended.
        result: the result of the last fit, including failed and cancelled ones.
        metrics: the `MetricsCB` of the last fit, which sets it.
    """

    lr: float
    fit_lr: Any = None
    opt_func: Callable[..., Any] | None
    cleanup_timeout: float = 5.0
    drain_timeout: float = 2.0
    result: FitResult | None = None
    metrics: Any

    def measured(self) -> dict[str, Any]:
        """The numbers of the current epoch so far, from all callbacks that measure it."""
        numbers: dict[str, Any] = {}
        for cb in self.cbs:
            with suppress(Exception):  # the error that cut the epoch short is the one to raise
                numbers.update(cb.measured())
        return numbers

    @property
    def resumed_from(self) -> Path | None:
        """The checkpoint from which the current fit, or the last one, was resumed."""
        reader = self.batch_reader
        return reader.resumed_from if isinstance(reader, ResumableBatchReader) else None

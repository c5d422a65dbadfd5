"""Records: what logs, streams and metrics report of a run, in a published format.

`docs/record.schema.json` is its JSON Schema.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable
from datetime import UTC, datetime
from typing import Any, TypeVar

from ...events import (
    AfterBatch,
    AfterValidation,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CleanupEpoch,
    CleanupFit,
    Event,
    ScopeEnd,
    Watcher,
)
from ._pending_scalar import PendingScalar
from ._sampling import Sampler, check_sampling, pending_loss
from .jsonable import Conversion

SCHEMA_VERSION = 1
"""Increased when a key is renamed, removed, or changes its meaning; not when one is added."""

T = TypeVar("T")
_Measured = tuple[Conversion, Any]
"""The numbers of an epoch as JSON can hold them, and the conversion that made them."""


class RecordCB(Callback, ABC):
    """Base class of callbacks that report a run: calls `write` with each record.

    It observes: `write` is called on the host's event loop and never holds up the training. A
    record is a plain dict that JSON can hold, described by `docs/record.schema.json`: "event" is
    "fit_started", "batch", "validation", "epoch" or "fit_ended". One instance may report several
    fits at once.

    Args:
        every: make a record for every n-th training batch of the fit; 0 for none.
        every_seconds: leave out batches within this many seconds of the last one with a record.

    Raises:
        ValueError: `every` or `every_seconds` is negative or not a number.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import RecordCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> class PrintCB(RecordCB):
        ...     def write(self, record):
        ...         print(record["event"], record.get("epoch"), record.get("iter"))
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
        >>> result = learner.run(1, valid=False, cbs=PrintCB(every=2))
        fit_started None None
        batch 0 1
        batch 0 3
        epoch 0 None
        fit_ended None None
    """

    observes = (BeforeFit, BeforeEpoch, AfterBatch, AfterValidation, CleanupEpoch, CleanupFit)
    buffer = 100_000  # beginnings and ends must not be lost, however long the host is busy

    def __init__(self, every: int = 100, every_seconds: float = 0) -> None:
        check_sampling(every, every_seconds)
        self.every = every
        self.every_seconds = every_seconds

    @abstractmethod
    def write(self, record: dict[str, Any]) -> Awaitable[Any] | None:
        """Report one record. May be an `async def`."""

    def watcher(self, event: Event) -> Watcher:
        """The object that makes the records of one fit, and passes them to `write`."""
        return CallbackRecords(self)


class RecordWatcher(ABC):
    """Makes the records of one fit.

    `wants` runs in the training thread: it chooses the batches, and starts to copy their losses to
    the host. `observe` runs on the event loop.
    """

    def __init__(self, every: int, every_seconds: float) -> None:
        self._sampler = Sampler(every, every_seconds)
        # Of events that are on their way to `observe`; those that are dropped never arrive there.
        self._losses: deque[tuple[tuple[int, int], PendingScalar | None]] = deque()
        self._measured: deque[tuple[tuple[int, bool], _Measured]] = deque()
        self._fit_began: float | None = None
        self._epoch_began: float | None = None
        self._last_time = 0.0
        self._last_n_samples = 0

    def wants(self, event: Event) -> bool:
        """Whether the event has a record, or starts something that has one."""
        match event:
            case CleanupEpoch():
                # Now, because the training may change in place what was measured.
                conversion = Conversion()
                metrics = conversion.first_of(event.metrics, "metrics")
                self._measured.append(((event.epoch, event.training), (conversion, metrics)))
            case AfterBatch():
                if not event.training or not self._sampler.takes_next():
                    return False
                self._losses.append(((event.epoch, event.iter), pending_loss(event)))
        return True

    def observe(self, event: Event) -> Awaitable[Any] | None:
        """Write the record of an event."""
        match event:
            case BeforeFit():
                self._fit_began = event.time
                return self._record(event, "fit_started", _size_of(event))
            case BeforeEpoch():
                self._epoch_began = self._last_time = event.time
                self._last_n_samples = 0
            case AfterBatch():
                loss = take_of(self._losses, (event.epoch, event.iter))
                number = None if loss is None else loss.get()
                if loss is not None and number is None:
                    return self._when_arrived(event, loss)
                return self._record(event, "batch", self._batch_fields(event, number))
            case AfterValidation():
                conversion = Conversion()
                fields = _validation_fields(event, conversion)
                return self._record(event, "validation", fields, conversion)
            case CleanupEpoch():
                seconds = event.time - (self._epoch_began or event.time)
                self._epoch_began = None
                conversion, metrics = take_of(self._measured, (event.epoch, event.training))
                fields = _epoch_fields(event, metrics, seconds)
                return self._record(event, "epoch", fields, conversion)
            case CleanupFit():
                seconds = event.time - (self._fit_began or event.time)
                end = {**_end_fields(event.end), "seconds": seconds}
                return self._record(event, "fit_ended", end)
        return None

    async def _when_arrived(self, event: AfterBatch, loss: PendingScalar) -> None:
        fields = self._batch_fields(event, await loss.arrival())
        written = self._record(event, "batch", fields)
        if inspect.isawaitable(written):
            await written

    def _batch_fields(self, event: AfterBatch, loss: float | None) -> dict[str, Any]:
        n_samples = event.n_samples - self._last_n_samples
        seconds = event.time - self._last_time
        self._last_time, self._last_n_samples = event.time, event.n_samples
        return {
            "phase": event.phase,
            "epoch": event.epoch,
            "iter": event.iter,
            "n_iter": event.n_iter,
            "steps": event.steps,
            "loss": loss,
            "lr": _number(event.lr),
            **({"lrs": [_number(lr) for lr in event.lrs]} if len(event.lrs) > 1 else {}),
            "samples_per_second": _rate(n_samples, seconds),
        }

    def _record(
        self,
        event: Event,
        name: str,
        fields: dict[str, Any],
        conversion: Conversion | None = None,
    ) -> Awaitable[Any] | None:
        conversion = conversion or Conversion()
        fields = {
            key: value if key == "metrics" else conversion.of(value, key)
            for key, value in fields.items()
        }
        if conversion.nonfinite:
            fields["nonfinite"] = conversion.nonfinite
        if conversion.left_out:
            fields["left_out"] = conversion.left_out
        when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")
        first = {"event": name, "schema_version": SCHEMA_VERSION, "timestamp": when}
        which = {"run_id": event.run_id, "purpose": event.purpose}
        return self.write({**first, **which, **fields})

    @abstractmethod
    def write(self, record: dict[str, Any]) -> Awaitable[Any] | None:
        """Report one record."""


class CallbackRecords(RecordWatcher):
    """Makes the records of one fit, and passes them to a callback."""

    def __init__(self, callback: RecordCB) -> None:
        super().__init__(callback.every, callback.every_seconds)
        self._callback = callback

    def write(self, record: dict[str, Any]) -> Awaitable[Any] | None:
        return self._callback.write(record)


def take_of(waiting: deque[tuple[Any, T]], key: object) -> T:
    """The value of this key; those before it are of events that were dropped."""
    while True:
        first, value = waiting.popleft()
        if first == key:
            return value


def _size_of(event: BeforeFit) -> dict[str, Any]:
    return {"n_epochs": event.n_epochs, "n_steps": event.n_steps}


def _epoch_fields(event: CleanupEpoch, metrics: object, seconds: float) -> dict[str, Any]:
    return {
        "phase": event.phase,
        "epoch": event.epoch,
        **_end_fields(event.end),
        "metrics": metrics,
        "seconds": seconds,
        "samples": event.n_samples,
        "all_read": event.all_read,
        "samples_per_second": _rate(event.n_samples, seconds),
    }


def _validation_fields(event: AfterValidation, conversion: Conversion) -> dict[str, Any]:
    return {
        "name": event.name,
        "epoch": event.epoch,
        "steps": event.steps,
        "metrics": conversion.first_of(event.metrics, "metrics"),
        "seconds": event.seconds,
        "samples": event.n_samples,
        "samples_per_second": _rate(event.n_samples, event.seconds),
    }


def _end_fields(end: ScopeEnd) -> dict[str, Any]:
    if end.status == "completed":
        return {"status": end.status}
    return {"status": end.status, "who": end.who, "reason": end.reason}


def _number(lr: Any) -> float | None:
    return None if lr is None else float(lr)


def _rate(samples: int, seconds: float) -> float | None:
    return samples / seconds if seconds > 0 else None

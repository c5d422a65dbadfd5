"""One record a fact: what logs, streams and metrics say of a run, in a published form.

`docs/record.schema.json` is its JSON Schema, `docs/records.md` its description.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from ..events import (
    AfterBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CleanupEpoch,
    CleanupFit,
    Event,
    ScopeEnd,
)

SCHEMA_VERSION = 1
"""Goes up when a key is renamed, removed, or means something else; not when one is added."""


class RecordCB(Callback, ABC):
    """Base of the callbacks that tell others of the run: calls `write` with each record.

    It observes: `write` is called on the host's event loop and never holds up the training. A
    record is a plain dict that JSON can hold, as `docs/record.schema.json` says: "event" is
    "fit_started", "batch", "epoch" or "fit_ended". An instance watches one fit at a time.

    Args:
        every: a record for every n-th training batch; 0 for none.
        every_seconds: and not before this many seconds after the last batch that had one.

    Raises:
        ValueError: `every` or `every_seconds` is negative or no number.

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

    observes = (BeforeFit, BeforeEpoch, AfterBatch, CleanupEpoch, CleanupFit)
    buffer = 100_000  # what begins and ends is not to be lost, however long the host is busy

    def __init__(self, every: int = 100, every_seconds: float = 0) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"every={every!r}: give a number of batches, 0 for no batch records")
        is_number = isinstance(every_seconds, int | float) and not isinstance(every_seconds, bool)
        if not is_number or not 0 <= every_seconds < math.inf:
            raise ValueError(f"every_seconds={every_seconds!r}: give seconds, 0 for no such limit")
        self.every = every
        self.every_seconds = every_seconds
        self._due = -math.inf
        self._began: dict[type[Event], float] = {}
        self._last: tuple[float, int] = (0.0, 0)

    @abstractmethod
    def write(self, record: dict[str, Any]) -> None:
        """Tell others of one record."""

    def wants(self, event: Event) -> bool:
        """All but the batches between those that get a record."""
        if isinstance(event, BeforeFit):
            self._due = -math.inf
        if not isinstance(event, AfterBatch):
            return True
        if not self.every or not event.training or (event.iter + 1) % self.every:
            return False
        if self.every_seconds:
            now = monotonic()
            if now < self._due:
                return False
            self._due = now + self.every_seconds
        return True

    def observe(self, event: Event) -> None:
        """Write the record of an event."""
        match event:
            case BeforeFit():
                self._began[BeforeFit] = event.time
                self._write(event, "fit_started", {"n_epochs": event.n_epochs})
            case BeforeEpoch():
                self._began[BeforeEpoch] = event.time
                self._last = event.time, 0
            case AfterBatch():
                self._write(event, "batch", self._of_batch(event))
            case CleanupEpoch():
                self._write(event, "epoch", self._of_epoch(event))
            case CleanupFit():
                seconds = self._since(BeforeFit, event)
                self._write(event, "fit_ended", {**_of_end(event.end), "seconds": seconds})

    def _of_batch(self, event: AfterBatch) -> dict[str, Any]:
        time, n_samples = self._last
        self._last = event.time, event.n_samples
        return {
            "phase": _phase(event.training),
            "epoch": event.epoch,
            "iter": event.iter,
            "n_iter": event.n_iter,
            # The event loop waits for the device here, for the batches that were asked for.
            "loss": None if event.loss is None else event.loss.float().mean().item(),
            "lr": None if event.lr is None else float(event.lr),
            "samples_per_second": _rate(event.n_samples - n_samples, event.time - time),
        }

    def _of_epoch(self, event: CleanupEpoch) -> dict[str, Any]:
        seconds = self._since(BeforeEpoch, event)
        return {
            "phase": _phase(event.training),
            "epoch": event.epoch,
            **_of_end(event.end),
            "metrics": event.metrics,
            "seconds": seconds,
            "samples": event.n_samples,
            "samples_per_second": _rate(event.n_samples, seconds),
        }

    def _since(self, beginning: type[Event], event: Event) -> float:
        # What is stopped before it begins ends without the event of its beginning.
        return event.time - self._began.pop(beginning, event.time)

    def _write(self, event: Event, name: str, fields: dict[str, Any]) -> None:
        nonfinite: dict[str, str] = {}
        fields = {key: plain(value, key, nonfinite) for key, value in fields.items()}
        if nonfinite:
            fields["nonfinite"] = nonfinite
        when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")
        self.write(
            {
                "event": name,
                "schema_version": SCHEMA_VERSION,
                "timestamp": when,
                "run_id": event.run_id,
                **fields,
            }
        )


def _phase(training: bool) -> str:
    return "train" if training else "valid"


def _rate(samples: int, seconds: float) -> float | None:
    return samples / seconds if seconds > 0 else None


def _of_end(end: ScopeEnd) -> dict[str, Any]:
    if end.status == "completed":
        return {"status": end.status}
    return {"status": end.status, "who": end.who, "reason": end.reason}


MAX_DEPTH = 20
"""Lists in lists, and mappings, that a record holds; what is deeper, or circular, is text."""


def plain(
    value: Any, path: str = "", nonfinite: dict[str, str] | None = None, depth: int = 0
) -> Any:
    """`value` as JSON can hold it, with null for a float that is not finite.

    Args:
        value: numbers, texts, tensors, arrays, lists and mappings of them; anything else
            becomes its text.
        path: where it stands, such as "metrics.loss".
        nonfinite: takes, by path, what a number that became null was.
        depth: in how many lists and mappings it stands.

    Example:
        >>> import torch
        >>> plain({"loss": float("nan"), "per_class": torch.tensor([1.0, 0.5])})
        {'loss': None, 'per_class': [1.0, 0.5]}
    """
    if (tolist := getattr(value, "tolist", None)) is not None:  # a tensor, a number of numpy's
        with suppress(Exception):  # a sparse tensor has none, nor one without data
            value = tolist()
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        items = {_text(key): item for key, item in value.items()}  # 1 and "1" are one in JSON
        return {
            key: plain(item, f"{path}.{key}", nonfinite, depth + 1) for key, item in items.items()
        }
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return [plain(item, path, nonfinite, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if nonfinite is not None:
            nonfinite[path] = str(value)
        return None
    if isinstance(value, int) and value.bit_length() > 10_000:
        return hex(value)  # in Python, too, so many decimal digits are refused
    return value if isinstance(value, str | int | float | None) else _text(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # a fault of its own, which is not to end the logging
        return object.__repr__(value)


def numbers(record: Mapping[str, Any], part: str = "") -> dict[str, float]:
    """The numbers in a record, or in one part of it; those not finite as they were.

    Args:
        record: as `RecordCB.write` gets it.
        part: a key of the record that holds others, such as "metrics".

    Example:
        >>> lost = {"metrics.loss": "nan"}
        >>> numbers({"metrics": {"loss": None, "count": 3}, "nonfinite": lost}, "metrics")
        {'loss': nan, 'count': 3.0}
    """
    path = f"{part}." if part else ""
    lost = record.get("nonfinite", {})
    found = {}
    for name, value in (record[part] if part else record).items():
        if value is None and path + name in lost:
            value = float(lost[path + name])
        if isinstance(value, int | float) and not isinstance(value, bool):
            # Half of a surrogate pair would break the whole page, or the file.
            name = name.encode(errors="backslashreplace").decode()
            with suppress(OverflowError):  # an integer that no float can hold
                found[name] = float(value)
    return found

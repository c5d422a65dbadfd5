"""One record a fact: what logs, streams and metrics say of a run, in a published form.

`docs/record.schema.json` is its JSON Schema, `docs/records.md` its description.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from weakref import WeakKeyDictionary

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
from .host_number import HostNumber
from .sampling import Sampler, check_sampling, loss_on_its_way, phase

SCHEMA_VERSION = 1
"""Goes up when a key is renamed, removed, or means something else; not when one is added."""


class RecordCB(Callback, ABC):
    """Base of the callbacks that tell others of the run: calls `write` with each record.

    It observes: `write` is called on the host's event loop and never holds up the training. A
    record is a plain dict that JSON can hold, as `docs/record.schema.json` says: "event" is
    "fit_started", "batch", "epoch" or "fit_ended". One instance may watch several fits at once.

    Args:
        every: a record for every n-th training batch of the fit; 0 for none.
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
        check_sampling(every, every_seconds)
        self.every = every
        self.every_seconds = every_seconds
        self._runs: WeakKeyDictionary[Any, _Run] = WeakKeyDictionary()  # of each learner

    @abstractmethod
    def write(self, record: dict[str, Any]) -> Awaitable[Any] | None:
        """Tell others of one record. May be an `async def`."""

    def wants(self, event: Event) -> bool:
        """All but the batches between those that get a record."""
        run = self._runs.get(event.learner)
        # Made here, before the event loop sees the event: the two threads share it.
        if run is None or run.id != event.run_id:
            run = _Run(event.run_id, Sampler(self.every, self.every_seconds))
            self._runs[event.learner] = run
        if not isinstance(event, AfterBatch):
            return True
        if not event.training or not run.sampler.takes_next():
            return False
        run.losses[event.epoch, event.iter] = loss_on_its_way(event)
        return True

    def observe(self, event: Event) -> Awaitable[Any] | None:
        """Write the record of an event."""
        run = self._runs[event.learner]
        match event:
            case BeforeFit():
                run.began = event.time
                return self._write(event, "fit_started", {"n_epochs": event.n_epochs})
            case BeforeEpoch():
                run.epoch_began = event.time
                run.last = event.time, 0
            case AfterBatch():
                return self._write(event, "batch", _of_batch(event, run))
            case CleanupEpoch():
                seconds = event.time - (run.epoch_began or event.time)
                run.epoch_began = None
                return self._write(event, "epoch", _of_epoch(event, seconds))
            case CleanupFit():
                del self._runs[event.learner]
                seconds = event.time - (run.began or event.time)
                ending = {**_of_end(event.end), "seconds": seconds}
                return self._write(event, "fit_ended", ending)
        return None

    def _write(self, event: Event, name: str, fields: dict[str, Any]) -> Awaitable[Any] | None:
        nonfinite: dict[str, str] = {}
        fields = {key: plain(value, key, nonfinite) for key, value in fields.items()}
        if nonfinite:
            fields["nonfinite"] = nonfinite
        when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")
        first = {"event": name, "schema_version": SCHEMA_VERSION, "timestamp": when}
        return self.write({**first, "run_id": event.run_id, **fields})


@dataclass(slots=True)
class _Run:
    """What is kept of a run that is watched: an instance may watch several at once."""

    id: str
    sampler: Sampler
    losses: dict[tuple[int, int], HostNumber | None] = field(default_factory=dict)
    began: float | None = None
    epoch_began: float | None = None
    last: tuple[float, int] = (0.0, 0)


def _of_batch(event: AfterBatch, run: _Run) -> dict[str, Any]:
    time, n_samples = run.last
    run.last = event.time, event.n_samples
    # Where the loss has not arrived yet, the event loop waits for it here.
    loss = run.losses.pop((event.epoch, event.iter))
    return {
        "phase": phase(event),
        "epoch": event.epoch,
        "iter": event.iter,
        "n_iter": event.n_iter,
        "loss": None if loss is None else loss.get(wait=True),
        "lr": None if event.lr is None else float(event.lr),
        "samples_per_second": _rate(event.n_samples - n_samples, event.time - time),
    }


def _of_epoch(event: CleanupEpoch, seconds: float) -> dict[str, Any]:
    return {
        "phase": phase(event),
        "epoch": event.epoch,
        **_of_end(event.end),
        "metrics": event.metrics,
        "seconds": seconds,
        "samples": event.n_samples,
        "samples_per_second": _rate(event.n_samples, seconds),
    }


def _of_end(end: ScopeEnd) -> dict[str, Any]:
    if end.status == "completed":
        return {"status": end.status}
    return {"status": end.status, "who": end.who, "reason": end.reason}


def _rate(samples: int, seconds: float) -> float | None:
    return samples / seconds if seconds > 0 else None


MAX_DEPTH = 20
"""Lists in lists, and mappings, that a record holds; what is deeper, or circular, is text."""
MAX_ITEMS = 1000
"""Numbers in one list or tensor that a record holds; of a larger one it says how large it is."""


def plain(
    value: Any, path: str = "", nonfinite: dict[str, str] | None = None, depth: int = 0
) -> Any:
    """`value` as JSON can hold it, with null for a float that is not finite.

    Args:
        value: numbers, texts, tensors, arrays, lists and mappings of them; anything else
            becomes its text, and what is too large a text that says so.
        path: where it stands, such as "metrics.loss".
        nonfinite: takes, by path, what a number that became null was.
        depth: in how many lists and mappings it stands.

    Example:
        >>> import torch
        >>> plain({"loss": float("nan"), "per_class": torch.tensor([1.0, 0.5])})
        {'loss': None, 'per_class': [1.0, 0.5]}
    """
    if (tolist := getattr(value, "tolist", None)) is not None:  # a tensor, a number of numpy's
        if math.prod(getattr(value, "shape", ())) > MAX_ITEMS:
            return f"{type(value).__name__} of {tuple(value.shape)}"
        with suppress(Exception):  # a sparse tensor has none, nor one without data
            value = tolist()
    if isinstance(value, list | tuple | Mapping) and _is_large(value):
        return f"{type(value).__name__} of {len(value)}"
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


def _is_large(value: Any) -> bool:
    """Whether a list, or those in it, have more items than a record holds."""
    n, lists = 0, [value]
    while lists and n <= MAX_ITEMS:
        items = lists.pop()
        n += len(items)
        if not isinstance(items, Mapping):  # the values of a mapping are judged one by one
            lists += [item for item in items[:MAX_ITEMS] if isinstance(item, list | tuple)]
    return n > MAX_ITEMS


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
            with suppress(OverflowError):  # an integer that no float can hold
                found[encodable(name)] = float(value)
    return found


def encodable(value: object) -> str:
    """`value` as text that can be encoded: half of a surrogate pair would break a whole page, a
    file, or a batch of an exporter.

    Example:
        >>> print(encodable(chr(0xDC80)))
        \\udc80
    """
    return str(value).encode(errors="backslashreplace").decode()

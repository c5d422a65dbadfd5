"""One structured log line a fact, written beside the training."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict

from ..events import (
    AfterBatch,
    BatchEvent,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CleanupEpoch,
    CleanupFit,
    Event,
    ScopeEnd,
)

_LEVELS = {"completed": "info", "cancelled": "warning", "failed": "error"}


class StructlogCB(Callback):
    """Logs the run through structlog: its start, every n-th batch, every epoch, its end.

    It observes: lines are written on the host's event loop, in batches, and never hold up the
    training. The context variables bound where `fit` was called are in every line.

    | event | beside `run_id` and `timestamp` |
    |---|---|
    | fit_started | n_epochs |
    | batch | phase, epoch, iter, n_iter, loss, lr, samples_per_second |
    | epoch | phase, epoch, status, loss and metrics, seconds, samples, samples_per_second |
    | fit_ended | status, seconds; who and reason unless completed |

    A number that is not finite is null, and its key stands under "nonfinite" with what it was.
    A metric called like another key of the line is "metric_" and its name.

    Args:
        every: a line for every n-th training batch; 0 for none.
        format: "json" for machines, "console" for people; None leaves it to `logger`.
        file: where "json" and "console" write to; standard error by default.
        logger: the structlog logger to use, by default the host's own, as configured.

    Raises:
        ValueError: `every` is negative, `format` is unknown, or there are both a format and a
            logger.

    Example:
        >>> import sys, torch
        >>> from eventrain.callbacks import StructlogCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> log = StructlogCB(format="json", file=sys.stdout)
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), cbs=log)
        >>> result = learner.run(1, valid=False)  # doctest: +ELLIPSIS
        {"event": "fit_started", "run_id": "...", "n_epochs": 1, "timestamp": "...", ...}
        {"event": "epoch", "run_id": "...", "phase": "train", "epoch": 0, ...}
        {"event": "fit_ended", "run_id": "...", "status": "completed", ...}
    """

    observes = (BeforeFit, BeforeEpoch, AfterBatch, CleanupEpoch, CleanupFit)

    def __init__(
        self,
        every: int = 100,
        format: Literal["json", "console"] | None = None,  # noqa: A002 - its usual name
        file: TextIO | None = None,
        logger: Any = None,
    ) -> None:
        if isinstance(every, bool) or not isinstance(every, int) or every < 0:
            raise ValueError(f"every={every!r}: give a number of batches, 0 for no batch lines")
        if format is not None and logger is not None:
            raise ValueError("give a logger, which has its own format, or a format; not both")
        self.every = every
        self.logger = logger or (
            structlog.get_logger("eventrain") if format is None else _logger(format, file)
        )
        self._fit_began = 0.0
        self._epoch_began = 0.0
        self._last: tuple[float, int] = (0.0, 0)

    def wants(self, event: Event) -> bool:
        """All of them, but only every n-th training batch."""
        if not isinstance(event, AfterBatch):
            return True
        return bool(self.every) and event.training and (event.iter + 1) % self.every == 0

    def observe(self, event: Event) -> None:
        """Write the line of an event."""
        match event:
            case BeforeFit():
                self._fit_began = event.time
                self._write("info", "fit_started", event, {"n_epochs": event.n_epochs})
            case BeforeEpoch():
                self._epoch_began = event.time
                self._last = event.time, 0
            case AfterBatch():
                self._write("info", "batch", event, self._of_batch(event))
            case CleanupEpoch():
                seconds = event.time - self._epoch_began
                fields = {
                    "phase": _phase(event.training),
                    "epoch": event.epoch,
                    **_of_end(event.end),
                    **{_free(str(name)): value for name, value in event.metrics.items()},
                    "seconds": seconds,
                    "samples": event.n_samples,
                    "samples_per_second": _rate(event.n_samples, seconds),
                }
                self._write(_LEVELS[event.end.status], "epoch", event, fields)
            case CleanupFit():
                fields = {**_of_end(event.end), "seconds": event.time - self._fit_began}
                self._write(_LEVELS[event.end.status], "fit_ended", event, fields)

    def _of_batch(self, event: BatchEvent) -> dict[str, Any]:
        time, n_samples = self._last
        self._last = event.time, event.n_samples
        return {
            "phase": _phase(event.training),
            "epoch": event.epoch,
            "iter": event.iter,
            "n_iter": event.n_iter,
            # The event loop waits for the device here, for the lines that were asked for.
            "loss": None if event.loss is None else event.loss.float().mean().item(),
            "lr": None if event.lr is None else float(event.lr),
            "samples_per_second": _rate(event.n_samples - n_samples, event.time - time),
        }

    def _write(self, level: str, name: str, event: Event, fields: dict[str, Any]) -> None:
        nonfinite: dict[str, str] = {}
        fields = {key: _finite(key, value, nonfinite) for key, value in fields.items()}
        if nonfinite:
            fields["nonfinite"] = nonfinite
        when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")
        log = getattr(self.logger, level)
        log(name, run_id=event.run_id, **fields, timestamp=when)


def _phase(training: bool) -> str:
    return "train" if training else "valid"


def _rate(samples: int, seconds: float) -> float | None:
    return samples / seconds if seconds > 0 else None


def _of_end(end: ScopeEnd) -> dict[str, Any]:
    if end.status == "completed":
        return {"status": end.status}
    return {"status": end.status, "who": end.who, "reason": end.reason}


_OF_LINE = ("event", "run_id", "timestamp", "level", "nonfinite")
_OF_EPOCH = (
    "phase",
    "epoch",
    "status",
    "who",
    "reason",
    "seconds",
    "samples",
    "samples_per_second",
)
_OF_STRUCTLOG = ("exc_info", "exception", "stack", "stack_info", "positional_args")
_OF_CALLS = ("self", "method_name")  # arguments of structlog's own methods
_TAKEN = frozenset((*_OF_LINE, *_OF_EPOCH, *_OF_STRUCTLOG, *_OF_CALLS))


def _free(name: str) -> str:
    return f"metric_{name}" if name in _TAKEN else name


def _finite(key: str, value: Any, nonfinite: dict[str, str]) -> Any:
    """`value`, with null for every float that JSON cannot hold, told in `nonfinite`."""
    if callable(tolist := getattr(value, "tolist", None)):  # a tensor, a number of numpy's
        value = tolist()
    if isinstance(value, Mapping):
        return {str(k): _finite(key, item, nonfinite) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(key, item, nonfinite) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[key] = str(value)
        return None
    return value


def _logger(format: str, file: TextIO | None) -> Any:  # noqa: A002 - as above
    """A structlog logger of our own, beside the host's configuration."""
    file = sys.stderr if file is None else file
    if format == "json":
        render: list[Any] = [structlog.processors.JSONRenderer(_to_json)]
    elif format == "console":
        render = [_escape, structlog.dev.ConsoleRenderer(colors=file.isatty(), sort_keys=False)]
    else:
        raise ValueError(f"format={format!r}: choose 'json' or 'console'")
    merge = structlog.contextvars.merge_contextvars
    return structlog.wrap_logger(
        structlog.WriteLogger(file),
        processors=[merge, structlog.processors.add_log_level, _event_first, *render],
        wrapper_class=structlog.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
    )


def _to_json(record: dict[str, Any], **_: Any) -> str:
    # Once more over all of it: the host's context variables are in it by now.
    finite = {key: _finite(key, value, {}) for key, value in record.items()}
    return json.dumps(finite, allow_nan=False, default=str)


def _event_first(logger: Any, method: str, record: EventDict) -> EventDict:
    return {"event": record.pop("event"), **record}


def _escape(logger: Any, method: str, record: EventDict) -> EventDict:
    """Control characters as escapes, so that no value can forge a line or steer a terminal."""
    return {
        # The renderer would give these lines of their own.
        f"{key}_" if key in ("stack", "exception", "exc_info") else printable(key): _plain(value)
        for key, value in record.items()
    }


def _plain(value: Any) -> Any:
    text = value if isinstance(value, str) else repr(value)
    return value if text.isprintable() else printable(text)


def printable(text: str) -> str:
    """`text` with control characters and line separators as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

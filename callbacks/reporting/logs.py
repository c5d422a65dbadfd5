"""One structured log line per fact, written while the training runs."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict, Processor

from ...events import BeforeFit
from .jsonable import Conversion, escape_control
from .records import RecordCB

_LEVELS = {"completed": "info", "cancelled": "warning", "failed": "error"}


class StructlogCB(RecordCB):
    """Logs the run through structlog: its start, every n-th batch, every epoch, its end.

    It observes: lines are written on the host's event loop, several at a time, and never hold up
    the training. Each is a record of `docs/record.schema.json`, together with the context
    variables that are bound where `fit` is called, which structlog's own loggers add by default.
    A number that is not finite is null, and "nonfinite" has its text by its key. A structlog logger
    of the host also gets the timestamp as "emitted_at", because its `TimeStamper` would replace it
    by the time at which the line is written (`MaybeTimeStamper` does not). Log lines of your
    own receivers in the training thread have the `run_id` of the fit.

    Args:
        every: write a line for every n-th training batch of the fit; 0 for none.
        every_seconds: leave out batches within this many seconds of the last one with a line.
        format: "json" for machines, "console" for people; None leaves it to `logger`.
        file: the file that "json" and "console" write to; by default what is standard error when
            a line is written.
        logger: the structlog logger to use, by default the host's own, as configured; its methods
            may be async. Or a `logging.Logger`, or an adapter of one, which gets the line as JSON,
            and the record in `extra`, under "eventrain". For all of these, control characters in
            strings are escaped, because it is not known where they will be shown.

    Raises:
        ValueError: `every` or `every_seconds` is negative; `format` is unknown; both a format and
            a logger are given, or a file and no format.
        TypeError: `logger` is not a logger.

    Example:
        >>> import sys, torch
        >>> from eventrain.callbacks import StructlogCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> log = StructlogCB(format="json", file=sys.stdout)
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), cbs=log)
        >>> result = learner.run(1, valid=False)  # doctest: +ELLIPSIS
        {"event": "fit_started", "schema_version": 1, "timestamp": "...", "run_id": "...", ...}
        {"event": "epoch", ..., "phase": "train", "epoch": 0, "status": "completed", ...}
        {"event": "fit_ended", ..., "status": "completed", "seconds": ..., "level": "info"}
    """

    order: float = -math.inf  # the context variable is set before other receivers log
    shareable = True

    def __init__(
        self,
        every: int = 100,
        format: Literal["json", "console"] | None = None,  # noqa: A002 - its usual name
        file: TextIO | None = None,
        logger: Any = None,
        *,
        every_seconds: float = 0,
    ) -> None:
        super().__init__(every, every_seconds)
        if format is not None and logger is not None:
            raise ValueError("give either a format or a logger, which has its own format; not both")
        if file is not None and format is None:
            raise ValueError("a file needs a format: 'json' or 'console'")
        self._escaped = format is None
        self._stamped = False  # whether a processor of the host may replace the timestamp
        if format is not None:
            self.logger = _logger(format, file)
        elif isinstance(logger, logging.Logger | logging.LoggerAdapter):
            extra: Mapping[str, object] = {}
            if isinstance(logger, logging.LoggerAdapter):  # it would replace our `extra` by its own
                logger, extra = logger.logger, logger.extra or {}
            self.logger = _wrap(logger, [partial(_to_stdlib, extra=extra)])
        elif logger is None:
            self.logger = structlog.get_logger("eventrain")
            self._stamped = True
        elif all(callable(getattr(logger, level, None)) for level in _LEVELS.values()):
            self.logger = logger
            self._stamped = True
        else:
            raise TypeError(
                f"logger={logger!r}: give a logger, of structlog or of the standard library"
            )

    def before_fit(self, event: BeforeFit) -> None:
        # In the training thread's own copy of the context: that of the host does not change.
        structlog.contextvars.bind_contextvars(run_id=event.run_id)

    def write(self, record: dict[str, Any]) -> Awaitable[Any] | None:
        """Write one line."""
        if self._escaped:
            record = _escaped(record)
        if self._stamped:
            record["emitted_at"] = record["timestamp"]
        log = getattr(self.logger, _LEVELS[record.get("status", "completed")])
        written: Awaitable[Any] | None = log(record.pop("event"), **record)
        return written  # awaitable if the methods of the logger are async


def _logger(format: str, file: TextIO | None) -> Any:  # noqa: A002 - as above
    """A structlog logger of our own, whatever the host has configured."""
    out = _File(file)
    if format == "json":
        render: list[Processor] = [_to_json]
    elif format == "console":
        render = [_for_console, _ConsoleRenderer(out)]
    else:
        raise ValueError(f"format={format!r}: choose 'json' or 'console'")
    return _wrap(out, [structlog.processors.add_log_level, *render])


class _File:
    """Writes lines to a file, or to what is standard error when a line is written: a progress bar,
    a notebook or a test replaces it for a while."""

    def __init__(self, file: TextIO | None) -> None:
        self._file = file

    @property
    def current(self) -> TextIO | None:
        return sys.stderr if self._file is None else self._file

    @property
    def colors(self) -> bool:
        return self.current is not None and self.current.isatty()

    def msg(self, line: str) -> None:
        # Not structlog's WriteLogger, which keeps every file, with a lock, for good.
        if (file := self.current) is not None:  # a process without a console has none
            file.write(line + "\n")
            file.flush()

    def __deepcopy__(self, memo: object) -> _File:
        return self

    info = warning = error = msg


class _ConsoleRenderer:
    """Structlog's renderer, with colors where the line is written to a terminal."""

    def __init__(self, out: _File) -> None:
        self._out = out
        self._renderers = {
            colors: structlog.dev.ConsoleRenderer(colors=colors, sort_keys=False)
            for colors in (False, True)
        }

    def __call__(self, logger: Any, method: str, record: EventDict) -> str:
        return self._renderers[self._out.colors](logger, method, record)


def _wrap(logger: Any, processors: list[Processor]) -> Any:
    return structlog.wrap_logger(
        logger,
        processors=[_in_context, *processors],
        wrapper_class=structlog.BoundLogger,
        context_class=dict,
        cache_logger_on_first_use=False,
    )


_FIRST = ("event", "schema_version", "timestamp", "run_id", "purpose")
_NOT_IN_ALL = ("who", "reason", "nonfinite", "left_out")


def _in_context(logger: Any, method: str, record: EventDict) -> EventDict:
    """Add the host's context variables, except those with the name of a key of records."""
    first = {key: record.pop(key) for key in _FIRST}
    own = {*first, *record, *_NOT_IN_ALL}
    bound = structlog.contextvars.get_contextvars()
    # They may be anything, and have a budget of their own.
    others = {key: value for key, value in bound.items() if key not in own}
    context = Conversion().first_of(others, "")
    return {**first, **context, **record}


def _to_json(logger: Any, method: str, record: EventDict) -> str:
    return json.dumps(record, allow_nan=False)


def _to_stdlib(
    logger: Any, method: str, record: EventDict, *, extra: Mapping[str, object]
) -> tuple[Any, Any]:
    return (json.dumps(record, allow_nan=False),), {"extra": {**extra, "eventrain": record}}


def _for_console(logger: Any, method: str, record: EventDict) -> EventDict:
    """Escape control characters, so that no value can forge a line or control a terminal."""
    return {
        f"{key}_" if key in _RENDERED_SEPARATELY else escape_control(key): _shown(value)
        for key, value in record.items()
    }


_RENDERED_SEPARATELY = ("stack", "exception", "exc_info")
"""Keys that structlog's renderer prints on separate lines."""


def _shown(value: Any) -> Any:
    text = value if isinstance(value, str) else repr(value)
    return value if text.isprintable() else escape_control(text)


def _escaped(value: Any) -> Any:
    if isinstance(value, dict):
        return {escape_control(key): _escaped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_escaped(item) for item in value]
    return escape_control(value) if isinstance(value, str) else value

"""The engine's own log lines, all of them written here.

They go to structlog's logger "eventrain", as the host has configured it. Whatever that does, the
caller continues: an error of the logger, such as a closed pipe, is not raised, and the line goes to
the standard library's logger "eventrain" instead; a logger that blocks is left after `PATIENCE`;
and the methods of an `AsyncBoundLogger` are awaited. Only exceptions that are meant to end the
program pass, such as KeyboardInterrupt.

Each line is written in a thread of its own, because a thread can be left when it blocks, and can
run an event loop for an async logger, whether or not the caller runs one. Lines are rare: none is
written per batch.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import structlog

from ..events import CancelException
from .context import caller_context

PATIENCE = 1.0
"""Seconds for which a caller waits until its line is written."""

MAX_WAITING = 100
"""Lines that wait behind one that blocks; further ones are dropped."""


def info(event: str, **fields: Any) -> None:
    """Write a line of level "info". It never raises an Exception, and returns in bounded time."""
    _write("info", event, fields)


def warning(event: str, **fields: Any) -> None:
    """Write a line of level "warning"; see `info`."""
    _write("warning", event, fields)


def error(event: str, **fields: Any) -> None:
    """Write a line of level "error"; see `info`."""
    _write("error", event, fields)


def wait_for_lines() -> None:
    """Wait until the lines of other threads are written; not for those that a logger blocks."""
    line = _last
    if line is None or line.left or line is threading.current_thread() or not line.is_alive():
        return
    line.join(PATIENCE)


class _Line(threading.Thread):
    """Writes one line, after the line before it.

    Attributes:
        previous: the thread of the line before; None if that has been written.
        waiting: the number of lines that are not written yet, up to this one.
        left: whether the caller no longer waits for it.
        error: what is to be raised where the line was logged.
    """

    def __init__(
        self, level: str, event: str, fields: dict[str, Any], previous: _Line | None
    ) -> None:
        super().__init__(name="eventrain-log", daemon=True)
        self.previous = previous
        self.waiting: int = 1 if previous is None else previous.waiting + 1
        self.left = False
        self.error: BaseException | None = None
        self._arguments = caller_context(), level, event, fields

    def run(self) -> None:
        if self.previous is not None:
            self.previous.join()  # at once in a forked child, where that thread does not exist
        context, level, event, fields = self._arguments
        try:
            context.run(_log, level, event, fields)
        except BaseException as exc:
            self.error = exc
        del self.previous, self._arguments, fields  # they may hold an exception, and so its frames


_last: _Line | None = None


def _write(level: str, event: str, fields: dict[str, Any]) -> None:
    global _last
    previous = _last if _last is not None and _last.is_alive() else None
    line = _Line(level, event, fields, previous)
    if line.waiting > MAX_WAITING:
        return
    _last = line
    try:
        line.start()
    except RuntimeError:  # the system has no more threads, or the interpreter is about to end
        line.previous = None  # which may be blocked
        line.run()
    else:
        line.join(0 if previous is not None and previous.left else PATIENCE)
        line.left = line.is_alive()
    error, line.error = line.error, None
    if error is not None:
        try:
            raise error
        finally:
            del error  # avoids a reference cycle of error, traceback and this frame


def _log(level: str, event: str, fields: dict[str, Any]) -> None:
    """Have the host's logger write the line or, if it raises, that of the standard library."""
    try:
        wrapper = structlog.get_config()["wrapper_class"]
        if inspect.iscoroutinefunction(getattr(wrapper, level, None)):
            asyncio.run(_log_async(level, event, fields))
        else:
            written = getattr(structlog.get_logger("eventrain"), level)(event, **fields)
            if inspect.isawaitable(written):
                asyncio.run(_wait_for(written))
    except (Exception, CancelException, asyncio.CancelledError) as exc:
        exc_info = fields.pop("exc_info", None)
        number = logging.getLevelNamesMapping()[level.upper()]
        with suppress(Exception):
            logging.getLogger("eventrain").log(
                number,
                "%s %r (structlog failed: %r)",
                event,
                fields,
                exc,
                exc_info=exc_info,
            )


async def _log_async(level: str, event: str, fields: dict[str, Any]) -> None:
    """As the methods of an `AsyncBoundLogger`, which can be made only where an event loop runs."""
    await getattr(structlog.get_logger("eventrain"), level)(event, **fields)


async def _wait_for(written: Awaitable[Any]) -> None:
    await written

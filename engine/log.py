"""The engine's own log lines, all of them written here.

They go to structlog's logger "eventrain", as the host has configured it. Whatever that does, the
caller continues: an error of the logger, such as a closed pipe, is not raised, and the line goes to
the standard library's logger "eventrain" instead; a logger that blocks is left after `PATIENCE`, or
`LOOP_PATIENCE` on an event loop; and the methods of an `AsyncBoundLogger` are awaited. Only
exceptions that are meant to end the program pass, such as KeyboardInterrupt.

Each line is written in a thread of its own, because a thread can be left when it blocks, and can
run an event loop for an async logger, whether or not the caller runs one. Lines are rare: none is
written per batch. They are written in order, and `written` waits for them at the end of a fit.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any

import anyio
import structlog

from ..events import CancelException
from .context import caller_context, is_on_event_loop

PATIENCE = 1.0
"""Seconds for which a caller waits until its line is written."""

LOOP_PATIENCE = 0.01
"""Seconds for which a caller on an event loop waits, as the loop waits with it."""

MAX_WAITING = 100
"""Lines that wait behind one that blocks; further ones are dropped, and counted."""


def info(event: str, **fields: Any) -> None:
    """Write a line of level "info". It never raises an Exception, and returns in bounded time."""
    _write("info", event, fields)


def warning(event: str, **fields: Any) -> None:
    """Write a line of level "warning"; see `info`."""
    _write("warning", event, fields)


def error(event: str, **fields: Any) -> None:
    """Write a line of level "error"; see `info`."""
    _write("error", event, fields)


def wait_for_lines(seconds: float) -> None:
    """Wait until the lines of other threads are written; not for those that a logger blocks."""
    with _lock:  # which another thread holds while it starts a line
        line = _lines[-1] if _lines else None
    if line is not None and not line.left and line is not threading.current_thread():
        line.join(seconds)


async def written() -> None:
    """Wait until all lines are written, while the event loop runs; for `PATIENCE` at most."""
    line = next(iter(_lines[-1:]), None)  # in one step: other threads remove those that are written
    if line is not None and not line.left:
        with anyio.move_on_after(PATIENCE, shield=True):
            while line.is_alive():  # noqa: ASYNC110 - a blocked one may end at any time, or never
                await anyio.sleep(LOOP_PATIENCE / 10)
        line.left = line.is_alive()
    _raise_error()


def forget_lines() -> None:
    """In a forked process: the lines are the parent's, and another thread may hold the lock."""
    global _lock
    _lock = threading.RLock()
    _lines.clear()


class _Line(threading.Thread):
    """Writes one line, after the line before it.

    Attributes:
        previous: the thread of the line before; None if that has been written.
        left: whether a caller has waited for it, or for the line before it, in vain.
    """

    def __init__(
        self, level: str, event: str, fields: dict[str, Any], previous: _Line | None
    ) -> None:
        super().__init__(name="eventrain-log", daemon=True)
        self.previous = previous
        self.left: bool = previous is not None and previous.left
        self._arguments = caller_context(), level, event, fields

    def run(self) -> None:
        if self.previous is not None:
            self.previous.join()  # at once in a forked child, where that thread does not exist
        context, level, event, fields = self._arguments
        try:
            context.run(_log, level, event, fields)
        except BaseException as exc:
            _errors.append(exc)
        del self.previous, self._arguments, fields  # they may hold an exception, and so its frames

    def wait(self, previous: _Line | None) -> None:
        """Wait until it is written, in the thread that logged it."""
        if self.left or isinstance(threading.current_thread(), _Line):
            return  # a logger that logs through the engine: its line is the one before
        if is_on_event_loop():
            self.join(0 if previous else LOOP_PATIENCE)
        else:
            self.join(PATIENCE)
            self.left = self.is_alive()


_lock = threading.RLock()
_lines: list[_Line] = []
"""The lines that are not written yet, and the last one."""
_errors: deque[BaseException] = deque(maxlen=1)
"""What a logger raised to end the program, until a caller raises it."""
_dropped = 0


def _write(level: str, event: str, fields: dict[str, Any]) -> None:
    global _dropped
    with _lock:
        _lines[:] = [line for line in _lines if line.is_alive()]
        if len(_lines) >= MAX_WAITING:
            _dropped += 1
            return
        if _dropped:
            fields["lines_dropped"], _dropped = _dropped, 0
        previous = _lines[-1] if _lines else None
        line = _Line(level, event, fields, previous)
        try:
            line.start()
            _lines.append(line)
        except RuntimeError:  # the system has no more threads, or the interpreter is about to end
            line.previous = None  # which may be blocked
    if line.ident is not None:
        line.wait(previous)
    else:
        line.run()
    _raise_error()


def _raise_error() -> None:
    if _errors:
        error = _errors.pop()
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

"""What a caller runs in: its context variables, and whether that is an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import sys


def caller_context() -> contextvars.Context:
    """A copy of the context, marked as outside of the event loop that may run in this thread."""
    context = contextvars.copy_context()
    context.run(_leave_event_loop)
    return context


def is_on_event_loop() -> bool:
    """Whether an event loop of asyncio or trio runs in this thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        try:
            return bool(sys.modules["trio"].lowlevel.in_trio_run())
        except (KeyError, AttributeError):  # it is not imported, or another thread is at it
            return False
    return True


def _leave_event_loop() -> None:
    if sniffio := sys.modules.get("sniffio"):  # if trio is installed, anyio asks sniffio
        sniffio.current_async_library_cvar.set(None)

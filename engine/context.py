"""The context variables of a caller, for a thread that works for it."""

from __future__ import annotations

import contextvars
import sys


def caller_context() -> contextvars.Context:
    """A copy of the context, marked as outside of the event loop that may run in this thread."""
    context = contextvars.copy_context()
    context.run(_leave_event_loop)
    return context


def _leave_event_loop() -> None:
    if sniffio := sys.modules.get("sniffio"):  # if trio is installed, anyio asks sniffio
        sniffio.current_async_library_cvar.set(None)

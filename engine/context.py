"""What a caller runs in: its context variables, and the event loop, if it is one."""

from __future__ import annotations

import asyncio
import contextvars
import sys
from collections.abc import Callable
from typing import Any


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


def call_soon_threadsafe() -> Callable[[Callable[[], object]], object]:
    """The function by which other threads have the event loop of this one call something soon.

    It does not wait for that, as anyio's `from_thread` does. It raises a RuntimeError if the loop
    has ended.
    """
    call_soon: Any
    try:
        call_soon = asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        call_soon = sys.modules["trio"].lowlevel.current_trio_token().run_sync_soon
    return call_soon  # type: ignore[no-any-return]


def _leave_event_loop() -> None:
    if sniffio := sys.modules.get("sniffio"):  # if trio is installed, anyio asks sniffio
        sniffio.current_async_library_cvar.set(None)

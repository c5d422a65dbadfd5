"""Waiting for a condition, with a limit that only something that hangs exceeds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import anyio.lowlevel
from eventrain.engine import Learner

GUARD = 60
"""Seconds after which something hangs, also on a busy machine."""


def wait_until(
    condition: Callable[[], object], seconds: float = GUARD, every: float = 0.002
) -> None:
    """Block this thread until the condition holds; it is checked every so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(every)


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until the condition holds."""
    while not condition():
        await anyio.lowlevel.checkpoint()


def in_a_thread(work: Callable[[], Any], name: str | None = None) -> Any:
    """Run something that may hang in a thread that does not hold up the tests."""
    future: Future[Any] = Future()

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as exc:
            future.set_exception(exc)

    threading.Thread(target=target, daemon=True, name=name).start()
    return future.result(GUARD)


def thread_has_ended(learner: Learner) -> bool:
    """Whether the thread of the learner's last fit has ended."""
    return f"eventrain-{learner.run_id}" not in {t.name for t in threading.enumerate()}

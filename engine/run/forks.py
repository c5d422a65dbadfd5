"""What a fork of the process means for its fits, as when a DataLoader starts its workers.

A forked child has one thread, the one that forked. A lock that another thread holds at that moment
stays locked in the child for ever, such as that of a logger, or of a pipe's buffer. So a process
that fits forks only while the event loops of its fits are between two callbacks, where none of
their observers, stream readers and receivers is at work: the fork asks each loop to wait, for the
moment that the fork takes. It also waits for a log line of the engine that is being written.

A fit that runs when its process is forked goes on in the parent only.
"""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any

from .. import log

LIMIT = 2.0
"""Seconds that a fork waits for busy event loops, and that a loop waits for the fork."""

running: list[HostLoop] = []
"""The event loops of the running fits of this process: one entry for each fit."""
_left_in_parent: list[weakref.ref[object]] = []
_holds: dict[int, list[_Hold]] = {}


class HostLoop:
    """The event loop on which a fit is awaited; entered while the fit runs.

    Args:
        learner: the learner that fits.
    """

    def __init__(self, learner: object) -> None:
        self.learner = learner
        self.thread: int = threading.get_ident()
        self.call_soon: Callable[[Callable[[], object]], object] = call_soon_threadsafe()

    def __enter__(self) -> None:
        _register()
        running.append(self)

    def __exit__(self, *exc_info: object) -> None:
        with suppress(ValueError):  # in a forked child, where the fit is not running
            running.remove(self)


def is_left_in_parent(learner: object) -> bool:
    """Whether the learner was fitting when this process was forked."""
    return any(learner is left() for left in _left_in_parent)


def call_soon_threadsafe() -> Any:
    """The function by which any thread has the running event loop call another one soon."""
    try:
        return asyncio.get_running_loop().call_soon_threadsafe
    except RuntimeError:
        return sys.modules["trio"].lowlevel.current_trio_token().run_sync_soon


class _Hold:
    """Makes one event loop wait."""

    def __init__(self) -> None:
        self.holds = threading.Event()
        self.over = threading.Event()

    def __call__(self) -> None:
        self.holds.set()
        self.over.wait(LIMIT)


@cache
def _register() -> None:
    """Called by the first fit of a process, so that nothing happens at import."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(
            before=_hold_loops,
            after_in_parent=_release_loops,
            after_in_child=_forget_fits,
        )


def _hold_loops() -> None:
    holds = _holds[threading.get_ident()] = []
    own = threading.get_ident()
    for loop in {loop.thread: loop for loop in running if loop.thread != own}.values():
        hold = _Hold()
        with suppress(Exception):  # the loop has ended
            loop.call_soon(hold)
            holds.append(hold)
    deadline = time.monotonic() + LIMIT
    for hold in holds:
        hold.holds.wait(max(0, deadline - time.monotonic()))
    log.wait_for_lines(log.PATIENCE)


def _release_loops() -> None:
    for hold in _holds.pop(threading.get_ident()):
        hold.over.set()


def _forget_fits() -> None:
    _left_in_parent.extend(weakref.ref(loop.learner) for loop in running)
    running.clear()
    _holds.clear()
    log.forget_lines()

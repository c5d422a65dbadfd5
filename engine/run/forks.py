"""What a fork of the process means for its fits, as when a DataLoader starts its workers.

A forked child has one thread, the one that forked. A lock that another thread holds at that moment
stays locked in the child for ever, such as that of a logger, or of a pipe's buffer. So a process
that fits forks only while the event loops of its fits are between two callbacks, where none of
their observers, stream readers and receivers is at work: the fork asks each loop to wait, for the
moment that the fork takes. While one loop is busy, the others do not wait for it: they are asked
again when it is not. A fork also waits for a log line of the engine that is being written, and for
the import of a large package.

A fit that runs when its process is forked goes on in the parent only.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import cache, partial

from .. import imports, log
from ..context import call_soon_threadsafe, is_on_event_loop

LIMIT = 2.0
"""Seconds that a fork waits for busy event loops, and that these wait for it when it has begun."""

IMPORT_LIMIT = 60.0
"""Seconds that a fork waits for an import, without which the child could never import the same."""

BRIEF = 0.01
"""Seconds that a fork on an event loop waits, and that a loop waits for others that are busy."""

running: list[HostLoop] = []
"""The event loops of the running fits of this process: one entry for each fit."""
_left_in_parent: list[weakref.ref[object]] = []
_forks: dict[int, _Fork] = {}
"""The forks that are going on, by their threads."""
_one_fork = threading.Lock()


class HostLoop:
    """The event loop on which a fit is awaited; entered while the fit runs.

    Args:
        learner: the learner that fits.
    """

    def __init__(self, learner: object) -> None:
        self.learner = learner
        self.thread: int = threading.get_ident()
        self.call_soon = call_soon_threadsafe()

    def __enter__(self) -> None:
        _register()
        running.append(self)

    def __exit__(self, *exc_info: object) -> None:
        with suppress(ValueError):  # in a forked child, where the fit is not running
            running.remove(self)


def is_left_in_parent(learner: object) -> bool:
    """Whether the learner was fitting when this process was forked."""
    return any(learner is left() for left in _left_in_parent)


class _Fork:
    """One fork, and the event loops that wait for it.

    A loop waits only briefly while another one is busy, goes on, and is asked again when that one
    has come. So all of them wait at the moment of the fork, and none waits for another loop.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._asked: set[int] = set()
        self._held: set[int] = set()
        self._begun = self._over = False
        self._end = ExitStack()

    def lock(self, locked: bool, unlock: Callable[[], object]) -> None:
        """Have `release` unlock what this fork has locked, if it has."""
        if locked:
            self._end.callback(unlock)

    def hold(self, loops: dict[int, HostLoop], deadline: float) -> None:
        """Return when all of the loops wait, or after the deadline."""
        with self._changed:
            while missing := loops.keys() - self._held:
                for thread in missing - self._asked:
                    self._asked.add(thread)
                    try:
                        loops[thread].call_soon(partial(self._wait, thread))
                    except Exception:  # the loop has ended
                        self._held.add(thread)
                if missing - self._held and not self._changed.wait(deadline - time.monotonic()):
                    break
            self._begun = True

    def release(self) -> None:
        with self._changed:
            self._over = True
            self._changed.notify_all()
        self._end.close()

    def _wait(self, thread: int) -> None:
        """Called on the event loop of a thread."""
        with self._changed:
            self._asked.discard(thread)
            self._held.add(thread)
            self._changed.notify_all()
            if not self._changed.wait_for(lambda: self._over, BRIEF) and self._begun:
                self._changed.wait_for(lambda: self._over, LIMIT)
            self._held.discard(thread)


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
    own = threading.get_ident()
    fork = _forks[own] = _Fork()
    fork.lock(imports.begin_fork(IMPORT_LIMIT), imports.end_fork)
    loops = {loop.thread: loop for loop in running if loop.thread != own}
    patience = BRIEF if is_on_event_loop() else LIMIT
    deadline = time.monotonic() + patience
    log.wait_for_lines(min(patience, log.PATIENCE))  # first: a logger may need an event loop
    # One fork after another: each would hold a loop that the other one waits for.
    fork.lock(_one_fork.acquire(timeout=max(0, deadline - time.monotonic())), _one_fork.release)
    fork.hold(loops, deadline)
    log.wait_for_lines(BRIEF if loops else 0)  # for those written meanwhile


def _release_loops() -> None:
    fork = _forks.pop(threading.get_ident(), None)
    if fork is not None:
        fork.release()


def _forget_fits() -> None:
    global _one_fork
    _left_in_parent.extend(weakref.ref(loop.learner) for loop in running)
    running.clear()
    _forks.clear()
    _one_fork = threading.Lock()
    imports.forget_imports()
    log.forget_lines()

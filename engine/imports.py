"""First imports of large packages, in a thread beside the host's event loop.

Such an import makes so many objects that Python's garbage collector visits twice all there are,
and stops all threads meanwhile: with torch alone for 100 ms and more. So there are no collections
during the import; its objects then count as old ones, which the next full collection visits.

A process that is forked during an import would wait for its end for ever, if it imports the same,
as its first fit does. So a fork waits for it: see `run.forks`.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

_lock = threading.RLock()
_collects_later = False


def import_large(name: str) -> Any:
    """Import a module of a large package, and return it; not to be called on an event loop."""
    if name in sys.modules:
        return import_module(name)  # which waits if another thread is importing it
    with _lock, _without_collections():
        return import_module(name)


def begin_fork(seconds: float) -> bool:
    """Wait until nothing is being imported, and keep it so; return whether that is so."""
    return _lock.acquire(timeout=seconds)


def end_fork() -> None:
    """Let threads import again."""
    _lock.release()


def forget_imports() -> None:
    """In a forked process: those of other threads are the parent's."""
    global _lock
    _lock = threading.RLock()
    _collect_again()


@contextmanager
def _without_collections() -> Iterator[None]:
    global _collects_later
    # If the host has frozen what there was, there is less to visit, and it is not to be thawed.
    if not gc.isenabled() or gc.get_freeze_count():
        yield
        return
    _collects_later = True
    gc.disable()
    try:
        yield
    finally:
        if not gc.get_freeze_count():
            gc.freeze()  # together, they move all objects to the oldest generation
            gc.unfreeze()
        _collect_again()


def _collect_again() -> None:
    global _collects_later
    if _collects_later:
        _collects_later = False
        gc.enable()

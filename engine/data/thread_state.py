"""The state that is kept per thread, passed on to a new thread, and threads that read loaders."""

from __future__ import annotations

import atexit
import contextvars
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache

import torch

from .accelerator import initialized_accelerator

PATIENCE = 5.0
"""Seconds for which the end of the program waits for threads that still read."""


def torch_state() -> Callable[[], None]:
    """Return a function that gives another thread this one's default and current device."""
    device = torch.get_default_device()
    in_use = initialized_accelerator() is not None
    index = torch.accelerator.current_device_index() if in_use else None

    def enter() -> None:
        if device.type != "cpu":
            torch.set_default_device(device)
        if index is not None:
            torch.accelerator.set_device_index(index)

    return enter


class ReadingThread(threading.Thread, ABC):
    """A thread that reads for an iterator, in the context and torch state of who iterates.

    It is ended at the end of the program too, if the iterator is still open: a daemon thread that
    runs while the interpreter is finalized is ended in the middle of torch's code, which aborts the
    process. One that blocks is left then.

    Args:
        kind: the kind of reader, for the name of the thread.
    """

    def __init__(self, kind: str) -> None:
        name = threading.current_thread().name.removeprefix("eventrain-")
        super().__init__(name=f"eventrain-{kind}-{name}", daemon=True)
        self._inherited = contextvars.copy_context(), torch_state(), torch.is_grad_enabled()

    def start(self) -> None:
        _at_exit()
        super().start()

    def run(self) -> None:
        """Enter the state, and read."""
        context, enter_torch_state, grad = self._inherited
        enter_torch_state()
        torch.set_grad_enabled(grad)
        context.run(self.read)

    @abstractmethod
    def read(self) -> None:
        """The work of the thread."""

    @abstractmethod
    def stop(self) -> None:
        """Have the thread end soon, from another thread."""

    def wait(self) -> None:
        """Wait until the thread has ended.

        It does not wait when the garbage collector calls this in the thread itself, nor at the
        interpreter's exit, when daemon threads no longer run.
        """
        in_own_thread = self is threading.current_thread()
        if self.is_alive() and not in_own_thread and not sys.is_finalizing():
            self.join()


@cache
def _at_exit() -> None:
    """Have all threads ended at the end of the program."""
    atexit.register(_end_all)


def _end_all() -> None:
    threads = [thread for thread in threading.enumerate() if isinstance(thread, ReadingThread)]
    for thread in threads:
        thread.stop()
    deadline = time.monotonic() + PATIENCE
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))

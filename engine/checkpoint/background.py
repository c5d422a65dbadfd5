"""A thread that writes in the background, one job after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one job after the other.

    Args:
        background: whether to run them in a thread; otherwise `write` runs them itself.
    """

    def __init__(self, background: bool) -> None:
        self._thread = ThreadPoolExecutor(1, "eventrain-checkpoint") if background else None
        self._written: Future[None] | None = None

    def write(self, job: Callable[[], None]) -> None:
        """Run `job` after the previous one. Raises the error of the previous one, if it failed."""
        self.wait()
        if self._thread is None:
            job()
        else:
            self._written = self._thread.submit(job)

    def check(self) -> None:
        """Raise the error of the last job if it has failed; do not wait for it."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job. Raises its error, if it failed."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Wait for the last job, then end the thread. Raises the error of the job, if it failed."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

"""Writing in the background: one job after the other, in a thread."""

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
        """Run `job` once the previous one is done. Raises what the previous one raised."""
        self.wait()
        if self._thread is None:
            job()
        else:
            self._written = self._thread.submit(job)

    def check(self) -> None:
        """Raise what the last job raised, if it is done."""
        if self._written is not None and self._written.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the last job. Raises what it raised."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def close(self) -> None:
        """Wait for the last job, and for the thread. Raises what the job raised."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

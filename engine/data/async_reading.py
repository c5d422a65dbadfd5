"""The reading of an async source: by a task on the host's event loop, ahead of the training.

The task puts each batch into a queue, from which the fit's thread takes it. The task asks the
source only while fewer batches than the bound are ahead, and the thread waits while there is none.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine
from contextvars import ContextVar
from queue import Empty, SimpleQueue
from typing import Any, Protocol

import anyio
import anyio.lowlevel

from ...events.errors import text_of
from .. import log

PATIENCE = 0.05
"""Seconds after which a thread that waits for a batch checks whether it is to stop."""


class SourceHost(Protocol):
    """What a fit lends to the reading of its sources."""

    @property
    def run_id(self) -> str: ...

    @property
    def cleanup_timeout(self) -> float: ...

    def check_thread(self) -> None:
        """Raise a RuntimeError unless this is the fit's own thread."""

    def start(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Start a task on the event loop; the fit waits for it before it returns."""

    def call_soon(self, function: Callable[[], object]) -> None:
        """Call a function on the event loop, without waiting for it."""

    def check_requests(self) -> None:
        """Raise what somebody has asked the fit's thread to raise."""

    def interruption(self) -> BaseException:
        """What the fit's thread raises if the task that reads was cancelled."""


class Readings:
    """The readings of one fit.

    A source that can be read only once has one reading in a fit, which each iteration continues.
    """

    def __init__(self, host: SourceHost) -> None:
        self._host = host
        self._open: list[Reading] = []

    def begin(self, source: Any, buffer: int) -> Reading:
        """Begin to read a source, or continue with one that can be read only once."""
        self._host.check_thread()
        self._open = [reading for reading in self._open if not reading.is_done]
        before = [reading for reading in self._open if reading.source is source]
        if before and before[0].is_only_one:
            return before[0]
        reading = Reading(self._host, source, buffer, before)
        self._open.append(reading)
        self._host.start(reading.run)
        return reading

    def leave(self) -> None:
        """Cancel what is still read; called when the work of the fit is over."""
        for reading in self._open:
            reading.leave()


READINGS: ContextVar[Readings | None] = ContextVar("eventrain_readings", default=None)
"""Set in the context of a fit's thread."""


class Reading:
    """One reading of a source, from its first batch until it ends or is left.

    Args:
        host: the fit that reads.
        source: an async iterable, or a function that returns one.
        buffer: the most batches that the source is asked for ahead of the training.
        before: those of the same source that are open; if they were left, they are closed first.
    """

    def __init__(self, host: SourceHost, source: Any, buffer: int, before: list[Reading]) -> None:
        self.is_only_one = isinstance(source, AsyncIterator)
        self._host = host
        self.source = source
        self._buffer = buffer
        self._before = before
        # Each batch is in a list, so that neither side keeps a reference; an empty list ends it.
        self._ready: SimpleQueue[list[Any]] = SimpleQueue()
        self._asked = 0
        self._taken = 0
        self._room: anyio.Event | None = None
        self._scope: anyio.CancelScope | None = None
        self._closed: anyio.Event | None = None
        self._left = self._read_out = self._ended = False
        self._error: BaseException | None = None

    # ------------------------------------------------------------------------ in the fit's thread

    @property
    def is_done(self) -> bool:
        """Whether its task has ended, and no batch is left to be taken."""
        return self._ended and (self._left or self._read_out)

    def take(self) -> list[Any]:
        """Wait for the next batch: alone in a list, which is empty after the last one."""
        if self._read_out:
            return []
        if self._left:
            raise RuntimeError("the fit that read this async source has ended")
        while True:
            try:
                box = self._ready.get(timeout=PATIENCE)
                break
            except Empty:
                self._host.check_requests()
        if not box:
            self._read_out = True
            error, self._error = self._error, None
            try:
                if error is not None:
                    raise error
            finally:
                del error  # avoids a reference cycle of the error, its traceback and this frame
            return box
        self._taken += 1
        if self._room is not None:
            self._host.call_soon(self._room.set)
        return box

    def leave(self) -> None:
        """End the reading: the task is cancelled and closes the source, while others go on."""
        if not self._left:
            self._left = True
            self._host.call_soon(self._cancel)

    # ------------------------------------------------------------------------- on the event loop

    def _cancel(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def run(self) -> None:
        """Read the source to its end, and close it. It raises nothing but a cancellation."""
        self._closed = anyio.Event()
        try:
            with anyio.CancelScope() as self._scope:
                if self._left:
                    self._scope.cancel()
                while self._before:
                    before = self._before.pop()
                    if before._left and before._closed is not None:
                        await before._closed.wait()
                await self._read()
        except anyio.get_cancelled_exc_class():
            self._error = self._host.interruption()
            raise
        except BaseException as exc:
            self._error = exc
            if self._left:  # nobody will take it
                self._log_not_closed(exc)
        finally:
            self._ended = True
            self._closed.set()
            self._ready.put([])

    async def _read(self) -> None:
        source = self.source
        iterator = aiter(source if isinstance(source, AsyncIterable) else source())
        try:
            while True:
                await self._wait_for_room()
                self._asked += 1
                try:
                    box = [await anext(iterator)]
                except StopAsyncIteration:
                    return
                self._ready.put(box)
                del box  # once it is taken, only its user holds the batch
                await anyio.lowlevel.checkpoint()  # a source may never wait
        except asyncio.CancelledError as exc:
            if _is_cancelled():
                raise
            raise RuntimeError(
                "the async source raised CancelledError, and nobody has cancelled the fit"
            ) from exc
        finally:
            await self._close(iterator)

    async def _wait_for_room(self) -> None:
        while self._asked - self._taken >= self._buffer:
            self._room = anyio.Event()
            if self._asked - self._taken >= self._buffer:  # a take before this line saw no event
                await self._room.wait()
            self._room = None

    async def _close(self, iterator: Any) -> None:
        aclose = getattr(iterator, "aclose", None)
        if aclose is None:
            return
        error: BaseException | None = None
        with anyio.move_on_after(self._host.cleanup_timeout, shield=True) as scope:
            try:
                await aclose()
            except Exception as exc:
                error = exc
        if error is not None or scope.cancelled_caught:
            self._log_not_closed(error)

    def _log_not_closed(self, error: BaseException | None) -> None:
        log.error(
            "source_not_closed",
            run_id=self._host.run_id,
            source=type(self.source).__qualname__,
            reason="it took longer than cleanup_timeout" if error is None else text_of(error),
            exc_info=error,
        )


def _is_cancelled() -> bool:
    """Whether the current task of asyncio is being cancelled."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0

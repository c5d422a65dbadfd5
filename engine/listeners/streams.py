"""The observer lane: events in a bounded buffer, read on the host's event loop.

The training thread only appends to the buffer. A task on the event loop wakes the waiting readers
about twenty times per second. The loop is never woken per event, because switching threads (the
GIL) takes far longer than the call.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import anyio

from ...events import Event
from ...events.callback import Overflow
from ..context import call_soon_threadsafe
from .event_buffer import EventBuffer, StreamOwner
from .turns import Turns, turns_of_this_loop

E = TypeVar("E", bound=Event)
_CallSoon = Callable[[Callable[[], object]], object]


class EventStream(EventBuffer[E]):
    """Events of one learner as an async iterator with a bounded buffer.

    Open it with `async with learner.events(AfterBatch) as stream`, then `async for event in
    stream`. It ends when the fit has ended and the buffer is empty; opened again, it receives the
    events of the next fit.

    With `overflow="block"`, a full buffer that nobody reads is closed after 5 seconds, with a line
    in the log, so that a reader that has left does not stop the training for ever.

    Raises:
        RuntimeError: it is read although it has not been opened, or has been read to its end, or
            was closed because nobody read it; or it has a reader already. Each reader needs a
            stream of its own.

    Attributes:
        name: its name in `FitResult.dropped`.
        emitted: the number of events of this fit, or of the last one, that it accepted.
        delivered: the number of them that it has delivered.
        dropped: the number of them lost by its overflow policy: emitted - delivered - waiting.
    """

    def __init__(
        self,
        owner: StreamOwner,
        event_types: tuple[type[E], ...],
        buffer: int,
        overflow: Overflow,
        where: Callable[[E], bool] | None,
    ) -> None:
        super().__init__(owner, event_types, buffer, overflow, where)
        self._waiting: tuple[anyio.Event, int, _CallSoon] | None = None
        self._readers: weakref.WeakSet[_Reader[E]] = weakref.WeakSet()
        self._read_by_anext = False
        self._suspended = False
        self._opened = self._read_out = False
        self._turns = Turns()
        self._exit = ExitStack()

    def open(self) -> Self:
        """Subscribe, first in order, so that events are seen even if a receiver cancels on them.

        Raises:
            RuntimeError: it is open already.
        """
        if self in self._owner.streams:
            raise RuntimeError(f"{self.name} is open already")
        self._opened = True
        self.begin()
        for event_type in self.event_types:
            subscription = self._owner.subscribe(event_type, self.put, order=-math.inf)
            self._exit.callback(subscription.close)
        self._owner.streams.append(self)
        if self not in self._owner.fit_streams:  # it was, if it is opened again in the same fit
            self._owner.fit_streams.append(self)
        self._exit.callback(self._owner.streams.remove, self)
        return self

    def close(self) -> None:
        """Unsubscribe; closing again is harmless. The buffer stays readable."""
        self._exit.close()
        self.end()

    def begin(self) -> None:
        """Start the counts of a new fit."""
        super().begin()
        self._read_out = False

    def finish(self) -> None:
        """The fit is over: close the stream."""
        self.close()

    def wake(self) -> None:
        """Wake the reader if there is an event for it, or the end. May be called in any thread."""
        waiting = self._waiting
        if waiting is None or not (self._items or self._ended):
            return
        wakeup, thread, call_soon = waiting
        if thread == threading.get_ident():
            wakeup.set()
        else:  # it may be on an event loop of its own, for which this one must not wait
            with suppress(RuntimeError):  # its event loop has ended
                call_soon(wakeup.set)

    async def __aenter__(self) -> Self:
        return self.open()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> AsyncIterator[E]:
        self._check_opened()
        if self._read_out:
            raise RuntimeError(
                f"{self.name} has been read to its end: a stream ends with its fit. For the next"
                f" fit, open it again, or another one: {_HOW_TO_OPEN}"
            )
        reader = _Reader(self)
        self._readers.add(reader)
        return reader

    async def __anext__(self) -> E:
        self._check_opened()
        self._read_by_anext = True
        return await self._next()

    def _check_opened(self) -> None:
        if not self._opened:
            raise RuntimeError(f"{self.name} is not open: use {_HOW_TO_OPEN}")

    def _is_read(self) -> bool:
        """Whether an `async for` has not been left; between calls of `anext` this is not known."""
        return bool(self._readers) or self._read_by_anext

    async def _next(self) -> E:
        if self._suspended:
            raise RuntimeError(
                f"{self.name} has a reader already, and each event goes to one: open a stream for"
                f" each reader, {_HOW_TO_OPEN}"
            )
        if not self._items or self._turns.over:
            self._suspended = True
            try:
                await self._wait_for_turn()
            finally:
                self._suspended = False
        return self._take()

    async def _wait_for_turn(self) -> None:
        """Wait for an event, and for a turn on the event loop."""
        self._turns = turns_of_this_loop()
        while True:
            await self._wait_for_event()
            if not self._turns.over:
                return
            await self._turns.next()
            if self._items:
                return

    async def _wait_for_event(self) -> None:
        while not self._items:
            wakeup = anyio.Event()
            self._waiting = wakeup, threading.get_ident(), call_soon_threadsafe()
            try:
                if self._ended:  # checked last: a thread that ends the stream now sees it waiting
                    if self._unread:
                        raise RuntimeError(self._unread)
                    self._read_out = True
                    raise StopAsyncIteration
                await wakeup.wait()
            finally:
                self._waiting = None


class _Reader(Generic[E]):
    """The iterator of one `async for`, which is freed when that loop is left in any way."""

    __slots__ = ("__weakref__", "_stream")

    def __init__(self, stream: EventStream[E]) -> None:
        self._stream = stream

    def __aiter__(self) -> Self:
        return self

    def __anext__(self) -> Coroutine[Any, Any, E]:
        return self._stream._next()


_HOW_TO_OPEN = "`async with learner.events(...) as stream`"

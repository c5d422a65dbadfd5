"""The observer lane: events in a bounded buffer, read on the host's event loop.

The training thread only appends to a deque. A task on the event loop wakes the waiting readers
about twenty times per second. The loop is never woken per event, because switching threads (the
GIL) takes far longer than the call.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel

from ...events import CancelException, Event, Subscription
from ...events.callback import Overflow
from ...events.checks import is_int
from ...events.subscription import check_event_type
from .. import log
from ..loop.requests import Requests

E = TypeVar("E", bound=Event)

MAX_HOLD = 0.005
"""Seconds for which a reader may run on the event loop before other tasks get a turn."""


class StreamOwner(Protocol):
    """The part of a learner that its streams use."""

    run_id: str
    training_thread: int | None
    pending_requests: Requests
    streams: list[EventStream[Any]]
    fit_streams: list[EventStream[Any]]

    def subscribe(
        self, event_type: type[E], receiver: Callable[[E], Any], *, order: float
    ) -> Subscription: ...


class EventStream(Generic[E]):
    """Events of one learner as an async iterator with a bounded buffer.

    Open it with `async with learner.events(AfterBatch) as stream`, then `async for event in
    stream`. It ends when the fit has ended and the buffer is empty.

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
        if not is_int(buffer, 1):
            raise ValueError(f"buffer={buffer!r}: give the number of events to hold, 1 or more")
        if overflow not in ("drop_oldest", "latest", "block"):
            raise ValueError(
                f"overflow={overflow!r}: choose 'drop_oldest', 'latest' (hold only the newest)"
                " or 'block' (lose nothing, slow the training down)"
            )
        types = dict.fromkeys(map(check_event_type, event_types or (Event,)))
        # Without the subclasses of other classes given, so that each event arrives once.
        self.event_types: tuple[type[E], ...] = tuple(
            t for t in types if not any(t is not base and issubclass(t, base) for base in types)
        )
        self.name = f"events({', '.join(t.__name__ for t in self.event_types)})"
        self.buffer = 1 if overflow == "latest" else buffer
        self.overflow = overflow
        self.emitted = 0
        self.delivered = 0
        self._owner = owner
        self._where = where
        self._items: deque[E] = deque(maxlen=None if overflow == "block" else self.buffer)
        self._has_room = threading.Event()
        self._waiting: tuple[anyio.Event, int, anyio.lowlevel.EventLoopToken] | None = None
        self._ended = False
        self._turn_ends = 0.0
        self._exit = ExitStack()

    @property
    def dropped(self) -> int:
        return self.emitted - self.delivered - len(self._items)

    # ---------------------------------------------------------------- in the training thread

    def put(self, event: E) -> None:
        """Add an event to the buffer. Never raises, because an observer must not end the fit."""
        if self._where is not None:
            try:
                if not self._where(event):
                    return
            except (Exception, CancelException) as exc:
                self.fail(exc)
                return
        if self.overflow == "block" and threading.get_ident() == self._owner.training_thread:
            # Only the training thread waits: an async receiver that emits would wait for itself.
            # A fit that is about to end does not wait: the buffer grows by its last few events.
            while len(self._items) >= self.buffer and not (
                self._ended or self._owner.pending_requests
            ):
                self._has_room.clear()
                self.wake()
                self._has_room.wait(0.05)
        if self._ended:
            return  # it may have been closed while the training thread waited here
        self.emitted += 1
        self._items.append(event)

    def fail(self, exc: BaseException) -> None:
        """Detach a reader that raised, or whose `where` raised, and log the error."""
        self.close()
        try:
            error = repr(exc)
        except Exception:  # it is the user's class
            error = type(exc).__qualname__
        log.error(
            "observer_failed",
            run_id=self._owner.run_id,
            observer=self.name,
            error=error,
            exc_info=exc,
        )

    # --------------------------------------------------------------------- on the event loop

    def open(self) -> Self:
        """Subscribe, first in order, so that events are seen even if a receiver cancels on them."""
        for event_type in self.event_types:
            subscription = self._owner.subscribe(event_type, self.put, order=-math.inf)
            self._exit.callback(subscription.close)
        self._owner.streams.append(self)
        self._owner.fit_streams.append(self)
        self._exit.callback(self._owner.streams.remove, self)
        return self

    def close(self) -> None:
        """Unsubscribe; closing again is harmless. The buffer stays readable."""
        self._exit.close()
        self.end()

    def begin(self) -> None:
        """Start the counts of a new fit."""
        self.emitted = self.delivered = 0
        self._items.clear()
        self._ended = False

    def end(self) -> None:
        """Accept no more events in this fit: the reader gets the rest of the buffer, then stops."""
        self._ended = True
        self._has_room.set()
        self.wake()

    def finish(self) -> None:
        """The fit is over: close the stream."""
        self.close()

    def wake(self) -> None:
        """Wake the reader if there is an event for it, or the end. May be called in any thread."""
        waiting = self._waiting
        if waiting is None or not (self._items or self._ended):
            return
        wakeup, thread, token = waiting
        if thread == threading.get_ident():
            wakeup.set()
        else:
            with suppress(anyio.RunFinishedError):  # its event loop has ended
                anyio.from_thread.run_sync(wakeup.set, token=token)

    async def __aenter__(self) -> Self:
        return self.open()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> E:
        if time.perf_counter() > self._turn_ends:
            await anyio.lowlevel.checkpoint()
            self._turn_ends = time.perf_counter() + MAX_HOLD
        while not self._items:
            wakeup = anyio.Event()
            self._waiting = wakeup, threading.get_ident(), anyio.lowlevel.current_token()
            if self._ended:  # checked last: a thread that ends the stream now sees it waiting
                raise StopAsyncIteration
            await wakeup.wait()
            self._waiting = None
            self._turn_ends = time.perf_counter() + MAX_HOLD
        self.delivered += 1
        event = self._items.popleft()
        self._has_room.set()
        return event

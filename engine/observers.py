"""The second lane: frozen events, beside the training, on the host's event loop.

The training thread only appends to a deque. A pump on the event loop wakes whoever waits about
twenty times a second, so that the loop is never woken per event: it is the hand-over of the
GIL that costs, not the call.
"""

from __future__ import annotations

import inspect
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import structlog

from ..events import CancelException, Event
from ..events.bus import check_event_type, check_receiver, name_of
from ..events.callback import Overflow
from ..events.closing import Closing
from ..events.signal import unwrap

if TYPE_CHECKING:
    from .listened import Listened

E = TypeVar("E", bound=Event)

MAX_HOLD = 0.005
"""Seconds that delivering may hold the event loop before others get a turn."""


class EventStream(Generic[E]):
    """Events of one learner as an async iterator with a bounded buffer.

    Open it with `async with learner.events(AfterBatch) as stream`, then `async for event in
    stream`. It ends when the fit that it watches has ended; what was still in the buffer is
    delivered first.

    Attributes:
        name: what it is called in `FitResult.dropped`.
        emitted: events of this fit, or of the last, that were meant for it.
        delivered: those it has handed out.
        dropped: those it lost to its policy: emitted - delivered - waiting.
    """

    def __init__(
        self,
        learner: Listened,
        event_types: tuple[type[E], ...],
        buffer: int,
        overflow: Overflow,
        where: Callable[[E], bool] | None,
    ) -> None:
        if isinstance(buffer, bool) or not isinstance(buffer, int) or buffer < 1:
            raise ValueError(f"buffer={buffer!r}: give the number of events to hold, 1 or more")
        if overflow not in ("drop_oldest", "latest", "block"):
            raise ValueError(
                f"overflow={overflow!r}: choose 'drop_oldest', 'latest' (hold only the newest)"
                " or 'block' (lose nothing, slow the training down)"
            )
        types = dict.fromkeys(map(check_event_type, event_types or (Event,)))
        self.event_types: tuple[type[E], ...] = tuple(  # not twice, by a class and its base
            t for t in types if not any(t is not base and issubclass(t, base) for base in types)
        )
        self.name = f"events({', '.join(t.__name__ for t in self.event_types)})"
        self.buffer = 1 if overflow == "latest" else buffer
        self.overflow = overflow
        self.emitted = 0
        self.delivered = 0
        self._learner = learner
        self._where = where
        self._items: deque[E] = deque(maxlen=None if overflow == "block" else self.buffer)
        self._room = threading.Event()
        self._waiting: tuple[anyio.Event, int, anyio.lowlevel.EventLoopToken] | None = None
        self._ended = False
        self._turn_ends = 0.0
        self._exit = ExitStack()

    @property
    def dropped(self) -> int:
        return self.emitted - self.delivered - len(self._items)

    # ---------------------------------------------------------------- in the training thread

    def put(self, event: E) -> None:
        """Take an event in. Never raises: an observer cannot hurt the training."""
        if self._where is not None:
            try:
                if not self._where(event):
                    return
            except (Exception, CancelException) as exc:
                self.fail(exc)
                return
        if self.overflow == "block" and threading.get_ident() == self._learner._thread:
            # Only the training waits: an async receiver that emits would wait for itself. And
            # a run that is to end does not: the buffer grows by its few last events.
            while len(self._items) >= self.buffer and not (self._ended or self._learner.stopping):
                self._room.clear()
                self.wake()
                self._room.wait(0.05)
        if self._ended:
            return  # closed, perhaps while the training waited here
        self.emitted += 1
        self._items.append(event)

    def fail(self, exc: BaseException) -> None:
        """The reader, or its filter, is broken: let go of it, and say so."""
        self.close()
        structlog.get_logger("eventrain").error(
            "observer_failed",
            run_id=self._learner.run_id,
            observer=self.name,
            error=repr(exc),
            exc_info=exc,
        )

    # --------------------------------------------------------------------- on the event loop

    def open(self) -> Self:
        """Begin to listen. First in order: an event that a receiver cancels was emitted too."""
        for event_type in self.event_types:
            subscription = self._learner.subscribe(event_type, self.put, order=-math.inf)
            self._exit.callback(subscription.close)
        self._learner.streams.append(self)
        self._learner.audience.append(self)
        self._exit.callback(self._learner.streams.remove, self)
        return self

    def close(self) -> None:
        """Stop listening; again is harmless. What is in the buffer stays readable."""
        self._exit.close()
        self.end()

    def begin(self) -> None:
        """A fit begins: count anew."""
        self.emitted = self.delivered = 0
        self._items.clear()
        self._ended = False

    def end(self) -> None:
        """No more events come in this fit: the reader gets what is left, then the end."""
        self._ended = True
        self._room.set()
        self.wake()

    def finish(self) -> None:
        """The fit is over: there is nothing more to hear."""
        self.close()

    def wake(self) -> None:
        """Let the reader look at the buffer; from any thread."""
        waiting = self._waiting
        if waiting is None or not (self._items or self._ended):
            return
        wakeup, thread, token = waiting
        if thread == threading.get_ident():
            wakeup.set()
        else:
            with suppress(anyio.RunFinishedError):  # nobody waits there any more
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
            if self._ended:  # asked last: whoever ends us from a thread then sees us waiting
                raise StopAsyncIteration
            await wakeup.wait()
            self._waiting = None
            self._turn_ends = time.perf_counter() + MAX_HOLD
        self.delivered += 1
        event = self._items.popleft()
        self._room.set()
        return event


class Observer(EventStream[E], Closing):
    """A receiver called beside the training; made by `Learner.observe`.

    Close it, or use it as a context manager, to end it; it lives through any number of fits.
    At the end of each, delivered + dropped = emitted.
    """

    def __init__(
        self,
        learner: Listened,
        event_types: tuple[type[E], ...],
        buffer: int,
        overflow: Overflow,
        where: Callable[[E], bool] | None,
        receiver: Callable[[E], Any],
        on_error: Literal["log", "raise"],
    ) -> None:
        super().__init__(learner, event_types, buffer, overflow, where)
        if on_error not in ("log", "raise"):
            raise ValueError(f"on_error={on_error!r}: choose 'log' or 'raise'")
        check_receiver(receiver, self.event_types[0])
        self.name = name_of(receiver)
        self.receiver = receiver
        self.on_error = on_error

    async def run(
        self, scope: anyio.CancelScope, report: Callable[[BaseException], object]
    ) -> None:
        """Deliver the events of one fit; `report` an error that is to end it.

        `scope` is the one that cuts us at the deadline. No other cancellation comes from
        outside: what looks like one is the receiver's own, and no more than an error.
        """
        harmless = (Exception, CancelException, anyio.get_cancelled_exc_class())
        async for event in self:
            try:
                result = self.receiver(event)
                if inspect.isawaitable(result):
                    await result
            except BaseException as exc:
                error = unwrap(exc)
                if scope.cancel_called or not isinstance(error, harmless):
                    raise
                error.add_note(f"raised by observer {self.name} on {type(event).__name__}")
                self.fail(error)
                if self.on_error == "raise":
                    report(error)
                return

    def finish(self) -> None:
        """The fit is over: what the deadline left undelivered is dropped."""
        self._items.clear()

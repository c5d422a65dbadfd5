"""The buffer of a stream: the training thread appends events, and the event loop takes them.

The training thread only appends to a deque, and with `overflow="block"` waits while that is full.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from ...events import CancelException, Event, Subscription
from ...events.callback import Overflow
from ...events.checks import is_int
from ...events.errors import text_of
from ...events.subscription import check_event_type
from .. import log
from ..loop.requests import Requests

E = TypeVar("E", bound=Event)

PATIENCE = 100
"""Checks, at 20 a second, for which a full buffer may hold up the training before it is logged."""


class StreamOwner(Protocol):
    """The part of a learner that its streams use."""

    run_id: str
    training_thread: int | None
    pending_requests: Requests
    streams: list[Any]
    fit_streams: list[Any]

    def subscribe(
        self, event_type: type[E], receiver: Callable[[E], Any], *, order: float
    ) -> Subscription: ...


class EventBuffer(ABC, Generic[E]):
    """The events of one learner that wait to be read, and how many were lost.

    Attributes: those of `EventStream`, which reads it.
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
        self._ended = False
        self._blocked = False
        self._blocked_checks = 0
        self._unread = ""

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
            self._wait_for_room()
        if self._ended:
            return  # it may have been closed while the training thread waited here
        self.emitted += 1
        self._items.append(event)

    def _wait_for_room(self) -> None:
        # A fit that is about to end does not wait: the buffer grows by its last few events.
        while len(self._items) >= self.buffer and not (self._ended or self._owner.pending_requests):
            self._has_room.clear()
            self._blocked = True
            self.wake()
            self._has_room.wait(0.05)

    def fail(self, exc: BaseException) -> None:
        """Detach a reader that raised, or whose `where` raised, and log the error."""
        self.close()
        log.error(
            "observer_failed",
            run_id=self._owner.run_id,
            observer=self.name,
            error=text_of(exc),
            exc_info=exc,
        )

    # --------------------------------------------------------------------- on the event loop

    def begin(self) -> None:
        """Start the counts of a new fit."""
        self.emitted = self.delivered = 0
        self._items.clear()
        self._ended = False
        self._blocked = False
        self._blocked_checks = 0
        self._unread = ""

    def end(self) -> None:
        """Accept no more events in this fit: the reader gets the rest of the buffer, then stops."""
        self._ended = True
        self._has_room.set()
        self.wake()

    def _take(self) -> E:
        """The oldest event, for the reader."""
        self.delivered += 1
        event = self._items.popleft()
        if self._blocked:
            self._blocked, self._blocked_checks = False, 0
            self._has_room.set()
        return event

    def check_reader(self) -> None:
        """Log that a full buffer holds up the training; close the stream if nobody reads it.

        It is called on the event loop twenty times a second. The checks are counted, not the
        seconds, because while the host holds its loop itself, no reader can run.
        """
        if not self._blocked:
            return
        self._blocked_checks += 1
        if self._blocked_checks != PATIENCE:
            return
        details = {"run_id": self._owner.run_id, "observer": self.name, "buffer": self.buffer}
        if self._is_read():
            hint = "its buffer is full, and with overflow='block' the training waits for it"
            log.warning("observer_blocks_training", **details, hint=hint)
            return
        self._unread = (
            f"{self.name} was closed: its full buffer held up the training, and nobody read it for"
            " 5 s. Keep reading, or leave its `async with`, or use another overflow policy than"
            " 'block'"
        )
        log.error("stream_not_read", **details, hint=self._unread)
        self.close()

    @abstractmethod
    def wake(self) -> None:
        """Wake the reader if there is an event for it, or the end. May be called in any thread."""

    @abstractmethod
    def close(self) -> None:
        """Unsubscribe; closing again is harmless. The buffer stays readable."""

    @abstractmethod
    def _is_read(self) -> bool:
        """Whether somebody reads it, or may."""

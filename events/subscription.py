"""One receiver of one class of events."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from .base import ActionEvent, Event
from .closing import Closing


class Subscription(Closing):
    """One receiver of one class of events. Close it, or use it as a context manager.

    Made by `Bus.subscribe` and `Learner.subscribe`.

    Attributes:
        event_type: the event class; events of its subclasses are received too.
        receiver: the callable, called with the event as its only argument.
        order: receivers of lower order are called earlier; those of equal order in the order of
            connection.
        time: its place among all connections: a counter, not a clock time.
        closed: whether it has been closed.
    """

    _times = itertools.count()

    __slots__ = (
        "__weakref__",
        "_counter",
        "_every",
        "_once",
        "_unsubscribe",
        "_where",
        "call",
        "closed",
        "event_type",
        "key",
        "learner",
        "order",
        "receiver",
        "time",
    )

    def __init__(
        self,
        event_type: type[Event],
        receiver: Callable[[Any], Any],
        *,
        order: float,
        every: int,
        once: bool,
        where: Callable[[Any], bool] | None,
        learner: object | None,
        unsubscribe: Callable[[Subscription], bool],
    ) -> None:
        self.event_type: type[Event] = event_type
        self.receiver: Callable[[Any], Any] = receiver
        self.order: float = order
        self.closed: bool = False
        self.time: int = next(self._times)
        self.key: tuple[float, int, int] = (order, self.time, 0)
        self.learner: object | None = learner
        self._every = every
        self._counter = itertools.count(1)
        self._once = once
        self._where = where
        self._unsubscribe = unsubscribe
        unfiltered = every == 1 and not once and where is None
        self.call = receiver if unfiltered else self._call_filtered

    @property
    def name(self) -> str:
        """The receiver's name, as it appears in notes, results and `explain`."""
        return name_of(self.receiver)

    @property
    def filters(self) -> dict[str, Any]:
        """The arguments of `Bus.subscribe` that say which events it receives."""
        return {"every": self._every, "once": self._once, "where": self._where}

    def accepts(self, event: Event) -> bool:
        """Whether it is open and the event comes from its learner."""
        return not self.closed and (self.learner is None or self.learner is event.learner)

    def matches(self, learner: object) -> bool:
        """Whether it is subscribed to this learner, or to all learners that share the bus."""
        return self.learner is None or self.learner is learner

    def reaches(self, event_type: type[Event]) -> bool:
        """Whether events of exactly this class are received."""
        if issubclass(event_type, ActionEvent):
            return self.event_type is event_type
        return issubclass(event_type, self.event_type)

    def _call_filtered(self, event: Event) -> Any:
        if self._where is not None and not self._where(event):
            return None
        if next(self._counter) % self._every:
            return None
        if self._once and not self.close():
            return None  # another thread has made the one call
        return self.receiver(event)

    def close(self) -> bool:
        """End the subscription; closing again is harmless. Returns whether this call ended it."""
        return self._unsubscribe(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"order={self.order:g}"
        return f"<Subscription of {self.name} to {self.event_type.__name__}, {state}>"


def name_of(receiver: Callable[..., Any]) -> str:
    """The readable name of a callable: `Class.method`, `function` or `Class`."""
    while isinstance(receiver, partial):
        receiver = receiver.func
    owner = getattr(receiver, "__self__", None)
    if owner is not None and not inspect.ismodule(owner):
        cls = owner if inspect.isclass(owner) else type(owner)
        return f"{cls.__qualname__}.{receiver.__name__}"
    return getattr(receiver, "__qualname__", type(receiver).__qualname__)


def check_event_type(event_type: Any) -> Any:
    """Return `event_type` if it is an event class, else raise a TypeError."""
    if isinstance(event_type, type) and issubclass(event_type, Event):
        return event_type
    raise TypeError(
        f"{event_type!r} is not an event class; events are the classes of eventrain.events, such"
        " as AfterBatch, and subclasses of Event that you define"
    )


def check_receiver(receiver: Callable[..., Any], event_type: type[Event]) -> None:
    """Raise a TypeError unless `receiver` can be called with one argument, the event."""
    if not callable(receiver):
        raise TypeError(f"a receiver of {event_type.__name__} must be callable: {receiver!r}")
    if inspect.isgeneratorfunction(receiver) or inspect.isasyncgenfunction(receiver):
        raise TypeError(
            f"{name_of(receiver)} is a generator function: its body does not run when it is called"
        )
    try:
        signature = inspect.signature(receiver)
    except ValueError:  # some builtins have no signature to check
        return
    try:
        signature.bind(None)
    except TypeError as exc:
        raise TypeError(
            f"{name_of(receiver)}{signature} cannot receive {event_type.__name__}: a receiver"
            f" takes one argument, the event ({exc})"
        ) from None

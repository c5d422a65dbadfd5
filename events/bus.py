"""The bus: typed subscriptions, one ordered blinker signal per event class.

Data takes one way: `Learner.emit` -> `EventSignal.send` -> `Subscription` -> the receiver.
"""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from .closing import Closing
from .signal import EventSignal
from .types import ActionEvent, Event

E = TypeVar("E", bound=Event)
R = TypeVar("R", bound=Callable[..., Any])


class Subscription(Closing):
    """One receiver of one class of events. Close it, or use it as a context manager.

    Attributes:
        event_type: the class subscribed to; classes below it are heard too.
        receiver: the callable, given the event as its one argument.
        order: lower is called earlier; equal ones in the order they were connected in.
        time: when it was connected, as a running number.
        closed: whether it has been closed.
    """

    _times = itertools.count()

    __slots__ = (
        "_bus",
        "_counter",
        "_every",
        "_learner",
        "_once",
        "_where",
        "call",
        "closed",
        "event_type",
        "key",
        "order",
        "receiver",
        "time",
    )

    def __init__(
        self,
        bus: Bus,
        event_type: type[Event],
        receiver: Callable[[Any], Any],
        order: float,
        every: int,
        once: bool,
        where: Callable[[Any], bool] | None,
        learner: object | None,
    ) -> None:
        self._bus = bus
        self.event_type = event_type
        self.receiver = receiver
        self.order = order
        self.closed = False
        self.time = next(self._times)
        self.key: tuple[float, int, int] = (order, self.time, 0)
        self._learner = learner
        self._every = every
        self._counter = itertools.count(1)
        self._once = once
        self._where = where
        plain = every == 1 and not once and where is None
        self.call = receiver if plain else self._filter

    @property
    def name(self) -> str:
        """The receiver's name, as it stands in notes, results and `explain`."""
        return name_of(self.receiver)

    def hears(self, event: Event) -> bool:
        """Whether it is open and the event is one of its learner's."""
        return not self.closed and (self._learner is None or self._learner is event.learner)

    def serves(self, learner: object) -> bool:
        """Whether it is subscribed to this learner, or to all that share the bus."""
        return self._learner is None or self._learner is learner

    def _filter(self, event: Event) -> Any:
        if self._where is not None and not self._where(event):
            return None
        if next(self._counter) % self._every:
            return None
        if self._once and not self.close():
            return None  # another thread was first
        return self.receiver(event)

    def close(self) -> bool:
        """End it; again is harmless. Says whether this call was the one that ended it."""
        return self._bus.unsubscribe(self)

    def __repr__(self) -> str:
        state = "closed" if self.closed else f"order={self.order:g}"
        return f"<Subscription of {self.name} to {self.event_type.__name__}, {state}>"


class Bus:
    """Where events are sent and subscribed to. May be shared by several learners.

    Safe to use from any thread.

    Example:
        >>> from eventrain.events import Bus, BeforeFit, Event
        >>> bus = Bus()
        >>> @bus.on(Event, order=10)
        ... def second(event):
        ...     print("second:", event.run_id)
        >>> subscription = bus.subscribe(BeforeFit, lambda event: print("first"))
        >>> _ = bus.send(BeforeFit(learner=None, run_id="r1", time=0.0, n_epochs=1))
        first
        second: r1
        >>> subscription.close(), subscription.close()
        (True, False)
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.unheard: set[type[Event]] = set()
        """Event classes without a receiver, of those whose signal has been asked for."""
        self.signals = _Signals(self)
        """The signal of each event class, made when first asked for."""
        self._subscriptions: dict[int, Subscription] = {}

    def signal(self, event_type: type[Event]) -> EventSignal:
        """The blinker signal of one event class."""
        return self.signals[check_event_type(event_type)]

    def send(self, event: Event) -> None:
        """Send an event to its receivers. For events of your own, sent from outside a fit."""
        self.signal(type(event)).send(event)

    def on(
        self,
        event_type: type[E],
        *,
        order: float = 0,
        every: int = 1,
        once: bool = False,
        where: Callable[[E], bool] | None = None,
    ) -> Callable[[R], R]:
        """Subscribe the decorated function; the arguments are those of `subscribe`."""

        def decorate(receiver: R) -> R:
            self.subscribe(event_type, receiver, order=order, every=every, once=once, where=where)
            return receiver

        return decorate

    def subscribe(
        self,
        event_type: type[E],
        receiver: Callable[[E], Any],
        *,
        order: float = 0,
        every: int = 1,
        once: bool = False,
        where: Callable[[E], bool] | None = None,
        learner: object | None = None,
    ) -> Subscription:
        """Call `receiver` with every event of `event_type`, until the subscription is closed.

        Args:
            event_type: an event class; a base class means all below it but the actions.
            receiver: takes the event. An `async def` is awaited in its place in the order.
            order: lower is earlier; equal ones are called in the order they came in.
            every: call it with the n-th, 2n-th, ... event only.
            once: close after the first call.
            where: call it only with events for which this is true; asked before `every`.
            learner: hear only this learner, on a bus that several share.

        Raises:
            TypeError: `event_type` is no event class, `receiver` cannot take one argument, or
                `where` cannot be called.
            ValueError: `every` is no positive integer, or `order` no number.
        """
        check_event_type(event_type)
        if event_type is ActionEvent:
            raise TypeError(
                "exactly one receiver performs each action: subscribe to one by its own name,"
                " Predict, GetLoss, Backward, Step or ZeroGrad"
            )
        check_receiver(receiver, event_type)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"every={every!r}: give a positive integer, 1 for all events")
        if issubclass(event_type, ActionEvent) and (every != 1 or where is not None):
            raise ValueError(
                f"every and where are not for {event_type.__name__}: where they say no, nobody"
                " would perform it; decide inside the receiver"
            )
        if not isinstance(order, int | float) or order != order:
            raise ValueError(f"order={order!r}: give a number; lower is called earlier")
        if where is not None and (not callable(where) or inspect.iscoroutinefunction(where)):
            raise TypeError(f"where={where!r}: give a plain function of the event that is asked")
        subscription = Subscription(self, event_type, receiver, order, every, once, where, learner)
        with self.lock:
            self._subscriptions[id(subscription)] = subscription
            signals = [self.signals[event_type], *self.signals.values()]
            for signal in dict.fromkeys(signals):
                if _reaches(subscription, signal):
                    signal.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> bool:
        """Close `subscription`. False if it was closed before."""
        with self.lock:
            if subscription.closed:
                return False
            subscription.closed = True
            del self._subscriptions[id(subscription)]
            for signal in self.signals.values():
                signal.discard(subscription)
            return True

    def reorder(self) -> None:
        """Sort all receivers again, after their keys were changed."""
        with self.lock:
            for signal in self.signals.values():
                signal.reorder()

    def subscriptions(self) -> tuple[Subscription, ...]:
        """The open subscriptions, in the order they were made in."""
        with self.lock:
            return tuple(self._subscriptions.values())


class _Signals(dict[type[Event], EventSignal]):
    """Makes the signal of an event class when it is first asked for."""

    def __init__(self, bus: Bus) -> None:
        super().__init__()
        self._bus = bus

    def __missing__(self, event_type: type[Event]) -> EventSignal:
        with self._bus.lock:
            if event_type in self:
                return self[event_type]
            signal = EventSignal(self._bus, event_type)
            for subscription in self._bus.subscriptions():
                if _reaches(subscription, signal):
                    signal.add(subscription)
            if not signal.receivers:
                self._bus.unheard.add(event_type)
            self[event_type] = signal
            return signal


def _reaches(subscription: Subscription, signal: EventSignal) -> bool:
    event_type = signal.event_type
    if issubclass(event_type, ActionEvent):
        return subscription.event_type is event_type
    return issubclass(event_type, subscription.event_type)


def name_of(receiver: Callable[..., Any]) -> str:
    """A callable's name as a person would say it: `Class.method`, `function`, `Class`."""
    while isinstance(receiver, partial):
        receiver = receiver.func
    owner = getattr(receiver, "__self__", None)
    if owner is not None and not inspect.ismodule(owner):
        cls = owner if inspect.isclass(owner) else type(owner)
        return f"{cls.__qualname__}.{receiver.__name__}"
    return getattr(receiver, "__qualname__", type(receiver).__qualname__)


def check_event_type(event_type: Any) -> Any:
    """Return `event_type` if it is an event class; raise a TypeError that says what is."""
    if isinstance(event_type, type) and issubclass(event_type, Event):
        return event_type
    raise TypeError(
        f"{event_type!r} is no event class; events are classes of eventrain.events, such as"
        " AfterBatch, or subclasses of Event that you define"
    )


def check_receiver(receiver: Callable[..., Any], event_type: type[Event]) -> None:
    """Raise a TypeError unless `receiver` can be called with the event."""
    if not callable(receiver):
        raise TypeError(f"a receiver of {event_type.__name__} must be callable: {receiver!r}")
    if inspect.isgeneratorfunction(receiver) or inspect.isasyncgenfunction(receiver):
        raise TypeError(f"{name_of(receiver)} is a generator: called as a receiver, it never runs")
    try:
        signature = inspect.signature(receiver)
    except ValueError:  # some builtins have none: nothing to check
        return
    try:
        signature.bind(None)
    except TypeError as exc:
        raise TypeError(
            f"{name_of(receiver)}{signature} cannot receive {event_type.__name__}: a receiver"
            f" takes one argument, the event ({exc})"
        ) from None

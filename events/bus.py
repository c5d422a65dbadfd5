"""The bus: typed subscriptions, one ordered blinker signal per event class.

The path of an event: `Learner.emit` -> `EventSignal.send` -> `Subscription` -> the receiver.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from .base import ActionEvent, Event
from .checks import is_int
from .signal import EventSignal
from .subscription import Subscription, check_event_type, check_receiver

E = TypeVar("E", bound=Event)
R = TypeVar("R", bound=Callable[..., Any])


class Bus:
    """Delivers events to their subscribers. Several learners may share one.

    Safe to use from any thread.

    Example:
        >>> from eventrain.events import Bus, BeforeFit, Event
        >>> bus = Bus()
        >>> @bus.on(Event, order=10)
        ... def second(event):
        ...     print("second:", event.run_id)
        >>> subscription = bus.subscribe(BeforeFit, lambda event: print("first"))
        >>> _ = bus.send(BeforeFit(None, "r1", time=0.0, purpose="fit", n_epochs=1))
        first
        second: r1
        >>> subscription.close(), subscription.close()
        (True, False)
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.without_receivers: set[type[Event]] = set()
        """The event classes without receivers, among those whose signal has been made."""
        self.signals: dict[type[Event], EventSignal] = _Signals(self)
        """The signal of each event class, made on first access."""
        self._subscriptions: dict[int, Subscription] = {}

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            "a Bus can neither be pickled nor copied by itself, without the learners that use it:"
            " make a new one, or copy.deepcopy(learner), which gives the copy its own"
        )

    def signal(self, event_type: type[Event]) -> EventSignal:
        """The blinker signal of one event class."""
        return self.signals[check_event_type(event_type)]

    def send(self, event: Event) -> None:
        """Send an event to its receivers. It is meant for your own events, outside a fit."""
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
            event_type: an event class; a base class means all its subclasses except the actions.
            receiver: called with the event. An `async def` is awaited in its place in the order.
            order: lower is earlier; receivers of equal order are called in the order of connection.
            every: call it only with every n-th event.
            once: close the subscription after the first call.
            where: call it only with events for which this returns true; checked before `every`.
            learner: receive only the events of this learner, on a bus that several share.

        Raises:
            TypeError: `event_type` is not an event class, `receiver` cannot take one argument,
                or `where` cannot be called.
            ValueError: `every` is not a positive integer, or `order` is not a number.
        """
        check_event_type(event_type)
        if event_type is ActionEvent:
            raise TypeError(
                "exactly one receiver performs each action: subscribe to one action by its class,"
                " Predict, GetLoss, Backward, Step or ZeroGrad"
            )
        check_receiver(receiver, event_type)
        if not is_int(every, 1):
            raise ValueError(f"every={every!r}: give a positive integer, 1 for all events")
        if issubclass(event_type, ActionEvent) and (every != 1 or where is not None):
            raise ValueError(
                f"every and where cannot be used with {event_type.__name__}: an action that they"
                " filter out would not be performed; decide inside the receiver"
            )
        if not isinstance(order, int | float) or order != order:
            raise ValueError(f"order={order!r}: give a number; lower is called earlier")
        if where is not None and (not callable(where) or inspect.iscoroutinefunction(where)):
            raise TypeError(f"where={where!r}: give a plain function that takes the event")
        subscription = Subscription(
            event_type,
            receiver,
            order=order,
            every=every,
            once=once,
            where=where,
            learner=learner,
            unsubscribe=self.unsubscribe,
        )
        with self.lock:
            self._subscriptions[id(subscription)] = subscription
            signals = [self.signals[event_type], *self.signals.values()]
            for signal in dict.fromkeys(signals):
                if subscription.reaches(signal.event_type):
                    signal.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> bool:
        """Close `subscription`. Returns False if it was closed before."""
        with self.lock:
            if subscription.closed:
                return False
            subscription.closed = True
            del self._subscriptions[id(subscription)]
            for signal in self.signals.values():
                signal.discard(subscription)
            return True

    def reorder(self) -> None:
        """Sort all receivers again, after their keys have changed."""
        with self.lock:
            for signal in self.signals.values():
                signal.reorder()

    def subscriptions(self) -> tuple[Subscription, ...]:
        """The open subscriptions, in the order in which they were made."""
        with self.lock:
            return tuple(self._subscriptions.values())


class _Signals(dict[type[Event], EventSignal]):
    """Makes the signal of an event class on first access."""

    def __init__(self, bus: Bus) -> None:
        super().__init__()
        self._bus = bus

    def __missing__(self, event_type: type[Event]) -> EventSignal:
        with self._bus.lock:
            if event_type in self:
                return self[event_type]
            signal = EventSignal(self._bus, event_type)
            for subscription in self._bus.subscriptions():
                if subscription.reaches(signal.event_type):
                    signal.add(subscription)
            if not signal.receivers:
                self._bus.without_receivers.add(event_type)
            self[event_type] = signal
            return signal

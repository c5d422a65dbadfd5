"""The bus: typed subscriptions, one ordered blinker signal per event class.

The path of an event: `Learner.emit` -> `EventSignal.send` -> `Subscription` -> the receiver.
"""

from __future__ import annotations

import inspect
import os
import threading
import weakref
from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn, TypeVar

from .base import ActionEvent, Event
from .checks import is_int
from .signal import EventSignal
from .subscription import Subscription, check_event_type, check_receiver

E = TypeVar("E", bound=Event)
R = TypeVar("R", bound=Callable[..., Any])


class Bus:
    """Delivers events to their subscribers. Several learners may share one.

    Safe to use from any thread. A learner and its receivers do not live longer because of the bus:
    the learner holds those that are subscribed to it alone.

    Example:
        >>> from eventrain.events import Bus, BeforeFit, Event
        >>> bus = Bus()
        >>> @bus.on(Event, order=10)
        ... def second(event):
        ...     print("second:", event.run_id)
        >>> subscription = bus.subscribe(BeforeFit, lambda event: print("first"))
        >>> _ = bus.send(BeforeFit(None, "r1", time=0.0, purpose="fit", n_epochs=1, n_steps=4))
        first
        second: r1
        >>> subscription.close(), subscription.close()
        (True, False)
    """

    lock = threading.RLock()
    """Held while subscriptions change. One for all, so that no fork can copy it locked."""

    def __init__(self) -> None:
        _lock_during_forks()
        self.signals = Signals(self)
        """The signal of each event class, with the receivers of all learners."""
        self._of_learner: weakref.WeakValueDictionary[int, Signals] = weakref.WeakValueDictionary()

    def signals_of(self, learner: object) -> Signals:
        """The signals for the events of one learner, which holds them as long as it lives."""
        with self.lock:
            signals = self._find(learner)
            if signals is None:
                signals = self._of_learner[id(learner)] = Signals(self, learner)
            return signals

    def _find(self, learner: object) -> Signals | None:
        found = self._of_learner.get(id(learner))
        return found if found is not None and found.is_of(learner) else None

    @property
    def without_receivers(self) -> set[type[Event]]:
        """The event classes without receivers, among those whose signal has been made."""
        return self.signals.without_receivers

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
        event_type = check_event_type(type(event))
        of_learner = self._find(event.learner)
        (self.signals if of_learner is None else of_learner)[event_type].send(event)

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
            of_learner = self._find(learner)
            (self.signals if of_learner is None else of_learner).hold(subscription)
            for signals in self._reached_by(subscription):
                signals.add(subscription)
        return subscription

    def unsubscribe(self, subscription: Subscription) -> bool:
        """Close `subscription`. Returns False if it was closed before."""
        with self.lock:
            if subscription.closed:
                return False
            subscription.closed = True
            for signals in self._reached_by(subscription):
                signals.discard(subscription)
            return True

    def _reached_by(self, subscription: Subscription) -> list[Signals]:
        """The signals that reach it, which include those of the bus."""
        if self.signals.holds(subscription):
            return [self.signals, *self._of_learner.values()]
        of_learner = self._find(subscription.learner)
        return [self.signals] if of_learner is None else [self.signals, of_learner]

    def reorder(self) -> None:
        """Sort all receivers again, after their keys have changed."""
        with self.lock:
            for signals in (self.signals, *self._of_learner.values()):
                for signal in signals.values():
                    signal.reorder()

    def subscriptions(self) -> tuple[Subscription, ...]:
        """The open subscriptions, in the order in which they were made."""
        with self.lock:
            groups = (self.signals, *self._of_learner.values())
            held = [subscription for signals in groups for subscription in signals.held()]
            return tuple(sorted(held, key=lambda subscription: subscription.time))


class Signals(dict[type[Event], EventSignal]):
    """The signal of each event class, made on first access.

    A learner's signals reach its own receivers and those of all learners, and hold both. The bus's
    signals reach the receivers of every learner, and hold only those of all learners.

    Args:
        bus: the bus to which they belong.
        learner: the learner whose signals they are; None for those of the bus.
    """

    def __init__(self, bus: Bus, learner: object | None = None) -> None:
        super().__init__()
        self.lock = bus.lock
        self.subscribe = bus.subscribe
        self.without_receivers: set[type[Event]] = set()
        self._bus = bus
        self._learner = None if learner is None else weakref.ref(learner)
        self._held: dict[int, Subscription] = {}

    def is_of(self, learner: object) -> bool:
        """Whether they are those of this learner."""
        return self._learner is not None and self._learner() is learner

    def hold(self, subscription: Subscription) -> None:
        """Keep a subscription until it is closed."""
        self._held[id(subscription)] = subscription

    def held(self) -> list[Subscription]:
        """The open subscriptions that are held here, in the order in which they were made."""
        return list(self._held.values())

    def holds(self, subscription: Subscription) -> bool:
        """Whether a subscription is held here."""
        return id(subscription) in self._held

    def add(self, subscription: Subscription) -> None:
        """Have a subscription receive the events that it asks for."""
        for signal in {self[subscription.event_type], *self.values()}:
            if subscription.reaches(signal.event_type):
                self._add(signal, subscription)

    def _add(self, signal: EventSignal, subscription: Subscription) -> None:
        of_another = self._learner is None and not self.holds(subscription)
        signal.add(subscription, weak=of_another)

    def discard(self, subscription: Subscription) -> None:
        """Forget a subscription that is closed."""
        self._held.pop(id(subscription), None)
        for signal in self.values():
            signal.discard(subscription)

    def __missing__(self, event_type: type[Event]) -> EventSignal:
        with self.lock:
            if event_type in self:
                return self[event_type]
            signal = EventSignal(self, event_type)
            is_of_bus = self._learner is None
            held = self._bus.signals.held() + self.held()
            for subscription in self._bus.subscriptions() if is_of_bus else held:
                if subscription.reaches(event_type):
                    self._add(signal, subscription)
            if not signal.receivers:
                self.without_receivers.add(event_type)
            self[event_type] = signal
            return signal


@cache
def _lock_during_forks() -> None:
    """Called by the first bus of a process, so that nothing happens at import."""
    if hasattr(os, "register_at_fork"):
        lock = Bus.lock
        os.register_at_fork(
            before=lock.acquire, after_in_parent=lock.release, after_in_child=lock.release
        )

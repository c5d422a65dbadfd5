"""One blinker signal per event class, with an order.

Blinker documents the order of its receivers as undefined, connects weakly by default (which
drops lambdas and closures) and calls sender-specific receivers first. An `EventSignal`
is a blinker signal that calls its receivers by (order, time of connection), does not drop them
before their learner ends, and whose sender is the event itself.

Source: blinker 1.9, `blinker.Signal`.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from types import CoroutineType
from typing import Any, Protocol

import blinker

from .base import Event
from .errors import annotate_error, most_severe, text_of
from .subscription import Subscription

AsyncWrapper = Callable[[Callable[..., Coroutine[Any, Any, Any]]], Callable[..., Any]]


class SignalOwner(Protocol):
    """The part of the bus that a signal uses."""

    @property
    def lock(self) -> AbstractContextManager[Any]: ...

    @property
    def without_receivers(self) -> set[type[Event]]: ...

    def subscribe(self, event_type: type[Event], receiver: Any) -> Subscription: ...


class EventSignal(blinker.Signal):
    """The signal of one event class; made by a `Bus`, sent as `signal.send(event)`.

    `if signal.receivers:` is a cheap test for receivers.
    """

    def __init__(self, bus: SignalOwner, event_type: type[Event]) -> None:
        super().__init__(doc=event_type.__doc__)
        self._bus = bus
        self.event_type = event_type
        self._ordered: tuple[Subscription, ...] | None = None

    @property
    def ordered(self) -> tuple[Subscription, ...]:
        """The subscriptions in the order of their calls.

        Cached until one is added or removed, unless some are held by their learner alone.
        """
        ordered = self._ordered
        if ordered is None:
            with self._bus.lock:
                receivers: list[Any] = list(self.receivers.values())
                weak = [r for r in receivers if isinstance(r, weakref.ref)]
                strong = [r() if isinstance(r, weakref.ref) else r for r in receivers]
                found = (s for s in strong if s is not None)
                ordered = tuple(sorted(found, key=lambda s: s.key))
                self._ordered = None if weak else ordered
        return ordered

    # Typed Any: blinker asks for a callable, but only stores the object by its id.

    def add(self, subscription: Any, weak: bool) -> None:
        super().connect(subscription, weak=weak)
        self._bus.without_receivers.discard(self.event_type)
        self._ordered = None

    def discard(self, subscription: Any) -> None:
        super().disconnect(subscription)
        if not self.receivers:
            self._bus.without_receivers.add(self.event_type)
        self._ordered = None

    def reorder(self) -> None:
        """Sort again, because keys have changed."""
        self._ordered = None

    # Blinker's own interface, for users who know it; `Bus.subscribe` has more options.

    def connect(self, receiver: Any, sender: Any = blinker.ANY, weak: bool = False) -> Any:
        """Subscribe `receiver` strongly, at order 0. Raises ValueError for a `sender` or `weak`."""
        if sender is not blinker.ANY or weak:
            raise ValueError(
                f"{self.event_type.__name__}: receivers are held strongly and get the events"
                " of every sender; to filter, use where=...; to end it, close the subscription"
            )
        self._bus.subscribe(self.event_type, receiver)
        return receiver

    def disconnect(self, receiver: Any, sender: Any = blinker.ANY) -> None:
        """Close the subscriptions of `receiver` to this class of events."""
        for subscription in self.ordered:
            if subscription.receiver == receiver and subscription.event_type is self.event_type:
                subscription.close()

    def receivers_for(self, sender: Any) -> Iterator[Callable[..., Any]]:  # type: ignore[override]
        """Yield the receivers that would be called for the event `sender`, in order."""
        for subscription in self.ordered:
            if subscription.accepts(sender):
                yield subscription.receiver

    def send(
        self,
        sender: Any = None,
        /,
        *,
        _async_wrapper: AsyncWrapper | None = None,
        **kwargs: Any,
    ) -> list[tuple[Callable[..., Any], Any]]:
        """Call every receiver, in order, with one argument: the event `sender`.

        A receiver that is closed while the event is being sent is not called; one that is added
        gets the next event. If a receiver raises, sending stops and the error is raised with a
        note naming the receiver and the event; for Cleanup* events the others are called first.

        Args:
            sender: the event.
            _async_wrapper: turns an async receiver into one that blocks until it has finished.

        Raises:
            RuntimeError: a receiver is async, and `_async_wrapper` is not given.
        """
        if self.is_muted:
            return []
        results = []
        errors: list[BaseException] = []
        learner = sender.learner
        for subscription in self._ordered or self.ordered:
            # As `accepts`, without the call.
            of = subscription.learner
            if subscription.closed or (of is not None and of is not learner):
                continue
            try:
                result = subscription.call(sender)
                if result is not None and result.__class__ is CoroutineType:
                    result = _await(result, _async_wrapper, sender)
                results.append((subscription.receiver, result))
            except BaseException as exc:
                errors.append(annotate_error(exc, subscription.name, sender))
                if not sender.deliver_to_all:
                    break
        if errors:  # raised outside `except`, so that the error keeps its own context
            error = _raised_of(errors)
            try:
                raise error
            finally:  # a reference cycle with this frame would keep the batch until a gc run
                del error, errors
        return results

    async def send_async(self, sender: Any = None, /, **kwargs: Any) -> Any:
        """Not supported: blinker's version would bypass `every`, `once` and `where`."""
        raise RuntimeError(
            f"send {self.event_type.__name__} with send(event); in a fit the learner awaits async"
            " receivers in their place"
        )

    def send_to(
        self, subscription: Subscription, event: Event, wrapper: AsyncWrapper | None
    ) -> None:
        """Call only this receiver, as `send` does."""
        try:
            result = subscription.call(event)
            if result.__class__ is CoroutineType:
                _await(result, wrapper, event)
        except BaseException as exc:
            error = annotate_error(exc, subscription.name, event)
        else:
            return
        try:
            raise error
        finally:
            del error  # avoids a reference cycle of error, traceback and this frame


def _raised_of(errors: list[BaseException]) -> BaseException:
    """The most severe of the errors, with notes about the others."""
    first = most_severe(errors)
    for other in errors:
        if other is not first:
            first.add_note(f"then also: {text_of(other)} ({'; '.join(other.__notes__)})")
    return first


def _await(
    coroutine: Coroutine[Any, Any, Any], wrapper: AsyncWrapper | None, event: Event
) -> object:
    if wrapper is None:
        coroutine.close()
        raise RuntimeError(
            f"an async receiver of {type(event).__name__} is awaited by the learner that emits;"
            " to send by hand, pass _async_wrapper"
        )
    return wrapper(lambda _event: coroutine)(event)

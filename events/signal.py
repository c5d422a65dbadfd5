"""One blinker signal per event class, with an order.

Blinker documents the order of its receivers as undefined, connects weakly by default (which
drops lambdas and closures) and lets sender-specific receivers jump the queue. An `EventSignal`
is a blinker signal that calls its receivers by (order, time of connection), holds them
strongly, and whose sender is the event itself.

Source: blinker 1.9, `blinker.Signal`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterator
from types import CoroutineType
from typing import TYPE_CHECKING, Any

import blinker

from .cancel import CancelException, weightiest
from .types import Event

if TYPE_CHECKING:
    from .bus import Bus, Subscription

AsyncWrapper = Callable[[Callable[..., Coroutine[Any, Any, Any]]], Callable[..., Any]]


class EventSignal(blinker.Signal):
    """The signal of one event class; made by a `Bus`, sent as `signal.send(event)`.

    `if signal.receivers:` is the cheap question whether anyone listens.
    """

    def __init__(self, bus: Bus, event_type: type[Event]) -> None:
        super().__init__(doc=event_type.__doc__)
        self._bus = bus
        self.event_type = event_type
        self._ordered: tuple[Subscription, ...] | None = None

    @property
    def ordered(self) -> tuple[Subscription, ...]:
        """The subscriptions in the order they are called in; cached until one comes or goes."""
        ordered = self._ordered
        if ordered is None:
            with self._bus.lock:
                subscriptions: list[Any] = list(self.receivers.values())
                ordered = self._ordered = tuple(sorted(subscriptions, key=lambda s: s.key))
        return ordered

    # Typed Any: blinker asks for a callable, but only stores it under its id.

    def add(self, subscription: Any) -> None:
        super().connect(subscription, weak=False)
        self._bus.unheard.discard(self.event_type)
        self._ordered = None

    def discard(self, subscription: Any) -> None:
        super().disconnect(subscription)
        if not self.receivers:
            self._bus.unheard.add(self.event_type)
        self._ordered = None

    def reorder(self) -> None:
        """Sort again: keys have changed."""
        self._ordered = None

    # Blinker's own interface, for those who know it. Ours is `Bus.subscribe`.

    def connect(self, receiver: Any, sender: Any = blinker.ANY, weak: bool = False) -> Any:
        """Subscribe `receiver` strongly, at order 0. Raises ValueError for a sender or weak."""
        if sender is not blinker.ANY or weak:
            raise ValueError(
                f"{self.event_type.__name__}: receivers are strong and hear every sender; to"
                " filter, subscribe with where=..., to end it, close the subscription"
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
            if subscription.hears(sender):
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

        A receiver closed while the event is being sent is not called any more; one added
        hears the next event. What a receiver raises ends the sending and goes to the caller
        with a note naming receiver and event; for Cleanup* events the others are called first.

        Args:
            sender: the event.
            _async_wrapper: turns an async receiver into one that blocks until it is done.

        Raises:
            RuntimeError: an async receiver, and no `_async_wrapper`.
        """
        if self.is_muted:
            return []
        results = []
        errors: list[BaseException] = []
        for subscription in self._ordered or self.ordered:
            if not subscription.hears(sender):
                continue
            try:
                result = subscription.call(sender)
                if result is not None and result.__class__ is CoroutineType:
                    result = _await(result, _async_wrapper, sender)
                results.append((subscription.receiver, result))
            except BaseException as exc:
                errors.append(blame(exc, subscription.name, sender))
                if not sender.reaches_all:
                    break
        if errors:  # raised here, outside `except`: what was raised keeps its own context
            error = _first(errors)
            try:
                raise error
            finally:  # it refers to this frame: a circle would hold the batch until the gc runs
                del error, errors
        return results

    async def send_async(self, sender: Any = None, /, **kwargs: Any) -> Any:
        """Not offered: blinker's would go round `every`, `once` and `where`."""
        raise RuntimeError(
            f"send {self.event_type.__name__} with send(event); in a fit the learner awaits async"
            " receivers in their place"
        )

    def performer(self, learner: object) -> Subscription | None:
        """For the signal of an action: the one receiver that performs it for `learner`."""
        return next((s for s in self.ordered if not s.closed and s.serves(learner)), None)

    def send_to(
        self, subscription: Subscription, event: Event, wrapper: AsyncWrapper | None
    ) -> None:
        """Call this one receiver, in the way of `send`."""
        try:
            result = subscription.call(event)
            if result.__class__ is CoroutineType:
                _await(result, wrapper, event)
        except BaseException as exc:
            error = blame(exc, subscription.name, event)
        else:
            return
        try:
            raise error
        finally:
            del error  # no circle of error, traceback and this frame


def _first(errors: list[BaseException]) -> BaseException:
    """The one to raise, with notes of the others."""
    first = weightiest(errors)
    for other in errors:
        if other is not first:
            first.add_note(f"then also: {other!r} ({'; '.join(other.__notes__)})")
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


def blame(exc: BaseException, who: str, event: Event) -> BaseException:
    """The one error worth raising for `exc`, saying who raised it and on which event."""
    exc = unwrap(exc)
    if isinstance(exc, CancelException) and exc.who is None:
        exc.who = who
    where = "".join(
        f", {name} {getattr(event, name)}" for name in ("epoch", "iter") if hasattr(event, name)
    )
    exc.add_note(f"raised by {who} on {type(event).__name__}{where}")
    return exc


def who_raised(exc: BaseException) -> str | None:
    """The receiver that the first note of `blame` names."""
    for note in getattr(exc, "__notes__", ()):
        if found := re.match(r"raised by (.+) on \w+", note):
            return found[1]
    return None


def unwrap(exc: BaseException) -> BaseException:
    """Take what was raised out of the groups that task groups wrapped it in.

    A group of one is that one. In a group of several, errors outweigh cancels: what is left
    without the cancels, or else the widest cancel.

    Example:
        >>> unwrap(ExceptionGroup("", [ExceptionGroup("", [KeyError("x")])]))
        KeyError('x')
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    _, errors = exc.split(CancelException)
    leaves = list(_leaves(errors or exc))
    return weightiest(leaves) if errors is None or len(leaves) == 1 else errors


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc

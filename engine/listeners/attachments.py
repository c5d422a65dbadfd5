"""The callbacks attached to a learner: their subscriptions and their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ...events import Bus, Callback, Subscription
from ..loop.state import LoopState
from .in_use import release, reserve
from .observers import Observer


@dataclass(eq=False)
class Attachment:
    """One callback on one learner."""

    callback: Callback
    subscriptions: list[Subscription] = field(default_factory=list)
    observer: Observer[Any] | None = None

    @property
    def name(self) -> str:
        return type(self.callback).__qualname__

    def close(self) -> None:
        for subscription in self.subscriptions:
            subscription.close()
        if self.observer is not None:
            self.observer.close()


class Attachments:
    """The callbacks of one learner, and their subscriptions on its bus."""

    def __init__(
        self, learner: LoopState, bus: Bus, observe: Callable[[Callback], Observer[Any]]
    ) -> None:
        self._learner = learner
        self._in_use = False
        self._bus = bus
        self._observe = observe
        self._attached: list[Attachment] = []

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """In the order of attachment."""
        return tuple(attachment.callback for attachment in self._attached)

    @property
    def attached(self) -> tuple[Attachment, ...]:
        """In the order of attachment."""
        return tuple(self._attached)

    def attach(self, callbacks: Iterable[Callback]) -> None:
        """Attach all of `callbacks`, or none if one of them is refused.

        Raises:
            TypeError: one is not a Callback.
            ValueError: one is attached already, or `run_after`/`run_before` form a cycle.
            RuntimeError: while this learner is fitting, another learner is fitting with one.
        """
        before = len(self._attached)
        try:
            for callback in callbacks:
                self._attached.append(self._connect(callback))
            self._arrange()
            if self._in_use:
                reserve(self._stateful(), self._learner)
        except BaseException:
            for attachment in self._attached[before:]:
                attachment.close()
            del self._attached[before:]
            raise

    def detach(self, callback: Callback) -> None:
        """Detach a callback. Raises ValueError if it is not attached."""
        for attachment in self._attached:
            if attachment.callback is callback:
                self._attached.remove(attachment)
                attachment.close()
                release((callback,), self._learner)
                self._arrange()
                return
        raise ValueError(f"{callback!r} is not attached to this learner")

    def begin_use(self) -> None:
        """Reserve the callbacks for a fit of this learner, until `end_use`.

        Raises:
            RuntimeError: another learner is fitting with one of them.
        """
        reserve(self._stateful(), self._learner)
        self._in_use = True

    def end_use(self) -> None:
        """Release the callbacks for the fits of other learners."""
        self._in_use = False
        release(self._stateful(), self._learner)

    def _stateful(self) -> list[Callback]:
        """The callbacks with ordered receivers; those that only observe keep what they need."""
        return [attachment.callback for attachment in self._attached if attachment.subscriptions]

    def _connect(self, callback: Callback) -> Attachment:
        if not isinstance(callback, Callback):
            hint = ": pass an instance" if isinstance(callback, type) else ""
            if not hint and callable(getattr(callback, "step", None)):
                hint = ": give SchedulerCB(lambda opt: ...) for a scheduler"
            elif not hint and callable(callback):
                hint = ": subscribe a function with learner.on(AfterBatch)"
            raise TypeError(f"{callback!r} is not a Callback{hint}")
        if any(callback is other for other in self.callbacks):
            raise ValueError(
                f"this {type(callback).__qualname__} is attached already: an instance is attached"
                " once (give it to the learner or to fit, not to both)"
            )
        attachment = Attachment(callback)
        try:
            for event_type, method in callback.receivers(self._learner):
                attachment.subscriptions.append(
                    self._bus.subscribe(
                        event_type, method, order=callback.order, learner=self._learner
                    )
                )
            if callback.observes:
                attachment.observer = self._observe(callback)
        except BaseException:
            attachment.close()
            raise
        return attachment

    def _arrange(self) -> None:
        """Sort the callbacks by (order, time of attachment), respecting run_after and run_before.

        The earliest callback that does not have to follow another one is placed next. A callback
        that was delayed takes the key of the one before it, so that receivers that do not belong to
        callbacks are still sorted by their order.
        """
        waiting = sorted(
            (a for a in self._attached if a.subscriptions),
            key=lambda a: (a.callback.order, a.subscriptions[0].time),
        )
        placed = 0
        last = (-float("inf"), 0)
        while waiting:
            ready = [a for a in waiting if not any(_waits_for(a, b) for b in waiting)]
            if not ready:
                names = ", ".join(a.name for a in waiting)
                raise ValueError(f"run_after and run_before of {names} form a cycle")
            attachment = ready[0]
            waiting.remove(attachment)
            last = max(last, (attachment.callback.order, attachment.subscriptions[0].time))
            for subscription in attachment.subscriptions:
                subscription.key = (*last, placed)
            placed += 1
        self._bus.reorder()


def _waits_for(a: Attachment, b: Attachment) -> bool:
    return a is not b and (
        _names(a.callback.run_after, b.callback) or _names(b.callback.run_before, a.callback)
    )


def _names(classes: Iterable[str | type[Callback]], callback: Callback) -> bool:
    if isinstance(classes, str | type):
        classes = (classes,)
    mro = type(callback).__mro__
    return any(c in mro or any(c == base.__name__ for base in mro) for c in classes)

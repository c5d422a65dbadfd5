"""Observers: receivers that are called on the host's event loop, concurrently with the training."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from copy import deepcopy
from typing import Any, Literal, NoReturn, TypeVar

import anyio

from ...events import Callback, CancelException, Event, Watcher
from ...events.callback import Overflow
from ...events.closing import Closing
from ...events.errors import unwrap
from ...events.subscription import check_receiver, name_of
from .event_buffer import StreamOwner
from .streams import EventStream

E = TypeVar("E", bound=Event)


class Observer(EventStream[E], Closing):
    """A receiver that is called on the event loop; made by `Learner.observe`.

    Close it, or use it as a context manager, to end it; it stays attached over any number of fits.
    At the end of each fit, delivered + dropped = emitted.
    """

    def __init__(
        self,
        owner: StreamOwner,
        event_types: tuple[type[E], ...],
        buffer: int,
        overflow: Overflow,
        where: Callable[[E], bool] | None,
        receiver: Callable[[E], Any],
        on_error: Literal["log", "raise"],
    ) -> None:
        super().__init__(owner, event_types, buffer, overflow, where)
        if on_error not in ("log", "raise"):
            raise ValueError(f"on_error={on_error!r}: choose 'log' or 'raise'")
        check_receiver(receiver, self.event_types[0])
        self.name = name_of(receiver)
        self.receiver = receiver
        self.on_error = on_error

    async def run(
        self, scope: anyio.CancelScope, report: Callable[[BaseException], object]
    ) -> None:
        """Deliver the events of one fit.

        Args:
            scope: its deadline ends the delivery. Nothing else cancels it from outside: any other
                cancellation was raised by the receiver itself, and counts as its error.
            report: called with an error that ends the fit.
        """
        contained = (Exception, CancelException, anyio.get_cancelled_exc_class())
        async for event in self._events():
            try:
                result = self.receiver(event)
                if inspect.isawaitable(result):
                    await result
            except BaseException as exc:
                error = unwrap(exc)
                if scope.cancel_called or not isinstance(error, contained):
                    raise
                error.add_note(f"raised by observer {self.name} on {type(event).__name__}")
                self.fail(error)
                if self.on_error == "raise":
                    report(error)
                return

    def copy_to(self, learner: Any, memo: dict[int, Any]) -> None:
        """Observe another learner, a copy of this one's, in the same way."""
        receiver, where = deepcopy(self.receiver, memo), deepcopy(self._where, memo)
        options = {"buffer": self.buffer, "overflow": self.overflow, "on_error": self.on_error}
        learner.observe(receiver, *self.event_types, where=where, **options)

    def _is_read(self) -> bool:
        return True  # by `run`; its receiver may be slow

    def _events(self) -> AsyncIterator[E]:
        return super().__aiter__()

    def __aiter__(self) -> NoReturn:
        raise self._cannot_be_iterated()

    async def __anext__(self) -> NoReturn:
        raise self._cannot_be_iterated()

    def _cannot_be_iterated(self) -> TypeError:
        return TypeError(
            f"an observer cannot be iterated: it passes its events to {self.name}. Use `async with"
            " learner.events(...) as stream`"
        )

    def finish(self) -> None:
        """The fit is over: events that were not delivered before the deadline are dropped."""
        self._items.clear()


class CallbackObserver(Observer[Event]):
    """Passes the events that a callback `observes` to its watcher, of which each fit has one."""

    def __init__(self, owner: StreamOwner, callback: Callback) -> None:
        if type(callback).watcher is Callback.watcher:
            check_receiver(callback.observe, callback.observes[0])  # type: ignore[attr-defined]
        self._callback = callback
        self._current = current = _CurrentWatcher(callback)
        super().__init__(
            owner,
            callback.observes,
            callback.buffer,
            callback.overflow,
            current.wants,
            current.observe,
            "log",
        )
        self.name = f"{type(callback).__qualname__}.observe"

    def begin(self) -> None:
        super().begin()
        self._current.watcher = None

    async def run(
        self, scope: anyio.CancelScope, report: Callable[[BaseException], object]
    ) -> None:
        await super().run(scope, report)
        watcher: object = self._current.watcher
        close = getattr(watcher, "close", None)
        if watcher is self._callback or not inspect.iscoroutinefunction(close):
            return
        try:
            await close()
        except Exception as exc:
            self.fail(exc)

    def finish(self) -> None:
        super().finish()
        self._current.watcher = None


class _CurrentWatcher:
    """The watcher of the current fit.

    It is a separate object, because an observer that holds its own bound methods would be in a
    reference cycle, which only the garbage collector frees.
    """

    def __init__(self, callback: Callback) -> None:
        self._make = callback.watcher
        self.watcher: Watcher | None = None

    def wants(self, event: Event) -> bool:
        if self.watcher is None:
            self.watcher = self._make(event)
        return self.watcher.wants(event)

    def observe(self, event: Event) -> Awaitable[Any] | None:
        assert self.watcher is not None  # `wants` made it
        return self.watcher.observe(event)

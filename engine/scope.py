"""A scope of the loop: what is entered is left, through its Cleanup* event, exactly once."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from ..events import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    Event,
    ScopeEnd,
)
from ..events.cancel import weightiest
from ..events.signal import who_raised

if TYPE_CHECKING:
    from .loop import Loop


class InterruptedFit(CancelException):
    """The host cancelled the task that awaits the fit. Leaves every scope; none catches it."""

    width = 5

    def __init__(self) -> None:
        super().__init__("the task that awaits the fit was cancelled")
        self.who = "host"


class Request(NamedTuple):
    """What `stop`, the host or an observer wants the training thread to raise.

    Attributes:
        error: what to raise.
        target: the scope that it is meant for; None where none was open.
        graceful: whether to raise it between two batches only.
    """

    error: BaseException
    target: Scope | None
    graceful: bool = False


class Scope:
    """Catches the cancel that names it and emits its Cleanup* event, whatever ended it.

    Source: the post's `_CbCtxInner`, without the names made up at run time, and with Before*
    emitted inside, so that a cancel raised there is caught and cleaned up too.
    """

    __slots__ = ("cancel", "cleanup", "loop", "outer")

    def __init__(self, loop: Loop, cancel: type[CancelException], cleanup: type[Event]) -> None:
        self.loop = loop
        self.cancel = cancel
        self.cleanup = cleanup

    def __enter__(self) -> None:
        self.outer = self.loop._innermost
        self.loop._innermost = self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        loop = self.loop
        signal = loop.signals[self.cleanup]
        if exc is None:
            counts = loop._completed[loop.training]
            counts[self.cleanup] = counts.get(self.cleanup, 0) + 1
            loop._end = _COMPLETED
            if not signal.receivers and not loop._requests:
                loop._innermost = self.outer
                return True
            error = None
        else:
            error = self._unless_stray(exc)
            loop._end = _end(error)
        loop.going_on = error is None or isinstance(error, self.cancel)
        loop.ending = bool(loop._requests) and self._ends_gracefully()
        if signal.receivers:
            outer, loop._cleaning = loop._cleaning, True
            try:
                signal.send(self.cleanup.of(loop, loop._end), _async_wrapper=loop._async_wrapper)
            except BaseException as late:
                late = self._unless_stray(late)
                error = late if error is None else _first(error, late)
                if not isinstance(error, self.cancel):
                    loop._end = _end(error)  # the result tells of it, too
            finally:
                loop._cleaning = outer
        loop._innermost = self.outer
        try:
            if error is None or isinstance(error, self.cancel):
                if loop.ending:
                    loop._honour_requests(gracefully=True)
                return True
            if error is exc:
                return False  # goes on as it came, traceback and all
            raise error
        finally:
            del error  # no circle of the error, its traceback and this frame: it holds the batch

    def _ends_gracefully(self) -> bool:
        """Whether a graceful stop is due when this scope has been left: between two batches."""
        between = self.cancel in (CancelBatchException, CancelEpochException)
        due = self.loop.going_on and between
        return due and any(map(self._is_left_by, tuple(self.loop._requests)))

    def _is_left_by(self, request: Request) -> bool:
        """Whether a graceful request is for a scope around this one, not for this one alone."""
        scope = self.outer
        while scope is not None and not isinstance(request.error, scope.cancel):
            scope = scope.outer
        return request.graceful and scope is not None and request.target in (None, scope)

    def _unless_stray(self, exc: BaseException) -> BaseException:
        """A cancel that no open scope will catch is a mistake of whoever raised it."""
        if not isinstance(exc, CancelException) or isinstance(exc, InterruptedFit):
            return exc
        scope: Scope | None = self
        while scope is not None:
            if isinstance(exc, scope.cancel):
                return exc
            scope = scope.outer
        error = RuntimeError(
            f"{exc.who or 'something'} raised {type(exc).__name__} where no scope of its kind"
            " is open, so there is nothing for it to cancel"
        )
        error.__cause__ = exc
        return error


def _first(exc: BaseException, late: BaseException) -> BaseException:
    """What ended the scope outweighs what its cleanup raised, unless it was only a cancel."""
    first = weightiest([exc, late])
    other = late if first is exc else exc
    if not isinstance(other, CancelException):
        first.add_note(f"then, in cleanup: {other!r}")
    return first


_COMPLETED = ScopeEnd("completed")


def _end(exc: BaseException) -> ScopeEnd:
    if isinstance(exc, CancelException):
        return ScopeEnd("cancelled", exc.who, exc.reason)
    return ScopeEnd("failed", who_raised(exc), f"{type(exc).__name__}: {exc}")

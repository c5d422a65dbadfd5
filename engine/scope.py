"""A scope of the loop: what is entered is left, through its Cleanup* event, exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, TypeVar

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

L = TypeVar("L", bound="Loop")


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
    target: Open | None
    graceful: bool = False


Open: TypeAlias = "tuple[type[CancelException], Open | None]"
"""A scope that has been entered: the cancel that leaves it, and the scope around it."""


def scope(
    cancel: type[CancelException], cleanup: type[Event]
) -> Callable[[Callable[[L], None]], Callable[[L], None]]:
    """Make a method of the loop a scope: `cancel` leaves it, `cleanup` is emitted when it is left.

    Source: the post's `_CbCtxInner`, without the names made up at run time, and with Before*
    emitted inside, so that a cancel raised there is caught and cleaned up too. A decorator: to
    enter and leave a context manager takes twice as long, in every batch.
    """

    def decorate(method: Callable[[L], None]) -> Callable[[L], None]:
        @wraps(method)
        def scoped(loop: L) -> None:
            entered = loop._innermost = cancel, loop._innermost
            try:
                method(loop)
            except BaseException as exc:
                if not leave(loop, entered, cleanup, exc):
                    raise
            else:
                if loop._requests or cleanup not in loop._unheard:
                    leave(loop, entered, cleanup, None)
                else:
                    loop._innermost = entered[1]

        return scoped

    return decorate


@contextmanager
def scope_within(loop: Loop, cancel: type[CancelException], cleanup: type[Event]) -> Iterator[None]:
    """The same for a part of a callback, as a context manager."""
    entered = loop._innermost = cancel, loop._innermost
    try:
        yield
    except BaseException as exc:
        if not leave(loop, entered, cleanup, exc):
            raise
    else:
        leave(loop, entered, cleanup, None)


def leave(loop: Loop, entered: Open, cleanup: type[Event], exc: BaseException | None) -> bool:
    """Emit Cleanup*, whatever ended the scope.

    Returns:
        Whether the scope was completed, or `exc` the cancel that names it.

    Raises:
        BaseException: what is to be raised instead of `exc`.
    """
    cancel, outer = entered
    end_around = loop._end
    error = None if exc is None else _unless_stray(exc, entered)
    loop._end = _end(error)
    loop.going_on = error is None or isinstance(error, cancel)
    loop.ending = bool(loop._requests) and _ends_gracefully(loop, entered)
    signal = loop.signals[cleanup]
    if signal.receivers:
        before, loop._cleaning = loop._cleaning, True
        try:
            signal.send(cleanup.of(loop, loop._end), _async_wrapper=loop._async_wrapper)
        except BaseException as late:
            late = _unless_stray(late, entered)
            error = late if error is None else _first(error, late)
            if not isinstance(error, cancel):
                loop._end = _end(error)
        finally:
            loop._cleaning = before
    loop._innermost = outer
    if outer is not None:  # how the outermost has ended, the result tells
        loop._end = end_around
    try:
        if error is None or isinstance(error, cancel):
            if loop.ending:
                loop._honour_requests(gracefully=True)
            return True
        if error is exc:
            return False  # goes on as it came, traceback and all
        raise error
    finally:
        del error  # no circle of the error, its traceback and this frame: it holds the batch


def _ends_gracefully(loop: Loop, entered: Open) -> bool:
    """Whether a graceful stop is due when this scope has been left: between two batches."""
    cancel, outer = entered
    between = cancel in (CancelBatchException, CancelEpochException)
    due = loop.going_on and between
    return due and any(_leaves(request, outer) for request in tuple(loop._requests))


def _leaves(request: Request, scope: Open | None) -> bool:
    """Whether a graceful request is for this scope, or for one around it."""
    found = innermost(scope, lambda cancel: isinstance(request.error, cancel))
    meant = request.target is None or request.target is found  # not merely equal to it
    return request.graceful and found is not None and meant


def innermost(scope: Open | None, catches: Callable[[type[CancelException]], bool]) -> Open | None:
    """The first scope, from this one outwards, whose cancel is one of those asked for."""
    while scope is not None and not catches(scope[0]):
        scope = scope[1]
    return scope


def _unless_stray(exc: BaseException, entered: Open) -> BaseException:
    """A cancel that no open scope will catch is a mistake of whoever raised it."""
    if not isinstance(exc, CancelException) or isinstance(exc, InterruptedFit):
        return exc
    if innermost(entered, lambda cancel: isinstance(exc, cancel)) is not None:
        return exc
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


COMPLETED = ScopeEnd("completed")


def _end(exc: BaseException | None) -> ScopeEnd:
    if exc is None:
        return COMPLETED
    if isinstance(exc, CancelException):
        return ScopeEnd("cancelled", exc.who, exc.reason)
    return ScopeEnd("failed", who_raised(exc), f"{type(exc).__name__}: {exc}")

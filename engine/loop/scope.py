"""A scope of the loop: once it has been entered, its Cleanup* event is emitted exactly once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TypeVar

from ...events import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CleanupEpoch,
    Event,
    ScopeEnd,
)
from ...events.errors import most_severe, text_of, who_raised
from .requests import InterruptedFit, OpenScope, scope_for
from .state import COMPLETED, LoopState

L = TypeVar("L", bound=LoopState)


def scope(
    cancel: type[CancelException], cleanup: type[Event]
) -> Callable[[Callable[[L], None]], Callable[[L], None]]:
    """Make a method of the loop a scope: `cancel` leaves it, `cleanup` is emitted when it is left.

    A decorator, because entering and leaving a context manager takes twice as long, per batch.

    Source: the post's `_CbCtxInner`, without names generated at run time, and with Before* emitted
    inside the scope, so that a cancel raised there is caught and cleaned up too.
    """

    def decorate(method: Callable[[L], None]) -> Callable[[L], None]:
        @wraps(method)
        def scoped(loop: L) -> None:
            entered = loop.innermost_scope = cancel, loop.innermost_scope
            try:
                method(loop)
            except BaseException as exc:
                if not _leave(loop, entered, cleanup, exc):
                    raise
            else:
                if loop.pending_requests or cleanup not in loop.without_receivers:
                    _leave(loop, entered, cleanup, None)
                else:
                    loop.innermost_scope = entered[1]

        return scoped

    return decorate


@contextmanager
def scope_within(
    loop: LoopState, cancel: type[CancelException], cleanup: type[Event]
) -> Iterator[None]:
    """The same as a context manager, for the scopes that a callback opens."""
    entered = loop.innermost_scope = cancel, loop.innermost_scope
    try:
        yield
    except BaseException as exc:
        if not _leave(loop, entered, cleanup, exc):
            raise
    else:
        _leave(loop, entered, cleanup, None)


def _leave(
    loop: LoopState, entered: OpenScope, cleanup: type[Event], exc: BaseException | None
) -> bool:
    """Emit Cleanup*, however the scope ended.

    Returns:
        Whether the scope was completed, or left by its own cancel.

    Raises:
        BaseException: the error to raise instead of `exc`.
    """
    cancel, outer = entered
    outer_end = loop.scope_end
    error = None if exc is None else _refuse_stray_cancel(exc, entered)
    loop.scope_end = _end_of(error)
    loop.outer_continues = error is None or isinstance(error, cancel)
    if error is not None and cleanup is CleanupEpoch and not loop.in_extra_validation:
        loop.record_cut_epoch(loop.scope_end.status)
    loop.graceful_stop_due = bool(loop.pending_requests) and _is_between_batches(loop, entered)
    signal = loop.signals[cleanup]
    if signal.receivers:
        before, loop.cleaning_up = loop.cleaning_up, True
        try:
            signal.send(cleanup.of(loop, loop.scope_end), _async_wrapper=loop.async_wrapper)
        except BaseException as late:
            late = _refuse_stray_cancel(late, entered)
            error = late if error is None else _outcome(error, late)
            if not isinstance(error, cancel):
                loop.scope_end = _end_of(error)
        finally:
            loop.cleaning_up = before
    loop.innermost_scope = outer
    if outer is not None:  # the result of the fit needs how the outermost scope ended
        loop.scope_end = outer_end
    try:
        if error is None or isinstance(error, cancel):
            # Here, not at the next event: before it, the loader would be asked for a batch.
            if outer is not None and loop.pending_requests and not loop.cleaning_up:
                loop.pending_requests.raise_due(outer, between_batches=loop.graceful_stop_due)
            return True
        if error is exc:
            return False  # the caller re-raises it, with its traceback
        raise error
    finally:
        del error  # a reference cycle with the traceback and this frame would keep the batch


def _is_between_batches(loop: LoopState, entered: OpenScope) -> bool:
    """Whether a graceful stop takes effect once this scope has been left."""
    cancel, outer = entered
    at_boundary = cancel in (CancelBatchException, CancelEpochException)
    if loop.in_extra_validation or not (loop.outer_continues and at_boundary):
        return False
    return loop.pending_requests.graceful_for(outer)


def _refuse_stray_cancel(exc: BaseException, entered: OpenScope) -> BaseException:
    """Return `exc`, or, for a cancel that no open scope catches, the error to raise instead."""
    if not isinstance(exc, CancelException) or isinstance(exc, InterruptedFit):
        return exc
    if scope_for(type(exc), entered) is not None:
        return exc
    error = RuntimeError(
        f"{exc.who or 'something'} raised {type(exc).__name__} where no scope of its kind"
        " is open, so there is nothing for it to cancel"
    )
    error.__cause__ = exc
    return error


def _outcome(exc: BaseException, late: BaseException) -> BaseException:
    """Choose what to raise, the error that ended a scope or one of its cleanup; note the other.

    The error that ended the scope takes precedence, unless it is only a cancel.
    """
    first = most_severe([exc, late])
    other = late if first is exc else exc
    if not isinstance(other, CancelException):
        first.add_note(f"then, in cleanup: {text_of(other)}")
    return first


def _end_of(exc: BaseException | None) -> ScopeEnd:
    if exc is None:
        return COMPLETED
    if isinstance(exc, CancelException):
        return ScopeEnd("cancelled", exc.who, exc.reason)
    return ScopeEnd("failed", who_raised(exc), f"{type(exc).__name__}: {text_of(exc, str)}")

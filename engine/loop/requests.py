"""How `stop`, the host and observers reach the running loop: requests, raised at its next event.

Any thread, task or signal handler may add a `Request`. The training thread checks the requests
when it emits an event, and raises those that are due; a graceful one is due only between two
batches. Adding one does not need a lock, because appending to a deque is atomic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from ...events import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
)

CANCELS: dict[str, type[CancelException]] = {
    "fit": CancelFitException,
    "epoch": CancelEpochException,
    "batch": CancelBatchException,
}
"""The cancel for each scope that can be passed to `stop`."""

OpenScope: TypeAlias = "tuple[type[CancelException], OpenScope | None]"
"""A scope that has been entered: the cancel that leaves it, and the scope around it."""


class InterruptedFit(CancelException):
    """The host cancelled the task that awaits the fit. No scope catches it, so it ends the fit."""

    width = 5

    def __init__(self) -> None:
        super().__init__("the task that awaits the fit was cancelled")
        self.who = "host"


class Request(NamedTuple):
    """An exception that `stop`, the host or an observer wants the training thread to raise.

    Attributes:
        error: the exception to raise.
        target: the scope that a cancel is to end; None if no scope of its kind was open.
        graceful: whether to raise it only between two batches.
    """

    error: BaseException
    target: OpenScope | None
    graceful: bool = False


class Requests(deque[Request]):
    """The requests that have not taken effect yet, in the order of their arrival."""

    __slots__ = ()

    def raise_due(self, innermost: OpenScope | None, between_batches: bool = False) -> None:
        """Raise the first request that is due, and drop those whose scope has ended by itself.

        Args:
            innermost: the innermost open scope.
            between_batches: whether graceful requests are due as well.
        """
        for request in tuple(self):
            error, target, graceful = request
            if isinstance(error, InterruptedFit):
                raise InterruptedFit  # stays requested until the fit has ended
            if isinstance(error, CancelException):
                scope = scope_for(type(error), innermost)
                if target is not None and target is not scope:
                    self.remove(request)
                    continue  # its target has ended by itself
                if scope is None:
                    continue  # between two batches or epochs: it waits for the next one
            if graceful and not between_batches:
                continue
            self.remove(request)
            raise error

    def graceful_for(self, scope: OpenScope | None) -> bool:
        """Whether there is a graceful request for this scope or one around it."""
        for request in tuple(self):
            found = scope_for(type(request.error), scope)
            meant = request.target is None or request.target is found  # identity, not equality
            if request.graceful and found is not None and meant:
                return True
        return False


def scope_for(cancel: type[BaseException], innermost: OpenScope | None) -> OpenScope | None:
    """The innermost open scope that catches `cancel`, None if there is none."""
    return find_scope(innermost, lambda own: issubclass(cancel, own))


def find_scope(
    scope: OpenScope | None, accepts: Callable[[type[CancelException]], bool]
) -> OpenScope | None:
    """The first scope, from this one outwards, whose cancel is accepted."""
    while scope is not None and not accepts(scope[0]):
        scope = scope[1]
    return scope

"""Who performs an action: its receivers in order, each around the next, and the learner's method.

A receiver that calls `event.proceed()` wraps: the next one performs the action inside it, and last
the learner's own method. The first receiver that does not call it takes the action over.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise, takewhile
from types import CodeType
from typing import Any, TypeVar

from ...events import ActionEvent, Subscription
from ...events.subscription import name_of
from .state import LoopState

F = TypeVar("F", bound=Callable[..., Any])


def replaceable(method: F) -> F:
    """Mark a method that performs an action: a callback may take the action over from it.

    Taking an action over from an unmarked method, such as that of a user's learner, is an error at
    `fit`, unless the callback has the action in `takes_over`.

    Args:
        method: `predict`, `get_loss`, `backward`, `step` or `zero_grad` of a learner class.

    Example:
        >>> from eventrain.engine import TrainLearner, replaceable
        >>> class HalfLoss(TrainLearner):
        ...     @replaceable
        ...     def get_loss(self):
        ...         self.loss = self.loss_func(self.preds, self.batch[1]) / 2
    """
    method.is_replaceable = True  # type: ignore[attr-defined]
    return method


def may_replace(method: Callable[..., Any] | None) -> bool:
    """Whether a callback may take the action of a learner's method over; None for no method."""
    return method is None or getattr(method, "is_replaceable", False)


def performers(loop: LoopState, action: type[ActionEvent]) -> tuple[Subscription, ...]:
    """The open receivers of an action, in order."""
    return tuple(s for s in loop.signals[action].ordered if s.matches(loop) and not s.closed)


def chain(
    found: tuple[Subscription, ...],
) -> tuple[tuple[Subscription, ...], tuple[Subscription, ...]]:
    """Split the receivers of an action into those that are called and those that are passed over.

    Called are those that wrap and, last, the first that takes the action over.
    """
    n_wrapping = len(tuple(takewhile(wraps, found)))
    return found[: n_wrapping + 1], found[n_wrapping + 1 :]


def check_performers(loop: LoopState, actions: Iterable[type[ActionEvent]]) -> None:
    """Raise unless it is clear who performs each action, and nothing is bypassed unnoticed.

    Raises:
        ValueError: two receivers of the same order would take an action over; or one would take it
            over from a receiver that wraps it, or from a method of the user's learner.
        TypeError: neither a receiver nor the learner would perform it.
    """
    for action in actions:
        called, passed_over = chain(performers(loop, action))
        for one, other in pairwise((*called, *passed_over[:1])):
            if _tied(one, other):
                raise ValueError(
                    f"{one.name} and {other.name} both perform {action.__name__} at order"
                    f" {one.key[0]:g}: remove one of them, or give one a lower order"
                )
        method = getattr(loop, action.hook, None)
        if not called or wraps(called[-1]):
            if method is None:
                raise nobody_performs(loop, action)
            continue
        first = called[-1]
        for other in filter(wraps, passed_over):
            raise ValueError(
                f"{first.name} (order {first.key[0]:g}) would take {action.__name__} over from"
                f" {other.name} (order {other.key[0]:g}), which wraps it: call event.proceed() in"
                f" {first.name}, or give its callback an order above {other.key[0]:g}"
            )
        if method is None or may_replace(method):
            continue
        if action not in getattr(_owner(first), "takes_over", ()):
            raise ValueError(
                f"{first.name} would take {action.__name__} over from {name_of(method)}, which"
                " would never be called: call event.proceed() in it to have that called, or, to"
                " replace it, make it a method of a Callback with"
                f" takes_over = ({action.__name__},)"
            )


def wraps(subscription: Subscription) -> bool:
    """Whether the code of a receiver uses `event.proceed`, in itself or in a function inside it."""
    receiver: Any = subscription.receiver
    while isinstance(receiver, partial):
        receiver = receiver.func
    if not hasattr(receiver, "__code__") and not hasattr(receiver, "__func__"):
        receiver = type(receiver).__call__
    code = getattr(inspect.unwrap(receiver), "__code__", None)
    return code is not None and _names_proceed(code)


def _names_proceed(code: CodeType) -> bool:
    if "proceed" in code.co_names:
        loads = pairwise(dis.get_instructions(code))
        if any(name.argval == "proceed" and owner.argval != "self" for owner, name in loads):
            return True
    nested = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return any(_names_proceed(inner) for inner in nested)


def _owner(subscription: Subscription) -> object:
    return getattr(subscription.receiver, "__self__", subscription)


def nobody_performs(loop: LoopState, action: type[ActionEvent]) -> TypeError:
    """The error for an action that nobody performs."""
    return TypeError(
        f"nobody performs {action.__name__}: give {type(loop).__qualname__} a method"
        f" {action.hook}(), or use TrainLearner, or add TrainCB() to the callbacks"
    )


def _tied(a: Subscription, b: Subscription) -> bool:
    """Whether only the time of connection decides: no order, no `run_after` or `run_before`."""
    if a.key[0] != b.key[0] or _owner(a) is _owner(b):
        return False
    # A callback that `run_after` delayed has the key of the one it follows, plus a counter.
    return a.key[1] != b.key[1] or a.order == b.order

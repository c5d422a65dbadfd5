"""Who performs an action: the first receiver in order, or else the learner's own method."""

from __future__ import annotations

from collections.abc import Iterable

from ...events import ActionEvent, Subscription
from .state import LoopState


def performers(loop: LoopState, action: type[ActionEvent]) -> list[Subscription]:
    """The receivers that could perform an action; the first one does."""
    return [s for s in loop.signals[action].ordered if s.matches(loop) and not s.closed]


def check_performers(loop: LoopState, actions: Iterable[type[ActionEvent]]) -> None:
    """Raise unless exactly one receiver, or the learner itself, performs each action.

    Raises:
        ValueError: two receivers of the same order would perform an action.
        TypeError: neither a receiver nor the learner would perform it.
    """
    for action in actions:
        found = performers(loop, action)
        if len(found) > 1 and _tied(*found[:2]):
            raise ValueError(
                f"{found[0].name} and {found[1].name} both perform {action.__name__} at order"
                f" {found[0].key[0]:g}: remove one of them, or give one a lower order"
            )
        if not found and not hasattr(loop, action.hook):
            raise nobody_performs(loop, action)


def nobody_performs(loop: LoopState, action: type[ActionEvent]) -> TypeError:
    """The error for an action that nobody performs."""
    return TypeError(
        f"nobody performs {action.__name__}: give {type(loop).__qualname__} a method"
        f" {action.hook}(), or use TrainLearner, or add TrainCB() to the callbacks"
    )


def _tied(a: Subscription, b: Subscription) -> bool:
    """Whether only the time of connection decides: no order, no `run_after` or `run_before`."""
    if a.key[0] != b.key[0]:
        return False
    # A callback that `run_after` delayed has the key of the one it follows, plus a counter.
    return a.key[1] != b.key[1] or a.order == b.order

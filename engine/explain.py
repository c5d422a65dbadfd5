"""What will run, in which order, and who performs what: readable before it runs."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..events import (
    ActionEvent,
    AfterBackward,
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    AfterPredict,
    AfterStep,
    Backward,
    BatchEvent,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    EpochEvent,
    Event,
    FitEvent,
    GetLoss,
    Predict,
    Step,
    StepEvent,
    Subscription,
    ZeroGrad,
)
from ..events.bus import name_of
from ..events.types import HOOKS

if TYPE_CHECKING:
    from .listened import Listened


def performers(learner: Listened, action: type[ActionEvent]) -> list[Subscription]:
    """The receivers that could perform an action, the one that does first."""
    return [s for s in learner.bus.signal(action).ordered if s.serves(learner) and not s.closed]


def check_performers(learner: Listened, actions: Iterable[type[ActionEvent]]) -> None:
    """Raise unless exactly one receiver, or the learner itself, performs each action.

    Raises:
        ValueError: two receivers of the same order would perform it.
        TypeError: nobody would.
    """
    for action in actions:
        found = performers(learner, action)
        if len(found) > 1 and _by_chance(*found[:2]):
            raise ValueError(
                f"{found[0].name} and {found[1].name} both perform {action.__name__} at order"
                f" {found[0].key[0]:g}: remove one of them, or give one a lower order"
            )
        if not found and not hasattr(learner, action.hook):
            raise nobody_performs(learner, action)


def nobody_performs(learner: Listened, action: type[ActionEvent]) -> TypeError:
    """The error to raise then."""
    return TypeError(
        f"nobody performs {action.__name__}: give {type(learner).__qualname__} a method"
        f" {action.hook}(), or use TrainLearner, or add TrainCB() to the callbacks"
    )


def _by_chance(a: Subscription, b: Subscription) -> bool:
    """Whether only the time of connection decides: no order, no `run_after` or `run_before`."""
    if a.key[0] != b.key[0]:
        return False
    # Who had to wait has the key of whom it waited for, and a running number behind it.
    return a.key[1] != b.key[1] or a.order == b.order


def explain(learner: Listened) -> str:
    """The receivers of every event, in the order in which events happen and receivers run."""
    custom = [event_type for event_type in HOOKS.values() if event_type not in (*_LOOP, *_BASES)]
    lines = []
    for event_type in (*_LOOP, *custom):
        if issubclass(event_type, ActionEvent):
            lines += _action_lines(learner, event_type)
        else:
            lines += _event_lines(learner, event_type)
    for stream in learner.streams:
        types = ", ".join(event_type.__name__ for event_type in stream.event_types)
        lines.append(f"{stream.name}, beside the training: {types}")
    return "\n".join(lines)


_LOOP: tuple[type[Event], ...] = (
    BeforeFit,
    BeforeEpoch,
    BeforeBatch,
    Predict,
    AfterPredict,
    GetLoss,
    AfterLoss,
    Backward,
    AfterBackward,
    BeforeStep,
    Step,
    ZeroGrad,
    AfterStep,
    CleanupStep,
    AfterBatch,
    CleanupBatch,
    AfterEpoch,
    CleanupEpoch,
    AfterFit,
    CleanupFit,
)
_BASES = (Event, FitEvent, EpochEvent, BatchEvent, StepEvent, ActionEvent)


def _event_lines(learner: Listened, event_type: type[Event]) -> list[str]:
    inline = [
        subscription
        for subscription in learner.bus.signal(event_type).ordered
        if subscription.serves(learner) and subscription.order > -math.inf
    ]
    return [event_type.__name__] * bool(inline) + [f"  {s.key[0]:>6g}  {s.name}" for s in inline]


def _action_lines(learner: Listened, action: type[ActionEvent]) -> list[str]:
    names = [f"{s.name} (order {s.key[0]:g})" for s in performers(learner, action)]
    if hasattr(learner, action.hook):
        names.append(name_of(getattr(learner, action.hook)))
    if not names:
        return [f"{action.__name__}: nobody"]
    passed_over = f", instead of {', '.join(names[1:])}" if names[1:] else ""
    return [f"{action.__name__}: performed by {names[0]}{passed_over}"]

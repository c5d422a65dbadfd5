"""A printable list of the receivers of every event, and of the performer of each action."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from ...events import (
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
    ZeroGrad,
)
from ...events.base import HOOKS
from ...events.subscription import name_of
from ..loop.actions import chain, performers, wraps
from ..loop.state import LoopState
from .streams import EventStream


def explain(loop: LoopState, streams: Sequence[EventStream[Any]]) -> str:
    """The receivers of every event, in the order in which events happen and receivers run."""
    built_in = (*_LOOP, *_BASES)
    custom = [cls for classes in HOOKS.values() for cls in classes if cls not in built_in]
    lines = []
    for event_type in (*_LOOP, *custom):
        if issubclass(event_type, ActionEvent):
            lines += _action_lines(loop, event_type)
        else:
            lines += _event_lines(loop, event_type)
    for stream in streams:
        types = ", ".join(event_type.__name__ for event_type in stream.event_types)
        lines.append(f"{stream.name}, on the event loop: {types}")
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


def _event_lines(loop: LoopState, event_type: type[Event]) -> list[str]:
    inline = [
        subscription
        for subscription in loop.signals[event_type].ordered
        if subscription.matches(loop) and subscription.order > -math.inf
    ]
    return [event_type.__name__] * bool(inline) + [f"  {s.key[0]:>6g}  {s.name}" for s in inline]


def _action_lines(loop: LoopState, action: type[ActionEvent]) -> list[str]:
    called, passed_over = chain(performers(loop, action))
    inside, outside = (
        [f"{s.name} (order {s.key[0]:g})" for s in part] for part in (called, passed_over)
    )
    if hasattr(loop, action.hook):
        taken_over = called and not wraps(called[-1])
        (outside if taken_over else inside).append(name_of(getattr(loop, action.hook)))
    if not inside:
        return [f"{action.__name__}: nobody"]
    instead = f", instead of {', '.join(outside)}" if outside else ""
    return [f"{action.__name__}: performed by {', around '.join(inside)}{instead}"]

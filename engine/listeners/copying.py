"""A deep copy of a learner: with its own bus, and its callbacks and receivers connected to that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

from torch import nn

from ...events import Bus, Subscription
from ..loop.state import LoopState
from .attachments import Attachments
from .observers import CallbackObserver, Observer
from .streams import EventStream

_NEW = {
    "_attachments",
    "async_wrapper",
    "batch",
    "batch_reader",
    "bus",
    "fit_streams",
    "history",
    "innermost_scope",
    "loss",
    "pending_requests",
    "preds",
    "record",
    "signals",
    "streams",
    "training_thread",
    "without_receivers",
}
"""Attributes that the copy gets anew; those of a batch may belong to a graph."""


def deep_copy(learner: Any, memo: dict[int, Any]) -> Any:
    """A copy of an idle learner, for its `__deepcopy__`."""
    if learner.fitting:
        raise RuntimeError(
            f"this learner is fitting (run {learner.run_id}): copy it before its fit or after it"
        )
    copy = memo[id(learner)] = type(learner).__new__(type(learner))
    # Learners that are copied together share a bus as before.
    bus = memo[id(learner.bus)] = memo.get(id(learner.bus)) or Bus()
    LoopState.__init__(copy, bus, learner.batch_reader)  # another reader with the next fit
    copy.streams, copy.fit_streams = [], []
    copy.history = [dict(row) for row in learner.history]
    memo[id(learner.result)] = learner.result  # cannot be changed
    for name in _attributes(learner):
        with _named(
            f"raised while learner.{name} was copied: to share it with the copy, put it into the"
            f" memo: copy.deepcopy(learner, {{id(learner.{name}): learner.{name}}})"
        ):
            setattr(copy, name, deepcopy(getattr(learner, name), memo))
    copy._attachments = Attachments(copy, copy.bus, copy._observe_for)
    _connect(learner, copy, memo)
    _copy_gradients(memo)
    return copy


def _attributes(learner: Any) -> Iterator[str]:
    """The names of the attributes to copy."""
    slots = [name for cls in type(learner).__mro__ for name in getattr(cls, "__slots__", ())]
    for name in dict.fromkeys([*slots, *vars(learner)]):
        if name not in _NEW and hasattr(learner, name):
            yield name


def _connect(learner: Any, copy: Any, memo: dict[int, Any]) -> None:
    """Attach copies of the callbacks, and the receivers in between, in the order of connection."""
    attached = learner._attachments.attached
    of_callbacks = {id(s) for attachment in attached for s in attachment.subscriptions}
    receivers = [
        subscription
        for subscription in learner.bus.subscriptions()
        if subscription.learner is learner and id(subscription) not in of_callbacks
        if not _is_of_stream(subscription)
    ]
    for attachment in attached:
        if attachment.subscriptions:
            while receivers and receivers[0].time < attachment.subscriptions[0].time:
                _subscribe(copy, receivers.pop(0), memo)
        with _named(
            f"raised while {attachment.name} was copied with its learner: give it a __deepcopy__,"
            " which shares or makes anew what cannot be copied"
        ):
            copy.add_cbs(deepcopy(attachment.callback, memo))
    for subscription in receivers:
        _subscribe(copy, subscription, memo)
    for observer in learner.streams:
        if isinstance(observer, Observer) and not isinstance(observer, CallbackObserver):
            observer.copy_to(copy, memo)


@contextmanager
def _named(note: str) -> Iterator[None]:
    try:
        yield
    except Exception as exc:
        exc.add_note(note)
        raise


def _is_of_stream(subscription: Subscription) -> bool:
    return isinstance(getattr(subscription.receiver, "__self__", None), Observer | EventStream)


def _subscribe(copy: Any, subscription: Subscription, memo: dict[int, Any]) -> None:
    copy.subscribe(
        subscription.event_type,
        deepcopy(subscription.receiver, memo),
        order=subscription.order,
        **subscription.filters,
    )


def _copy_gradients(memo: dict[int, Any]) -> None:
    """Copy the gradients that are kept from batch to batch, which torch leaves out."""
    for original in memo.get(id(memo), ()):
        if isinstance(original, nn.Parameter) and original.grad is not None:
            memo[id(original)].grad = original.grad.detach().clone()

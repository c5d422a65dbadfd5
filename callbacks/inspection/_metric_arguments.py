"""What a metric is updated with: predictions and targets, or what a function returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...engine.data.inputs import targets_in
from ...engine.data.outputs import described
from ...events.learner import LearnerLike

Arguments = Callable[[Any], tuple[Any, ...]]
"""A function of the learner that returns the arguments of a metric's `update`."""


def metric_and_arguments(entry: Any) -> tuple[Any, Arguments | None]:
    """A metric, and the function that it is paired with, if it is."""
    if isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1]):
        return entry
    return entry, None


def update(
    name: str, metric: Any, arguments_of: Arguments | None, learner: LearnerLike, place: bool
) -> None:
    """Update a metric with the current batch.

    Args:
        name: the name of the metric, for errors.
        metric: the metric.
        arguments_of: the function that it is paired with.
        learner: the learner.
        place: whether to move it to the device of what it is updated with before.

    Raises:
        TypeError: there is not one tensor of predictions and one target, or the function does not
            return a tuple.
        Exception: an error of the metric, with a note of what it was updated with.
    """
    if arguments_of is None:
        arguments = _preds_and_target(learner, name)
    else:
        arguments = arguments_of(learner)
        if not isinstance(arguments, tuple):
            raise TypeError(
                f"the function of the metric {name!r} returned {described(arguments)}: return the"
                " arguments of its update() in a tuple, such as (learner.preds[0],"
                " learner.batch[1])"
            )
    tensors = [x.detach() if isinstance(x, torch.Tensor) else x for x in arguments]
    try:
        if place and tensors and isinstance(tensors[0], torch.Tensor):
            metric.to(tensors[0].device)
        metric.update(*tensors)
    except Exception as exc:
        given = ", ".join(map(described, tensors))
        exc.add_note(f"raised by the metric {name!r}, updated with {given}; {_say_which(name)}")
        raise


def _preds_and_target(learner: LearnerLike, name: str) -> tuple[Any, ...]:
    preds, targets = learner.preds, targets_in(learner)
    if isinstance(preds, torch.Tensor) and len(targets) == 1:
        return (preds, *targets)
    what = f"the batch has {len(targets)} targets"
    if not isinstance(preds, torch.Tensor):
        what = f"learner.preds is {described(preds)}"
    raise TypeError(
        f"the metric {name!r} is updated with a tensor of predictions and one target, but {what}:"
        f" {_say_which(name)}"
    )


def _say_which(name: str) -> str:
    return (
        f"say what it is to be updated with: MetricsCB({name}=(metric, lambda learner:"
        " (learner.preds[0], learner.batch[1])))"
    )

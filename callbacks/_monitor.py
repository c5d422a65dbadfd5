"""The number that a callback monitors."""

from __future__ import annotations

from typing import Any

from ..events import CleanupEpoch
from ._checks import is_number
from ._purpose import is_training
from .inspection.validate import ValidateCB


def check_monitor(monitor: str) -> str:
    """Return `monitor` if it may be the name of a number, else raise ValueError."""
    if not isinstance(monitor, str) or not monitor:
        raise ValueError(f"monitor={monitor!r}: give the name of a number, such as 'loss'")
    return monitor


def number_of(value: Any) -> float | None:
    """The number that a recorded value is; None if it is not one.

    Numbers are those of Python and numpy, and tensors and arrays with one element.
    """
    shape = value.shape if hasattr(type(value), "shape") else None
    if isinstance(shape, tuple) and all(n == 1 for n in shape):
        value = value.item()  # the host waits for the device here
    return float(value) if is_number(value) else None


def monitored(event: CleanupEpoch, name: str) -> float | None:
    """The number of that name in an epoch that counts; None in any other epoch.

    Completed validating epochs count or, if the fit does not validate, completed training epochs.

    Raises:
        ValueError: there is no such number.
        TypeError: it is not a number.
    """
    learner = event.learner
    if not is_training(learner) or event.training == learner.validates:
        return None
    if event.end.status != "completed":
        return None
    if name not in event.metrics:
        extra = [cb.name for cb in learner.cbs if isinstance(cb, ValidateCB)]
        if name.partition(".")[0] in extra:
            return None  # no such validation was due in this epoch
        raise ValueError(
            f"monitor={name!r}: this epoch has no such number, but"
            f" {', '.join(event.metrics) or 'none'}. Callbacks such as MetricsCB put numbers into"
            " learner.record"
        )
    number = number_of(event.metrics[name])
    if number is None:
        raise TypeError(f"monitor={name!r}: {event.metrics[name]!r} is not a number")
    return number

"""Checks of arguments and of optional dependencies. Their errors say what to do instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from ..events.checks import is_int


def is_number(value: Any) -> bool:
    """Whether it is a real number of Python or numpy; bools and tensors are not."""
    # Only the last is needed, but the first two are quicker to check.
    return isinstance(value, int | float | Real) and not isinstance(value, bool)


def check_int(name: str, value: Any, hint: str, least: int = 1) -> int:
    """Return an int of at least `least`; for anything else raise a ValueError with the hint."""
    if not is_int(value, least):
        raise ValueError(f"{name}={value!r}: give {hint}")
    return value  # type: ignore[no-any-return]


def check_float(name: str, value: Any, hint: str, positive: bool = False) -> float:
    """Return a finite number, 0 or more; for anything else raise a ValueError with the hint."""
    if not is_number(value) or not 0 <= value < math.inf or (positive and value == 0):
        raise ValueError(f"{name}={value!r}: give {hint}")
    return value  # type: ignore[no-any-return]


@contextmanager
def optional_import(user: str, package: str, extra: str) -> Iterator[None]:
    """Turn an ImportError into one that says how to install what `user` needs."""
    try:
        yield
    except ImportError as exc:
        raise ImportError(f"{user} needs {package}: pip install 'eventrain[{extra}]'") from exc

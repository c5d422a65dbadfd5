"""Checks of arguments."""

from __future__ import annotations


def is_int(value: object, least: int) -> bool:
    """Whether a value is an integer of `least` or more. A bool is not, although Python says so.

    Example:
        >>> is_int(1, 1), is_int(0, 1), is_int(1.0, 1), is_int(True, 1)
        (True, False, False, False)
    """
    return isinstance(value, int) and not isinstance(value, bool) and value >= least

"""Checks of arguments and of optional dependencies. Their errors say what to do instead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
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


def check_installed(user: str, package: str, extra: str, module: str = "") -> None:
    """Raise an ImportError that says how to install what `user` needs.

    Its module, which by default has the package's name, is found, but not imported: this may be
    called on the host's event loop, which a first import of some packages would hold up for half a
    second.
    """
    with optional_import(user, package, extra):  # if a package around the module is missing
        if find_spec(module or package) is None:
            raise ImportError(_how_to_install(user, package, extra))


@contextmanager
def optional_import(user: str, package: str, extra: str) -> Iterator[None]:
    """Turn an ImportError into one that says how to install what `user` needs."""
    try:
        yield
    except ImportError as exc:
        raise ImportError(_how_to_install(user, package, extra)) from exc


def _how_to_install(user: str, package: str, extra: str) -> str:
    return f"{user} needs {package}: pip install 'eventrain[{extra}]'"

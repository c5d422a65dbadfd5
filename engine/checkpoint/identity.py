"""Which callback is which: their names in a checkpoint, and in the learner that resumes from it.

A callback is named after its class, and after its `state_key` if it has one. Several of one class
are told apart by what they were made with, whatever their order: the values of the arguments of
`__init__` that they keep as attributes of the same name, or with an underscore.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from itertools import islice
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType
from typing import Any

from .contents import cell_content

Settings = Mapping[str, str]
"""The settings of a callback, as text: {"monitor": "'loss'", "patience": "3"}."""


def callback_names(owners: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """The owners with their names: the class, "EarlyStoppingCB 2" for the second of one class.

    Raises:
        ValueError: two of one class have the same `state_key`.
    """
    seen: Counter[str] = Counter()
    for owner in owners:
        name, key = type(owner).__qualname__, getattr(owner, "state_key", None)
        if key is not None:
            name = f"{name}[{key!r}]"
            if seen[name]:
                raise ValueError(f"two callbacks are {name}: give each a state_key of its own")
        seen[name] += 1
        yield name if seen[name] == 1 else f"{name} {seen[name]}", owner


def settings_of_several(owners: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings of the owners that are not alone in their class, and have no `state_key`."""
    several = Counter(map(_class_of, owners))
    return {
        name: settings_of(owner) for name, owner in owners.items() if several[_class_of(name)] > 1
    }


def settings_of(cb: Any) -> Settings:
    """The arguments of `__init__` that are kept as attributes of the same name, as text."""
    arguments = list(inspect.signature(type(cb).__init__).parameters)[1:]
    settings = {}
    for argument in arguments:
        for name in (argument, f"_{argument}"):
            if hasattr(cb, name):
                settings[argument] = _text(getattr(cb, name))
                break
    return settings


def match_callbacks(
    here: Mapping[str, Settings], there: Mapping[str, Settings]
) -> tuple[dict[str, str], list[str]]:
    """Tell which callback of a checkpoint is which of the learner's.

    Args:
        here: the settings of the learner's callbacks, by name.
        there: those in the checkpoint.

    Returns:
        {name there: name here}, and why some cannot be told from one another.
    """
    matched: dict[str, str] = {}
    problems: list[str] = []
    for cls in dict.fromkeys(map(_class_of, here)):
        ours = {name: kept for name, kept in here.items() if _class_of(name) == cls}
        theirs = {name: kept for name, kept in there.items() if _class_of(name) == cls}
        if len(ours) != len(theirs):
            continue  # which is a difference of its own
        for name in list(ours):  # first those that are as they were; equal ones by their order
            if same := [other for other, kept in theirs.items() if kept == ours[name]]:
                matched[same[0]] = name
                del ours[name], theirs[same[0]]
        if _all_equal(ours) and _all_equal(theirs):
            matched |= zip(theirs, ours, strict=True)
            continue
        best = {_best(kept, theirs): name for name, kept in ours.items()}
        if None in best or len(best) < len(ours):
            problems.append(
                f"{_listed(ours)} cannot be told apart from {_listed(theirs)} in the checkpoint:"
                " make them with the arguments that they had (a state_key of its own tells a"
                " callback from others of its class, whatever its arguments)"
            )
        else:
            matched |= {other: name for other, name in best.items() if other is not None}
    return matched, problems


def _class_of(name: str) -> str:
    head, _, number = name.rpartition(" ")
    return head if head and number.isdecimal() else name


def _all_equal(callbacks: Mapping[str, Settings]) -> bool:
    return len({frozenset(kept.items()) for kept in callbacks.values()}) <= 1


def _best(kept: Settings, others: Mapping[str, Settings]) -> str | None:
    """The one that shares most settings with `kept`; None if it is not one alone."""
    shared = {name: len(kept.items() & other.items()) for name, other in others.items()}
    most = max(shared.values(), default=0)
    best = [name for name, n in shared.items() if n == most]
    return best[0] if len(best) == 1 else None


def _listed(callbacks: Mapping[str, Settings]) -> str:
    return " and ".join(
        f"{_class_of(name)}({', '.join(f'{key}={text}' for key, text in kept.items())})"
        for name, kept in callbacks.items()
    )


def _text(value: Any, depth: int = 0) -> str:
    """A text that is the same in every process, and differs where the setting does."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes | Enum):
        return repr(value)[:_LONGEST]
    if isinstance(value, type | BuiltinFunctionType):
        return value.__qualname__
    if depth > _DEEPEST:
        return type(value).__qualname__
    text = partial(_text, depth=depth + 1)
    if isinstance(value, FunctionType):
        return _function(value, text)
    if isinstance(value, MethodType):
        return f"{text(value.__self__)}.{value.__name__}"
    if isinstance(value, partial):
        return f"partial({text(value.func)}, {text(value.args)}, {text(value.keywords)})"
    if isinstance(value, dict):
        items = islice(value.items(), _LONGEST)
        return f"{{{', '.join(f'{text(key)}: {text(item)}' for key, item in items)}}}"[:_LONGEST]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(text, value[:_LONGEST]))}]"[:_LONGEST]
    return type(value).__qualname__


_DEEPEST, _LONGEST = 3, 500


def _function(function: FunctionType, text: Callable[[Any], str]) -> str:
    """Its name and what it uses, because all lambdas of a function have the same name."""
    constants = [c for c in function.__code__.co_consts if not isinstance(c, CodeType)]
    defaults = [function.__defaults__ or (), function.__kwdefaults__ or {}]
    held = [cell_content(cell) for cell in function.__closure__ or ()]
    uses = [*function.__code__.co_names, *map(text, [*constants, *defaults, *held])]
    return f"{function.__qualname__}({', '.join(uses)})"[:_LONGEST]

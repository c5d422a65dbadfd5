"""Functions for nested containers of tensors, such as batches."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def map_tensors(x: Any, fn: Callable[[Any], Any], leaf: Callable[[Any], bool] = _is_tensor) -> Any:
    """Apply `fn` to every tensor in nested mappings, sequences, namedtuples and dataclasses.

    Containers keep their type; other values are left as they are. `leaf` selects the values that
    `fn` is applied to; by default these are the tensors.

    Example:
        >>> map_tensors({"x": (torch.ones(2), "a")}, lambda t: t.sum().item())
        {'x': (2.0, 'a')}
    """
    if leaf(x):
        return fn(x)
    if isinstance(x, Mapping):
        return with_parts(x, {k: map_tensors(v, fn, leaf) for k, v in x.items()})
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(map_tensors(item, fn, leaf) for item in x))
    if isinstance(x, list | tuple):
        return type(x)(map_tensors(item, fn, leaf) for item in x)
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        names = [field.name for field in dataclasses.fields(x)]
        return with_parts(x, {name: map_tensors(getattr(x, name), fn, leaf) for name in names})
    return x


def with_parts(x: Any, parts: dict[Any, Any]) -> Any:
    """A container of the class of `x` with other parts: a list becomes a tuple.

    Args:
        x: a mapping, tuple, list, namedtuple or dataclass; it is not changed.
        parts: by key, index or name.
    """
    if isinstance(x, Mapping):
        if type(x) is dict or not isinstance(x, MutableMapping):
            return parts
        made = copy.copy(x)  # the constructor of a subclass may not accept the items alone
        for key, value in parts.items():  # not update(), which would add the counts of a Counter
            made[key] = value
        return made
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*parts.values())
    if isinstance(x, list | tuple):
        return tuple(parts.values())
    made = copy.copy(x)
    for name, value in parts.items():
        object.__setattr__(made, name, value)  # it may be frozen
    return made


def has_to(x: Any) -> bool:
    """Whether `x` can be moved to a device: a tensor, a packed sequence, a tokenizer's encoding."""
    return callable(getattr(x, "to", None))

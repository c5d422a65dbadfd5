"""Functions for nested containers of tensors, such as batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

import torch


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


def map_tensors(x: Any, fn: Callable[[Any], Any], leaf: Callable[[Any], bool] = _is_tensor) -> Any:
    """Apply `fn` to every tensor in nested mappings, tuples, lists and namedtuples.

    Containers keep their type; other values are left as they are. `leaf` selects the values that
    `fn` is applied to; by default these are the tensors.

    Example:
        >>> map_tensors({"x": (torch.ones(2), "a")}, lambda t: t.sum().item())
        {'x': (2.0, 'a')}
    """
    if leaf(x):
        return fn(x)
    if isinstance(x, Mapping):
        items = {k: map_tensors(v, fn, leaf) for k, v in x.items()}
        if type(x) is dict or not isinstance(x, MutableMapping):
            return items
        mapped = copy.copy(x)  # the constructor of a subclass may not accept the items alone
        for k, v in items.items():  # not update(), which would add the counts of a Counter
            mapped[k] = v
        return mapped
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*(map_tensors(item, fn, leaf) for item in x))
    if isinstance(x, list | tuple):
        return type(x)(map_tensors(item, fn, leaf) for item in x)
    return x


def has_to(x: Any) -> bool:
    """Whether `x` can be moved to a device: a tensor, a packed sequence, a tokenizer's encoding."""
    return callable(getattr(x, "to", None))

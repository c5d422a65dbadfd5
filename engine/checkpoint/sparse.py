"""Sparse tensors in a state: as dense ones, because `torch.load` does not check them first."""

from __future__ import annotations

from typing import Any

import torch

_KEY = "sparse_coo_tensor"


def encode_sparse(indices: Any, values: Any, tensor: torch.Tensor) -> dict[str, Any]:
    """What a state holds of a sparse tensor whose indices and values were copied."""
    return {_KEY: [indices, values, list(tensor.shape), tensor.is_coalesced()]}


def decode_sparse(state: Any) -> Any:
    """The state, with the sparse tensors that it holds. Nested dicts and lists are changed.

    Raises:
        ValueError: what is said of a sparse tensor is not true.
    """
    return _decode(state, {})


def _decode(value: Any, seen: dict[int, Any]) -> Any:
    if not isinstance(value, dict | list | tuple):
        return value
    if id(value) in seen:  # nested lists that share items would take exponential time
        return seen[id(value)]
    seen[id(value)] = value
    if isinstance(value, dict) and value.keys() == {_KEY}:
        seen[id(value)] = decoded = _sparse(*value[_KEY])
        return decoded
    if isinstance(value, tuple):
        items = tuple(_decode(item, seen) for item in value)
        same = all(a is b for a, b in zip(value, items, strict=True))
        return value if same else items
    for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
        decoded = _decode(item, seen)
        if decoded is not item:
            value[key] = decoded
    return value


def _sparse(indices: Any, values: Any, shape: Any, is_coalesced: Any) -> torch.Tensor:
    # It stays as it was: coalescing would add the values in another order.
    return torch.sparse_coo_tensor(
        indices, values, shape, check_invariants=True, is_coalesced=bool(is_coalesced)
    )

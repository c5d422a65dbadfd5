"""What a checkpoint does not hold, to be said before the first one is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..loop.parameters import optimizer_parameters
from .parts import (
    SavedLearner,
    Search,
    is_module,
    is_optimizer,
    is_users,
    speaks_for_itself,
)


def unsaved_tensors(learner: SavedLearner) -> list[str]:
    """The attributes with tensors that no checkpoint holds, such as "MyLearner.hidden".

    They are those of the learner, of callbacks without a `state_dict`, and of modules that are
    trained and that hold tensors which are not buffers.
    """
    search = Search(learner)
    modules = [part.value for part in search.parts if is_module(part.value)]
    saved: list[torch.Tensor] = []
    for module in modules:
        saved += [*module.parameters(), *module.buffers()]
    for part in search.parts:
        saved += optimizer_parameters(part.value) if is_optimizer(part.value) else []
    memories = {_memory(tensor) for tensor in saved}
    found = [
        (str(outside), outside.tensor)
        for outside in search.tensors
        if not speaks_for_itself(outside.owner)
    ]
    for module in modules:
        if any(p.requires_grad for p in module.parameters()):  # a frozen teacher does not change
            found += _tensors_beside_buffers(module)
    return sorted({name for name, tensor in found if _memory(tensor) not in memories})


def _tensors_beside_buffers(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for inner in module.modules():
        if not is_users(type(inner)):
            continue
        for name, value in vars(inner).items():
            values = value if isinstance(value, list | tuple) else [value]
            values = list(value.values()) if isinstance(value, dict) else values
            if name not in _MEMBERS:
                name = f"{type(inner).__qualname__}.{name}"
                tensors = (held for held in values if isinstance(held, torch.Tensor))
                yield from ((name, tensor) for tensor in tensors if tensor.grad_fn is None)


_MEMBERS = {"_parameters", "_buffers"}


def _memory(tensor: torch.Tensor) -> Any:
    """The address of its memory; the `id` of the tensor if that has none, as on some devices."""
    no_address = "id", id(tensor)
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return no_address
    try:
        return tensor.untyped_storage().data_ptr() or no_address
    except RuntimeError:  # a subclass whose values are in other tensors
        return no_address

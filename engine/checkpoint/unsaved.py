"""What a checkpoint does not hold, to be said before the first one is written."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..loop.parameters import optimizer_parameters
from .data_state import data_tensors
from .parts import (
    OutsideTensor,
    SavedLearner,
    is_module,
    is_optimizer,
    speaks_for_itself,
)
from .search import Search


class UnsavedState:
    """Finds the attributes whose state no checkpoint holds.

    A tensor of a module that is not a buffer, of a function or of the data is a state only if it
    changes: it is compared with what it was. No tensor is kept alive for that.
    """

    def __init__(self) -> None:
        self._marks: dict[tuple[str, int], _Mark] = {}
        self._told: set[str] = set()

    def note(self, learner: SavedLearner) -> None:
        """Note the values of tensors that are not known yet."""
        for key, outside in _unsaved_tensors(learner, Search(learner)):
            if outside.is_usually_constant and key not in self._marks:
                self._marks[key] = _Mark(outside)

    def news(self, learner: SavedLearner) -> dict[str, str | None]:
        """The attributes that have not been told of before, such as "MyLearner.hidden".

        Returns:
            {name: the reason why it cannot be saved; None if it is a tensor}
        """
        search = Search(learner)
        found: dict[str, str | None] = dict(search.unsaved)
        for key, outside in _unsaved_tensors(learner, search):
            if not outside.is_usually_constant or self._has_changed(key, outside.tensor):
                found[outside.name] = None
        found = {name: why for name, why in sorted(found.items()) if name not in self._told}
        self._told |= found.keys()
        return found

    def _has_changed(self, key: tuple[str, int], tensor: torch.Tensor) -> bool:
        return key not in self._marks or self._marks[key].differs(tensor)


class _Mark:
    """What a tensor was: its version, and some of its values if it is not of the data."""

    def __init__(self, outside: OutsideTensor) -> None:
        self._tensor = weakref.ref(outside.tensor)
        self._version = _version(outside.tensor)
        self._shape = outside.tensor.shape
        self._sample = None if outside.owner is None else _sample(outside.tensor)

    def differs(self, tensor: torch.Tensor) -> bool:
        is_same = self._tensor() is tensor
        if is_same and _version(tensor) != self._version:
            return True
        if self._sample is None or (sample := _sample(tensor)) is None:
            return not is_same
        return self._shape != tensor.shape or not torch.equal(self._sample, sample)


def _version(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """Some of its values, as bytes on the host, which waits for the device; None if it has none."""
    if is_lazy(tensor) or tensor.is_meta or tensor.layout is not torch.strided:
        return None
    try:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, len(flat) // _SAMPLED)].to("cpu", copy=True)
        return some.contiguous().view(torch.uint8)
    except RuntimeError:  # a subclass whose values are in other tensors
        return None


_SAMPLED = 4096


def _unsaved_tensors(
    learner: SavedLearner, search: Search
) -> Iterator[tuple[tuple[str, int], OutsideTensor]]:
    """The tensors whose memory no part has, each with its name, and which of that name it is."""
    modules = [part.value for part in search.parts if is_module(part.value)]
    saved: list[torch.Tensor] = []
    for module in modules:
        saved += [*module.parameters(), *module.buffers()]
    for part in search.parts:
        saved += optimizer_parameters(part.value) if is_optimizer(part.value) else []
    memories = {_memory(tensor) for tensor in saved}
    frozen = {id(inner) for module in modules if _is_frozen(module) for inner in module.modules()}
    of_data = (OutsideTensor(name, None, t, True) for name, t in data_tensors(learner.dls))
    seen: Counter[str] = Counter()
    for outside in chain(search.tensors, of_data):
        owner = outside.owner
        is_told_of = is_module(owner) or not speaks_for_itself(owner)
        if is_told_of and id(owner) not in frozen and _memory(outside.tensor) not in memories:
            yield (outside.name, seen[outside.name]), outside
            seen[outside.name] += 1


def _is_frozen(module: nn.Module) -> bool:
    """Whether it has parameters and trains none: a teacher does not change."""
    needs = [p.requires_grad for p in module.parameters()]
    return bool(needs) and not any(needs)


def _memory(tensor: torch.Tensor) -> Any:
    """The address of its memory; the `id` of the tensor if that has none, as on some devices."""
    no_address = "id", id(tensor)
    if is_lazy(tensor) or tensor.layout is not torch.strided:
        return no_address
    try:
        return tensor.untyped_storage().data_ptr() or no_address
    except RuntimeError:  # a subclass whose values are in other tensors
        return no_address

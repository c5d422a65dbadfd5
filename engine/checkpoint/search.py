"""The search for the parts of a learner: one list for saving, resuming and `lr_find`.

These are the model, the optimizer, and what hangs on the learner or on a callback: modules,
optimizers, schedulers, random generators, and whatever else has `state_dict` and
`load_state_dict`; also in a list, a dict, an object of the user's or the closure of a function. A
callback with these two methods speaks for itself: what it holds is not listed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from io import IOBase
from itertools import count
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ...events import Callback
from ..loop.optimizers import Optimizers
from ..loop.state import LoopState
from .contents import (
    PLAIN,
    TENSORS,
    attributes_of,
    beside_its_state,
    contents_of,
    is_container,
    is_longer,
    is_users,
    kinds_if_plain,
    nested_containers,
    tensors_in,
)
from .data_state import contents_of_data
from .generators import is_generator
from .parts import (
    OutsideTensor,
    Part,
    SavedLearner,
    attribute_name,
    has_state,
    is_module,
    is_optimizer,
    owners_of,
    receivers_of,
    speaks_for_itself,
)
from .random_state import generators


def parts_of(learner: SavedLearner) -> list[Part]:
    """The parts of a learner: modules first, then optimizers, then the others.

    An object that is reached by two names is listed once, under the first in this order: the model,
    the optimizer, the attributes of the learner by name, those of the callbacks; then what is in
    these, and so on.
    """
    return Search(learner).parts


@dataclass(slots=True)
class _Node:
    """A value that a search looks at, and the way to it.

    Attributes:
        owner: "learner", or the name of a callback.
        holder, attribute: what has the value among its attributes, or something that holds it.
        name: the way from the owner to the value, such as "averages['fast']".
        value: the value.
        outer: the node of what holds the value; None if that is the holder itself.
        is_usually_constant: see `OutsideTensor`.
    """

    owner: str
    holder: Any
    attribute: str
    name: str
    value: Any
    outer: _Node | None = None
    is_usually_constant: bool = False


class Search:
    """A search through the attributes of a learner and its callbacks, and what they hold.

    It looks at the attributes themselves first, then at what they hold, and so on. Numbers, strings
    and tensors in lists, tuples and dicts are passed over at once.

    Attributes:
        parts: what it has found, in the order of `parts_of`.
        unsaved: the attributes that hold what has a state and cannot be saved, and why.
    """

    def __init__(self, learner: SavedLearner) -> None:
        self.parts: list[Part] = []
        self._looked_into: list[Any] = []
        self.unsaved: dict[str, str] = {}
        self._found: list[_Node] = []  # parts, tensors, and containers of tensors
        self._seen: dict[int, Any] = {}  # the objects, so that none of these ids is used again
        self._left = _MOST_VISITED
        self._queue: deque[_Node] = deque()
        self._know_what_others_save(learner)
        # The optimizer to its end: what is in it is not to be found elsewhere first.
        self._search(_Node("learner", learner, "model", "model", learner.model))
        self._search(_Node("learner", learner, "opt", "opt", learner.opt))
        for name, owner in owners_of(learner):
            if owner is learner or not speaks_for_itself(owner):
                name = "learner" if owner is learner else name
                for attribute, value in attributes_of(owner, methods=True).items():
                    self._queue.append(_Node(name, owner, attribute, attribute, value))
        self._search()
        for name, receiver in receivers_of(learner):  # last, as they may reach all of the host
            self._queue.append(_Node("learner", learner, name, name, receiver, None, True))
        self._search()
        self.parts.sort(key=lambda part: (not is_module(part.value), not is_optimizer(part.value)))

    @property
    def tensors(self) -> Iterator[OutsideTensor]:
        """The tensors that the learner and its callbacks hold, and that no part has."""
        for node in self._found:
            if not (is_users(type(node.holder)) or isinstance(node.holder, LoopState)):
                continue
            inner: Iterable[torch.Tensor] = ()
            if isinstance(node.value, torch.Tensor):
                inner = [node.value]
            elif is_container(node.value):
                held = tensors_in(node.value, _LONGEST)
                inner = (tensor for tensor in held if id(tensor) not in self._seen)
            for tensor in inner:
                if tensor.grad_fn is None:  # what belongs to a graph is a batch's
                    name = attribute_name(node.holder, node.attribute)
                    yield OutsideTensor(name, node.holder, tensor, node.is_usually_constant)

    @property
    def holders(self) -> dict[tuple[int, str], tuple[Any, str]]:
        """What holds a part or a tensor: the attributes, as owner and name, by `id` and name."""
        return {(id(n.holder), n.attribute): (n.holder, n.attribute) for n in self._found}

    @property
    def containers(self) -> dict[int, Any]:
        """The objects, lists and dicts that it has looked into, by `id`."""
        found: dict[int, Any] = {}
        for value in self._looked_into:
            inner = nested_containers(value, _LONGEST) if is_container(value) else [value]
            found |= {id(container): container for container in inner}
        return found

    @property
    def holding(self) -> dict[int, Any]:
        """The containers that hold a part or a tensor, or that hold such a container, by `id`."""
        found: dict[int, Any] = {}
        for node in self._found:
            if is_container(node.value):
                found |= {id(c): c for c in nested_containers(node.value, _LONGEST)}
            while node.outer is not None and id(node.outer.value) not in found:
                node = node.outer
                found[id(node.value)] = node.value
        return found

    def _know(self, value: Any) -> None:
        self._seen[id(value)] = value

    def _know_what_others_save(self, learner: SavedLearner) -> None:
        loaders = [getattr(learner.dls, name, None) for name in ("train", "valid")]
        for value in (learner, *learner.cbs, learner.dls, *loaders, *generators(learner.dls)):
            self._know(value)
        for loader in loaders:  # their position is saved with that in the epoch
            for name in ("dataset", "sampler", "batch_sampler", "loader"):
                self._know(getattr(loader, name, None))
        for name in ("dl", "batch", "preds", "loss"):
            value = getattr(learner, name, None)
            for item in (value, *(item for _, item in contents_of(value, _LONGEST))):
                if type(item) in TENSORS or is_container(item):  # not an environment
                    self._know(item)

    def _search(self, *nodes: _Node) -> None:
        self._queue.extend(nodes)
        while self._queue:
            node = self._queue.popleft()
            try:
                self._visit(node)
            except Exception as exc:  # it may be any object of the user's, such as a broken one
                self._cannot_save(node, f"it raises {type(exc).__name__} when it is looked at")

    def _visit(self, node: _Node) -> None:
        value, kind = node.value, type(node.value)
        if kind in PLAIN or issubclass(kind, _NEVER) or id(value) in self._seen:
            return
        if node.owner == "learner" and issubclass(kind, Callback):
            return  # such as `learner.metrics`, which a callback of an earlier fit has set
        if issubclass(kind, LoopState) and node.is_usually_constant:
            return  # a function that uses another learner does not own it
        self._know(value)
        if issubclass(kind, torch.Tensor):
            self._found.append(node)
        elif is_module(value):
            self._add_module(node)
        elif is_generator(value) or has_state(value):
            self._add(node)
            if is_optimizer(value) and not speaks_for_itself(value):
                self._look_into(node)  # torch's `state_dict` does not have what a subclass adds
            elif is_optimizer(value):
                self._know(getattr(value, "optimizer", None))  # accelerate wraps the optimizer
                for inner in value.values() if isinstance(value, Optimizers) else ():
                    self._know(inner)
        elif (kinds := kinds_if_plain(value)) is not None:
            self._looked_into.append(value)
            if kinds & TENSORS:
                self._found.append(node)
        elif is_users(kind) or (reason := _has_no_names(value)) is None:
            self._look_into(node)
        else:
            self._cannot_save(node, reason)

    def _look_into(self, node: _Node) -> None:
        value = node.value
        is_data = isinstance(value, _DATA)
        self._looked_into.append(value)
        if is_longer(value, _LONGEST):
            self._cannot_save(node, f"it has more than {_LONGEST:,} items")
        constant = node.is_usually_constant or isinstance(value, (*_DATA, *_FUNCTIONS))
        constant = constant or type(value).__module__.startswith("torch.")
        for step, item in contents_of_data(value) if is_data else contents_of(value, _LONGEST):
            if not self._left:
                self._cannot_save(node, f"there are more than {_MOST_VISITED:,} objects")
                return
            self._left -= 1
            if step in _OF_OPTIMIZERS and is_optimizer(value):
                continue
            name = node.name + step
            self._queue.append(
                _Node(node.owner, node.holder, node.attribute, name, item, node, constant)
            )

    def _cannot_save(self, node: _Node, why: str) -> None:
        if is_users(type(node.holder)) or isinstance(node.holder, LoopState):
            self.unsaved[attribute_name(node.holder, node.attribute)] = why

    def _add(self, node: _Node, elsewhere: tuple[str, ...] = ()) -> None:
        self._found.append(node)
        self.parts.append(Part(node.owner, node.name, node.value, elsewhere))

    def _add_module(self, node: _Node) -> None:
        inner = list(node.value.named_modules(remove_duplicate=False))
        known = {id(m) for _, m in inner if id(m) in self._seen}
        elsewhere = tuple(f"{prefix}." for prefix, m in inner if prefix and id(m) in known)
        self._add(node, elsewhere)
        for prefix, module in inner:
            if prefix and id(module) in known:
                continue
            self._know(module)
            for attribute, value in beside_its_state(module):
                name = ".".join(filter(None, [node.name, prefix, attribute]))
                self._queue.append(_Node(node.owner, module, attribute, name, value, None, True))


def _has_no_names(value: Any) -> str | None:
    """Why what it holds cannot be told apart at resume; None if it can, or if it holds nothing."""
    if isinstance(value, set | frozenset) and not {type(item) for item in value} <= PLAIN:
        return "a set, whose items have no order"
    if isinstance(value, IOBase | count) or not isinstance(value, Iterator):
        return None
    return "an iterator"


_NEVER = (ModuleType, type, BuiltinFunctionType, property)
_DATA = (Dataset, Sampler, DataLoader)
_FUNCTIONS = (FunctionType, MethodType, partial, staticmethod, classmethod)
_OF_OPTIMIZERS = {".param_groups", ".state", ".defaults"}
_LONGEST, _MOST_VISITED = 1000, 5000
"""Where a search ends, so that a large object does not hold the training up."""

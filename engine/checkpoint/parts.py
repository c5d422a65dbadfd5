"""The parts of a learner that have a state: one list for saving, resuming and `lr_find`.

These are the model, the optimizer, and what hangs on the learner or on a callback: modules,
optimizers, schedulers, random generators, and whatever else has `state_dict` and
`load_state_dict`; also in a list, a dict or an object of the user's. A callback with these two
methods speaks for itself: what it holds is not listed.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from sys import stdlib_module_names
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from ...events import Callback
from ..loop.state import LoopState, Progress
from .identity import callback_names
from .random_state import generators, is_generator


class SavedLearner(Protocol):
    """The attributes of a learner that are saved and restored."""

    model: nn.Module
    opt: Any
    dls: Any
    training: bool
    n_samples: int
    record: dict[str, Any]
    history: list[dict[str, Any]]
    progress: dict[bool, Progress]
    done: Progress
    gradients_pending: bool

    @property
    def cbs(self) -> tuple[Callback, ...]: ...


@dataclass(frozen=True, slots=True)
class Part:
    """An object with a state, and where it hangs.

    Attributes:
        owner: "learner", or the name of a callback.
        name: the attribute of the owner, such as "critic" or "averages['fast']".
        value: the object.
        elsewhere: of a module: the names of its submodules that another part saves.
    """

    owner: str
    name: str
    value: Any
    elsewhere: tuple[str, ...] = ()

    @property
    def path(self) -> tuple[str, str]:
        return self.owner, self.name

    def __str__(self) -> str:
        return path_name(self.path)


@dataclass(frozen=True, slots=True)
class OutsideTensor:
    """A tensor that hangs on the learner or a callback, and that no part has.

    Attributes:
        owner, attribute: what holds it, maybe within a list, a dict or an object.
        tensor: the tensor.
    """

    owner: Any
    attribute: str
    tensor: torch.Tensor

    def __str__(self) -> str:
        return f"{type(self.owner).__qualname__}.{self.attribute}"


def path_name(path: tuple[str, str]) -> str:
    """The name of a part for errors."""
    return {MODEL: "the model", OPTIMIZER: "the optimizer"}.get(path) or ".".join(path)


MODEL, OPTIMIZER = ("learner", "model"), ("learner", "opt")


def own_states(learner: SavedLearner) -> dict[str, Any]:
    """The callbacks with a `state_dict`, and the learner if its class has one, by name."""
    return {name: owner for name, owner in owners_of(learner) if _has_own_state(owner)}


def owners_of(learner: SavedLearner) -> Iterator[tuple[str, Any]]:
    """The learner and its callbacks, by name."""
    return callback_names([learner, *learner.cbs])


def parts_of(learner: SavedLearner) -> list[Part]:
    """The parts of a learner: modules first, then optimizers, then the others.

    An object that is reached by two names is listed once, under the first in this order: the model,
    the optimizer, the attributes of the learner by name, those of the callbacks.
    """
    return Search(learner).parts


def is_module(value: Any) -> bool:
    """Whether it is a module; isinstance would believe a Mock."""
    return issubclass(type(value), nn.Module)


def is_optimizer(value: Any) -> bool:
    """Whether it has a state, and groups of parameters."""
    return has_state(value) and hasattr(value, "param_groups")


def has_state(value: Any) -> bool:
    """Whether its class has both methods; a Mock has them, but its class does not."""
    kind = type(value)
    return all(callable(getattr(kind, name, None)) for name in ("state_dict", "load_state_dict"))


def attributes_of(owner: Any) -> dict[str, Any]:
    """The attributes of an object, by name: its own, and those of the user's classes."""
    found: dict[str, Any] = {}
    for cls in reversed(type(owner).__mro__):
        if is_users(cls):
            found |= {key: value for key, value in vars(cls).items() if not key.startswith("__")}
            slots = vars(cls).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                found[slot] = getattr(owner, slot, None)
    return dict(sorted((found | getattr(owner, "__dict__", {})).items()))


def is_users(cls: type) -> bool:
    """Whether a class is the user's, so that its objects may hold anything."""
    root = cls.__module__.partition(".")[0]
    return root == "__main__" or root not in _LIBRARIES


def _has_own_state(owner: Any) -> bool:
    return hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")


def speaks_for_itself(owner: Any) -> bool:
    """Whether its own `state_dict` is meant to have all that it holds.

    One that a user's class inherits from a callback of eventrain does not know what was added.
    """
    if not _has_own_state(owner):
        return False
    cls = next((cls for cls in type(owner).__mro__ if "state_dict" in vars(cls)), type(owner))
    return is_users(cls) or not is_users(type(owner))


class Search:
    """A search through the attributes of a learner and its callbacks.

    Attributes:
        parts: what it has found, in the order of `parts_of`.
        tensors: the tensors that the learner and its callbacks hold, and that no part has.
    """

    def __init__(self, learner: SavedLearner) -> None:
        self._learner = learner
        self.parts: list[Part] = []
        self.tensors: list[OutsideTensor] = []
        self._seen: dict[int, Any] = {}  # the objects, so that none of these ids is used again
        self._left = _MOST_VISITED
        loaders = [getattr(learner.dls, name, None) for name in ("train", "valid")]
        for value in (learner, *learner.cbs, learner.dls, *loaders, *generators(learner.dls)):
            self._know(value)
        for loader in loaders:  # their position is saved with that in the epoch
            for name in ("dataset", "sampler", "batch_sampler", "loader"):
                self._know(getattr(loader, name, None))
        for name in ("dl", "batch", "preds", "loss"):
            value = getattr(learner, name, None)
            self._know(value)
            for _, item in _contents(value):
                self._know(item)
        self._visit("learner", "model", learner.model)
        self._visit("learner", "opt", learner.opt)
        for name, owner in owners_of(learner):
            if owner is learner or not speaks_for_itself(owner):
                self._search(name if owner is not learner else "learner", owner)
        self.parts.sort(key=lambda part: (not is_module(part.value), not is_optimizer(part.value)))

    def holders(self) -> list[tuple[Any, str]]:
        """The attributes that hold a part, or a tensor outside of the parts: owner and name."""
        owners = {"learner": self._learner, **dict(owners_of(self._learner))}
        of_parts = [(owners[part.owner], _ATTRIBUTE.split(part.name)[0]) for part in self.parts]
        return [*of_parts, *((outside.owner, outside.attribute) for outside in self.tensors)]

    def _know(self, value: Any) -> None:
        self._seen[id(value)] = value

    def _search(self, owner_name: str, owner: Any) -> None:
        for name, value in attributes_of(owner).items():
            held = self._visit(owner_name, name, value)
            if is_users(type(owner)) or isinstance(owner, LoopState):
                self.tensors += [OutsideTensor(owner, name, tensor) for tensor in held]

    def _visit(self, owner: str, name: str, value: Any) -> list[torch.Tensor]:
        """Look at a value, and at what it holds. Returns the tensors outside of parts."""
        kind = type(value)
        if issubclass(kind, _NEVER) or id(value) in self._seen or not self._left:
            return []
        if owner == "learner" and issubclass(kind, Callback):
            return []  # such as `learner.metrics`, which a callback of an earlier fit has set
        self._left -= 1
        self._know(value)
        if issubclass(kind, torch.Tensor):
            return [value] if value.grad_fn is None else []  # what belongs to a graph is a batch's
        if is_module(value):
            self._add_module(owner, name, value)
        elif is_generator(value) or has_state(value):
            self.parts.append(Part(owner, name, value))
            if is_optimizer(value):  # accelerate wraps the optimizer
                self._know(getattr(value, "optimizer", None))
        elif name.count(".") + name.count("[") < _DEEPEST:
            held = (self._visit(owner, name + step, item) for step, item in _contents(value))
            return list(chain.from_iterable(held))
        return []

    def _add_module(self, owner: str, name: str, module: nn.Module) -> None:
        inner = list(module.named_modules(remove_duplicate=False))
        elsewhere = tuple(f"{prefix}." for prefix, m in inner if id(m) in self._seen and prefix)
        for _, submodule in inner:
            self._know(submodule)
        self.parts.append(Part(owner, name, module, elsewhere))


_ATTRIBUTE = re.compile(r"[.\[]")


def _contents(value: Any) -> Iterator[tuple[str, Any]]:
    """What a container, a partial, a bound method or an object of the user's holds, by name."""
    if isinstance(value, dict):
        for i, (key, item) in enumerate(islice(dict.items(value), _LONGEST)):
            # The repr of another key may be long, or make the host wait for the device.
            yield f"[{key!r}]" if isinstance(key, str | int) else f"[{i}]", item
    elif isinstance(value, list | tuple | deque):
        yield from ((f"[{i}]", item) for i, item in enumerate(islice(value, _LONGEST)))
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, partial):
        held = [value.func, *value.args, *value.keywords.values()]
        # A tensor there is a constant, such as the weights of classes.
        yield from ((f"[{i}]", x) for i, x in enumerate(held) if not isinstance(x, torch.Tensor))
    elif is_users(type(value)):
        yield from ((f".{name}", item) for name, item in attributes_of(value).items())


_NEVER = (
    *(type(None), bool, int, float, complex, str, bytes, bytearray, range),
    *(type, ModuleType, FunctionType, BuiltinFunctionType, property, staticmethod, classmethod),
    *(LoopState, DataLoader, Dataset, Sampler),
)
_LIBRARIES = stdlib_module_names | {"torch", "numpy", "eventrain", "structlog", "accelerate"}
_DEEPEST, _LONGEST, _MOST_VISITED = 4, 1000, 20_000
"""Where a search ends, so that a large object does not hold the training up."""

"""The parts of a learner that have a state, and how they are told apart and named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from ...events import Bus, Callback
from ..loop.state import Progress
from .contents import is_users
from .identity import callback_names


class SavedLearner(Protocol):
    """The attributes of a learner that are saved and restored."""

    model: nn.Module
    opt: Any
    dls: Any
    bus: Bus
    training: bool
    n_samples: int
    record: dict[str, Any]
    history: list[dict[str, Any]]
    progress: dict[bool, Progress]
    done: Progress
    gradients_pending: bool | list[str]

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
    """A tensor that hangs on the learner, a callback or the data, and that no part has.

    Attributes:
        name: the attribute that holds it, such as "MyLearner.hidden".
        owner: the object with that attribute; None if it is of the data.
        tensor: the tensor.
        is_usually_constant: whether a tensor in such a place is a state only if it changes: one of
            a module, of a function, or of data.
    """

    name: str
    owner: Any
    tensor: torch.Tensor
    is_usually_constant: bool


def attribute_name(owner: Any, attribute: str) -> str:
    """The name of an attribute in what is logged, such as "MyLearner.hidden"."""
    return f"{type(owner).__qualname__}.{attribute}"


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


def receivers_of(learner: SavedLearner) -> Iterator[tuple[str, Any]]:
    """The receivers of a learner's events, by name, without the methods of its callbacks."""
    seen: Counter[str] = Counter()
    for subscription in learner.bus.subscriptions():
        receiver = subscription.receiver
        if subscription.learner is not None and subscription.learner is not learner:
            continue
        if not isinstance(getattr(receiver, "__self__", None), Callback):
            name = getattr(receiver, "__qualname__", type(receiver).__qualname__)
            seen[name] += 1
            number = f" {seen[name]}" if seen[name] > 1 else ""
            yield f"receivers['{name}{number}']", receiver


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

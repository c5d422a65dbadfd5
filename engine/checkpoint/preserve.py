"""Putting a learner back as it was: after a trial run such as `lr_find`, or a failed resume.

Every part is put back on its own, so that one that fails does not keep the others from it. A
parameter or buffer is the same object as before, with the values of before.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from ..loop.optimizers import Optimizers
from ..loop.parameters import optimizer_parameters
from .generators import generator_state, is_generator, set_generator_state
from .kept import KeptAttributes, KeptModule, KeptTensors, keep_container, keep_contents
from .parts import (
    Part,
    SavedLearner,
    is_module,
    is_optimizer,
    own_states,
)
from .random_state import random_state, set_random_state
from .search import Search


@contextmanager
def preserved(learner: SavedLearner) -> Iterator[None]:
    """Put everything with a state back afterwards: see `KeptLearner`.

    Raises:
        Exception: the first error of a part that could not be put back, when all others are.
    """
    kept = KeptLearner(learner)
    try:
        yield
    except BaseException as exc:
        for error in kept.put_back():
            exc.add_note(f"and {error.__notes__[-1]}: {error!r}")
        raise
    errors = kept.put_back()
    if errors:
        for error in errors[1:]:
            errors[0].add_note(f"and {error.__notes__[-1]}: {error!r}")
        raise errors[0]


class KeptLearner:
    """All that a `Search` and `own_states` list, and the position and random states of a learner.

    The random states are those of Python, numpy, torch, its devices, and the generators of the
    learner's loaders. A model that was moved to another device stays there.
    """

    def __init__(self, learner: SavedLearner) -> None:
        self._learner = learner
        self._tensors = KeptTensors()
        self._steps: list[tuple[str, Callable[[], Any]]] = []
        self._modules: set[int] = set()
        self._attributes = {
            id(owner): KeptAttributes(owner)
            for owner in (learner, *learner.cbs)
            if hasattr(owner, "__dict__")
        }
        self._before = search = Search(learner)
        self._containers = {key: keep_container(held) for key, held in search.containers.items()}
        for part in search.parts:
            self._keep_part(part)
        for name in ("model", "opt"):
            self._add(name, partial(setattr, learner, name, getattr(learner, name)))
        for outside in search.tensors:
            self._tensors.keep(outside.tensor)
            self._add(outside.name, partial(self._tensors.put_back, outside.tensor))
        self._add("the attributes", self._put_back_attributes)
        self._add("the gradients", self._tensors.put_back_gradients)
        for name, owner in own_states(learner).items():
            self._add(name, self._keep_own_state(owner))
        for part in search.parts:
            if is_generator(part.value):  # after the callbacks, which may draw while they load
                state = generator_state(part.value)
                self._add(str(part), partial(set_generator_state, part.value, state))
        position = {name: getattr(learner, name) for name in _POSITION if hasattr(learner, name)}
        self._add("the position", partial(_set_attributes, learner, position))
        if torch.accelerator.is_available():
            # This initializes it; before, there is no random state to save.
            torch.accelerator.current_device_index()
        self._add(
            "the random states", partial(set_random_state, learner.dls, random_state(learner.dls))
        )

    def put_back(self) -> list[Exception]:
        """Put everything back. Returns the errors of what could not be, noted with its name."""
        errors = []
        for what, put_back in self._steps:
            try:
                put_back()
            except Exception as exc:
                exc.add_note(f"raised when {what} was put back as it was before")
                errors.append(exc)
        return errors

    def _add(self, what: str, put_back: Callable[[], Any]) -> None:
        self._steps.append((what, put_back))

    def _keep_part(self, part: Part) -> None:
        value, what = part.value, str(part)
        if isinstance(value, Optimizers):
            for name, opt in value.items():
                self._keep_part(Part(part.owner, f"{part.name}[{name!r}]", opt))
            return
        if is_module(value):
            self._keep_module(part)
        elif not is_generator(value) and not _loads_as_optimizer(value):
            self._add(what, partial(value.load_state_dict, copy.deepcopy(value.state_dict())))
        if is_optimizer(value):
            for p in optimizer_parameters(value):
                self._tensors.keep(p)
                self._tensors.keep_gradient(p)
                self._add(what, partial(self._tensors.put_back, p))
                self._add(what, partial(p.requires_grad_, p.requires_grad))
            self._add(what, partial(setattr, value, "param_groups", value.param_groups))
            self._add(what, keep_contents(value.param_groups, self._tensors))
        if isinstance(value, Optimizer):
            self._add(what, partial(setattr, value, "state", value.state))
            self._add(what, keep_contents(value.state, self._tensors))

    def _keep_own_state(self, owner: Any) -> Callable[[], Any]:
        try:
            state = copy.deepcopy(owner.state_dict())
        except Exception:  # it has none before its first fit: its attributes are put back
            return self._attributes[id(owner)].put_back_all
        return partial(owner.load_state_dict, state)

    def _keep_module(self, part: Part) -> None:
        for name, module in part.value.named_modules():
            if id(module) not in self._modules:
                self._modules.add(id(module))
                self._attributes[id(module)] = KeptAttributes(module)
                kept = KeptModule(module, self._tensors)
                self._add(f"{name} of {part}" if name else str(part), kept.put_back)
                if type(module).get_extra_state is not torch.nn.Module.get_extra_state:
                    extra = copy.deepcopy(module.get_extra_state())
                    self._add(f"the extra state of {part}", partial(module.set_extra_state, extra))

    def _put_back_attributes(self) -> None:
        """Those that hold a part or a tensor, before or now: a new one is not to stay."""
        now = Search(self._learner)
        for key in {**self._before.holding, **now.holding}:
            if key in self._containers:
                self._containers[key]()
        for owner, name in {**self._before.holders, **now.holders}:
            if owner in self._attributes:
                self._attributes[owner].put_back(name)


def _loads_as_optimizer(value: Any) -> bool:
    """Whether all its state is in `state` and `param_groups`, as in torch's own optimizers."""
    return getattr(type(value), "load_state_dict", None) is Optimizer.load_state_dict


def _set_attributes(owner: Any, values: dict[str, Any]) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


_POSITION = (
    *("batch", "preds", "loss", "epoch", "iter", "n_epochs", "n_iter", "training"),
    *("max_steps", "epoch_length", "valid_length", "n_steps"),
    *("history", "record", "n_samples", "progress", "done", "gradients_pending"),
)

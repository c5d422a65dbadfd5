"""The whole state of a fit: collecting it for a checkpoint, and restoring it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..loop.optimizers import Optimizers, class_of
from ..loop.parameters import optimizer_parameters
from ..loop.state import Progress
from .generators import generator_state, is_generator, set_generator_state
from .identity import match_callbacks, settings_of_several
from .parts import (
    MODEL,
    OPTIMIZER,
    Part,
    SavedLearner,
    is_module,
    is_optimizer,
    own_states,
    owners_of,
)
from .random_state import random_state, set_random_state
from .search import parts_of

State = dict[str, Any]
Record = Mapping[str, Any]
"""What a state holds of one part."""


def state_of(learner: SavedLearner) -> State:
    """The state of all parts of a learner and of its callbacks, its history, position and counts.

    The tensors are the live ones; `Snapshot` copies them.
    """
    records = records_of(parts_of(learner))
    if learner.opt is not None and not any(_is_of_optimizer(path) for path in records):
        raise TypeError(
            f"the optimizer is {learner.opt!r}, which cannot be saved: give its class state_dict()"
            " and load_state_dict(state)"
        )
    model = records.pop(MODEL)
    opt = records.pop(OPTIMIZER, {"state": None, "parameters": {}})
    attributes: dict[str, dict[str, Record]] = {}
    for (owner, name), record in records.items():
        attributes.setdefault(owner, {})[name] = record
    own = own_states(learner)
    return {
        "model": model["state"],
        "gradients": model["gradients"],
        "frozen": model["frozen"],
        "optimizer": opt["state"],
        "optimizer_class": optimizer_class(learner.opt),
        "optimizer_parameters": opt["parameters"],
        "attributes": attributes,
        "callbacks": {name: _noted(name, owner.state_dict) for name, owner in own.items()},
        "settings": settings_of_several(stateful(learner, {*own, *attributes})),
        "random": random_state(learner.dls),
        "history": learner.history,
        "n_samples": learner.n_samples,
        "gradients_pending": learner.gradients_pending,
        "progress": {training: asdict(done) for training, done in learner.progress.items()},
    }


def _is_of_optimizer(path: tuple[str, str]) -> bool:
    return path == OPTIMIZER or (path[0] == "learner" and path[1].startswith(("opt.", "opt[")))


def records_of(parts: list[Part]) -> dict[tuple[str, str], Record]:
    """What is saved of each part, by its path."""
    held: set[int] = set()  # the parameters that a module saves
    records: dict[tuple[str, str], Record] = {}
    for part in parts:
        value = part.value
        if is_module(value):
            state = module_state(part)
            named = dict(value.named_parameters(remove_duplicate=False))
            held.update(id(p) for name, p in named.items() if name in state)
            first = {id(p): name for name, p in reversed(named.items())}  # of its several names
            gradients = {
                name: p.grad
                for name, p in named.items()
                if p.grad is not None
                and name == first[id(p)]
                and not name.startswith(part.elsewhere)
            }
            frozen = [name for name, p in part_parameters(part) if not p.requires_grad]
            records[part.path] = {"state": state, "gradients": gradients, "frozen": frozen}
        elif is_optimizer(value):
            outside = {i: p for i, p in enumerate(optimizer_parameters(value)) if id(p) not in held}
            held.update(map(id, outside.values()))
            records[part.path] = {
                "state": _noted(str(part), value.state_dict),
                "class": optimizer_class(value),
                "parameters": {i: _outside(p) for i, p in outside.items()},
            }
        elif is_generator(value):
            records[part.path] = {"state": generator_state(value)}
        else:
            records[part.path] = {"state": _noted(str(part), value.state_dict)}
    return records


def _outside(p: torch.Tensor) -> Record:
    return {"value": p, "gradient": p.grad, "requires_grad": p.requires_grad}


def set_state(learner: SavedLearner, state: State) -> None:
    """Restore a state that `check_state` has accepted."""
    state = named_as_here(learner, state)
    records = records_in(state)
    parts = parts_of(learner)
    for part in parts:
        if not is_generator(part.value):
            set_part(part, records[part.path])
    learner.history = [dict(row) for row in state["history"]]
    learner.record = learner.history[-1] if learner.history else {}
    learner.n_samples = state["n_samples"]
    learner.progress = {training: Progress(**done) for training, done in state["progress"].items()}
    learner.done = learner.progress[learner.training]
    learner.gradients_pending = state["gradients_pending"]
    try:
        for name, owner in own_states(learner).items():
            _noted(name, owner.load_state_dict, state["callbacks"][name])
    finally:  # last, because a callback may draw random numbers while it loads
        for part in parts:
            if is_generator(part.value):
                set_generator_state(part.value, records[part.path]["state"])
        set_random_state(learner.dls, state["random"])


def records_in(state: State) -> dict[tuple[str, str], Record]:
    """What a state holds of each part, by the path of the part."""
    records = {
        (owner, name): record
        for owner, named in state["attributes"].items()
        for name, record in named.items()
    }
    records[MODEL] = {
        "state": state["model"],
        "gradients": state["gradients"],
        "frozen": state.get("frozen"),
    }
    if state["optimizer"] is not None:
        records[OPTIMIZER] = {
            "state": state["optimizer"],
            "class": state["optimizer_class"],
            "parameters": state["optimizer_parameters"],
        }
    return records


def named_as_here(learner: SavedLearner, state: State) -> State:
    """The state of a checkpoint, with the names that its callbacks have in this learner.

    Raises:
        AmbiguousCallbacksError: two callbacks of one class cannot be told from one another.
    """
    names = {*own_states(learner), *(part.owner for part in parts_of(learner))}
    here = settings_of_several(stateful(learner, names))
    matched, problems = match_callbacks(here, state["settings"])
    if problems:
        raise AmbiguousCallbacksError("; ".join(problems))
    renamed = {
        key: {matched.get(name, name): held for name, held in state[key].items()}
        for key in ("callbacks", "attributes", "settings")
    }
    return {**state, **renamed}


class AmbiguousCallbacksError(ValueError):
    """Two callbacks of one class cannot be told from one another in a checkpoint."""


def stateful(learner: SavedLearner, names: Set[str]) -> dict[str, Any]:
    """The callbacks with these names, of which a state holds something."""
    return {name: cb for name, cb in owners_of(learner) if name in names and cb is not learner}


# -------------------------------------------------------------------------------------- one part


def part_parameters(part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    """The parameters of a module, by name, without those that another part has."""
    for name, p in part.value.named_parameters():
        if not name.startswith(part.elsewhere):
            yield name, p


def module_state(part: Part) -> dict[str, Any]:
    """The `state_dict` of a module, without the submodules that another part saves."""
    state: dict[str, Any] = _noted(str(part), part.value.state_dict)
    if part.elsewhere and loads_by_name(part.value):
        for name in [name for name in state if name.startswith(part.elsewhere)]:
            del state[name]
    return state


def loads_by_name(module: nn.Module) -> bool:
    """Whether a module saves and loads as `nn.Module` does."""
    kind = type(module)
    return (
        kind.state_dict is nn.Module.state_dict
        and kind.load_state_dict is nn.Module.load_state_dict
    )


def set_part(part: Part, record: Record) -> None:
    """Restore what a state holds of one part; not of a generator."""
    if is_module(part.value):
        _load_module(part, record["state"])
        for name, p in part_parameters(part):
            _set_gradient(p, record["gradients"].get(name))
            if (frozen := record.get("frozen")) is not None:  # an older checkpoint has none
                _set_trained(p, name not in frozen)
        return
    if is_optimizer(part.value):
        parameters = optimizer_parameters(part.value)
        for i, saved in record["parameters"].items():
            with torch.no_grad():
                parameters[i].copy_(saved["value"])
            _set_gradient(parameters[i], saved["gradient"])
            _set_trained(parameters[i], saved.get("requires_grad", parameters[i].requires_grad))
    _noted(str(part), part.value.load_state_dict, record["state"])


def _set_gradient(p: torch.Tensor, gradient: torch.Tensor | None) -> None:
    p.grad = None if gradient is None else gradient.to(p.device, copy=True)


def _set_trained(p: torch.Tensor, trained: bool) -> None:
    if p.requires_grad != trained:
        p.requires_grad_(trained)


def _load_module(part: Part, state: Mapping[str, Any]) -> None:
    """Load a `state_dict`: complete if it has what this module's own `state_dict` has.

    That may be a part of the module, such as an adapter. With `strict`, torch would want all of it.
    """
    load = part.value.load_state_dict
    accepts = inspect.signature(load).parameters
    if "strict" not in accepts and all(p.kind is not p.VAR_KEYWORD for p in accepts.values()):
        _noted(str(part), load, state)
        return
    result = _noted(str(part), load, state, strict=False)
    missing = {*getattr(result, "missing_keys", ())} & module_state(part).keys()
    unexpected = {*getattr(result, "unexpected_keys", ())}
    if missing or unexpected:
        raise RuntimeError(
            f"the state of {part} in the checkpoint does not fit: it does not have"
            f" {sorted(missing)}, and has {sorted(unexpected)}, which the module does not take"
        )


def optimizer_class(opt: Any) -> str:
    """The class name of an optimizer, as checkpoints hold it; of several, with their names."""
    return repr(opt) if isinstance(opt, Optimizers) else class_of(opt).__name__


def _noted(name: str, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call `state_dict` or `load_state_dict`; note on an error whose it was."""
    try:
        return method(*args, **kwargs)
    except Exception as exc:
        on = " on its state in the checkpoint" if args else ""
        exc.add_note(f"raised by {name}.{method.__name__}{on}")
        raise

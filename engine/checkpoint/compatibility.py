"""The check that a checkpoint fits the learner that resumes from it; differences are named.

It never refuses what would load. So it judges what torch's own `load_state_dict` judges, and leaves
modules and optimizers with a loader of their own to that loader: if one raises, everything is put
back (`preserve.py`). Whether a tensor has the memory for its size is checked when it is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ..loop.optimizers import each_of
from ..loop.parameters import optimizer_parameters
from .parts import (
    OPTIMIZER,
    Part,
    SavedLearner,
    is_module,
    is_optimizer,
    own_states,
    path_name,
)
from .random_state import random_state_differs
from .search import parts_of
from .state import (
    AmbiguousCallbacksError,
    Record,
    State,
    loads_by_name,
    module_state,
    named_as_here,
    optimizer_class,
    part_parameters,
    records_in,
)


class CheckpointMismatchError(ValueError):
    """The checkpoint does not fit the learner that resumes from it."""


def check_state(learner: SavedLearner, state: State) -> None:
    """Raise a CheckpointMismatchError that names the differences, before anything is changed."""
    try:
        differences = list(_differences(learner, named_as_here(learner, state)))
    except AmbiguousCallbacksError as exc:
        differences = [str(exc)]
    except Exception as exc:
        raise CheckpointMismatchError(
            f"the checkpoint does not fit: its state does not have eventrain's structure ({exc!r})"
        ) from exc
    if differences:
        raise CheckpointMismatchError(
            "the checkpoint does not fit: "
            + "; ".join(differences[:5])
            + (f"; and {len(differences) - 5} more" if differences[5:] else "")
        )


def _differences(learner: SavedLearner, state: State) -> Iterator[str]:
    parts, records = parts_of(learner), records_in(state)
    if (name := optimizer_class(learner.opt)) != state["optimizer_class"]:
        yield f"the optimizer is {name}, but {state['optimizer_class']} in the checkpoint"
        records.pop(OPTIMIZER, None)
    for part in parts:
        record = records.pop(part.path, None)
        if record is not None:
            yield from _part_differs(part, record)
        elif part.path != OPTIMIZER:
            yield f"{part} is not in the checkpoint"
    for path in records:
        yield (
            f"there is no {path_name(path)}, which the checkpoint has: it must be there when the"
            " fit has begun, so make it in before_fit at the latest"
        )
    yield from _callbacks_differ(own_states(learner), state["callbacks"])
    if difference := random_state_differs(learner.dls, state["random"]):
        yield difference


def _part_differs(part: Part, record: Record) -> Iterator[str]:
    if is_module(part.value):
        yield from _module_differs(part, record["state"])
        yield from _gradients_differ(part, record["gradients"])
    elif is_optimizer(part.value):
        yield from _optimizer_differs(part, record)


def _module_differs(part: Part, there: Mapping[str, Any]) -> Iterator[str]:
    module = part.value
    if not loads_by_name(module):
        return
    own_loaders = tuple(_own_loaders(module))
    here = {k: v for k, v in module_state(part).items() if not k.startswith(own_loaders)}
    there = {k: v for k, v in there.items() if not k.startswith(own_loaders)}
    for name in sorted(there.keys() - here.keys()):
        yield f"{part} does not have {name}, which the checkpoint has"
    for name in sorted(here.keys() - there.keys()):
        yield f"{part} has {name}, which the checkpoint does not have"
    for name in sorted(here.keys() & there.keys()):
        a, b = here[name], there[name]
        if not isinstance(a, torch.Tensor) or is_lazy(a):
            continue
        if not isinstance(b, torch.Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{name} of {part} is {_shape(a)}, but {_shape(b)} in the checkpoint"


def _own_loaders(module: nn.Module) -> Iterator[str]:
    """The prefixes of the submodules that load in a way of their own, as observers do."""
    for name, inner in module.named_modules():
        loader = type(inner)._load_from_state_dict
        if inner._load_state_dict_pre_hooks or not loader.__module__.startswith("torch.nn."):
            yield f"{name}." if name else ""


def _gradients_differ(part: Part, there: Mapping[str, Any]) -> Iterator[str]:
    here = dict(part_parameters(part))
    for name, gradient in sorted(there.items()):
        if (p := here.get(name)) is None:
            yield f"{part} does not have {name}, whose gradient the checkpoint has"
        elif not is_lazy(p) and not _has_shape(gradient, p):
            yield f"{name} is {_shape(p)}, but its gradient in the checkpoint {_shape(gradient)}"


def _has_shape(value: Any, like: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == like.shape


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _optimizer_differs(part: Part, record: Record) -> Iterator[str]:
    opt, there = part.value, record["state"]
    if (name := optimizer_class(opt)) != record["class"]:
        yield f"{part} is {name}, but {record['class']} in the checkpoint"
        return
    parameters = optimizer_parameters(opt)
    for i, saved in record["parameters"].items():
        p = parameters[i] if i < len(parameters) else None
        if p is None or not (is_lazy(p) or _has_shape(saved["value"], p)):
            here = "missing" if p is None else _shape(p)
            told = _shape(saved["value"])
            yield f"parameter {i} of {part} is {here}, but {told} in the checkpoint"
        elif saved["gradient"] is not None and not _has_shape(saved["gradient"], p):
            told = _shape(saved["gradient"])
            yield f"parameter {i} of {part} is {_shape(p)}, but its gradient {told}"
    for key, inner in each_of(opt).items():
        if type(inner).load_state_dict is torch.optim.Optimizer.load_state_dict:
            one = part if key is None else Part(part.owner, f"{part.name}[{key!r}]", inner)
            of_one = there if key is None else there[key]
            yield from _groups_differ(one, of_one, optimizer_parameters(inner))


def _groups_differ(
    part: Part, there: Mapping[str, Any], parameters: list[torch.Tensor]
) -> Iterator[str]:
    sizes = [len(group["params"]) for group in part.value.param_groups]
    other_sizes = [len(group["params"]) for group in there["param_groups"]]
    if sizes != other_sizes:
        yield f"{part} has groups of {sizes} parameters, but {other_sizes} in the checkpoint"
        return
    is_torchs = type(part.value).__module__.startswith("torch.optim.")
    for index, values in there["state"].items():
        if not isinstance(index, int):
            continue  # an optimizer may keep a state under a name
        if index >= len(parameters):
            yield (
                f"{part} has {len(parameters)} parameters, but the checkpoint has a state for the"
                f" one with index {index}"
            )
        elif is_torchs:
            yield from _torchs_state_differs(part, values, parameters, index)


def _torchs_state_differs(
    part: Part, values: Mapping[str, Any], parameters: list[torch.Tensor], index: int
) -> Iterator[str]:
    """torch's own optimizers keep nothing that is larger than the parameter it is kept for."""
    of_all = isinstance(part.value, torch.optim.LBFGS)  # which keeps all of them in one tensor
    judged = parameters if of_all else [parameters[index]]
    if any(map(is_lazy, judged)):
        return  # their sizes are not known yet
    most = max(1, sum(p.numel() for p in judged))
    for name, value in values.items():
        if isinstance(value, torch.Tensor) and value.numel() > most:
            yield (
                f"{name} of {part} is {_shape(value)} in the checkpoint, which is larger than what"
                " it is kept for"
            )


def _callbacks_differ(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() - here.keys()):
        yield f"{name} is not among the callbacks, but in the checkpoint"
    for name in sorted(here.keys() - there.keys()):
        yield f"{name} is among the callbacks, but not in the checkpoint"

"""The check that a checkpoint fits the learner that resumes from it; differences are named."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .random_state import random_state_differs
from .state import SavedLearner, State, optimizer_class, stateful


class CheckpointMismatchError(ValueError):
    """The checkpoint does not fit the learner that resumes from it."""


def check_state(learner: SavedLearner, state: State) -> None:
    """Raise a CheckpointMismatchError that names the differences, before anything is changed."""
    try:
        differences = [
            *_tensors_differ("the model", learner.model.state_dict(), state["model"]),
            *_gradients_differ(dict(learner.model.named_parameters()), state["gradients"]),
            *_optimizers_differ(learner.opt, state),
            *_callbacks_differ(dict(stateful(learner)), state["callbacks"]),
        ]
        if difference := random_state_differs(learner.dls, state["random"]):
            differences.append(difference)
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


def _tensors_differ(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() - here.keys()):
        yield f"{what} does not have {name}, which the checkpoint has"
    for name in sorted(here.keys() - there.keys()):
        yield f"{what} has {name}, which the checkpoint does not have"
    for name in sorted(here.keys() & there.keys()):
        a, b = here[name], there[name]
        if not isinstance(a, torch.Tensor) or torch.nn.parameter.is_lazy(a):
            continue
        if not isinstance(b, torch.Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{name} of {what} is {_shape(a)}, but {_shape(b)} in the checkpoint"


def _gradients_differ(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name, gradient in sorted(there.items()):
        p = here.get(name)
        if p is None:
            yield f"the model does not have {name}, whose gradient the checkpoint has"
        elif torch.nn.parameter.is_lazy(p):
            continue
        elif not isinstance(gradient, torch.Tensor) or gradient.shape != p.shape:
            yield f"{name} is {_shape(p)}, but its gradient in the checkpoint {_shape(gradient)}"


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _optimizers_differ(opt: Any, state: State) -> Iterator[str]:
    there = state["optimizer"]
    if (name := optimizer_class(opt)) != state["optimizer_class"]:
        yield f"the optimizer is {name}, but {state['optimizer_class']} in the checkpoint"
        return
    if opt is None:
        return
    sizes = [len(group["params"]) for group in opt.param_groups]
    other_sizes = [len(group["params"]) for group in there["param_groups"]]
    if sizes != other_sizes:
        yield f"the optimizer has groups of {sizes} parameters, but {other_sizes} in the checkpoint"
        return
    parameters = [p for group in opt.param_groups for p in group["params"]]
    if any(map(torch.nn.parameter.is_lazy, parameters)):
        return  # their sizes are not known yet
    most = max(1, sum(p.numel() for p in parameters))  # LBFGS holds all parameters in one tensor
    for index, values in there["state"].items():
        if index >= len(parameters):
            yield (
                f"the optimizer has {len(parameters)} parameters, but the checkpoint has a state"
                f" for the one with index {index}"
            )
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.numel() > most:
                yield (
                    f"{name} of the optimizer is {_shape(value)} in the checkpoint, which is larger"
                    " than all parameters together"
                )


def _callbacks_differ(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() - here.keys()):
        yield f"{name} is not among the callbacks, but in the checkpoint"
    for name in sorted(here.keys() - there.keys()):
        yield f"{name} is among the callbacks, but not in the checkpoint"

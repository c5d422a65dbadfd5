"""The parameters that an optimizer step changes, and the gradients that a fit leaves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn

from .optimizers import Optimizers
from .state import LoopState

T = TypeVar("T")


def optimizer_parameters(opt: Any) -> list[torch.Tensor]:
    """The parameters of an optimizer, in its order: those that its step changes.

    They may be fewer than the model's, such as those of a head, and include others, such as those
    of a loss. Clipping, checks and scaling look at these, so that gradients that no step uses do
    not count.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False))
        >>> opt = torch.optim.SGD(model[1].parameters(), 0.1)
        >>> [p.shape for p in optimizer_parameters(opt)]
        [torch.Size([1, 2])]
    """
    return [p for group in opt.param_groups for p in group["params"]]


def modules_of(loop: Any) -> list[nn.Module]:
    """The model and the other modules of a learner, such as its loss, also in lists and dicts."""
    return [loop.model, *_held_by(loop, nn.Module)]


def all_optimizer_parameters(loop: Any) -> list[torch.Tensor]:
    """The parameters of `learner.opt` and of the learner's other optimizers, each once.

    A learner with a step of its own may step with several.
    """
    groups = all_groups(loop.opt)
    for opt in _held_by(loop, torch.optim.Optimizer):
        groups += opt.param_groups
    return list({id(p): p for group in groups for p in group["params"]}.values())


def parameters_of_step(loop: Any) -> list[torch.Tensor]:
    """The parameters that the current step may change.

    In an update those of its optimizer; otherwise those of all optimizers of the learner.
    """
    one = loop.updating is not None
    return optimizer_parameters(loop.opt) if one else all_optimizer_parameters(loop)


def all_groups(opt: Any) -> list[dict[str, Any]]:
    """The parameter groups of an optimizer, of all if it holds several, or of none."""
    if isinstance(opt, Optimizers):
        return opt.all_param_groups
    return list(getattr(opt, "param_groups", ()))


def _held_by(loop: Any, kind: type[T]) -> list[T]:
    """The objects of a kind among the attributes of a learner, also in lists and dicts."""
    found = []
    for value in vars(loop).values():
        # By type(): isinstance() asks the object, which may be any object of the user's.
        inside = value.values() if issubclass(type(value), dict) else value
        held = inside if issubclass(type(value), list | tuple | dict) else (value,)
        found += [item for item in held if issubclass(type(item), kind)]
    return found


def parameter_names(learner: Any) -> dict[int, str]:
    """The names of the parameters of the model and the loss, by the `id` of each."""
    names = {id(p): name for name, p in learner.model.named_parameters()}
    if isinstance(learner.loss_func, nn.Module):
        for name, p in learner.loss_func.named_parameters():
            names.setdefault(id(p), f"loss_func.{name}")
    return names


def drop_unused_gradients(
    loop: LoopState, modules: Iterable[nn.Module], optimizers: Iterable[Any]
) -> None:
    """At the end of a fit, drop the gradients that no step has used and no `ZeroGrad` has kept.

    These are all of them after a backward pass without a step; otherwise those of parameters that
    no optimizer has.

    Args:
        loop: the loop, after its fit.
        modules, optimizers: those of the learner and its callbacks.
    """
    stepped = [p for opt in optimizers for group in all_groups(opt) for p in group["params"]]
    kept = set() if loop.gradients_pending else {id(p) for p in stepped}
    for p in (*stepped, *(p for module in modules for p in module.parameters())):
        if id(p) not in kept:
            p.grad = None
    loop.gradients_pending = False

"""The parameters that an optimizer step changes, and the gradients that a fit leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .state import LoopState


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


def modules_of(loop: LoopState) -> list[nn.Module]:
    """The model, and the other modules that are attributes of the learner, such as its loss."""
    return [loop.model, *(value for value in vars(loop).values() if isinstance(value, nn.Module))]


def current_lr(opt: Any) -> Any:
    """The learning rate of the first group; a copy if it is a tensor, which a scheduler changes."""
    lr = opt.param_groups[0].get("lr")
    return lr.clone() if isinstance(lr, torch.Tensor) else lr


def parameter_names(learner: Any) -> dict[int, str]:
    """The names of the parameters of the model and the loss, by the `id` of each."""
    names = {id(p): name for name, p in learner.model.named_parameters()}
    if isinstance(learner.loss_func, nn.Module):
        for name, p in learner.loss_func.named_parameters():
            names.setdefault(id(p), f"loss_func.{name}")
    return names


def drop_unused_gradients(loop: LoopState) -> None:
    """At the end of a fit, drop the gradients that no step has used and no `ZeroGrad` has kept.

    These are all of them after a backward pass without a step; otherwise those of parameters that
    the optimizer does not have.
    """
    stepped = optimizer_parameters(loop.opt)
    if loop.gradients_pending:
        dropped = [*stepped, *(p for module in modules_of(loop) for p in module.parameters())]
    else:
        kept = {id(p) for p in stepped}
        dropped = [p for p in loop.model.parameters() if id(p) not in kept]
    for p in dropped:
        p.grad = None
    loop.gradients_pending = False

"""The check that what the optimizer steps is still what the model computes with."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from .parameters import modules_of, optimizer_parameters
from .state import LoopState

NamedParameters = Sequence[tuple[str, torch.Tensor]]


def trained_parameters(loop: LoopState) -> NamedParameters:
    """The parameters of the model that the optimizer has, at the beginning of a fit.

    Raises:
        RuntimeError: it has none of them, but others of the same shapes, such as those of a copy.
    """
    stepped = _stepped(loop)
    named = list(loop.model.named_parameters())
    trained = [(name, p) for name, p in named if id(p) in stepped]
    if not trained and named and _shapes(stepped.values()) == _shapes(p for _, p in named):
        raise RuntimeError(
            f"the optimizer has {_how_many(named)} of the same shapes as the model's, but none of"
            f" the model's own, so training would not change the model. {_HINT}"
        )
    return trained


def check_trained_parameters(loop: LoopState) -> None:
    """Raise if a receiver of BeforeFit has replaced parameters that the optimizer still has.

    It looks only at those that were the model's: an optimizer may have others, such as those of a
    loss. Called after BeforeFit.

    Raises:
        RuntimeError: the optimizer has parameters that the model no longer has.
    """
    before, loop.trained_parameters = loop.trained_parameters, []
    if not before:
        return
    stepped = _stepped(loop)
    # The model may have passed a parameter to another module of the learner.
    here = {id(p) for module in modules_of(loop) for p in module.parameters()}
    lost = [(name, p) for name, p in before if id(p) not in here and id(p) in stepped]
    if lost:
        raise RuntimeError(
            f"a receiver of BeforeFit has replaced {_how_many(lost)} of the model, and the"
            " optimizer still has the old ones, so training would not change the new ones."
            f" {_HINT}"
        )


_HINT = (
    "Some devices get new parameters from model.to(device): move the model, or replace it, before"
    " the optimizer is made; or make the optimizer again in BeforeFit, and set learner.opt"
)


def _stepped(loop: LoopState) -> dict[int, torch.Tensor]:
    return {id(p): p for p in optimizer_parameters(loop.opt)}


def _shapes(parameters: Iterable[torch.Tensor]) -> list[torch.Size]:
    return [p.shape for p in parameters]


def _how_many(named: NamedParameters) -> str:
    """How many parameters there are, with the names of the first."""
    names = ", ".join(name for name, _ in named[:3])
    more = ", ..." if len(named) > 3 else ""
    return f"{len(named)} parameter{'s' * (len(named) > 1)} ({names}{more})"

"""Ends a fit whose loss or gradients are not finite, before they reach the weights."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...engine.loop.loss import check_scalar
from ...engine.loop.parameters import optimizer_parameters, parameter_names
from ...events import (
    AfterLoss,
    BeforeFit,
    BeforeStep,
    Callback,
    CancelFitException,
    LearnerLike,
)
from .._checks import check_int


class TerminateOnNaNCB(Callback):
    """Ends the fit when a training loss, or a gradient that a step would use, is not finite.

    The weights stay those of the step before, and the gradients are dropped. Gradients are not
    checked while a callback is attached that is true in `scales_gradients`, as `MixedTrainingCB` is
    with float16: its `GradScaler` skips such a step.

    The host waits for the device twice per batch that is checked.

    Args:
        every: check every n-th training batch, and the gradients of the next step.

    Raises:
        ValueError: `every` is not a positive integer.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import TerminateOnNaNCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> batches[2] = (torch.ones(2, 3), torch.full((2, 1), float("inf")))
        >>> model = torch.nn.Linear(3, 1)
        >>> learner = TrainLearner(model, DataLoaders(batches), cbs=TerminateOnNaNCB())
        >>> learner.run(1, valid=False).reason
        'the loss is inf in batch 2 of epoch 0'

    Source: Keras's `TerminateOnNaN`, which checks only the loss, after the step.
    """

    order: float = 65  # after unscaling (60); clipping (70) would spread NaN to all gradients
    in_extra_validation = False

    def __init__(self, every: int = 1) -> None:
        self.every = check_int("every", every, "a number of batches, 1 or more")
        self._batches = 0
        self._due = False

    def before_fit(self, event: BeforeFit) -> None:
        self._batches = 0
        self._due = False

    def after_loss(self, event: AfterLoss) -> None:
        if not event.training:
            return
        self._batches += 1
        if self._batches % self.every:
            return
        self._due = True
        loss = check_scalar(event.learner.loss).item()  # the host waits for the device here
        if not math.isfinite(loss):
            raise CancelFitException(
                f"the loss is {loss} in batch {event.iter} of epoch {event.epoch}"
            )

    def before_step(self, event: BeforeStep) -> None:
        if not self._due:
            return
        self._due = False
        learner = event.learner
        scaled = any(getattr(cb, "scales_gradients", False) for cb in learner.cbs)
        if not scaled and (found := _not_finite(learner)):
            learner.opt.zero_grad()  # not ZeroGrad, which may keep gradients for the next fit
            raise CancelFitException(f"{found}, in batch {event.iter} of epoch {event.epoch}")

    def state_dict(self) -> dict[str, Any]:
        """The number of batches, and whether the gradients of the next step are to be checked."""
        return {"batches": self._batches, "due": self._due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._batches = state["batches"]
        self._due = state["due"]


def _not_finite(learner: LearnerLike) -> str | None:
    """Which gradients that the step would use are not finite, as text; None if all are."""
    names = parameter_names(learner)
    named = [
        (names.get(id(p), "a parameter outside of the model"), p.grad)
        for p in optimizer_parameters(learner.opt)
        if p.grad is not None
    ]
    values = [_values(grad) for _, grad in named]
    # The largest absolute value: if all are finite it is finite; their 2-norm could overflow.
    largest = torch.nn.utils.get_total_norm([v for v in values if v.numel()], math.inf)
    if largest.isfinite():  # the host waits for the device here
        return None
    counts = [int((~v.isfinite()).sum()) for v in values]  # and here, once per parameter
    bad = [(name, grad, n) for (name, grad), n in zip(named, counts, strict=True) if n]
    if not bad:
        return None  # the absolute value of a finite complex number may overflow
    (name, grad, n), *others = bad
    plural = "s" if len(others) > 1 else ""
    more = f" (nor that of {len(others)} other parameter{plural})" if others else ""
    return f"the gradient of {name} is not finite in {n} of {grad.numel()} values{more}"


def _values(grad: torch.Tensor) -> torch.Tensor:
    return grad.coalesce().values() if grad.is_sparse else grad

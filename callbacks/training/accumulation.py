"""Gradient accumulation: one optimizer step for several batches."""

from __future__ import annotations

import math
from typing import Any

from ...engine.loop.loss import check_loss
from ...events import (
    AfterBackward,
    AfterEpoch,
    AfterLoss,
    BeforeStep,
    Callback,
    CancelStepException,
    CleanupEpoch,
)
from .._checks import check_int


class GradientAccumulationCB(Callback):
    """Takes an optimizer step every `n` training batches, on the mean of their gradients.

    Each batch counts 1/n in the backward pass; `learner.loss` and what metrics see stay the
    true loss. The batches left at the end of an epoch make a step of their own, each counting
    1/(their number). Where the loader has no length, that number is known only afterwards, and
    the gradients are corrected then (with `MomentumLearner`, what it carries over too).

    A batch that takes no step cancels its step scope: `CleanupStep.end` says so, no `AfterStep`
    is emitted, and `AfterBatch` is.

    Args:
        n: batches a step.

    Raises:
        ValueError: `n` is no positive integer.

    Source: the post's `GradientAccumulationCB`, which cancels the batch instead, so that
    metrics miss it.
    """

    order = 50  # late on the loss; before anything that touches gradients to be stepped with

    def __init__(self, n: int) -> None:
        self.n = check_int("n", n, "the number of batches per step, 1 or more")
        self._forget()

    def _forget(self) -> None:
        self._waiting = 0  # batches whose gradients have not been stepped with
        self._weight = 0.0  # and what they count together, 1 for a full group
        self._group = self.n
        self._flushing = False

    def after_loss(self, event: AfterLoss) -> None:
        if not event.training:
            return
        if self._waiting == 0 and event.n_iter is not None:
            self._group = max(1, min(self.n, event.n_iter - event.iter))
        if (group := self._group) > 1:
            # On the gradient, not on the loss: whoever performs Backward, and whoever reads
            # the loss, need not know.
            check_loss(event.learner.loss).register_hook(lambda gradient: gradient / group)

    def after_backward(self, event: AfterBackward) -> None:
        self._waiting += 1
        self._weight += 1 / self._group

    def before_step(self, event: BeforeStep) -> None:
        if self._waiting < self._group and not self._flushing:
            raise CancelStepException(f"accumulating, {self._waiting} of {self._group}")
        if not math.isclose(self._weight, 1):
            for p in event.learner.model.parameters():
                if p.grad is not None:
                    p.grad /= self._weight
        self._forget()

    def after_epoch(self, event: AfterEpoch) -> None:
        if self._waiting:  # a tail that nobody could foresee
            self._flushing = True
            event.learner.one_step()

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        if self._waiting:  # the epoch was left in the middle of a group
            event.learner.opt.zero_grad()
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """How far the current group is."""
        return {"waiting": self._waiting, "weight": self._weight, "group": self._group}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to what `state_dict` returned."""
        self._waiting = state["waiting"]
        self._weight = state["weight"]
        self._group = state["group"]

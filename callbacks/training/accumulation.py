"""Gradient accumulation: one optimizer step per several batches."""

from __future__ import annotations

import math
from typing import Any

from ...engine.data.dataloaders import has_exact_length
from ...engine.loop.loss import check_loss
from ...engine.loop.parameters import all_optimizer_parameters
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

    Each batch has the weight 1/n in the backward pass; `learner.loss`, and the loss that metrics
    see, stay the true one. The batches that remain at the end of an epoch have a step of their
    own, each with the weight 1/(their number). Where the loader has no length, or one that may be
    wrong (of an iterable dataset, a sampler or a class of your own), the end of the epoch is known
    only when it is there: the last step is taken in AfterEpoch, with the order of this callback,
    and if there were other batches than the length said, the gradients are corrected before (with
    `MomentumLearner`, those carried over, too).

    For a batch without a step, the step scope is cancelled: `CleanupStep.end` reports it, no
    `AfterStep` is emitted, but `AfterBatch` is.

    Args:
        n: batches per step.

    Raises:
        ValueError: `n` is not a positive integer.

    Source: the post's `GradientAccumulationCB`, which cancels the batch instead, so that
    metrics miss it.
    """

    order: float = 50  # after changes of the loss, before what uses or changes gradients
    in_extra_validation = False

    def __init__(self, n: int) -> None:
        self.n = check_int("n", n, "the number of batches per step, 1 or more")
        self._forget()

    def _forget(self) -> None:
        self._waiting = 0  # batches since the last step
        self._weight = 0.0  # the sum of their weights, 1 for a full group
        self._group = self.n  # the number of batches whose mean is expected to be taken
        self._due = self.n  # the number of batches after which a step is taken
        self._flushing = False

    def after_loss(self, event: AfterLoss) -> None:
        if not event.training:
            return
        if self._waiting == 0 and event.n_iter is not None:
            self._group = max(1, min(self.n, event.n_iter - event.iter))
            is_exact = event.learner.epoch_length or has_exact_length(event.learner.dl)
            self._due = self._group if is_exact else self.n
        if (group := self._group) > 1:
            # The gradient is scaled, not the loss: neither the performer of Backward nor readers of
            # the loss are affected.
            check_loss(event.learner.loss).register_hook(lambda gradient: gradient / group)

    def after_backward(self, event: AfterBackward) -> None:
        self._waiting += 1
        self._weight += 1 / self._group

    def before_step(self, event: BeforeStep) -> None:
        if self._waiting < self._due and not self._flushing:
            raise CancelStepException(f"accumulating, {self._waiting} of {self._due}")
        if not math.isclose(self._weight, 1):
            for p in all_optimizer_parameters(event.learner):
                if p.grad is not None:
                    p.grad /= self._weight
        self._forget()

    def after_epoch(self, event: AfterEpoch) -> None:
        if self._waiting:  # the last group of a loader without a length that is certain
            self._flushing = True
            event.learner.one_step()

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        if self._waiting:  # the epoch was cancelled within a group
            for p in all_optimizer_parameters(event.learner):
                p.grad = None
        self._forget()

    def steps_in(self, n_batches: int) -> int:
        """One step for every group of `n` batches, and for those that remain."""
        return math.ceil(n_batches / self.n)

    def state_dict(self) -> dict[str, Any]:
        """The progress of the current group."""
        return {
            "waiting": self._waiting,
            "weight": self._weight,
            "group": self._group,
            "due": self._due,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._waiting = state["waiting"]
        self._weight = state["weight"]
        self._group = state["group"]
        self._due = state["due"]

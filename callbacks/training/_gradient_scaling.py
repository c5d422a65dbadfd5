"""What a gradient scaler does to the gradients in the course of a fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...engine.loop.loss import check_loss
from ...engine.loop.parameters import (
    all_optimizer_parameters,
    optimizer_parameters,
    parameters_of_step,
)
from ...events import LearnerLike


class GradientScaling:
    """Keeps track of whether the gradients of one fit are scaled.

    They are scaled from the beginning of the fit to its end, except inside a step. Gradients that
    are kept, such as those of momentum, are scaled, too: the next backward pass adds scaled ones.

    Args:
        scaler: the scaler of the fit.
        learner: the learner, whose optimizers' gradients are scaled.

    Attributes:
        unscaled: set it when the gradients have been unscaled for a step.
        updated: set it when the scaler has been updated in that step.
    """

    def __init__(self, scaler: torch.amp.GradScaler, learner: LearnerLike) -> None:
        self.scaler = scaler
        self._stepper: Any = None  # of the current step; Any, because it is not an Optimizer
        parameters = all_optimizer_parameters(learner)
        # A resumed fit may begin with the step of batches that were accumulated before.
        scaler.scale(torch.zeros((), device=parameters[0].device if parameters else "cpu"))
        self._scale(learner)
        self._scaled = True

    @contextmanager
    def scaled_loss(self, learner: LearnerLike) -> Iterator[None]:
        """While this context is entered, `learner.loss` is scaled: for its backward pass."""
        loss = check_loss(learner.loss)
        learner.loss = scaled = self.scaler.scale(loss)
        try:
            yield
        finally:
            if learner.loss is scaled:
                learner.loss = loss

    def unscale(self, learner: LearnerLike) -> None:
        """Unscale the gradients, before a step."""
        self._stepper = AsOptimizer(parameters_of_step(learner))
        self.scaler.unscale_(self._stepper)
        if learner.updating is not None:
            self.unscale_others(learner)
        self.unscaled = True

    def step(self, learner: LearnerLike, proceed: Callable[[], None]) -> tuple[float, float] | None:
        """Have the step done by `proceed`, unless a gradient has overflowed; update the scaler.

        Returns the scale before and after a step that was skipped, None after any other.
        """
        # The host waits for the device here: the scaler asks whether any gradient overflowed.
        before, stepped = self.scaler.get_scale(), False

        def step() -> None:
            nonlocal stepped
            stepped = True
            proceed()

        self._stepper.step = step
        self.scaler.step(self._stepper)
        self.scaler.update()  # by the gradients of other optimizers, too
        self.updated = True
        if stepped:
            return None
        for p in parameters_of_step(learner):
            p.grad = None  # not by ZeroGrad, which may keep gradients that overflowed
        return before, self.scaler.get_scale()

    def unscale_others(self, learner: LearnerLike) -> None:
        """Unscale the gradients of the learner's optimizers other than that of the step."""
        own = {id(p) for p in optimizer_parameters(learner.opt)}
        others = [p for p in all_optimizer_parameters(learner) if id(p) not in own]
        if any(p.grad is not None for p in others):
            view: Any = AsOptimizer(others)  # Any, because it is not an Optimizer
            self.scaler.unscale_(view)

    def end_step(self, learner: LearnerLike) -> None:
        """Scale again the gradients that the step has left."""
        if not self.unscaled:
            return
        if not self.updated:  # another receiver cancelled the step
            self.scaler.update()
        self._scale(learner)

    def end_fit(self, learner: LearnerLike) -> None:
        """Undo the scaling of the gradients that are kept, once."""
        if self._scaled:
            for p in all_optimizer_parameters(learner):
                if p.grad is not None:
                    p.grad /= self.scaler.get_scale()
        self._scaled = False

    def _scale(self, learner: LearnerLike) -> None:
        for p in all_optimizer_parameters(learner):
            if p.grad is not None:
                p.grad = self.scaler.scale(p.grad)
        self.unscaled = self.updated = False


class AsOptimizer:
    """Parameters as `GradScaler` takes them: those of an optimizer.

    Attributes:
        step: what `GradScaler.step` calls, unless a gradient has overflowed.
    """

    step: Callable[[], None]

    def __init__(self, parameters: list[torch.Tensor]) -> None:
        self.param_groups = [{"params": parameters}]

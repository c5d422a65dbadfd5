"""Gradient clipping by norm."""

from __future__ import annotations

import torch

from ...engine.loop.parameters import optimizer_parameters
from ...events import BeforeStep, Callback


class GradientClippingCB(Callback):
    """Scales the gradients down to a norm of at most `max_norm` before each optimizer step.

    It sees the gradients that the step uses: those of the optimizer's parameters, accumulated over
    all batches of the step, and unscaled in mixed precision.

    Args:
        max_norm: the largest norm that is allowed.
        norm_type: the p of the p-norm; `inf` is for the largest absolute value.

    Attributes:
        total_norm: the norm before clipping, on the device; None before the first step.

    Raises:
        ValueError: `max_norm` is not positive.

    Source: the post's `GradientClippingCB`, on `torch.nn.utils.clip_grad_norm_`.
    """

    not_with_closures = "it clips the first gradients alone"
    order: float = 70  # after accumulation (50) and unscaling (60)

    def __init__(self, max_norm: float = 1.0, norm_type: float = 2.0) -> None:
        if not max_norm > 0:
            raise ValueError(f"max_norm={max_norm!r}: give a positive number")
        self.max_norm = max_norm
        self.norm_type = norm_type
        self.total_norm: torch.Tensor | None = None

    def before_step(self, event: BeforeStep) -> None:
        self.total_norm = torch.nn.utils.clip_grad_norm_(
            optimizer_parameters(event.learner.opt), self.max_norm, self.norm_type
        )

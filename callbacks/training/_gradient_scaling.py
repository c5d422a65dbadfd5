"""What a gradient scaler does to the gradients in the course of a fit."""

from __future__ import annotations

import torch


class GradientScaling:
    """Keeps track of whether the gradients of one fit are scaled.

    They are scaled from the beginning of the fit to its end, except inside a step. Gradients that
    are kept, such as those of momentum, are scaled, too: the next backward pass adds scaled ones.

    Args:
        scaler: the scaler of the fit.
        model: the model whose gradients there are.

    Attributes:
        unscaled: set it when the gradients have been unscaled for a step.
        updated: set it when the scaler has been updated in that step.
    """

    def __init__(self, scaler: torch.amp.GradScaler, model: torch.nn.Module) -> None:
        self.scaler = scaler
        self._scale(model)
        self._scaled = True

    def end_step(self, model: torch.nn.Module) -> None:
        """Scale again the gradients that the step has left."""
        if not self.unscaled:
            return
        if not self.updated:  # another receiver cancelled the step
            self.scaler.update()
        self._scale(model)

    def end_fit(self, model: torch.nn.Module) -> None:
        """Undo the scaling of the gradients that are kept, once."""
        if self._scaled:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad /= self.scaler.get_scale()
        self._scaled = False

    def _scale(self, model: torch.nn.Module) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad = self.scaler.scale(p.grad)
        self.unscaled = self.updated = False

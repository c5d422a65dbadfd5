"""What a training consists of: the events of a batch, weights and gradients to compare."""

from __future__ import annotations

import torch
from torch import nn

TRAIN_BATCH = [
    "BeforeBatch",
    "AfterPredict",
    "AfterLoss",
    "AfterBackward",
    "BeforeStep",
    "AfterStep",
    "CleanupStep",
    "AfterBatch",
    "CleanupBatch",
]
"""The events of one training batch."""
VALID_BATCH = ["BeforeBatch", "AfterPredict", "AfterLoss", "AfterBatch", "CleanupBatch"]
"""The events of one validation batch."""


def line_model() -> nn.Module:
    """A line; the same one every time."""
    torch.manual_seed(42)
    return nn.Linear(3, 1)


def weights(model: nn.Module) -> torch.Tensor:
    """A copy of all weights, in one row, on the CPU."""
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


def gradients(model: nn.Module) -> torch.Tensor:
    """A copy of all gradients, in one row, on the CPU."""
    return torch.cat([p.grad.cpu().flatten() for p in model.parameters() if p.grad is not None])

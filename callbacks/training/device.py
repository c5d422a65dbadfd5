"""Move the model and the batches to a device."""

from __future__ import annotations

from typing import Any

import torch

from ...engine.data.containers import has_to, map_tensors
from ...events import BeforeBatch, BeforeFit, Callback

def_device = getattr(torch.accelerator.current_accelerator(check_available=True), "type", "cpu")
"""The device of this machine: the type of its accelerator, such as "cuda" or "mps", or "cpu"."""


def to_device(x: Any, device: str | torch.device = def_device, non_blocking: bool = False) -> Any:
    """Move every tensor in `x`, and everything else that has a `.to()`, to a device.

    Args:
        x: tensors and other objects with `.to()`, alone or nested in containers.
        device: the device to move them to.
        non_blocking: whether not to wait for the copy; useful from pinned memory.

    Source: the post's `to_device`.
    """

    def move(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return x.to(device, non_blocking=non_blocking)
        return x.to(device)  # such as a packed sequence or a tokenizer's encoding

    return map_tensors(x, move, leaf=has_to)


def to_cpu(x: Any) -> Any:
    """Detach every tensor in `x` and copy it to the CPU. The host waits for the device.

    Source: the post's `to_cpu`.
    """
    return map_tensors(x, lambda t: t.detach().cpu())


class DeviceCB(Callback):
    """Moves the model before the fit, and each batch before it is used.

    Args:
        device: the device to move them to; by default `def_device`.
        non_blocking: whether a batch may be copied asynchronously.

    Source: the post's `DeviceCB`.
    """

    order: float = -20
    shareable = True

    def __init__(self, device: str | torch.device = def_device, non_blocking: bool = False) -> None:
        self.device = torch.device(device)
        self.non_blocking = non_blocking

    def before_fit(self, event: BeforeFit) -> None:
        event.learner.model.to(self.device)

    def before_batch(self, event: BeforeBatch) -> None:
        learner = event.learner
        learner.batch = to_device(learner.batch, self.device, self.non_blocking)

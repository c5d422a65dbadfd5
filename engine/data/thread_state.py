"""The state that torch keeps per thread, to be passed on to a new thread."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .accelerator import initialized_accelerator


def torch_state() -> Callable[[], None]:
    """Return a function that gives another thread this one's default and current device."""
    device = torch.get_default_device()
    in_use = initialized_accelerator() is not None
    index = torch.accelerator.current_device_index() if in_use else None

    def enter() -> None:
        if device.type != "cpu":
            torch.set_default_device(device)
        if index is not None:
            torch.accelerator.set_device_index(index)

    return enter

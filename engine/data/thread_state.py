"""What of torch's state belongs to a thread, and is handed on to one that is started."""

from __future__ import annotations

from collections.abc import Callable

import torch


def torch_state() -> Callable[[], None]:
    """What a new thread does not inherit from this one: the default and the CUDA device."""
    device = torch.get_default_device()
    initialized = torch.cuda.is_initialized()
    cuda = torch.cuda.current_device() if initialized else None

    def enter() -> None:
        if device.type != "cpu":
            torch.set_default_device(device)
        if cuda is not None:
            torch.cuda.set_device(cuda)

    return enter

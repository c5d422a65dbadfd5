"""The state that torch keeps per thread, to be passed on to a new thread."""

from __future__ import annotations

from collections.abc import Callable

import torch


def torch_state() -> Callable[[], None]:
    """Return a function that gives another thread the default and the CUDA device of this one."""
    device = torch.get_default_device()
    initialized = torch.cuda.is_initialized()
    cuda = torch.cuda.current_device() if initialized else None

    def enter() -> None:
        if device.type != "cpu":
            torch.set_default_device(device)
        if cuda is not None:
            torch.cuda.set_device(cuda)

    return enter

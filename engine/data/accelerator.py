"""The accelerator of this process: CUDA, XPU, MPS, or the device of a backend outside of torch."""

from __future__ import annotations

from functools import cache

import torch


def initialized_accelerator() -> torch.device | None:
    """The accelerator, if this process has used it; asking does not initialize it."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    in_use = getattr(module, "is_initialized", module.is_available)  # MPS has no is_initialized
    return device if in_use() else None


def is_accelerator(device: torch.device) -> bool:
    """Whether a device is of the type of this process's accelerator, if there is one."""
    accelerator = torch.accelerator.current_accelerator()
    return accelerator is not None and accelerator.type == device.type


@cache
def has_pinned_memory(device_type: str) -> bool:
    """Whether the host's memory can be pinned, for asynchronous copies to and from a device."""
    # MPS shares the host's memory, and torch's DataLoader does not pin for it.
    if device_type == "mps" or not is_accelerator(torch.device(device_type)):
        return False
    try:
        return torch.empty(1, pin_memory=True).is_pinned()
    except RuntimeError:
        return False


@cache
def has_float64(device: torch.device) -> bool:
    """Whether a device has numbers of double precision; some GPUs of Apple and Intel do not."""
    if not is_accelerator(device):
        return True
    try:
        return torch.float64 in torch.accelerator.get_device_capability(device)["supported_dtypes"]
    except RuntimeError:  # the device does not tell
        return device.type != "mps"


def copy_to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to a device: asynchronously, from pinned memory, where the device has it."""
    pinned = tensor.device.type != "cpu" or tensor.is_pinned()
    if not pinned and has_pinned_memory(device.type):
        tensor, pinned = torch.empty_like(tensor, pin_memory=True).copy_(tensor), True
    return tensor.to(device, non_blocking=pinned)


def copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Start to copy a tensor to the host: into pinned memory, where the device has it.

    Before the copy is read, the host has to wait for an event that is recorded after this call.
    """
    pinned = has_pinned_memory(tensor.device.type)
    copy = torch.empty_like(tensor, device="cpu", pin_memory=pinned)
    return copy.copy_(tensor, non_blocking=True)

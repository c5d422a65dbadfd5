"""A number that is on its way from the device."""

from __future__ import annotations

import torch


class PendingScalar:
    """The number in a tensor. It is copied to the host while the device goes on working, and
    is read when it has arrived: nobody waits for it who does not ask to.

    Args:
        tensor: one number, on any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor.to("cpu", non_blocking=True)
        self._arrived: torch.Event | None = None
        if tensor.device.type != "cpu":
            self._arrived = torch.Event(tensor.device)
            self._arrived.record(torch.accelerator.current_stream(tensor.device))

    def get(self, wait: bool = False) -> float | None:
        """The number, None if it has not arrived; with `wait`, the host waits for the device."""
        if self._arrived is not None and not self._arrived.query():
            if not wait:
                return None
            self._arrived.synchronize()
        return float(self._copy.item())

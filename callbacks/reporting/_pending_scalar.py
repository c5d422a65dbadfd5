"""A number that is being copied from the device to the host."""

from __future__ import annotations

import anyio
import torch

from ...engine.data.accelerator import copy_to_host

DEVICE_POLL = 0.005
"""Seconds between two questions to a device whether a number has arrived."""


class PendingScalar:
    """The number in a tensor, copied to the host asynchronously and read when it has arrived.

    Args:
        tensor: a tensor with one element, on any device.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self._copy = tensor
        self._arrived: torch.Event | None = None
        if tensor.device.type != "cpu":
            self._copy = copy_to_host(tensor)
            self._arrived = torch.Event(tensor.device)
            self._arrived.record(torch.accelerator.current_stream(tensor.device))

    def get(self, wait: bool = False) -> float | None:
        """The number; None if it has not arrived. With `wait`, the host waits for the device."""
        if self._arrived is not None and not self._arrived.query():
            if not wait:
                return None
            self._arrived.synchronize()
        return float(self._copy.item())

    async def arrival(self) -> float:
        """Wait for the number while the event loop goes on."""
        while (number := self.get()) is None:  # noqa: ASYNC110 - a device sets no anyio.Event
            await anyio.sleep(DEVICE_POLL)
        return number

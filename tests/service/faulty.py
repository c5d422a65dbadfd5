"""The service with data that fails, or that is slow: python -m tests.service.faulty.

"digits" are scikit-learn's, but they fail after ten batches. "fashion-mnist" is eight random
images. Environment variables say how long reading one takes: SECONDS, or, where a test decides it,
until the file GATE has a byte for it; a read that waits is logged as "waiting_for_image". What is
sent to a client that does not read soon fills its socket.
"""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import structlog
import torch
from torch.utils.data import Dataset

from examples.datasets import digits_in_memory
from examples.service import __main__ as service


class Broken(Dataset[Any]):
    """Raises when it has been read for a while."""

    def __init__(self, whole: Dataset[Any]) -> None:
        self.whole = whole
        self.reads = 0

    def __len__(self) -> int:
        return len(self.whole)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        if self.reads > 640:
            raise OSError("the disk is gone\nand with it the data")
        return self.whole[index]


class Slow(Dataset[Any]):
    """Eight images; each takes a while."""

    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        time.sleep(float(os.environ.get("SECONDS", "0")))
        self.reads += 1
        if (gate := os.environ.get("GATE")) and os.path.getsize(gate) < self.reads:
            structlog.get_logger().info("waiting_for_image", number=self.reads)
            while os.path.getsize(gate) < self.reads:
                time.sleep(0.01)
        return torch.rand(1, 8, 8, generator=torch.Generator()), 0


class Server(service.Server):
    """Has small buffers for what it sends: on loopback, the kernel would take megabytes."""

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        listener = self.config.bind_socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 32_768)
        super().run([listener])


def load(name: str) -> Any:
    if name == "digits":
        train, valid = digits_in_memory()
        return Broken(train), valid
    return Slow(), Slow()


if __name__ == "__main__":
    service.Server = Server  # type: ignore[misc]
    service.load = lambda folder: {name: load(name) for name in ("digits", "fashion-mnist")}
    service.main()

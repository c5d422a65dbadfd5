"""A loader that reads the next batch, and copies it to the device, while this one trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import torch

from ...events.checks import is_int
from .async_loader import AsyncLoader, can_be_iterated, is_async
from .thread_state import ReadingThread
from .transfer import transfer_to


class Prefetcher:
    """Reads a loader ahead, in a thread, and copies its batches to a device on a separate stream.

    Every iteration is read by one thread, which ends with the iteration. When the iteration is left
    early, by a cancel or an error, it waits for the batch that is being read. At most `depth`
    batches are held, including the one that is being read, but not the one in use.

    The training waits for the first batch. A DataLoader and its sampler draw from torch's global
    random state while that batch is read, so batches and weights are the same as without a
    Prefetcher. A dataset that draws from it later, such as for a random crop with `num_workers=0`,
    does so at an undefined moment of the training: give it a generator of its own, or use
    `num_workers`. An iteration that is left early has drawn for batches that were never used.

    It helps if the host is idle while the training runs on an accelerator; a model on the CPU
    needs the cores that the reading would take.

    Args:
        loader: any iterable of batches; each iteration is read in one thread, not the caller's.
        device: where to copy the tensors, also those in nested containers, and other objects with
            a `.to()`. Copies are asynchronous, on a stream of their own and from pinned
            memory, where the device has these. None leaves batches as they are.
        depth: how many batches to read ahead, 1 or more.

    Raises:
        TypeError: `loader` cannot be iterated.
        ValueError: `depth` is not an integer of 1 or more, or this machine has no such device.

    Example:
        >>> ahead = Prefetcher([torch.zeros(4), torch.ones(2)], depth=2)
        >>> len(ahead), [len(batch) for batch in ahead]
        (2, [4, 2])

    Source: the `data_prefetcher` of NVIDIA's apex.
    """

    def __init__(
        self, loader: Iterable[Any], device: str | torch.device | None = None, depth: int = 1
    ) -> None:
        if is_async(loader) or isinstance(loader, AsyncLoader):
            raise TypeError(
                f"loader={loader!r} is read on the event loop, ahead of the training, and without"
                " a Prefetcher: use AsyncLoader(source, buffer=...)"
            )
        if not can_be_iterated(loader):
            raise TypeError(f"loader={loader!r} cannot be iterated; use a DataLoader")
        if not is_int(depth, 1):
            raise ValueError(f"depth={depth!r}: give an integer, 1 or more")
        self.loader = loader
        self.depth = depth
        self._transfer = transfer_to(device)
        self.device = self._transfer.device

    def __repr__(self) -> str:
        where = "" if self.device is None else f"device={str(self.device)!r}, "
        return f"Prefetcher({self.loader!r}, {where}depth={self.depth})"

    def __len__(self) -> int:
        return len(self.loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        receive = self._transfer.receive
        reader = _Reader(self.loader, self._transfer.send, self.depth)
        try:
            reader.start()
            while box := reader.ready.get():
                reader.free.put(None)
                yield receive(box.pop())
            if reader.error is not None:
                raise reader.error
        finally:
            reader.leave()


class _Reader(ReadingThread):
    """The thread that reads one iteration."""

    def __init__(self, loader: Iterable[Any], send: Callable[[Any], Any], depth: int) -> None:
        super().__init__("prefetch")
        self.loader, self.send = loader, send
        # Each batch is in a list, so that neither thread keeps a reference; an empty list ends it.
        self.ready: SimpleQueue[list[Any]] = SimpleQueue()
        # One item for each batch that may be read after the first.
        self.free: SimpleQueue[None] = SimpleQueue()
        for _ in range(depth - 1):
            self.free.put(None)
        self.left = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            super().run()
        except BaseException as exc:  # a loader may raise a cancel
            self.error = exc
        finally:
            self.ready.put([])

    def read(self) -> None:
        for batch in self.loader:
            box = [self.send(batch)]
            del batch  # once it is handed out, only its user holds it
            self.ready.put(box)
            self.free.get()
            if self.left:
                break

    def stop(self) -> None:
        self.left = True
        self.free.put(None)

    def leave(self) -> None:
        """End the thread, and wait until it has ended."""
        self.stop()
        self.wait()
        self.error = None  # avoids a reference cycle of the error, its traceback and this object

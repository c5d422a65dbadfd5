"""The next batch is read, and copied to the device, while this one trains."""

from __future__ import annotations

import contextvars
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import Any

import torch

from .thread_state import torch_state
from .transfer import transfer_to


class Prefetcher:
    """Reads a loader ahead, in a thread, and copies its batches to a device on a stream of its own.

    Every iteration is read by one thread, which ends with it: left early, by a cancel or an error,
    it waits for the batch that is being read. At most `depth` batches are held, the one that is
    being read among them, the one handed out not.

    The first batch is waited for: what a DataLoader and its sampler draw from torch's global
    random state they draw there, so batches and weights are those without a Prefetcher. What a
    dataset draws from it later, for a random crop with `num_workers=0`, say, it draws at no fixed
    moment of the training: give it a generator of its own, or take `num_workers`. An iteration
    that is left early has drawn for batches that nobody got.

    It pays where the training leaves the host idle, on an accelerator; a model on the CPU wants
    the cores that the reading would take.

    Args:
        loader: any iterable of batches; an iteration of it is read in one thread, not the caller's.
        device: where to copy the tensors, in nested containers too, and whatever else has a
            `.to()`. To CUDA they go from pinned memory, and the host never waits. None leaves
            batches as they are.
        depth: how many batches to be ahead, 1 or more.

    Raises:
        TypeError: `loader` cannot be iterated.
        ValueError: `depth` is less than 1, or there is no such device here.

    Example:
        >>> ahead = Prefetcher([torch.zeros(4), torch.ones(2)], depth=2)
        >>> len(ahead), [len(batch) for batch in ahead]
        (2, [4, 2])

    Source: the `data_prefetcher` of NVIDIA's apex.
    """

    def __init__(
        self, loader: Iterable[Any], device: str | torch.device | None = None, depth: int = 1
    ) -> None:
        if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
            raise TypeError(f"loader={loader!r} cannot be iterated; a DataLoader, say, can")
        if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
            raise ValueError(f"depth={depth!r}: give a whole number, 1 or more")
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


class _Reader(threading.Thread):
    """The thread of one iteration."""

    def __init__(self, loader: Iterable[Any], send: Callable[[Any], Any], depth: int) -> None:
        name = threading.current_thread().name.removeprefix("eventrain-")
        super().__init__(name=f"eventrain-prefetch-{name}", daemon=True)
        self.loader, self.send = loader, send
        self.ready: SimpleQueue[list[Any]] = SimpleQueue()  # each batch in a box, then an empty one
        self.free: SimpleQueue[None] = SimpleQueue()  # as many as may be read after the first
        for _ in range(depth - 1):
            self.free.put(None)
        self.left = False
        self.error: BaseException | None = None
        self.inherited = contextvars.copy_context(), torch_state(), torch.is_grad_enabled()

    def run(self) -> None:
        context, enter_torch_state, grad = self.inherited
        try:
            enter_torch_state()
            torch.set_grad_enabled(grad)
            context.run(self._read)
        except BaseException as exc:  # a loader may raise a cancel
            self.error = exc
        finally:
            self.ready.put([])

    def _read(self) -> None:
        for batch in self.loader:
            box = [self.send(batch)]
            del batch  # before it is handed out: then it is not ours any more
            self.ready.put(box)
            self.free.get()
            if self.left:
                break

    def leave(self) -> None:
        """End the thread, and wait for that, but not in it nor for one that sleeps forever."""
        self.left = True
        self.free.put(None)
        collected_in_it = self is threading.current_thread()
        if self.is_alive() and not collected_in_it and not sys.is_finalizing():
            self.join()
        self.error = None  # no circle of it, its traceback and this object

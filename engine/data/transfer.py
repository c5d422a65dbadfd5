"""The transfer of a batch from the thread that reads it to a device and another thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch

from .accelerator import copy_to_device, is_accelerator
from .containers import has_to, map_tensors


def transfer_to(device: str | torch.device | None) -> Transfer:
    """Choose the transfer to a device; with None, batches stay where they are.

    Raises:
        ValueError: this machine has no such device.
    """
    if device is None:
        return Transfer()
    hint = "give another, such as 'cuda:0', or None to leave batches where they are"
    try:
        target = torch.device(device)
        count = torch.get_device_module(target).device_count()
    except RuntimeError as exc:
        raise ValueError(f"device={device!r}: {exc}; {hint}") from exc
    if (target.index or 0) >= count:
        raise ValueError(f"device={device!r}: torch finds {count} such devices here; {hint}")
    return _To(target)


class Transfer:
    """Leaves batches where they are."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def send(self, batch: Any) -> Any:
        """Called with a batch in the thread that reads it."""
        return batch

    def receive(self, sent: Any) -> Any:
        """Called in the thread that computes; turns what `send` returned into the batch to use."""
        return sent


class _To(Transfer):
    """Copies to a device, on a stream of its own where the device has several streams.

    With a stream, neither thread waits for the device: the copies run concurrently with the
    computation, and the stream that computes waits for them. Without one, only the reading thread
    may have to wait.
    """

    device: torch.device

    @cached_property
    def _stream(self) -> torch.Stream | None:
        """One stream for all copies, because torch caches memory per stream."""
        device = self.device
        if not is_accelerator(device):
            return None
        if device.index is None:
            device = torch.device(device.type, torch.accelerator.current_device_index())
        try:
            stream = torch.Stream(device)
            torch.empty(0, device=device).record_stream(stream)
        except RuntimeError:  # MPS, for example, has one stream
            return None
        return stream

    def send(self, batch: Any) -> Any:
        stream = self._stream
        if stream is None:
            return map_tensors(batch, lambda x: x.to(self.device), has_to), None
        with _current(stream):
            return map_tensors(batch, self._copy, has_to), stream.record_event()

    def receive(self, sent: Any) -> Any:
        batch, copied = sent
        if copied is None:
            return batch
        assert self._stream is not None
        device = self._stream.device
        current = torch.accelerator.current_stream(device)
        current.wait_event(copied)

        def arrive(x: Any) -> Any:
            if not _is_plain(x):
                return x.to(device)
            x.record_stream(current)  # or a later copy could reuse its memory too early
            return x

        return map_tensors(batch, arrive, has_to)

    def _copy(self, x: Any) -> Any:
        if not _is_plain(x):
            return x  # such as a packed sequence, whose memory is not known; `arrive` copies it
        return copy_to_device(x, self.device)


@contextmanager
def _current(stream: torch.Stream) -> Iterator[None]:
    """Make a stream the current one. Several threads may do so at once, unlike in `with stream`."""
    with torch.accelerator.device_index(stream.device.index):
        previous = torch.accelerator.current_stream(stream.device)
        torch.accelerator.set_stream(stream)
        try:
            yield
        finally:
            torch.accelerator.set_stream(previous)


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout is torch.strided

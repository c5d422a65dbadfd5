"""The transfer of a batch from the thread that reads it to a device and another thread."""

from __future__ import annotations

from typing import Any

import torch

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
    return (_ToCUDA if target.type == "cuda" else _To)(target)


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
    """Copies with `.to(device)`, for which only the reading thread may have to wait."""

    def send(self, batch: Any) -> Any:
        return map_tensors(batch, lambda x: x.to(self.device), has_to)


class _ToCUDA(Transfer):
    """Copies from pinned memory on a separate stream, concurrently with the computation.

    Neither thread waits for the device: the stream that computes waits for the copy.
    """

    _stream: torch.cuda.Stream | None = None

    def send(self, batch: Any) -> Any:
        if self._stream is None:  # one stream for all, because torch caches memory per stream
            self._stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(self._stream):
            copies = map_tensors(batch, self._copy, has_to)
            return copies, self._stream.device, self._stream.record_event()

    def receive(self, sent: Any) -> Any:
        batch, device, copied = sent
        current = torch.cuda.current_stream(device)
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
        if x.device.type == "cpu" and not x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
        return x.to(self.device, non_blocking=True)


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout is torch.strided

"""How a batch gets from the thread that reads it to a device, and into use in another thread."""

from __future__ import annotations

from typing import Any

import torch

from .containers import has_to, map_tensors


def transfer_to(device: str | torch.device | None) -> Transfer:
    """The way to a device; None is no way at all.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return Transfer()
    instead = "give another, such as 'cuda:0', or None to leave batches where they are"
    try:
        where = torch.device(device)
        found = torch.get_device_module(where).device_count()
    except RuntimeError as exc:
        raise ValueError(f"device={device!r}: {exc}; {instead}") from exc
    if (where.index or 0) >= found:
        raise ValueError(f"device={device!r}: torch finds {found} such devices here; {instead}")
    return (_ToCUDA if where.type == "cuda" else _To)(where)


class Transfer:
    """Leaves batches where they are."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device

    def send(self, batch: Any) -> Any:
        """In the thread that reads."""
        return batch

    def receive(self, sent: Any) -> Any:
        """In the thread that computes: what was sent, to be used from now on."""
        return sent


class _To(Transfer):
    """Copies as `to_device` does. The reading thread may have to wait for it, and no other."""

    def send(self, batch: Any) -> Any:
        return map_tensors(batch, lambda x: x.to(self.device), has_to)


class _ToCUDA(Transfer):
    """Copies from pinned memory on a stream of its own, beside what is computed.

    Neither thread waits: the stream that computes waits for the copy.
    """

    _stream: torch.cuda.Stream | None = None

    def send(self, batch: Any) -> Any:
        if self._stream is None:  # kept, as memory is cached by stream
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
            x.record_stream(current)  # or a later copy would be given its memory too early
            return x

        return map_tensors(batch, arrive, has_to)

    def _copy(self, x: Any) -> Any:
        if not _is_plain(x):
            return x  # a packed sequence, say: whose memory it has is not known, see `arrive`
        if x.device.type == "cpu" and not x.is_pinned():
            x = torch.empty_like(x, pin_memory=True).copy_(x)
        return x.to(self.device, non_blocking=True)


def _is_plain(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.layout is torch.strided

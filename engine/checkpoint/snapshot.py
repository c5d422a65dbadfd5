"""A copy of a fit's state on the host, so that the training can continue while it is written."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from enum import Enum
from os import PathLike, fspath
from typing import Any

import torch

from ..data.accelerator import copy_to_host
from .sparse import encode_sparse


class Snapshot:
    """A copy of a value on the host, of the plain types that `torch.load(weights_only=True)` reads.

    Copies from a device are asynchronous; call `wait` before the host reads them.

    Args:
        value: nested mappings and lists of tensors and plain values.
        where: the name of the value, for errors.
        over: an older snapshot whose memory is reused: on the CPU, most of the time of a copy is
            spent on allocating new memory.

    Raises:
        TypeError: the value contains something that a checkpoint cannot hold; the error names it.
    """

    def __init__(self, value: Any, where: str = "state", *, over: Snapshot | None = None) -> None:
        self._old = over._copies if over is not None else {}
        self._copies: dict[str, torch.Tensor] = {}
        self._tied: dict[Any, torch.Tensor] = {}  # tied weights stay tied
        self._copied: dict[torch.device, torch.Event] = {}
        self.value = self._to_plain(value, where)
        self._old = {}
        for device in {key[-1] for key in self._tied} - {torch.device("cpu")}:
            self._copied[device] = torch.Event(device)
            self._copied[device].record(torch.accelerator.current_stream(device))

    def wait(self) -> Any:
        """Return the value once all copies are complete. The host waits for the device here."""
        for event in self._copied.values():
            event.synchronize()
        return self.value

    def _to_plain(self, value: Any, where: str) -> Any:
        if torch.nn.parameter.is_lazy(value):
            return None  # it has no values yet
        is_tensor = isinstance(value, torch.Tensor)
        if is_tensor and value.layout is torch.sparse_coo:
            value = value.detach()
            indices = self._copy(value._indices(), f"{where}.indices")
            return encode_sparse(indices, self._copy(value._values(), f"{where}.values"), value)
        if (
            is_tensor
            and value.layout is torch.strided
            and not value.is_meta
            and not value.is_nested
        ):
            return self._copy(value.detach(), where)
        if isinstance(value, Enum):
            return self._to_plain(value.value, where)
        if isinstance(value, int) and value.bit_length() > 2039:  # torch reads at most 2039 bits
            raise TypeError(f"{where} is an integer of {value.bit_length()} bits: use a string")
        if value is None or type(value) in _PLAIN:
            return value
        for plain in _NUMBERS_AND_STRINGS:
            if isinstance(value, plain):  # a subclass, such as numpy.float64
                return plain(value)  # type: ignore[arg-type]
        if isinstance(value, Mapping):
            items = {}
            for key, item in value.items():
                place = f"{where}[{key!r}]"
                items[self._to_plain(key, f"the key {place}")] = self._to_plain(item, place)
            if isinstance(value, Counter):  # a MultiStepLR needs the methods of its Counter
                return Counter(items)
            if not isinstance(value, OrderedDict):
                return items
            ordered = OrderedDict(items)
            vars(ordered).update(vars(value))  # load_state_dict needs the versions of modules
            return ordered
        if isinstance(value, list | tuple | deque):
            listed = [self._to_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return tuple(listed) if isinstance(value, tuple) else listed
        if isinstance(value, PathLike):
            return fspath(value)
        if hasattr(value, "dtype") and hasattr(value, "tolist") and not is_tensor:  # numpy
            return torch.as_tensor(value).clone() if value.ndim else value.item()
        raise TypeError(
            f"{where} is {value!r}, which a checkpoint cannot hold: it is read without running"
            " code, so use tensors, numbers, strings, and lists and dicts of them"
        )

    def _copy(self, tensor: torch.Tensor, where: str) -> torch.Tensor:
        key = (
            tensor.data_ptr(),
            tensor.is_conj(),
            tensor.is_neg(),
            *_layout(tensor),
            tensor.device,
        )
        has_address = tensor.data_ptr() != 0  # not on every device
        if has_address and key in self._tied:
            return self._tied[key]
        old = self._old.get(where)
        if old is not None and _layout(old) == _layout(tensor):
            copy = old.copy_(tensor, non_blocking=True)
        elif tensor.device.type == "cpu":
            copy = tensor.clone()
        else:  # asynchronous; the stream runs it before the next step
            copy = copy_to_host(tensor)
        self._copies[where] = self._tied[key] = copy
        return copy


def _layout(tensor: torch.Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


_NUMBERS_AND_STRINGS = (int, float, complex, str)
_PLAIN = (*_NUMBERS_AND_STRINGS, bool, torch.dtype, torch.device, torch.Size)

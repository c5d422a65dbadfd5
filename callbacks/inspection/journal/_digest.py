"""A digest of values, to find out whether they are the same, on whatever device they are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import Any

import torch


def digest(value: Any) -> str:
    """16 hexadecimal digits of the SHA-256 of `value`, whose tensors are copied to the host.

    Equal values have equal digests: in a tuple or a list, on any device, of Python or of numpy. Of
    anything but tensors, numbers, strings, containers and objects of these, only the type counts.

    Example:
        >>> digest([1, 2.0]) == digest((1, 2.0)), digest(0.1) == digest(0.2)
        (True, False)
    """
    sha = sha256()
    _feed(sha.update, value, {})
    return sha.hexdigest()[:16]


def _feed(update: Callable[[Any], None], value: Any, seen: dict[int, Any]) -> None:
    if torch.nn.parameter.is_lazy(value):
        value = None  # it has no values yet
    if isinstance(value, torch.Tensor):
        if not value.is_nested:
            update(f"{value.dtype} {tuple(value.shape)}:".encode())
            dense = value.detach() if value.layout is torch.strided else value.detach().to_dense()
            host = dense.resolve_conj().resolve_neg().cpu().contiguous()
            flat = host.as_strided((host.numel(),), (1,))  # one number may have any stride
            update(flat.view(torch.uint8).numpy())  # bytes: numpy has no bfloat16
            return
        value = value.unbind()
    elif hasattr(value, "tolist"):
        value = value.tolist()
    items: Any = ()
    text = ""
    if value is None or isinstance(value, str | bytes | int | float | complex):
        text = repr(value)
    elif isinstance(value, Mapping):
        text, items = "mapping", value.items()
    elif isinstance(value, list | tuple):
        text, items = "row", value
    else:
        text = type(value).__qualname__
        if not callable(value) and id(value) not in seen:
            seen[id(value)] = value  # kept alive, so that no other object gets its id
            items = (value.__getstate__(),)
    update(f"{text} {len(items)}:".encode())
    for item in items:
        _feed(update, item, seen)

"""Checks of a state file before it is loaded, because it may come from an untrusted source."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def disallowed_names(archive: zipfile.ZipFile) -> set[str]:
    """The names in a state that could run code or allocate memory without data; usually none.

    torch refuses code as well, but allows calls that allocate `n` bytes for an integer `n`.
    """
    # torch ignores the case of this name, so there must be exactly one match.
    (pickled,) = (n for n in archive.namelist() if n.lower().endswith("/data.pkl"))
    found = set()
    for operation, argument, _ in pickletools.genops(archive.read(pickled)):
        if operation.name == "GLOBAL" and not _ALLOWED.fullmatch(str(argument)):
            found.add(str(argument))
        elif operation.name == "LONG4":
            found.add("an integer of 256 bytes or more")
    return found


_ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) complex"
    r"|torch (?!\w*Tensor$)\w+|torch\.storage UntypedStorage|torch\._utils _rebuild_tensor_v\d"
)


def incomplete_shapes(state: Any) -> list[tuple[int, ...]]:
    """The shapes of the tensors that are larger than their data."""
    return [
        tuple(tensor.shape)
        for tensor in _tensors(state, set())
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ]


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
        seen.add(id(value))  # nested lists that share items would take exponential time
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, seen)

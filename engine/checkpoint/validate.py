"""What a state file names and claims, for those who do not trust whoever wrote it."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch


def foreign_names(archive: zipfile.ZipFile) -> set[str]:
    """What a state names that none is made of: it would run code, or take memory for nothing.

    torch refuses code, too; but calls that make `n` bytes out of a number, it allows.
    """
    # torch looks its pickle up in any case of letters; there is to be no choice.
    (pickled,) = (n for n in archive.namelist() if n.lower().endswith("/data.pkl"))
    found = set()
    for operation, argument, _ in pickletools.genops(archive.read(pickled)):
        if operation.name == "GLOBAL" and not _OURS.fullmatch(str(argument)):
            found.add(str(argument))
        elif operation.name == "LONG4":
            found.add("an integer of 256 bytes or more")
    return found


_OURS = re.compile(
    r"collections (OrderedDict|Counter)|(__builtin__|builtins) complex"
    r"|torch (?!\w*Tensor$)\w+|torch\.storage UntypedStorage|torch\._utils _rebuild_tensor_v\d"
)


def shapes_not_there(state: Any) -> list[tuple[int, ...]]:
    """The shapes of tensors that claim to be larger than what there is of them."""
    return [
        tuple(tensor.shape)
        for tensor in _tensors(state, set())
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()
    ]


def _tensors(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:
        seen.add(id(value))  # a list of ten times a list of ten times a list is soon endless
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item, seen)

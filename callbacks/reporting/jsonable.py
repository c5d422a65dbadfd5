"""Values as JSON can hold them, and the numbers in a record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from .._checks import is_number

MAX_DEPTH = 20
"""Levels of nested lists and mappings in a record; deeper ones, and reference cycles, are text."""
MAX_ITEMS = 1000
"""Numbers in one list or tensor of a record; a larger one is replaced by a text with its size."""


def to_jsonable(
    value: Any, path: str = "", nonfinite: dict[str, str] | None = None, depth: int = 0
) -> Any:
    """`value` as JSON can hold it, with null for a float that is not finite.

    Args:
        value: numbers, strings, tensors, arrays, lists and mappings of them. Anything else becomes
            its `str`, and a value that is too large becomes a text with its size.
        path: its key in the record, such as "metrics.loss".
        nonfinite: gets, by path, the text of each number that became null.
        depth: the number of lists and mappings around it.

    Example:
        >>> import torch
        >>> to_jsonable({"loss": float("nan"), "per_class": torch.tensor([1.0, 0.5])})
        {'loss': None, 'per_class': [1.0, 0.5]}
    """
    if (tolist := getattr(value, "tolist", None)) is not None:  # a tensor or a numpy number
        if math.prod(getattr(value, "shape", ())) > MAX_ITEMS:
            return f"{type(value).__name__} of {tuple(value.shape)}"
        with suppress(Exception):  # sparse tensors, and those without data, have none
            value = tolist()
    if isinstance(value, list | tuple | Mapping) and _is_large(value):
        return f"{type(value).__name__} of {len(value)}"
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        items = {_text(key): item for key, item in value.items()}  # in JSON, 1 is "1"
        return {
            key: to_jsonable(item, f"{path}.{key}", nonfinite, depth + 1)
            for key, item in items.items()
        }
    if isinstance(value, list | tuple) and depth < MAX_DEPTH:
        return [to_jsonable(item, path, nonfinite, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        if nonfinite is not None:
            nonfinite[path] = str(value)
        return None
    if isinstance(value, int) and value.bit_length() > 10_000:
        return hex(value)  # Python refuses to print so many decimal digits
    return value if isinstance(value, str | int | float | None) else _text(value)


def _is_large(value: Any) -> bool:
    """Whether a list, with the lists in it, has more items than a record may hold."""
    n, lists = 0, [value]
    while lists and n <= MAX_ITEMS:
        items = lists.pop()
        n += len(items)
        if not isinstance(items, Mapping):  # each value of a mapping is checked by itself
            lists += [item for item in items[:MAX_ITEMS] if isinstance(item, list | tuple)]
    return n > MAX_ITEMS


def _text(value: Any) -> str:
    try:
        return str(value)
    except Exception:  # an error in the user's `__str__` must not end the logging
        return object.__repr__(value)


def numbers(record: Mapping[str, Any], part: str = "") -> dict[str, float]:
    """The numbers in a record, or in one part of it, with the original non-finite values.

    Args:
        record: the record, as passed to `RecordCB.write`.
        part: the key of a mapping in the record, such as "metrics".

    Example:
        >>> lost = {"metrics.loss": "nan"}
        >>> numbers({"metrics": {"loss": None, "count": 3}, "nonfinite": lost}, "metrics")
        {'loss': nan, 'count': 3.0}
    """
    path = f"{part}." if part else ""
    lost = record.get("nonfinite", {})
    found = {}
    for name, value in (record[part] if part else record).items():
        if value is None and path + name in lost:
            value = float(lost[path + name])
        if is_number(value):
            with suppress(OverflowError):  # an integer that no float can hold
                found[escape_surrogates(name)] = float(value)
    return found


def escape_surrogates(value: object) -> str:
    """`value` as text that can be encoded: a lone surrogate would break a whole page, a file, or a
    batch of an exporter.

    Example:
        >>> print(escape_surrogates(chr(0xDC80)))
        \\udc80
    """
    return str(value).encode(errors="backslashreplace").decode()


def escape_control(text: str) -> str:
    """`text` with control characters and line separators as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

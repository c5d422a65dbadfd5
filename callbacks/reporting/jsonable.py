"""Values as JSON can hold them, and the numbers in a record."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from contextlib import suppress
from itertools import islice
from typing import Any

import torch

from .._checks import is_number

MAX_VALUES = 1000
"""Values in one record; a list or mapping that has more than what is left of them is left out."""
MAX_TEXT = 10_000
"""Characters of one text; of those, every hundred count as one more value."""
MAX_KEY = 200
"""Characters of a key."""
MAX_DEPTH = 20
"""Levels of nested lists and mappings; what is deeper, such as a reference cycle, is left out."""


def to_jsonable(
    value: Any,
    path: str = "",
    nonfinite: dict[str, str] | None = None,
    left_out: dict[str, str] | None = None,
) -> Any:
    """`value` as JSON can hold it, with null for a float that is not finite.

    It never raises, and what it returns is bounded: it has at most 1,000 values, of which a text
    counts as one and one more for every hundred characters. A list, tensor or mapping that has more
    than what is left of them becomes a text with its size, such as "Tensor of (1000, 1000)".

    Args:
        value: numbers, strings, tensors, arrays, lists and mappings of them. Anything else becomes
            its `str`. An integer of more than 64 bits, which many readers of JSON refuse, becomes a
            float. Of two keys with the same text, the later one gets its type added: `1` and `"1"`
            become "1" and "1 (str)".
        path: its key in the record, such as "metrics.loss".
        nonfinite: gets, by path, the text of each number that became null.
        left_out: gets, by path, what is not in the result: the type and the size.

    Example:
        >>> import torch
        >>> to_jsonable({"loss": float("nan"), "per_class": torch.tensor([1.0, 0.5])})
        {'loss': None, 'per_class': [1.0, 0.5]}
        >>> left_out = {}
        >>> to_jsonable({"loss": 0.5, "image": torch.zeros(3, 32, 32)}, left_out=left_out)
        {'loss': 0.5, 'image': 'Tensor of (3, 32, 32)'}
        >>> left_out
        {'image': 'Tensor of (3, 32, 32)'}
    """
    conversion = Conversion()
    converted = conversion.of(value, path)
    if nonfinite is not None:
        nonfinite.update(conversion.nonfinite)
    if left_out is not None:
        left_out.update(conversion.left_out)
    return converted


class Conversion:
    """Converts the values of one record, which share one budget.

    Attributes:
        nonfinite: the text of each number that became null, by its path.
        left_out: the type and size of what is not in the record, by its path.
    """

    def __init__(self) -> None:
        self.nonfinite: dict[str, str] = {}
        self.left_out: dict[str, str] = {}
        self._left = MAX_VALUES

    def of(self, value: Any, path: str, depth: int = 0, counted: bool = False) -> Any:
        """`value` as JSON can hold it. Never raises, whatever the user's own methods do.

        Args:
            value: anything.
            path: its key in the record.
            depth: the number of lists and mappings around it.
            counted: whether it is a list whose items have been counted with those of another.
        """
        try:
            return self._of(value, path, depth, counted)
        except Exception:  # of its `__len__`, `items`, `__str__`, `__class__`, ...
            return self._leave_out(path, object.__repr__(value))

    def first_of(self, values: Mapping[str, Any], path: str) -> Any:
        """As `of`; but of a mapping that is too large, the first items."""
        too_many = len(values) - self._left
        if too_many > 0:
            self.left_out[path] = f"{too_many} of {len(values)} values"
            values = dict(islice(values.items(), self._left))
        return self.of(values, path)

    def _of(self, value: Any, path: str, depth: int, counted: bool) -> Any:
        if _is_array(value):
            if math.prod(value.shape) > self._left:
                return self._leave_out(path, f"{type(value).__name__} of {tuple(value.shape)}")
            with suppress(Exception):  # sparse tensors, and those without data, have none
                value = value.tolist()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._text(str.__str__(value), path)
        if isinstance(value, int):
            return self._integer(int.__int__(value), path)
        if isinstance(value, float):
            return self._float(float.__float__(value), path)
        if isinstance(value, list | tuple):
            return self._list(value, path, depth, counted)
        if isinstance(value, Mapping):
            return self._mapping(value, path, depth)
        if isinstance(value, Collection) and len(value) > self._left:  # its text would be as long
            return self._leave_out(path, _size(value))
        return self._text(str(value), path)

    def _list(
        self, value: list[Any] | tuple[Any, ...], path: str, depth: int, counted: bool
    ) -> Any:
        n = 0 if counted else _count(value, self._left)
        if n > self._left or depth >= MAX_DEPTH:
            return self._leave_out(path, _size(value))
        self._left -= n
        return [
            self.of(item, path, depth + 1, counted=isinstance(item, list | tuple)) for item in value
        ]

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Any:
        items = list(islice(value.items(), self._left + 1))
        if len(items) > self._left or depth >= MAX_DEPTH:
            return self._leave_out(path, _size(value))
        self._left -= len(items)
        converted: dict[str, Any] = {}
        for key, item in items:
            name = _key(key, converted)
            converted[name] = self.of(item, f"{path}.{name}" if path else name, depth + 1)
        return converted

    def _integer(self, value: int, path: str) -> Any:
        if -(2**63) <= value < 2**64:
            return value
        try:
            return float(value)
        except OverflowError:
            return self._leave_out(path, f"int of {value.bit_length()} bits")

    def _float(self, value: float, path: str) -> float | None:
        if math.isfinite(value):
            return value
        self.nonfinite[path] = str(value)
        return None

    def _text(self, text: str, path: str) -> str:
        allowed = min(MAX_TEXT, 100 * max(1, self._left))
        if len(text) > allowed:
            self.left_out[path] = f"str of {len(text)} characters"
            text = text[:allowed] + "..."
        self._left = max(0, self._left - len(text) // 100)
        return text

    def _leave_out(self, path: str, description: str) -> str:
        self.left_out[path] = description[:MAX_KEY]
        return self.left_out[path]


def _is_array(value: Any) -> bool:
    """Whether it is a tensor, an array or a number of numpy: a `Mock` is not."""
    if isinstance(value, torch.Tensor):
        return True
    shape = getattr(value, "shape", None) if hasattr(type(value), "tolist") else None
    return isinstance(shape, tuple) and all(isinstance(size, int) for size in shape)


def _count(value: list[Any] | tuple[Any, ...], limit: int) -> int:
    """The items of a list, with those of the lists in it; counted up to a little over `limit`."""
    n, lists = 0, [value]
    while lists and n <= limit:
        items = lists.pop()
        n += len(items)
        lists += [item for item in items[: limit + 1] if isinstance(item, list | tuple)]
    return n


def _size(value: Any) -> str:
    return f"{type(value).__name__} of {len(value)}"


def _key(key: object, taken: Mapping[str, Any]) -> str:
    """The text of a mapping's key, which no other one has."""
    try:
        text = str(key)
    except Exception:  # an error in the user's `__str__` must not end the logging
        text = object.__repr__(key)
    if len(text) > MAX_KEY:
        text = text[:MAX_KEY] + "..."
    if text in taken:
        text += f" ({type(key).__name__})"
    name, n = text, 1
    while name in taken:
        n += 1
        name = f"{text} {n}"
    return name


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

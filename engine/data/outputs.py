"""Joining what a model has returned for each batch into one result for all samples.

The outputs of a batch are columns, alone or in containers, and each column has something of every
sample: a row of a tensor, or an item of a list. Which of the two a list or tuple is, a container of
columns or a column of samples, is decided by the size of the batch. One batch may leave both
possible, such as two tensors of two rows for two samples; the next batches then decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence

from .batch_size import alike, parts_of
from .containers import with_parts


class Columns(NamedTuple):
    """The layout of a container of columns: its class, the names and the layouts of its parts."""

    kind: type
    names: tuple[Any, ...]
    parts: tuple[Layouts, ...]


Layouts = tuple[Literal["nothing", "rows", "samples"] | Columns, ...]
"""The possible layouts of an output, the likeliest first; empty if it cannot be collected."""


def layouts_of(output: Any, n: int | None) -> Layouts:
    """The possible layouts of the output of a batch.

    Args:
        output: a tensor, a container, or None.
        n: the number of samples in the batch; None if it is not known.
    """
    if output is None:
        return ("nothing",)
    if isinstance(output, torch.Tensor):
        return ("rows",) if _has_rows(output, n) else ()
    if isinstance(output, PackedSequence):
        return ()
    parts = columns_in(output)
    if parts is None:
        return ()
    found = tuple(layouts_of(part, n) for part in parts.values())
    columns: Layouts = (Columns(type(output), tuple(parts), found),) if all(found) else ()
    if type(output) not in (list, tuple) or n not in (None, len(output)):
        return columns
    if not columns or not output:
        return ("samples",)
    if not alike(output):
        return columns
    of_tuples = isinstance(output, list) and isinstance(output[0], tuple)
    samples_first = of_tuples or isinstance(output[0], Mapping)
    return ("samples", *columns) if samples_first else (*columns, "samples")


def columns_in(output: Any) -> dict[Any, Any] | None:
    """The parts of a container of outputs, by key, name or index; None if it is not a container."""
    if isinstance(output, list | tuple):
        return dict(enumerate(output))
    if isinstance(output, Mapping) or hasattr(output, "__dataclass_fields__"):
        return parts_of(output)
    return None


def in_common(a: Layouts, b: Layouts) -> Layouts:
    """The layouts that are possible for the outputs of both of two batches."""
    found: list[Any] = []
    for one in a:
        for other in b:
            if not isinstance(one, Columns) or not isinstance(other, Columns):
                found += [one] * (one == other)
            elif one[:2] == other[:2]:
                parts = tuple(in_common(*pair) for pair in zip(one.parts, other.parts, strict=True))
                found += [one._replace(parts=parts)] * all(parts)
    return tuple(found)


def is_ambiguous(layouts: Layouts) -> bool:
    """Whether more than one layout is possible, of an output or of a part of it."""
    return len(layouts) > 1 or any(
        is_ambiguous(part)
        for layout in layouts
        if isinstance(layout, Columns)
        for part in layout.parts
    )


def join(outputs: list[Any], layouts: Layouts) -> Any:
    """Join the outputs of all batches, with the likeliest layout.

    Rows are concatenated if they have the same shape in all batches; otherwise they become a list
    with one tensor per sample: padding them would invent values.

    Example:
        >>> outputs = [{"x": torch.zeros(2)}, {"x": torch.ones(1)}]
        >>> join(outputs, layouts_of(outputs[0], 2))
        {'x': tensor([0., 0., 1.])}
    """
    layout, first = layouts[0], outputs[0]
    if layout == "nothing":
        return None
    if layout == "samples":
        return [sample for output in outputs for sample in output]
    if isinstance(layout, Columns):
        columns = [columns_in(output) for output in outputs]
        return with_parts(
            first,
            {
                name: join([parts[name] for parts in columns if parts is not None], part_layouts)
                for name, part_layouts in zip(layout.names, layout.parts, strict=True)
            },
        )
    if len({output.shape[1:] for output in outputs}) > 1:
        return [row for output in outputs for row in output.unbind()]
    return torch.cat(outputs)


def why_not_collected(output: Any, n: int | None, name: str) -> str | None:
    """Why an output has no layout; None if it has one.

    Args:
        output: what the model has returned for a batch, or a part of it.
        n: the number of samples in the batch; None if it is not known.
        name: the expression for it, such as `preds['loss']`.
    """
    if layouts_of(output, n):
        return None
    if isinstance(output, PackedSequence):
        return f"{name} is a PackedSequence, which torch.nn.utils.rnn.unpack_sequence makes a list"
    if isinstance(output, torch.Tensor):
        if output.is_nested:
            return f"{name} is a nested tensor, which list({name}.unbind()) makes a list"
        if not output.dim():
            return f"{name} is a scalar"
        return f"{name} has {output.size(0)} rows for {n} samples"
    for part, value in (columns_in(output) or {}).items():
        inner = f"{name}.{part}" if _is_attribute(output, part) else f"{name}[{part!r}]"
        if why := why_not_collected(value, n, inner):
            if type(output) in (list, tuple) and n is not None:
                why += f", and {name} has {len(output)} items"
            return why
    return f"{name} is a {type(output).__qualname__}"


def described(output: Any) -> str:
    """What an output is, for an error."""
    kind = type(output).__qualname__
    if isinstance(output, torch.Tensor):
        return f"a {kind} of shape {tuple(output.shape)}"
    if isinstance(output, list | tuple):
        return f"a {kind} of {len(output)}"
    parts = parts_of(output)
    return f"a {kind} of {', '.join(map(repr, parts))}" if parts else f"a {kind}"


def _has_rows(tensor: torch.Tensor, n: int | None) -> bool:
    return not tensor.is_nested and tensor.dim() > 0 and n in (None, tensor.size(0))


def _is_attribute(output: Any, part: Any) -> bool:
    return isinstance(part, str) and not isinstance(output, Mapping)

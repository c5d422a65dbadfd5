"""The number of samples in a batch, whatever the form of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import PackedSequence


class Size(NamedTuple):
    """The number of samples in a batch.

    Attributes:
        n: the number.
        guess: why it may be another number; None where it is certain.
    """

    n: int
    guess: str | None = None


class Sizes(NamedTuple):
    """The numbers of samples that a value may hold.

    Attributes:
        values: the likeliest first; empty for a value that says nothing, such as a scalar.
        guess: why the first may be wrong; None where it is certain, unless another part of the
            batch says otherwise.
    """

    values: tuple[int, ...] = ()
    guess: str | None = None


def size_of(batch: Any) -> Size:
    """Count the samples of a batch.

    A batch is either a container of columns, each with something of every sample, or a sequence of
    samples. Parts of a batch that could be either are decided by what all parts agree on.

    Example:
        >>> size_of((torch.zeros(8, 1, 28, 28), torch.zeros(8))).n
        8
        >>> images, targets = [torch.zeros(3, 5, 4), torch.zeros(3, 7, 6)], [{"boxes": 1}] * 2
        >>> size_of((images, targets)).n
        2
    """
    usual = size_of_usual(batch)
    if usual is not None:
        return Size(usual)
    if _says_nothing(batch):  # not a batch, or one value
        return Size(int(isinstance(batch, torch.Tensor)))
    if _is_pair_with_scalar(batch):
        return Size(1, "its targets are a single value")
    values, guess = sizes_of(batch)
    if not values:
        return Size(1, f"nothing in a {type(batch).__qualname__} says how many samples it has")
    return Size(values[0], guess)


def size_of_usual(batch: Any) -> int | None:
    """The same for up to three tensors, or a dict of tensors; None for other batches.

    It is there for its speed: a batch is counted at least once before it is trained on.
    """
    parts: Any
    if type(batch) is tuple or type(batch) is list:
        if not 0 < len(batch) <= 3:
            return None
        parts = batch
    elif type(batch) is dict and batch:
        parts = batch.values()
    else:
        return None
    n = None
    for part in parts:
        if type(part) is not torch.Tensor or part.is_nested:
            return None
        shape = part.shape
        if not shape or n not in (None, shape[0]):
            return None
        n = shape[0]
    return n


def sizes_of(x: Any, dims: int = 1) -> Sizes:
    """The numbers of samples that a value may hold.

    Args:
        x: a batch, a part of one, or predictions.
        dims: how many of the first dimensions of a tensor may be that of the samples.
    """
    if isinstance(x, torch.Tensor):
        return Sizes(tuple(x.size(d) for d in range(min(dims, x.dim()))))
    if isinstance(x, PackedSequence):
        return Sizes((int(x.batch_sizes[0]),))
    if _says_nothing(x):
        return Sizes()
    shape = getattr(x, "shape", None)
    if isinstance(shape, tuple):  # of an array, or a dict of tensors with a shape
        return Sizes(tuple(shape[:1]))
    for name in ("num_graphs", "batch_size"):  # of torch_geometric and DGL
        if type(n := getattr(x, name, None)) is int:
            return Sizes((n,))
    if isinstance(x, Sequence):
        return _sizes_of_sequence(x, dims)
    parts = parts_of(x)
    if parts is not None:
        found = _agreed(list(parts.values()), dims)
        if found.values or isinstance(x, Mapping):
            return found
    try:
        return Sizes((len(x),), f"it is the length of a {type(x).__qualname__}")
    except Exception:
        return Sizes()


def parts_of(x: Any) -> dict[Any, Any] | None:
    """The parts of a mapping, a dataclass or another object, by name; None if it has none."""
    if isinstance(x, Mapping):
        return dict(x.items())
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return {field.name: getattr(x, field.name) for field in dataclasses.fields(x)}
    if hasattr(x, "__dict__") and not isinstance(x, type):
        return {name: part for name, part in vars(x).items() if not name.startswith("_")}
    return None


def alike(items: Sequence[Any]) -> bool:
    """Whether items are all of one kind, so that they could be the samples of a batch."""
    first = _kind(items[0])
    return all(_kind(item) == first for item in items[1:])


def _kind(x: Any, deep: bool = True) -> Any:
    if isinstance(x, torch.Tensor):
        return torch.Tensor, x.dtype, x.dim()
    if isinstance(x, Mapping):
        return Mapping, frozenset(x)
    if isinstance(x, list | tuple) and deep:
        return type(x), tuple(_kind(item, deep=False) for item in x)
    return type(x)


def _agreed(parts: Iterable[Any], dims: int, prefer: Iterable[int] = ()) -> Sizes:
    """The sizes that all parts may have; `prefer` are those to name first."""
    known = [sizes for part in parts if (sizes := sizes_of(part, dims)).values]
    if not known:
        return Sizes()
    common = [n for n in known[0].values if all(n in sizes.values for sizes in known)]
    if len(common) == 1 and len(known) > 1:
        return Sizes(tuple(common))
    if common:
        common.sort(key=lambda n: n not in prefer)
        guess = next((sizes.guess for sizes in known if sizes.guess), None)
        return Sizes(tuple(common), guess or (_either(common) if prefer else None))
    firsts = [sizes.values[0] for sizes in known]
    likely = max(firsts, key=firsts.count)
    lengths = ", ".join(map(str, dict.fromkeys(firsts)))
    return Sizes((likely,), f"its parts differ in length ({lengths})")


def _sizes_of_sequence(items: Sequence[Any], dims: int) -> Sizes:
    """The sizes of a list or tuple: of columns, or of as many samples as it has items."""
    n = len(items)
    if not n:
        return Sizes((0,))
    lists = all(isinstance(item, list) for item in items)
    # default_collate makes lists of columns, in lists; other nested sequences hold samples.
    inner = [] if lists and isinstance(items, list) else [i for i in items if _is_plain(i)]
    columns = _agreed(items, dims, prefer={len(item) for item in inner})
    if not columns.values:  # such as strings or numbers: one per sample
        known = all(_says_nothing(item) for item in items)
        what = type(items[0]).__qualname__
        return Sizes((n,), None if known else f"each {what} in it may be more than one sample")
    if columns.guess is not None and len(columns.values) == 1:
        return _sizes_of_unequal(items, columns, dims)
    if not alike(items):
        return columns
    either = _either((columns.values[0], n)) if n not in columns.values else columns.guess
    samples_first = Sizes((n, *columns.values), either)
    columns_first = Sizes((*columns.values, n), columns.guess)
    first = items[0]
    if isinstance(first, Mapping):  # one per sample, unless there are two: (inputs, targets)
        return samples_first if n <= 2 else samples_first._replace(guess=None)
    if _is_plain(first):
        if any(_is_scalar(part) for part in first):  # a column has no single values
            return Sizes((n,))
        if isinstance(items, list) and isinstance(first, tuple):
            return samples_first
        return columns_first if n <= 2 else columns_first._replace(guess=either)
    if isinstance(first, torch.Tensor) and n > 2:
        if _are_images(items):
            return samples_first
        if n > 3 and len({item.shape for item in items}) == 1:
            return columns_first._replace(guess=either)
    return columns_first


def _sizes_of_unequal(items: Sequence[Any], columns: Sizes, dims: int) -> Sizes:
    """The sizes of a list or tuple whose items do not agree on a number of samples."""
    n, tensors = len(items), all(isinstance(item, torch.Tensor) for item in items)
    one_kind = alike(items)
    if dims == 1 and not (one_kind and (n > 2 or not tensors)):
        second = _agreed(items, 2)
        if second.guess is None and len(second.values) == 1:
            return Sizes(second.values, "its second dimension may be that of the time steps")
    if not one_kind:
        return columns
    same_features = tensors and len({item.shape[1:] for item in items}) == 1
    return Sizes((n,), None if n > 2 or same_features or not tensors else columns.guess)


def _is_plain(x: Any) -> bool:
    return isinstance(x, list | tuple) and not isinstance(x, PackedSequence)


def _is_pair_with_scalar(batch: Any) -> bool:
    """Whether a batch is (inputs, target) with a target of one value: a sample that is not batched.

    A loader with `batch_size=None` yields such.
    """
    if not (isinstance(batch, list | tuple) and len(batch) == 2):
        return False
    inputs, target = batch
    return _is_scalar(target) and isinstance(inputs, torch.Tensor) and inputs.dim() > 0


def _says_nothing(x: Any) -> bool:
    return x is None or isinstance(x, str | bytes) or _is_scalar(x)


def _is_scalar(x: Any) -> bool:
    return isinstance(x, Number) or (isinstance(x, torch.Tensor) and not x.dim())


def _are_images(tensors: Sequence[Any]) -> bool:
    """Whether tensors of the same number of dimensions look like images of different sizes."""
    if any(t.dim() != 3 or t.size(0) not in (1, 3, 4) for t in tensors):
        return False
    heights, widths = ({t.size(d) for t in tensors} for d in (1, 2))
    return len(heights) > 1 and len(widths) > 1


def _either(sizes: Iterable[int]) -> str | None:
    different = list(dict.fromkeys(sizes))
    if len(different) < 2:
        return None
    return f"it may have {' or '.join(map(str, different))}"

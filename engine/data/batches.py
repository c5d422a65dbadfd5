"""Whether a value is a batch."""

from __future__ import annotations

import operator
from typing import Any


def check_batch(batch: Any, size: Any, phase: str, index: int) -> int:
    """Raise a TypeError if a value cannot be a batch; return its size as an int.

    Args:
        batch: what the loader yielded.
        size: what `batch_size` says of it.
        phase: "train" or "valid".
        index: the index of the batch in the epoch.

    Raises:
        TypeError: it is not a batch, or its size is not an integer.
        ValueError: its size is negative.
    """
    if batch is None or isinstance(batch, str | bytes | bool | int | float | complex):
        raise TypeError(
            f"dls.{phase} yielded {batch!r} as batch {index}, which is not a batch: give tensors,"
            " alone or in a tuple, list, mapping or object (a DataLoader over a dataset does)"
        )
    try:
        n = operator.index(size)
    except TypeError:
        raise TypeError(
            f"batch_size(batch) returned {size!r} for batch {index} of dls.{phase}: return the"
            " number of samples in it, as an int"
        ) from None
    if n < 0:
        raise ValueError(f"batch_size(batch) returned {n} for batch {index} of dls.{phase}")
    return n

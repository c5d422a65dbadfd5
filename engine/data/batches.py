"""The inputs and the targets of a batch, and whether it is one."""

from __future__ import annotations

import operator
from typing import Any

_SEQUENCES = (tuple, list)


def inputs_of(batch: Any) -> Any:
    """The input of the model: the first item of a tuple or list, or else the whole batch."""
    return batch[0] if isinstance(batch, _SEQUENCES) else batch


def targets_of(batch: Any) -> Any:
    """The targets of a batch: the second item of a tuple or list.

    Raises:
        TypeError: the batch has no second item.
    """
    if isinstance(batch, _SEQUENCES) and len(batch) > 1:
        return batch[1]
    what = f"{len(batch)} part(s)" if isinstance(batch, _SEQUENCES) else type(batch).__qualname__
    raise TypeError(
        f"a batch of (inputs, targets) is needed here, but this one is {what}: perform Predict"
        " and GetLoss yourself, in a Learner subclass or a callback"
    )


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

"""The size, the inputs and the targets of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

_SEQUENCES = (tuple, list)


def batch_size(batch: Any) -> int:
    """The length of the first tensor in a batch, 0 if there is none.

    Example:
        >>> batch_size((torch.zeros(8, 1, 28, 28), torch.zeros(8))), batch_size({"x": "text"})
        (8, 0)
    """
    if type(batch) in _SEQUENCES and batch and type(batch[0]) is torch.Tensor:
        shape = batch[0].shape  # the usual case takes half the time here
        if shape and shape[0]:
            return shape[0]
    if isinstance(batch, _SEQUENCES):
        parts: Iterable[Any] = batch
    elif isinstance(batch, torch.Tensor):
        shape = batch.shape
        return shape[0] if shape else 1
    elif isinstance(batch, Mapping):
        parts = batch.values()
    else:
        return 0
    for part in parts:
        if size := batch_size(part):
            return size
    return 0


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


def check_batch(batch: Any, phase: str, index: int) -> None:
    """Raise a TypeError if a value cannot be a batch.

    Args:
        batch: what the loader yielded.
        phase: "train" or "valid".
        index: the index of the batch in the epoch.
    """
    if batch is None or isinstance(batch, str | bytes | bool | int | float | complex):
        raise TypeError(
            f"dls.{phase} yielded {batch!r} as batch {index}, which is not a batch: give tensors,"
            " alone or in a tuple, list, mapping or object (a DataLoader over a dataset does)"
        )

"""A loader for data in memory: whole batches by index, in the order of torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .accelerator import copy_to_device


class TensorLoader(DataLoader[Any]):
    """A DataLoader over tensors in memory that indexes each batch as a whole.

    In all other respects it is torch's DataLoader: with the same arguments and the same random
    state it yields the same batches, in the same order, as
    `DataLoader(TensorDataset(*tensors), ...)`.

    Args:
        tensors: of any dtype, with one sample per index of the first dimension; usually inputs and
            targets. A batch is a list with as many tensors.
        batch_size, shuffle: as for a DataLoader.
        transform: called with the inputs of a whole batch, which are its first tensor, such as a
            transform of torchvision.transforms.v2. It draws its random values once per batch.
        device: where to keep the tensors, and thus the batches; they are copied there once, when
            the loader is made. By default they stay where they are, and are not copied: changes
            made in place, such as to labels, are seen in the next batch.
        indices: the samples to use, as those of a Subset, of shape (n_samples,), int64. By
            default all.
        kwargs: the other arguments of a DataLoader: `generator`, `drop_last`, `sampler`,
            `pin_memory`, ...; `collate_fn` is called with a whole batch, as MixUp expects.

    Raises:
        TypeError: an argument is not a tensor, or `transform` cannot be called.
        ValueError: there are no tensors, they differ in length, or `num_workers` or `pin_memory` is
            used with tensors on a device.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> x, y = torch.randn(10, 3), torch.arange(10)
        >>> loader = TensorLoader(x, y, batch_size=4, shuffle=True)
        >>> _ = torch.manual_seed(0); batches = list(loader)
        >>> [len(labels) for _, labels in batches]
        [4, 4, 2]
        >>> _ = torch.manual_seed(0); same = list(DataLoader(TensorDataset(x, y), 4, shuffle=True))
        >>> all(torch.equal(a, b) for a, b in zip(batches[0], same[0]))
        True

    Source: `__getitems__`, which torch's DataLoader calls if its dataset has it.
    """

    dataset: TensorBatches

    def __init__(
        self,
        *tensors: torch.Tensor,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: str | torch.device | None = None,
        indices: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        dataset = TensorBatches(tensors, transform, device, indices)
        if dataset.device.type != "cpu":
            for name in ("num_workers", "pin_memory"):
                if kwargs.get(name):
                    raise ValueError(
                        f"{name}={kwargs[name]!r} is for tensors in the host's memory, but these"
                        f" are on {dataset.device}: leave it out"
                    )
        kwargs.setdefault("collate_fn", identity)
        super().__init__(dataset, batch_size, shuffle, **kwargs)

    def __repr__(self) -> str:
        where = self.dataset.device
        return f"TensorLoader({len(self.dataset)} samples on {where}, batch_size={self.batch_size})"


class TensorBatches(Dataset[Any]):
    """The dataset of a `TensorLoader`: returns a whole batch for a list of indices.

    Args:
        tensors, transform, device, indices: as for `TensorLoader`.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: str | torch.device | None = None,
        indices: torch.Tensor | None = None,
    ) -> None:
        _check(tensors, transform)
        self.tensors = tuple(t if device is None else t.to(device) for t in tensors)
        self.device = self.tensors[0].device
        self.indices = None if indices is None else indices.to(self.device)
        self.transform = transform
        if isinstance(transform, nn.Module):
            self.transform = transform.to(self.device)

    def __len__(self) -> int:
        return len(self.tensors[0] if self.indices is None else self.indices)

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [t[0] for t in self.__getitems__([index])]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        index = torch.tensor(indices)
        if self.device.type != "cpu":
            index = copy_to_device(index, self.device)
        if self.indices is not None:
            index = self.indices.index_select(0, index)
        batch = [t.index_select(0, index) for t in self.tensors]
        if self.transform is not None:
            batch[0] = self.transform(batch[0])
        return batch


def identity(batch: Any) -> Any:
    """The `collate_fn` for datasets that return whole batches."""
    return batch


def _check(tensors: Sequence[Any], transform: Any) -> None:
    if not tensors:
        raise ValueError("there are no tensors: give one, or (inputs, targets)")
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor):
            raise TypeError(
                f"tensor {i} is a {type(t).__qualname__}: convert it with torch.as_tensor()"
            )
        if t.ndim == 0:
            raise ValueError(f"tensor {i} is a scalar, {t!r}: it has no dimension of samples")
    if len(lengths := {len(t) for t in tensors}) > 1:
        raise ValueError(
            f"the tensors hold different numbers of samples: {', '.join(map(str, lengths))}"
        )
    if transform is not None and not callable(transform):
        raise TypeError(f"transform={transform!r} cannot be called")

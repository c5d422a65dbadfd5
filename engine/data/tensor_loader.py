"""Data that fits in memory: whole batches by index, with torch's own order and conventions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset


class TensorLoader(DataLoader[Any]):
    """A DataLoader over tensors in memory that takes out each batch whole, by its indices.

    A loader of torch in all else: with the same arguments and the same random state it yields the
    same batches, in the same order, as `DataLoader(TensorDataset(*tensors), ...)`.

    Args:
        tensors: with one sample each along the first dimension, any dtype; in a pair, (inputs,
            targets). A batch is a list of as many.
        batch_size, shuffle: as a DataLoader's.
        transform: called with the inputs of a whole batch, the first tensor of it, such as a
            transform of torchvision.transforms.v2. What it draws at random it draws once a batch.
        device: where the tensors are to live, and so the batches: copied there once, here. By
            default where they are.
        kwargs: the other arguments of a DataLoader: `generator`, `drop_last`, `sampler`,
            `pin_memory`, ...; `collate_fn` is given a whole batch, as MixUp wants it.

    Raises:
        TypeError: something is no tensor, or `transform` cannot be called.
        ValueError: there is no tensor, they differ in length, or `num_workers` or `pin_memory` is
            asked for with tensors on a device.

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

    Source: the `__getitems__` that torch's loader asks its dataset for.
    """

    dataset: TensorBatches

    def __init__(
        self,
        *tensors: torch.Tensor,
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> None:
        dataset = TensorBatches(tensors, transform, device)
        if dataset.device.type != "cpu":
            for name in ("num_workers", "pin_memory"):
                if kwargs.get(name):
                    raise ValueError(
                        f"{name}={kwargs[name]!r} is for tensors in the host's memory, and these"
                        f" are on {dataset.device}: leave it out"
                    )
        kwargs.setdefault("collate_fn", as_it_is)
        super().__init__(dataset, batch_size, shuffle, **kwargs)

    def __repr__(self) -> str:
        where = self.dataset.device
        return f"TensorLoader({len(self.dataset)} samples on {where}, batch_size={self.batch_size})"


class TensorBatches(Dataset[Any]):
    """The dataset of a `TensorLoader`: tensors that hand out a batch by a list of indices.

    Args:
        tensors, transform, device: as those of `TensorLoader`.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        _check(tensors, transform)
        self.tensors = tuple(t if device is None else t.to(device) for t in tensors)
        self.device = self.tensors[0].device
        self.transform = transform
        if isinstance(transform, nn.Module):
            self.transform = transform.to(self.device)

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        return [t[0] for t in self.__getitems__([index])]

    def __getitems__(self, indices: Sequence[int]) -> list[torch.Tensor]:
        where = torch.tensor(indices)
        if self.device.type != "cpu":  # from pinned memory, so that the host does not wait
            where = where.pin_memory().to(self.device, non_blocking=True)
        batch = [t.index_select(0, where) for t in self.tensors]
        if self.transform is not None:
            batch[0] = self.transform(batch[0])
        return batch


def as_it_is(batch: Any) -> Any:
    """The `collate_fn` of datasets that hand out whole batches."""
    return batch


def _check(tensors: Sequence[Any], transform: Any) -> None:
    if not tensors:
        raise ValueError("there are no tensors: give one, or (inputs, targets)")
    for i, t in enumerate(tensors):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"tensor {i} is a {type(t).__qualname__}: torch.as_tensor() makes one")
        if t.ndim == 0:
            raise ValueError(f"tensor {i} is a single number, {t!r}: it has no samples")
    if len(lengths := {len(t) for t in tensors}) > 1:
        raise ValueError(
            f"the tensors hold different numbers of samples: {', '.join(map(str, lengths))}"
        )
    if transform is not None and not callable(transform):
        raise TypeError(f"transform={transform!r} cannot be called")

"""Datasets whose samples are in memory already, and how to take them out in whole batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset, default_collate

from .tensor_loader import TensorBatches


class InMemory(NamedTuple):
    """What a dataset's samples are made from.

    Attributes:
        tensors: one sample each along the first dimension.
        transform: what makes the inputs of a whole batch from the first of them.
    """

    tensors: tuple[torch.Tensor, ...]
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None


class NotInMemoryError(Exception):
    """A dataset can only be read sample by sample; the message says why."""


def in_memory(dataset: Any) -> InMemory:
    """The tensors that hold a dataset's samples: of a TensorDataset, or of torchvision's MNIST,
    its kin and CIFAR, whose transforms look at one value at a time; or of a Subset of those.

    Some samples are compared with the dataset's own, to the bit.

    Raises:
        NotInMemoryError: it is another dataset, or its samples are something else.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise NotInMemoryError("it is empty, or has no length")
    found = _find(dataset)
    some = sorted({0, len(dataset) // 3, len(dataset) - 1})
    batch = TensorBatches(*found).__getitems__(some)
    own = default_collate([dataset[i] for i in some])
    if len(batch) != len(own) or not all(map(_equal, batch, own)):
        raise NotInMemoryError("its samples are not what its tensors and transform give")
    return found


def _find(dataset: Any) -> InMemory:
    kind, get = type(dataset), getattr(type(dataset), "__getitem__", None)
    if get is Subset.__getitem__:
        tensors, transform = _find(dataset.dataset)
        where = torch.as_tensor(dataset.indices)
        return InMemory(tuple(t[where] for t in tensors), transform)
    if hasattr(dataset, "__getitems__"):
        raise NotInMemoryError("it has a __getitems__ of its own")
    if get is TensorDataset.__getitem__:
        return InMemory(dataset.tensors)
    from torchvision.datasets import CIFAR10, MNIST  # what comes now is theirs, or unknown

    if get not in (MNIST.__getitem__, CIFAR10.__getitem__):
        raise NotInMemoryError(f"it is not known where a {kind.__qualname__} has its samples")
    if dataset.target_transform is not None:
        raise NotInMemoryError("it has a target_transform")
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    table = _Table(dataset.transform, channels=images.shape[1])
    return InMemory((images, torch.as_tensor(dataset.targets)), table)


class _Table(nn.Module):
    """A transform of images of bytes that looks at one value of a channel at a time, as a table:
    the transform itself is asked, once, what it makes of each of the 256.

    Args:
        transform: takes one PIL image.
        channels: of the images.
    """

    table: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, transform: Any, channels: int) -> None:
        from torchvision.transforms.functional import to_pil_image

        super().__init__()
        _check_by_value(transform)
        image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(channels, 16, 16)
        made = transform(to_pil_image(image))
        if not isinstance(made, torch.Tensor) or made.shape != image.shape:
            raise NotInMemoryError("its transform makes no tensors of images")
        self.register_buffer("table", made.as_subclass(torch.Tensor).flatten())
        self.register_buffer("offsets", torch.arange(channels).int().view(-1, 1, 1) * 256)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Of shape (N, C, H, W), uint8, to the same shape."""
        where = images.int()
        if len(self.offsets) > 1:
            where += self.offsets
        return self.table.index_select(0, where.flatten()).view(images.shape)


def _check_by_value(transform: Any) -> None:
    """See that a transform looks at one value of a channel at a time, and at nothing else."""
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    if isinstance(transform, v1.Compose | v2.Compose):
        for step in transform.transforms:
            _check_by_value(step)
    elif type(transform) not in {
        *(v1.ToTensor, v1.PILToTensor, v1.ConvertImageDtype, v1.Normalize),
        *(v2.ToImage, v2.PILToTensor, v2.ToDtype, v2.ToPureTensor, v2.Normalize),
    }:
        raise NotInMemoryError(f"its transform has {transform!r}")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)

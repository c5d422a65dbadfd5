"""Datasets whose samples are in memory already, as tensors to take whole batches from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Subset, TensorDataset, default_collate

from .tensor_loader import TensorBatches


class InMemory(NamedTuple):
    """The tensors from which a dataset makes its samples.

    Attributes:
        tensors: one sample per index of the first dimension. Where the dataset has them as
            tensors, they are its own, so that changes made in place are seen.
        transform: called with the first tensor of a whole batch; returns the inputs.
        indices: the samples that belong to the dataset, if it is a Subset; None for all.
    """

    tensors: tuple[torch.Tensor, ...]
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    indices: torch.Tensor | None = None

    @property
    def batches(self) -> TensorBatches:
        """The dataset that makes whole batches of them."""
        return TensorBatches(self.tensors, self.transform, indices=self.indices)


class NotInMemoryError(Exception):
    """A dataset has to be read sample by sample; the message says why."""


def in_memory(dataset: Any) -> InMemory:
    """Find the tensors that hold the samples of a dataset.

    They are known for a TensorDataset, for torchvision's MNIST, CIFAR10 and their subclasses with
    transforms that map each value on its own, and for a Subset of those. A few samples made from
    them are compared with the dataset's own, bit for bit.

    Raises:
        NotInMemoryError: it is another dataset, or its samples differ from those.
    """
    if not hasattr(dataset, "__len__") or not len(dataset):
        raise NotInMemoryError("it is empty, or has no length")
    found = _tensors_of(dataset)
    if len(found.batches) != len(dataset):
        raise NotInMemoryError("it has another length than its tensors")
    indices = sorted({0, len(dataset) // 3, len(dataset) - 1})
    batch = found.batches.__getitems__(indices)
    expected = default_collate([dataset[i] for i in indices])
    if len(batch) != len(expected) or not all(map(_equal, batch, expected)):
        raise NotInMemoryError("its samples are not what its tensors and transform give")
    return found


def _tensors_of(dataset: Any) -> InMemory:
    kind, get = type(dataset), getattr(type(dataset), "__getitem__", None)
    if get is Subset.__getitem__ and kind.__getitems__ is Subset.__getitems__:
        inner = _tensors_of(dataset.dataset)
        indices = torch.as_tensor(dataset.indices).long()
        indices = torch.where(indices < 0, indices + len(dataset.dataset), indices)
        outer = indices if inner.indices is None else inner.indices[indices]
        return inner._replace(indices=outer)
    if hasattr(dataset, "__getitems__"):
        raise NotInMemoryError("it has a __getitems__ of its own")
    if get is TensorDataset.__getitem__:
        return InMemory(dataset.tensors)
    from torchvision.datasets import CIFAR10, MNIST  # imported only if the others do not apply

    if get not in (MNIST.__getitem__, CIFAR10.__getitem__):
        raise NotInMemoryError(f"it is not known where a {kind.__qualname__} has its samples")
    if dataset.target_transform is not None:
        raise NotInMemoryError("it has a target_transform")
    images = torch.as_tensor(dataset.data)
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    table = _LookupTable(dataset.transform, channels=images.shape[1])
    return InMemory((images, torch.as_tensor(dataset.targets)), table)


class _LookupTable(nn.Module):
    """A transform of uint8 images that maps each value of a channel on its own, as a lookup table.

    The table is filled by calling the transform once, with an image of all 256 values.

    Args:
        transform: called with a PIL image.
        channels: the number of channels of the images.
    """

    table: torch.Tensor
    offsets: torch.Tensor

    def __init__(self, transform: Any, channels: int) -> None:
        from torchvision.transforms.functional import to_pil_image

        super().__init__()
        _check_pointwise(transform)
        image = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(channels, 16, 16)
        values = transform(to_pil_image(image))
        if not isinstance(values, torch.Tensor) or values.shape != image.shape:
            raise NotInMemoryError("its transform makes no tensors of images")
        self.register_buffer("table", values.as_subclass(torch.Tensor).flatten())
        self.register_buffer("offsets", torch.arange(channels).int().view(-1, 1, 1) * 256)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Transform images of shape (N, C, H, W), uint8; the shape stays the same."""
        index = images.int()
        if len(self.offsets) > 1:
            index += self.offsets
        return self.table.index_select(0, index.flatten()).view(images.shape)


def _check_pointwise(transform: Any) -> None:
    """Raise a NotInMemoryError unless a transform is known to map each value on its own."""
    from torchvision import transforms as v1
    from torchvision.transforms import v2

    if isinstance(transform, v1.Compose | v2.Compose):
        for step in transform.transforms:
            _check_pointwise(step)
    elif type(transform) not in {
        *(v1.ToTensor, v1.PILToTensor, v1.ConvertImageDtype, v1.Normalize),
        *(v2.ToImage, v2.PILToTensor, v2.ToDtype, v2.ToPureTensor, v2.Normalize),
    }:
        raise NotInMemoryError(f"its transform has {transform!r}")


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)

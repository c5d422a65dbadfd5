"""The training and the validation loader, in one object."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable
from inspect import isasyncgenfunction
from itertools import cycle, repeat
from operator import length_hint
from typing import Any, Self

import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from ...events.checks import is_int
from .async_loader import AsyncLoader, can_be_iterated, is_async, is_read_once
from .fast import loader_for
from .prefetch import Prefetcher
from .tensor_loader import TensorLoader
from .thread_loader import ThreadLoader

LOADERS = (DataLoader, TensorLoader, ThreadLoader)
"""The loaders that read in the order of their sampler; a class derived from one may not."""


class DataLoaders:
    """The training and the validation loader, in one object.

    Args:
        train: any iterable of batches; iterated once per epoch. An async iterable is read on the
            event loop of the fit, as by [`AsyncLoader`][eventrain.engine.AsyncLoader].
        valid: the same, for validation; None without validation.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> data = TensorDataset(torch.randn(8, 4), torch.randn(8, 2))
        >>> dls = DataLoaders(DataLoader(data, batch_size=4, shuffle=True), DataLoader(data))
        >>> len(dls.train), len(dls.valid)
        (2, 8)

    Source: the post's `DataLoaders`.
    """

    def __init__(
        self,
        train: Iterable[Any] | AsyncIterable[Any] | None = None,
        valid: Iterable[Any] | AsyncIterable[Any] | None = None,
    ) -> None:
        self.train = train
        self.valid = valid

    @classmethod
    def from_dataset(
        cls,
        train: Dataset[Any],
        valid: Dataset[Any] | None = None,
        batch_size: int = 64,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        device: str | torch.device | None = None,
        num_threads: int = 0,
        **kwargs: Any,
    ) -> Self:
        """Make the fastest loaders with the same batches as `DataLoader(dataset, batch_size, ...)`.

        Samples that are in memory already are taken in whole batches from a `TensorLoader`: the
        same bits, in the same order, from the same random state. This applies to a TensorDataset;
        to torchvision's MNIST, FashionMNIST, CIFAR10 and similar datasets whose transforms map
        each value on its own, as ToTensor and Normalize do; and to a Subset of those. A dataset
        with `__getitems__` is asked for whole batches: it returns a list of samples, or a batch,
        as a tuple, mapping or tensor. All others are read sample by sample; with `num_threads`, by
        threads. The path that was chosen, and why, is logged ("data_path").

        The tensors of a dataset are not copied, unless to a device: changes that are made in place,
        such as of labels, are seen in the next batch, as with a DataLoader. What is replaced by
        another object is not, nor are changes of the images and labels of CIFAR10, which are an
        array in another layout and a list: make the loaders after such changes.

        Args:
            train: the dataset to train on.
            valid: the dataset to validate on; None without validation.
            batch_size: the number of samples per batch.
            shuffle: whether to draw the training samples in random order.
            drop_last: whether to leave out a last training batch that is smaller.
            device: the device of the batches. Data in memory is copied there once, if it takes no
                more than half of the free memory; otherwise a `Prefetcher` copies each batch while
                the previous one trains. By default, batches stay in the host's memory.
            num_threads: how many threads of a `ThreadLoader` read each dataset whose samples are
                not in memory; 0 reads without, as a DataLoader does.
            kwargs: other arguments of both DataLoaders, such as `generator`; `num_workers` and
                the other arguments for workers are not used for samples that are in memory.

        Raises:
            TypeError, ValueError: as by a DataLoader or `ThreadLoader`; also for an argument that
                it does not have, and for `sampler` or `batch_sampler`, which belong to one dataset.

        Example:
            >>> import torch
            >>> from torch.utils.data import TensorDataset
            >>> data = TensorDataset(torch.randn(8, 4), torch.randn(8, 2))
            >>> dls = DataLoaders.from_dataset(data, batch_size=4)  # doctest: +ELLIPSIS
            2... data_path ... path=tensors phase=train reason='its samples are in memory'
            >>> [x.shape for x, y in dls.train]
            [torch.Size([4, 4]), torch.Size([4, 4])]
        """
        for name in ("sampler", "batch_sampler"):
            if name in kwargs:
                raise TypeError(
                    f"from_dataset({name}=...): it belongs to one dataset; make that loader"
                    " yourself, and pass it to DataLoaders(train, valid)"
                )
        if not is_int(num_threads, 0):
            raise ValueError(f"num_threads={num_threads!r}: give an integer, 0 or more")
        if num_threads and kwargs.get("num_workers"):
            raise ValueError(
                f"num_threads={num_threads} and num_workers={kwargs['num_workers']!r}: a dataset is"
                " read by threads or by worker processes; give one of them"
            )
        kwargs.update(batch_size=batch_size, num_threads=num_threads)
        return cls(
            loader_for(train, "train", device, shuffle=shuffle, drop_last=drop_last, **kwargs),
            None if valid is None else loader_for(valid, "valid", device, **kwargs),
        )

    def __repr__(self) -> str:
        return f"DataLoaders(train={self.train!r}, valid={self.valid!r})"


def loader_of(dls: Any, training: bool) -> tuple[Any, int | None]:
    """The loader of a phase and its length, for which it may take long to ask.

    Raises:
        ValueError: there is no such loader, or it is known to be empty.
        TypeError: it cannot be iterated.
    """
    phase = "train" if training else "valid"
    loader = getattr(dls, phase, None)
    if loader is None:
        if isinstance(dls, Iterable) and not hasattr(dls, phase):
            raise ValueError(
                f"{phase}=True needs data, but dls.{phase} is missing: dls is a"
                f" {type(dls).__name__}. Give DataLoaders(train, valid), two iterables of batches"
            )
        raise ValueError(
            f"{phase}=True needs data, but dls.{phase} is missing. Give DataLoaders a {phase}"
            f" loader, or call fit({phase}=False)"
        )
    if not can_be_iterated(loader) and not is_async(loader):
        use = "a DataLoader"
        if isasyncgenfunction(loader):
            use = "AsyncLoader(it), which calls the function in every epoch"
        raise TypeError(f"dls.{phase} cannot be iterated: {loader!r}; use {use}")
    length = length_of(loader)
    if length == 0:
        raise ValueError(why_empty(loader, phase))
    return loader, length


def check_can_be_read(loader: Any, training: bool, passes: int | None, bound: bool) -> None:
    """Raise a ValueError for a loader that would not end, or would be exhausted too early.

    Args:
        loader: the loader of a phase.
        training: whether that is training.
        passes: how often it is to be read from its start; None if that is not known.
        bound: whether the number of batches that are read is given by the caller.
    """
    phase = "train" if training else "valid"
    length = "epoch_length" if training else "valid_length"
    if not bound and _is_endless(loader):
        steps = ", or max_steps=..." if training else ""
        raise ValueError(
            f"dls.{phase} is endless: it is a {type(loader).__name__}. Give {length}=..., a number"
            f" of batches{steps}"
        )
    if is_read_once(loader) and not bound and passes is not None and passes > 1:
        again = "such as a DataLoader or a list"
        if is_async(loader) or isinstance(loader, AsyncLoader):
            again = "such as AsyncLoader(function), which calls an async generator in every epoch"
        raise ValueError(
            f"dls.{phase} is an iterator, which can be read only once, and {passes} epochs would"
            f" read it from the start: {loader!r}. Give something that can be read again, {again},"
            f" or {length}=..., with which each epoch continues the iterator"
        )


def _is_endless(loader: Any) -> bool:
    return isinstance(loader, cycle) or (
        isinstance(loader, repeat) and length_hint(loader, -1) == -1
    )


def length_of(loader: Any) -> int | None:
    """The number of batches as the loader tells it; None if it cannot tell.

    It is a hint: see `has_exact_length`. A sampler that makes its batches as it goes may raise
    anything here.
    """
    try:
        return len(loader)
    except Exception:
        return None


def has_exact_length(loader: Any) -> bool:
    """Whether the length of a loader is the number of its batches, and not only a hint.

    That of an iterable dataset, or of a sampler of the user's own, may be too small or too large.
    """
    if isinstance(loader, Prefetcher):
        return has_exact_length(loader.loader)
    if type(loader) not in LOADERS:
        return type(loader) in (list, tuple)
    if isinstance(loader.dataset, IterableDataset):
        return False
    sampler, batches = loader.sampler, loader.batch_sampler
    if batches is not None:
        if type(batches) is not BatchSampler:
            return type(batches) in (list, tuple)
        sampler = batches.sampler
    of_torch = type(sampler).__module__.startswith("torch.utils.data")
    return of_torch or type(sampler) in (list, tuple, range)


def why_empty(loader: Any, phase: str) -> str:
    """The message of the error for a loader without batches."""
    why = "it has no batches"
    if is_read_once(loader):
        why = "it is an iterator, which can be read only once, and it is exhausted"
    elif getattr(loader, "drop_last", False):
        why = "with drop_last=True, fewer samples than batch_size do not make a batch"
    return f"dls.{phase} is empty: {why} ({loader!r})"

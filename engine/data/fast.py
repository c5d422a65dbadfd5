"""The choice of the fastest loader with the same batches, bit for bit, as a plain DataLoader."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset, default_collate

from .. import log
from .accelerator import is_accelerator
from .in_memory import NotInMemoryError, in_memory
from .prefetch import Prefetcher
from .tensor_loader import TensorLoader
from .thread_loader import ThreadLoader

_ARGUMENTS = frozenset(inspect.signature(DataLoader).parameters)
_WORKER_ARGUMENTS = (
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "prefetch_factor",
    "timeout",
    "worker_init_fn",
)


def loader_for(
    dataset: Any,
    phase: str,
    device: str | torch.device | None = None,
    num_threads: int = 0,
    **kwargs: Any,
) -> Any:
    """Choose a loader, and log which one and why.

    Args:
        dataset: any dataset that a DataLoader accepts.
        phase: "train" or "valid", for the log.
        device: the device of the batches; by default they stay in the host's memory.
        num_threads: how many threads read samples that are not in memory; 0 reads without.
        kwargs: the other arguments of a DataLoader.

    Raises:
        TypeError: a DataLoader has no such argument.
    """
    for name in kwargs:
        if name not in _ARGUMENTS:
            raise TypeError(f"{name}={kwargs[name]!r}: a DataLoader has no argument {name!r}")
    off_host = device is not None and torch.device(device).type != "cpu"
    make = partial(ThreadLoader, num_threads=num_threads) if num_threads else DataLoader
    loader, path, reason = _choose(dataset, device if off_host else None, kwargs, make)
    if off_host and path != "resident":
        loader = Prefetcher(loader, device)
    log.info("data_path", phase=phase, path=path, reason=reason, loader=repr(loader))
    return loader


def _choose(
    dataset: Any, device: Any, kwargs: dict[str, Any], make: Callable[..., DataLoader[Any]]
) -> tuple[Any, str, str]:
    """Return a loader, the name of its path, and the reason for it.

    `make` is called for a dataset whose samples are not in memory.
    """
    if kwargs["batch_size"] is None:
        return make(dataset, **kwargs), "samples", "batch_size=None asks for single samples"
    if kwargs.get("collate_fn") is not None:
        return make(dataset, **kwargs), "samples", "it has a collate_fn, which takes samples"
    try:
        found = in_memory(dataset)
    except NotInMemoryError as exc:
        if _returns_batches(dataset):
            return make(dataset, **{**kwargs, "collate_fn": collate}), "batches", str(exc)
        return make(dataset, **kwargs), "samples", str(exc)
    kwargs = {key: value for key, value in kwargs.items() if key not in _WORKER_ARGUMENTS}
    path, reason = "tensors", "its samples are in memory"
    tensors, transform, indices = found
    if device is not None and _fits(tensors, device):
        if indices is not None:  # a copy is made in any case: only of what is used
            tensors, indices = tuple(t.index_select(0, indices) for t in tensors), None
        kwargs = {**kwargs, "device": device, "pin_memory": False}
        path, reason = "resident", "its samples are in memory, and fit on the device"
    return TensorLoader(*tensors, transform=transform, indices=indices, **kwargs), path, reason


def collate(batch: Any) -> Any:
    """Collate what `__getitems__` returned if it is a list of samples; anything else is a batch."""
    return default_collate(batch) if isinstance(batch, list) else batch


def _returns_batches(dataset: Any) -> bool:
    while isinstance(dataset, Subset):  # it has `__getitems__` even if its dataset does not
        dataset = dataset.dataset
    return hasattr(dataset, "__getitems__")


def _fits(tensors: tuple[torch.Tensor, ...], device: Any) -> bool:
    """Whether the tensors take no more than half of the free memory of a device."""
    if not is_accelerator(torch.device(device)):
        return False
    try:
        free, _ = torch.accelerator.get_memory_info(device)
    except RuntimeError:  # not every device tells
        return False
    return sum(t.nbytes for t in tensors) <= free // 2

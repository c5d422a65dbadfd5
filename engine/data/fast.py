"""The fastest loader that yields a dataset's batches, bit for bit, as a plain DataLoader would."""

from __future__ import annotations

from typing import Any

import structlog
import torch
from torch.utils.data import DataLoader, Subset, default_collate

from .in_memory import NotInMemoryError, in_memory
from .prefetch import Prefetcher
from .tensor_loader import TensorLoader

log = structlog.get_logger("eventrain")

_OF_WORKERS = (
    "multiprocessing_context",
    "num_workers",
    "persistent_workers",
    "prefetch_factor",
    "timeout",
    "worker_init_fn",
)


def loader_for(
    dataset: Any, phase: str, device: str | torch.device | None = None, **kwargs: Any
) -> Any:
    """Choose a loader, and log which and why.

    Args:
        dataset: any that a DataLoader takes.
        phase: "train" or "valid", for the log.
        device: where the batches are to be; by default the loader leaves them in memory.
        kwargs: a DataLoader's.
    """
    away = device is not None and torch.device(device).type != "cpu"
    loader, path, reason = _loader(dataset, device if away else None, kwargs)
    if away and path != "resident":
        loader = Prefetcher(loader, device)
    log.info("data_path", phase=phase, path=path, reason=reason, loader=repr(loader))
    return loader


def _loader(dataset: Any, device: Any, kwargs: dict[str, Any]) -> tuple[Any, str, str]:
    """A loader, the path that it takes, and why."""
    if kwargs.get("collate_fn") is not None:
        return DataLoader(dataset, **kwargs), "samples", "it has a collate_fn, which takes samples"
    try:
        tensors, transform = in_memory(dataset)
    except NotInMemoryError as exc:
        if _hands_out_batches(dataset):
            return DataLoader(dataset, **{**kwargs, "collate_fn": collate}), "batches", str(exc)
        return DataLoader(dataset, **kwargs), "samples", str(exc)
    own = {key: value for key, value in kwargs.items() if key not in _OF_WORKERS}
    path, reason = "tensors", "its samples are in memory"
    if device is not None and _fits(tensors, device):
        own["device"] = device
        path, reason = "resident", "its samples are in memory, and fit on the device"
    return TensorLoader(*tensors, transform=transform, **own), path, reason


def collate(batch: Any) -> Any:
    """Collate what a dataset's `__getitems__` returned: a list of samples; else it is a batch."""
    return default_collate(batch) if isinstance(batch, list) else batch


def _hands_out_batches(dataset: Any) -> bool:
    while isinstance(dataset, Subset):  # hands on what its dataset does
        dataset = dataset.dataset
    return hasattr(dataset, "__getitems__")


def _fits(tensors: tuple[torch.Tensor, ...], device: Any) -> bool:
    """Whether they take no more than half of what is free on a device."""
    if torch.device(device).type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return sum(t.nbytes for t in tensors) <= free // 2

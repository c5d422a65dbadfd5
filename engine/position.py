"""Where in the data a fit is, and how a loader is read on from there."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset

from .prefetch import Prefetcher
from .tensor_loader import TensorLoader


@dataclass(frozen=True, slots=True)
class Position:
    """A place between two batches of a fit.

    Attributes:
        epoch: the epoch, from 0.
        training: whether in its training or in its validating part.
        batches: how many batches of that part are done.
    """

    epoch: int = 0
    training: bool = True
    batches: int = 0

    def is_beyond(self, epoch: int, training: bool) -> bool:
        """Whether that part of that epoch is done."""
        return (epoch, not training) < (self.epoch, not self.training)

    def is_within(self, epoch: int, training: bool) -> bool:
        """Whether it is in that part of that epoch, and not at its beginning."""
        return self.batches > 0 and (epoch, training) == (self.epoch, self.training)


@dataclass(slots=True)
class Done:
    """How much of a fit is completed, in training or in validation.

    What was done before the checkpoint that is resumed counts, too.
    """

    epochs: int = 0
    batches: int = 0
    steps: int = 0


class Reading(NamedTuple):
    """How a loader is read on from the middle of an epoch.

    Attributes:
        how: "state" by the loader's own `state_dict`; "skip" by passing over the samples;
            "again" by reading what was read once more, without training on it.
        doubt: why the batches might not be those they would have been; None if they are.
    """

    how: str
    doubt: str | None = None


def reading_of(loader: Any) -> Reading:
    """How this loader would be read on."""
    if isinstance(loader, Prefetcher):
        inner = reading_of(loader.loader)
        if inner.how == "state":
            return Reading("again", "a Prefetcher's loader is ahead of what is trained with")
        return inner
    if hasattr(loader, "base_dataloader"):  # and a state_dict, whatever that is
        return Reading("again", "accelerate's loaders are a batch ahead of what is trained with")
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        if getattr(loader, "num_workers", 0):
            return Reading("state", "the random states of its workers are not in its state")
        return Reading("state")
    if isinstance(loader, Sequence):
        return Reading("again")
    if type(loader) not in (DataLoader, TensorLoader):
        return Reading(
            "again", f"of {type(loader).__name__} it is not known that it repeats itself"
        )
    if foreign := [s for s in (loader.sampler, loader.batch_sampler) if not _is_known(s)]:
        name = type(foreign[0]).__name__
        how = "skip" if loader.num_workers == 0 else "again"
        return Reading(how, f"of {name} it is not known that its order depends on what is saved")
    if isinstance(loader.dataset, IterableDataset):
        return Reading("again", "its dataset is an IterableDataset, which may not repeat itself")
    if loader.num_workers == 0:
        return Reading("skip")
    # The random states of worker processes cannot be set: what they drew, they draw again.
    if loader.persistent_workers:
        return Reading("again", "its persistent workers keep random states over epochs")
    return Reading("again")


def _is_known(sampler: Any) -> bool:
    """Whether the order of a sampler follows from torch's random states, which are saved."""
    own = type(sampler).__module__.startswith("torch.utils.data")
    return (
        sampler is None
        or own
        or isinstance(sampler, list | tuple | range)
        or hasattr(sampler, "generator")
    )


def read_on(loader: Iterable[Any], n: int, state: Any) -> Iterator[Any]:
    """The batches of an epoch from the n-th on, where its random states are those of its start.

    Args:
        loader: one that was made in the same way.
        n: how many batches were done.
        state: what the loader's `state_dict` said then, if it has one.

    Raises:
        ValueError: the loader has no n batches any more.
    """
    how = reading_of(loader).how
    if isinstance(loader, Prefetcher):
        ahead = copy.copy(loader)
        ahead.loader = _read_on(loader.loader, how, n, state)
        return iter(ahead)
    return _read_on(loader, how, n, state)


def _read_on(loader: Iterable[Any], how: str, n: int, state: Any) -> Iterator[Any]:
    if how == "state":
        loader.load_state_dict(state)  # type: ignore[attr-defined]
        return iter(loader)
    if how == "skip":
        # The same loader, whose sampler passes over what was done: nothing is loaded for it.
        loader = copy.copy(loader)
        own = vars(loader)
        name = "sampler" if own["batch_sampler"] is None else "batch_sampler"
        passed_over: Iterator[Any] = _Once(own[name])
        own[name] = passed_over
        batches = iter(loader)  # a seed is drawn here, and an order by the sampler's first index
    else:
        passed_over = batches = iter(loader)
    if (done := sum(1 for _ in islice(passed_over, n))) < n:
        raise ValueError(f"{n} batches of this epoch were done, but now it has only {done}")
    return batches


class _Once(Iterator[Any]):
    """A sampler for one epoch, that may be advanced from outside."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._indices = iter(sampler)

    def __next__(self) -> Any:
        return next(self._indices)

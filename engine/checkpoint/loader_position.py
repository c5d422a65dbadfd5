"""Resuming a loader in the middle of an epoch."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

from torch.utils.data import IterableDataset

from ..data.async_loader import AsyncLoader, is_async, readable
from ..data.dataloaders import LOADERS
from ..data.prefetch import Prefetcher
from ..data.thread_loader import ThreadLoader
from .data_state import draws_while_it_reads


class ResumeStrategy(NamedTuple):
    """How a loader is resumed in the middle of an epoch.

    Attributes:
        how: "state": by the loader's own `state_dict`; "skip": its sampler skips the samples that
            were used; "replay": the batches are read again, without training on them.
        caveat: why the resumed batches may differ from those of an uninterrupted run; None if they
            are the same.
    """

    how: Literal["state", "skip", "replay"]
    caveat: str | None = None


def resume_strategy(loader: Any) -> ResumeStrategy:
    """Choose how to resume this loader."""
    if isinstance(loader, Prefetcher):
        inner = resume_strategy(loader.loader)
        if inner.how == "state":
            return ResumeStrategy("replay", "a Prefetcher reads its loader ahead of the training")
        if inner.how == "skip" and draws_while_it_reads(loader.loader):
            return ResumeStrategy("replay", inner.caveat)  # the saved states are from ahead, too
        return inner
    if is_async(loader) or isinstance(loader, AsyncLoader):
        return ResumeStrategy(
            "replay",
            "an async source is asked again for the batches that were used before, which may not"
            " be the same; those that were read ahead are lost",
        )
    if hasattr(loader, "base_dataloader"):  # before the next test, as it also has a state_dict
        return ResumeStrategy("replay", "accelerate's loaders read one batch ahead of the training")
    if hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict"):
        if getattr(loader, "num_workers", 0):
            return ResumeStrategy("state", "the random states of its workers are not in its state")
        return ResumeStrategy("state")
    if isinstance(loader, Sequence):
        return ResumeStrategy("replay")
    if type(loader) not in LOADERS:
        return ResumeStrategy(
            "replay", f"{type(loader).__name__} may not yield the same batches again"
        )
    samplers = (loader.sampler, loader.batch_sampler)
    if unknown := [s for s in samplers if not _is_reproducible(s)]:
        name = type(unknown[0]).__name__
        how: Literal["skip", "replay"] = "skip" if loader.num_workers == 0 else "replay"
        return ResumeStrategy(how, f"the order of {name} may depend on state that is not saved")
    if isinstance(loader.dataset, IterableDataset):
        return ResumeStrategy(
            "replay",
            "its dataset is an IterableDataset, which may not yield the same samples again",
        )
    if isinstance(loader, ThreadLoader) and draws_while_it_reads(loader):
        return ResumeStrategy("skip", "its threads draw from the dataset's generators in any order")
    if loader.num_workers == 0:
        return ResumeStrategy("skip")
    # The random states of worker processes cannot be set, so the workers replay the epoch.
    if loader.persistent_workers:
        return ResumeStrategy(
            "replay", "its persistent workers keep their random states over epochs"
        )
    return ResumeStrategy("replay")


def reads_ahead(loader: Any) -> bool:
    """Whether a loader's sampler, and thus its generator, is ahead of the training."""
    return isinstance(loader, Prefetcher | ThreadLoader)


def _is_reproducible(sampler: Any) -> bool:
    """Whether a sampler's order depends only on torch's random states, which are saved."""
    return (
        sampler is None
        or type(sampler).__module__.startswith("torch.utils.data")
        or isinstance(sampler, list | tuple | range)
        or hasattr(sampler, "generator")
    )


def skip_to(loader: Iterable[Any], n: int, state: Any) -> Iterator[Any]:
    """The batches of an epoch from index n on. The random states must be those of its start.

    Args:
        loader: made in the same way as the original one.
        n: how many batches were completed.
        state: the loader's `state_dict` after those, if it has one.

    Raises:
        ValueError: the loader has fewer than n batches now.
    """
    how = resume_strategy(loader).how
    if isinstance(loader, Prefetcher):
        ahead = copy.copy(loader)
        ahead.loader = _skip_to(loader.loader, how, n, state)
        return iter(ahead)
    return _skip_to(loader, how, n, state)


def _skip_to(loader: Iterable[Any], how: str, n: int, state: Any) -> Iterator[Any]:
    if how == "state":
        loader.load_state_dict(state)  # type: ignore[attr-defined]
        return iter(loader)
    if how == "skip":
        # A copy of the loader whose sampler skips the used samples, so that none is loaded again.
        loader = copy.copy(loader)
        attributes = vars(loader)
        name = "sampler" if attributes["batch_sampler"] is None else "batch_sampler"
        skipped: Iterator[Any] = _OneEpoch(attributes[name])
        attributes[name] = skipped
        if isinstance(loader, ThreadLoader):
            loader.first_batch = n
        batches = iter(loader)  # draws the seed now, and the sampler's order with the first index
    else:
        skipped = batches = iter(readable(loader))
    if (done := sum(1 for _ in islice(skipped, n))) < n:
        raise ValueError(f"{n} batches of this epoch were done, but now it has only {done}")
    if isinstance(loader, ThreadLoader) and isinstance(skipped, _OneEpoch):
        skipped.draw_ahead(loader.read_ahead)  # as far as the generator was after n batches
    return batches


class _OneEpoch(Iterator[Any]):
    """The indices of a sampler for one epoch, which can be advanced before the loader uses them."""

    def __init__(self, sampler: Iterable[Any]) -> None:
        self._indices: Iterator[Any] = iter(sampler)

    def __next__(self) -> Any:
        return next(self._indices)

    def draw_ahead(self, n: int) -> None:
        """Draw the next n indices now, for later."""
        drawn = list(islice(self._indices, n))
        self._indices = chain(drawn, self._indices)

"""A DataLoader that reads its dataset by threads of this process, and forks none."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...events.checks import is_int
from .. import log
from .readers import Readers, tasks_of
from .sample_random import global_states

_OF_WORKERS = (
    "num_workers",
    "prefetch_factor",
    "persistent_workers",
    "worker_init_fn",
    "multiprocessing_context",
    "timeout",
)


class ThreadLoader(DataLoader[Any]):
    """A DataLoader that reads a map-style dataset by threads, ahead of who iterates it.

    In all other respects it is torch's DataLoader: with the same arguments and the same random
    state it yields the same batches, in the same order, as with `num_workers=0`. It pays for a
    dataset whose work is done outside of Python's global lock, such as decoding images. Several
    threads call the dataset and `collate_fn` at once, so these must allow that.

    No process is forked, and the dataset is not pickled. The threads of an iteration are joined
    when it is exhausted or closed, or has raised an error; they end with the sample that they read.

    A dataset that draws random numbers does not draw them in the order of a DataLoader. The first
    batch shows whether it does, and that is logged once: as "random_numbers_per_sample" where torch
    draws them on the CPU, because then each sample draws from its `sample_generator()`, so that the
    batches depend on the random state alone; as "random_numbers_depend_on_threads" for those of
    numpy and Python's `random`, which a dataset can make reproducible by `sample_generator()`.

    Args:
        dataset: a map-style dataset. If it has `__getitems__`, it is asked for whole batches.
        batch_size, shuffle: as for a DataLoader.
        num_threads: how many threads read, 1 or more. Each reads a batch.
        read_ahead: how many batches are held at most, with those that are being read, but without
            the one in use. By default two per thread. The sampler is as far ahead.
        kwargs: the other arguments of a DataLoader, without those for worker processes. Batches are
            pinned only where there is an accelerator.

    Raises:
        TypeError: the dataset is an IterableDataset.
        ValueError: `num_threads` or `read_ahead` is not an integer of 1 or more, or there is an
            argument for worker processes.

    Example:
        >>> import torch
        >>> from torch.utils.data import DataLoader, Dataset
        >>> class Squares(Dataset):
        ...     def __len__(self):
        ...         return 10
        ...     def __getitem__(self, index):
        ...         return torch.tensor([index, index**2])
        >>> _ = torch.manual_seed(0); batches = [*ThreadLoader(Squares(), 4, True, num_threads=2)]
        >>> _ = torch.manual_seed(0); same = [*DataLoader(Squares(), 4, shuffle=True)]
        >>> len(batches), all(map(torch.equal, batches, same))
        (3, True)

    Source: SPDL, which showed that threads can read as fast as processes.
    """

    first_batch = 0
    """The index in the pass of the first batch of an iteration; not 0 in a resumed pass."""

    def __init__(
        self,
        dataset: Dataset[Any],
        batch_size: int | None = 1,
        shuffle: bool | None = None,
        *,
        num_threads: int = 2,
        read_ahead: int | None = None,
        **kwargs: Any,
    ) -> None:
        for name in _OF_WORKERS:
            if kwargs.get(name):
                raise ValueError(
                    f"{name}={kwargs[name]!r} is for worker processes, but a ThreadLoader reads by"
                    " threads: leave it out, and give num_threads=... and read_ahead=..."
                )
        if isinstance(dataset, IterableDataset):
            raise TypeError(
                f"{type(dataset).__name__} is an IterableDataset, which only one thread can read:"
                " use Prefetcher(DataLoader(dataset, ...))"
            )
        read_ahead = 2 * num_threads if read_ahead is None else read_ahead
        for name, value in ("num_threads", num_threads), ("read_ahead", read_ahead):
            if not is_int(value, 1):
                raise ValueError(f"{name}={value!r}: give an integer, 1 or more")
        super().__init__(dataset, batch_size, shuffle, **kwargs)
        self.num_threads = num_threads
        self.read_ahead = read_ahead
        self._told: set[str] = set()  # what was logged

    def __repr__(self) -> str:
        return (
            f"ThreadLoader({type(self.dataset).__name__}, batch_size={self.batch_size},"
            f" num_threads={self.num_threads}, read_ahead={self.read_ahead})"
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # In the order of a DataLoader, and now, as it does.
        indices = iter(self.sampler if self.batch_sampler is None else self.batch_sampler)
        seed = torch.empty((), dtype=torch.int64).random_(generator=self.generator).item()
        return self._read(indices, int(seed))

    def _read(self, indices: Iterator[Any], seed: int) -> Iterator[Any]:
        tasks = tasks_of(indices, self.first_batch)
        readers = Readers(self, self.num_threads, seed)
        try:
            waiting = deque(islice(tasks, self.read_ahead))
            before = global_states() if len(self._told) < 2 else None
            for task in waiting:
                readers.submit(task)
            while waiting:
                task = waiting.popleft()
                task.ready.get()
                if before is not None:
                    self._tell_of_draws(before, readers.drawn)
                    before = None
                if task.error is None and (following := next(tasks, None)) is not None:
                    waiting.append(following)
                    readers.submit(following)
                    del following
                yield task.take()
        finally:
            readers.leave()

    def _tell_of_draws(self, before: dict[str, Any], drawn: bool) -> None:
        """Log, once each, which random numbers were drawn while the first batch was read."""
        if drawn and "drawn" not in self._told:
            self._told.add("drawn")
            log.info(
                "random_numbers_per_sample",
                loader=repr(self),
                reason="the dataset draws from torch: each sample has a generator of its own here,"
                " so they are not those of a DataLoader, but the same in every run",
            )
        now = global_states()
        changed = [name for name, state in before.items() if state != now[name]]
        if changed and "changed" not in self._told:
            self._told.add("changed")
            log.warning(
                "random_numbers_depend_on_threads",
                loader=repr(self),
                generators=changed,
                reason="the state of these global generators changed while the first batch was"
                " read: if that was the dataset, the order in which its samples draw from them"
                " depends on the threads, and another run has other samples",
                hint="draw from eventrain.engine.sample_generator() in the dataset",
            )

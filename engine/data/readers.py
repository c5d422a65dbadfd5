"""The threads that read a dataset for one iteration of a `ThreadLoader`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from queue import SimpleQueue
from reprlib import repr as shortened
from typing import Any

import torch
from torch.utils.data import DataLoader, Subset

from ...events import CancelException
from .accelerator import has_pinned_memory
from .containers import map_tensors
from .sample_random import SampleRandom
from .thread_state import ReadingThread


class Task:
    """A batch to read.

    Attributes:
        number: its index in the pass.
        indices: those of its samples; one index where the loader yields single samples.
        ready: has an item when it was read, or has failed.
        error: what was raised.
    """

    def __init__(self, number: int, indices: Any, error: BaseException | None = None) -> None:
        self.number, self.indices = number, indices
        self.ready: SimpleQueue[None] = SimpleQueue()
        self.error = error
        self._box: list[Any] = []

    def run(self, fetch: Callable[[int, Any], Any]) -> None:
        """Read the batch by a function of `number` and `indices`."""
        try:
            if self.error is None:
                self._box.append(fetch(self.number, self.indices))
        except BaseException as exc:  # a dataset may raise a cancel
            self.error = exc
        finally:
            self.ready.put(None)

    def take(self) -> Any:
        """The batch, which is not kept; or raise the error."""
        try:
            if self.error is not None:
                raise self.error
            return self._box.pop()
        finally:
            self.error = None  # avoids a reference cycle of the error, its traceback and this


def tasks_of(indices: Iterator[Any], first: int) -> Iterator[Task]:
    """The batches of a pass; an error of the sampler comes in its place."""
    for number in count(first):
        try:
            task = Task(number, next(indices))
        except StopIteration:
            return
        except (Exception, CancelException) as exc:
            yield Task(number, None, exc)
            return
        yield task
        del task


class Readers:
    """The threads of one iteration, each of which is started when there is a batch for it.

    Args:
        loader: its dataset, `collate_fn` and the like are used; it is not iterated.
        n: how many threads there are at most.
        seed: of the iteration, for the generators of its samples.

    Attributes:
        left: whether the iteration is over.
    """

    def __init__(self, loader: DataLoader[Any], n: int, seed: int) -> None:
        self.loader, self.n, self.seed = loader, n, seed
        self.tasks: SimpleQueue[Task | None] = SimpleQueue()
        self.left = False
        self._threads: list[_Reader] = []

    def submit(self, task: Task) -> None:
        """Have a batch read."""
        self.tasks.put(task)
        if len(self._threads) < self.n:
            thread = _Reader(self)
            thread.start()
            self._threads.append(thread)

    @property
    def drawn(self) -> bool:
        """Whether the dataset has drawn from torch without a generator."""
        return any(thread.random.drawn for thread in self._threads)

    def leave(self) -> None:
        """End the threads, each after the sample that it reads, and wait until they have ended."""
        for thread in self._threads:
            thread.stop()
        for thread in self._threads:
            thread.wait()


class _LeftError(BaseException):
    """Ends the reading of a batch that nobody waits for, unless the program ends."""


class _Reader(ReadingThread):
    """A thread that reads whole batches."""

    def __init__(self, readers: Readers) -> None:
        super().__init__("reader")
        self.readers = readers
        self.random = SampleRandom(readers.seed)
        loader = readers.loader
        self.dataset: Any = loader.dataset
        self.collate_fn = loader.collate_fn
        self.single = loader.batch_sampler is None
        self.whole = not self.single and _has_getitems(loader.dataset)
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        self.pin = (
            loader.pin_memory and accelerator is not None and has_pinned_memory(accelerator.type)
        )

    def run(self) -> None:
        try:
            super().run()
        except BaseException as exc:
            while task := self.readers.tasks.get():
                task.error = exc
                task.ready.put(None)

    def read(self) -> None:
        with self.random:
            while (task := self.readers.tasks.get()) is not None:
                task.run(self._fetch)
                del task

    def stop(self) -> None:
        self.readers.left = True
        self.readers.tasks.put(None)

    def _fetch(self, number: int, indices: Any) -> Any:
        samples = self._samples(number, indices)
        self.random.begin(number, "collate")
        try:
            batch = self.collate_fn(samples)
        except BaseException as exc:
            exc.add_note(f"raised while collating the samples with indices {shortened(indices)}")
            raise
        return map_tensors(batch, lambda x: x.pin_memory(), _can_be_pinned) if self.pin else batch

    def _samples(self, number: int, indices: Any) -> Any:
        if self.single:
            return self._sample(number, 0, indices)
        if not self.whole:
            return [self._sample(number, place, index) for place, index in enumerate(indices)]
        self._begin(number, 0)
        try:
            return self.dataset.__getitems__(indices)
        except BaseException as exc:
            exc.add_note(f"raised while reading the samples with indices {shortened(indices)}")
            raise

    def _begin(self, number: int, place: int) -> None:
        if self.readers.left:
            raise _LeftError
        self.random.begin(number, place)

    def _sample(self, number: int, place: int, index: Any) -> Any:
        self._begin(number, place)
        try:
            return self.dataset[index]
        except BaseException as exc:
            exc.add_note(f"raised while reading the sample with index {index!r} of the dataset")
            raise


def _has_getitems(dataset: Any) -> bool:
    """Whether a dataset has a `__getitems__` that is more than a loop over its samples."""
    while isinstance(dataset, Subset) and type(dataset).__getitems__ is Subset.__getitems__:
        dataset = dataset.dataset
    return bool(getattr(dataset, "__getitems__", None))


def _can_be_pinned(x: Any) -> bool:
    return callable(getattr(x, "pin_memory", None))

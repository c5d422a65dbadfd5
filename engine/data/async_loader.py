"""A loader of batches that come from the host's event loop."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from typing import Any

from ...events.checks import is_int
from .async_reading import READINGS, Reading


class AsyncLoader:
    """Reads batches from an async source, on the event loop of the fit, ahead of the training.

    A loader of `DataLoaders`, `validate` or `get_preds` may be an async iterable itself: it is read
    as `AsyncLoader(source)`. The source is read by one task of the event loop that awaits the fit.
    The training waits for the source, and the source for the training: at most `buffer` batches are
    asked for ahead of the one in use.

    The task ends with the pass over the source, and is cancelled when that is left early. Then, in
    the same task, the source's iterator is closed, if it has an `aclose()`, for which it has
    `learner.cleanup_timeout` seconds. The fit returns when that is done. The batches that were read
    ahead are lost. An error of the source is raised in the fit, after the batches before it.

    An async iterator, such as an async generator, can be read only once: each epoch with
    `epoch_length` continues it, and it is closed when the fit ends. An object whose `__aiter__`
    makes a new iterator is read from its start in every epoch. So is a function that returns an
    async iterable, which only this class accepts.

    It cannot be positioned: a fit that is resumed in the middle of an epoch reads the batches again
    that were used before, and logs that they may be others ("resume_may_not_be_exact").

    Args:
        source: an async iterable of batches, or a function without arguments that returns one and
            is called for each pass.
        buffer: the most batches to ask for ahead of the one in use, 1 or more.

    Raises:
        TypeError: `source` is neither.
        ValueError: `buffer` is not an integer of 1 or more.
        RuntimeError: it is iterated outside of a fit, or in another thread than that of the fit.

    Example:
        >>> import torch
        >>> from eventrain.engine import AsyncLoader, DataLoaders, TrainLearner
        >>> async def batches():
        ...     for _ in range(3):
        ...         yield torch.ones(4, 2), torch.zeros(4, 1)
        >>> dls = DataLoaders(AsyncLoader(batches, buffer=4))
        >>> TrainLearner(torch.nn.Linear(2, 1), dls).run(2, valid=False).steps
        6
    """

    def __init__(
        self,
        source: AsyncIterable[Any] | Callable[[], AsyncIterable[Any]],
        buffer: int = 2,
    ) -> None:
        if not isinstance(source, AsyncIterable) and not callable(source):
            raise TypeError(
                f"source={source!r} is neither an async iterable nor a function that returns one"
            )
        if not is_int(buffer, 1):
            raise ValueError(f"buffer={buffer!r}: give a number of batches, 1 or more")
        self.source = source
        self.buffer = buffer

    def __repr__(self) -> str:
        return f"AsyncLoader({self.source!r}, buffer={self.buffer})"

    def __len__(self) -> int:
        return len(self.source)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        readings = READINGS.get()
        if readings is None:
            raise RuntimeError(
                f"{self!r} is read on the event loop of a fit, and this is outside of one: use"
                " `async for batch in source` here"
            )
        return _batches(readings.begin(self.source, self.buffer))


def _batches(reading: Reading) -> Iterator[Any]:
    try:
        while box := reading.take():
            yield box.pop()
    finally:
        if not reading.is_only_one:  # the next epoch may continue it
            reading.leave()


def can_be_iterated(loader: Any) -> bool:
    """Whether a `for` can read it."""
    return isinstance(loader, Iterable) or hasattr(loader, "__getitem__")


def is_async(loader: Any) -> bool:
    """Whether a loader has to be read as an `AsyncLoader`; one that is iterable as well has not."""
    return isinstance(loader, AsyncIterable) and not can_be_iterated(loader)


def readable(loader: Any) -> Any:
    """The loader as something that a `for` reads: an async iterable as an `AsyncLoader`."""
    return AsyncLoader(loader) if is_async(loader) else loader


def is_read_once(loader: Any) -> bool:
    """Whether a loader is an iterator, async or not, of which there is one pass."""
    source = loader.source if isinstance(loader, AsyncLoader) else loader
    return isinstance(source, Iterator | AsyncIterator)

"""The reader that iterates the loaders and puts each batch into the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, Self

from .. import log
from ..data.async_loader import readable
from ..data.batches import check_batch
from ..data.dataloaders import why_empty
from .clock import until_last_step
from .state import LoopState
from .trained_parameters import check_trained_parameters


class Pass(Iterator[Any]):
    """One pass over a loader, which several epochs may share.

    Args:
        loader: the loader.
        batches: those that are left; by default all.
        done: the number of batches that were read before.
    """

    def __init__(
        self, loader: Iterable[Any], batches: Iterator[Any] | None = None, done: int = 0
    ) -> None:
        self.loader = loader
        self.done = done
        self._batches = iter(readable(loader)) if batches is None else batches

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        batch = next(self._batches)
        self.done += 1
        return batch


class BatchReader:
    """Reads every epoch of a fit from its first batch.

    Attributes:
        first_epoch: the index of the first epoch of the fit.
        guess: why the size of a batch was a guess; None if it was certain of all.
    """

    first_epoch = 0
    guess: str | None = None
    _pass: Pass | None = None
    """The pass over the training loader that the next epoch continues, with `epoch_length`."""

    def begin(self, loop: LoopState) -> None:
        """Check what receivers of BeforeFit have left. Called after it.

        Raises:
            RuntimeError: the optimizer has parameters that the model no longer has.
        """
        check_trained_parameters(loop)

    def end(self) -> None:
        """Release the loader. Called when the fit is over."""
        self._pass = None

    def includes(self, epoch: int, training: bool) -> bool:
        """Whether the training (or validation) of this epoch is to be run."""
        return True

    def read(self, loop: LoopState) -> Iterator[int]:
        """Read the batches of the current epoch into `loop.batch`; yield their indices.

        Called after BeforeEpoch.
        """
        return self._read_from(loop)

    def _read_from(
        self, loop: LoopState, first: int = 0, batches: Iterable[Any] | None = None
    ) -> Iterator[int]:
        """Read the rest of the current epoch.

        Args:
            loop: the loop that uses the batches.
            first: the index of the first batch.
            batches: the rest of the pass over the epoch's loader; by default, a new pass or, with
                `epoch_length`, the one that the epoch before has left.
        """
        batches = readable(loop.dl) if batches is None else batches
        if not loop.training:
            if loop.valid_length is not None:
                batches = islice(batches, loop.valid_length - first)
        else:
            if loop.epoch_length is not None:
                batches = islice(self._passes(loop), loop.epoch_length - first)
            if loop.max_steps is not None:
                batches = until_last_step(loop, batches)
        return read_batches(loop, batches, first)

    def _passes(self, loop: LoopState) -> Iterator[Any]:
        return chain.from_iterable(self._each_pass(loop))

    def _each_pass(self, loop: LoopState) -> Iterator[Pass]:
        if self._pass is None or self._pass.loader is not loop.dl:
            self._pass = self._begin_pass(loop)
        yield self._pass
        while True:
            self._pass = self._begin_pass(loop)
            yield self._pass
            if not self._pass.done:
                raise ValueError(why_empty(loop.dl, "train"))

    def _begin_pass(self, loop: LoopState) -> Pass:
        return Pass(loop.dl)

    def note_guess(self, loop: LoopState, size: int, why: str) -> None:
        """Log, once per fit, that the size of a batch is a guess."""
        if self.guess is None:
            self.guess = why
            log.warning(
                "batch_size_is_a_guess",
                run_id=loop.run_id,
                size=size,
                reason=why,
                hint="define batch_size(self, batch) in your learner class: it returns the number"
                " of samples in a batch",
            )


def read_batches(loop: LoopState, batches: Iterable[object], first: int = 0) -> Iterator[int]:
    """Read batches into `loop.batch`, yield their indices, and count their samples.

    The loop holds the only reference to a batch, so one that a callback replaces is freed.

    Args:
        loop: the loop that uses the batches.
        batches: those of an epoch, or the rest of it.
        first: the index of the first batch.

    Raises:
        ValueError: there was no batch.
        TypeError: there was something that cannot be a batch, such as a number.
    """
    phase = "train" if loop.training else "valid"
    count = first
    try:
        for loop.batch in batches:
            size = loop.batch_size(loop.batch)
            if type(size) is not int or size < 1:
                size = check_batch(loop.batch, size, phase, count)
            loop.n_samples += size
            if count == loop.n_iter:  # the loader has more batches than it told
                loop.n_iter = None
            yield count
            count += 1
    except Exception as exc:
        exc.add_note(f"raised while reading batch {count} of dls.{phase}")
        raise
    if not count:
        raise ValueError(why_empty(loop.dl, phase))
    loop.all_read = True

"""The reader that iterates a loader and puts each batch into the loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from .. import log
from ..data.batches import check_batch
from ..data.dataloaders import why_empty
from .state import LoopState
from .trained_parameters import check_trained_parameters


class BatchReader:
    """Reads every epoch of a fit from its first batch.

    Attributes:
        guess: why the size of a batch was a guess; None if it was certain of all.
    """

    guess: str | None = None

    def begin(self, loop: LoopState) -> None:
        """Check what receivers of BeforeFit have left. Called after it.

        Raises:
            RuntimeError: the optimizer has parameters that the model no longer has.
        """
        check_trained_parameters(loop)

    def includes(self, epoch: int, training: bool) -> bool:
        """Whether the training (or validation) of this epoch is to be run."""
        return True

    def read(self, loop: LoopState) -> Iterator[int]:
        """Read the batches of the current epoch into `loop.batch`; yield their indices.

        Called after BeforeEpoch.
        """
        return read_batches(loop, loop.dl)

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


def read_batches(loop: LoopState, loader: Iterable[object], first: int = 0) -> Iterator[int]:
    """Read batches into `loop.batch`, yield their indices, and count their samples.

    The loop holds the only reference to a batch, so one that a callback replaces is freed.

    Args:
        loop: the loop that uses the batches.
        loader: yields the batches.
        first: the index of the first batch.

    Raises:
        ValueError: the loader yielded no batch.
        TypeError: the loader yielded something that cannot be a batch, such as a number.
    """
    phase = "train" if loop.training else "valid"
    count = first
    try:
        for loop.batch in loader:
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
        raise ValueError(why_empty(loader, phase))
    loop.all_read = True

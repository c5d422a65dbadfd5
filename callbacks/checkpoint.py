"""Checkpoints of the whole run, written beside the training."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal, cast

import structlog

from ..engine import Learner
from ..engine.checkpoint.background import BackgroundWriter
from ..engine.checkpoint.folder import CheckpointFolder
from ..engine.checkpoint.loader_position import resume_strategy
from ..engine.checkpoint.resume import ResumableReader
from ..engine.checkpoint.snapshot import Snapshot
from ..engine.checkpoint.state import state_of, stateless
from ..engine.loop.state import Position
from ..events import BeforeFit, Callback, CleanupBatch, CleanupEpoch, CleanupFit, Event
from ._checks import check_float, check_int
from ._monitor import is_training

log = structlog.get_logger("eventrain")


class CheckpointCB(Callback):
    """Saves the whole run, so that `fit(..., resume="last")` goes on as if nothing had happened.

    Saved are model, gradients that are kept, optimizer, every callback (and learner class) with
    `state_dict` and `load_state_dict`, the random states of Python, numpy, torch, the device and
    the loaders' generators, and the place in the data. What of that is in no `state_dict`, such as
    how far `every=` of a subscription has counted, begins anew.

    The training waits only while the state is copied to the host; a thread writes it, and the next
    save waits for the one before. A graceful `stop`, `TimeLimitCB` and the end of the last epoch
    save, too, and `fit` returns when all is on the disk. Nothing is saved in `validate` or
    `lr_find`.

    Args:
        folder: where checkpoints go; made if it is not there. One run at a time writes there, and
            those of other runs are left alone.
        every_epochs: save when so many epochs are over, validation included. By default 1, if
            no other `every_` is given.
        every_batches: save after so many training batches.
        every_seconds: save after the first batch that ends so many seconds after the last save.
        keep_last: of this run's, keep the last so many; None for all.
        keep_best: (number, "min" or "max"): keep the one with the best of these numbers, too, of
            the validation where there is one; of those saved at the end of an epoch.
        background: whether to write beside the training; otherwise it waits.

    Attributes:
        last: the path of the last checkpoint of this run; None if there is none.
        best: the path of the best, with `keep_best`.

    Raises:
        ValueError: a number is not positive, or `keep_best` is no such pair.
        OSError: from the fit, where a checkpoint could not be written; those before are whole.

    Example:
        >>> import tempfile, torch
        >>> from eventrain.callbacks import CheckpointCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for n_epochs, resume in (1, None), (3, "last"):
        ...         learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
        ...         result = learner.run(n_epochs, cbs=CheckpointCB(folder), resume=resume)
        ...         print(result.resumed_from is not None, result.epochs)
        False 1
        True 3

    Source: Lightning's `ModelCheckpoint`; the background of torch's `async_save`.
    """

    order = math.inf  # what is saved is what all others have left
    run_after = ("JournalCB",)

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every_epochs: int | None = None,
        every_batches: int | None = None,
        every_seconds: float | None = None,
        keep_last: int | None = 3,
        keep_best: tuple[str, Literal["min", "max"]] | None = None,
        background: bool = True,
    ) -> None:
        if every_epochs is every_batches is every_seconds is None:
            every_epochs = 1
        counts = {
            "every_epochs": every_epochs,
            "every_batches": every_batches,
            "keep_last": keep_last,
        }
        for name, n in counts.items():
            if n is not None:
                check_int(name, n, "a positive number, or None")
        if every_seconds is not None:
            check_float("every_seconds", every_seconds, "a positive number, or None", positive=True)
        if keep_best is not None:
            if not isinstance(keep_best, tuple | list) or len(keep_best) != 2:
                raise ValueError(f'keep_best={keep_best!r}: give a pair, such as ("loss", "min")')
            if not isinstance(keep_best[0], str):
                raise ValueError(f"keep_best={keep_best!r}: the first is the name of a number")
            if keep_best[1] not in ("min", "max"):
                raise ValueError(f"keep_best={keep_best!r}: the second is 'min' or 'max'")
            if every_epochs is None:
                raise ValueError("keep_best is of those saved with every_epochs: give that, too")
        self.folder = Path(folder)
        self.every_epochs = every_epochs
        self.every_batches = every_batches
        self.every_seconds = every_seconds
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.background = background
        self.last: Path | None = None
        self.best: Path | None = None
        self._checkpoints: CheckpointFolder | None = None  # while a run is saved
        self._copy: Snapshot | None = None

    @property
    def checkpoint_folder(self) -> Path:
        """The folder that `fit(resume="last")` resumes from."""
        return self.folder

    # ------------------------------------------------------------------------- when it is saved

    def before_fit(self, event: BeforeFit) -> None:
        learner = _learner_of(event)
        if not is_training(learner):
            return
        Snapshot(state_of(learner))  # what cannot be saved is told before work is lost
        self._log_caveats(learner)
        self._checkpoints = CheckpointFolder(
            self.folder, event.run_id, self.keep_last, self.keep_best
        )
        self.last, self.best = self._checkpoints.last, self._checkpoints.best
        self._writer = BackgroundWriter(self.background)
        self._begin_interval()

    def _saves(self, event: Event) -> bool:
        """Whether it is this fit that is saved: not one that may not, nor another learner's."""
        return self._checkpoints is not None and self._checkpoints.run_id == event.run_id

    def _is_itself(self, event: Event) -> bool:
        """Whether a fit that is saved has loaded what it resumes."""
        return self._saves(event) and _reader_of(_learner_of(event)).loaded

    def cleanup_batch(self, event: CleanupBatch) -> None:
        if not self._is_itself(event):
            return
        self._writer.check()
        whole = event.end.status == "completed"
        if event.learner.graceful_stop_due or (whole and self._is_due(event)):
            self._save(_learner_of(event), Position(event.epoch, event.training, event.iter + 1))

    def _is_due(self, event: CleanupBatch) -> bool:
        if self.every_seconds is not None and monotonic() >= self._due:
            return True
        n = self.every_batches
        return event.training and n is not None and event.learner.done.batches % n == 0

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        learner = _learner_of(event)
        if not self._is_itself(event):
            return
        done = event.epoch + 1
        is_over = not event.training or not learner.validates
        due = self.every_epochs is not None and done % self.every_epochs == 0
        due = is_over and learner.outer_continues and (due or done == event.n_epochs)
        if learner.graceful_stop_due or due:
            after = Position(done, learner.trains) if is_over else Position(event.epoch, False)
            measured = is_over and event.end.status == "completed"  # all of it
            self._save(learner, after, event.metrics if measured else {})

    def cleanup_fit(self, event: CleanupFit) -> None:
        if self._checkpoints is not None and self._saves(event):
            checkpoints, self._checkpoints, self._copy = self._checkpoints, None, None
            try:
                self._writer.close()
            finally:
                checkpoints.close()

    # -------------------------------------------------------------------------- how it is saved

    def _save(
        self, learner: Learner, position: Position, metrics: Mapping[str, Any] | None = None
    ) -> None:
        assert self._checkpoints is not None
        state = state_of(learner)
        if position.batches:
            state |= _reader_of(learner).position_state(learner)
        self._writer.wait()
        self._copy = copy = Snapshot(state, over=self._copy)
        self._writer.write(partial(self._put, self._checkpoints, position, metrics or {}, copy))
        self._begin_interval()

    def _put(
        self,
        checkpoints: CheckpointFolder,
        position: Position,
        metrics: Mapping[str, Any],
        copy: Snapshot,
    ) -> None:
        checkpoints.put(position, metrics, copy.wait())
        self.last, self.best = checkpoints.last, checkpoints.best

    def _begin_interval(self) -> None:
        self._due = monotonic() + (self.every_seconds or 0)

    def _log_caveats(self, learner: Learner) -> None:
        """What would not be resumed exactly is told before it is needed."""
        if self.every_batches is not None or self.every_seconds is not None:
            for loader in (learner.dls.train, *([learner.dls.valid] if learner.validates else [])):
                if caveat := resume_strategy(loader).caveat:
                    log.warning("resume_may_not_be_exact", run_id=learner.run_id, reason=caveat)
        if found := stateless(learner):
            log.warning(
                "callback_state_not_saved",
                run_id=learner.run_id,
                found=found,
                hint="give the callback state_dict and load_state_dict",
            )


def _learner_of(event: Event) -> Learner:
    return cast(Learner, event.learner)


def _reader_of(learner: Learner) -> ResumableReader:
    return cast(ResumableReader, learner.reader)

"""Checkpoints of the whole run, written while the training runs."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Literal, NoReturn, cast

from ..engine import Learner, log
from ..engine.checkpoint.background import BackgroundWriter
from ..engine.checkpoint.folder import CheckpointFolder
from ..engine.checkpoint.loader_position import resume_strategy
from ..engine.checkpoint.resume import ResumableBatchReader
from ..engine.checkpoint.snapshot import Snapshot
from ..engine.checkpoint.state import state_of
from ..engine.checkpoint.unsaved import UnsavedState
from ..engine.loop.clock import is_last_epoch
from ..engine.loop.state import Position
from ..events import BeforeFit, Callback, CleanupBatch, CleanupEpoch, CleanupFit, Event
from ._checks import check_float, check_int
from ._monitor import number_of
from ._purpose import is_training


class CheckpointCB(Callback):
    """Saves the whole run, so that `fit(..., resume="last")` continues it exactly.

    A checkpoint holds the model, the optimizer, and every other module, optimizer, scheduler and
    random generator that is an attribute of the learner or of a callback, or has `state_dict` and
    `load_state_dict`; gradients that are kept; the random states of Python, numpy, torch, the
    device, and of the generators of the loaders and their data; and the position in the data. A
    callback (or learner class) with these two methods is saved by them. Tensors outside of all
    these, and what cannot be saved, are logged before the first save. State that is in no
    `state_dict`, such as the count of `every=` of a subscription, starts anew.

    The training waits only while the state is copied to the host; a thread writes it, and the next
    save waits for the one before. A graceful `stop`, `TimeLimitCB` and the end of the last epoch
    also save, and `fit` returns when everything is on the disk. Nothing is saved in `validate` or
    `lr_find`.

    Args:
        folder: the folder for the checkpoints; it is created if it does not exist. One run at a
            time writes there, and checkpoints of other runs are not touched.
        every_epochs: save after every n-th epoch, including its validation. By default 1, if no
            other `every_` is given.
        every_batches: save after every n-th training batch.
        every_steps: save after every n-th optimizer step, at the end of its batch.
        every_seconds: save after the first batch that ends this many seconds after the last save.
        keep_last: the number of checkpoints of this run to keep, the newest ones; None for all.
        keep_best: (name, "min" or "max"): also keep the checkpoint with the best number of that
            name, among those saved at the end of an epoch. It is the number of the validation, if
            the fit validates.
        background: whether to write while the training runs; otherwise the training waits.

    Attributes:
        last: the path of the last checkpoint of this run; None if there is none.
        best: the path of the best one, with `keep_best`.

    Raises:
        ValueError: a number is not positive, or `keep_best` is not such a pair.
        OSError: in the fit, if a checkpoint could not be written; earlier ones are intact.

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

    Source: Lightning's `ModelCheckpoint`; writing in the background is torch's `async_save`.
    """

    order: float = math.inf  # it saves the state after all other callbacks
    run_after = ("JournalCB",)
    in_extra_validation = False

    def __init__(
        self,
        folder: str | os.PathLike[str],
        every_epochs: int | None = None,
        every_batches: int | None = None,
        every_seconds: float | None = None,
        keep_last: int | None = 3,
        keep_best: tuple[str, Literal["min", "max"]] | None = None,
        background: bool = True,
        *,
        every_steps: int | None = None,
    ) -> None:
        if every_epochs is every_batches is every_seconds is every_steps is None:
            every_epochs = 1
        counts = {
            "every_epochs": every_epochs,
            "every_batches": every_batches,
            "every_steps": every_steps,
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
                raise ValueError(f"keep_best={keep_best!r}: the first must be the name of a number")
            if keep_best[1] not in ("min", "max"):
                raise ValueError(f"keep_best={keep_best!r}: the second must be 'min' or 'max'")
            if every_epochs is None:
                raise ValueError("keep_best needs checkpoints of whole epochs: add every_epochs")
        self.folder = Path(folder)
        self.every_epochs = every_epochs
        self.every_batches = every_batches
        self.every_steps = every_steps
        self.every_seconds = every_seconds
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.background = background
        self.last: Path | None = None
        self.best: Path | None = None
        self._checkpoints: CheckpointFolder | None = None  # while a run is saved
        self._copy: Snapshot | None = None
        self._unsaved_position: tuple[int, bool, int] | None = None  # of the last batch

    @property
    def checkpoint_folder(self) -> Path:
        """The folder that `fit(resume="last")` resumes from."""
        return self.folder

    # ------------------------------------------------------------------------------ when to save

    def __deepcopy__(self, memo: object) -> NoReturn:
        raise TypeError(
            f"two learners cannot save into the same folder, {self.folder}: copy the learner"
            " without its CheckpointCB (remove_cbs, or give it to fit), and give each its own"
        )

    def before_fit(self, event: BeforeFit) -> None:
        learner = _learner_of(event)
        if not is_training(learner):
            return
        copy = Snapshot(state_of(learner))  # raises now for what cannot be saved, before any work
        self._log_caveats(learner)
        self._state_outside, self._has_trained, self._has_saved = UnsavedState(), False, False
        self._state_outside.note(learner)
        self._tell_unsaved(learner)
        self._checkpoints = CheckpointFolder(
            self.folder, event.run_id, self.keep_last, self.keep_best
        )
        self._copy = copy  # the first save reuses its memory
        self.last, self.best = self._checkpoints.last, self._checkpoints.best
        self._writer = BackgroundWriter(self.background)
        self._unsaved_position = None
        self._begin_interval()
        self._steps: int | None = None

    def _saves(self, event: Event) -> bool:
        """Whether this fit is saved: it trains, and is not that of another learner."""
        return self._checkpoints is not None and self._checkpoints.run_id == event.run_id

    def _is_restored(self, event: Event) -> bool:
        """Whether this fit is saved and, if it resumes, has loaded its checkpoint."""
        return self._saves(event) and _reader_of(_learner_of(event)).loaded

    def cleanup_batch(self, event: CleanupBatch) -> None:
        if not self._is_restored(event):
            return
        self._writer.check()
        self._unsaved_position = event.epoch, event.training, event.iter + 1
        completed = event.end.status == "completed"
        if event.learner.graceful_stop_due or (completed and self._is_due(event)):
            self._save(_learner_of(event), Position(*self._unsaved_position))
        elif event.training and not self._has_trained:
            self._state_outside.note(_learner_of(event))  # what a module makes with its first batch
        self._has_trained = self._has_trained or event.training

    def save_between_batches(self, learner: Learner) -> None:
        """Save after the last batch, if that is not done: the fit is about to be stopped."""
        if self._unsaved_position is None or self._checkpoints is None:
            return
        position = Position(*self._unsaved_position)
        if position.is_within(learner.epoch, learner.training):
            self._save(learner, position)

    def _is_due(self, event: CleanupBatch) -> bool:
        if self.every_seconds is not None and monotonic() >= self._due:
            return True
        if not event.training:
            return False
        batches, n = event.learner.done.batches, self.every_batches
        return (n is not None and batches % n == 0) or self._step_is_due(event.steps)

    def _step_is_due(self, steps: int) -> bool:
        """Whether a multiple of `every_steps` was reached since this was asked last."""
        if self.every_steps is None:
            return False
        before = max(0, steps - 1) if self._steps is None else self._steps
        self._steps = steps
        return steps // self.every_steps > before // self.every_steps

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        learner = _learner_of(event)
        if not self._is_restored(event):
            return
        done = event.epoch + 1
        is_over = not event.training or not learner.validates
        due = self.every_epochs is not None and done % self.every_epochs == 0
        due = is_over and learner.outer_continues and (due or is_last_epoch(learner))
        if learner.graceful_stop_due or due:
            after = Position(done, learner.trains) if is_over else Position(event.epoch, False)
            measured = is_over and event.end.status == "completed"  # over all batches
            metrics = event.metrics if measured else {}
            numbers = {name: number_of(value) for name, value in metrics.items()}
            self._save(learner, after, numbers)

    def cleanup_fit(self, event: CleanupFit) -> None:
        if self._checkpoints is not None and self._saves(event):
            checkpoints, self._checkpoints, self._copy = self._checkpoints, None, None
            try:
                self._writer.close()
            finally:
                checkpoints.close()

    # ------------------------------------------------------------------------------- how to save

    def _save(
        self,
        learner: Learner,
        position: Position,
        metrics: Mapping[str, float | None] | None = None,
    ) -> None:
        assert self._checkpoints is not None
        if not self._has_saved or not position.batches:  # a hidden state comes with the batches
            self._tell_unsaved(learner)
        self._has_saved = True
        state = state_of(learner)
        state |= _reader_of(learner).position_state(learner, position)
        self._unsaved_position = None
        self._writer.wait()
        self._copy = copy = Snapshot(state, over=self._copy)
        self._writer.write(partial(self._put, self._checkpoints, position, metrics or {}, copy))
        self._begin_interval()

    def _put(
        self,
        checkpoints: CheckpointFolder,
        position: Position,
        metrics: Mapping[str, float | None],
        copy: Snapshot,
    ) -> None:
        checkpoints.put(position, metrics, copy.wait())
        self.last, self.best = checkpoints.last, checkpoints.best

    def _begin_interval(self) -> None:
        self._due = monotonic() + (self.every_seconds or 0)

    def _log_caveats(self, learner: Learner) -> None:
        """Log now what could not be resumed exactly later."""
        within_epochs = (self.every_batches, self.every_steps, self.every_seconds)
        if learner.epoch_length is not None or any(n is not None for n in within_epochs):
            for loader in (learner.dls.train, *([learner.dls.valid] if learner.validates else [])):
                if caveat := resume_strategy(loader).caveat:
                    log.warning("resume_may_not_be_exact", run_id=learner.run_id, reason=caveat)

    def _tell_unsaved(self, learner: Learner) -> None:
        """Log what no checkpoint will hold, each attribute once per fit."""
        if news := self._state_outside.news(learner):
            reasons = {name: why for name, why in news.items() if why is not None}
            log.warning(
                "state_not_saved",
                run_id=learner.run_id,
                found=list(news),
                **({"reason": reasons} if reasons else {}),
                hint=(
                    "if they change while training: register them as buffers of a module, or give"
                    " the class that holds them state_dict() and load_state_dict(state)"
                ),
            )


def _learner_of(event: Event) -> Learner:
    return cast(Learner, event.learner)


def _reader_of(learner: Learner) -> ResumableBatchReader:
    return cast(ResumableBatchReader, learner.batch_reader)

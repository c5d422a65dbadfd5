"""Resuming a fit from a checkpoint: the reader that skips the completed part of the fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

import torch

from ...events import Callback
from .. import log
from ..data.prefetch import Prefetcher
from ..loop.reading import BatchReader, read_batches
from ..loop.state import LoopState
from .compatibility import CheckpointMismatchError, check_state
from .loader_position import resume_strategy, skip_to
from .parts import SavedLearner
from .preserve import KeptLearner
from .random_state import RandomState, generators, random_state, set_random_state
from .reader import Checkpoint, checkpoints_in
from .state import State, set_state


@runtime_checkable
class HasCheckpointFolder(Protocol):
    """A callback that saves checkpoints, such as `CheckpointCB`: "last" resumes from its folder."""

    @property
    def checkpoint_folder(self) -> Path: ...


def last_checkpoint(cbs: tuple[Callback, ...]) -> Checkpoint | None:
    """The checkpoint to which `resume="last"` refers; None if there is none yet.

    Raises:
        ValueError: the callbacks do not name exactly one folder.
        CheckpointError: every checkpoint in it is damaged.
    """
    folders = [cb.checkpoint_folder for cb in cbs if isinstance(cb, HasCheckpointFolder)]
    if len(folders) != 1:
        raise ValueError(
            "resume='last' needs exactly one CheckpointCB among the callbacks, and there are"
            f" {len(folders)}: pass a path instead"
        )
    if not checkpoints_in(folders[0]):
        log.info("nothing_to_resume", folder=str(folders[0]))
        return None
    return Checkpoint.load(folders[0])


class ResumableBatchReader(BatchReader):
    """Reads a fit from its beginning, and records what a checkpoint needs to resume it.

    Attributes:
        resumed_from: the checkpoint that the fit resumes from; None if it does not.
        loaded: False in a resumed fit until its checkpoint has been loaded, else True.
    """

    resumed_from: Path | None = None
    loaded = True

    def __init__(self) -> None:
        self._random_at_epoch: RandomState = {}
        self._n_iter: int | None = None  # at the beginning of the epoch: it may turn out wrong

    def read(self, loop: LoopState) -> Iterator[int]:
        self._n_iter = loop.n_iter
        self._random_at_epoch = random_state(loop.dls)
        return super().read(loop)

    def position_state(self, loop: LoopState) -> State:
        """The part of the state that is needed to resume the current epoch after this batch."""
        by_state = resume_strategy(loop.dl).how == "state"
        return {
            "random_at_epoch": self._random_at_epoch,
            "n_iter": self._n_iter,
            "loader": loop.dl.state_dict() if by_state else None,
        }


class ResumedBatchReader(ResumableBatchReader):
    """Reads the part of a fit that comes after a checkpoint, and loads the checkpoint.

    If it was saved between two epochs, its state is loaded after BeforeFit. If it was saved in the
    middle of one, that epoch is begun again: BeforeEpoch is emitted, the completed batches are
    skipped, and then the state is loaded.

    Attributes:
        position: the position at which the checkpoint was saved.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.resumed_from = checkpoint.path
        self.position = checkpoint.position
        self.loaded = False
        self._checkpoint: Checkpoint | None = checkpoint

    def begin(self, loop: LoopState) -> None:
        """Check that the checkpoint fits; load it, unless its epoch has to be begun first.

        Raises:
            CheckpointMismatchError: it does not fit; nothing has been changed.
        """
        super().begin(loop)
        position = self.position
        if (position.epoch, position.batches) > (loop.n_epochs, 0):
            raise CheckpointMismatchError(
                f"the checkpoint was saved in epoch {position.epoch} (from 0), but this fit has"
                f" n_epochs={loop.n_epochs}, which includes the epochs before the checkpoint"
            )
        kind = "training" if position.training else "validation"
        for phase, asked_for in ("train", loop.trains), ("valid", loop.validates):
            if not asked_for and (phase == "train" or not position.training):
                raise CheckpointMismatchError(
                    f"the checkpoint was saved in or before a {kind} epoch of a fit that trains,"
                    f" but this one has {phase}=False"
                )
        assert self._checkpoint is not None
        check_state(cast(SavedLearner, loop), self._checkpoint.state)
        self._log_caveats(loop, self._checkpoint)
        if position.batches == 0:
            self._load(loop, self._checkpoint.state)

    def includes(self, epoch: int, training: bool) -> bool:
        if self.position.is_beyond(epoch, training):
            return False
        if not self.loaded and not self.position.is_within(epoch, training):
            raise self.never_loaded()
        return True

    def read(self, loop: LoopState) -> Iterator[int]:
        if self._checkpoint is None:
            return super().read(loop)
        position, state = self.position, self._checkpoint.state
        if loop.n_iter != state["n_iter"]:
            raise CheckpointMismatchError(
                f"the epoch has {loop.n_iter} batches, but had {state['n_iter']} when the"
                " checkpoint was saved: in the middle of an epoch, a fit can only be resumed with"
                " the same data"
            )
        self._n_iter = loop.n_iter
        self._random_at_epoch = state["random_at_epoch"]
        set_random_state(loop.dls, self._random_at_epoch)
        batches = skip_to(loop.dl, position.batches, state["loader"])
        # A Prefetcher has drawn ahead: its generators keep their states from after the skipping.
        ahead = generators(loop.dls) if isinstance(loop.dl, Prefetcher) else []
        states = [generator.get_state() for generator in ahead]
        self._load(loop, state)
        for generator, state_there in zip(ahead, states, strict=True):
            generator.set_state(state_there)
        return read_batches(loop, batches, position.batches)

    def drop_checkpoint(self) -> None:
        """Release the checkpoint; it holds as much memory as the model and the optimizer."""
        self._checkpoint = None

    def never_loaded(self) -> RuntimeError:
        """The error for a fit in which the epoch of the checkpoint was not begun again."""
        return RuntimeError(
            f"epoch {self.position.epoch}, in which the checkpoint was saved, was cancelled in"
            " BeforeEpoch, before its state was loaded"
        )

    def _load(self, loop: LoopState, state: State) -> None:
        learner = cast(SavedLearner, loop)
        before = KeptLearner(learner)
        try:
            set_state(learner, state)
        except BaseException:
            before.put_back()  # its own errors are not raised: the first one is
            raise
        self.loaded = True
        self.drop_checkpoint()

    def _log_caveats(self, loop: LoopState, checkpoint: Checkpoint) -> None:
        loaders = [getattr(loop.dls, "train", None), *[loop.dls.valid] * bool(loop.validates)]
        caveats = [resume_strategy(loader).caveat for loader in loaders]
        before, now = checkpoint.manifest["versions"]["torch"], str(torch.__version__)
        if before != now:
            caveats.append(f"torch is {now}, but was {before} when the checkpoint was saved")
        for caveat in dict.fromkeys(filter(None, caveats)):
            log.warning("resume_may_not_be_exact", reason=caveat, path=str(checkpoint.path))

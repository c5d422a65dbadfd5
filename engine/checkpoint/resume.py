"""Resuming a fit from a checkpoint: the reader that skips the completed part of the fit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch

from ...events import Callback
from .. import log
from ..data.dataloaders import DataLoaders
from ..loop.reading import BatchReader, Pass
from ..loop.state import LoopState, Position
from .compatibility import CheckpointMismatchError, check_state
from .generators import generator_state, set_generator_state
from .loader_position import reads_ahead, resume_strategy, skip_to
from .parts import SavedLearner
from .preserve import KeptLearner
from .random_state import (
    RandomState,
    all_generators,
    random_state,
    set_random_state,
    unrestored_generators,
)
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
        self._n_iter: int | None = None  # at the beginning of the epoch: it may turn out wrong
        self._random_at_epoch: RandomState = {}
        self._random_at_pass: RandomState = {}

    def read(self, loop: LoopState) -> Iterator[int]:
        self._n_iter = loop.n_iter
        if not (loop.training and loop.epoch_length):
            self._random_at_epoch = random_state(loop.dls)
        return super().read(loop)

    def _begin_pass(self, loop: LoopState) -> Pass:
        self._random_at_pass = random_state(loop.dls)
        return super()._begin_pass(loop)

    def position_state(self, loop: LoopState, position: Position) -> State:
        """The part of the state that is needed to resume the loaders at a position.

        It has the pass over the loader of the epoch that the position is in, and the pass over the
        training loader that the next epoch continues; None for one that is not begun.
        """
        open_pass = None
        if self._pass is not None:
            open_pass = _pass_state(self._pass.loader, self._random_at_pass, self._pass.done)
        of_epoch = None
        if position.batches and not (position.training and loop.epoch_length):
            of_epoch = _pass_state(loop.dl, self._random_at_epoch, position.batches)
        n_iter = self._n_iter if position.batches else None
        return {"n_iter": n_iter, "pass_of_epoch": of_epoch, "open_pass": open_pass}


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
        self.first_epoch = checkpoint.position.epoch
        self.loaded = False
        self._checkpoint: Checkpoint | None = checkpoint
        self._ahead: list[tuple[Any, Any]] = []  # generators of a Prefetcher, and their states

    def begin(self, loop: LoopState) -> None:
        """Check that the checkpoint fits; load it, unless its epoch has to be begun first.

        Raises:
            CheckpointMismatchError: it does not fit; nothing has been changed.
        """
        super().begin(loop)
        assert self._checkpoint is not None
        position, state = self.position, self._checkpoint.state
        if loop.n_epochs is not None and (position.epoch, position.batches) > (loop.n_epochs, 0):
            raise CheckpointMismatchError(
                f"the checkpoint was saved in epoch {position.epoch} (from 0), but this fit has"
                f" n_epochs={loop.n_epochs}, which includes the epochs before the checkpoint"
            )
        steps = state["progress"][True]["steps"]
        if loop.max_steps is not None and steps > loop.max_steps:
            raise CheckpointMismatchError(
                f"the checkpoint was saved after {steps} steps, but this fit has"
                f" max_steps={loop.max_steps}, which includes the steps before the checkpoint"
            )
        kind = "training" if position.training else "validation"
        for phase, asked_for in ("train", loop.trains), ("valid", loop.validates):
            if not asked_for and (phase == "train" or not position.training):
                raise CheckpointMismatchError(
                    f"the checkpoint was saved in or before a {kind} epoch of a fit that trains,"
                    f" but this one has {phase}=False"
                )
        had_length, has_length = state["open_pass"] is not None, loop.epoch_length is not None
        within_epoch = position.training and position.batches > 0
        if had_length != has_length and (had_length or within_epoch):
            with_or_without = {True: "with", False: "without"}
            raise CheckpointMismatchError(
                f"the checkpoint was saved {with_or_without[had_length]} epoch_length, in the"
                " middle of a pass over the training loader, so it cannot be resumed"
                f" {with_or_without[has_length]} it"
            )
        check_state(cast(SavedLearner, loop), state)
        self._log_caveats(loop, self._checkpoint)
        if state["open_pass"] is not None and not position.is_within(position.epoch, True):
            self._continue_pass(loop, loop.dls.train, state["open_pass"])
        if position.batches == 0:
            self._load(loop, state)

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
        if (of_epoch := state["pass_of_epoch"]) is not None:
            self._random_at_epoch = of_epoch["random"]
            batches = self._skip(loop, loop.dl, of_epoch)
        else:
            self._continue_pass(loop, loop.dl, state["open_pass"])
            batches = None
        self._load(loop, state)
        return self._read_from(loop, position.batches, batches)

    def _continue_pass(self, loop: LoopState, loader: Any, state: State) -> None:
        self._random_at_pass = state["random"]
        self._pass = Pass(loader, self._skip(loop, loader, state), state["done"])

    def _skip(self, loop: LoopState, loader: Any, state: State) -> Iterator[Any]:
        """The rest of a pass. It draws random numbers: the state is to be loaded afterwards."""
        set_random_state(loop.dls, state["random"])
        batches = skip_to(loader, state["done"], state["loader"])
        if reads_ahead(loader):  # its generators are ahead of what was saved
            self._ahead += [
                (own, generator_state(own)) for own in all_generators(DataLoaders(loader))
            ]
        return batches

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
        for generator, state_ahead in self._ahead:
            set_generator_state(generator, state_ahead)
        self.loaded = True
        self.drop_checkpoint()

    def _log_caveats(self, loop: LoopState, checkpoint: Checkpoint) -> None:
        loaders = [getattr(loop.dls, "train", None), *[loop.dls.valid] * bool(loop.validates)]
        caveats = [resume_strategy(loader).caveat for loader in loaders]
        caveats.append(unrestored_generators(loop.dls, checkpoint.state["random"]))
        before, now = checkpoint.manifest["versions"]["torch"], str(torch.__version__)
        if before != now:
            caveats.append(f"torch is {now}, but was {before} when the checkpoint was saved")
        for caveat in dict.fromkeys(filter(None, caveats)):
            log.warning("resume_may_not_be_exact", reason=caveat, path=str(checkpoint.path))


def _pass_state(loader: Any, random: RandomState, done: int) -> State:
    """What is needed to continue a pass over a loader after `done` batches."""
    by_state = resume_strategy(loader).how == "state"
    return {
        "random": random,
        "done": done,
        "loader": loader.state_dict() if by_state else None,
    }

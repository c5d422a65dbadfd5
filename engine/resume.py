"""A fit that goes on where a checkpoint was saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog
import torch

from .checkpoint import Checkpoint, checkpoints_in
from .data import read
from .position import Position, read_on, reading_of
from .prefetch import Prefetcher
from .randomness import generators, set_random_state
from .state import CheckpointMismatchError, Snapshot, check_state, set_state, state_of

if TYPE_CHECKING:
    from .fitting import Fitting
    from .loop import Loop

log = structlog.get_logger("eventrain")


def find_checkpoint(learner: Fitting, resume: str | os.PathLike[str]) -> Checkpoint | None:
    """The checkpoint to go on from; None where "last" finds that there is none yet.

    Raises:
        ValueError: resume="last", and it is not known of which folder.
        CheckpointError: there is none, or none that is whole.
    """
    from ..callbacks import CheckpointCB  # at call time: callbacks are built on the engine

    if resume != "last":
        return Checkpoint.load(resume)
    folders = [cb.folder for cb in learner.cbs if isinstance(cb, CheckpointCB)]
    if len(folders) != 1:
        raise ValueError(
            "resume='last' is the last checkpoint of the CheckpointCB among the callbacks, and"
            f" there are {len(folders)} of them: pass a path"
        )
    if not checkpoints_in(folders[0]):
        log.info("nothing_to_resume", folder=str(folders[0]))
        return None
    return Checkpoint.load(folders[0])


class Resumption:
    """What a resumed fit begins with.

    Where the checkpoint was saved between two epochs, its state is loaded after BeforeFit. Where
    it was in the middle of one, that epoch is begun again: BeforeEpoch is emitted, what was read
    is passed over, and then the state is loaded.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.position: Position = checkpoint.position

    def begin(self, learner: Loop) -> None:
        """After BeforeFit: see whether the checkpoint fits, and load it if nothing comes first.

        Raises:
            CheckpointMismatchError: it is of something else; nothing has been changed.
        """
        position = self.position
        if (position.epoch, position.batches) > (learner.n_epochs, 0):
            raise CheckpointMismatchError(
                f"the checkpoint was saved in epoch {position.epoch} (from 0), and this fit has"
                f" n_epochs={learner.n_epochs}, those before it included"
            )
        where = "training" if position.training else "validating"
        for phase in ["train"] if position.training else ["train", "valid"]:
            if not getattr(learner, phase):
                raise CheckpointMismatchError(
                    f"the checkpoint was saved in or before a {where} epoch of a fit that trains,"
                    f" and this one has {phase}=False"
                )
        check_state(learner, self.checkpoint.state)
        self._tell_doubts(learner)
        if position.batches == 0:
            self._load(learner)

    def never_loaded(self) -> RuntimeError:
        """The error to raise where the epoch that was interrupted was not taken up again."""
        return RuntimeError(
            f"epoch {self.position.epoch}, in which the checkpoint was saved, was cancelled in"
            " BeforeEpoch, before its state was loaded"
        )

    def batches(self, learner: Loop) -> Iterator[int]:
        """After BeforeEpoch of the epoch that was interrupted: the batches that are to come."""
        position, state = self.position, self.checkpoint.state
        if learner.n_iter != state["n_iter"]:
            raise CheckpointMismatchError(
                f"an epoch has {learner.n_iter} batches, and had {state['n_iter']}: in the middle"
                " of one, only the same data can be resumed"
            )
        learner.random_at_epoch = state["random_at_epoch"]
        set_random_state(learner.dls, learner.random_at_epoch)
        batches = read_on(learner.dl, position.batches, state["loader"])
        # One that had drawn ahead of the training when saved goes on from what is passed over.
        ahead = generators(learner.dls) if isinstance(learner.dl, Prefetcher) else []
        states = [generator.get_state() for generator in ahead]
        self._load(learner)
        for generator, state_there in zip(ahead, states, strict=True):
            generator.set_state(state_there)
        return read(learner, batches, position.batches)

    def _load(self, learner: Loop) -> None:
        before = Snapshot(state_of(learner)).wait()
        try:
            set_state(learner, self.checkpoint.state)
        except BaseException:
            with suppress(Exception):  # a callback that loads nothing; that was the first error
                set_state(learner, before)
            raise
        learner._resumption = None  # it holds as much memory as the model and the optimizer

    def _tell_doubts(self, learner: Loop) -> None:
        loaders = [getattr(learner.dls, "train", None), *[learner.dls.valid] * bool(learner.valid)]
        doubts = [reading_of(loader).doubt for loader in loaders]
        before, now = self.checkpoint.manifest["versions"]["torch"], str(torch.__version__)
        if before != now:
            doubts.append(f"torch is {now}, and was {before}")
        for doubt in dict.fromkeys(filter(None, doubts)):
            log.warning("resume_may_not_be_exact", reason=doubt, path=str(self.checkpoint.path))

"""A fit that goes on where a checkpoint was saved."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import structlog
import torch

from .checkpoint import Checkpoint, checkpoints_in
from .data import read
from .position import Position, read_on, reading_of
from .randomness import set_random_state
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
        position, state = self.position, self.checkpoint.state
        if not (learner.train if position.training else learner.valid):
            phase = "train" if position.training else "valid"
            raise CheckpointMismatchError(
                f"the checkpoint was saved in or before a {phase}ing epoch, and this fit has"
                f" {phase}=False"
            )
        check_state(learner, state)
        if position.batches == 0:
            self._load(learner)

    def batches(self, learner: Loop) -> Iterator[tuple[int, Any]]:
        """After BeforeEpoch of the epoch that was interrupted: the batches that are to come."""
        position, state = self.position, self.checkpoint.state
        loader = learner.dl
        if learner.n_iter != state["n_iter"]:
            raise CheckpointMismatchError(
                f"an epoch has {learner.n_iter} batches, and had {state['n_iter']}: in the middle"
                " of one, only the same data can be resumed"
            )
        if doubt := reading_of(loader).doubt:
            log.warning("resume_may_not_be_exact", reason=doubt, path=str(self.checkpoint.path))
        learner.random_at_epoch = state["random_at_epoch"]
        set_random_state(learner.dls, learner.random_at_epoch)
        batches = read_on(loader, position.batches, state["loader"])
        self._load(learner)
        return read(batches, position.training, position.batches)

    def _load(self, learner: Loop) -> None:
        before = Snapshot(state_of(learner)).wait()
        try:
            set_state(learner, self.checkpoint.state)
        except BaseException:
            set_state(learner, before)
            raise
        versions = self.checkpoint.manifest["versions"]
        if versions["torch"] != str(torch.__version__):
            log.warning(
                "resume_may_not_be_exact",
                reason=f"torch is {torch.__version__}, and was {versions['torch']}",
                path=str(self.checkpoint.path),
            )

"""The fits in which callbacks keep, save, schedule or stop something."""

from __future__ import annotations

from ..events import LearnerLike


def is_training(learner: LearnerLike) -> bool:
    """Whether the purpose of this fit is to train: not to validate or to find a learning rate."""
    return learner.trains and learner.purpose == "fit"

"""What a fit was asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ...events import ActionEvent, Callback, GetLoss, Predict
from ...events.learner import Purpose
from ...events.types import ACTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPlan:
    """What a fit was asked for; the attributes are the arguments of `Learner.fit`.

    Attributes:
        purpose: "fit", or the method that asked for it.

    Raises:
        ValueError: an argument is wrong in itself.
    """

    n_epochs: int = 1
    train: bool = True
    valid: bool = True
    cbs: Callback | Iterable[Callback] | None = None
    lr: float | None = None
    run_id: str | None = None
    resume: str | os.PathLike[str] | None = None
    graceful: bool | float = False
    purpose: Purpose = "fit"

    def __post_init__(self) -> None:
        n_epochs, run_id = self.n_epochs, self.run_id
        if isinstance(n_epochs, bool) or not isinstance(n_epochs, int) or n_epochs < 0:
            raise ValueError(f"n_epochs={n_epochs!r}: give an integer, 0 or more")
        if run_id is not None and not (isinstance(run_id, str) and run_id):
            raise ValueError(f"run_id={run_id!r}: give a non-empty string, or None")
        if self.resume is not None and self.lr is not None:
            raise ValueError(
                f"lr={self.lr!r}: a resumed fit keeps the learning rate of its checkpoint"
            )

    @property
    def actions(self) -> tuple[type[ActionEvent], ...]:
        """The actions that the fit performs."""
        if self.purpose == "predict":
            return (Predict,)
        return ACTIONS if self.train else (Predict, GetLoss)


def check_lr(lr: Any) -> None:
    """Raise a ValueError for a number that cannot be a learning rate."""
    if isinstance(lr, int | float) and not lr >= 0:
        raise ValueError(f"lr={lr!r}: give a learning rate of 0 or more")

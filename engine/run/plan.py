"""The arguments of a fit."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from ...events import ActionEvent, Callback, GetLoss, Predict
from ...events.checks import is_int
from ...events.learner import Purpose
from ...events.types import ACTIONS


@dataclass(frozen=True, slots=True, kw_only=True)
class FitPlan:
    """The arguments of a fit: those of `Learner.fit`, and its purpose.

    Attributes:
        purpose: "fit", "validate", "predict" or "lr_find", by the method that makes the plan.
        within: a context manager that is entered before the fit is prepared and left after it, both
            in the fit's own thread.

    Raises:
        ValueError: an argument is not valid, whatever the others are; or `lr` is given with
            `resume`.
        TypeError: `train` or `valid` is neither True nor False.
    """

    n_epochs: int | None = None
    max_steps: int | None = None
    epoch_length: int | None = None
    valid_length: int | None = None
    train: bool = True
    valid: bool = True
    cbs: Callback | Iterable[Callback] | None = None
    lr: float | None = None
    run_id: str | None = None
    resume: str | os.PathLike[str] | None = None
    graceful: bool | float = False
    purpose: Purpose = "fit"
    within: AbstractContextManager[object] = field(default_factory=nullcontext)

    def __post_init__(self) -> None:
        if self.n_epochs is None and self.max_steps is None:
            object.__setattr__(self, "n_epochs", 1)
        if self.n_epochs is not None and not is_int(self.n_epochs, 0):
            raise ValueError(f"n_epochs={self.n_epochs!r}: give an integer, 0 or more")
        self._check_lengths()
        for name, value in (("train", self.train), ("valid", self.valid)):
            if not isinstance(value, bool | int) and type(value).__name__ not in ("bool", "bool_"):
                raise TypeError(
                    f"{name} is a {type(value).__name__}: give True or False. Loaders are given to"
                    " the learner, and callbacks by name: cbs=..."
                )
        run_id = self.run_id
        if run_id is not None and not (isinstance(run_id, str) and run_id):
            raise ValueError(f"run_id={run_id!r}: give a non-empty string, or None")
        if self.resume is not None and self.lr is not None:
            raise ValueError(
                f"lr={self.lr!r}: a resumed fit keeps the learning rate of its checkpoint; leave"
                " lr out"
            )

    def _check_lengths(self) -> None:
        steps, batches = "a number of optimizer steps", "a number of batches"
        for name, unit, phase in (
            ("max_steps", steps, "train"),
            ("epoch_length", batches, "train"),
            ("valid_length", batches, "valid"),
        ):
            value = getattr(self, name)
            if value is None:
                continue
            if not is_int(value, 1):
                raise ValueError(f"{name}={value!r}: give {unit}, 1 or more, or None")
            if not getattr(self, phase):
                raise ValueError(f"{name}={value!r} has no effect with {phase}=False: leave it out")

    @property
    def actions(self) -> tuple[type[ActionEvent], ...]:
        """The actions that the fit performs."""
        if self.purpose == "predict":
            return (Predict,)
        return ACTIONS if self.train else (Predict, GetLoss)


def check_lr(lr: Any) -> None:
    """Raise an error for a learning rate that is negative or NaN, or text or a class.

    Anything else is for `opt_func`, which may want a learning rate per group.
    """
    if isinstance(lr, str | type):
        raise TypeError(f"lr={lr!r}: give a number")
    is_number = isinstance(lr, int | float) or (isinstance(lr, torch.Tensor) and lr.numel() == 1)
    if is_number and not lr >= 0:
        raise ValueError(f"lr={lr!r}: give a learning rate of 0 or more")

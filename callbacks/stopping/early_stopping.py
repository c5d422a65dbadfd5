"""Ends a fit when a number of its epochs no longer improves."""

from __future__ import annotations

import math
from typing import Any, Literal

from ...events import BeforeEpoch, BeforeFit, Callback, CancelFitException, CleanupEpoch
from .._checks import check_float, check_int
from .._monitor import check_monitor, monitored
from .._purpose import is_training


class EarlyStoppingCB(Callback):
    """Ends the fit when a number has not improved for `patience` epochs.

    It uses the numbers that callbacks such as MetricsCB put into `learner.record`: those of every
    completed validating epoch, or of every training epoch if the fit does not validate. NaN is not
    an improvement. Every fit starts anew; a resumed one continues where it was, and ends again if
    it had ended. `validate()` and the learning-rate finder are not affected.

    Args:
        monitor: the name of the number.
        mode: "min" if lower is better, "max" if higher is better.
        patience: the number of epochs in a row without improvement that ends the fit.
        min_delta: a number has to be better by more than this to be an improvement.

    Attributes:
        best: the best number of this fit so far, or of the last one; None before the first.
        best_epoch: the epoch it was in, from 0.

    Raises:
        ValueError: an argument is not allowed; in the fit, there is no number of that name.
        TypeError: in the fit, the value of that name is not a number.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import EarlyStoppingCB, MetricsCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> cbs = [MetricsCB(), EarlyStoppingCB("loss", patience=2, min_delta=1e6)]
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches), cbs=cbs)
        >>> result = learner.run(10)
        >>> result.epochs, result.reason
        (3, 'loss has not improved by more than 1e+06 for 2 epochs: its best is ..., in epoch 0')

    Source: Keras's `EarlyStopping`.
    """

    order: float = 1  # after metrics
    in_extra_validation = False

    def __init__(
        self,
        monitor: str = "loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode!r}: choose 'min' or 'max'")
        self.monitor = check_monitor(monitor)
        self.mode = mode
        self.patience = check_int("patience", patience, "a number of epochs, 1 or more")
        self.min_delta = check_float("min_delta", min_delta, "a finite number, 0 or more")
        self._begin()

    def _begin(self) -> None:
        self.best: float | None = None
        self.best_epoch: int | None = None
        self._waited = 0

    def before_fit(self, event: BeforeFit) -> None:
        if is_training(event.learner):
            self._begin()

    def before_epoch(self, event: BeforeEpoch) -> None:
        if is_training(event.learner):
            self._end_if_due()  # due if the fit had ended when the checkpoint was saved

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        value = monitored(event, self.monitor)
        if value is None:
            return
        if self._improves(value):
            self.best, self.best_epoch, self._waited = value, event.epoch, 0
        else:
            self._waited += 1
        self._end_if_due()

    def _improves(self, value: float) -> bool:
        if self.best is None or math.isnan(value):
            return not math.isnan(value)
        if self.mode == "min":
            return value < self.best - self.min_delta
        return value > self.best + self.min_delta

    def _end_if_due(self) -> None:
        if self._waited < self.patience:
            return
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        epochs = f"{self._waited} epoch{'s' if self._waited > 1 else ''}"
        best = (
            "it was nan in all of them"
            if self.best is None
            else f"its best is {self.best:.6g}, in epoch {self.best_epoch}"
        )
        raise CancelFitException(f"{self.monitor} has not improved{by} for {epochs}: {best}")

    def state_dict(self) -> dict[str, Any]:
        """The best number so far, and the number of epochs since."""
        return {"best": self.best, "best_epoch": self.best_epoch, "waited": self._waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.best = state["best"]
        self.best_epoch = state["best_epoch"]
        self._waited = state["waited"]

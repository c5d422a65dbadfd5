"""The loss of an epoch: the mean over its samples, accumulated on the device."""

from __future__ import annotations

import inspect
from contextlib import suppress
from functools import partial
from typing import Any, Literal

import torch

from ...events import AfterBatch, AfterEpoch, BeforeEpoch, BeforeFit, Callback
from ...events.learner import LearnerLike
from .. import log
from ..data.accelerator import has_float64
from ..loop.loss import check_scalar

Reduction = Literal["auto", "mean", "sum"]


def returns_sum(loss_func: Any) -> bool:
    """Whether a loss function returns the sum over the samples of a batch, by its `reduction`.

    That of a module is its attribute, that of a function the default of its parameter, which a
    `partial` may set. All others are taken to return the mean.
    """
    inner = loss_func
    while isinstance(inner, partial):
        inner = inner.func
    reduction = getattr(getattr(inner, "__self__", inner), "reduction", None)
    with suppress(Exception):  # not every callable has a signature, and few such a parameter
        reduction = inspect.signature(loss_func).parameters["reduction"].default
    return isinstance(reduction, str) and reduction == "sum"


def log_reduction(learner: LearnerLike) -> None:
    """Log that the loss function returns a sum, if it does: `get_loss` may divide it already."""
    if returns_sum(learner.loss_func):
        log.info(
            "loss_is_a_sum",
            run_id=learner.run_id,
            hint="loss_func has reduction='sum', so the loss of an epoch is the sum over its"
            " samples divided by their number; if get_loss() divides it already, use"
            " MetricsCB(loss='mean')",
        )


class MeanLoss:
    """The mean of losses over samples. Adding a loss does not cause a device sync.

    Args:
        reduction: whether the loss of a batch is the mean over its samples or their sum; "auto"
            asks the learner's loss function.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        self._reduction = reduction
        self._is_sum = False
        self._sum: torch.Tensor | None = None
        self._n_samples = 0
        self._placed = False

    def add(self, event: AfterBatch) -> None:
        """Add the loss of a batch; a mean has the weight of the batch's samples.

        Raises:
            TypeError, ValueError: the loss is not a scalar tensor.
        """
        loss = event.loss
        if loss is None or loss.ndim:
            loss = check_scalar(event.learner.loss).detach().reshape(())
        learner = event.learner
        n = int(learner.batch_size(learner.batch))
        if not n:  # the mean of no samples is NaN
            return
        if not self._placed:
            self._place(loss.device)
            auto = self._reduction == "auto"
            self._is_sum = returns_sum(learner.loss_func) if auto else self._reduction == "sum"
        assert self._sum is not None
        self._n_samples += n
        self._sum.add_(loss, alpha=1 if self._is_sum else n)

    def _place(self, device: torch.device) -> None:
        """Accumulate on the device of the losses, from zero or from a loaded state."""
        if self._sum is None:
            dtype = torch.float64 if has_float64(device) else torch.float32
            self._sum = torch.zeros((), dtype=dtype, device=device)
        self._sum = self._sum.to(device)
        self._placed = True

    def item(self) -> float | None:
        """The mean so far; None before the first loss. The host waits for the device here."""
        return None if self._sum is None else self._sum.item() / self._n_samples

    def mean(self) -> torch.Tensor | None:
        """The mean so far, a scalar on the device; None before the first loss."""
        return None if self._sum is None else self._sum / self._n_samples

    def state_dict(self) -> dict[str, Any]:
        """The sum and the number of samples so far."""
        return {"sum": _copy(self._sum), "n_samples": self._n_samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sum, self._n_samples = _copy(state["sum"]), state["n_samples"]
        self._placed = False


def _copy(total: torch.Tensor | None) -> torch.Tensor | None:
    return None if total is None else total.clone()  # `add` changes it in place


class RecordMeanLoss(Callback):
    """Records the mean loss of every epoch as "loss"."""

    def __init__(self) -> None:
        self._loss = MeanLoss("auto")

    def before_fit(self, event: BeforeFit) -> None:
        log_reduction(event.learner)

    def before_epoch(self, event: BeforeEpoch) -> None:
        self._loss = MeanLoss("auto")

    def after_batch(self, event: AfterBatch) -> None:
        self._loss.add(event)

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.record.update(self.measured())

    def measured(self) -> dict[str, Any]:
        """The loss so far; the host waits for the device here, once per epoch."""
        loss = self._loss.item()
        return {} if loss is None else {"loss": loss}

"""The loss of an epoch: the mean over its samples, accumulated on the device."""

from __future__ import annotations

from typing import Any, Literal

import torch

from ...events import AfterBatch, AfterEpoch, BeforeEpoch, BeforeFit, Callback
from ...events.learner import LearnerLike
from .. import log
from ..data.accelerator import has_float64
from ..loop.loss import Weight, check_scalar, weight_of
from .denominator import DenominatorCheck, returns_sum

Reduction = Literal["auto", "mean", "sum"]


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
        weight: a function of the learner that returns the weight of a batch; by default, that is
            the number of its samples.
        check: looks at the batches, and says when the mean is read whether that is a guess.
    """

    def __init__(
        self,
        reduction: Reduction = "mean",
        weight: Weight | None = None,
        check: DenominatorCheck | None = None,
    ) -> None:
        self._reduction = reduction
        self._weight = weight
        self._check = check if weight is None and reduction == "auto" else None
        if self._check is not None:
            self._check.begin_epoch()
        self._is_sum = False
        self._sum: torch.Tensor | None = None
        self._total: Any = 0  # of the weights; a tensor if they are
        self._placed = False

    def add(self, event: AfterBatch) -> None:
        """Add the loss of a batch; a mean has the weight of the batch.

        Raises:
            TypeError, ValueError: the loss is not a scalar tensor, or the weight not a number.
        """
        loss = event.loss
        if loss is None or loss.ndim:
            loss = check_scalar(event.learner.loss).detach().reshape(())
        learner = event.learner
        weight = self._weight
        n = learner.batch_size(learner.batch) if weight is None else weight_of(weight, learner)
        if type(n) is torch.Tensor:
            self._add_with_tensor(loss, n, learner)
        elif n:  # the mean of no samples is NaN
            if not self._placed:
                self._place(loss.device, learner)
            if (check := self._check) is not None and check.looks_at_next():
                check.look(learner)
            self._sum.add_(loss, alpha=1 if self._is_sum else n)  # type: ignore[union-attr]
            self._total += n

    def _add_with_tensor(self, loss: torch.Tensor, n: torch.Tensor, learner: LearnerLike) -> None:
        if not self._placed:
            self._place(loss.device, learner)
        assert self._sum is not None
        n = n.to(self._sum)
        self._sum.add_(torch.where(n > 0, loss if self._is_sum else loss * n, 0))
        self._total = self._total + n

    def _place(self, device: torch.device, learner: LearnerLike) -> None:
        """Accumulate on the device of the losses, from zero or from a loaded state."""
        auto = self._reduction == "auto"
        self._is_sum = returns_sum(learner.loss_func) if auto else self._reduction == "sum"
        if self._sum is None:
            dtype = torch.float64 if has_float64(device) else torch.float32
            self._sum = torch.zeros((), dtype=dtype, device=device)
        self._sum = self._sum.to(device)
        if isinstance(self._total, torch.Tensor):
            self._total = self._total.to(device)
        self._placed = True

    def item(self) -> float | None:
        """The mean so far; None before the first loss. The host waits for the device here."""
        if self._sum is None:
            return None
        mean = self._sum / self._total if isinstance(self._total, torch.Tensor) else self._sum
        lowest = None if self._check is None else self._check.lowest
        if lowest is None:
            number, seen = mean.item(), None
        else:  # both in one number, so that the host waits once
            both = (mean + lowest * 1j).item()
            number, seen = both.real, both.imag
        if self._check is not None:
            self._check.end_epoch(seen)
        return number if mean is not self._sum else number / self._total

    def mean(self) -> torch.Tensor | None:
        """The mean so far, a scalar on the device; None before the first loss."""
        return None if self._sum is None else self._sum / self._total

    def state_dict(self) -> dict[str, Any]:
        """The sum of the losses and of their weights so far."""
        return {"sum": _copy(self._sum), "n_samples": _copy(self._total)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sum, self._total = _copy(state["sum"]), _copy(state["n_samples"])
        self._placed = False


def _copy(total: Any) -> Any:
    return total.clone() if isinstance(total, torch.Tensor) else total  # `add` changes it in place


class RecordMeanLoss(Callback):
    """Records the mean loss of every epoch as "loss"."""

    def __init__(self) -> None:
        self._loss = MeanLoss("auto")

    def before_fit(self, event: BeforeFit) -> None:
        log_reduction(event.learner)
        self._check = DenominatorCheck(event.learner)

    def before_epoch(self, event: BeforeEpoch) -> None:
        self._loss = MeanLoss("auto", check=self._check)

    def after_batch(self, event: AfterBatch) -> None:
        self._loss.add(event)

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.record.update(self.measured())

    def measured(self) -> dict[str, Any]:
        """The loss so far; the host waits for the device here, once per epoch."""
        loss = self._loss.item()
        return {} if loss is None else {"loss": loss}

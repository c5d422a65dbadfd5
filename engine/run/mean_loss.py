"""The loss of an epoch: the mean over its samples, accumulated on the device."""

from __future__ import annotations

from typing import Any

import torch

from ...events import AfterBatch, AfterEpoch, BeforeEpoch, Callback
from ..data.batches import batch_size
from ..loop.loss import check_scalar


class MeanLoss:
    """The mean of losses over samples. Adding a loss does not cause a device sync."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._n_samples = 0
        self._placed = False

    def add(self, event: AfterBatch) -> torch.Tensor:
        """Add the loss of a batch, weighted by the size of the batch; return the loss.

        Raises:
            TypeError, ValueError: the loss is not a scalar tensor.
        """
        loss = event.loss
        if loss is None or loss.ndim:
            loss = check_scalar(event.learner.loss).detach().reshape(())
        if not self._placed:
            self._place(loss.device)
        assert self._sum is not None
        n = batch_size(event.learner.batch) or 1  # the size of a batch without tensors is unknown
        self._n_samples += n
        self._sum.add_(loss, alpha=n)
        return loss

    def _place(self, device: torch.device) -> None:
        """Accumulate on the device of the losses, from zero or from a loaded state."""
        if self._sum is None:
            # Apple's devices do not have float64.
            dtype = torch.float32 if device.type == "mps" else torch.float64
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
        self._loss = MeanLoss()

    def before_epoch(self, event: BeforeEpoch) -> None:
        self._loss = MeanLoss()

    def after_batch(self, event: AfterBatch) -> None:
        self._loss.add(event)

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.record.update(self.measured())

    def measured(self) -> dict[str, Any]:
        """The loss so far; the host waits for the device here, once per epoch."""
        loss = self._loss.item()
        return {} if loss is None else {"loss": loss}

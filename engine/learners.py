"""The post's two learners: the five actions as methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn, optim
from torch.nn import functional as F

from ..events import Bus, Callback
from .data import inputs_of, targets_of
from .learner import Learner


def check_scalar(loss: Any) -> Any:
    """Return `loss` if it is a tensor of one number.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not a scalar.
    """
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"the loss must be a tensor: {loss!r} is a {type(loss).__qualname__}")
    if loss.ndim and loss.numel() != 1:
        raise ValueError(
            f"the loss must be a scalar: its shape is {tuple(loss.shape)}; reduce it, with"
            " .mean() or the loss function's reduction='mean'"
        )
    return loss


def check_loss(loss: Any) -> Any:
    """Return `loss` if one can call `backward()` on it.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not a scalar, or does not require grad.
    """
    check_scalar(loss)
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not require grad: no parameter of the model took part in it, all are"
            " frozen, or it was detached or computed under torch.no_grad()"
        )
    return loss


class TrainLearner(Learner):
    """A Learner for a batch of (inputs, targets), one model and one optimizer.

    Example:
        >>> import torch
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 5
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches), lr=0.05)
        >>> result = learner.run(2)
        >>> result.status, result.steps
        ('completed', 10)

    Source: the post's `TrainLearner`.
    """

    def predict(self) -> None:
        self.preds = self.model(inputs_of(self.batch))

    def get_loss(self) -> None:
        self.loss = self.loss_func(self.preds, targets_of(self.batch))

    def backward(self) -> None:
        try:
            self.loss.backward()
        except (AttributeError, RuntimeError):  # asking first costs as much as all the engine
            check_loss(self.loss)
            raise

    def step(self) -> None:
        self.opt.step()

    def zero_grad(self) -> None:
        self.opt.zero_grad()


class MomentumLearner(TrainLearner):
    """A TrainLearner whose gradients decay instead of being zeroed.

    Args:
        mom: what is kept of the gradients from one step to the next; 0 forgets them.

    Source: the post's `MomentumLearner`; parameters without a gradient are passed over.
    """

    def __init__(
        self,
        model: nn.Module,
        dls: Any = None,
        loss_func: Callable[..., Any] = F.mse_loss,
        lr: float = 0.1,
        cbs: Callback | Iterable[Callback] | None = None,
        opt_func: Callable[..., Any] | None = optim.SGD,
        mom: float = 0.85,
        *,
        bus: Bus | None = None,
    ) -> None:
        super().__init__(model, dls, loss_func, lr, cbs, opt_func, bus=bus)
        self.mom = mom

    def zero_grad(self) -> None:
        for p in self.model.parameters():
            if p.grad is not None:
                p.grad *= self.mom

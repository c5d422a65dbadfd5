"""The post's two learners, with the five actions as methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Never

from torch import nn, optim
from torch.nn import functional as F

from ..events import Bus, Callback
from .data.batches import inputs_of, targets_of
from .learner import Learner
from .loop.actions import replaceable
from .loop.loss import check_loss
from .loop.parameters import optimizer_parameters


class TrainLearner(Learner):
    """A Learner for batches of (inputs, targets), one model and one optimizer.

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

    @replaceable
    def predict(self) -> None:
        self.preds = self.model(inputs_of(self.batch))

    @replaceable
    def get_loss(self) -> None:
        self.loss = self.loss_func(self.preds, targets_of(self.batch))

    @replaceable
    def backward(self) -> None:
        try:
            self.loss.backward()
        except (AttributeError, RuntimeError):  # a check before would take as long as the engine
            check_loss(self.loss)
            raise

    @replaceable
    def step(self) -> None:
        self.opt.step()

    @replaceable
    def zero_grad(self) -> None:
        self.opt.zero_grad()


class MomentumLearner(TrainLearner):
    """A TrainLearner whose gradients decay instead of being zeroed.

    A parameter that has been frozen (`requires_grad_(False)`) loses its gradient, so that the
    optimizer no longer moves it.

    Args:
        mom: the factor by which the gradients decay from one step to the next; 0 zeroes them.

    Source: the post's `MomentumLearner`; parameters without a gradient are skipped.
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
        **unknown: Never,
    ) -> None:
        super().__init__(model, dls, loss_func, lr, cbs, opt_func, bus=bus, **unknown)
        self.mom = mom

    @replaceable
    def backward(self) -> None:
        for p in optimizer_parameters(self.opt):
            if not p.requires_grad:
                p.grad = None
        super().backward()

    def zero_grad(self) -> None:
        for p in optimizer_parameters(self.opt):
            if p.grad is None:
                continue
            if p.grad.is_sparse:  # the next backward pass appends its rows
                p.grad = p.grad.coalesce() * self.mom
            else:
                p.grad *= self.mom

"""The post's two learners, with the five actions as methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Never

from torch import nn, optim
from torch.nn import functional as F

from ..events import Bus, Callback
from .data.inputs import Inputs, call_loss, call_model, check_n_inp
from .learner import Learner
from .loop.actions import replaceable
from .loop.loss import check_loss, loss_in
from .loop.parameters import optimizer_parameters


class TrainLearner(Learner):
    """A Learner for one model and one optimizer.

    A batch is a tuple or list, of which the model takes the first part, and the loss function the
    second; `n_inp` says otherwise. Or it is a mapping, or an object with the model's keyword names:
    the model is called with the parts that its `forward` has parameters for, as keywords, and the
    other parts are the targets, in order. What is none of these is passed to the model as it is.

    Without a loss function, the loss is `preds.loss` or `preds["loss"]`, and a mapping is passed to
    the model whole: `model(**batch)`.

    Args:
        n_inp: how many parts of a tuple or list the model takes, from the first:
            `model(*batch[:n_inp])`, `loss_func(preds, *batch[n_inp:])`; or a tuple of the names of
            the parts of a mapping or object that it takes.

    Raises:
        TypeError, ValueError: an argument is not valid; in the fit, a batch does not have the
            parts that the model or the loss function takes, or the output has no loss.

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

    def __init__(
        self,
        model: nn.Module,
        dls: Any = None,
        loss_func: Callable[..., Any] | None = F.mse_loss,
        lr: float = 0.1,
        cbs: Callback | Iterable[Callback] | None = None,
        opt_func: Callable[..., Any] | None = optim.SGD,
        *,
        n_inp: Inputs = None,
        opt: Any = None,
        bus: Bus | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__(model, dls, loss_func, lr, cbs, opt_func, opt=opt, bus=bus, **unknown)
        self.n_inp = check_n_inp(n_inp)

    @replaceable
    def predict(self) -> None:
        self.preds = call_model(self)

    @replaceable
    def get_loss(self) -> None:
        if self.loss_func is None:
            self.loss = loss_in(self.preds)
        else:
            self.loss = call_loss(self)

    @replaceable
    def backward(self) -> None:
        try:
            self.loss.backward()
        except (AttributeError, RuntimeError):  # a check before would take as long as the engine
            check_loss(self.loss)
            raise

    @replaceable
    def step(self) -> None:
        if self.wants_closure:
            self.opt.step(self.closure)
        else:
            self.opt.step()

    @replaceable
    def zero_grad(self) -> None:
        self.opt.zero_grad()


class MomentumLearner(TrainLearner):
    """A TrainLearner whose gradients decay instead of being zeroed.

    A parameter that has been frozen (`requires_grad_(False)`) loses its gradient, so that the
    optimizer no longer moves it.

    An optimizer that wants a closure is refused: it computes the gradients itself.

    Args:
        mom: the factor by which the gradients decay from one step to the next; 0 zeroes them.
        n_inp: as of a TrainLearner.

    Source: the post's `MomentumLearner`; parameters without a gradient are skipped.
    """

    not_with_closures = "the gradients that it keeps from one step to the next would be lost"

    def __init__(
        self,
        model: nn.Module,
        dls: Any = None,
        loss_func: Callable[..., Any] | None = F.mse_loss,
        lr: float = 0.1,
        cbs: Callback | Iterable[Callback] | None = None,
        opt_func: Callable[..., Any] | None = optim.SGD,
        mom: float = 0.85,
        *,
        n_inp: Inputs = None,
        opt: Any = None,
        bus: Bus | None = None,
        **unknown: Never,
    ) -> None:
        super().__init__(
            model, dls, loss_func, lr, cbs, opt_func, n_inp=n_inp, opt=opt, bus=bus, **unknown
        )
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

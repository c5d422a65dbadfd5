"""Updates: a backward pass and a step, of a loss that the learner computes itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ...events import (
    AfterBackward,
    AfterLoss,
    AfterPredict,
    Backward,
    CancelStepException,
    GetLoss,
    Predict,
)
from ...events.base import lrs_of
from .clock import has_taken_its_steps
from .loop import Loop
from .optimizers import Optimizers, class_of, optimizer_named
from .parameters import all_groups


class UpdatingLoop(Loop):
    """A loop whose learner may do several updates per batch."""

    __slots__ = ()

    def update(self, loss: torch.Tensor, opt: str | None = None) -> None:
        """Do one update: backward pass and optimizer step, with all of their events.

        For a learner that takes several steps per batch, such as those of a GAN: call it in
        `get_loss` or `predict`. A batch in which it was called has no other backward pass and no
        other step. `learner.loss` is `loss`, until the next update. It emits AfterLoss, performs
        Backward, emits AfterBackward, and enters the step scope: BeforeStep, Step, ZeroGrad,
        AfterStep, CleanupStep. In validation, it only emits AfterLoss; so it does once `max_steps`
        are taken.

        With `opt`, step and ZeroGrad are those of this optimizer, callbacks look at its parameters,
        and `event.opt` is its name. Gradients of the other optimizers' parameters are dropped.

        Args:
            loss: a scalar tensor.
            opt: the name of an optimizer, if the learner has several; by default all are stepped.

        Raises:
            RuntimeError: there is no fit, or it is called within a step.
            ValueError: there is no optimizer of this name, or the loss does not depend on its
                parameters.

        Example:
            >>> import torch
            >>> from eventrain.engine import DataLoaders, TrainLearner
            >>> class Pair(TrainLearner):
            ...     def predict(self):
            ...         self.preds = [net(self.batch) for net in self.model]
            ...
            ...     def get_loss(self):
            ...         for name, preds in zip("ab", self.preds):
            ...             self.update(preds.square().mean(), name)
            >>> nets = torch.nn.ModuleList([torch.nn.Linear(3, 1), torch.nn.Linear(3, 1)])
            >>> opt = {n: torch.optim.SGD(net.parameters(), 0.1) for n, net in zip("ab", nets)}
            >>> learner = Pair(nets, DataLoaders([torch.ones(2, 3)] * 4), opt=opt)
            >>> learner.run(1, valid=False).steps
            4
        """
        if self.innermost_scope is None:
            raise RuntimeError("update() was called outside of a fit: call it in get_loss()")
        if self.innermost_scope[0] is CancelStepException:
            raise RuntimeError(
                "update() was called within a step, of which it has one of its own: call it in"
                " get_loss(), or in predict()"
            )
        if self.wants_closure:
            raise RuntimeError(
                f"update() cannot compute its loss again, but {class_of(self.opt).__name__} wants a"
                " closure: leave update() out, so that get_loss() is called for every evaluation"
            )
        self.updated = True
        counts = not isinstance(self.opt, Optimizers) or opt in (None, self.opt.first)
        if not self.training or (counts and has_taken_its_steps(self)):
            self.loss = loss
            self.emit(AfterLoss)
            return
        with self.stepping(opt):
            self.loss = loss
            self.emit(AfterLoss)
            self.gradients_pending = True
            with _aside(self._others(opt)):
                self.perform(Backward)
                if opt is not None:
                    self._check_has_gradient(opt)
            self.emit(AfterBackward)
            self.one_step()

    def closure(self) -> torch.Tensor:
        """Compute the loss and its gradients again, for an optimizer that wants a closure.

        It zeroes the gradients, performs Predict, GetLoss and Backward, and emits their events,
        AfterPredict, AfterLoss and AfterBackward. `learner.loss` and `learner.preds` stay those of
        the batch before its step.

        Such an optimizer is one whose `step` has a parameter `closure` that must be given, as that
        of `torch.optim.LBFGS`. `TrainLearner.step` passes it this method; a `step` of your own
        calls `self.opt.step(self.closure)`. An optimizer that takes a closure, but does not need
        one, does not get it.

        Returns:
            The loss, a scalar.
        """
        loss, preds = self.loss, self.preds
        try:
            with torch.enable_grad():
                self.opt.zero_grad()
                self.perform(Predict)
                self.emit(AfterPredict)
                self.perform(GetLoss)
                self.emit(AfterLoss)
                self.perform(Backward)
                self.emit(AfterBackward)
            again: torch.Tensor = self.loss
            return again.detach()
        finally:
            self.loss, self.preds = loss, preds

    def _check_has_gradient(self, opt: str) -> None:
        """Raise unless the backward pass of an update has reached its optimizer's parameters.

        Raises:
            ValueError: it has reached none of them.
        """
        groups = {name: inner.param_groups for name, inner in self.opt.items()}
        reached = [
            name
            for name in groups
            if any(p.grad is not None for group in groups[name] for p in group["params"])
        ]
        if opt not in reached:
            others = ", ".join(map(repr, reached)) or "none of the others either"
            raise ValueError(
                f"update(loss, {opt!r}): the loss does not depend on the parameters of {opt!r},"
                f" which would step without a gradient; it has reached {others}"
            )

    @contextmanager
    def stepping(self, opt: str | None) -> Iterator[None]:
        """While this context is entered, `one_step` is that of one optimizer.

        Args:
            opt: its name, if the learner has several; None for all.

        Raises:
            ValueError: there is no optimizer of this name.
        """
        rates, self.step_lrs = self.step_lrs, None
        if opt is None:
            yield
            return
        optimizer_named(self.opt, opt)
        pending = self.gradients_pending
        waiting = set(self.opt if pending is True else pending or ())
        self.gradients_pending = opt in waiting
        self.updating, self.step_counts = opt, opt == self.opt.first
        try:
            with self.opt.only(opt):
                yield
        finally:
            self._tell_rates(opt, rates)
            self.updating, self.step_counts = None, True
            waiting.discard(opt)
            self.gradients_pending = sorted({*waiting, *[opt] * bool(self.gradients_pending)})

    def _tell_rates(self, opt: str, before: tuple[Any, ...] | None) -> None:
        """Let the batch tell the rates of all, and of `opt` those that its step used."""
        used = lrs_of(self.opt[opt]) if self.step_lrs is None else self.step_lrs
        rates = list(lrs_of(self.opt) if before is None else before)
        names = [name for name, inner in self.opt.items() for _ in inner.param_groups]
        if len(rates) == len(names):  # a receiver may have added a group
            first = names.index(opt)
            rates[first : first + names.count(opt)] = used
        self.step_lrs = tuple(rates)

    def _others(self, opt: str | None) -> Iterable[torch.Tensor]:
        if opt is None:
            return ()
        assert isinstance(self.opt, Optimizers)
        own = {id(p) for group in self.opt[opt].param_groups for p in group["params"]}
        every = (p for group in all_groups(self.opt) for p in group["params"])
        return [p for p in every if id(p) not in own]


@contextmanager
def _aside(parameters: Iterable[torch.Tensor]) -> Iterator[None]:
    """Let a backward pass leave the gradients of these parameters as they are."""
    kept = [(p, p.grad) for p in parameters]
    for p, _ in kept:
        p.grad = None
    try:
        yield
    finally:
        for p, gradient in kept:
            p.grad = gradient

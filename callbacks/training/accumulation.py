"""Gradient accumulation: one optimizer step per several batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal

import torch

from ...engine.data.dataloaders import has_exact_length
from ...engine.loop.loss import Weight, check_loss, check_weight, weight_of
from ...engine.loop.parameters import parameters_of_step
from ...events import (
    AfterBackward,
    AfterEpoch,
    AfterLoss,
    BatchEvent,
    BeforeStep,
    Callback,
    CancelStepException,
    CleanupEpoch,
    LearnerLike,
    StepEvent,
)
from .._checks import check_int


class GradientAccumulationCB(Callback):
    """Takes an optimizer step every `n` training batches, on the mean of their gradients.

    Each batch has the weight 1/n in the backward pass; `learner.loss`, and the loss that metrics
    see, stay the true one. The batches that remain at the end of an epoch have a step of their
    own, each with the weight 1/(their number). Where the loader has no length, or one that may be
    wrong (of an iterable dataset, a sampler or a class of your own), the end of the epoch is known
    only when it is there: the last step is taken in AfterEpoch, with the order of this callback,
    and if there were other batches than the length said, the gradients are corrected before.

    The mean of the gradients is the gradient of one large batch only if the losses of all batches
    are means over the same number of targets. Where they are not, such as means over tokens that
    are not padding, give that number as the `weight`.

    For a batch without a step, the step scope is cancelled: `CleanupStep.end` reports it, no
    `AfterStep` is emitted, but `AfterBatch` is. If an epoch is cut short within a group, the
    gradients of the group are dropped; those that were there before it, as with `MomentumLearner`,
    are put back, as the momentum of an optimizer stays.

    A learner that steps several optimizers, with `update`, accumulates for each on its own; every
    update counts as a batch.

    Args:
        n: batches per step.
        weight: a function of the learner that returns the weight of the current batch in the mean:
            a number, or a scalar tensor, which causes no device sync. It is called after the loss.
            By default, all batches have the same.
        tail: "mean" for the mean over the batches that remain at the end of an epoch; "full" to
            divide them by `n`, too, as loops do that divide every loss by `n`.

    Raises:
        TypeError, ValueError: an argument is not valid, or `weight` does not return a number.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import GradientAccumulationCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> x, y = torch.randn(6, 3), torch.tensor([0, 1, -100, -100, -100, 2])
        >>> batches = list(zip(x.split(3), y.split(3)))
        >>> n_targets = lambda learner: (learner.batch[1] != -100).sum()  # 2, then 1
        >>> learner = TrainLearner(
        ...     torch.nn.Linear(3, 3),
        ...     DataLoaders(batches),
        ...     torch.nn.functional.cross_entropy,
        ...     cbs=GradientAccumulationCB(2, weight=n_targets),
        ... )
        >>> learner.run(1, valid=False).steps
        1

    Source: the post's `GradientAccumulationCB`, which cancels the batch instead, so that
    metrics miss it. The weight: huggingface/transformers#34191.
    """

    not_with_closures = "it would accumulate over these, too"
    order: float = 50  # after changes of the loss, before what uses or changes gradients
    in_extra_validation = False

    def __init__(
        self, n: int, *, weight: Weight | None = None, tail: Literal["mean", "full"] = "mean"
    ) -> None:
        self.n = check_int("n", n, "the number of batches per step, 1 or more")
        if tail not in ("mean", "full"):
            raise ValueError(f"tail={tail!r}: choose 'mean' or 'full'")
        if tail == "full" and weight is not None:
            raise ValueError(
                "tail='full' divides by n batches, but with weight= the sum of the weights is"
                " divided by: leave one of them out"
            )
        self.weight = check_weight(weight)
        self.tail = tail
        self._forget()

    def _forget(self) -> None:
        self._groups: dict[str | None, _Group] = {}  # by the name of the optimizer
        self._flushing = False

    def _group(self, event: BatchEvent | StepEvent) -> _Group:
        return self._groups.setdefault(event.opt, _Group(self.n, self.n))

    def after_loss(self, event: AfterLoss) -> None:
        if not event.training:
            return
        group = self._group(event)
        if group.waiting == 0:
            self._begin_group(group, event)
        group.next = 1 / group.group
        if self.weight is not None:
            weight = weight_of(self.weight, event.learner)
            if group.unit is None:
                group.unit = _at_least_1(weight)
            group.next = weight / group.unit / group.group
        if self.weight is not None or group.group > 1:
            # The gradient is scaled, not the loss: neither the performer of Backward nor readers of
            # the loss are affected.
            check_loss(event.learner.loss).register_hook(self._scaled_by(group.next, group.group))

    def _begin_group(self, group: _Group, event: AfterLoss) -> None:
        if event.n_iter is not None:
            left = max(1, min(self.n, event.n_iter - event.iter))
            group.group = left if self.tail == "mean" else self.n
            is_exact = event.learner.epoch_length or has_exact_length(event.learner.dl)
            group.due = left if is_exact else self.n
        if self.n > 1:
            gradients = [p.grad for p in parameters_of_step(event.learner)]
            if any(gradient is not None for gradient in gradients):  # as with MomentumLearner
                group.kept = [None if g is None else g.clone() for g in gradients]

    def _scaled_by(self, weight: Any, group: int) -> Callable[[torch.Tensor], torch.Tensor]:
        if self.weight is None:
            return lambda gradient: gradient / group
        return lambda gradient: (gradient * weight).to(gradient.dtype)

    def after_backward(self, event: AfterBackward) -> None:
        group = self._group(event)
        group.waiting += 1
        group.weight = group.weight + group.next

    def before_step(self, event: BeforeStep) -> None:
        group = self._group(event)
        if group.waiting < group.due and not self._flushing:
            raise CancelStepException(f"accumulating, {group.waiting} of {group.due}")
        self._correct(group, event.learner)
        del self._groups[event.opt]
        self._flushing = False

    def _correct(self, group: _Group, learner: LearnerLike) -> None:
        """Divide the gradients of the group by the sum of their weights, unless that is 1."""
        total = group.weight
        if isinstance(total, torch.Tensor):
            total = torch.where(total > 0, total, 1)
        elif math.isclose(total, 1) or not total or (self.tail == "full" and total < 1):
            return
        for p, before in group.parameters(learner):
            if p.grad is None:
                continue
            divisor = total.to(p.grad.device) if isinstance(total, torch.Tensor) else total
            if before is None:
                p.grad /= divisor
            else:
                p.grad.sub_(before).div_(divisor).add_(before)

    def after_epoch(self, event: AfterEpoch) -> None:
        # The last group of a loader without a length that is certain; each of several optimizers.
        for name in [name for name, group in self._groups.items() if group.waiting]:
            self._flushing = True
            with event.learner.stepping(name):
                event.learner.one_step()

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        for name, group in self._groups.items():
            if group.waiting:  # the epoch was cancelled within a group
                with event.learner.stepping(name):
                    for p, before in group.parameters(event.learner):
                        p.grad = before
        self._forget()

    def steps_in(self, n_batches: int) -> int:
        """One step for every group of `n` batches, and for those that remain."""
        return math.ceil(n_batches / self.n)

    def state_dict(self) -> dict[str, Any]:
        """The progress of the current group; with `update`, of the group of each optimizer."""
        named = {name: g.state() for name, g in self._groups.items() if name is not None}
        state = self._groups.get(None, _Group(self.n, self.n)).state()
        return {**state, "named": named} if named else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        named = {None: state, **state.get("named", {})}
        self._groups = {name: _Group.of(held) for name, held in named.items()}


@dataclass(slots=True)
class _Group:
    """The batches of one optimizer step.

    Attributes:
        group: the number of batches whose mean is expected to be taken.
        due: the number of batches after which a step is taken.
        waiting: batches since the last step.
        weight: the sum of their weights, 1 for a full group; may be a tensor.
        next: the weight of the current batch.
        unit: what `weight` returned is divided by, so that it is about 1.
        kept: gradients from before the group.
    """

    group: int
    due: int
    waiting: int = 0
    weight: Any = 0.0
    next: Any = 0.0
    unit: Any = None
    kept: list[torch.Tensor | None] | None = None

    def parameters(
        self, learner: LearnerLike
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Every parameter of the step with its gradient from before the group."""
        for p, before in zip_longest(parameters_of_step(learner), self.kept or ()):
            if p is not None:
                yield p, None if before is None else before.to(p.device)

    def state(self) -> dict[str, Any]:
        kept = None if self.kept is None else list(self.kept)
        return {**{key: getattr(self, key) for key in _SAVED}, "kept": kept}

    @classmethod
    def of(cls, state: dict[str, Any]) -> _Group:
        return cls(**{key: state[key] for key in (*_SAVED, "kept") if key in state})


_SAVED = ("waiting", "weight", "unit", "group", "due")


def _at_least_1(weight: Any) -> Any:
    return weight.clamp(min=1) if isinstance(weight, torch.Tensor) else max(weight, 1)

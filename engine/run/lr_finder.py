"""The learning-rate finder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...events import (
    AfterBatch,
    AfterStep,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    Callback,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
)
from ..loop.parameters import all_groups
from .loss_curve import LossCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["steep", "valley", "minimum"]


class LRFinderCB(Callback):
    """Multiplies the learning rate after every optimizer step until the loss explodes.

    It ends the fit when the next learning rate would be above `end_lr`, when the smoothed loss is
    more than four times its best value, or when a loss is not finite. Single losses do not end it:
    those of small batches are mostly noise. Validation is skipped. `Learner.lr_find` runs it and
    restores everything afterwards.

    The rates of all parameter groups are multiplied together and keep their ratio.

    Args:
        lr_mult: the factor, above 1.
        end_lr: the highest learning rate to try; `math.inf` for no limit.

    Attributes:
        lrs: the learning rates that were tried, in increasing order, as they are given to `fit` or
            to the learner: `lr`, times the factor so far. If no parameter group has exactly that
            rate, because `opt_func` divides it or does not use it, they are those of the first
            group. `suggestion() / lrs[0]` is always the factor for the rate of every group.
        losses: the loss at each of them; with accumulation, the mean over the step's batches.

    Raises:
        ValueError: `lr_mult` is not above 1; in the fit, the first learning rate is 0 or above
            `end_lr`.

    Source: the post's `LRFinderCB`; fastai's `LRFinder`; Smith, "Cyclical Learning Rates for
    Training Neural Networks", 2017.
    """

    order: float = 10  # after metrics
    fit_purpose = "lr_find"
    in_extra_validation = False

    def __init__(self, lr_mult: float = 1.3, end_lr: float = 10.0) -> None:
        if not isinstance(lr_mult, int | float) or not lr_mult > 1:
            raise ValueError(f"lr_mult={lr_mult!r}: give a factor above 1")
        if not isinstance(end_lr, int | float) or not end_lr > 0:
            raise ValueError(f"end_lr={end_lr!r}: give the highest learning rate to try")
        self.lr_mult = lr_mult
        self.end_lr = end_lr
        self.lrs: list[float] = []
        self.losses: list[float] = []

    @property
    def smoothed(self) -> list[float]:
        """The losses, smoothed: exponentially weighted means with bias correction."""
        return LossCurve(self.losses).smoothed

    def before_fit(self, event: BeforeFit) -> None:
        self.lrs, self.losses = [], []
        self._curve = LossCurve()
        self._step_losses: list[float] = []
        self._step_lr: float | None = None  # of the step that was taken in this batch
        learner: Any = event.learner
        if not learner.trains:
            return
        self._group = _group_with(learner.fit_lr, all_groups(learner.opt))
        first = self._lr(learner)
        if not 0 < first <= self.end_lr:
            raise ValueError(
                f"the search begins at lr={first:g} and ends at end_lr={self.end_lr:g}: give a"
                " lower lr, above 0, or a higher end_lr"
            )

    def before_epoch(self, event: BeforeEpoch) -> None:
        if not event.training:
            raise CancelEpochException("the learning-rate finder does not validate")

    def before_step(self, event: BeforeStep) -> None:
        self._lr_before = self._lr(event.learner)

    def after_step(self, event: AfterStep) -> None:
        self._step_lr = self._lr_before

    def after_batch(self, event: AfterBatch) -> None:
        loss = event.learner.loss.item()  # the host waits for the device here
        if not math.isfinite(loss):
            raise CancelFitException(f"the loss is {loss}")
        self._step_losses.append(loss)
        self._record_step(event.learner)

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        self._record_step(event.learner)  # with accumulation, a step may follow the last batch

    def _lr(self, learner: Any) -> float:
        return float(all_groups(learner.opt)[self._group]["lr"])

    def _record_step(self, learner: Any) -> None:
        if self._step_lr is None or not self._step_losses:
            return
        self.lrs.append(self._step_lr)
        self.losses.append(sum(self._step_losses) / len(self._step_losses))
        self._curve.add(self.losses[-1])
        self._step_losses, self._step_lr = [], None
        if self._curve.exploded():
            raise CancelFitException("the smoothed loss is more than four times its best value")
        if self.lrs[-1] * self.lr_mult > self.end_lr * (1 + 1e-6):
            raise CancelFitException(f"the learning rate has reached end_lr={self.end_lr:g}")
        groups = all_groups(learner.opt)
        rates = [group["lr"] * self.lr_mult for group in groups]  # groups may share a tensor
        for group, lr in zip(groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):  # a compiled optimizer reads this one
                group["lr"].copy_(lr)
            else:
                group["lr"] = lr

    def suggestion(self, method: Method = "valley") -> float:
        """Suggest a learning rate to train with.

        All methods look for it below the highest learning rate at which the smoothed loss is not
        above its best value by more than noise explains, and from a hundredth to a third of it.

        Args:
            method: "steep": where the smoothed loss falls fastest; "valley": two thirds of the way
                through the longest decrease of the losses; "minimum": a tenth of that highest
                learning rate.

        Raises:
            ValueError: there is no such method, or there are fewer than three losses.

        Source: fastai's `Learner.lr_find`.
        """
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: choose {', '.join(map(repr, _METHODS))}")
        if len(self.losses) < 3:
            raise ValueError(
                f"{len(self.losses)} losses are too few for a suggestion: raise max_epochs, or"
                " start with a smaller start_lr"
            )
        curve = LossCurve(self.losses)
        last = curve.last_low()
        highest = self.lrs[last]
        lr = _METHODS[method](self.lrs, self.losses, curve.smoothed[: last + 1])
        return min(max(lr, highest / 100), highest / 3)

    @property
    def suggestions(self) -> dict[str, float]:
        """The suggestion of each method, by its name."""
        return {name: self.suggestion(name) for name in _METHODS}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the losses over the learning rates, with the suggestions.

        The smoothed losses are drawn as a line over the single ones. The explosion at the end is
        left out: it would flatten everything before it.

        Args:
            ax: the axes to draw into; by default those of a new figure, `ax.figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from .lr_plot import draw_search
            from .notebook_figure import NotebookFigure
        except ImportError as exc:
            raise ImportError("plot() needs matplotlib: pip install 'eventrain[plot]'") from exc
        suggestions = self.suggestions if len(self.losses) >= 3 else {}
        return draw_search(ax or NotebookFigure().panels[0], self.lrs, self.losses, suggestions)


def _group_with(lr: Any, groups: list[dict[str, Any]]) -> int:
    """The index of the first group with that learning rate; 0 if no group has it."""
    rates = [float(group["lr"]) for group in groups]
    if lr is None:
        return 0
    return next((i for i, rate in enumerate(rates) if math.isclose(rate, lr, rel_tol=1e-6)), 0)


def _steep(lrs: list[float], losses: list[float], smoothed: list[float]) -> float:
    slopes = [
        (after - before) / (math.log(right) - math.log(left))
        for before, after, left, right in zip(smoothed, smoothed[1:], lrs, lrs[1:], strict=False)
    ]
    return lrs[slopes.index(min(slopes))] if slopes else lrs[0]


def _valley(lrs: list[float], losses: list[float], smoothed: list[float]) -> float:
    # The longest decreasing subsequence is found in the losses themselves: noise affects it less
    # than the delay of the smoothed ones. For each loss, the length and start of the one it ends.
    lengths: list[int] = []
    starts: list[int] = []
    for i, loss in enumerate(losses):
        higher = [j for j in reversed(range(i)) if losses[j] > loss]  # of equals, the last
        longest = max(higher, key=lambda j: lengths[j], default=None)
        lengths.append(1 if longest is None else lengths[longest] + 1)
        starts.append(i if longest is None else starts[longest])
    end = lengths.index(max(lengths))
    return lrs[starts[end] + (end - starts[end]) * 2 // 3]


def _minimum(lrs: list[float], losses: list[float], smoothed: list[float]) -> float:
    return lrs[len(smoothed) - 1] / 10


_METHODS: dict[Method, Callable[[list[float], list[float], list[float]], float]] = {
    "steep": _steep,
    "valley": _valley,
    "minimum": _minimum,
}

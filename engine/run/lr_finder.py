"""The learning-rate finder."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from ...events import (
    AfterBatch,
    AfterStep,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Method = Literal["steep", "valley", "minimum"]


class LRFinderCB(Callback):
    """Multiplies the learning rate after every optimizer step until the loss explodes.

    It ends the fit when the loss is more than three times its minimum, or is not finite.
    Validation is skipped. `Learner.lr_find` runs it and restores everything afterwards.

    Args:
        lr_mult: the factor, above 1.

    Attributes:
        lrs: the learning rates that were tried, in increasing order.
        losses: the loss at each of them; with accumulation, the mean over the step's batches.

    Raises:
        ValueError: `lr_mult` is not above 1.

    Source: the post's `LRFinderCB`; Smith, "Cyclical Learning Rates for Training Neural
    Networks", 2017.
    """

    order: float = 10  # after metrics
    fit_purpose = "lr_find"

    def __init__(self, lr_mult: float = 1.3, end_lr: float = 10.0) -> None:
        if not lr_mult > 1:
            raise ValueError(f"lr_mult={lr_mult!r}: give a factor above 1")
        self.lr_mult = lr_mult
        self.lrs: list[float] = []
        self.losses: list[float] = []

    def before_fit(self, event: BeforeFit) -> None:
        self.lrs, self.losses = [], []
        self._step_losses: list[float] = []
        self._stepped = False

    def before_epoch(self, event: BeforeEpoch) -> None:
        if not event.training:
            raise CancelEpochException("the learning-rate finder does not validate")

    def after_step(self, event: AfterStep) -> None:
        self._stepped = True

    def after_batch(self, event: AfterBatch) -> None:
        learner = event.learner
        loss = learner.loss.item()  # the host waits for the device here
        if not math.isfinite(loss):
            raise CancelFitException(f"the loss is {loss}")
        self._step_losses.append(loss)
        self._record_step(learner)

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        self._record_step(event.learner)  # with accumulation, a step may follow the last batch

    def _record_step(self, learner: Any) -> None:
        if not self._stepped or not self._step_losses:
            return
        loss = sum(self._step_losses) / len(self._step_losses)
        self._step_losses, self._stepped = [], False
        self.lrs.append(float(learner.opt.param_groups[0]["lr"]))
        self.losses.append(loss)
        best = min(self.losses)
        if loss > best + 2 * abs(best):
            raise CancelFitException("the loss is more than three times its minimum")
        for group in learner.opt.param_groups:
            group["lr"] *= self.lr_mult

    def suggestion(self, method: Method = "valley") -> float:
        """Suggest a learning rate to train with.

        Args:
            method: "steep": where the loss falls fastest; "valley": two thirds of the way through
                the longest decrease of the loss; "minimum": a tenth of the learning rate with the
                lowest loss.

        Raises:
            ValueError: there is no such method, or there are fewer than three losses.

        Source: fastai's `Learner.lr_find`.
        """
        if method not in _METHODS:
            raise ValueError(f"method={method!r}: choose {', '.join(map(repr, _METHODS))}")
        if len(self.losses) < 3:
            raise ValueError(
                f"{len(self.losses)} losses are too few for a suggestion: start with a smaller"
                " start_lr, or a smaller lr_mult"
            )
        return _METHODS[method](self.lrs, self.losses)

    @property
    def suggestions(self) -> dict[str, float]:
        """The suggestion of each method, by its name."""
        return {name: self.suggestion(name) for name in _METHODS}

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the losses over the learning rates, with the suggestions.

        Args:
            ax: the axes to draw into; by default those of a new figure, `ax.figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        if ax is None:
            try:
                from .notebook_figure import NotebookFigure
            except ImportError as exc:
                raise ImportError("plot() needs matplotlib: pip install 'eventrain[plot]'") from exc
            ax = NotebookFigure().panels[0]
        ax.plot(self.lrs, self.losses)
        if len(self.losses) >= 3:
            for name, lr in self.suggestions.items():
                loss = self.losses[min(range(len(self.lrs)), key=lambda i: abs(self.lrs[i] - lr))]
                ax.plot(lr, loss, "o", label=f"{name}: {lr:.2e}")
            ax.legend()
        ax.set(xscale="log", xlabel="learning rate", ylabel="loss")
        return ax


def _steep(lrs: list[float], losses: list[float]) -> float:
    slopes = [
        (after - before) / (math.log(right) - math.log(left))
        for before, after, left, right in zip(losses, losses[1:], lrs, lrs[1:], strict=False)
    ]
    return lrs[slopes.index(min(slopes))]


def _valley(lrs: list[float], losses: list[float]) -> float:
    # The longest decreasing subsequence: for each loss, the length and start of the one it ends.
    lengths: list[int] = []
    starts: list[int] = []
    for i, loss in enumerate(losses):
        higher = [j for j in range(i) if losses[j] > loss]
        longest = max(higher, key=lambda j: lengths[j], default=None)
        lengths.append(1 if longest is None else lengths[longest] + 1)
        starts.append(i if longest is None else starts[longest])
    end = lengths.index(max(lengths))
    return lrs[starts[end] + (end - starts[end]) * 2 // 3]


def _minimum(lrs: list[float], losses: list[float]) -> float:
    return lrs[losses.index(min(losses))] / 10


_METHODS: dict[Method, Callable[[list[float], list[float]], float]] = {
    "steep": _steep,
    "valley": _valley,
    "minimum": _minimum,
}

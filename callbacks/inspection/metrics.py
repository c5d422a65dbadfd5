"""Loss and metrics of every epoch, accumulated on the device of the predictions."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

import torch

from ...engine.loop.loss import Weight
from ...engine.run.denominator import DenominatorCheck
from ...engine.run.mean_loss import MeanLoss, log_reduction
from ...events import AfterBatch, AfterEpoch, BeforeEpoch, BeforeFit, Callback, CleanupEpoch
from .._checks import optional_import
from ._metric_arguments import Arguments, metric_and_arguments, update

with warnings.catch_warnings():
    # torcheval 0.0.7 compiles with torch.jit.script, which torch has deprecated. Whoever imports
    # this cannot change that.
    warnings.simplefilter("ignore", FutureWarning)
    from torcheval.metrics import Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class MetricsCB(Callback):
    """Computes torcheval metrics, and the loss averaged over samples, for every epoch.

    Each batch updates them on the device, without a copy to the host; the numbers are read once
    per epoch. They are put into `learner.record`, and so are in the `CleanupEpoch` event and in
    `FitResult.history`.

    Args:
        metrics: torcheval metrics, updated with (predictions, targets), named after their class. A
            pair of a metric and a function of the learner says what else to update it with: the
            function returns the arguments, as a tuple.
        loss: what the loss of a batch is: "mean", the mean over its samples; "sum", their sum;
            "auto", what `loss_func.reduction` or that parameter of it says, else the mean. The
            loss of an epoch is the mean over its samples in any case, which
            `learner.batch_size(batch)` counts. None records no loss.
        weight: a function of the learner that returns the weight of the current batch in that mean:
            a number, or a scalar tensor, which causes no device sync. By default, it is the number
            of samples. Where the loss of a batch is divided by something else, such as the number
            of tokens that are not ignored, this is how to get the loss of all of them; without it,
            "loss_is_a_guess" is logged where that can be seen.
        named: more metrics, under names of your own.

    Attributes:
        history: one dict per completed epoch and phase, over all fits, but not over runs of
            `validate` or `lr_find`: "epoch", "train" ("train" or "eval"), a number (or nested
            list) per metric, and "loss".

    Raises:
        TypeError: an argument is not a torcheval metric.
        ValueError: two metrics have the same name, or one has the name of another column; or
            there is no such `loss`.

    Example:
        >>> import torch
        >>> from torcheval.metrics import MulticlassAccuracy
        >>> from eventrain.callbacks import MetricsCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.eye(3), torch.arange(3))] * 4
        >>> model = torch.nn.Linear(3, 3)
        >>> _ = torch.nn.init.eye_(model.weight)
        >>> metrics = MetricsCB(accuracy=MulticlassAccuracy())
        >>> learner = TrainLearner(
        ...     model, DataLoaders(batches), torch.nn.functional.cross_entropy, cbs=metrics
        ... )
        >>> result = learner.run(1, valid=False)
        >>> metrics.history[0]["epoch"], metrics.history[0]["train"], metrics.history[0]["accuracy"]
        (0, 'train', 1.0)

    Source: the post's `MetricsCB`, which copies every batch's predictions to the host.
    """

    records_loss = True
    in_extra_validation = False

    def __init__(
        self,
        *metrics: Metric[Any] | tuple[Metric[Any], Arguments],
        loss: Literal["auto", "mean", "sum"] | None = "auto",
        weight: Weight | None = None,
        **named: Metric[Any] | tuple[Metric[Any], Arguments],
    ) -> None:
        if isinstance(weight, Metric | tuple):
            named["weight"], weight = weight, None
        if weight is not None and not callable(weight):
            raise TypeError(f"weight={weight!r}: give a function of the learner")
        self.weight = weight
        if isinstance(loss, Metric | tuple):
            named["loss"] = loss
        elif loss not in ("auto", "mean", "sum", None):
            raise ValueError(f"loss={loss!r}: choose 'auto', 'mean', 'sum' or None")
        self.loss = loss
        self.metrics: dict[str, Metric[Any]] = {}
        self._arguments: dict[str, Arguments | None] = {}
        for given, entry in [*((None, m) for m in metrics), *named.items()]:
            metric, arguments = metric_and_arguments(entry)
            name = type(metric).__name__ if given is None else given
            self._arguments[name] = arguments
            if not isinstance(metric, Metric):
                raise TypeError(
                    f"{name}={metric!r} is not a torcheval metric: pass an instance of one"
                )
            if name in self.metrics or name in ("epoch", "train", "status", "loss"):
                raise ValueError(f"the name {name!r} is taken: pass the metric as yourname=...")
            self.metrics[name] = metric
        self.history: list[dict[str, Any]] = []
        self._loss = MeanLoss(loss or "mean", weight)
        self._check: DenominatorCheck | None = None
        self._placed = False  # whether the metrics are on the device of the predictions
        self._measured = False  # whether a batch of this epoch has been completed

    def before_fit(self, event: BeforeFit) -> None:
        event.learner.metrics = self
        if self.loss == "auto":
            log_reduction(event.learner)
            self._check = DenominatorCheck(event.learner)

    def before_epoch(self, event: BeforeEpoch) -> None:
        for metric in self.metrics.values():
            metric.reset()
        self._loss = MeanLoss(self.loss or "mean", self.weight, self._check)
        self._placed = self._measured = False

    def after_batch(self, event: AfterBatch) -> None:
        if self.loss is not None:
            self._loss.add(event)
        self._measured = True
        if not self.metrics:
            return
        for name, metric in self.metrics.items():
            update(name, metric, self._arguments[name], event.learner, place=not self._placed)
        self._placed = True

    def after_epoch(self, event: AfterEpoch) -> None:
        numbers = self.measured()
        event.learner.record.update(numbers)
        if numbers and event.purpose == "fit":
            self.history.append(event.learner.record)  # which others may add to

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        self._measured = False  # an epoch that is cut short before it begins measures nothing

    def measured(self) -> dict[str, Any]:
        """The metrics and the loss so far; the host waits for the device here, once per epoch."""
        if not self._measured:
            return {}
        numbers = {name: _number(metric.compute()) for name, metric in self.metrics.items()}
        loss = self._loss.item()
        return numbers if loss is None else {**numbers, "loss": loss}

    def plot(self, ax: Axes | None = None, names: str | Iterable[str] | None = None) -> Axes:
        """Draw the loss and the metrics by epoch, in training and in validation.

        Epochs are counted from 1, and on over all fits. Metrics that are not a single number are
        left out.

        Args:
            ax: the axes to draw everything on; by default a new figure with a panel for each name,
                which a notebook shows if it is the result of a cell.
            names: the numbers to draw; by default the loss and every metric.

        Returns:
            `ax`, or the first panel of the new figure; its `.figure` is the figure.

        Raises:
            ValueError: nothing is recorded yet, or no number has one of the names.
            ImportError: matplotlib is not installed.
        """
        with optional_import("plot()", "matplotlib", "plot"):
            from matplotlib.ticker import MaxNLocator

            from ...engine.run.notebook_figure import NotebookFigure
        curves = _curves(self.history)
        names = [names] if isinstance(names, str) else list(curves if names is None else names)
        if not curves:
            raise ValueError("there is nothing to plot yet: no epoch has ended with a loss")
        if not names:
            raise ValueError(f"names=[]: choose from {', '.join(curves)}")
        for name in names:
            if name not in curves:
                raise ValueError(f"names: there is no number {name!r}, but {', '.join(curves)}")
        panels = NotebookFigure(len(names)).panels if ax is None else [ax] * len(names)
        together = ax is not None and len(names) > 1
        for panel, name in zip(panels, names, strict=True):
            for phase, points in curves[name].items():
                style = "-o" if phase == "train" else "--s"
                label = f"{phase} {name}" if together else phase
                panel.plot(*zip(*points, strict=True), style, markersize=4, label=label)
            panel.set(xlabel="epoch", ylabel=", ".join(names) if together else name)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            panel.legend()
        return panels[0]

    def state_dict(self) -> dict[str, Any]:
        """The numbers of this epoch so far, and of those before."""
        return {
            "history": [dict(row) for row in self.history],
            "loss": self._loss.state_dict(),
            "measured": self._measured,
            "metrics": {name: metric.state_dict() for name, metric in self.metrics.items()},
            "windows": {  # the position in a window, which is not in torcheval's state_dict
                name: metric.next_inserted
                for name, metric in self.metrics.items()
                if hasattr(metric, "next_inserted")
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.history = [dict(row) for row in state["history"]]
        self._loss.load_state_dict(state["loss"])
        self._measured = state["measured"]
        for name, metric in self.metrics.items():
            made_on_demand = {  # torcheval restores plain dicts, but needs defaultdicts
                key: value.default_factory
                for key, value in vars(metric).items()
                if isinstance(value, defaultdict)
            }
            metric.load_state_dict(state["metrics"][name])
            for key, factory in made_on_demand.items():
                setattr(metric, key, defaultdict(factory, getattr(metric, key)))
        for name, place in state["windows"].items():
            self.metrics[name].next_inserted = place  # type: ignore[attr-defined]
        self._placed = False


def _number(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else value


def _curves(history: list[dict[str, Any]]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """(epoch from 1, number) pairs by name and phase, the loss first, over all fits."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = {"loss": {}} if history else {}
    before, last = 0, (-1, False)
    for row in history:
        now = row["epoch"], row["train"] == "eval"
        if now <= last:  # the epochs start again: another fit
            before += last[0] + 1
        last = now
        for name, value in row.items():
            if name in ("epoch", "train") or not isinstance(value, Real):
                continue
            points = curves.setdefault(name, {}).setdefault("valid" if now[1] else "train", [])
            points.append((before + now[0] + 1, float(value)))
    return curves

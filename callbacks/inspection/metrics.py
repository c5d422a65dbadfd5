"""Loss and metrics of every epoch, accumulated on the device of the predictions."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal

from ...engine import log
from ...engine.loop.loss import Weight, check_weight
from ...engine.run.denominator import DenominatorCheck
from ...engine.run.mean_loss import MeanLoss, log_reduction
from ...events import AfterBatch, AfterEpoch, BeforeEpoch, BeforeFit, Callback, CleanupEpoch
from .._checks import optional_import
from ._measured import Entry, Measured, is_metric, name_of
from ._metric_state import state_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class MetricsCB(Callback):
    """Computes metrics, and the loss averaged over samples, for every epoch.

    Each batch updates them on the device, without a copy to the host; the numbers are read once
    per epoch. They are put into `learner.record`, and so are in the `CleanupEpoch` event and in
    `FitResult.history`.

    A metric is an object with `update`, `compute` and `reset`: one of torcheval or torchmetrics, or
    of a class of your own. It is updated with the predictions, a tensor, and the target. Where the
    model or the batch has several, pair it with a function of the learner that returns what to
    update it with, as a tuple: `(metric, lambda learner: (learner.preds[0], learner.batch[1]))`. A
    function alone returns the number of a batch, which is averaged over samples. If `compute`
    returns a mapping, each of its items is a number, named "name.key".

    In the middle of an epoch, a checkpoint holds what they have measured so far: by `state_dict`
    or, if an object of your own has none, its attributes if these are plain data. Otherwise
    "metric_is_not_saved" is logged.

    Args:
        metrics: metrics, pairs or functions, named after the class or the function.
        loss: what the loss of a batch is: "mean", the mean over its samples; "sum", their sum;
            "auto", what `loss_func.reduction` or that parameter of it says, else the mean. The
            loss of an epoch is the mean over its samples in any case, which
            `learner.batch_size(batch)` counts. None records no loss.
        weight: a function of the learner that returns the weight of the current batch in that mean:
            a number, or a scalar tensor, which causes no device sync. By default, it is the number
            of samples. Where the loss of a batch is divided by something else, such as the number
            of tokens that are not ignored, this is how to get the loss of all of them; without it,
            "loss_is_a_guess" is logged where that can be seen.
        named: more of them, under names of your own.

    Attributes:
        history: one dict per completed epoch and phase, over all fits, but not over runs of
            `validate` or `lr_find`: "epoch", "train" ("train" or "eval"), a number (or nested
            list) per metric, and "loss".

    Raises:
        TypeError: an argument is none of these.
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
        >>> metrics = MetricsCB(
        ...     accuracy=MulticlassAccuracy(),
        ...     confidence=lambda learner: learner.preds.softmax(1).amax(1).mean(),
        ... )
        >>> learner = TrainLearner(
        ...     model, DataLoaders(batches), torch.nn.functional.cross_entropy, cbs=metrics
        ... )
        >>> result = learner.run(1, valid=False)
        >>> row = metrics.history[0]
        >>> row["epoch"], row["train"], row["accuracy"], 0.3 < row["confidence"] < 0.9
        (0, 'train', 1.0, True)

    Source: the post's `MetricsCB`, which copies every batch's predictions to the host.
    """

    records_loss = True
    in_extra_validation = False

    def __init__(
        self,
        *metrics: Entry,
        loss: Literal["auto", "mean", "sum"] | None = "auto",
        weight: Weight | None = None,
        **named: Entry,
    ) -> None:
        if isinstance(weight, tuple) or is_metric(weight):
            named["weight"], weight = weight, None  # type: ignore[assignment]
        if callable(loss) or isinstance(loss, tuple) or is_metric(loss):
            raise ValueError("the name 'loss' is taken: pass the metric as yourname=...")
        if loss not in ("auto", "mean", "sum", None):
            raise ValueError(f"loss={loss!r}: choose 'auto', 'mean', 'sum' or None")
        self.loss = loss
        self.weight = check_weight(weight)
        self._measures: dict[str, Measured] = {}
        for name, entry in [*((name_of(entry), entry) for entry in metrics), *named.items()]:
            if name in self._measures or name in ("epoch", "train", "status", "loss"):
                raise ValueError(f"the name {name!r} is taken: pass the metric as yourname=...")
            self._measures[name] = Measured(name, entry)
        self.metrics = {name: measured.metric for name, measured in self._measures.items()}
        self.history: list[dict[str, Any]] = []
        self._loss = MeanLoss(loss or "mean", weight)
        self._check: DenominatorCheck | None = None
        self._measured = False  # whether a batch of this epoch has been completed
        self._told = False  # whether it was logged that a metric cannot be saved

    def _current(self) -> dict[str, Measured]:
        """What is measured: `metrics` may have been changed."""
        known = self._measures
        self._measures = {
            name: known[name]
            if name in known and known[name].metric is metric
            else Measured(name, metric)
            for name, metric in self.metrics.items()
        }
        return self._measures

    def before_fit(self, event: BeforeFit) -> None:
        event.learner.metrics = self
        if self.loss == "auto":
            log_reduction(event.learner)
            self._check = DenominatorCheck(event.learner)

    def before_epoch(self, event: BeforeEpoch) -> None:
        for measured in self._current().values():
            measured.reset()
        self._loss = MeanLoss(self.loss or "mean", self.weight, self._check)
        self._measured = False

    def after_batch(self, event: AfterBatch) -> None:
        if self.loss is not None:
            self._loss.add(event)
        self._measured = True
        for measured in self._measures.values():
            measured.update(event.learner)

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
        numbers: dict[str, Any] = {}
        for measured in self._measures.values():
            numbers |= measured.numbers()
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
            "metrics": self._metric_states(),
        }

    def _metric_states(self) -> dict[str, Any]:
        states = {name: state_of(metric) for name, metric in self.metrics.items()}
        missing = [name for name, state in states.items() if state is None]
        if missing and not self._told:
            self._told = True
            log.warning(
                "metric_is_not_saved",
                metrics=missing,
                hint="a fit that is resumed in the middle of an epoch will measure these from there"
                " on: give them state_dict() and load_state_dict()",
            )
        return states

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.history = [dict(row) for row in state["history"]]
        self._loss.load_state_dict(state["loss"])
        self._measured = state["measured"]
        for name, measured in self._current().items():
            if name not in state["metrics"]:
                raise ValueError(
                    f"MetricsCB has a metric {name!r}, of which nothing was saved, but of"
                    f" {', '.join(map(repr, state['metrics'])) or 'none'}"
                )
            measured.load(state["metrics"][name])


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

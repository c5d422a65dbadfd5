"""The loss as a curve that grows while the training runs."""

from __future__ import annotations

import math
from collections import deque
from time import monotonic
from typing import TYPE_CHECKING, Any

import torch

from ...engine.imports import import_large
from ...engine.run.mean_loss import MeanLoss
from ...events import AfterBatch, BeforeFit, Callback, CleanupEpoch, CleanupFit, Event, Watcher
from .._checks import check_installed
from ._notebook_cell import CellOutput, in_notebook
from ._pending_scalar import PendingScalar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase
    from matplotlib.lines import Line2D

REDRAW_INTERVAL = 0.5
"""Seconds between two drawings."""
MAX_POINTS = 1000
"""Points of a line; when it has twice as many, every second one is removed."""

_STYLES: dict[str, dict[str, Any]] = {
    "train": {"color": "C0", "linewidth": 1},
    "valid": {"color": "C1", "linestyle": "--", "marker": "s", "markersize": 5},
}


class LossCurveCB(Callback):
    """Draws the training loss of every batch, and the validation loss of every epoch.

    It observes: in a notebook the figure is updated in place, about twice per second, on the
    host's event loop, and once more when the fit has ended, however it ended. Elsewhere it is not
    displayed, but `figure` can be saved. For a long fit it shows every 2nd, 4th, ... batch, and
    always the first and the last.

    An instance shows one fit at a time. Fits that do not train, and `lr_find`, are ignored.

    Args:
        ax: the axes to draw on; by default those of a new figure for every fit. Displaying your
            own axes, also in a notebook, is up to you.

    Attributes:
        train: (batch, loss) pairs; batches are counted from 1, over all epochs of the fit.
        valid: the same for the validation losses, at the last training batch before each. They
            are averaged over samples, as in MetricsCB.
        figure: the figure of the axes; None before the first batch.

    Raises:
        ImportError: matplotlib is not installed.

    Example:
        >>> import io, torch
        >>> from eventrain.callbacks import LossCurveCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.eye(3), torch.zeros(3, 1))] * 4
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
        >>> curve = LossCurveCB()
        >>> result = learner.run(2, cbs=curve)
        >>> [batch for batch, loss in curve.train], [batch for batch, loss in curve.valid]
        ([1, 2, 3, 4, 5, 6, 7, 8], [4, 8])
        >>> curve.figure.savefig(io.BytesIO())

    Source: fastai's `ShowGraphCallback`.
    """

    observes = (BeforeFit, AfterBatch, CleanupEpoch, CleanupFit)

    def __init__(self, ax: Axes | None = None) -> None:
        check_installed("LossCurveCB", "matplotlib", "plot")
        self._canvas = _Canvas(ax)
        self._fit = _FitCurve(self._canvas)  # the one that is shown

    @property
    def train(self) -> list[tuple[int, float]]:
        return self._fit.train.points

    @property
    def valid(self) -> list[tuple[int, float]]:
        return self._fit.valid.points

    @property
    def figure(self) -> FigureBase | None:
        return None if self._canvas.drawing is None else self._canvas.drawing.figure

    def watcher(self, event: Event) -> Watcher:
        """The object that collects and draws the losses of one fit."""
        # Imported here, in the training thread: later, it would hold up the event loop.
        import_large("matplotlib.figure")
        from ...engine.run import notebook_figure  # noqa: F401

        fit = _FitCurve(self._canvas)
        if isinstance(event, BeforeFit) and event.purpose == "fit" and event.learner.trains:
            self._fit.shown, fit.shown = False, True
            self._fit = fit
        return fit


class _FitCurve:
    """The losses of one fit. `wants` collects them in the training thread, which waits for the
    device only at the end of the fit; `observe` draws them on the host's event loop.

    Attributes:
        shown: whether it is the fit that is shown: one that trains and was observed from its
            start, until the next one begins.
    """

    def __init__(self, canvas: _Canvas) -> None:
        self.shown = False
        self.train = _Line()
        self.valid = _Line()
        self._canvas = canvas
        self._drawing: _Drawing | None = None
        self._due = 0.0
        self._batch = 0
        self._validation = MeanLoss()

    def wants(self, event: Event) -> bool:
        """Collect the losses; draw if it is time to, and no drawing is pending."""
        if not self.shown:
            return False
        match event:
            case BeforeFit():
                return False
            case AfterBatch():
                self._add(event)
            case CleanupEpoch():
                self._end_epoch(event)
            case CleanupFit():
                self.train.end()
                self.valid.end()
                return True
        if monotonic() < self._due:
            return False
        self._due = math.inf
        return True

    def observe(self, event: Event) -> None:
        """Draw."""
        if not self.shown:
            return
        if self._drawing is None:
            self._drawing = self._canvas.begin({"train": self.train, "valid": self.valid})
        self._drawing.draw()
        self._due = monotonic() + REDRAW_INTERVAL

    def _add(self, event: AfterBatch) -> None:
        self._batch += event.training
        loss = event.loss
        if loss is None or loss.numel() != 1:
            return
        if event.training:
            self.train.add(self._batch, loss)
        else:
            self._validation.add(event)

    def _end_epoch(self, event: CleanupEpoch) -> None:
        loss = self._validation.mean()
        if loss is not None and event.all_read:
            self.valid.add(self._batch, loss)
        self._validation = MeanLoss()


class _Line:
    """A bounded number of points: every value or, if there are too many, every 2nd, 4th, ..."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self._pending: deque[tuple[int, PendingScalar]] = deque()
        self._left_out: tuple[int, torch.Tensor] | None = None
        self._count = 0
        self._every = 1

    def add(self, batch: int, value: torch.Tensor) -> None:
        if self._count % self._every == 0:
            self._pending.append((batch, PendingScalar(value)))
            self._left_out = None
        else:
            self._left_out = batch, value
        self._count += 1
        self._read()

    def end(self) -> None:
        """Add the last value in any case. The host waits for the device here."""
        if self._left_out is not None:
            batch, value = self._left_out
            self._pending.append((batch, PendingScalar(value)))
        self._read(wait=True)

    def _read(self, wait: bool = False) -> None:
        while self._pending:
            batch, number = self._pending[0]
            value = number.get(wait)
            if value is None:
                break
            self._pending.popleft()
            if len(self.points) == 2 * MAX_POINTS:
                del self.points[1::2]
                self._every *= 2
            self.points.append((batch, value))


class _Canvas:
    """The axes on which the fits are drawn, one after the other."""

    def __init__(self, ax: Axes | None) -> None:
        self._given = ax
        self.drawing: _Drawing | None = None

    def begin(self, lines: dict[str, _Line]) -> _Drawing:
        """Start the drawing of a fit, in place of the one before if the axes are given."""
        if self._given is not None and self.drawing is not None:
            self.drawing.remove()
        self.drawing = _Drawing(lines, self._given)
        return self.drawing


class _Drawing:
    """The lines of one fit on its axes."""

    def __init__(self, lines: dict[str, _Line], ax: Axes | None) -> None:
        from matplotlib.ticker import MaxNLocator

        from ...engine.run.notebook_figure import NotebookFigure

        self._losses = lines
        self._cell = CellOutput() if ax is None and in_notebook() else None
        self._ax = NotebookFigure().panels[0] if ax is None else ax
        self._ax.set(xlabel="batch", ylabel="loss")
        self._ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        self._lines: dict[str, Line2D] = {}

    @property
    def figure(self) -> FigureBase:
        return self._ax.figure

    def draw(self) -> None:
        for name, style in _STYLES.items():
            # A copy: the training thread adds to them.
            points = tuple(self._losses[name].points)
            if points and name not in self._lines:
                (self._lines[name],) = self._ax.plot([], [], label=name, **style)
                self._ax.legend()
            if points:
                self._lines[name].set_data(*zip(*points, strict=True))
        self._ax.relim()
        self._ax.autoscale_view()
        if self._cell is not None:
            self._cell.show(self.figure)

    def remove(self) -> None:
        """Remove the lines from axes that are used again."""
        for line in self._lines.values():
            line.remove()

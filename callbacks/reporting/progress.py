"""A live display of the run in the terminal or a notebook, drawn while the training runs."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from copy import copy
from time import monotonic
from typing import TYPE_CHECKING, Any, Self

from ...events import (
    AfterBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CleanupEpoch,
    CleanupFit,
    Event,
    Watcher,
)
from .._checks import is_number, optional_import
from ._notebook_cell import CellOutput
from ._pending_scalar import PendingScalar
from .jsonable import escape_control

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

BATCH_INTERVAL = 0.1
"""Seconds between two batches that are drawn."""
EPOCH_INTERVAL = 0.02
"""Seconds between two new epochs that are drawn: epochs may be short."""


class ProgressCB(Callback):
    """Shows epochs and batches, loss, speed and remaining time; at the end a table of metrics.

    It observes: it draws on the host's event loop, about ten times per second, and never holds up
    the training. Nothing is printed if the output is neither a terminal nor a notebook. While it
    draws on standard output, other output appears above it. In a notebook it is one output of the
    cell, updated in place and finally replaced by the table.

    In runs of `validate`, `get_preds` and `lr_find` it shows the bars alone.

    The table has a row for every epoch, counted from 1, with the numbers that callbacks such as
    MetricsCB put into `learner.record`; the line below it says how the fit ended, who ended it and
    why. An instance shows one fit at a time.

    Args:
        console: the `rich.console.Console` to draw on; by default, and for output in a notebook,
            rich's global console.

    Raises:
        ImportError: rich is not installed.

    Example:
        >>> import torch
        >>> from rich.console import Console
        >>> from eventrain.callbacks import ProgressCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> from eventrain.events import AfterEpoch
        >>> batches = [(torch.eye(3), torch.zeros(3, 1))] * 4
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
        >>> @learner.on(AfterEpoch)
        ... def accuracy(event):
        ...     learner.record["accuracy"] = 0.5 + 0.1 * event.epoch
        >>> console = Console(
        ...     force_terminal=True, force_interactive=False, color_system=None, width=60
        ... )
        >>> result = learner.run(2, cbs=ProgressCB(console))
        epoch   train accuracy   valid accuracy
        ───────────────────────────────────────
            1              0.5              0.5
            2              0.6              0.6
        completed 2 epochs

    Source: fastai's `ProgressCB`; the display is rich's.
    """

    observes = (BeforeFit, BeforeEpoch, AfterBatch, CleanupEpoch, CleanupFit)
    buffer = 100_000  # beginnings and ends must not be lost, however long the host is busy

    def __init__(self, console: Console | None = None) -> None:
        with optional_import("ProgressCB", "rich", "progress"):
            from rich import get_console
        self.console = console or get_console()
        self._fit: _FitWatcher | None = None  # the one whose display was made last

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """One that draws on the same console."""
        copied = copy(self)
        copied._fit = None
        return copied

    def watcher(self, event: Event) -> Watcher:
        """The object that shows one fit."""
        # Imported here, in the training thread: later imports would hold up the event loop.
        from rich import box, live, progress_bar, table, text  # noqa: F401
        from rich.emoji import Emoji

        from . import _redirect  # noqa: F401

        Emoji.replace("")  # which imports its table
        return _FitWatcher(self, event)

    def close(self) -> None:
        """Remove the display from the terminal, and restore cursor and standard output.

        This happens by itself when the fit ends, when the observer fails or is detached, and when
        this object is collected. Closing again is harmless.
        """
        fit, self._fit = self._fit, None  # which refer to each other
        if fit is not None:
            fit.take_down()

    def shows(self, fit: _FitWatcher) -> bool:
        """Whether this is the fit that is shown."""
        return self._fit is fit

    def show(self, fit: _FitWatcher) -> None:
        """Show this fit from now on, in place of the one before."""
        self.close()  # that of a fit whose end was not observed
        self._fit = fit


class _FitWatcher:
    """Shows one fit. `wants` chooses the batches in the training thread; `observe` draws."""

    def __init__(self, callback: ProgressCB, event: Event) -> None:
        console = callback.console
        self._callback = callback
        self._shown = isinstance(event, BeforeFit) and (console.is_terminal or console.is_jupyter)
        self._due = 0.0
        self._loss: PendingScalar | None = None
        self._display: _Display | None = None
        self._take_down: Callable[[], object] | None = None

    def wants(self, event: Event) -> bool:
        """All events but most of the batches; none where there is no terminal."""
        if isinstance(event, AfterBatch) and self._shown:
            now = monotonic()
            if now < self._due:
                return False
            self._due = now + BATCH_INTERVAL
            loss = event.loss
            self._loss = None if loss is None or loss.numel() != 1 else PendingScalar(loss)
        return self._shown

    def observe(self, event: Event) -> None:
        try:
            if isinstance(event, BeforeFit):
                self._begin(event)
            elif self._display is not None:
                self._show(event, self._display)
        except BaseException:
            with suppress(Exception):  # the first error is the one to raise
                self._callback.close()
            raise

    async def close(self) -> None:
        if self._callback.shows(self):
            self._callback.close()

    def take_down(self) -> None:
        self._display = None
        if self._take_down is not None:
            self._take_down()

    def _begin(self, event: BeforeFit) -> None:
        self._callback.show(self)
        display = self._display = _Display(self._callback.console, event)
        # The display has no reference to this object: it is also taken down when that is collected.
        self._take_down = weakref.finalize(self, display.stop)
        display.start()

    def _show(self, event: Event, display: _Display) -> None:
        match event:
            case BeforeEpoch():
                display.begin_epoch(event)
            case AfterBatch():
                display.show_batch(event, None if self._loss is None else self._loss.get())
            case CleanupEpoch():
                display.end_epoch(event)
            case CleanupFit():
                self._callback.close()
                if event.purpose == "fit":
                    display.report(event)  # where the bars were


class _Display:
    """The lines and the table of one fit. It keeps no event, which would keep the learner alive and
    so the watcher, at whose end the display is removed."""

    def __init__(self, console: Console, event: BeforeFit) -> None:
        from rich.live import Live

        from ._redirect import Redirection

        self._console = console
        self._n_epochs, self._n_steps = event.n_epochs, event.n_steps
        self._steps = 0
        self._first_step: tuple[int, float] | None = None  # of those that count towards the pace
        self._first: tuple[int, float] | None = None  # an epoch and when it began
        self._epoch = -1
        self._phase = ""
        self._began = self._now = event.time
        self._ends: float | None = None
        self._done = 0
        self._n_iter: int | None = None
        self._loss: float | None = None
        self._speed = ""
        self._drawn = 0.0
        self._rows: dict[int, dict[str, float]] = {}
        self._live = Live(
            console=console,
            get_renderable=self._render,
            auto_refresh=False,  # without a thread: it is drawn when events arrive
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._redirection = Redirection(console)
        # For a notebook, in which rich's Live needs widgets, and printing makes other outputs.
        self._cell = CellOutput() if console.is_jupyter else None

    def start(self) -> None:
        if self._console.is_interactive:
            if self._console.file in (sys.stdout, sys.stderr):
                self._redirection.start()
            self._live.start()

    def stop(self) -> None:
        try:
            self._live.stop()
        finally:
            self._redirection.stop()
        if self._cell is not None:
            self._cell.clear()

    def begin_epoch(self, event: BeforeEpoch) -> None:
        epoch, began = self._first = self._first or (event.epoch, event.time)
        if self._n_epochs is not None and event.epoch != self._epoch and event.epoch > epoch:
            pace = (event.time - began) / (event.epoch - epoch)
            self._ends = event.time + pace * (self._n_epochs - event.epoch)
        self._epoch = event.epoch
        self._phase = event.phase
        self._began = self._now = event.time
        self._done = 0
        self._n_iter = event.n_iter
        self._loss = None
        self._speed = ""
        if monotonic() - self._drawn > EPOCH_INTERVAL:
            self._draw()

    def show_batch(self, event: AfterBatch, loss: float | None) -> None:
        self._now = event.time
        self._done = event.iter + 1
        self._n_iter = event.n_iter  # None, once there are more batches than the loader told
        self._count_steps(event)
        self._loss = self._loss if loss is None else loss
        seconds = event.time - self._began
        if event.n_samples and seconds > 0:
            self._speed = f"{event.n_samples / seconds:,.0f} samples/s"
        self._draw()

    def _count_steps(self, event: AfterBatch) -> None:
        """Where steps are the clock, tell by their pace when the fit ends."""
        self._steps = event.steps
        if self._n_epochs is None and self._n_steps is not None:
            steps, began = self._first_step = self._first_step or (event.steps, event.time)
            if event.steps > steps:
                pace = (event.time - began) / (event.steps - steps)
                self._ends = event.time + pace * (self._n_steps - event.steps)

    def end_epoch(self, event: CleanupEpoch) -> None:
        if not event.all_read:
            return  # what was measured in a part of it is not its result
        for name, value in event.metrics.items():
            if is_number(value):
                row = self._rows.setdefault(event.epoch, {})
                row[f"{event.phase} {name}"] = float(value)

    def report(self, event: CleanupFit) -> None:
        from rich.text import Text

        color = {"completed": "green", "cancelled": "yellow", "failed": "red"}[event.end.status]
        table = [self._table()] if self._rows else []
        self._print(*table, Text(_ending(event), style=color))

    def _draw(self) -> None:
        self._drawn = monotonic()
        if self._cell is not None:
            self._print(self._render())
        elif self._live.is_started:
            self._live.refresh()

    def _print(self, *what: Table | Text) -> None:
        if self._cell is None:
            self._console.print(*what)
            return
        from rich.table import Table

        rows = Table.grid()
        for row in what:
            rows.add_row(row)
        self._cell.show(rows)

    def _render(self) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 1))
        for _ in range(3):
            grid.add_column(no_wrap=True)
        if self._first is not None:
            done, total = self._epoch, self._n_epochs
            title = f"epoch {self._epoch + 1}/{total}"
            if total is None:
                done, total = self._steps, self._n_steps
                title = f"epoch {self._epoch + 1}, step {done}/{total}"
            grid.add_row(
                Text(title),
                ProgressBar(total=total, completed=done, width=20),
                Text("" if self._ends is None else f"{_clock(self._ends - self._now)} left"),
            )
            grid.add_row(
                Text(f"{self._phase} {self._done}/{self._n_iter or '?'}"),
                ProgressBar(total=self._n_iter, completed=self._done, width=20),
                Text("  ".join(self._numbers())),
            )
        return grid

    def _numbers(self) -> Iterator[str]:
        if self._loss is not None:
            yield f"loss {_number(self._loss)}"
        if self._speed:
            yield self._speed
        if self._n_iter and self._done:
            pace = (self._now - self._began) / self._done
            yield f"{_clock(pace * (self._n_iter - self._done))} left"

    def _table(self) -> Table:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        names = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for header in ("epoch", *names):
            table.add_column(Text(escape_control(header)), justify="right")
        for epoch, row in self._rows.items():
            table.add_row(
                str(epoch + 1), *(_number(row[name]) if name in row else "" for name in names)
            )
        return table


def _number(value: float) -> str:
    return f"{value:.5g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _ending(event: CleanupFit) -> str:
    end = event.end
    if end.status == "completed":
        n, unit = event.n_epochs, "epoch"
        if n is None:
            n, unit = event.n_steps, "step"
        return f"completed {n} {unit}{'s' if n != 1 else ''}"
    who = f" by {end.who}" if end.who else ""
    why = f": {end.reason}" if end.reason else ""
    return escape_control(f"{end.status}{who}{why}")

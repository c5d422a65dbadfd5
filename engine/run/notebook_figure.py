"""Figures that a notebook displays without pyplot and its global state.

This module needs matplotlib, so import it only where a figure is drawn.
"""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure of `n` panels, two per row. A notebook displays it as the result of a cell."""

    def __init__(self, n: int = 1) -> None:
        columns = min(n, 2)
        rows = -(-n // columns)
        size = (4.8 * columns, 3.2 * rows) if n > 1 else (6.4, 3.6)
        super().__init__(figsize=size, layout="constrained")
        self.panels: list[Axes] = [
            self.add_subplot(rows, columns, i + 1, axes_class=Panel) for i in range(n)
        ]

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


class Panel(Axes):
    """The axes of a `NotebookFigure`. A notebook displays the whole figure as their output."""

    def _repr_png_(self) -> bytes:
        figure = self.figure
        assert isinstance(figure, NotebookFigure)
        return figure._repr_png_()

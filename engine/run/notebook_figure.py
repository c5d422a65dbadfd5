"""Figures that a notebook shows and pyplot, with its global state, knows nothing of.

Importing this needs matplotlib: do it where a figure is drawn.
"""

from __future__ import annotations

import io

from matplotlib.axes import Axes
from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure of `n` panels, two in a row; in a notebook it is shown where it is the result."""

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
    """The axes of a `NotebookFigure`: where they are the result, a notebook shows all of it."""

    def _repr_png_(self) -> bytes:
        figure = self.figure
        assert isinstance(figure, NotebookFigure)
        return figure._repr_png_()

"""What a benchmark measured, as a markdown table and as JSON."""

from __future__ import annotations

import os
import platform
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Cell = str | float | int | None


@dataclass
class Table:
    """One table. Numbers in it are as measured; markdown shows three digits of them.

    Attributes:
        title: what was measured, in which unit, how often.
        columns: their names; the first names the rows.
        rows: a cell for every column; None where there is nothing to say.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table, with its title above it."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        body = "\n".join("| " + " | ".join(map(_shown, line)) + " |" for line in lines)
        return f"{self.title}\n\n{body}\n"


@dataclass
class Report:
    """The outcome of one benchmark.

    Attributes:
        name: which one.
        tables: what it measured.
        notes: what else there is to say, such as the peers that are not installed.
    """

    name: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """All of it, for people."""
        machine = ", ".join(f"{key} {value}" for key, value in machine_of_now().items())
        return "\n".join(
            [f"# {self.name}\n", *(t.markdown() for t in self.tables), *self.notes, machine]
        )

    def json(self) -> dict[str, Any]:
        """All of it, for programs; each row a dict by column."""
        tables = [
            {"title": t.title, "rows": [dict(zip(t.columns, row, strict=True)) for row in t.rows]}
            for t in self.tables
        ]
        return {
            "benchmark": self.name,
            "machine": machine_of_now(),
            "tables": tables,
            "notes": self.notes,
        }


def machine_of_now() -> dict[str, str]:
    """Where this runs."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": str(os.cpu_count()),
        "device": device,
    }


def interleaved(
    contenders: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """What each contender returned each time: they take turns, so that all meet the same noise.

    Each time in another order, lest one always follow the one that leaves the caches worst.
    """
    measured: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    chance = random.Random(0)
    for _ in range(repeats):
        chance.shuffle(order)
        for name in order:
            measured[name].append(contenders[name]())
    return measured


def over(measured: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """How much more than `base`: by minima, as the median of the pairs, and that as a ratio."""
    pairs = list(zip(measured, base, strict=True))
    return (
        min(measured) - min(base),
        statistics.median(a - b for a, b in pairs),
        statistics.median(a / b for a, b in pairs),
    )


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    return cell if isinstance(cell, str) else f"{cell:,.3g}" if abs(cell) < 100 else f"{cell:,.0f}"

"""The results of a benchmark, as markdown tables and as JSON."""

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
    """One table. Its numbers are as measured; the markdown shows three digits.

    Attributes:
        title: the measurement, its unit, and how often it was repeated.
        columns: their names; the first column has the names of the rows.
        rows: a cell for every column; None for an empty one.
    """

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the table with its title above it."""
        lines = [self.columns, ("---",) * len(self.columns), *self.rows]
        body = "\n".join("| " + " | ".join(map(_shown, line)) + " |" for line in lines)
        return f"{self.title}\n\n{body}\n"


@dataclass
class Report:
    """The outcome of one benchmark.

    Attributes:
        name: the name of the benchmark.
        tables: the measurements.
        notes: further information, such as the peers that are not installed.
    """

    name: str
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """Return the whole report for people."""
        machine = ", ".join(f"{key} {value}" for key, value in describe_machine().items())
        return "\n".join(
            [f"# {self.name}\n", *(t.markdown() for t in self.tables), *self.notes, machine]
        )

    def json(self) -> dict[str, Any]:
        """Return the whole report for programs; each row is a dict by column."""
        tables = [
            {"title": t.title, "rows": [dict(zip(t.columns, row, strict=True)) for row in t.rows]}
            for t in self.tables
        ]
        return {
            "benchmark": self.name,
            "machine": describe_machine(),
            "tables": tables,
            "notes": self.notes,
        }


def describe_machine() -> dict[str, str]:
    """Return the versions and the hardware of this machine."""
    device = "no GPU"
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        module = torch.get_device_module(accelerator)  # the one of MPS has no names
        device = getattr(module, "get_device_name", lambda: accelerator.type)()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cores": str(os.cpu_count()),
        "device": device,
    }


def interleaved(
    contenders: Mapping[str, Callable[[], float]], repeats: int
) -> dict[str, list[float]]:
    """Return what each contender returned each time.

    They take turns, so that noise affects all of them alike, and in a different order each time,
    so that none always runs after the one that leaves the caches in the worst state.
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
    """Compare with `base`: the minima, and the medians of paired differences and ratios."""
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

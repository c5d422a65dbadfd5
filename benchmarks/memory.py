"""Whether the engine keeps more in memory than a loop by hand: its peak, and its growth.

Each contender trains in a process of its own. A batch, its predictions and its graph are large, so
that anything kept for too long is visible.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import growth_of, memory_of
from .memory_of import CONTENDERS, PLAIN, sizes
from .report import Report, Table, interleaved, over

ROOT = Path(__file__).parents[1]
FILL = 0.8
"""Fraction of the device's memory."""
FILLING = (PLAIN, "eventrain", "eventrain, MetricsCB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    default = "cpu" if accelerator is None else accelerator.type
    parser.add_argument("--device", default=default, help=f"default: {default}")
    parser.add_argument("--rows", type=int, default=32, metavar="N", help="samples per batch")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="for the peaks")
    parser.add_argument("--batches", type=int, default=100_000, metavar="N", help="for the growth")
    parser.add_argument("--only", nargs="+", default=[""], metavar="NAME", help="parts of names")


def run(args: argparse.Namespace) -> Report:
    """Measure the peaks, the growth, and what fits on a device."""
    if not Path("/proc/self/clear_refs").exists():
        raise SystemExit("memory is read from /proc, which only Linux has")
    if args.batches % 10:
        raise SystemExit(f"--batches {args.batches}: give a multiple of 10")
    report = Report("memory")
    _peaks(args, report)
    _growth(args.batches, report)
    _filled(args, report)
    return report


def _peaks(args: argparse.Namespace, report: Report) -> None:
    chosen = [name for name in CONTENDERS if any(part in name for part in args.only)]
    chosen = [
        name for name in CONTENDERS if name in {*chosen, *(CONTENDERS[n].base for n in chosen)}
    ]
    weights: dict[str, str] = {}
    turns = {name: partial(_peak, name, args.rows, args.device, weights) for name in chosen}
    peaks = interleaved(turns, args.repeats)
    about = f"Peak on {args.device}, MB: 3 batches of {args.rows}, {args.repeats} repeats in turn"
    columns = ("contender", "least peak", "over", "by minima", "paired median", "median ratio")
    table = Table(about, columns)
    for name, measured in peaks.items():
        base = CONTENDERS[name].base
        table.rows.append((name, min(measured), base, *over(measured, peaks[base])))
    report.tables.append(table)
    mb = ", ".join(f"{what} {size:.0f}" for what, size in sizes(args.rows).items())
    report.notes.append(f"Sizes in MB of objects that could be kept: {mb}.")


def _peak(name: str, rows: int, device: str, weights: dict[str, str]) -> float:
    """Return MB; the weights must be those of the loop that it is compared with."""
    most, digest = _alone(memory_of, name, rows, 3, device)
    base = CONTENDERS[name].base
    assert weights.setdefault(base, digest) == digest, f"{name} ends with other weights"
    return float(most)


def _growth(batches: int, report: Report) -> None:
    columns = ("of a process", "contender", "after a tenth", "at the end", "growth")
    table = Table(f"Growth over {batches} batches of the smallest model", columns)
    found = {name: _alone(growth_of, name, batches) for name in growth_of.CONTENDERS}
    first, *others = (each["weights"] for each in found.values())
    assert all(weights == first for weights in others), "they end with other weights"
    for i, what in enumerate(("resident MB", "allocated blocks", "objects with references")):
        for name, each in found.items():
            then, now = each["first"][i], each["last"][i]
            table.rows.append((what, name, then, now, now - then))
    report.tables.append(table)


def _filled(args: argparse.Namespace, report: Report) -> None:
    """A model whose loop by hand fills most of a GPU must fit there with the engine, too."""
    if args.device == "cpu":
        report.notes.append("Left out: a model that fills most of a GPU, as --device is cpu.")
        return
    whole = torch.accelerator.get_memory_info(args.device)[1] / memory_of.MB
    weights: dict[str, str] = {}
    small, large = (_peak(PLAIN, rows, args.device, {}) for rows in (args.rows, 2 * args.rows))
    rows = args.rows + int((FILL * whole - small) / (large - small) * args.rows)
    columns = ("contender", "of the GPU, %", "over the loop by hand, MB")
    table = Table(f"A model that fills most of the GPU: batches of {rows}", columns)
    peaks = {name: _peak(name, rows, args.device, weights) for name in FILLING}
    for name, most in peaks.items():
        table.rows.append((name, 100 * most / whole, most - peaks[PLAIN]))
    report.tables.append(table)


def _alone(module: Any, *arguments: object) -> Any:
    """Run a module in a process of its own, and return what it prints as JSON."""
    process = subprocess.run(
        [sys.executable, "-m", module.__name__, *map(str, arguments)],
        cwd=ROOT,
        # With a fixed threshold the C library returns every large block when it is freed.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(process.stdout.splitlines()[-1])

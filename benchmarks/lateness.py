"""How late a tick of 5 ms on the host's event loop is, at worst, while the engine works.

The first fit of a process comes first: it imports hundreds of modules, with the first optimizer.
What is left is the GIL, held by one call into torch or by the loading of an extension module, and
whatever else the machine does: compare with the row "nothing".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from .host import BACKENDS, milliseconds
from .report import Report, Table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("--backend", choices=list(BACKENDS), default="asyncio")
    parser.add_argument("--megabytes", type=int, default=100, metavar="N", help="the large model")
    parser.add_argument("--batches", type=int, default=1000, metavar="N", help="of the small model")


def run(args: argparse.Namespace) -> Report:
    """Measure each work once, in turn, in a process of its own."""
    about = f"{args.backend}, a model of {args.megabytes} MB, {args.batches} small batches"
    columns = ("a tick of 5 ms is late by, ms", "p99", "max", "times over 20 ms", "ticks")
    table = Table(f"Lateness: {about}", columns)
    arguments = map(str, (args.backend, args.megabytes, args.batches))
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.lateness_of", *arguments],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        check=True,
    )
    late: dict[str, list[float]] = json.loads(process.stdout.splitlines()[-1])
    for name, values in late.items():
        over = sum(value > 0.02 for value in values)
        table.rows.append((name, *milliseconds(values, 0.99, 1), over, len(values)))
    return Report("lateness", [table])

"""Run a benchmark: python -m benchmarks NAME [--json FILE].

Prints markdown tables. Figures are ratios or differences of contenders that took turns in one run,
because absolute times mean little on a shared machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from . import data, endtoend, lateness, memory, monitor, overhead

BENCHMARKS = {
    "overhead": overhead,
    "data": data,
    "endtoend": endtoend,
    "monitor": monitor,
    "lateness": lateness,
    "memory": memory,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chosen benchmark, and print its report."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    which = parser.add_subparsers(dest="name", required=True, metavar="NAME")
    for name, module in BENCHMARKS.items():
        about = (module.__doc__ or "").partition("\n")[0]
        sub = which.add_parser(name, help=about, description=module.__doc__)
        sub.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
        module.add_arguments(sub)
    args = parser.parse_args(argv)
    report = BENCHMARKS[args.name].run(args)
    print(report.markdown())
    if args.json:
        args.json.write_text(json.dumps(report.json(), indent=2) + "\n")


if __name__ == "__main__":
    main()

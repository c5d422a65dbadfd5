"""Programs that end as they should, in a process of their own."""

from __future__ import annotations

import subprocess
import sys
import textwrap

from tests.support.waiting import GUARD


def assert_prints_end_alone(script: str) -> None:
    """Run a program that prints "end": nothing else is printed, and it succeeds."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=3 * GUARD,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")

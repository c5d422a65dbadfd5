"""Trainings that are killed, and go on: the short form of `python -m tests.faults.kill`."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_training_that_is_killed_repeatedly_equals_an_uninterrupted_one() -> None:
    command = [sys.executable, "-m", "tests.faults.kill", "--kills", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    told = [line for line in done.stdout.splitlines() if "as undisturbed" in line]
    assert len(told) == 2
    for line in told:
        assert " 6 kills" in line
        assert int(re.findall(r"(\d+) checkpoints read", line)[0]) > 0

"""Twenty fits at once, as their example runs them: one stopped, one failing, nobody disturbed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_one_of_twenty_fits_is_stopped_and_one_fails_and_the_others_are_as_alone(
    backend: str,
) -> None:
    command = [sys.executable, "-m", "examples.many_fits", "--backend", backend]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr

    threads, _, _, *lines = done.stdout.splitlines()
    before, after = re.findall(r"\d+", threads)
    assert before == after
    rows = [re.split(r"  +", line.strip(), maxsplit=5) for line in lines]
    assert [int(row[0]) for row in rows] == list(range(20))
    stopped, failing = rows.pop(6), rows.pop(12)
    assert [(row[1], row[2], row[4]) for row in rows] == [("completed", "3", "yes")] * 18
    assert len({row[3] for row in rows}) == 18  # as alone, and not as each other
    assert stopped[1] == "cancelled"
    assert 3 <= int(stopped[2]) < 100_000
    assert stopped[4:] == ["-", "Learner.stop: seen enough"]
    assert failing[1:3] == ["failed", "1"]
    assert failing[4:] == ["yes", "spoil: ValueError: a spoilt batch"]

    assert done.stderr.count("concurrent_fits_share_rng") == 1
    assert done.stderr.count("fit_failed") == 2  # together, and alone

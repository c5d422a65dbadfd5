"""Many runs and clients at once: the same weights as alone, and nothing left behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_many_runs_and_clients_leave_weights_as_alone_and_nothing_behind() -> None:
    """Half of the clients never read; the others get all. `benchmarks.service` measures more."""
    command = [sys.executable, "-m", "benchmarks.service"]
    sizes = ["--runs", "4", "--clients", "8", "--epochs", "6", "--rounds", "2"]
    done = subprocess.run([*command, *sizes], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["different_runs"] == 4
    first, second = figures["together"]
    for each in (first, second):
        assert each["weights_as_alone"] == each["fast_clients_that_got_all"] == 4
        assert each["slow_clients_held_up_to_the_end"] == 4
        assert each["bytes_of_one_stream"] > 150_000
        assert each["clients_left"] == 0
        assert each["ticks"] > 0
    for name in ("threads", "tasks", "file_descriptors"):
        assert second[name] <= first[name], name

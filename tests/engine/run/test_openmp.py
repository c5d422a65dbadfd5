"""The host's idle OpenMP threads end before a fit, and come back when they are needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from eventrain.engine.run.openmp import _omp_pause, end_idle_threads

SCRIPT = """
import os
import time
import torch
from eventrain.engine import DataLoaders, TrainLearner

def work():
    return torch.ones(1_000_000).exp().sum().item()

def n_threads():
    return len(os.listdir("/proc/self/task"))

def has_threads(n):
    deadline = time.monotonic() + 60  # a thread that was joined is listed for a moment
    while n_threads() != n and time.monotonic() < deadline:
        time.sleep(0.01)
    return n_threads() == n

batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 2
learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
torch.set_num_threads(2)
learner.run(1, valid=False)
time.sleep(0.2)
before = n_threads()
first = work()
assert has_threads(before + 1), "the work made no OpenMP thread"
learner.run(1, valid=False)
assert has_threads(before), "it lived on"
assert torch.get_num_threads() == 2
assert work() == first
assert has_threads(before + 1), "it did not come back"
"""


@pytest.mark.skipif(_omp_pause() is None, reason="torch does not come with libgomp here")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_idle_threads_end_and_come_back() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_the_result_of_parallel_work_is_the_same_afterwards() -> None:
    """G11: the number of threads, and so the order of sums, does not change."""
    x = torch.randn(500_000, generator=torch.Generator().manual_seed(0))
    before = x.exp().sum()
    end_idle_threads()
    assert torch.get_num_threads() == 2
    assert torch.equal(x.exp().sum(), before)

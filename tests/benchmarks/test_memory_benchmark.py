"""The memory benchmark: its rows are there, all train the same weights, and none keeps a batch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from benchmarks import memory
from benchmarks.growth_of import CONTENDERS as LONG
from benchmarks.memory_of import CONTENDERS, PLAIN, peak, sizes
from benchmarks.report import Report

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="memory is read in Linux's /proc"
)
ROWS = 8


def measure(*options: str) -> Report:
    parser = argparse.ArgumentParser()
    memory.add_arguments(parser)
    return memory.run(parser.parse_args(["--device", "cpu", "--repeats", "1", *options]))


@pytest.mark.parametrize("name", CONTENDERS)
def test_every_contender_ends_with_the_weights_of_its_loop_by_hand(name: str) -> None:
    assert peak(name, 1, 3, "cpu")[1] == peak(CONTENDERS[name].base, 1, 3, "cpu")[1]


def test_contenders_that_do_not_train_keep_their_weights() -> None:
    validating = peak("eventrain, validating", 1, 3, "cpu")[1]
    assert validating != peak(PLAIN, 1, 3, "cpu")[1]
    assert validating == peak("eventrain, validating", 1, 1, "cpu")[1]


def test_no_batch_is_kept_longer_than_by_hand() -> None:
    """G12: not even one that the loader gave and a callback has replaced."""
    report = measure("--rows", str(ROWS), "--batches", "20", "--only", "converting")
    peaks, long = report.tables
    names, most, bases, over, _, _ = zip(*peaks.rows, strict=True)
    assert names == ("by hand, converting batches", "eventrain, converting batches")
    assert bases == names[:1] * 2
    assert float(most[0]) > sizes(ROWS)["a batch"]
    assert float(over[1]) < sizes(ROWS)["a batch of half precision"] / 2
    assert [row[1] for row in long.rows] == [*LONG] * 3
    assert all(float(now) - float(then) == grown for _, _, then, now, grown in long.rows)
    assert json.dumps(report.json())
    assert "most of a GPU" in report.notes[-1]


def test_a_number_of_batches_without_a_tenth_is_refused() -> None:
    with pytest.raises(SystemExit, match="--batches 15"):
        measure("--batches", "15")

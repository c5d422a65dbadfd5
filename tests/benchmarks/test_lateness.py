"""The lateness benchmark: its rows are there, and each has ticks."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import lateness


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_every_row_has_ticks_that_were_late_by_some_time(backend: str) -> None:
    parser = argparse.ArgumentParser()
    lateness.add_arguments(parser)
    options = ["--backend", backend, "--megabytes", "1", "--batches", "20"]
    (table,) = lateness.run(parser.parse_args(options)).tables
    names = [row[0] for row in table.rows]
    assert names[:3] == ["nothing", "the first fit of the process", "the second fit"]
    assert len(names) == len(set(names)) == 12
    for _, p99, longest, over, ticks in table.rows:
        assert longest >= p99 > 0
        assert ticks > over >= 0

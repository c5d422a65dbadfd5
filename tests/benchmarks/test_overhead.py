"""The overhead benchmark: its rows are there, and all that it times train the same weights."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from benchmarks import overhead
from benchmarks.by_hand import Outcome, Task
from benchmarks.report import Report

MODULES = {
    "pytorch-ignite": "ignite",
    "fastai": "fastai",
    "Lightning Trainer": "lightning",
    "Lightning Fabric": "lightning",
    "accelerate": "accelerate",
}
MINE = ["by hand", "eventrain"]


def measure(*options: str) -> Report:
    parser = argparse.ArgumentParser()
    overhead.add_arguments(parser)
    return overhead.run(parser.parse_args([*options, "--repeats", "2"]))


def names(report: Report) -> list[list[object]]:
    return [[row[0] for row in table.rows] for table in report.tables]


def test_every_row_of_the_engine_is_there() -> None:
    report = measure("--batches", "2", "--only", *MINE)
    engine, metrics, others = names(report)
    assert engine == [*overhead.ENGINE, "one receiver, beyond its own body"]
    assert metrics == list(overhead.METRICS)
    assert others == ["eventrain", "eventrain, MetricsCB(metric)"]
    for table in report.tables:
        assert "linear on cpu, 2 repeats in turn of 2 batches" in table.title
    for row in report.json()["tables"][0]["rows"][:-1]:
        assert row["over"] == "by hand"
        assert row["median ratio"] > 0


def test_the_cnn_has_the_same_rows() -> None:
    report = measure("--model", "cnn", "--batches", "1", "--only", "MetricsCB")
    assert names(report) == [list(overhead.METRICS), ["eventrain, MetricsCB(metric)"]]


def test_a_part_of_a_name_chooses_rows() -> None:
    report = measure("--batches", "1", "--only", "1 receiver", "MetricsCB()")
    assert names(report) == [["eventrain, 1 receiver"], ["eventrain, MetricsCB()"]]


def test_a_name_that_nothing_has_is_refused() -> None:
    with pytest.raises(SystemExit, match="--only 'kears' is not part of any of 'by hand, again', "):
        measure("--only", "kears")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_the_peers_are_left_out() -> None:
    report = measure("--batches", "2", "--device", "cuda")
    assert names(report) == [
        [*overhead.ENGINE, "one receiver, beyond its own body"],
        [*overhead.METRICS],
    ]


def test_one_receiver_is_what_seven_more_cost_without_their_own_bodies() -> None:
    times = {"by hand": [103.0, 100.0], overhead.CALLING: [104.0, 105.0]}
    times |= {overhead.ONE: [111.0, 110.0], overhead.ALL: [117.0, 118.0]}
    assert overhead._one_receiver(times)[2] == (117 - 110) / 7 - (104 - 100) / 8


def test_a_contender_with_other_weights_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def train_nothing(task: Task) -> Outcome:
        return Outcome(1.0)

    monkeypatch.setitem(overhead.ENGINE, "eventrain", (train_nothing, "by hand"))
    monkeypatch.setitem(overhead.OTHERS, "eventrain", (train_nothing, "by hand"))
    with pytest.raises(AssertionError, match="eventrain ends with other weights"):
        measure("--batches", "2", "--only", "eventrain")


def test_a_contender_with_other_numbers_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def mismeasure(task: Task) -> Outcome:
        overhead.by_hand(task)
        return Outcome(1.0, {"metric": torch.tensor(-1.0)})

    monkeypatch.setitem(overhead.METRICS, "eventrain, MetricsCB()", (mismeasure, "by hand"))
    with pytest.raises(AssertionError, match=r"MetricsCB\(\): metric -1\.0, not "):
        measure("--batches", "2", "--only", "MetricsCB()")


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ignite.engine", None)
    report = measure("--batches", "1", "--only", "pytorch-ignite")
    assert report.tables == []
    told = "ignite is not installed: pip install 'eventrain[bench]'"
    assert report.notes[:2] == [
        f"pytorch-ignite{metrics}: {told}" for metrics in ("", ", its metrics")
    ]


MEASURE_BOTH_MODELS = """
import argparse, json, sys
from pathlib import Path
from benchmarks import overhead

parser = argparse.ArgumentParser()
overhead.add_arguments(parser)
for model in ("linear", "cnn"):
    args = parser.parse_args(["--model", model, "--batches", "2", "--repeats", "1", *sys.argv[2:]])
    Path(sys.argv[1], model).write_text(json.dumps(overhead.run(args).json()))
"""


def test_every_peer_that_is_installed_trains_as_the_loop_by_hand(tmp_path: Path) -> None:
    # In a process of its own: what they load, and patch, is nothing for the other tests.
    command = [sys.executable, "-c", MEASURE_BOTH_MODELS, str(tmp_path), "--only", *MODULES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout + done.stderr == "", "the peers are quiet"
    present = [peer for peer, module in MODULES.items() if find_spec(module)]
    for model in ("linear", "cnn"):
        report = json.loads((tmp_path / model).read_text())
        rows = [row["us a batch"] for table in report["tables"] for row in table["rows"]]
        assert rows == [*present, *(f"{peer}, its metrics" for peer in present)]
        for peer in MODULES.keys() - set(present):
            assert any(note.startswith(f"{peer}: ") for note in report["notes"])

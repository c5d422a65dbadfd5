"""The end-to-end benchmark: its rows are there, and a training that ends otherwise is found."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from eventrain.callbacks import CompileCB
from eventrain.engine import DataLoaders
from eventrain.events import BeforeFit, Callback
from torch import nn

from benchmarks import endtoend
from benchmarks.endtoend import BY_HAND, CHANGED, EQUAL, EVENTRAIN, Contender, Numbers
from benchmarks.report import Report

Measure = Callable[[dict[str, Contender], dict[str, Contender]], Report]


class NoCompilerCB(Callback):
    def before_fit(self, event: BeforeFit) -> None:
        raise RuntimeError("inductor cannot compile here:\nInstall g++")


@pytest.fixture
def measure(fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """On 70 images: two batches."""

    def measure(equal: dict[str, Contender], changed: dict[str, Contender]) -> Report:
        monkeypatch.setattr(endtoend, "EQUAL", equal)
        monkeypatch.setattr(endtoend, "CHANGED", changed)
        options = ("--images", "70", "--repeats", "1", "--epochs", "1")
        return endtoend.run(parsed("--data", str(fashion_mnist), *options))

    return measure


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    endtoend.add_arguments(parser)
    return parser.parse_args(options)


FEW = {name: EQUAL[name] for name in (BY_HAND, EVENTRAIN)}
BROKEN = endtoend.from_dataset, endtoend.eventrain(NoCompilerCB)


def test_every_row_is_there(measure: Measure) -> None:
    # Compiled by what needs no compiler, and is quick.
    compiled = endtoend.from_dataset, endtoend.eventrain(lambda: CompileCB("eager"))
    report = measure(EQUAL, CHANGED | {"CompileCB()": compiled})
    equal, changed = report.tables
    assert [row[0] for row in equal.rows] == list(EQUAL)
    assert [row[0] for row in changed.rows] == [EVENTRAIN, *CHANGED]
    for table in report.tables:
        assert "1 epochs of 70 images on cpu, 1 repeats in turn" in table.title
        _, first, least, ratios, accuracies, losses = zip(*table.rows, strict=True)
        assert min(*first, *least, *ratios, *losses) > 0
        assert 0 <= min(accuracies) <= max(accuracies) <= 1
        assert ratios[0] == 1
    assert len({row[4] for row in equal.rows}) == 1
    assert json.dumps(report.json())


def train_nothing(model: nn.Module, dls: DataLoaders, device: str, epochs: int) -> Numbers:
    return [{"accuracy": 0.1, "loss": 2.3}]


def test_a_contender_with_other_weights_is_found_out(measure: Measure) -> None:
    with pytest.raises(AssertionError, match="from_dataset ends with other weights"):
        measure(FEW | {EVENTRAIN: (endtoend.from_dataset, train_nothing)}, {})


@pytest.mark.parametrize(("key", "factor"), [("accuracy", 1 + 1e-7), ("loss", 1 + 2e-4)])
def test_a_contender_with_other_numbers_is_found_out(
    measure: Measure, key: str, factor: float
) -> None:
    def mismeasure(model: nn.Module, dls: DataLoaders, device: str, epochs: int) -> Numbers:
        numbers = endtoend.by_hand(model, dls, device, epochs)
        numbers[-1][key] *= factor
        return numbers

    with pytest.raises(AssertionError, match=rf"from_dataset: {key} \S+, not "):
        measure(FEW | {EVENTRAIN: (endtoend.from_dataset, mismeasure)}, {})


def test_contenders_that_may_change_the_numbers_may_do_so(measure: Measure) -> None:
    report = measure(FEW, {"nothing": (endtoend.from_dataset, train_nothing)})
    *_, accuracy, loss = report.tables[1].rows[-1]
    assert (accuracy, loss) == (0.1, 2.3)


def test_contenders_that_cannot_run_are_left_out_and_listed(measure: Measure) -> None:
    report = measure(FEW, {"CompileCB()": BROKEN})
    assert [row[0] for row in report.tables[1].rows] == [EVENTRAIN]
    told = "Left out: CompileCB(), as inductor cannot compile here: Install g++"
    assert report.notes[0] == told


def test_contenders_that_must_be_equal_are_never_left_out(measure: Measure) -> None:
    with pytest.raises(RuntimeError, match="cannot compile"):
        measure(FEW | {EVENTRAIN: BROKEN}, {})


def test_missing_data_is_reported_with_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="point --data to"):
        endtoend.run(parsed("--data", str(tmp_path)))

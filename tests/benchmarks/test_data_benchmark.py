"""The data benchmark: its rows are there, and a loader that hands out something else is found."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import FashionMNIST

from benchmarks import data, jpegs
from benchmarks.data import BITS, CONTENDERS, FROM_DATASET, POST, REORDERED, TRAINED
from benchmarks.report import Report

Measure = Callable[[], Report]
Change = Callable[[list[Any]], list[Any]]


@pytest.fixture
def measure(fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch) -> Measure:
    """On 70 images, on the CPU."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)

    def measure() -> Report:
        options = ("--images", "70", "--repeats", "1", "--jpegs", "0")
        return data.run(parsed("--data", str(fashion_mnist), *options))

    return measure


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    data.add_arguments(parser)
    return parser.parse_args(options)


class Wrong:
    """The right batches, but for what `change` makes of them."""

    def __init__(self, loader: Any, change: Change) -> None:
        self.loader, self.change = loader, change

    def __iter__(self) -> Iterator[Any]:
        return iter(self.change(list(self.loader)))


def one_bit(batches: list[Any]) -> list[Any]:
    batches[-1][0][-1, 0, -1, -1] += 1e-7
    return batches


def one_label(batches: list[Any]) -> list[Any]:
    batches[-1][1][-1] = (batches[-1][1][-1] + 1) % 10
    return batches


CHANGES: dict[str, Change] = {
    "one bit": one_bit,
    "one label": one_label,
    "order": lambda batches: batches[::-1],
    "precision": lambda batches: [[x.double(), y] for x, y in batches],
}


def test_every_row_is_there(measure: Measure) -> None:
    report = measure()
    reading, training = report.tables
    assert [row[0] for row in reading.rows] == list(CONTENDERS)
    assert [row[0] for row in training.rows] == TRAINED
    assert FROM_DATASET in TRAINED
    for table in report.tables:
        assert "70 images in batches of 64, 1 repeats in turn" in table.title
        _, rates, ratios, _ = zip(*table.rows, strict=True)
        assert min(rates) > 0
        assert min(ratios) > 0
        assert ratios[0] == 1
    same = {row[0]: row[3] for row in reading.rows}
    assert same[FROM_DATASET] == BITS
    assert same["by hand, whole tensors"] == REORDERED
    assert json.dumps(report.json())
    assert report.notes == ["Left out: batches copied to a GPU or kept there, for lack of one."]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_loader_with_other_batches_is_found_out(
    measure: Measure, monkeypatch: pytest.MonkeyPatch, change: Change
) -> None:
    def make(dataset: FashionMNIST, device: str) -> Wrong:
        return Wrong(data.from_dataset(dataset, device), change)

    monkeypatch.setitem(CONTENDERS, FROM_DATASET, (make, BITS))
    with pytest.raises(
        AssertionError, match=r"from_dataset: batch \d does not match that of .* to the bit"
    ):
        measure()


def test_a_loader_that_ends_early_is_found_out(
    measure: Measure, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make(dataset: FashionMNIST, device: str) -> Wrong:
        return Wrong(data.from_dataset(dataset, device), lambda batches: batches[:-1])

    monkeypatch.setitem(CONTENDERS, FROM_DATASET, (make, BITS))
    with pytest.raises(ValueError, match="argument 2 is longer"):
        measure()


def test_a_training_that_ends_otherwise_is_found_out(fashion_mnist: Path) -> None:
    args = parsed("--data", str(fashion_mnist), "--images", "70")
    loader = data.of_the_post(data.fashion_mnist(args, train=True), "cpu")
    weights: dict[str, torch.Tensor] = {}
    for _ in range(2):
        torch.manual_seed(data.SEED)
        data._train(POST, loader, "cpu", weights)
    torch.manual_seed(data.SEED)
    with pytest.raises(AssertionError, match="ends with other weights"):
        data._train("wrong", Wrong(loader, one_label), "cpu", weights)


def test_missing_data_is_reported_with_where_to_put_it(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"not in .*FashionMNIST/raw: .* point --data to"):
        data.run(parsed("--data", str(tmp_path)))
    assert not list(tmp_path.iterdir())


def of_jpegs(n: int) -> Report:
    report = Report("data")
    jpegs.add_table(report, n, 1, lambda work, n: work() or float(n))
    return report


def test_loaders_of_jpegs_are_compared() -> None:
    report = of_jpegs(70)
    (table,) = report.tables
    assert "70 JPEG files of 320x320, in batches of 64, 1 repeats in turn" in table.title
    left_out = {jpegs.SPDL} if report.notes else set()
    assert {row[0] for row in table.rows} == jpegs.CONTENDERS.keys() - left_out
    assert all("Left out: SPDL, num_threads=2, as No module" in note for note in report.notes)
    assert of_jpegs(0).tables == []


def test_one_with_other_images_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(dataset: Any) -> list[torch.Tensor]:
        return [batch + 1e-6 for batch in jpegs.DataLoader(dataset, 64)]

    monkeypatch.setitem(jpegs.CONTENDERS, "ThreadLoader, num_threads=2", make)
    with pytest.raises(AssertionError, match="num_threads=2: batch 0 is not that of DataLoader"):
        of_jpegs(3)

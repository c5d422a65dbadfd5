"""The monitor benchmark: its rows are there, what is counted adds up, and nothing is changed."""

from __future__ import annotations

import argparse
import json
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import record_events

from benchmarks import host, monitor
from benchmarks.by_hand import Task, by_hand, linear
from benchmarks.monitor import WATCHES, Attach, Watch
from benchmarks.report import Report

N = 7


def measure(*options: str) -> Report:
    parser = argparse.ArgumentParser()
    monitor.add_arguments(parser)
    return monitor.run(parser.parse_args(["--repeats", "2", *options]))


@pytest.fixture
def task() -> Task:
    return linear(N)


@pytest.fixture
def trained(task: Task) -> Task:
    copy = replace(task, model=deepcopy(task.model))
    by_hand(copy)
    return copy


@pytest.mark.parametrize("backend", host.BACKENDS)
def test_every_row_is_there(backend: str) -> None:
    report = measure("--model", "linear", "--batches", "20", "--backend", backend)
    watching, ticks, alone = report.tables
    assert [row[0] for row in watching.rows] == list(WATCHES)
    assert [len(row) for row in watching.rows] == [len(watching.columns)] * len(WATCHES)
    assert [row[0] for row in ticks.rows] == [
        "no training",
        "training",
        "training, every event observed, a line a batch",
    ]
    assert [row[0] for row in alone.rows] == ["events to an observer", "JSON lines to a file"]
    assert backend in watching.title
    assert json.dumps(report.json())


def test_both_models_are_watched() -> None:
    report = measure("--batches", "1", "--repeats", "1")
    titles = [table.title.partition(",")[0] for table in report.tables]
    kinds = [f"{what}: {model}" for model in ("linear", "cnn") for what in ("Watching", "Ticks")]
    assert titles[:4] == kinds


def test_every_event_of_the_training_is_delivered(
    task: Task, trained: Task, backend: dict[str, Any]
) -> None:
    learner = TrainLearner(deepcopy(task.model), DataLoaders(task.batches))
    with record_events(learner) as events:
        learner.run(1, valid=False, **backend)
    expected: dict[Attach, int] = {
        monitor.nothing: 0,
        monitor.batches: N,
        monitor.every_event: len(events),
        monitor.lossless: len(events),
        monitor.log: N + 3,
    }
    for attach, n in expected.items():
        watch = Watch(attach)
        for _ in range(2):
            watch.train(task, trained, backend)
        assert (watch.delivered, watch.dropped) == (2 * n, 0)
        assert len(watch.delays) == (0 if attach is monitor.log else 2 * n)


def test_a_watched_training_that_ends_otherwise_is_an_error(task: Task) -> None:
    with pytest.raises(AssertionError, match="other weights"):
        Watch(monitor.nothing).train(task, task, {})


def test_events_that_the_host_takes_are_all_counted(backend: dict[str, Any]) -> None:
    watch = Watch(monitor.nothing)
    learner = TrainLearner(linear(1).model)
    learner.observe(watch.take, buffer=3)
    assert host.delivery_rate(learner, 3, backend) > 0
    assert watch.delivered == 3
    learner = TrainLearner(linear(1).model)
    learner.observe(watch.take, buffer=3)
    with pytest.raises(AssertionError):
        host.delivery_rate(learner, 4, backend)


def test_quantiles_of_no_values_are_left_open() -> None:
    assert host.milliseconds([], 0.5, 1) == [None, None]
    assert host.milliseconds([0.004, 0.001, 0.002], 0, 0.5, 1) == [1, 2, 4]

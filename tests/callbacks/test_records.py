"""RecordCB: what a run's records say, held to docs/record.schema.json and docs/records.md."""

from __future__ import annotations

import enum
import itertools
import json
import logging
import math
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, Mock

import anyio
import anyio.lowlevel
import numpy as np
import pytest
import structlog
import torch
from eventrain.callbacks import LRFinderCB, MetricsCB, RecordCB, ValidateCB, to_jsonable
from eventrain.callbacks.reporting import _sampling
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.run.thread import TrainingThread
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
    CleanupFit,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator, FormatChecker
from structlog.testing import LogCapture, capture_logs
from torch import nn
from torch.nn import functional as F

from tests.support.reporting import line_learner as learner
from tests.support.reporting import parse_json
from tests.support.waiting import GUARD

Record = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "records.md").read_text()
SCHEMA = json.loads((DOCS / "record.schema.json").read_text())
KINDS = [ref["$ref"].removeprefix("#/$defs/") for ref in SCHEMA["oneOf"]]

formats = FormatChecker(formats=())


@formats.checks("date-time", raises=ValueError)
def is_utc(text: object) -> bool:
    when = datetime.fromisoformat(text) if isinstance(text, str) else datetime.now(UTC)
    return when.tzinfo == UTC


OPEN = Draft202012Validator(SCHEMA, format_checker=formats)
STRICT = Draft202012Validator({**SCHEMA, "unevaluatedProperties": False}, format_checker=formats)
"""It also refuses a key that the record's kind does not list."""


def as_json(record: Record) -> Record:
    """The record, if it is strict JSON and just what the schema says."""
    line = json.dumps(record, allow_nan=False)
    assert parse_json(line) == record
    STRICT.validate(record)
    assert list(record)[:5] == ["event", "schema_version", "timestamp", "run_id", "purpose"]
    return record


class KeepCB(RecordCB):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.records: list[Record] = []

    def write(self, record: Record) -> None:
        self.records.append(record)


def recorded(learn: TrainLearner, every: int = 100, **fit: Any) -> list[Record]:
    """The records of one more fit, however it ends, each held to the schema."""
    keep = KeepCB(every, fit.pop("every_seconds", 0))
    with suppress(KeyError, OSError):  # what the tests' own fits fail with
        learn.run(**{"n_epochs": 1, "cbs": keep, **fit})
    return [as_json(record) for record in keep.records]


def names(records: list[Record]) -> list[str]:
    return [record["event"] for record in records]


def iters(records: list[Record]) -> list[int]:
    return [record["iter"] for record in records if record["event"] == "batch"]


# ----------------------------------------------------------------------------- what they say


def test_every_record_says_what_the_events_said(backend: dict[str, Any]) -> None:
    """G16: checked field by field, in their order."""
    learn = learner(5, 2, MetricsCB())
    with record_events(learn) as events:
        found = recorded(learn, every=2, n_epochs=2, **backend)
    result = learn.result
    assert result is not None

    expected: list[Record] = []
    for event in events:
        name, fields = None, {}
        match type(event).__name__, event:
            case "BeforeFit", _:
                fit_began = event.time
                name, fields = "fit_started", {"n_epochs": 2, "n_steps": 10}
            case "BeforeEpoch", _:
                began, last = event.time, (event.time, 0)
            case "AfterBatch", AfterBatch(training=True) if (event.epoch * 5 + event.iter) % 2:
                name = "batch"
                fields = {
                    "phase": "train",
                    "epoch": event.epoch,
                    "iter": event.iter,
                    "n_iter": 5,
                    "steps": event.epoch * 5 + event.iter + 1,
                    "loss": event.loss.item(),
                    "lr": 0.1,
                    "samples_per_second": (event.n_samples - last[1]) / (event.time - last[0]),
                }
                last = (event.time, event.n_samples)
            case "CleanupEpoch", CleanupEpoch(training=training):
                name = "epoch"
                samples = 20 if training else 8
                fields = {
                    "phase": "train" if training else "valid",
                    "epoch": event.epoch,
                    "status": "completed",
                    "metrics": {"loss": event.metrics["loss"]},
                    "seconds": event.time - began,
                    "samples": samples,
                    "all_read": True,
                    "samples_per_second": samples / (event.time - began),
                }
            case "CleanupFit", _:
                fields = {"status": "completed", "seconds": event.time - fit_began}
                name = "fit_ended"
        if name is not None:
            when = datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")
            own = {"event": name, "schema_version": 1, "timestamp": when, "run_id": result.run_id}
            expected.append({**own, "purpose": "fit", **fields})
    assert found == expected
    assert [list(record) for record in found] == [list(record) for record in expected]
    assert names(found) == [
        "fit_started",
        *["batch", "batch", "epoch", "epoch"],
        *["batch", "batch", "batch", "epoch", "epoch"],
        "fit_ended",
    ]
    assert dict(result.dropped) == {}


def test_each_fit_has_its_own_id_and_times() -> None:
    learn = learner()
    first, second = recorded(learn), recorded(learn)
    ids = [{record["run_id"] for record in found} for found in (first, second)]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]
    for found in (first, second):
        times = [datetime.fromisoformat(record["timestamp"]) for record in found]
        assert times == sorted(times)
        assert 0 <= found[-1]["seconds"] < 60


def test_the_learning_rate_is_the_one_of_the_moment() -> None:
    found = recorded(learner(4, 1, LRFinderCB(2.0)), every=1, lr=1e-4, valid=False)
    assert [record["lr"] for record in found if record["event"] == "batch"] == pytest.approx(
        [1e-4, 2e-4, 4e-4, 8e-4]
    )


def test_a_learning_rate_that_is_a_tensor_is_a_number_in_the_record() -> None:
    learn = learner(1, opt_func=lambda params, lr: torch.optim.Adam(params, torch.tensor(lr)))
    batch = recorded(learn, every=1, lr=0.5)[1]
    assert (batch["event"], batch["lr"]) == ("batch", 0.5)


def test_a_loader_without_a_length_has_no_n_iter() -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter(learner(1).dls.train)

    learn = learner()
    learn.dls = DataLoaders(Unsized())
    batch = recorded(learn, every=1, valid=False)[1]
    assert (batch["event"], batch["n_iter"]) == ("batch", None)


# ------------------------------------------------------------------------------- how it ended


def endings(found: list[Record]) -> list[tuple[str, str | None, str, str | None, str | None]]:
    """Of every epoch and of the fit: what, which phase, and how it ended, by whom and why."""
    return [
        (r["event"], r.get("phase"), r["status"], r.get("who"), r.get("reason"))
        for r in found
        if r["event"] in ("epoch", "fit_ended")
    ]


def test_what_was_completed_needs_neither_who_nor_reason() -> None:
    found = recorded(learner())
    assert endings(found) == [
        ("epoch", "train", "completed", None, None),
        ("epoch", "valid", "completed", None, None),
        ("fit_ended", None, "completed", None, None),
    ]
    assert not any({"who", "reason"} & set(record) for record in found)


def test_what_was_cancelled_says_by_whom_and_why(backend: dict[str, Any]) -> None:
    learn = learner()

    def too_bad(event: AfterBatch) -> None:
        if (event.epoch, event.training) == (0, True):
            raise CancelEpochException("this epoch")
        raise CancelFitException("the whole fit")

    learn.subscribe(AfterBatch, too_bad)
    who = f"{test_what_was_cancelled_says_by_whom_and_why.__name__}.<locals>.too_bad"
    assert endings(recorded(learn, n_epochs=3, **backend)) == [
        ("epoch", "train", "cancelled", who, "this epoch"),
        ("epoch", "valid", "cancelled", who, "the whole fit"),
        ("fit_ended", None, "cancelled", who, "the whole fit"),
    ]


def test_what_failed_says_by_whom_and_why(backend: dict[str, Any]) -> None:
    learn = learner()

    @learn.on(AfterBatch)
    def broken(event: AfterBatch) -> None:
        raise KeyError("broken")

    found = recorded(learn, every=1, **backend)
    assert names(found) == ["fit_started", "batch", "epoch", "fit_ended"]
    who = f"{test_what_failed_says_by_whom_and_why.__name__}.<locals>.broken"
    assert endings(found) == [
        ("epoch", "train", "failed", who, "KeyError: 'broken'"),
        ("fit_ended", None, "failed", who, "KeyError: 'broken'"),
    ]


def test_a_failure_without_a_receiver_names_nobody() -> None:
    class Broken:
        def __iter__(self) -> Any:
            raise OSError("no disk")

    learn = learner()
    learn.dls = DataLoaders(Broken())
    found = recorded(learn, valid=False)
    assert names(found) == ["fit_started", "epoch", "fit_ended"]
    assert endings(found) == [
        ("epoch", "train", "failed", None, "OSError: no disk"),
        ("fit_ended", None, "failed", None, "OSError: no disk"),
    ]
    assert all("who" in record for record in found[1:])


async def test_they_are_written_when_the_host_cancels_the_fit() -> None:
    learn, keep = learner(), KeepCB(every=1)
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learn.on(AfterBatch)
        async def by_host(event: AfterBatch) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await learn.fit(5, cbs=keep)
    assert scope.cancelled_caught
    assert learn.result is not None
    assert names(keep.records) == ["fit_started", "batch", "epoch", "fit_ended"]
    assert [as_json(record)["status"] for record in keep.records[2:]] == ["cancelled"] * 2
    assert keep.records[-1]["reason"] == learn.result.reason is not None


def test_a_scope_stopped_before_it_began_took_no_time() -> None:
    """The events of its beginning are not emitted: an epoch's, or the whole fit's."""

    class StoppedInBetween(TrainLearner):
        def one_epoch(self) -> None:
            if not self.training:
                self.stop()
            super().one_epoch()

    *_, valid, ended = recorded(StoppedInBetween(nn.Linear(3, 1), learner().dls))
    assert (valid["phase"], valid["seconds"], valid["samples_per_second"]) == ("valid", 0, None)
    assert ended["seconds"] > 0

    class StoppedLearner(TrainLearner):
        def one_fit(self) -> None:
            self.stop(reason="not today")
            super().one_fit()

    learn = StoppedLearner(nn.Linear(3, 1), learner(1).dls)
    (ended,) = recorded(learn, valid=False)
    assert (ended["event"], ended["reason"], ended["seconds"]) == ("fit_ended", "not today", 0)


# ---------------------------------------------------------------------------- how many there are


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4]), (6, []), (0, [])]
)
def test_every_is_every_how_many_training_batches(every: int, expected: list[int]) -> None:
    found = recorded(learner(5, 5), every)
    assert iters(found) == expected
    rest = [name for name in names(found) if name != "batch"]
    assert rest == ["fit_started", "epoch", "epoch", "fit_ended"]


@pytest.mark.parametrize(("every", "expected"), [(1, [0]), (2, [1]), (0, [])])
def test_every_seconds_leaves_out_those_that_come_too_soon(every: int, expected: list[int]) -> None:
    found = recorded(learner(5, 5), every, n_epochs=2, every_seconds=3600)
    assert iters(found) == expected
    assert names(found).count("epoch") == 4


def test_every_fit_has_a_first_batch_whatever_the_one_before_it_had() -> None:
    learn, keep = learner(), KeepCB(every=1, every_seconds=3600)
    learn.add_cbs(keep)
    for n_fits in (1, 2, 3):
        learn.run(2)
        assert iters(keep.records) == [0] * n_fits


def test_every_seconds_counts_from_the_last_batch_that_had_a_record(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a clock on which a training batch takes three seconds."""
    monkeypatch.setattr(_sampling, "monotonic", lambda: clock.iter * 3.0)
    clock = learner(9)
    assert iters(recorded(clock, every=1, every_seconds=7)) == [0, 3, 6]
    assert iters(recorded(clock, every=1, every_seconds=6)) == [0, 2, 4, 6, 8]
    assert iters(recorded(clock, every=2, every_seconds=7)) == [1, 5]
    assert iters(recorded(clock, every=1, every_seconds=0)) == list(range(9))


@pytest.mark.parametrize("every", [-1, True, 1.5, "1", None])
def test_an_every_that_is_no_count_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every={every!r}: give a number of batches"):
        KeepCB(every)


@pytest.mark.parametrize("seconds", [-0.1, math.nan, math.inf, True, "1", None])
def test_an_every_seconds_that_is_no_time_is_refused(seconds: Any) -> None:
    with pytest.raises(ValueError, match=f"every_seconds={seconds!r}: give seconds"):
        KeepCB(every_seconds=seconds)


# --------------------------------------------------------------------------------- the run's id


def test_the_run_id_that_is_given_is_the_one_everywhere(backend: dict[str, Any]) -> None:
    learn = learner()
    with record_events(learn) as events:
        found = recorded(learn, every=1, run_id="mine", **backend)
    assert learn.result is not None
    assert {record["run_id"] for record in found} == {"mine"}
    assert {event.run_id for event in events} == {"mine"}
    assert learn.result.run_id == learn.run_id == "mine"
    assert {record["run_id"] for record in recorded(learn)} == {learn.run_id} != {"mine"}


@pytest.mark.parametrize("run_id", ["", 7, b"mine", True, ["mine"]])
def test_a_run_id_that_is_not_text_is_refused_before_any_work(run_id: Any) -> None:
    learn = learner()
    with record_events(learn) as events:
        with pytest.raises(ValueError, match=re.escape(f"run_id={run_id!r}: give a non-empty")):
            learn.run(run_id=run_id)
        assert (list(events), learn.result, learn.fitting) == ([], None, False)


# --------------------------------------------------------------------------- whatever the values


@pytest.mark.parametrize(
    ("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_a_number_that_is_not_finite_is_null_and_named_by_its_path(value: float, name: str) -> None:
    """G16: of batches and of epochs."""
    learn = learner(2, 1, MetricsCB(), loss_func=lambda p, y: F.mse_loss(p, y) * 0 + value)
    found = recorded(learn, every=1)
    assert names(found) == ["fit_started", "batch", "batch", "epoch", "epoch", "fit_ended"]
    for record in found[1:3]:
        assert (record["loss"], record["nonfinite"]) == (None, {"loss": name})
    for record in found[3:5]:
        assert record["metrics"] == {"loss": None}
        assert record["nonfinite"] == {"metrics.loss": name}
    assert not any("nonfinite" in record for record in (found[0], found[-1]))


def test_numbers_in_lists_and_mappings_are_looked_at_too() -> None:
    learn = learner(1)
    values = {
        "list": [1.0, math.nan],
        "deep": [[math.inf]],
        "mapping": {"a": math.nan, "b": 2.0, 3: math.nan, "3": "three"},
        "tensor": torch.tensor([0.5, -math.inf]),
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "scalar": np.float32("nan"),
        "fine": np.int64(3),
        "sparse": torch.zeros(2).to_sparse(),
    }
    learn.subscribe(AfterEpoch, lambda event: learn.record.update(values))
    epoch = recorded(learn, valid=False)[1]
    assert epoch["metrics"] == {
        "list": [1.0, None],
        "deep": [[None]],
        "mapping": {"a": None, "b": 2.0, "3": None, "3 (str)": "three"},
        "tensor": [0.5, None],
        "half": 0.5,
        "scalar": None,
        "fine": 3,
        "sparse": str(values["sparse"]),
    }
    assert epoch["nonfinite"] == {
        "metrics.list": "nan",
        "metrics.deep": "inf",
        "metrics.mapping.a": "nan",
        "metrics.mapping.3": "nan",
        "metrics.tensor": "-inf",
        "metrics.scalar": "nan",
    }


def test_what_no_line_can_hold_is_told_as_text() -> None:
    """G16: a circle, a number of many digits, a thing whose text is an error."""

    class Mute:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    circle: list[Any] = [1.0]
    circle.append(circle)
    mapping: dict[Any, Any] = {}
    mapping["again"] = mapping
    values = {"circle": circle, "mapping": mapping, "many": -(10**5000), "mute": Mute()}
    values["keys"] = {Mute(): 1}
    learn = learner(1)
    learn.subscribe(AfterEpoch, lambda event: learn.record.update(values))
    found = recorded(learn, valid=False)
    assert names(found) == ["fit_started", "epoch", "fit_ended"]
    metrics = json.loads(json.dumps(found[1]["metrics"], allow_nan=False))
    assert metrics["many"] == found[1]["left_out"]["metrics.many"] == "int of 16610 bits"
    assert "Mute object" in metrics["mute"]
    assert ["Mute object" in key for key in metrics["keys"]] == [True]
    assert metrics["circle"] == "list of 2"
    assert isinstance(metrics["mapping"]["again"]["again"], dict)


def measured(values: dict[Any, Any]) -> Record:
    """The record of an epoch in which a receiver has put them into `learner.record`."""
    learn = learner(1)
    learn.subscribe(AfterEpoch, lambda event: learn.record.update(values))
    with capture_logs() as logs:
        found = recorded(learn, valid=False)
    assert logs == []
    assert names(found) == ["fit_started", "epoch", "fit_ended"]
    return found[1]


def test_what_is_large_is_told_by_its_size() -> None:
    """The event loop is not held up by it, nor the log filled."""
    values = {
        "matrix": torch.zeros(1000, 1000),
        "nested": [[0.0] * 1000] * 1000,
        "long": [0.0] * 1001,
        "names": dict.fromkeys(range(1001), 0.0),
        "fine": [0.0] * 800,
        "small": torch.zeros(10, 10),
    }
    epoch = measured(values)
    sizes = {
        "matrix": "Tensor of (1000, 1000)",
        "nested": "list of 1000",
        "long": "list of 1001",
        "names": "dict of 1001",
    }
    assert epoch["metrics"] == {**sizes, "fine": [0.0] * 800, "small": [[0.0] * 10] * 10}
    assert epoch["left_out"] == {f"metrics.{name}": size for name, size in sizes.items()}


def count(value: Any) -> int:
    """The numbers and texts in a record."""
    if isinstance(value, dict):
        return sum(map(count, value.values()))
    return sum(map(count, value)) if isinstance(value, list) else 1


@pytest.mark.parametrize(
    "curve",
    [[0.5] * 900, torch.full((900,), 0.5), np.full(900, 0.5), (0.5,) * 900, dict.fromkeys("ab", 1)],
    ids=["list", "tensor", "array", "tuple", "mapping"],
)
@pytest.mark.parametrize("n", [2, 900, 5000])
def test_all_lists_of_a_record_share_one_budget(curve: Any, n: int) -> None:
    """G16: 900 curves of 900 points are not 810,000 numbers; the loss is there, whatever else."""
    for curves in ({f"class {i}": curve for i in range(n)}, [curve] * n):
        left_out: dict[str, str] = {}
        values = {"loss": 0.5, "curves": curves, "accuracy": 0.75}
        converted = to_jsonable(values, "metrics", left_out=left_out)
        assert count(converted) <= 1000
        assert (converted["loss"], converted["accuracy"]) == (0.5, 0.75)
        assert bool(left_out) == (n * len(curve) > 1000)
        assert len(json.dumps([converted, left_out])) < 100_000


def test_a_record_says_which_of_its_curves_are_left_out() -> None:
    epoch = measured({"roc": {f"class {i}": [0.5] * 900 for i in range(20)}, "loss": 0.5})
    left_out = {f"class {i}": "list of 900" for i in range(1, 20)}
    assert epoch["metrics"] == {"roc": {"class 0": [0.5] * 900, **left_out}, "loss": 0.5}
    assert epoch["left_out"] == {f"metrics.roc.{name}": size for name, size in left_out.items()}


def test_of_too_many_metrics_the_first_are_kept_and_the_rest_counted() -> None:
    epoch = measured({f"metric {i}": float(i) for i in range(1500)})
    assert epoch["metrics"] == {f"metric {i}": float(i) for i in range(1000)}
    assert epoch["left_out"] == {"metrics": "500 of 1500 values"}


def test_a_text_or_a_key_is_cut_and_its_length_told() -> None:
    text = "x" * 1_000_000
    epoch = measured(
        {"text": text, text: 1.0, text + "y": 2.0, "loss": 0.5, "set": set(range(9999))}
    )
    key = "x" * 200 + "..."
    assert epoch["metrics"] == {
        "text": "x" * 10_000 + "...",
        key: 1.0,
        f"{key} (str)": 2.0,
        "loss": 0.5,
        "set": "set of 9999",
    }
    assert epoch["left_out"] == {
        "metrics.text": "str of 1000000 characters",
        "metrics.set": "set of 9999",
    }
    many = to_jsonable([text] * 900)
    assert many[0] == "x" * 10_000 + "..."
    assert len(json.dumps(many)) < 250_000


def test_no_two_keys_become_one() -> None:
    """As they would by their texts alone: 1 and "1"."""
    mapping = {1: "a", "1": "b", "None": "d", None: "e", "1 (str)": "f"}
    epoch = measured({"mapping": mapping, 1: 0.25, "1": 0.75})
    assert epoch["metrics"] == {
        "mapping": {
            "1": "a",
            "1 (str)": "b",
            "None": "d",
            "None (NoneType)": "e",
            "1 (str) (str)": "f",
        },
        "1": 0.25,
        "1 (str)": 0.75,
    }


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Name(enum.StrEnum):
    TWO_LINES = "a\nb"


@dataclass
class Scores:
    f1: float = 0.5


class BrokenAttributes:
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"no {name}")


class BrokenMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise KeyError(key)

    def __iter__(self) -> Any:
        return iter("a")

    def __len__(self) -> int:
        return 1


class BrokenLength(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        return 1

    def __iter__(self) -> Any:
        return iter("a")

    def __len__(self) -> int:
        raise ValueError("unknown")


class Endless(Mapping[Any, Any]):
    """Its length is not what it says, either."""

    def __getitem__(self, key: Any) -> Any:
        return 1

    def __iter__(self) -> Any:
        return itertools.count()

    def __len__(self) -> int:
        return 1


class BrokenClass:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no class")


class OddShape:
    shape = ("a", None)

    def tolist(self) -> Any:
        return [1]


class WrongShape:
    shape = (1,)

    def tolist(self) -> Any:
        return [1] * 1_000_000


ODD = {
    "a Mock": (Mock(), None),
    "a MagicMock": (MagicMock(), None),
    "a Mock of a tensor": (Mock(spec=torch.Tensor), None),
    "a Mock of a str": (Mock(spec="text"), None),
    "broken attributes": (BrokenAttributes(), None),
    "a broken mapping": (BrokenMapping(), None),
    "a broken length": (BrokenLength(), None),
    "an endless mapping": (Endless(), None),
    "a broken class": (BrokenClass(), None),
    "an odd shape": (OddShape(), None),
    "a wrong shape": (WrongShape(), "list of 1000000"),
    "an enum": (Color.RED, "Color.RED"),
    "an IntEnum": (Level.HIGH, 3),
    "a str that is an enum": (Name.TWO_LINES, "a\nb"),
    "a dataclass": (Scores(), "Scores(f1=0.5)"),
    "bytes": (b"\xff\x00", "b'\\xff\\x00'"),
    "many bytes": (bytes(10**6), "bytes of 1000000"),
    "a set": ({1}, "{1}"),
    "a numpy bool": (np.bool_(True), True),
    "a numpy int": (np.int64(3), 3),
    "a numpy str": (np.str_("x"), "x"),
    "a long double": (np.longdouble(1), "1.0"),
    "a numpy date": (np.datetime64("2020-01-01"), "2020-01-01"),
    "an object array": (np.array([Color.RED], dtype=object), ["Color.RED"]),
    "a masked number": (np.ma.masked, None),
    "a complex tensor": (torch.tensor(1 + 2j), "(1+2j)"),
    "a meta tensor": (torch.empty(2, device="meta"), None),
    "an int of 64 bits": (2**64 - 1, 2**64 - 1),
    "a negative int of 64 bits": (-(2**63), -(2**63)),
    "an int of 65 bits": (2**64, 2.0**64),
    "operations in a month": (10**24, 1e24),
    "a generator": ((i for i in range(3)), None),
    "a range": (range(3), "range(0, 3)"),
    "a surrogate": ("\udc80", "\udc80"),
}


UNKIND = ("Mock", "endless", "broken")
PRINTABLE = [value for name, (value, _) in ODD.items() if not any(w in name for w in UNKIND)]
"""Those that hypothesis can compare and print, too."""


@pytest.mark.parametrize("name", ODD)
def test_no_value_ends_the_records_of_a_run(name: str) -> None:
    """G16: each is in strict JSON, of plain types that any serializer takes."""
    value, expected = ODD[name]
    for odd in (value, [value], {"in": value}):
        metrics = measured({"odd": odd, "loss": 0.5})["metrics"]
        assert metrics["loss"] == 0.5
        found = metrics["odd"]
        found = found[0] if type(odd) is list else found["in"] if type(odd) is dict else found
        if expected is not None:
            assert found == expected
        for kind in plain_types(metrics):
            assert kind in (dict, list, str, int, float, bool, type(None))


def plain_types(value: Any) -> Iterator[type]:
    yield type(value)
    for item in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from plain_types(item)


@settings(max_examples=200)
@given(
    st.recursive(
        st.none() | st.floats() | st.integers() | st.text() | st.sampled_from(PRINTABLE),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_anything_at_all_can_be_converted(value: Any) -> None:
    converted = to_jsonable(value)
    assert parse_json(json.dumps(converted, allow_nan=False)) == converted


def test_what_is_changed_in_place_later_is_recorded_as_it_was() -> None:
    """The host reads the record when the training has gone on."""
    learn, keep = learner(1, 1), KeepCB(every=0)
    matrix, numbers = torch.zeros(2), [0]

    @learn.on(AfterEpoch, where=lambda event: event.training)
    def change(event: AfterEpoch) -> None:
        matrix.add_(1)
        numbers.append(event.epoch)
        learn.record.update(matrix=matrix, numbers=numbers)

    learn.run(3, valid=False, cbs=keep)  # shorter than the time between two deliveries
    epochs = [r["metrics"] for r in keep.records if r["event"] == "epoch"]
    assert [metrics["matrix"] for metrics in epochs] == [[1, 1], [2, 2], [3, 3]]
    assert [metrics["numbers"] for metrics in epochs] == [[0, 0], [0, 0, 1], [0, 0, 1, 2]]


def test_a_reason_that_is_not_text_becomes_text() -> None:
    learn = learner(1)

    @learn.on(AfterEpoch)
    def leave(event: AfterEpoch) -> None:
        raise CancelFitException(0.25)  # type: ignore[arg-type]

    *_, ended = recorded(learn)
    assert learn.result is not None
    assert (ended["reason"], learn.result.reason) == ("0.25", "0.25")


async def test_one_instance_may_watch_several_fits_at_once(anyio_backend_name: str) -> None:
    """Each record is right for its own run."""
    keep = KeepCB(every=2)
    learners = [learner(n, 1, keep) for n in (3, 6)]
    met = [anyio.Event(), anyio.Event()]
    for learn, mine, other in zip(learners, met, reversed(met), strict=True):

        async def meet(
            event: BeforeEpoch, mine: anyio.Event = mine, other: anyio.Event = other
        ) -> None:
            mine.set()
            await other.wait()

        learn.subscribe(BeforeEpoch, meet, where=lambda event: event.training)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            for learn in learners:
                tasks.start_soon(learn.fit)
    for learn, n in zip(learners, (3, 6), strict=True):
        found = [as_json(r) for r in keep.records if r["run_id"] == learn.run_id]
        assert iters(found) == list(range(1, n, 2))
        assert [r["samples"] for r in found if r["event"] == "epoch"] == [4 * n, 4]
        assert learn.result is not None
        assert 0 < found[-1]["seconds"] <= learn.result.seconds


async def test_write_may_be_async() -> None:
    class SlowCB(RecordCB):
        async def write(self, record: Record) -> None:
            await anyio.lowlevel.checkpoint()
            seen.append(record["event"])

    seen: list[str] = []
    await learner(1).fit(1, cbs=SlowCB())
    assert seen == ["fit_started", "epoch", "epoch", "fit_ended"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.none()), inner, max_size=3)
    ),
    max_leaves=5,
)
keys = (
    st.text(max_size=50)
    | st.integers()
    | st.sampled_from(["event", "run_id", "seconds", "nonfinite"])
)


@settings(max_examples=60)
@given(st.dictionaries(keys, anything, max_size=4))
def test_a_record_is_strict_json_by_the_schema_whatever_was_measured(metrics: Any) -> None:
    """G16: any names and values; they change no key of the record itself."""
    metrics = {key: value for key, value in metrics.items() if key not in ("epoch", "train")}
    learn = learner(1)
    learn.subscribe(AfterEpoch, lambda event: learn.record.update(metrics))
    found = recorded(learn, valid=False)
    assert names(found) == ["fit_started", "epoch", "fit_ended"]
    assert learn.result is not None
    own = {"run_id": learn.result.run_id, "phase": "train", "epoch": 0, "samples": 4}
    assert {key: found[1][key] for key in own} == own
    assert len(found[1]["metrics"]) == len(metrics)
    assert {str(key) for key in metrics} <= set(found[1]["metrics"])
    assert ("nonfinite" in found[1]) == bool(re.search(r"\b(nan|inf)\b", repr(floats(metrics))))


def floats(value: Any) -> list[float]:
    """The floats in it, at any depth."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [number for item in value for number in floats(item)]
    return [value] if isinstance(value, float) else []


# -------------------------------------------------------------------------------- the schema


def of_each_kind() -> dict[str, Record]:
    """A record of each kind, from a run that was cancelled and in which the loss was no number."""
    learn = learner(2, 1, MetricsCB(), loss_func=lambda p, y: p.mean() * math.nan)
    learn.add_cbs(ValidateCB(learn.dls.valid, every_steps=2))

    @learn.on(CleanupEpoch, where=lambda event: event.purpose == "validate")
    def measure(event: CleanupEpoch) -> None:
        learn.record["large"] = torch.zeros(2000)

    @learn.on(CleanupFit)
    def late(event: CleanupFit) -> None:
        raise CancelFitException("late")

    @learn.on(AfterEpoch, where=lambda event: event.purpose == "fit")
    def enough(event: AfterEpoch) -> None:
        learn.record["large"] = torch.zeros(2000)
        raise CancelFitException("enough")

    return {record["event"]: record for record in recorded(learn, every=1)}


RECORDS = of_each_kind()
WRONG = {
    "event": "epochs",
    "schema_version": 2,
    "timestamp": "yesterday",
    "run_id": "",
    "phase": "test",
    "status": "ended",
    "n_epochs": -1,
    "n_steps": -1,
    "steps": -1,
    "name": "",
    "epoch": -1,
    "iter": 0.5,
    "samples": -1,
    "nonfinite": {"loss": "NaN"},
    "left_out": {"loss": 5},
    "purpose": "test",
}


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert list(RECORDS) == KINDS == ["fit_started", "batch", "validation", "epoch", "fit_ended"]


@pytest.mark.parametrize(
    ("kind", "key"), [(kind, key) for kind, record in RECORDS.items() for key in record]
)
def test_the_schema_refuses_what_is_wrong_in_any_key(kind: str, key: str) -> None:
    """Another type, another value, none at all: so that the other tests here can fail."""
    record = RECORDS[kind]
    OPEN.validate(record)
    assert not OPEN.is_valid({**record, key: [1]})
    assert key not in WRONG or not OPEN.is_valid({**record, key: WRONG[key]})
    assert OPEN.is_valid({k: v for k, v in record.items() if k != key}) == (
        key in ("nonfinite", "left_out")
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_more_is_no_breach_of_the_schema_but_one_of_these_tests(kind: str) -> None:
    more = {**RECORDS[kind], "more": 1}
    assert OPEN.is_valid(more)
    assert not STRICT.is_valid(more)


def test_a_record_of_another_kind_or_of_local_time_is_refused() -> None:
    batch = RECORDS["batch"]
    assert not OPEN.is_valid({**batch, "event": "epoch"})
    local = datetime.fromisoformat(batch["timestamp"]).replace(tzinfo=None).isoformat()
    assert not OPEN.is_valid({**batch, "timestamp": local})


# ---------------------------------------------------------------------------------- the page


def rows(title: str) -> dict[str, list[str]]:
    """The table under a title of the page, by its first cell."""
    section = PAGE.split(title, 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first.strip("`"): rest for first, *rest in cells}


def code(cell: str) -> set[str]:
    """What is set as code in a cell, outside the parentheses that explain it."""
    return set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", cell)))


def test_the_examples_in_the_page_are_records_such_as_a_run_has() -> None:
    lines = [json.loads(line) for line in re.findall(r"^\{.*\}$", PAGE, re.MULTILINE)]
    *one_of_each, nonfinite, large = [
        {k: v for k, v in line.items() if k != "level"} for line in lines
    ]
    assert names(one_of_each) == KINDS
    learn = learner(1, 1, MetricsCB())
    learn.add_cbs(ValidateCB(learn.dls.valid, every_steps=1))
    completed = {r["event"]: r for r in recorded(learn, every=1)}
    for record in one_of_each:
        assert list(as_json(record)) == list(completed[record["event"]])
    assert as_json(nonfinite)["nonfinite"] == {"metrics.loss": "nan"}
    assert as_json(large)["left_out"] == {"metrics.image": "Tensor of (1000, 1000)"}
    assert all(list(line)[-1] == "level" for line in lines)


def test_the_page_lists_the_keys_of_every_kind() -> None:
    listed = {kind: code(cells[-1]) for kind, cells in rows("# Records").items()}
    assert listed == {
        kind: (set(SCHEMA["$defs"][kind]["properties"]) - {"event"})
        | (set(SCHEMA["$defs"]["end"]["properties"]) if kind in ("epoch", "fit_ended") else set())
        for kind in KINDS
    }


def test_the_code_in_the_page_runs(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "training")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(compile(block, "records.md", "exec"), namespace)
    kinds = ["fit_started", "epoch", "epoch", "fit_ended"]
    printed = capsys.readouterr().out.splitlines()
    assert names([json.loads(line) for line in printed[:4]]) == kinds  # then structlog's own
    assert names([json.loads(record.message) for record in caplog.records]) == kinds
    assert namespace["slowest"].seconds > 0
    assert namespace["learner"].result.run_id == "nightly-7"


async def test_the_page_lists_the_engines_own_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of them brought about, with its level and its keys."""
    monkeypatch.setattr(TrainingThread, "_warned_of_shared_rng", False)
    capture = LogCapture()
    structlog.configure(processors=[capture])
    one, two = learner(), learner()
    together = threading.Barrier(2)
    one.observe(lambda event: 1 / 0, BeforeFit)
    for learn in (one, two):
        learn.on(BeforeBatch, once=True)(lambda event: together.wait(GUARD) and None)
    with anyio.fail_after(GUARD):
        async with one.events(AfterBatch, buffer=1), anyio.create_task_group() as tasks:
            tasks.start_soon(one.fit)
            tasks.start_soon(two.fit)
        two.cleanup_timeout = 0.01
        with anyio.CancelScope() as scope:

            @two.on(CleanupFit)
            async def hang(event: CleanupFit) -> None:
                scope.cancel()
                await anyio.sleep_forever()

            await two.fit()
    lines = {line["event"]: (line["log_level"], set(line)) for line in capture.entries}
    assert lines == {
        name: (level, code(keys) | {"event", "log_level"})
        for name, (level, _, keys) in rows("## The engine's own lines").items()
    }

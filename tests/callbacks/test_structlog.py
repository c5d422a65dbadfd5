"""StructlogCB: one line a fact, valid JSON whatever the values, beside the training."""

from __future__ import annotations

import io
import json
import math
from datetime import UTC, datetime
from typing import Any, NoReturn

import anyio
import numpy as np
import pytest
import structlog
import torch
from eventrain.callbacks import LRFinderCB, MetricsCB, StructlogCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
    Event,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torcheval.metrics import MulticlassAccuracy

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Line = dict[str, Any]


def no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")


def parse(text: str) -> list[Line]:
    """Strictly: neither NaN nor Infinity, which Python's own parser would let pass."""
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def line_model() -> nn.Module:
    torch.manual_seed(42)
    return nn.Linear(3, 1)


def learner(train: int = 3, valid: int = 2, *cbs: Any, **kwargs: Any) -> TrainLearner:
    def batches(n: int) -> Batches:
        generator = torch.Generator().manual_seed(n)
        inputs = [torch.randn(4, 3, generator=generator) for _ in range(n)]
        return [(x, x.sum(1, keepdim=True)) for x in inputs]

    return TrainLearner(
        line_model(), DataLoaders(batches(train), batches(valid)), cbs=cbs, **kwargs
    )


def logged(learn: TrainLearner, every: int = 100, **fit: Any) -> list[Line]:
    """The lines of one more fit, as JSON."""
    file = io.StringIO()
    log = StructlogCB(every, format="json", file=file)
    learn.run(**{"n_epochs": 1, "cbs": log, **fit})
    return parse(file.getvalue())


def when(event: Event) -> str:
    return datetime.fromtimestamp(event.time, UTC).isoformat(timespec="milliseconds")


# ------------------------------------------------------------------------------------ the lines


def test_every_line_says_what_the_events_said(backend: dict[str, Any]) -> None:
    """G16: parsed, and checked field by field."""
    learn = learner(5, 2, MetricsCB())
    with record_events(learn) as events:
        lines = logged(learn, every=2, n_epochs=2, **backend)
    result = learn.result
    assert result is not None

    expected: list[Line] = []
    for event in events:
        name, fields = None, {}
        match type(event).__name__, event:
            case "BeforeFit", _:
                fit_began = event.time
                name, fields = "fit_started", {"n_epochs": 2}
            case "BeforeEpoch", _:
                began, last = event.time, (event.time, 0)
            case "AfterBatch", AfterBatch(training=True, iter=1 | 3):
                name = "batch"
                fields = {
                    "phase": "train",
                    "epoch": event.epoch,
                    "iter": event.iter,
                    "n_iter": 5,
                    "loss": event.loss.item(),
                    "lr": 0.1,
                    "samples_per_second": 8 / (event.time - last[0]),
                }
                last = (event.time, event.n_samples)
            case "CleanupEpoch", CleanupEpoch(training=training):
                name = "epoch"
                samples = 20 if training else 8
                fields = {
                    "phase": "train" if training else "valid",
                    "epoch": event.epoch,
                    "status": "completed",
                    "loss": event.metrics["loss"],
                    "seconds": event.time - began,
                    "samples": samples,
                    "samples_per_second": samples / (event.time - began),
                }
            case "CleanupFit", _:
                fields = {"status": "completed", "seconds": event.time - fit_began}
                name = "fit_ended"
        if name is not None:
            line = {"event": name, "run_id": result.run_id, **fields}
            expected.append({**line, "timestamp": when(event), "level": "info"})
    assert lines == expected
    assert [list(line) for line in lines] == [list(line) for line in expected]
    assert [line["event"] for line in lines] == [
        "fit_started",
        *["batch", "batch", "epoch", "epoch"] * 2,
        "fit_ended",
    ]
    assert dict(result.dropped) == {}


@pytest.mark.parametrize(
    ("every", "iters"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (5, [4]), (6, []), (0, [])]
)
def test_every_is_every_how_many_training_batches(every: int, iters: list[int]) -> None:
    lines = logged(learner(5, 5), every)
    assert [line["iter"] for line in lines if line["event"] == "batch"] == iters
    assert [line["event"] for line in lines if line["event"] != "batch"] == [
        "fit_started",
        "epoch",
        "epoch",
        "fit_ended",
    ]


def test_each_fit_has_its_own_id_and_times() -> None:
    learn = learner()
    first, second = logged(learn), logged(learn)
    ids = [{line["run_id"] for line in lines} for lines in (first, second)]
    assert [len(each) for each in ids] == [1, 1]
    assert ids[0] != ids[1]
    for lines in (first, second):
        times = [datetime.fromisoformat(line["timestamp"]) for line in lines]
        assert times == sorted(times)
        assert 0 <= lines[-1]["seconds"] < 60


def test_the_learning_rate_is_the_one_of_the_moment() -> None:
    lines = logged(learner(4, 1, LRFinderCB(2.0)), every=1, lr=1e-4, valid=False)
    assert [line["lr"] for line in lines if line["event"] == "batch"] == pytest.approx(
        [1e-4, 2e-4, 4e-4, 8e-4]
    )


def test_a_learning_rate_that_is_a_tensor_is_a_number_in_the_line() -> None:
    learn = learner(1, opt_func=lambda params, lr: torch.optim.Adam(params, torch.tensor(lr)))
    batch = logged(learn, every=1, lr=0.5)[1]
    assert (batch["event"], batch["lr"]) == ("batch", 0.5)


def test_a_loader_without_a_length_has_no_n_iter() -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter([(torch.ones(4, 3), torch.ones(4, 1))])

    learn = learner()
    learn.dls = DataLoaders(Unsized())
    batch = logged(learn, every=1, valid=False)[1]
    assert (batch["event"], batch["n_iter"]) == ("batch", None)


# -------------------------------------------------------------------------------- how it ended


def test_what_is_cancelled_is_a_warning_that_says_by_whom_and_why(backend: dict[str, Any]) -> None:
    learn = learner()

    def too_bad(event: AfterBatch) -> None:
        if (event.epoch, event.training) == (0, True):
            raise CancelEpochException("this epoch")
        raise CancelFitException("the whole fit")

    learn.subscribe(AfterBatch, too_bad)
    lines = logged(learn, n_epochs=3, **backend)
    assert [
        {key: line.get(key) for key in ("event", "level", "phase", "status", "reason")}
        for line in lines[1:]
    ] == [
        {
            "event": "epoch",
            "level": "warning",
            "phase": "train",
            "status": "cancelled",
            "reason": "this epoch",
        },
        {
            "event": "epoch",
            "level": "warning",
            "phase": "valid",
            "status": "cancelled",
            "reason": "the whole fit",
        },
        {
            "event": "fit_ended",
            "level": "warning",
            "phase": None,
            "status": "cancelled",
            "reason": "the whole fit",
        },
    ]
    assert all(line["who"].endswith(".too_bad") for line in lines[1:])


def test_what_failed_is_an_error_that_says_why(backend: dict[str, Any]) -> None:
    learn = learner()

    @learn.on(AfterBatch)
    def broken(event: AfterBatch) -> None:
        raise KeyError("broken")

    file = io.StringIO()
    with pytest.raises(KeyError, match="broken"):
        learn.run(1, cbs=StructlogCB(format="json", file=file), **backend)
    started, epoch, ended = parse(file.getvalue())
    assert started["level"] == "info"
    for line in (epoch, ended):
        assert (line["level"], line["status"]) == ("error", "failed")
        assert line["reason"] == "KeyError: 'broken'"
        assert "who" in line


async def test_the_lines_arrive_when_the_host_cancels_the_fit() -> None:
    file = io.StringIO()
    learn = learner()
    with anyio.fail_after(30), anyio.CancelScope() as scope:

        @learn.on(AfterBatch)
        async def by_host(event: AfterBatch) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await learn.fit(5, cbs=StructlogCB(every=1, format="json", file=file))
    assert scope.cancelled_caught
    lines = parse(file.getvalue())
    assert [(line["event"], line["level"]) for line in lines] == [
        ("fit_started", "info"),
        ("batch", "info"),
        ("epoch", "warning"),
        ("fit_ended", "warning"),
    ]
    assert learn.result is not None
    assert lines[-1]["status"] == learn.result.status == "cancelled"
    assert lines[-1]["reason"] == learn.result.reason is not None


# ---------------------------------------------------------------------------- whatever the values


@pytest.mark.parametrize(
    ("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")]
)
def test_a_number_that_is_not_finite_is_null_and_flagged(value: float, name: str) -> None:
    """G16: in the lines of batches and of epochs."""
    learn = learner(2, 1, MetricsCB(), loss_func=lambda p, y: F.mse_loss(p, y) * 0 + value)
    lines = logged(learn, every=1)
    assert [line["event"] for line in lines] == [
        "fit_started",
        *["batch", "batch", "epoch", "epoch"],
        "fit_ended",
    ]
    for line in lines[1:-1]:
        assert line["loss"] is None
        assert line["nonfinite"] == {"loss": name}
    assert "nonfinite" not in lines[0]
    assert "nonfinite" not in lines[-1]


def test_numbers_in_lists_and_mappings_are_looked_at_too() -> None:
    learn = learner(1)
    values = {
        "list": [1.0, math.nan],
        "deep": [[math.inf]],
        "mapping": {"a": math.nan, "b": 2.0, 3: "three"},
        "tensor": torch.tensor([0.5, -math.inf]),
        "scalar": np.float32("nan"),
        "fine": np.int64(3),
    }
    learn.subscribe(AfterEpoch, lambda event: learn.record.update(values))
    epoch = logged(learn, valid=False)[1]
    assert {key: epoch[key] for key in values} == {
        "list": [1.0, None],
        "deep": [[None]],
        "mapping": {"a": None, "b": 2.0, "3": "three"},
        "tensor": [0.5, None],
        "scalar": None,
        "fine": 3,
    }
    assert epoch["nonfinite"] == {
        "list": "nan",
        "deep": "inf",
        "mapping": "nan",
        "tensor": "-inf",
        "scalar": "nan",
    }


OWN = {"event": "epoch", "level": "info", "phase": "train", "epoch": 0, "status": "completed"}

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner)
        | st.dictionaries(st.text() | st.integers() | st.tuples(st.none()), inner, max_size=3)
    ),
    max_leaves=5,
)
names = st.text() | st.integers() | st.sampled_from([*OWN, "run_id", "seconds", "exc_info", "self"])


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(names, anything, max_size=4))
def test_a_line_is_valid_json_whatever_was_recorded(record: dict[Any, Any]) -> None:
    """G16: any names and values; those of the line itself are not to be changed by them."""
    learn = learner(1)
    record = {key: value for key, value in record.items() if key not in ("epoch", "train")}
    learn.subscribe(AfterEpoch, lambda event: learn.record.update(record))
    lines = logged(learn, valid=False)
    assert [line["event"] for line in lines] == ["fit_started", "epoch", "fit_ended"]
    assert learn.result is not None
    own = {**OWN, "run_id": learn.result.run_id, "samples": 4}
    assert {key: lines[1][key] for key in own} == own
    assert isinstance(lines[1]["seconds"], float)


def test_a_metric_named_like_another_key_is_told_apart(backend: dict[str, Any]) -> None:
    x, y = torch.eye(3), torch.arange(3)
    metrics = MetricsCB(seconds=MulticlassAccuracy(), event=MulticlassAccuracy())
    learn = learner()
    learn.model, learn.loss_func = nn.Linear(3, 3), F.cross_entropy
    learn.dls = DataLoaders([(x, y)])
    file = io.StringIO()
    learn.run(1, valid=False, cbs=[metrics, StructlogCB(format="json", file=file)], **backend)
    lines = parse(file.getvalue())
    assert [line["event"] for line in lines] == ["fit_started", "epoch", "fit_ended"]
    assert lines[1]["metric_seconds"] == lines[1]["metric_event"] == metrics.history[0]["event"]
    assert lines[1]["seconds"] != lines[1]["metric_seconds"]


# ------------------------------------------------------------------- the host's own configuration


async def test_the_hosts_context_variables_are_in_every_line_and_kept() -> None:
    file = io.StringIO()
    log = StructlogCB(every=1, format="json", file=file)
    with structlog.contextvars.bound_contextvars(request="r1", budget=math.inf):
        await learner(1).fit(1, cbs=log)
        assert structlog.contextvars.get_contextvars() == {"request": "r1", "budget": math.inf}
    assert structlog.contextvars.get_contextvars() == {}
    lines = parse(file.getvalue())
    assert [line["event"] for line in lines] == [
        "fit_started",
        "batch",
        "epoch",
        "epoch",
        "fit_ended",
    ]
    assert {(line["request"], line["budget"]) for line in lines} == {("r1", None)}


def test_by_default_lines_go_to_the_hosts_own_logger(backend: dict[str, Any]) -> None:
    learn = learner(2, 1, StructlogCB(every=2))
    with capture_logs() as lines:
        result = learn.run(1, **backend)
    assert [(line["event"], line["log_level"]) for line in lines] == [
        ("fit_started", "info"),
        ("batch", "info"),
        ("epoch", "info"),
        ("epoch", "info"),
        ("fit_ended", "info"),
    ]
    assert {line["run_id"] for line in lines} == {result.run_id}


def test_the_hosts_configuration_holds_also_when_it_comes_later() -> None:
    """And its NaN is no number there either, whatever it renders with."""
    learn = learner(1, 1, StructlogCB(every=1), loss_func=lambda p, y: p.mean() * math.nan)
    seen = []

    def keep(logger: Any, method: str, record: dict[str, Any]) -> str:
        seen.append((method, record["event"], record.get("loss"), record.get("nonfinite")))
        return ""

    structlog.configure(
        processors=[keep], logger_factory=structlog.WriteLoggerFactory(io.StringIO())
    )
    learn.run(1, valid=False)
    assert seen == [
        ("info", "fit_started", None, None),
        ("info", "batch", None, {"loss": "nan"}),
        ("info", "epoch", None, None),
        ("info", "fit_ended", None, None),
    ]


def test_a_logger_that_is_given_is_the_one_used() -> None:
    file = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.WriteLogger(file), processors=[structlog.processors.JSONRenderer()]
    ).bind(service="trainer")
    with capture_logs() as others:
        learner(1).run(1, cbs=StructlogCB(logger=logger))
    assert [(line["event"], line["service"]) for line in parse(file.getvalue())] == [
        ("fit_started", "trainer"),
        ("epoch", "trainer"),
        ("epoch", "trainer"),
        ("fit_ended", "trainer"),
    ]
    assert others == []


@pytest.mark.parametrize("format", ["json", "console", None])
def test_it_configures_nothing(
    format: Any,  # noqa: A002
    capsys: pytest.CaptureFixture[str],
) -> None:
    """G7: structlog's configuration is the host's."""
    before = structlog.get_config()
    learner(1).run(1, cbs=StructlogCB(format=format))
    assert any("fit_ended" in text for text in capsys.readouterr())
    assert not structlog.is_configured()
    assert structlog.get_config() == before


def test_standard_error_is_where_lines_go_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    learner(1).run(1, cbs=StructlogCB(format="json"))
    out, err = capsys.readouterr()
    assert out == ""
    assert [line["event"] for line in parse(err)] == ["fit_started", "epoch", "epoch", "fit_ended"]


@pytest.mark.parametrize("every", [-1, True, 1.5, "1", None])
def test_a_number_that_is_no_count_is_refused(every: Any) -> None:
    with pytest.raises(ValueError, match=f"every={every!r}: give a number of batches"):
        StructlogCB(every)


def test_a_format_and_a_logger_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        StructlogCB(format="json", logger=structlog.get_logger())


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format='xml': choose 'json' or 'console'"):
        StructlogCB(format="xml")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------- the console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def on_console(learn: TrainLearner, file: io.StringIO | None = None) -> list[str]:
    """The lines that a terminal would show, each without its end."""
    file = io.StringIO() if file is None else file
    learn.run(1, valid=False, cbs=StructlogCB(every=1, format="console", file=file))
    text = file.getvalue()
    assert text.endswith("\n")
    return text[:-1].split("\n")


def test_console_lines_are_for_people(backend: dict[str, Any]) -> None:
    learn = learner(1, 1, MetricsCB())
    lines = on_console(learn)
    assert learn.result is not None
    assert [line.split()[:4] for line in lines] == [
        [line.split()[0], "[info", "]", name]
        for line, name in zip(lines, ["fit_started", "batch", "epoch", "fit_ended"], strict=True)
    ]
    assert all(f"run_id={learn.result.run_id}" in line for line in lines)
    assert "phase=train epoch=0 status=completed loss=" in lines[2]


def test_the_console_has_colours_on_a_terminal_only() -> None:
    assert not any("\x1b" in line for line in on_console(learner(1)))
    assert all("\x1b[" in line for line in on_console(learner(1), Terminal()))


EVIL = [
    "a\n2026-01-01T00:00:00 [info     ] fit_ended  status=completed",
    "a\r\nforged",
    "\rforged over the line",
    "\x1b[2J\x1b[31mred",
    "\x9b31mred",
    "line\u2028separator\u2029s\x85",
    "\x00\x07\x08\x7f",
    "\u202egnitirw desrever",
    "\ud800",
]


def assert_harmless(lines: list[str], n: int) -> None:
    assert len(lines) == n
    assert all(line.isprintable() for line in lines), lines


@pytest.mark.parametrize("text", EVIL)
def test_no_text_can_forge_a_console_line(text: str) -> None:
    """In a reason, a metric's name, its value, a context variable's value and name."""
    learn = learner(1)

    @learn.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        learn.record[text] = text
        learn.record["list"] = [text, {text: text}]
        learn.record["exception"] = text  # names that a renderer would give a line of their own
        learn.record["stack"] = text

    @learn.on(CleanupEpoch)
    def leave(event: CleanupEpoch) -> None:
        raise CancelFitException(text)

    class Shown:
        def __repr__(self) -> str:
            return text

    with structlog.contextvars.bound_contextvars(
        **{f"name {text}": text, "object": Shown(), "exception": text, "stack": text}
    ):
        lines = on_console(learn)
    assert_harmless(lines, 4)
    escaped = text.encode("unicode_escape").decode()
    assert learn.result is not None
    assert learn.result.reason == text
    assert escaped.replace("\\", "") in lines[-1].replace("\\", "")  # it is still there to read


@pytest.mark.parametrize("text", EVIL)
def test_no_text_can_forge_a_line_of_json(text: str) -> None:
    learn = learner(1)

    @learn.on(AfterEpoch)
    def leave(event: AfterEpoch) -> None:
        learn.record[text] = text
        raise CancelFitException(text)

    with structlog.contextvars.bound_contextvars(**{text: text, "other": text}):
        lines = logged(learn, valid=False)
    assert [line["event"] for line in lines] == ["fit_started", "epoch", "fit_ended"]
    assert [line["other"] for line in lines] == [text] * 3
    assert lines[1][text] == lines[1]["reason"] == lines[2]["reason"] == text


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters()), st.text(st.characters()))
def test_any_text_at_all_stays_on_its_console_line(name: str, text: str) -> None:
    learn = learner(1)
    learn.subscribe(AfterEpoch, lambda event: learn.record.update({f"m{name}": text}))
    assert_harmless(on_console(learn), 4)


def test_a_metric_named_like_a_traceback_does_not_end_the_logging() -> None:
    learn = learner(1)
    learn.subscribe(AfterEpoch, lambda e: learn.record.update(exception=0.5, stack=[1], exc_info=1))
    lines = on_console(learn)
    assert_harmless(lines, 4)
    assert "metric_exception=0.5 metric_stack=[1] metric_exc_info=1" in lines[2]

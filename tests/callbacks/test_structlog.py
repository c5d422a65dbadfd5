"""StructlogCB: one line per fact, valid JSON whatever the values, while the training runs."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import re
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog
import torch
from eventrain.callbacks import MetricsCB, ProgressCB, StructlogCB
from eventrain.engine import TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeFit,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
    CleanupFit,
    Event,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from rich.console import Console
from structlog.contextvars import bound_contextvars, get_contextvars, merge_contextvars
from structlog.testing import LogCapture, capture_logs

from tests.support.reporting import line_learner as learner
from tests.support.reporting import parse_json
from tests.support.waiting import GUARD

Batches = list[tuple[torch.Tensor, torch.Tensor]]
Line = dict[str, Any]
SCHEMA = Path(__file__).parents[2] / "docs" / "record.schema.json"
VALID = Draft202012Validator(json.loads(SCHEMA.read_text()))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def parse(text: str) -> list[Line]:
    """The lines, each strict JSON that the schema accepts."""
    assert text.endswith("\n")
    lines = [parse_json(line) for line in text.splitlines()]
    for line in lines:
        VALID.validate(line)
    return lines


def logged(learn: TrainLearner, every: int = 100, **fit: Any) -> list[Line]:
    """The lines of one more fit, as JSON."""
    file = io.StringIO()
    log = StructlogCB(every, format="json", file=file)
    learn.run(**{"n_epochs": 1, "cbs": log, **fit})
    return parse(file.getvalue())


# ------------------------------------------------------------------------------------ the lines


def test_every_line_is_a_record_and_its_level(backend: dict[str, Any]) -> None:
    """G16: see test_records.py for what is in them."""
    learn = learner(5, 2, MetricsCB())
    lines = logged(learn, every=2, n_epochs=2, **backend)
    assert [(line["event"], line["level"]) for line in lines] == [
        ("fit_started", "info"),
        *[(name, "info") for name in ("batch", "batch", "epoch", "epoch")],
        *[(name, "info") for name in ("batch", "batch", "batch", "epoch", "epoch")],
        ("fit_ended", "info"),
    ]
    for line in lines:
        assert list(line)[:4] == ["event", "schema_version", "timestamp", "run_id"]
        assert list(line)[-1] == "level"
    assert learn.result is not None
    assert {line["run_id"] for line in lines} == {learn.result.run_id}


def test_too_many_lines_are_left_out_by_number_and_by_time() -> None:
    file = io.StringIO()
    log = StructlogCB(2, "json", file, every_seconds=3600)
    learner(6, 1, log).run(2)
    assert [line["iter"] for line in parse(file.getvalue()) if line["event"] == "batch"] == [1]


def test_what_is_cancelled_is_a_warning(backend: dict[str, Any]) -> None:
    learn = learner()

    @learn.on(AfterBatch)
    def too_bad(event: AfterBatch) -> None:
        if (event.epoch, event.training) == (0, True):
            raise CancelEpochException("this epoch")
        raise CancelFitException("the whole fit")

    lines = logged(learn, n_epochs=3, **backend)
    assert [(line["event"], line["level"], line.get("reason")) for line in lines] == [
        ("fit_started", "info", None),
        ("epoch", "warning", "this epoch"),
        ("epoch", "warning", "the whole fit"),
        ("fit_ended", "warning", "the whole fit"),
    ]


def test_what_failed_is_an_error(backend: dict[str, Any]) -> None:
    learn = learner()

    @learn.on(AfterBatch)
    def broken(event: AfterBatch) -> None:
        if not event.training:
            raise KeyError("broken")

    file = io.StringIO()
    with pytest.raises(KeyError, match="broken"):
        learn.run(1, cbs=StructlogCB(format="json", file=file), **backend)
    assert [(line["event"], line["level"]) for line in parse(file.getvalue())] == [
        ("fit_started", "info"),
        ("epoch", "info"),
        ("epoch", "error"),
        ("fit_ended", "error"),
    ]


def test_a_number_that_is_not_finite_does_not_break_the_line() -> None:
    """G16: null, and named; a context variable of the host's too."""
    learn = learner(1, 1, MetricsCB(), loss_func=lambda p, y: p.mean() * math.nan)
    with bound_contextvars(budget=math.inf, limits=(1, [-math.inf])):
        started, batch, epoch, _ = logged(learn, every=1, valid=False)
    assert (started["budget"], started["limits"]) == (None, [1, [None]])
    assert (batch["loss"], batch["nonfinite"]) == (None, {"loss": "nan"})
    assert (epoch["metrics"], epoch["nonfinite"]) == ({"loss": None}, {"metrics.loss": "nan"})


values = st.none() | st.floats() | st.integers() | st.text() | st.lists(st.floats(), max_size=2)
OWN = ["event", "level", "run_id", "seconds", "who", "reason", "nonfinite"]
names = st.text() | st.sampled_from([*OWN, "exc_info", "self"])


@settings(max_examples=60)
@given(
    st.dictionaries(names, values, max_size=4),
    st.dictionaries(names, values, max_size=4),
    st.text(min_size=1),
    st.text(),
)
def test_a_line_is_valid_json_whatever_is_in_it(
    metrics: dict[str, Any], context: dict[str, Any], run_id: str, reason: str
) -> None:
    """G16: metrics, context variables, run id and reason; the line's own keys stay its own."""
    metrics = {name: value for name, value in metrics.items() if name not in ("epoch", "train")}
    learn = learner(1)

    @learn.on(AfterEpoch)
    def leave(event: AfterEpoch) -> None:
        learn.record.update(metrics)
        raise CancelFitException(reason)

    with bound_contextvars(**context):
        lines = logged(learn, valid=False, run_id=run_id)
    assert [line["event"] for line in lines] == ["fit_started", "epoch", "fit_ended"]
    assert [line["level"] for line in lines] == ["info", "warning", "warning"]
    assert {line["run_id"] for line in lines} == {run_id}
    assert {line["reason"] for line in lines[1:]} == {reason}
    assert set(lines[1]["metrics"]) == set(metrics)
    for line in lines:
        assert set(context) - {*OWN} <= set(line)
        assert ("reason" in line, "who" in line) == (line["event"] != "fit_started",) * 2


# ------------------------------------------------------------------- the host's own configuration


async def test_the_hosts_context_variables_are_in_every_line_and_kept() -> None:
    file = io.StringIO()
    log = StructlogCB(every=1, format="json", file=file)
    with bound_contextvars(request="r1"):
        await learner(1).fit(1, cbs=log)
        assert get_contextvars() == {"request": "r1"}
    assert get_contextvars() == {}
    assert [(line["event"], line["request"]) for line in parse(file.getvalue())] == [
        ("fit_started", "r1"),
        ("batch", "r1"),
        ("epoch", "r1"),
        ("epoch", "r1"),
        ("fit_ended", "r1"),
    ]


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
    """And NaN is not a number there either, whatever it renders with."""
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


@pytest.mark.parametrize("format", ["json", "console"])
def test_lines_go_to_what_is_standard_error_when_they_are_written(
    format: Any,  # noqa: A002
) -> None:
    """A progress bar, a capture of a test or a notebook replaces it after the callback is made."""
    files = [io.StringIO(), Terminal(), io.StringIO()]
    with contextlib.redirect_stderr(files[0]):
        learn = learner(1, 1, StructlogCB(format=format))
    files[0].close()
    for file in files[1:]:
        with contextlib.redirect_stderr(file):
            learn.run(1)
        assert [name in file.getvalue() for name in ("fit_started", "fit_ended")] == [True] * 2
    assert ["\x1b[" in file.getvalue() for file in files[1:]] == [format == "console", False]


def test_a_process_without_a_standard_error_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under pythonw, or as a service of Windows."""
    monkeypatch.setattr("sys.stderr", None)
    for name in ("json", "console"):
        learn = learner(1, 1, StructlogCB(format=name))  # type: ignore[arg-type]
        with capture_logs() as logs:
            assert learn.run(1).status == "completed"
        assert logs == []


def test_lines_are_printed_above_a_progress_bar_not_into_it() -> None:
    """As it redirects standard error while it draws."""
    screen = Terminal()
    with contextlib.redirect_stderr(screen):
        log = StructlogCB(every=1, format="json")
        console = Console(file=screen, force_terminal=True, width=2000)  # or it breaks them
        learner(3, 2).run(1, cbs=[log, ProgressCB(console)])
    # What follows the codes that erase the bars.
    lines = [line.rpartition("\x1b[2K")[2] for line in screen.getvalue().split("\n")]
    found = [line for line in lines if "schema_version" in line]
    assert len(found) == 7
    assert all(line.startswith("{") and line.rstrip().endswith("}") for line in found)


def test_the_time_of_a_record_is_not_lost_to_the_hosts_own_stamper() -> None:
    """Which has the time at which the line is written, in a format of its own."""
    file = io.StringIO()
    render = [structlog.processors.TimeStamper("%Y"), structlog.processors.JSONRenderer()]
    logger = structlog.wrap_logger(structlog.WriteLogger(file), processors=render)
    structlog.configure(processors=render, logger_factory=structlog.WriteLoggerFactory(file))
    learn = learner(1)
    with record_events(learn) as events:
        for log in (StructlogCB(logger=logger), StructlogCB()):
            learn.run(1, valid=False, cbs=log)
    lines = [parse_json(line) for line in file.getvalue().splitlines()]
    emitted = [e.time for e in events if isinstance(e, BeforeFit | CleanupEpoch | CleanupFit)]
    times = [datetime.fromisoformat(line["emitted_at"]).timestamp() for line in lines]
    assert times == pytest.approx(emitted, abs=2e-3)
    assert {len(line["timestamp"]) for line in lines} == {4}


def test_a_host_may_keep_the_time_of_the_record() -> None:
    file = io.StringIO()
    render = [structlog.processors.MaybeTimeStamper("iso"), structlog.processors.JSONRenderer()]
    logger = structlog.wrap_logger(structlog.WriteLogger(file), processors=render)
    learner(1).run(1, cbs=StructlogCB(logger=logger))
    for line in parse(file.getvalue()):
        assert line["timestamp"] == line["emitted_at"]


def test_a_number_that_is_not_a_count_or_a_time_is_refused() -> None:
    with pytest.raises(ValueError, match="every=-1: give a number of batches"):
        StructlogCB(-1)
    with pytest.raises(ValueError, match="every_seconds=-1: give seconds"):
        StructlogCB(every_seconds=-1)


def test_a_format_and_a_logger_are_refused() -> None:
    with pytest.raises(ValueError, match="not both"):
        StructlogCB(format="json", logger=structlog.get_logger())


@pytest.mark.parametrize("logger", ["train", 5, print])
def test_an_object_that_is_not_a_logger_is_refused(logger: Any) -> None:
    with pytest.raises(TypeError, match=f"logger={re.escape(repr(logger))}: give a logger"):
        StructlogCB(logger=logger)


def test_a_file_without_a_format_is_refused() -> None:
    with pytest.raises(ValueError, match="a file needs a format: 'json' or 'console'"):
        StructlogCB(file=io.StringIO())


async def test_a_logger_with_async_methods_is_awaited() -> None:
    class Slow:
        async def info(self, event: str, **record: Any) -> None:
            await anyio.lowlevel.checkpoint()
            seen.append(event)

        warning = error = info

    seen: list[str] = []
    await learner(1, 1).fit(1, cbs=StructlogCB(logger=Slow()))
    assert seen == ["fit_started", "epoch", "epoch", "fit_ended"]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="format='xml': choose 'json' or 'console'"):
        StructlogCB(format="xml")  # type: ignore[arg-type]


# ------------------------------------------------------------------ the standard library's logging


class KeepHandler(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record)


@pytest.fixture
def host() -> Iterator[tuple[logging.Logger, KeepHandler]]:
    """A logger of the host, and what keeps its records."""
    logger, handler = logging.getLogger("host.training"), KeepHandler()
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield logger, handler
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


Host = tuple[logging.Logger, KeepHandler]


def test_a_logger_of_the_standard_library_gets_lines_of_json(
    host: Host, backend: dict[str, Any]
) -> None:
    logger, handler = host
    learn = learner(2, 1, MetricsCB(), StructlogCB(every=2, logger=logger))
    with bound_contextvars(request="r1", budget=math.inf):
        result = learn.run(1, **backend)
    assert [(record.name, record.levelname) for record in handler.kept] == [
        ("host.training", "INFO")
    ] * 5
    lines = parse("".join(f"{record.getMessage()}\n" for record in handler.kept))
    assert [line["event"] for line in lines] == [
        "fit_started",
        "batch",
        "epoch",
        "epoch",
        "fit_ended",
    ]
    assert {(line["run_id"], line["request"]) for line in lines} == {(result.run_id, "r1")}
    assert all(line["budget"] is None for line in lines)
    assert [record.eventrain for record in handler.kept] == lines  # type: ignore[attr-defined]


def test_an_adapter_of_a_logger_is_served_too(host: Host) -> None:
    logger, handler = host
    learn = learner(1, 1)
    learn.run(1, cbs=StructlogCB(logger=logging.LoggerAdapter(logger, {"job": "j1"})))
    assert [record.job for record in handler.kept] == ["j1"] * 4  # type: ignore[attr-defined]
    lines = parse("".join(f"{record.getMessage()}\n" for record in handler.kept))
    assert [record.eventrain for record in handler.kept] == lines  # type: ignore[attr-defined]
    assert [line["event"] for line in lines] == ["fit_started", "epoch", "epoch", "fit_ended"]


def test_its_levels_are_those_of_how_it_ended(host: Host) -> None:
    logger, handler = host
    learn = learner(1, 1, StructlogCB(logger=logger))

    @learn.on(AfterEpoch)
    def leave(event: AfterEpoch) -> None:
        if event.training:
            raise CancelEpochException("enough")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        learn.run(1)
    levels = [(r.eventrain["event"], r.levelno) for r in handler.kept]  # type: ignore[attr-defined]
    assert levels == [
        ("fit_started", logging.INFO),
        ("epoch", logging.WARNING),
        ("epoch", logging.ERROR),
        ("fit_ended", logging.ERROR),
    ]


def test_its_own_level_decides_what_it_takes(host: Host) -> None:
    logger, handler = host
    logger.setLevel(logging.WARNING)
    learn = learner(1, 1, StructlogCB(logger=logger))
    learn.run(1)
    assert handler.kept == []
    learn.on(AfterEpoch)(lambda event: learn.stop() and None)
    learn.run(1, valid=False)
    (record,) = handler.kept
    assert record.eventrain["event"] == "fit_ended"  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", ["100 % done", "%s %d %(name)s", "{} {0}", "%"])
def test_a_percent_sign_formats_nothing(host: Host, text: str) -> None:
    logger, handler = host
    learn = learner(1, 1, StructlogCB(logger=logger))

    @learn.on(AfterEpoch)
    def leave(event: AfterEpoch) -> None:
        learn.record[text] = 1
        raise CancelFitException(text)

    learn.run(1)
    _, *lines = parse("".join(f"{record.getMessage()}\n" for record in handler.kept))
    assert [line["reason"] for line in lines] == [text, text]
    assert lines[0]["metrics"] == {text: 1}


def test_it_reaches_the_hosts_handlers_in_the_hosts_format(monkeypatch: pytest.MonkeyPatch) -> None:
    file, logger = io.StringIO(), logging.getLogger("host.other")
    level = logging.root.level
    with monkeypatch.context() as fresh:  # a root logger as a process has it at its start
        fresh.setattr(logging.root, "handlers", [])
        logging.basicConfig(stream=file, level=logging.INFO, format="%(levelname)s:%(message)s")
        learner(1).run(1, cbs=StructlogCB(logger=logger))
        logging.root.setLevel(level)
    lines = file.getvalue().splitlines()
    assert all(line.startswith("INFO:") for line in lines)
    assert [line["event"] for line in parse(file.getvalue().replace("INFO:", ""))] == [
        "fit_started",
        "epoch",
        "epoch",
        "fit_ended",
    ]


def test_the_hosts_logging_is_left_as_it_is(host: Host) -> None:
    """G7: no handler, level, logger or record factory comes or changes."""
    logger, handler = host

    def all_of_it() -> dict[str, Any]:
        loggers = {"root": logging.root, **logging.root.manager.loggerDict}
        return {
            "factory": logging.getLogRecordFactory(),
            "class": logging.getLoggerClass(),
            **{
                name: (list(one.handlers), list(one.filters), one.level, one.propagate)
                for name, one in loggers.items()
                if isinstance(one, logging.Logger)
            },
        }

    learner(1).run(1)  # what others set up at their first use is not ours
    before = all_of_it()
    learner(1).run(1, cbs=StructlogCB(every=1, logger=logger))
    assert all_of_it() == before
    assert len(handler.kept) == 5


# -------------------------------------------------------- the run's id in what receivers log


@pytest.fixture
def capture() -> LogCapture:
    """What anyone logs through the host's structlog, with the context variables."""
    capture = LogCapture()
    structlog.configure(processors=[merge_contextvars, capture])
    return capture


def test_what_receivers_log_has_the_runs_id(capture: LogCapture, backend: dict[str, Any]) -> None:
    """Plain and async ones, from the first event to the last, whatever their order."""
    learn = learner(1)

    @learn.on(Event, order=-1e9)
    def plain(event: Event) -> None:
        structlog.get_logger().info("plain", on=type(event).__name__)

    @learn.on(Event)
    async def asynchronous(event: Event) -> None:
        structlog.get_logger().info("async", on=type(event).__name__)

    log = StructlogCB(format="json", file=io.StringIO())
    result = learn.run(1, valid=False, cbs=log, **backend)
    told = [(line["event"], line["on"]) for line in capture.entries]
    assert told[:2] == [("plain", "BeforeFit"), ("async", "BeforeFit")]
    assert told[-2:] == [("plain", "CleanupFit"), ("async", "CleanupFit")]
    assert {line["run_id"] for line in capture.entries} == {result.run_id}

    capture.entries.clear()
    learn.run(1, valid=False, **backend)
    assert capture.entries
    assert not any("run_id" in line for line in capture.entries)


async def test_the_host_keeps_its_own_context_during_the_fit_and_after() -> None:
    learn = learner(3, 2, StructlogCB(format="json", file=io.StringIO()))
    inside: list[dict[str, Any]] = []
    beside: list[dict[str, Any]] = []
    own = {"request": "r1", "run_id": "the host's"}
    learn.on(BeforeBatch)(lambda event: inside.append(get_contextvars()))
    learn.observe(lambda event: beside.append(get_contextvars()), BeforeBatch, CleanupFit)
    with bound_contextvars(**own), anyio.fail_after(GUARD):
        async with learn.events(BeforeBatch) as stream, anyio.create_task_group() as tasks:
            tasks.start_soon(learn.fit)
            beside.extend([get_contextvars() async for _ in stream])
        beside.append(get_contextvars())
    assert inside == [{**own, "run_id": learn.run_id}] * 5
    assert beside == [own] * (6 + 5 + 1)
    assert get_contextvars() == {}


async def test_fits_at_the_same_time_have_each_their_own(capture: LogCapture) -> None:
    together = threading.Barrier(2)
    learners = [learner(1, 1, StructlogCB(format="json", file=io.StringIO())) for _ in range(2)]

    def follow(n: int, learn: TrainLearner) -> None:
        learn.on(BeforeFit)(lambda event: together.wait(GUARD) and None)

        @learn.on(BeforeBatch)
        async def tell(event: BeforeBatch) -> None:
            structlog.get_logger().info("told", by=n, right=event.run_id)

        @learn.on(AfterBatch)
        def tell_too(event: AfterBatch) -> None:
            structlog.get_logger().info("told", by=n, right=event.run_id)

    for n, learn in enumerate(learners):
        follow(n, learn)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            for n, learn in enumerate(learners):
                tasks.start_soon(lambda learn=learn, n=n: learn.fit(run_id=f"run {n}"))
    told = [line for line in capture.entries if line["event"] == "told"]
    assert sorted((line["by"], line["run_id"]) for line in told) == [
        *[(0, "run 0")] * 4,
        *[(1, "run 1")] * 4,
    ]
    assert all(line["run_id"] == line["right"] for line in told)


# ---------------------------------------------------------------------------------- the console


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
    assert "phase=train epoch=0 status=completed metrics={'loss': " in lines[2]


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

    with bound_contextvars(
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

    with bound_contextvars(**{text: text, "other": text}):
        lines = logged(learn, valid=False)
    assert [line["event"] for line in lines] == ["fit_started", "epoch", "fit_ended"]
    assert [line["other"] for line in lines] == [text] * 3
    assert lines[1]["metrics"] == {text: text}
    assert lines[1][text] == lines[1]["reason"] == lines[2]["reason"] == text


@pytest.mark.parametrize("text", EVIL)
def test_a_logger_of_the_host_gets_no_control_characters(host: Host, text: str) -> None:
    """Structlog's or the standard library's: in a reason, a metric, its name, the run's id."""
    logger, handler = host
    learn = learner(1)

    @learn.on(AfterEpoch)
    def leave(event: AfterEpoch) -> None:
        learn.record[text] = math.nan
        learn.record["list"] = [text, {text: text}]
        raise CancelFitException(text)

    with capture_logs() as lines:
        learn.run(1, cbs=StructlogCB(), run_id=text)
    learn.run(1, cbs=StructlogCB(logger=logger), run_id=text)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    dicts = [record.eventrain for record in handler.kept]  # type: ignore[attr-defined]
    for started, epoch, ended in (lines, dicts):
        assert {started["run_id"], epoch["run_id"], ended["run_id"]} == {shown}
        assert epoch["reason"] == ended["reason"] == shown != text
        assert epoch["metrics"] == {shown: None, "list": [shown, {shown: shown}]}
        assert epoch["nonfinite"] == {f"metrics.{shown}": "nan"}
    assert all(record.getMessage().isprintable() for record in handler.kept)
    assert learn.result is not None
    assert (learn.result.run_id, learn.result.reason) == (text, text)  # the run has its own


@settings(max_examples=40)
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
    assert "metrics={'exception': 0.5, 'stack': [1], 'exc_info': 1}" in lines[2]

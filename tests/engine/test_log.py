"""The engine's own log lines are written, or given up, whatever the host's structlog does."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import structlog
from eventrain.engine import TrainLearner, log
from eventrain.events import BeforeFit, CancelFitException
from structlog.testing import capture_logs

from tests.support.waiting import GUARD, in_a_thread, wait_until


class ClosedPipe:
    """What sys.stdout is when its reader has gone."""

    def write(self, text: str) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    def flush(self) -> None: ...


class ClosedFile(ClosedPipe):
    def write(self, text: str) -> None:
        raise ValueError("I/O operation on closed file.")


def raising(error: BaseException) -> Any:
    def processor(logger: Any, method: str, record: Any) -> Any:
        raise error

    return processor


FAILING: dict[str, Callable[[], object]] = {
    "closed pipe": lambda: structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(ClosedPipe())  # type: ignore[arg-type]
    ),
    "closed file": lambda: structlog.configure(
        logger_factory=structlog.PrintLoggerFactory(ClosedFile())  # type: ignore[arg-type]
    ),
    "a bug in a processor": lambda: structlog.configure(processors=[raising(KeyError("x"))]),
    "a cancel in a processor": lambda: structlog.configure(
        processors=[raising(CancelFitException("x"))]
    ),
    "a cancelled processor": lambda: structlog.configure(
        processors=[raising(asyncio.CancelledError())]
    ),
    "not a logger": lambda: structlog.configure(logger_factory=lambda *_: object()),
}


@pytest.fixture(params=FAILING)
def _failing(request: pytest.FixtureRequest) -> None:
    FAILING[request.param]()


def stdlib_logger(lines: list[str]) -> logging.Logger:
    """A logger of the standard library that keeps its lines."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.Logger("host")
    logger.addHandler(Handler())
    return logger


def with_async_methods(lines: list[str]) -> None:
    logger = stdlib_logger(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)
        structlog.configure(
            processors=[structlog.processors.JSONRenderer()],
            logger_factory=lambda *_: logger,
            wrapper_class=structlog.stdlib.AsyncBoundLogger,
        )


def with_an_async_logger_behind_it(lines: list[str]) -> None:
    class Logger:
        async def warning(self, text: str) -> None:
            await anyio.lowlevel.checkpoint()
            lines.append(text)

    structlog.configure(
        processors=[structlog.processors.JSONRenderer()], logger_factory=lambda *_: Logger()
    )


ASYNC = pytest.mark.parametrize("configure", [with_async_methods, with_an_async_logger_behind_it])


@pytest.mark.usefixtures("_failing")
def test_an_error_of_the_logger_is_not_raised_and_the_standard_library_gets_the_line(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """G20."""
    log.warning("disk_full", path="/data")
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("eventrain", "WARNING")
    assert record.getMessage().startswith("disk_full {'path': '/data'} (structlog failed: ")


@pytest.mark.usefixtures("_failing")
async def test_nor_is_it_raised_on_an_event_loop(caplog: pytest.LogCaptureFixture) -> None:
    log.error("observer_failed", exc_info=ZeroDivisionError("the bug"))
    await log.written()
    (record,) = caplog.records
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


def test_a_standard_library_that_raises_too_is_not_heard_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("no disk")

    FAILING["closed pipe"]()
    monkeypatch.setattr(logging.Logger, "log", fail)
    log.warning("disk_full")


@ASYNC
def test_an_async_logger_writes_the_line_where_no_event_loop_runs(
    configure: Callable[[list[str]], None],
) -> None:
    lines: list[str] = []
    configure(lines)
    log.warning("disk_full", path="/data")
    in_a_thread(lambda: log.warning("disk_fuller"))
    assert lines == ['{"path": "/data", "event": "disk_full"}', '{"event": "disk_fuller"}']


@ASYNC
async def test_an_async_logger_writes_the_line_on_any_event_loop(
    configure: Callable[[list[str]], None],
) -> None:
    lines: list[str] = []
    configure(lines)
    with anyio.fail_after(GUARD):
        log.warning("disk_full", path="/data")
        await anyio.to_thread.run_sync(log.warning, "disk_fuller")
        await log.written()
    assert lines == ['{"path": "/data", "event": "disk_full"}', '{"event": "disk_fuller"}']


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_is_to_end_the_program_passes(error: type[BaseException]) -> None:
    structlog.configure(processors=[raising(error("now"))])
    with pytest.raises(error, match="now"):
        log.warning("disk_full")


@pytest.fixture
def blocked(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A host whose logger blocks, as a full pipe does, until the event is set."""
    goes_on = threading.Event()

    def processor(logger: Any, method: str, record: Any) -> Any:
        goes_on.wait(GUARD)
        return record

    structlog.configure(processors=[processor, *structlog.get_config()["processors"]])
    monkeypatch.setattr(log, "PATIENCE", 0.01)
    monkeypatch.setattr(log, "_dropped", 0)
    yield goes_on
    goes_on.set()
    wait_until(lambda: not line_threads())


def line_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "eventrain-log"]


async def test_a_logger_that_blocks_is_left_and_writes_the_lines_in_order_later(
    blocked: threading.Event,
) -> None:
    lines: list[str] = []
    logger = stdlib_logger(lines)
    structlog.configure(logger_factory=lambda *_: logger)
    with anyio.fail_after(GUARD):
        for number in range(3):
            log.warning(f"line {number}")
        assert lines == []
        assert len(line_threads()) == 3
        blocked.set()
        await anyio.to_thread.run_sync(wait_until, lambda: len(lines) == 3)
    assert [line.partition("line ")[2][0] for line in lines] == ["0", "1", "2"]


def test_lines_and_threads_behind_one_that_blocks_are_bounded(
    blocked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G13."""
    monkeypatch.setattr(log, "MAX_WAITING", 4)
    for _ in range(20):
        log.warning("again")
    assert len(line_threads()) == 4


def test_the_next_line_says_how_many_were_dropped(
    blocked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were dropped without a count."""
    monkeypatch.setattr(log, "MAX_WAITING", 2)
    with capture_logs([*structlog.get_config()["processors"][:1]]) as lines:
        for number in range(5):
            log.warning(f"line {number}")
        blocked.set()
        wait_until(lambda: not line_threads())
        log.warning("the next", path="/data")
        log.warning("the one after")
    assert [(line["event"], line.get("lines_dropped")) for line in lines] == [
        ("line 0", None),
        ("line 1", None),
        ("the next", 3),
        ("the one after", None),
    ]


async def test_a_logger_that_needs_the_event_loop_writes_before_the_fit_returns(
    learner: TrainLearner,
) -> None:
    """G6: each line on the loop held it for a second, as the queue was read on that loop."""
    asked, answered = threading.Semaphore(0), threading.Event()
    events: list[str] = []

    def processor(logger: Any, method: str, record: Any) -> Any:
        asked.release()
        answered.wait(GUARD)
        events.append(record["event"])
        raise structlog.DropEvent

    async def answer() -> None:
        while not asked.acquire(blocking=False):
            await anyio.sleep(0.001)
        answered.set()

    def fail(event: object) -> None:
        raise ZeroDivisionError

    structlog.configure(processors=[processor])
    learner.observe(fail, BeforeFit)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks, learner.events(buffer=1):
            tasks.start_soon(answer)
            assert (await learner.fit()).status == "completed"
            assert events == ["observer_failed", "events_dropped"]


async def test_a_line_on_the_event_loop_does_not_wait_for_a_logger_that_blocks(
    blocked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G6."""
    monkeypatch.setattr(log, "PATIENCE", 2 * GUARD)
    with anyio.fail_after(GUARD):
        for _ in range(10):
            log.warning("again")
        assert len(line_threads()) == 10
        blocked.set()
        await log.written()
    assert line_threads() == []


async def test_only_the_first_fit_waits_for_a_logger_that_blocks(
    blocked: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.warning("disk_full")
    await log.written()
    monkeypatch.setattr(log, "PATIENCE", 2 * GUARD)
    with anyio.fail_after(GUARD):
        log.warning("disk_full")
        await log.written()
        await anyio.to_thread.run_sync(log.warning, "disk_full")
    assert len(line_threads()) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
async def test_what_is_to_end_the_program_passes_though_the_line_was_left(
    blocked: threading.Event, error: type[BaseException]
) -> None:
    structlog.configure(processors=[structlog.get_config()["processors"][0], raising(error("now"))])
    log.warning("disk_full")
    blocked.set()
    with pytest.raises(error, match="now"):
        await log.written()
    await log.written()


async def test_a_cancellation_while_a_fit_waits_for_its_lines_does_not_replace_its_error(
    blocked: threading.Event,
    learner: TrainLearner,
    anyio_backend_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G5: a native one, of which the wait is not shielded."""
    if anyio_backend_name == "trio":
        pytest.skip("trio has no native cancellation")
    monkeypatch.setattr(log, "PATIENCE", 2 * GUARD)
    waits = asyncio.Event()
    written = log.written

    async def wait() -> None:
        waits.set()
        await written()

    monkeypatch.setattr(log, "written", wait)

    def fail(event: object) -> None:
        raise ZeroDivisionError("the bug")

    learner.observe(fail, BeforeFit, on_error="raise")
    task = asyncio.ensure_future(learner.fit())
    await asyncio.wait_for(waits.wait(), GUARD)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(ZeroDivisionError, match="the bug"):
        await asyncio.wait_for(task, GUARD)


async def test_a_cancellation_while_a_completed_fit_waits_for_its_lines_is_not_swallowed(
    blocked: threading.Event,
    learner: TrainLearner,
    anyio_backend_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the caller handles another error."""
    if anyio_backend_name == "trio":
        pytest.skip("trio has no native cancellation")
    monkeypatch.setattr(log, "PATIENCE", 2 * GUARD)

    async def fit() -> None:
        try:
            raise ZeroDivisionError
        except ZeroDivisionError:
            await learner.fit()

    def fail(event: object) -> None:
        raise ZeroDivisionError

    learner.observe(fail, BeforeFit)
    task = asyncio.ensure_future(fit())
    while learner.result is None or not line_threads():
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, GUARD)
    assert learner.result.status == "completed"


def test_a_logger_may_log_through_the_engine() -> None:
    """Its line waits for the line before it, which is the one that logs."""
    events: list[str] = []

    def processor(logger: Any, method: str, record: Any) -> Any:
        if record["event"] == "outer":
            log.warning("inner")
        events.append(record["event"])
        raise structlog.DropEvent

    structlog.configure(processors=[processor])
    log.warning("outer")
    wait_until(lambda: not line_threads())
    assert events == ["outer", "inner"]


def test_lines_of_many_threads_are_all_written() -> None:
    with capture_logs() as lines:
        threads = [threading.Thread(target=log.warning, args=(f"{n}",)) for n in range(50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(int(line["event"]) for line in lines) == list(range(50))


def test_a_line_leaves_no_thread_behind() -> None:
    with capture_logs() as lines:
        for _ in range(10):
            log.info("again")
    assert len(lines) == 10
    assert line_threads() == []


def test_a_line_is_written_though_the_system_has_no_more_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    with capture_logs() as lines:
        log.info("data_path", path="tensors")
    assert lines == [{"event": "data_path", "path": "tensors", "log_level": "info"}]


def test_a_line_has_the_context_variables_of_the_caller() -> None:
    with (
        structlog.contextvars.bound_contextvars(request="r7"),
        capture_logs([structlog.contextvars.merge_contextvars]) as lines,
    ):
        log.info("data_path")
    assert lines == [{"event": "data_path", "request": "r7", "log_level": "info"}]

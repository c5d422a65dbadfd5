"""What reporters have in common: which rates and which runs they report; none harms a run."""

from __future__ import annotations

import io
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anyio
import pytest
from eventrain.callbacks import (
    LossCurveCB,
    MetricsCB,
    OpenTelemetryCB,
    ProgressCB,
    PrometheusCB,
    RecordCB,
    SchedulerCB,
    StructlogCB,
    SummaryCB,
    TensorBoardCB,
)
from eventrain.events import Callback, CleanupFit
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from prometheus_client import CollectorRegistry
from rich.console import Console
from structlog.testing import capture_logs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import optim
from torch.profiler import ProfilerActivity, profile

from tests.support.reporting import line_learner, parse_json
from tests.support.waiting import GUARD

Backend = dict[str, Any]


class KeepCB(RecordCB):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)


# ------------------------------------------------------------------------- the learning rate


RATES = [1.0, 0.1, 0.01]


def of_records(folder: Path) -> tuple[Callback, Callable[[], list[float]]]:
    keep = KeepCB(every=1)
    return keep, lambda: [r["lr"] for r in keep.records if r["event"] == "batch"]


def of_lines(folder: Path) -> tuple[Callback, Callable[[], list[float]]]:
    file = io.StringIO()

    def read() -> list[float]:
        lines = [parse_json(line) for line in file.getvalue().splitlines()]
        return [line["lr"] for line in lines if line["event"] == "batch"]

    return StructlogCB(every=1, format="json", file=file), read


def of_tensorboard(folder: Path) -> tuple[Callback, Callable[[], list[float]]]:
    def read() -> list[float]:
        accumulator = EventAccumulator(str(folder / "a"))
        accumulator.Reload()
        return [scalar.value for scalar in accumulator.Scalars("batch/lr")]

    return TensorBoardCB(folder, every=1), read


def of_prometheus(folder: Path) -> tuple[Callback, Callable[[], list[float]]]:
    seen = []

    class Seen(PrometheusCB):
        def write(self, record: dict[str, Any]) -> None:
            super().write(record)
            if record["event"] == "batch":
                rate = registry.get_sample_value("eventrain_learning_rate", {"phase": "train"})
                seen.append(rate)

    registry = CollectorRegistry()
    return Seen(registry, every=1, every_seconds=0), lambda: seen  # type: ignore[return-value]


def of_telemetry(folder: Path) -> tuple[Callback, Callable[[], list[float]]]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    def read() -> list[float]:
        spans = exporter.get_finished_spans()
        return [s.attributes["eventrain.lr"] for s in spans if s.name == "train batch"]  # type: ignore[index, misc]

    return OpenTelemetryCB(1, tracer_provider=provider), read


@pytest.mark.parametrize(
    "report", [of_records, of_lines, of_tensorboard, of_prometheus, of_telemetry]
)
def test_the_learning_rate_is_that_of_the_step_of_the_batch(
    report: Any, tmp_path: Path, backend: Backend
) -> None:
    """A scheduler has changed it for the next step by the time of AfterBatch."""
    callback, read = report(tmp_path)
    used: list[float] = []

    def noted(parameters: Any, lr: float) -> optim.Optimizer:
        opt = optim.SGD(parameters, lr)
        opt.register_step_pre_hook(lambda opt, *_: used.append(opt.param_groups[0]["lr"]))
        return opt

    scheduler = SchedulerCB(lambda opt: optim.lr_scheduler.StepLR(opt, 1, gamma=0.1))
    learner = line_learner(3, 1, scheduler, opt_func=noted, lr=1.0)
    learner.run(1, cbs=callback, run_id="a", **backend)
    assert used == pytest.approx(RATES)
    assert read() == pytest.approx(RATES)


# --------------------------------------------------------------------- which runs are reported


async def test_the_numbers_that_are_kept_are_those_of_fits(tmp_path: Path) -> None:
    """Not the loss of a test set, nor the rates that `lr_find` tries."""
    registry, metrics, exporter = (
        CollectorRegistry(),
        InMemoryMetricReader(),
        InMemorySpanExporter(),
    )
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    curve, keep, table, screen = LossCurveCB(), KeepCB(every=0), io.StringIO(), io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100)
    learner = line_learner(3, 2, MetricsCB())
    learner.add_cbs(
        [
            curve,
            keep,
            SummaryCB(table),
            ProgressCB(console),
            PrometheusCB(registry),
            OpenTelemetryCB(0, provider, MeterProvider([metrics])),
            TensorBoardCB(tmp_path),
        ]
    )

    def kept() -> list[Any]:
        found = list(registry.collect())
        samples = [(s.name, s.labels, s.value) for metric in found for s in metric.samples]
        return [
            [s for s in samples if not s[0].endswith("_created")],
            list(curve.train),
            list(curve.valid),
            table.getvalue(),
            screen.getvalue().count("completed"),
            sorted(path.name for path in tmp_path.iterdir()),
        ]

    with anyio.fail_after(GUARD):
        nothing = kept()
        await learner.validate()
        await learner.lr_find(max_epochs=1)
        await learner.get_preds()
        assert kept() == nothing
        await learner.fit(2, run_id="fit")
        before = kept()
        learner.dls.valid = [(x, y + 100) for x, y in learner.dls.valid]
        await learner.validate()
        await learner.get_preds()
        await learner.lr_find(max_epochs=1)
        assert kept() == before != nothing
    data: Any = metrics.get_metrics_data()
    points = {
        metric.name: sum(point.value for point in metric.data.data_points)
        for metric in data.resource_metrics[0].scope_metrics[0].metrics
        if metric.name in ("eventrain.fits", "eventrain.batches", "eventrain.samples")
    }
    assert points == {"eventrain.fits": 1, "eventrain.batches": 10, "eventrain.samples": 40}
    purposes = ["validate", "lr_find", "predict", "fit", "validate", "predict", "lr_find"]
    ended = [record["purpose"] for record in keep.records if record["event"] == "fit_ended"]
    assert ended == purposes
    spans = [span for span in exporter.get_finished_spans() if span.parent is None]
    assert [span.name for span in spans] == purposes


# ------------------------------------------------------------------------ a backend that fails


class Full(io.StringIO):
    """A disk that is full, or a pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise OSError(28, "No space left on device")

    def isatty(self) -> bool:
        return True


class BrokenExporter(InMemorySpanExporter):
    def export(self, spans: Any) -> Any:
        raise ConnectionError("no collector")


class BrokenLogger:
    def info(self, event: str, **record: Any) -> None:
        raise BrokenPipeError("nobody reads")

    warning = error = info


def closed() -> io.StringIO:
    file = io.StringIO()
    file.close()
    return file


def telemetry() -> OpenTelemetryCB:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(BrokenExporter()))
    return OpenTelemetryCB(1, tracer_provider=provider)


class BrokenPrometheus(PrometheusCB):
    def write(self, record: dict[str, Any]) -> None:
        raise RuntimeError("no registry")


class BrokenTensorBoard(TensorBoardCB):
    """Its folder is taken away as it begins."""

    def watcher(self, event: Any) -> Any:
        Path(self.log_dir).write_text("in the way")
        return super().watcher(event)


BROKEN: dict[str, Callable[[Path], Callback]] = {
    "a closed file": lambda folder: StructlogCB(1, "json", closed()),
    "a full disk": lambda folder: StructlogCB(1, "json", Full()),
    "a closed console": lambda folder: StructlogCB(1, "console", closed()),
    "a logger that raises": lambda folder: StructlogCB(1, logger=BrokenLogger()),
    "an exporter that raises": lambda folder: telemetry(),
    "a registry that raises": lambda folder: BrokenPrometheus(CollectorRegistry()),
    "a folder that is gone": lambda folder: BrokenTensorBoard(folder / "tb"),
    "a terminal that is gone": lambda folder: ProgressCB(Console(file=Full(), force_terminal=True)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_no_reporter_whose_backend_fails_changes_the_outcome(
    name: str, tmp_path: Path, backend: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """G20: the weights, the result and the error of the training are those without it."""

    def fitted(*cbs: Callback, fails: bool = False) -> tuple[Any, ...]:
        learner = line_learner(3, 2, MetricsCB())
        if fails:
            learner.on(CleanupFit)(lambda event: [][0])
        try:
            result = learner.run(2, cbs=cbs, **backend)
        except IndexError:
            result = learner.result  # type: ignore[assignment]
        return learner.model.weight.tolist(), result.status, result.history, result.steps

    with capture_logs():
        assert fitted(BROKEN[name](tmp_path)) == fitted()
    other = tmp_path / "other"
    other.mkdir()
    with capture_logs():
        assert fitted(BROKEN[name](other), fails=True) == fitted(fails=True)


# --------------------------------------------------------------------------- the host's event loop


def test_what_a_reporter_needs_is_imported_when_it_is_made() -> None:
    """G6: not on the host's event loop, in its first fit, where it would take up to 0.6 s."""
    program = """
        import asyncio, io, sys, tempfile, threading
        import torch
        from eventrain.callbacks import *
        from eventrain.engine import DataLoaders, TrainLearner
        from prometheus_client import CollectorRegistry
        from rich.console import Console

        batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        loop, imported = threading.get_ident(), []

        class Watch:
            def find_spec(self, name, path=None, target=None):
                if armed and threading.get_ident() == loop:
                    imported.append(name)

        async def main():
            global armed
            with tempfile.TemporaryDirectory() as folder:
                cbs = [MetricsCB(), TensorBoardCB(folder), LossCurveCB(), OpenTelemetryCB(1),
                       PrometheusCB(CollectorRegistry()), StructlogCB(1, "console", io.StringIO()),
                       ProgressCB(Console(file=io.StringIO(), force_terminal=True))]
                await TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches)).fit(1, valid=False)
                learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
                learner.add_cbs(cbs)
                armed = True
                await learner.fit(1)

        armed = False
        sys.meta_path.insert(0, Watch())
        asyncio.run(main())
        print(imported)
    """
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=GUARD,
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


# ----------------------------------------------------------------------------- torch.profiler


class ProfilerCB(Callback):
    """As docs/guides/logs.md has it."""

    def before_fit(self, event: Any) -> None:
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.profiler.__enter__()

    def cleanup_fit(self, event: CleanupFit) -> None:
        self.profiler.__exit__(None, None, None)


def test_a_profiler_that_a_callback_enters_records_the_training(backend: Backend) -> None:
    """It records the thread in which it is entered: around `run` that is not the fit's."""
    learner, profiled = line_learner(3, 2), ProfilerCB()
    learner.run(1, cbs=profiled, **backend)
    counts = {event.key: event.count for event in profiled.profiler.key_averages()}
    assert counts["aten::linear"] == 5
    assert counts["Optimizer.step#SGD.step"] == 3

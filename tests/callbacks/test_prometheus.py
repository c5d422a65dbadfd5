"""PrometheusCB: what a scraper reads is what the fit did."""

from __future__ import annotations

import gc
import math
import os
import re
import subprocess
import sys
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import PrometheusCB
from eventrain.callbacks.reporting.prometheus import MAX_METRICS
from eventrain.engine import DataLoaders
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeFit,
    CancelEpochException,
    CancelFitException,
    record_events,
)
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text
from structlog.testing import capture_logs

from tests.support.reporting import recording_learner
from tests.support.waiting import GUARD

Backend = dict[str, Any]
Page = dict[tuple[str, frozenset[tuple[str, str]]], float]
Scrape = Callable[[], Page]

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


class Current(CollectorRegistry):
    """What the endpoint serves: the registry of the test that runs."""

    registry: CollectorRegistry

    def collect(self) -> Iterable[Metric]:
        return self.registry.collect()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[tuple[int, Current]]:
    """prometheus_client's own server, once: it takes half a second to end."""
    current = Current()
    server, thread = start_http_server(0, "127.0.0.1", current)
    yield server.server_port, current
    server.shutdown()
    server.server_close()
    thread.join(GUARD)


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry()


@pytest.fixture
def scrape(endpoint: tuple[int, Current], registry: CollectorRegistry) -> Scrape:
    port, current = endpoint
    current.registry = registry
    return lambda: scraped(port)


def get(port: int, accept: str) -> str:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=30) as response:
        return str(response.read().decode())


def scraped(port: int) -> Page:
    """Every sample by name and labels; the two formats agree."""
    pages: list[Page] = []
    for accept, parse in (("text/plain", parse_text), (OPENMETRICS, parse_openmetrics)):
        families = list(parse(get(port, accept)))
        assert all(family.documentation for family in families)
        pages.append(
            {
                (sample.name, frozenset(sample.labels.items())): sample.value
                for family in families
                for sample in family.samples
                if not sample.name.endswith("_created")
            }
        )
    assert {key: repr(value) for key, value in pages[0].items()} == {
        key: repr(value) for key, value in pages[1].items()
    }
    return pages[0]


def at(page: Page, name: str, **labels: str) -> float:
    return page[f"eventrain_{name}", frozenset(labels.items())]


def names(page: Page) -> set[str]:
    return {name for name, _ in page}


def fits(page: Page) -> dict[str, float]:
    found = {s: at(page, "fits_total", status=s) for s in ("completed", "cancelled", "failed")}
    return {"running": at(page, "fits_running"), **found}


# ---------------------------------------------------------------------------- what is measured


def test_a_scrape_has_the_numbers_of_the_fit(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape, backend: Backend
) -> None:
    cb = PrometheusCB(registry, every_seconds=0)
    learner = recording_learner(dls, cb, accuracy=0.75)
    with record_events(learner) as events:
        result = learner.run(2, run_id="not-a-label", **backend)
        page = scrape()

    rows = {row["train"]: row for row in result.history}  # the last of each phase
    batch = [e for e in events if isinstance(e, AfterBatch) and e.training][-1]
    assert fits(page) == {"running": 0, "completed": 1, "cancelled": 0, "failed": 0}
    for phase, row, samples in (("train", rows["train"], 24), ("valid", rows["eval"], 16)):
        assert at(page, "epochs_total", phase=phase, status="completed") == result.epochs == 2
        assert at(page, "epochs_total", phase=phase, status="cancelled") == 0
        assert at(page, "samples_total", phase=phase) == samples
        assert at(page, "loss", phase=phase) == row["loss"]
        assert at(page, "metric", phase=phase, metric="accuracy") == 0.75
        assert at(page, "epoch_duration_seconds_count", phase=phase) == 2
        assert at(page, "epoch_duration_seconds_bucket", phase=phase, le="60.0") == 2
        assert 0 < at(page, "epoch_duration_seconds_sum", phase=phase) < result.seconds
    assert at(page, "batch_loss", phase="train") == batch.loss.item()
    assert at(page, "learning_rate", phase="train") == 0.01
    assert at(page, "samples_per_second", phase="train") > 0
    assert at(page, "metrics_left_out_total") == 0
    assert "not-a-label" not in repr(page)
    assert result.dropped == {}


def test_before_any_fit_there_are_zeros_and_no_made_up_values(
    registry: CollectorRegistry,
    scrape: Scrape,
) -> None:
    PrometheusCB(registry)
    page = scrape()
    assert set(page.values()) == {0}
    assert names(page) == {
        "eventrain_fits_running",
        "eventrain_fits_total",
        "eventrain_epochs_total",
        "eventrain_samples_total",
        "eventrain_epoch_duration_seconds_bucket",
        "eventrain_epoch_duration_seconds_count",
        "eventrain_epoch_duration_seconds_sum",
        "eventrain_metrics_left_out_total",
    }


async def test_a_scrape_during_the_fit_sees_it_run_and_its_samples_grow(
    make_batches: Callable[..., Any], registry: CollectorRegistry, scrape: Scrape
) -> None:
    learner = recording_learner(
        DataLoaders(make_batches(4)), PrometheusCB(registry, every=2, every_seconds=0)
    )
    seen: list[tuple[float, float]] = []

    @learner.on(BeforeBatch, where=lambda event: event.iter == 3)
    async def look(event: BeforeBatch) -> None:
        while not registry.get_sample_value("eventrain_samples_total", {"phase": "train"}):
            await anyio.lowlevel.checkpoint()
        page = await anyio.to_thread.run_sync(scrape)
        seen.append((at(page, "fits_running"), at(page, "samples_total", phase="train")))

    with anyio.fail_after(GUARD):
        await learner.fit(1, valid=False)
    page = scrape()
    assert seen == [(1, 8)]  # two batches of four have had a record
    assert at(page, "samples_total", phase="train") == 16
    assert fits(page)["running"] == 0


def test_counters_go_on_over_fits_and_gauges_show_the_last(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape
) -> None:
    learner = recording_learner(dls, PrometheusCB(registry))
    learner.run(1)
    result = learner.run(2, train=False)
    page = scrape()
    assert fits(page)["completed"] == 2
    assert at(page, "epochs_total", phase="train", status="completed") == 1
    assert at(page, "epochs_total", phase="valid", status="completed") == 3
    assert at(page, "samples_total", phase="valid") == 24
    assert at(page, "loss", phase="valid") == result.history[-1]["loss"]


@pytest.mark.parametrize(("every", "shown"), [(0, False), (3, True), (4, False)])
def test_only_every_nth_batch_is_looked_at_and_all_samples_are_counted(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape, every: int, shown: bool
) -> None:
    recording_learner(dls, PrometheusCB(registry, every=every, every_seconds=0)).run(1)
    page = scrape()
    gauges = {"eventrain_batch_loss", "eventrain_learning_rate", "eventrain_samples_per_second"}
    assert names(page) & gauges == (gauges if shown else set())
    assert at(page, "samples_total", phase="train") == 12


def test_numbers_that_are_not_finite_are_shown_and_what_is_no_number_is_not(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape, backend: Backend
) -> None:
    recorded = {
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "a.b": torch.tensor(math.nan),
        "count": 7,
        "huge": 10**400,
        "flag": True,
        "none": None,
        "text": "a",
        "list": [1.0, math.nan],
        "nested": {"b": math.nan},
    }
    learner = recording_learner(dls, PrometheusCB(registry, every_seconds=0), **recorded)
    with torch.no_grad():
        learner.model.weight.fill_(math.nan)
    learner.run(1, **backend)
    page = scrape()
    found = {
        dict(labels)["metric"]: value
        for (name, labels), value in page.items()
        if name == "eventrain_metric" and ("phase", "valid") in labels
    }
    expected = {"nan": math.nan, "up": math.inf, "down": -math.inf, "a.b": math.nan, "count": 7}
    assert {k: repr(v) for k, v in found.items()} == {
        k: repr(float(v)) for k, v in expected.items()
    }
    assert math.isnan(at(page, "loss", phase="train"))
    assert math.isnan(at(page, "batch_loss", phase="train"))


def test_any_name_of_a_metric_reaches_the_scraper(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape
) -> None:
    odd = 'say "no"\n\\ ünd € {x="y"} 1'
    recording_learner(dls, PrometheusCB(registry), **{odd: 1.0, "half \ud800": 2.0, "": 3.0}).run(1)
    page = scrape()
    assert at(page, "metric", phase="train", metric=odd) == 1
    assert at(page, "metric", phase="train", metric="half \\ud800") == 2
    assert at(page, "metric", phase="train", metric="") == 3


def test_names_of_metrics_are_bounded_and_what_is_left_out_is_counted(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape
) -> None:
    learner = recording_learner(dls, PrometheusCB(registry))
    numbers = iter(range(10_000))

    @learner.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        event.learner.record |= {"known": 1.0 + event.epoch, f"new {next(numbers)}": 1.0}

    learner.run(MAX_METRICS + 9, valid=False)
    page = scrape()
    shown = [dict(labels)["metric"] for name, labels in page if name == "eventrain_metric"]
    assert sorted(shown) == sorted(["known", *(f"new {i}" for i in range(MAX_METRICS - 1))])
    assert at(page, "metric", phase="train", metric="known") == MAX_METRICS + 9
    assert at(page, "metrics_left_out_total") == 10


# ------------------------------------------------------------------------- however the fit ends


def test_a_cancelled_fit_no_longer_runs(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape, backend: Backend
) -> None:
    learner = recording_learner(dls, PrometheusCB(registry))

    @learner.on(BeforeBatch)
    def cancel(event: BeforeBatch) -> None:
        raise (CancelFitException if event.epoch else CancelEpochException)("enough")

    learner.run(3, valid=False, **backend)
    page = scrape()
    assert fits(page) == {"running": 0, "completed": 0, "cancelled": 1, "failed": 0}
    assert at(page, "epochs_total", phase="train", status="cancelled") == 2
    assert at(page, "epoch_duration_seconds_count", phase="train") == 0
    assert at(page, "samples_total", phase="train") == 8  # of the batches that were read


def test_a_failed_fit_no_longer_runs(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape, backend: Backend
) -> None:
    learner = recording_learner(dls, PrometheusCB(registry))

    @learner.on(BeforeBatch, where=lambda event: not event.training)
    def fail(event: BeforeBatch) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        learner.run(1, **backend)
    page = scrape()
    assert fits(page) == {"running": 0, "completed": 0, "cancelled": 0, "failed": 1}
    assert at(page, "epochs_total", phase="train", status="completed") == 1
    assert at(page, "epochs_total", phase="valid", status="failed") == 1


async def test_a_fit_that_the_host_cancels_no_longer_runs(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape
) -> None:
    learner = recording_learner(dls, PrometheusCB(registry))
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learner.on(BeforeBatch, once=True)
        async def cancel(event: BeforeBatch) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await learner.fit(5)
    page = await anyio.to_thread.run_sync(scrape)
    assert fits(page) == {"running": 0, "completed": 0, "cancelled": 1, "failed": 0}


def test_a_fit_cancelled_as_it_begins_runs_until_then(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape
) -> None:
    learner = recording_learner(dls)

    @learner.on(BeforeFit)
    def cancel(event: BeforeFit) -> None:
        assert registry.get_sample_value("eventrain_fits_running") == 1
        raise CancelFitException("not today")

    result = learner.run(1, cbs=PrometheusCB(registry))
    assert result.reason == "not today"
    assert fits(scrape()) == {"running": 0, "completed": 0, "cancelled": 1, "failed": 0}


class Breaks(PrometheusCB):
    """Its observer fails at the first epoch, and gets no more events."""

    def write(self, record: dict[str, Any]) -> None:
        if record["event"] == "epoch":
            raise OSError("no more of this")
        super().write(record)


def test_fits_are_counted_when_the_observer_has_failed(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape, backend: Backend
) -> None:
    learner = recording_learner(dls, Breaks(registry))
    with capture_logs() as logs:
        learner.run(2, **backend)
        learner.run(2, **backend)
        page = scrape()
    assert [line["event"] for line in logs].count("observer_failed") == 1
    assert fits(page) == {"running": 0, "completed": 2, "cancelled": 0, "failed": 0}
    assert at(page, "samples_total", phase="valid") == 0


def test_one_detached_in_the_middle_of_a_fit_is_right_again_after_the_next(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape
) -> None:
    cb = PrometheusCB(registry)
    learner = recording_learner(dls, cb)

    @learner.on(BeforeBatch, once=True)
    def detach(event: BeforeBatch) -> None:
        learner.remove_cbs(cb)

    learner.run(1)
    learner.run(1, cbs=cb)
    assert fits(scrape()) == {"running": 0, "completed": 1, "cancelled": 0, "failed": 0}


def test_one_attached_in_the_middle_of_a_fit_never_counts_it_as_running(
    dls: DataLoaders, registry: CollectorRegistry, scrape: Scrape
) -> None:
    learner = recording_learner(dls)

    @learner.on(BeforeBatch, once=True)
    def attach(event: BeforeBatch) -> None:
        learner.add_cbs(PrometheusCB(registry))

    learner.run(1)
    page = scrape()
    assert fits(page) == {"running": 0, "completed": 1, "cancelled": 0, "failed": 0}
    assert at(page, "samples_total", phase="train") == 12


# ---------------------------------------------------------------------------- several instances


async def test_instances_on_one_registry_share_its_metrics(
    make_batches: Callable[..., Any], registry: CollectorRegistry, scrape: Scrape
) -> None:
    losses: dict[str, float] = {}
    running: list[Any] = []
    both = anyio.Event()

    async def fit(model: str, n_batches: int) -> None:
        cb = PrometheusCB(registry, {"model": model})
        learner = recording_learner(DataLoaders(make_batches(n_batches)), cb)

        @learner.on(BeforeFit)
        async def meet(event: BeforeFit) -> None:
            labels = {"model": model}
            running.append(registry.get_sample_value("eventrain_fits_running", labels))
            if len(running) == 2:
                both.set()
            await both.wait()

        result = await learner.fit(1, valid=False)
        losses[model] = result.history[0]["loss"]

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fit, "cnn", 2)
            tasks.start_soon(fit, "mlp", 3)
        await fit("cnn", 1)
        page = await anyio.to_thread.run_sync(scrape)
    assert running == [1, 1, 1]
    for model, samples, n_fits in (("cnn", 12, 2), ("mlp", 12, 1)):
        assert at(page, "samples_total", model=model, phase="train") == samples
        assert at(page, "loss", model=model, phase="train") == losses[model]
        assert at(page, "fits_total", model=model, status="completed") == n_fits
        assert at(page, "fits_running", model=model) == 0


def test_by_default_it_is_the_registry_that_everybody_scrapes(dls: DataLoaders) -> None:
    recording_learner(dls, PrometheusCB(), PrometheusCB(REGISTRY)).run(1)
    labels = {"status": "completed"}
    assert REGISTRY.get_sample_value("eventrain_fits_total", labels) == 2


def test_other_label_names_on_one_registry_are_refused(registry: CollectorRegistry) -> None:
    PrometheusCB(registry, {"model": "cnn", "site": "a"})
    PrometheusCB(registry, {"site": "b", "model": "cnn"})
    with pytest.raises(ValueError, match=r"\['team'\].* are \['model', 'site'\]"):
        PrometheusCB(registry, {"team": "red"})
    PrometheusCB(CollectorRegistry(), {"team": "red"})


def test_a_registry_with_such_a_metric_of_the_host_is_refused_and_left_as_it_was(
    registry: CollectorRegistry,
    scrape: Scrape,
) -> None:
    own = Gauge("eventrain_loss", "The host's own", registry=registry)
    for _ in range(2):
        with pytest.raises(ValueError, match="eventrain_loss"):
            PrometheusCB(registry)
    assert names(scrape()) == {"eventrain_loss"}
    registry.unregister(own)
    PrometheusCB(registry)


def test_a_registry_is_released_with_its_metrics(dls: DataLoaders) -> None:
    registry = CollectorRegistry()
    recording_learner(dls, PrometheusCB(registry)).run(1)
    alive = weakref.ref(registry)
    del registry
    gc.collect()
    assert alive() is None


PROCESS = """
import torch
from eventrain.callbacks import MetricsCB
from eventrain.callbacks import PrometheusCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterEpoch
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector

batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 3
cbs = [MetricsCB(), PrometheusCB(every_seconds=0)]
learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), cbs=cbs)
registry = CollectorRegistry()
MultiProcessCollector(registry)

@learner.on(AfterEpoch)
def running(event):
    event.learner.record["running"] = registry.get_sample_value("eventrain_fits_running")

learner.run(1, valid=False)
"""


def test_in_a_host_of_several_processes_no_process_has_time_series_of_its_own(
    registry: CollectorRegistry, scrape: Scrape, tmp_path: Path
) -> None:
    subprocess.run(
        [sys.executable, "-c", PROCESS],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        timeout=120,
        check=True,
    )
    MultiProcessCollector(registry, str(tmp_path))
    page = scrape()
    assert fits(page) == {"running": 0, "completed": 1, "cancelled": 0, "failed": 0}
    assert at(page, "samples_total", phase="train") == 6
    assert at(page, "metric", phase="train", metric="running") == 1
    assert at(page, "learning_rate", phase="train") == 0.1


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("labels", "error", "said"),
    [
        ({"run_id": "a"}, ValueError, "time series for every fit"),
        ({"phase": "a"}, ValueError, "'phase' is taken"),
        ({"le": "a"}, ValueError, "'le' is taken"),
        ({"my-model": "a"}, ValueError, "'my-model'"),
        ({"__model": "a"}, ValueError, "'__model'"),
        ({"mödel": "a"}, ValueError, "'mödel'"),
        ({"model\n": "a"}, ValueError, "model"),
        ({"": "a"}, ValueError, "label ''"),
        ({1: "a"}, ValueError, "label 1"),
        ({"model": 1}, TypeError, "1 is not a str"),
        ({"model": "\ud800"}, ValueError, "surrogates"),
        ("model", TypeError, "labels='model'"),
        ([("model", "a")], TypeError, "mapping"),
    ],
)
def test_invalid_labels_are_refused(
    registry: CollectorRegistry, labels: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        PrometheusCB(registry, labels)
    assert list(registry.collect()) == []


def test_other_bad_arguments_are_refused(registry: CollectorRegistry) -> None:
    with pytest.raises(TypeError, match="'default' is not a CollectorRegistry"):
        PrometheusCB("default")
    with pytest.raises(ValueError, match="every=-1"):
        PrometheusCB(registry, every=-1)
    with pytest.raises(ValueError, match="every_seconds=-1"):
        PrometheusCB(registry, every_seconds=-1)
    assert list(registry.collect()) == []


def test_without_prometheus_client_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "prometheus_client"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'eventrain[prometheus]'")):
        PrometheusCB()

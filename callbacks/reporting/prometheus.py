"""The run as Prometheus metrics of this process."""

from __future__ import annotations

import math
import re
from collections.abc import Awaitable, Mapping
from contextlib import ExitStack
from threading import Lock
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

from ...events import (
    AfterBatch,
    BeforeEpoch,
    BeforeFit,
    CleanupEpoch,
    CleanupFit,
    Event,
    Watcher,
)
from .._checks import optional_import
from ._not_reported import NotReported
from .jsonable import numbers
from .records import CallbackRecords, RecordCB

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

MAX_METRICS = 50
"""Metric names that one registry shows; each has a time series per phase and set of labels."""

BUCKETS = (0.1, 0.5, 1, 5, 10, 30, 60, 300, 600, 1800, 3600, 10800, 36000)
"""Upper bounds of the buckets for the seconds of an epoch, up to ten hours."""

_OURS = ("phase", "status", "metric", "param_group", "le")
_PHASES = ("train", "valid")
_STATUSES = ("completed", "cancelled", "failed")


class PrometheusCB(RecordCB):
    """Counts fits, epochs and samples for Prometheus, and shows the last loss and metrics.

    It only creates the metrics; the host exposes them (`start_http_server` or `make_asgi_app` of
    prometheus_client, or an endpoint of its own). All but the fits are counted on the host's event
    loop, while the training runs. `phase` is "train" or "valid":

    | | |
    |---|---|
    | `eventrain_fits_running` | fits that are running |
    | `eventrain_fits_total{status}` | fits that ended "completed", "cancelled" or "failed" |
    | `eventrain_epochs_total{phase,status}` | epochs that ended |
    | `eventrain_samples_total{phase}` | samples read, up to the last batch record or epoch |
    | `eventrain_epoch_duration_seconds{phase}` | histogram of completed epochs |
    | `eventrain_loss{phase}` | loss of the last completed epoch, if recorded, as by `MetricsCB` |
    | `eventrain_metric{phase,metric}` | every other number that it recorded |
    | `eventrain_metrics_left_out_total` | numbers not shown, as there are 50 other names already |
    | `eventrain_batch_loss{phase}` | loss of the last training batch that has a record |
    | `eventrain_learning_rate{phase}` | its learning rate, of the first parameter group |
    | `eventrain_learning_rate_by_group{phase,param_group}` | of each group, from 0, if several |
    | `eventrain_samples_per_second{phase}` | speed between it and the record before |

    Not measured: lists and strings among the metrics, steps, gradients, memory, and anything per
    run, as each run id would add time series. The gauges keep their values when a fit ends.
    `validate()`, `get_preds()` and `lr_find()` count for nothing. NaN and infinities are shown.

    Args:
        registry: the `CollectorRegistry` to use, prometheus_client's `REGISTRY` by default.
            Instances on one registry share its metrics.
        labels: constant labels of this instance, such as {"model": "cnn"}. All instances on a
            registry need the same names; use names that have few values.
        every: report every n-th training batch; 0 for none.
        every_seconds: leave out batches within this many seconds of the last one reported.

    Raises:
        ImportError: prometheus_client is not installed.
        TypeError: `registry` is not a registry, or `labels` is not a mapping of str to str.
        ValueError: a label's name is not allowed or taken; other instances on this registry
            have other label names; the registry has metrics of these names from elsewhere;
            `every` or `every_seconds` is negative.

    Example:
        >>> import torch
        >>> from prometheus_client import CollectorRegistry
        >>> from eventrain.callbacks import PrometheusCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> registry = CollectorRegistry()
        >>> prometheus = PrometheusCB(registry, labels={"model": "line"})
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), cbs=prometheus)
        >>> result = learner.run(3, valid=False)
        >>> labels = {"model": "line", "phase": "train"}
        >>> registry.get_sample_value("eventrain_samples_total", labels)
        24.0

    Source: Prometheus, "Metric and label naming" and "Instrumentation", for names, units, labels,
    and counters that exist, at 0, from the start.
    """

    order: float = -math.inf  # a fit counts as running before another receiver can cancel it
    shareable = True

    def __init__(
        self,
        registry: CollectorRegistry | None = None,
        labels: Mapping[str, str] | None = None,
        *,
        every: int = 1,
        every_seconds: float = 1,
    ) -> None:
        super().__init__(every, every_seconds)
        self.labels = _checked({} if labels is None else labels)
        self._collectors = _collectors_of(registry, tuple(sorted(self.labels)))
        self._running: WeakSet[Any] = WeakSet()  # the learners that fit
        # The samples of their epochs that are counted, also if it is detached and attached again.
        self._counted: WeakKeyDictionary[Any, int] = WeakKeyDictionary()
        for name in _PHASES:
            self._of("samples", phase=name)
            self._of("duration", phase=name)
            for status in _STATUSES:
                self._of("epochs", phase=name, status=status)
        for status in _STATUSES:
            self._of("fits", status=status)
        self._of("running")
        self._of("left_out")

    # Fits are counted in the training thread, in two calls that do not block: there, the end is
    # always received, also when the observer has failed or was cancelled.

    def before_fit(self, event: BeforeFit) -> None:
        # It is running, if this was detached in the middle of its last fit.
        if event.purpose == "fit" and event.learner not in self._running:
            self._running.add(event.learner)
            self._of("running").inc()

    def cleanup_fit(self, event: CleanupFit) -> None:
        if event.purpose != "fit":
            return
        if event.learner in self._running:
            self._running.remove(event.learner)
            self._of("running").dec()
        self._of("fits", status=event.end.status).inc()

    def watcher(self, event: Event) -> Watcher:
        """The object that makes the records of one fit, and counts its samples."""
        return _SampleCounter(self) if event.purpose == "fit" else NotReported()

    def count_samples(self, event: BeforeEpoch | AfterBatch | CleanupEpoch) -> None:
        """Count the samples of an epoch that came since the last event."""
        n_samples = 0 if isinstance(event, BeforeEpoch) else event.n_samples
        new = n_samples - self._counted.get(event.learner, 0)
        self._of("samples", phase=event.phase).inc(max(0, new))
        self._counted[event.learner] = n_samples

    def write(self, record: dict[str, Any]) -> None:
        """Set the metrics from the numbers of a record."""
        if record["event"] == "batch":
            shown = {"loss": "batch_loss", "lr": "lr", "samples_per_second": "speed"}
            for key, value in numbers(record).items():
                if key in shown:
                    self._of(shown[key], phase=record["phase"]).set(value)
            for i, lr in enumerate(record.get("lrs", ())):
                if lr is not None:
                    self._of("lrs", phase=record["phase"], param_group=str(i)).set(lr)
        elif record["event"] == "epoch":
            which = {"phase": record["phase"]}
            self._of("epochs", **which, status=record["status"]).inc()
            if not record["all_read"]:
                return  # what was measured in a part of an epoch cannot be told from the others
            seconds = max(0, record["seconds"])  # the clock may have been set back
            self._of("duration", **which).observe(seconds)
            for name, value in numbers(record, "metrics").items():
                if name == "loss":
                    self._of("loss", **which).set(value)
                elif self._collectors.admit(name):
                    self._of("metric", **which, metric=name).set(value)
                else:
                    self._of("left_out").inc()

    def _of(self, name: str, **labels: str) -> Any:
        collector = self._collectors.by_name[name]
        labels = {**self.labels, **labels}
        return collector.labels(**labels) if labels else collector


class _SampleCounter(CallbackRecords):
    """Makes the records of one fit, and counts its samples."""

    def __init__(self, callback: PrometheusCB) -> None:
        super().__init__(callback)
        self._count_samples = callback.count_samples

    def observe(self, event: Event) -> Awaitable[Any] | None:
        if isinstance(event, BeforeEpoch | AfterBatch | CleanupEpoch):
            self._count_samples(event)
        return super().observe(event)


class _Collectors:
    """The metrics of one registry, for all instances on it."""

    def __init__(self, registry: CollectorRegistry, labelnames: tuple[str, ...]) -> None:
        from prometheus_client import Counter, Gauge, Histogram

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            all_labels = (*labelnames, *labels)
            return kind(f"eventrain_{name}", text, all_labels, registry=None, **options)

        # If the host has several processes, the running fits are summed up, and other gauges show
        # the value set last.
        now = {"multiprocess_mode": "livesum"}
        last = {"multiprocess_mode": "mostrecent"}
        duration = "epoch_duration_seconds"
        lrs = "Learning rates of all parameter groups at that batch, if there are several"
        left_out = "Numbers not shown: there are too many names of metrics"
        self.labelnames = labelnames
        self.by_name = {
            "running": make(Gauge, "fits_running", "Fits that run now", **now),
            "fits": make(Counter, "fits", "Fits that ended", "status"),
            "epochs": make(Counter, "epochs", "Epochs that ended", "phase", "status"),
            "samples": make(Counter, "samples", "Samples seen", "phase"),
            "duration": make(
                Histogram, duration, "Seconds of completed epochs", "phase", buckets=BUCKETS
            ),
            "loss": make(Gauge, "loss", "Loss of the last epoch", "phase", **last),
            "metric": make(Gauge, "metric", "Metrics of the last epoch", "phase", "metric", **last),
            "left_out": make(Counter, "metrics_left_out", left_out),
            "batch_loss": make(Gauge, "batch_loss", "Loss of the last batch", "phase", **last),
            "lr": make(Gauge, "learning_rate", "Learning rate at that batch", "phase", **last),
            "lrs": make(Gauge, "learning_rate_by_group", lrs, "phase", "param_group", **last),
            "speed": make(Gauge, "samples_per_second", "Speed up to that batch", "phase", **last),
        }
        self._admitted: set[str] = set()
        with ExitStack() as undo:
            for collector in self.by_name.values():
                registry.register(collector)
                undo.callback(registry.unregister, collector)
            undo.pop_all()

    def __deepcopy__(self, memo: object) -> _Collectors:
        return self

    def admit(self, name: str) -> bool:
        """Whether a metric of this name may be shown; a name stays admitted."""
        if len(self._admitted) < MAX_METRICS:
            self._admitted.add(name)
        return name in self._admitted


_shared: WeakKeyDictionary[CollectorRegistry, _Collectors] = WeakKeyDictionary()
_lock = Lock()


def _collectors_of(registry: Any, labelnames: tuple[str, ...]) -> _Collectors:
    """The collectors of the registry, which refuses a second set of the same names."""
    with optional_import("PrometheusCB", "prometheus_client", "prometheus"):
        from prometheus_client import REGISTRY, CollectorRegistry
    registry = REGISTRY if registry is None else registry
    if not isinstance(registry, CollectorRegistry):
        raise TypeError(f"registry={registry!r} is not a CollectorRegistry of prometheus_client")
    with _lock:
        collectors = _shared.get(registry)
        if collectors is None:
            collectors = _shared[registry] = _Collectors(registry, labelnames)
    if collectors.labelnames != labelnames:
        raise ValueError(
            f"labels named {list(labelnames)}: instances on one registry have the same label"
            f" names, and this one's are {list(collectors.labelnames)}; use those, or another"
            " registry"
        )
    return collectors


def _checked(labels: Any) -> dict[str, str]:
    if not isinstance(labels, Mapping):
        raise TypeError(f"labels={labels!r}: give a mapping of str to str")
    for name, value in labels.items():
        if not isinstance(name, str) or not re.fullmatch(r"(?!__)[a-zA-Z_]\w*", name, re.ASCII):
            raise ValueError(f"label {name!r}: a name is letters, digits and _, such as 'model'")
        if name in _OURS:
            raise ValueError(f"label {name!r} is taken: give it another name")
        if name == "run_id":
            raise ValueError(
                "label 'run_id' would add new time series for every fit, without end; use labels"
                " with few values, such as the model"
            )
        if not isinstance(value, str):
            raise TypeError(f"label {name!r}: {value!r} is not a str")
        value.encode()  # raises UnicodeEncodeError, a ValueError, if it cannot be exposed
    return dict(labels)

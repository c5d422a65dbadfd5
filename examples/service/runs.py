"""The runs: their requests, their learners, and the states that clients receive."""

from __future__ import annotations

import io
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import anyio
import anyio.abc
import anyio.lowlevel
import structlog
import torch
from anyio.abc import TaskStatus
from eventrain.callbacks import (
    SCHEMA_VERSION,
    DeviceCB,
    MetricsCB,
    StructlogCB,
    to_cpu,
    to_jsonable,
)
from eventrain.engine import DataLoaders, MomentumLearner
from pydantic import BaseModel, ConfigDict, Field
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torcheval.metrics import MulticlassAccuracy

from ..datasets import get_model
from .journal import Journal, JournalCB, current_journal
from .settings import Settings

log = structlog.get_logger("eventrain.service")

Data = tuple[Dataset[Any], Dataset[Any]]
"""Images and labels, for training and for validation."""


class NewRun(BaseModel):
    """The request for a run."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dataset: Literal["digits", "fashion-mnist"] = "digits"
    epochs: Annotated[int, Field(ge=1, le=1000)] = 10
    lr: Annotated[float, Field(gt=0, le=10)] = 0.1
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 64
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class RunSummary(BaseModel):
    """The progress of a run, and how it ended."""

    id: str
    status: Literal["running", "completed", "cancelled", "failed"]
    who: str | None
    reason: str | None
    request: NewRun
    created: datetime
    ended: datetime | None
    epoch: int
    phase: Literal["train", "valid"] | None
    iter: int
    n_iter: int | None
    steps: int | None
    dropped: dict[str, int]
    clients: int


class RunState(RunSummary):
    """The same with the metrics: one row per epoch and phase ("train" or "eval")."""

    history: list[dict[str, Any]]


class Run:
    """One fit of the post's CNN.

    Attributes:
        id: 16 hexadecimal digits; the run's id in events, logs and addresses.
        journal: the messages for its clients.
        clients: how many clients follow it.
        ended: when it ended; None before that.
        over: set when it has ended.
        weights: the model's `state_dict`, as `torch.save` writes it; None while it trains.
    """

    def __init__(self, request: NewRun, data: Data, settings: Settings) -> None:
        self.id = secrets.token_hex(8)
        self.request = request
        self.journal = Journal(settings.journal_size)
        self.clients = 0
        self.created = datetime.now(UTC)
        self.ended: datetime | None = None
        self.over = anyio.Event()
        self.weights: bytes | None = None
        self._learner: MomentumLearner | None = self._make_learner(data, settings.interval)
        self._last: dict[str, Any] = {}

    def _make_learner(self, data: Data, interval: float) -> MomentumLearner:
        """Return a learner with its own generators, so that concurrent runs do not interfere."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.request.seed)
            model = get_model()
        generator = torch.Generator().manual_seed(self.request.seed)
        loader = partial(DataLoader, batch_size=self.request.batch_size, generator=generator)
        train, valid = data
        return MomentumLearner(
            model,
            DataLoaders(loader(train, shuffle=True), loader(valid)),
            F.cross_entropy,
            self.request.lr,
            cbs=[
                DeviceCB(),
                MetricsCB(accuracy=MulticlassAccuracy()),
                JournalCB(self.journal, interval),
                StructlogCB(every=0),
            ],
        )

    async def train(self, *, task_status: TaskStatus[None]) -> None:
        """Fit, and record how it ended; an error ends the run, not the service."""
        assert self._learner is not None
        current_journal.set(self.journal)
        with structlog.contextvars.bound_contextvars(run_id=self.id):
            try:
                task_status.started()  # from this task's next turn on, the run can be stopped
                await self._learner.fit(self.request.epochs, run_id=self.id)
            except Exception as exc:
                self._last = {"status": "failed", "reason": f"{type(exc).__name__}: {exc}"}
                log.error("run_failed", exc_info=exc)
            finally:
                self._finish(self._learner)

    def stop(self, scope: Literal["fit", "epoch", "batch"], reason: str) -> bool:
        """Ask the run to leave a scope, and return whether it received the request."""
        return self._learner is not None and self._learner.stop(scope, reason=reason)

    def _finish(self, learner: MomentumLearner) -> None:
        """Keep the weights and the last state, and release the learner."""
        try:
            file = io.BytesIO()
            torch.save(to_cpu(learner.model.state_dict()), file)
            self.weights = file.getvalue()
        except Exception as exc:  # for example, of a device that has failed
            log.error("weights_lost", exc_info=exc)
        self.ended = datetime.now(UTC)
        fields = ("status", "who", "reason", "steps", "dropped")
        if learner.result:
            ending = {name: getattr(learner.result, name) for name in fields}
        else:  # it could not start
            ending = {"status": "cancelled", **self._last}
        self._last = {**_progress(learner), **ending, "history": _history(learner)}
        self._learner = None
        self.journal.append(
            {
                "event": "run_ended",
                "schema_version": SCHEMA_VERSION,
                "timestamp": self.ended.isoformat(timespec="milliseconds"),
                "run_id": self.id,
                **self.summary().model_dump(include=set(fields)),
            }
        )
        self.journal.end()
        self.over.set()

    def summary(self) -> RunSummary:
        """Return the present state, without the history."""
        return RunSummary.model_validate(self._now())

    def state(self) -> RunState:
        """Return the present state with the history."""
        history = {"history": _history(self._learner)} if self._learner else {}
        return RunState.model_validate({**self._now(), **history})

    def _now(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "request": self.request,
            "created": self.created,
            "ended": self.ended,
            "clients": self.clients,
            **(_progress(self._learner) if self._learner else self._last),
        }


def _progress(learner: MomentumLearner) -> dict[str, Any]:
    """Return the fields of a summary that a running fit has."""
    return {
        "status": "running",
        "who": None,
        "reason": None,
        "epoch": learner.epoch,
        "phase": ("train" if learner.training else "valid") if learner.history else None,
        "iter": learner.iter,
        "n_iter": learner.n_iter,
        "steps": None,
        "dropped": {
            stream.name: stream.dropped for stream in learner.fit_streams if stream.dropped
        },
    }


def _history(learner: MomentumLearner) -> list[dict[str, Any]]:
    """The rows of the epochs that were not cut short, with the numbers measured in them."""
    rows = [row for row in list(learner.history) if len(row) > 2 and "status" not in row]
    return [to_jsonable(row) for row in rows]


class Runs:
    """All runs of the service.

    Args:
        tasks: the task group that they run in.
        data: the datasets that they may train on, by name.
        settings: how many run at once, and how many are remembered.
    """

    def __init__(
        self, tasks: anyio.abc.TaskGroup, data: Mapping[str, Data], settings: Settings
    ) -> None:
        self.data = data
        self.closing = False
        self._tasks = tasks
        self._settings = settings
        self._runs: dict[str, Run] = {}

    def __iter__(self) -> Iterator[Run]:
        return reversed(self._runs.values())

    def get(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    @property
    def active(self) -> list[Run]:
        """The runs that have not ended."""
        return [run for run in self._runs.values() if run.ended is None]

    @property
    def full(self) -> bool:
        """Whether as many runs are active as the settings allow."""
        return len(self.active) >= self._settings.max_concurrent

    async def start(self, request: NewRun) -> Run:
        """Start a run, and forget the oldest ended runs above the limit."""
        run = Run(request, self.data[request.dataset], self._settings)
        self._runs[run.id] = run
        ended = [run.id for run in self._runs.values() if run.ended]
        for run_id in ended[: max(0, len(self._runs) - self._settings.max_kept)]:
            del self._runs[run_id]
        await self._tasks.start(run.train, name=f"run {run.id}")
        return run

    async def close(self, deadline: float) -> None:
        """Refuse new runs, stop the active ones, and wait until they have ended.

        Runs that have not ended after `deadline` seconds are left for the caller to cancel.
        """
        self.closing = True
        await anyio.lowlevel.checkpoint()  # after it, a run that was just started can be stopped
        for run in self.active:
            run.stop("fit", "the service is shutting down")
        with anyio.move_on_after(deadline):
            for run in self.active:
                await run.over.wait()

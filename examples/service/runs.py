"""The runs: what was asked for, the learner that does it, and what is told of it."""

from __future__ import annotations

import io
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import anyio
import anyio.abc
import structlog
import torch
from eventrain.callbacks import MetricsCB, StructlogCB
from eventrain.callbacks.records import SCHEMA_VERSION, plain
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
"""Images and labels, to train with and to validate with."""


class NewRun(BaseModel):
    """What a run is to do."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    dataset: Literal["digits", "fashion-mnist"] = "digits"
    epochs: Annotated[int, Field(ge=1, le=1000)] = 10
    lr: Annotated[float, Field(gt=0, le=10)] = 0.1
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 64
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class RunState(BaseModel):
    """What a run has done so far, and how it ended."""

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
    history: list[dict[str, Any]]
    dropped: dict[str, int]
    clients: int


class Run:
    """One fit of the post's CNN.

    Attributes:
        id: 16 hexadecimal digits; the run's id in events, logs and addresses.
        journal: what its clients are told.
        clients: how many are listening.
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
        self._error: str | None = None
        self.learner = self._make_learner(data, settings.interval)

    def _make_learner(self, data: Data, interval: float) -> MomentumLearner:
        """With generators of its own: runs at the same time do not change each other."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.request.seed)
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
                MetricsCB(accuracy=MulticlassAccuracy()),
                JournalCB(self.journal, interval),
                StructlogCB(every=0),
            ],
        )

    async def train(self) -> None:
        """Fit, and tell how it ended; an error is the run's, not the service's."""
        current_journal.set(self.journal)
        with structlog.contextvars.bound_contextvars(run_id=self.id):
            try:
                await self.learner.fit(self.request.epochs, run_id=self.id)
            except Exception as exc:
                self._error = f"{type(exc).__name__}: {exc}"
                log.error("run_failed", exc_info=exc)
            finally:
                self._finish()

    def _finish(self) -> None:
        self.ended = datetime.now(UTC)
        file = io.BytesIO()
        torch.save(self.learner.model.state_dict(), file)
        self.weights = file.getvalue()
        state = self.state()
        self.journal.append(
            {
                "event": "run_ended",
                "schema_version": SCHEMA_VERSION,
                "timestamp": self.ended.isoformat(timespec="milliseconds"),
                "run_id": self.id,
                "status": state.status,
                "who": state.who,
                "reason": state.reason,
                "steps": state.steps,
                "dropped": state.dropped,
            }
        )
        self.journal.end()
        self.over.set()

    def state(self) -> RunState:
        """Where it is now."""
        learner, result = self.learner, self.learner.result
        status, who, reason = "running", None, None
        history: Any = learner.history
        dropped: Mapping[str, int] = {s.name: s.dropped for s in learner.audience if s.dropped}
        if self.ended and result:
            status, who, reason = result.status, result.who, result.reason
            history, dropped = result.history, result.dropped
        elif self.ended:  # it could not begin
            status, reason = "failed", self._error
        return RunState.model_validate(
            {
                "id": self.id,
                "status": status,
                "who": who,
                "reason": reason,
                "request": self.request,
                "created": self.created,
                "ended": self.ended,
                "epoch": learner.epoch,
                "phase": ("train" if learner.training else "valid") if learner.history else None,
                "iter": learner.iter,
                "n_iter": learner.n_iter,
                "steps": result.steps if self.ended and result else None,
                "history": [plain(row) for row in history if len(row) > 2],
                "dropped": dict(dropped),
                "clients": self.clients,
            }
        )


class Runs:
    """All runs of the service.

    Args:
        tasks: where they run.
        load: returns the data of a name; called in a thread, once a name.
        settings: how many at once, and how many are remembered.
    """

    def __init__(
        self, tasks: anyio.abc.TaskGroup, load: Callable[[str], Data], settings: Settings
    ) -> None:
        self._tasks = tasks
        self._load = load
        self._data: dict[str, Data] = {}
        self._loading = anyio.Lock()
        self._settings = settings
        self._runs: dict[str, Run] = {}
        self.closing = False

    def __iter__(self) -> Any:
        return reversed(self._runs.values())

    def get(self, run_id: str) -> Run | None:
        return self._runs.get(run_id)

    @property
    def active(self) -> list[Run]:
        """Those that have not ended."""
        return [run for run in self._runs.values() if run.ended is None]

    @property
    def full(self) -> bool:
        """Whether another run would be too many."""
        return len(self.active) >= self._settings.max_concurrent

    async def data(self, name: str) -> Data:
        """The data called `name`, loaded when it is first asked for.

        Raises:
            FileNotFoundError: it is not there.
        """
        async with self._loading:
            if name not in self._data:
                self._data[name] = await anyio.to_thread.run_sync(self._load, name)
        return self._data[name]

    def start(self, request: NewRun, data: Data) -> Run:
        """Start a run, and forget the oldest that have ended."""
        run = Run(request, data, self._settings)
        self._runs[run.id] = run
        ended = [run.id for run in self._runs.values() if run.ended]
        for run_id in ended[: max(0, len(self._runs) - self._settings.max_kept)]:
            del self._runs[run_id]
        self._tasks.start_soon(run.train, name=f"run {run.id}")
        return run

    async def close(self, deadline: float) -> None:
        """Take no more runs, stop those there are, and wait until they have ended.

        Those that have not after `deadline` seconds are left to whoever cancels their tasks.
        """
        self.closing = True
        for run in self.active:
            run.learner.stop(reason="the service is shutting down")
        with anyio.move_on_after(deadline):
            for run in self.active:
                await run.over.wait()

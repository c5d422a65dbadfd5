"""A fit: what is checked before it, the thread it runs in, and what comes out of it."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import anyio
import anyio.lowlevel
import structlog

from ..events import (
    ActionEvent,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    GetLoss,
    Predict,
    ScopeEnd,
)
from ..events.types import ACTIONS
from .checkpoint import Checkpoint
from .data import loader_of
from .explain import check_performers
from .loop import Loop
from .position import Done, Position
from .result import FitResult
from .resume import Resumption, find_checkpoint
from .runtime import Runtime
from .scope import COMPLETED, Request
from .signals import GracefulEnd

_CANCELS: Mapping[str, type[CancelException]] = {
    "fit": CancelFitException,
    "epoch": CancelEpochException,
    "batch": CancelBatchException,
}


class Fitting(Loop):
    """The loop as an awaitable: `fit`, `run` and `stop`."""

    lr: float
    opt_func: Callable[..., Any] | None
    cleanup_timeout: float = 5.0
    drain_timeout: float = 2.0
    result: FitResult | None = None
    resumed_from: Path | None = None
    """The checkpoint that this fit goes on from."""
    _fitting: bool = False
    _graceful_end: GracefulEnd | None = None

    async def fit(
        self,
        n_epochs: int = 1,
        train: bool = True,
        valid: bool = True,
        cbs: Callback | Iterable[Callback] | None = None,
        lr: float | None = None,
        *,
        run_id: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        graceful: bool | float = False,
    ) -> FitResult:
        """Train and validate for `n_epochs`, in a thread of its own.

        Returns, or raises, only when that thread has ended, however often the caller's task is
        cancelled meanwhile; a cancellation takes effect at the next event.

        Args:
            n_epochs: epochs, each a training and then a validating one.
            train: whether to train.
            valid: whether to validate.
            cbs: callbacks for this fit alone.
            lr: the learning rate for this fit alone.
            run_id: what its events, logs and result are known by; a new random one by default,
                or the one of the run that is resumed.
            resume: a checkpoint to go on from as if nothing had happened: the path of one, a
                folder of them, or "last", which is the last whole one of the `CheckpointCB`
                among the callbacks; where that has none yet, the fit begins at the beginning.
                `n_epochs` are those of the whole fit.
            graceful: have the first SIGTERM or SIGINT end the fit with the batch under way, and
                `CheckpointCB` save there; the second does what it does without this. A number is
                the seconds after which the fit is stopped at its next event instead; True gives
                25. For scripts: a host with handlers of its own calls `stop(graceful=True)`.

        Raises:
            RuntimeError: this learner is fitting already.
            TypeError, ValueError: something asked for is missing or wrong; before any work.
            CheckpointError: there is no checkpoint to resume, or it is damaged.
            CheckpointMismatchError: it is of something else; nothing has been changed.
            Exception: what a receiver, the model or the data raised, with a note saying where.
        """
        if isinstance(n_epochs, bool) or not isinstance(n_epochs, int) or n_epochs < 0:
            raise ValueError(f"n_epochs={n_epochs!r}: give a whole number, 0 or more")
        if run_id is not None and not (isinstance(run_id, str) and run_id):
            raise ValueError(f"run_id={run_id!r}: give a text that is not empty, or None")
        if resume is not None and lr is not None:
            raise ValueError(f"lr={lr!r}: a fit that is resumed has the learning rate that it had")
        actions = ACTIONS if train else (Predict, GetLoss)
        end = None if graceful is False else GracefulEnd(self, graceful)
        return await self._fit(n_epochs, train, valid, cbs, lr, actions, run_id, resume, end)

    async def _fit(
        self,
        n_epochs: int,
        train: bool,
        valid: bool,
        cbs: Callback | Iterable[Callback] | None,
        lr: float | None,
        actions: tuple[type[ActionEvent], ...],
        run_id: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        end: GracefulEnd | None = None,
    ) -> FitResult:
        self._check_idle()
        self._fitting = True
        self._graceful_end = end
        temporary: tuple[Callback, ...] = ()
        try:
            temporary = self.add_cbs(cbs)
            check_performers(self, actions)
            self._prepare(n_epochs, train, valid, lr)
            self.run_id = run_id or uuid.uuid4().hex[:12]
            with self._kept_optimizer_at(lr), end or nullcontext():
                return await self._run(partial(self._work, resume, run_id))
        finally:
            self.remove_cbs(cb for cb in temporary if any(cb is own for own in self.cbs))
            self._requests.clear()
            self._graceful_end = self._resumption = None
            self._fitting = False

    def run(
        self,
        n_epochs: int = 1,
        train: bool = True,
        valid: bool = True,
        cbs: Callback | Iterable[Callback] | None = None,
        lr: float | None = None,
        *,
        run_id: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        graceful: bool | float = False,
        backend: str = "asyncio",
        backend_options: dict[str, Any] | None = None,
    ) -> FitResult:
        """`fit` for scripts: starts an event loop, and ends it.

        Args:
            backend: "asyncio" or "trio".
            backend_options: for `anyio.run`, such as {"use_uvloop": True}.

        Raises:
            RuntimeError: an event loop is running in this thread.
            KeyboardInterrupt: on Ctrl-C, when the training has stopped and cleaned up.
        """
        if _event_loop_runs():
            raise RuntimeError(
                "run() starts an event loop, and one is running in this thread already: use"
                " `await learner.fit(...)` here"
            )
        fit = partial(self.fit, run_id=run_id, resume=resume, graceful=graceful)
        arguments = n_epochs, train, valid, cbs, lr
        return anyio.run(fit, *arguments, backend=backend, backend_options=backend_options)

    def stop(
        self,
        scope: Literal["fit", "epoch", "batch"] = "fit",
        reason: str | None = None,
        *,
        graceful: bool = False,
        who: str = "Learner.stop",
    ) -> bool:
        """Ask the training to leave a scope at its next event.

        From any thread, task or signal handler. A scope that ends by itself first is not
        waited for again.

        Args:
            scope: what to leave: "fit", "epoch" or "batch".
            reason: why, for the events, the logs and the result.
            graceful: let the batch under way end first, and `CheckpointCB` save there.
            who: who asks, for the same.

        Returns:
            Whether a fit is running that will hear of it.

        Raises:
            ValueError: there is no such scope.
        """
        if scope not in _CANCELS:
            raise ValueError(f"stop(scope={scope!r}): choose 'fit', 'epoch' or 'batch'")
        if graceful and scope == "batch":
            raise ValueError("stop('batch', graceful=True): a batch that may end is not stopped")
        cancel = _CANCELS[scope](reason or "stop() was called")
        cancel.who = who
        return self._request(cancel, graceful)

    @property
    def fitting(self) -> bool:
        """Whether a fit is running."""
        return self._fitting

    def _check_idle(self) -> None:
        if self._fitting:
            raise RuntimeError(
                f"this learner is fitting already (run {self.run_id}); await that, or use another"
                " learner: one fits once at a time"
            )

    def _prepare(self, n_epochs: int, train: bool, valid: bool, lr: float | None) -> None:
        """Check what can be known before any work, and begin anew."""
        for training in [True] * train + [False] * valid:
            loader_of(self.dls, training)
        _check_lr(lr)
        if train and self.opt_func is not None:
            self.opt = self._make_optimizer(self.lr if lr is None else lr)
        if train and self.opt is None:
            raise ValueError("opt_func is None, which keeps learner.opt, but that is not set")
        self.train, self.valid = train, valid
        self.n_epochs = n_epochs
        self.epochs = range(n_epochs)
        self.start = Position(training=train)
        self.resumed_from = self._resumption = None
        self.epoch = self.iter = self.n_samples = 0
        self.history = []
        self.done_in = {True: Done(), False: Done()}
        self.done = self.done_in[train]
        self._end = ScopeEnd("failed", None, "the training could not begin")
        self._requests.clear()

    def _make_optimizer(self, lr: float) -> Any:
        _check_lr(lr)
        assert self.opt_func is not None
        try:
            opt = self.opt_func(self.model.parameters(), lr)
        except Exception as exc:
            exc.add_note(
                f"raised by opt_func={self.opt_func!r}, called as opt_func(model.parameters(),"
                f" {lr!r})"
            )
            raise
        if not callable(getattr(opt, "step", None)) or not hasattr(opt, "param_groups"):
            raise TypeError(f"opt_func={self.opt_func!r} returned {opt!r}, which is no optimizer")
        return opt

    @contextmanager
    def _kept_optimizer_at(self, lr: float | None) -> Iterator[None]:
        """Where `opt_func` makes none, give the one that is kept this learning rate meanwhile."""
        kept = self.train and self.opt_func is None and lr is not None
        groups = self.opt.param_groups if kept else []
        own = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = lr
        try:
            yield
        finally:
            for group, before in zip(groups, own, strict=True):
                group["lr"] = before

    def _work(self, resume: str | os.PathLike[str] | None, run_id: str | None) -> None:
        """What the training thread does."""
        if resume is not None:
            self._take_up(find_checkpoint(self, resume), run_id)
        self._end = COMPLETED
        self.one_fit()
        if self._resumption is not None and self._end.status == "completed":
            error = self._resumption.never_loaded()
            self._end = ScopeEnd("failed", None, str(error))
            raise error

    def _take_up(self, checkpoint: Checkpoint | None, run_id: str | None) -> None:
        if checkpoint is None:
            return
        self._resumption = Resumption(checkpoint)
        self.resumed_from = checkpoint.path
        self.start = checkpoint.position
        self.epochs = range(self.start.epoch, self.n_epochs)
        self.run_id = run_id or checkpoint.manifest["run_id"]

    async def _run(self, work: Callable[[], None]) -> FitResult:
        runtime = Runtime(self)
        self._async_wrapper = runtime.async_wrapper
        self.audience = list(self.streams)
        for stream in self.audience:
            stream.begin()
        start = time.perf_counter()
        try:
            await runtime.run(work)
        finally:
            self._async_wrapper = None
            for stream in self.audience:
                stream.finish()
            self.result = self._make_result(time.perf_counter() - start)
            self.audience = []
            if self.result.dropped:
                structlog.get_logger("eventrain").warning(
                    "events_dropped", run_id=self.run_id, dropped=dict(self.result.dropped)
                )
        return self.result

    def _make_result(self, seconds: float) -> FitResult:
        end = self._end  # the last scope to end was the fit
        dropped: Counter[str] = Counter()
        for stream in self.audience:
            dropped[stream.name] += stream.dropped
        return FitResult(
            run_id=self.run_id,
            status=end.status,
            who=end.who,
            reason=end.reason,
            n_epochs=self.n_epochs,
            epochs=self.done_in[self.train].epochs,
            batches=self.done_in[True].batches,
            valid_batches=self.done_in[False].batches,
            steps=self.done_in[True].steps,
            seconds=seconds,
            history=tuple(row for row in self.history if len(row) > 2),
            dropped=dict(+dropped),  # without the zeros
            resumed_from=None if self.resumed_from is None else str(self.resumed_from),
        )

    def _request(self, error: BaseException, graceful: bool = False) -> bool:
        """Have the training thread raise `error` at its next event."""
        if not self._fitting:
            return False
        target = self._open_scope(type(error)) if isinstance(error, CancelException) else None
        self._requests.append(Request(error, target, graceful))
        return True


def _event_loop_runs() -> bool:
    try:
        anyio.lowlevel.current_token()
    except anyio.NoEventLoopError:
        return False
    return True


def _check_lr(lr: Any) -> None:
    if isinstance(lr, int | float) and not lr >= 0:
        raise ValueError(f"lr={lr!r}: give a learning rate of 0 or more")

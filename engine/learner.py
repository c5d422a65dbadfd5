"""The Learner: the loop with its model, data and callbacks, awaited by an async host."""

from __future__ import annotations

import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import anyio
import anyio.lowlevel
import structlog
from torch import nn, optim
from torch.nn import functional as F

from ..events import (
    ActionEvent,
    Bus,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    CleanupStep,
    GetLoss,
    Predict,
    ScopeEnd,
)
from ..events.types import ACTIONS
from .data import DataLoaders, loader_of
from .explain import check_performers
from .loop import Loop
from .observers import EventStream
from .predictions import CollectPredictions, concatenate
from .preserve import preserved
from .result import FitResult
from .runtime import Runtime

if TYPE_CHECKING:
    from ..callbacks import LRFinderCB

_CANCELS: Mapping[str, type[CancelException]] = {
    "fit": CancelFitException,
    "epoch": CancelEpochException,
    "batch": CancelBatchException,
}


class Learner(Loop):
    """Trains a model, emitting events; what a batch does is up to a subclass or to callbacks.

    The loop, in full (`engine/loop.py`):

        BeforeFit
        for epoch in epochs, training and then validating:
            BeforeEpoch
            for batch in loader:
                BeforeBatch
                Predict, AfterPredict
                GetLoss, AfterLoss
                if training:
                    Backward, AfterBackward
                    BeforeStep, Step, ZeroGrad, AfterStep, CleanupStep
                AfterBatch, CleanupBatch
            AfterEpoch, CleanupEpoch
        AfterFit, CleanupFit

    Args:
        model: the module to train.
        dls: an object with `train` and `valid`, such as `DataLoaders`.
        loss_func: called as `loss_func(preds, targets)`, returns a scalar tensor.
        lr: the learning rate for `opt_func`.
        cbs: one callback, or several.
        opt_func: called as `opt_func(model.parameters(), lr)` for every fit that trains; None
            keeps `learner.opt`.
        bus: one to share with other learners; a new one by default.

    Attributes:
        model, dls, loss_func, lr, opt_func, bus: as given.
        opt: the optimizer of the last fit.
        batch, preds, loss: those of the current batch; receivers may replace them.
        epoch, n_epochs, iter, n_iter, training: where the loop is.
        record: the numbers of the current epoch, which receivers may add to.
        result: the FitResult of the last fit, failed and cancelled ones too.
        cleanup_timeout: seconds that an async Cleanup* receiver gets once the host has
            cancelled.
        drain_timeout: seconds that observers get for what is left when the fit has ended.

    Source: the post's `Learner`, after fastai's miniai.
    """

    cleanup_timeout: float = 5.0
    drain_timeout: float = 2.0

    def __init__(
        self,
        model: nn.Module,
        dls: Any = None,
        loss_func: Callable[..., Any] = F.mse_loss,
        lr: float = 0.1,
        cbs: Callback | Iterable[Callback] | None = None,
        opt_func: Callable[..., Any] | None = optim.SGD,
        *,
        bus: Bus | None = None,
    ) -> None:
        super().__init__(bus)
        self.model = model
        self.dls = dls
        self.loss_func = loss_func
        self.lr = lr
        self.opt_func = opt_func
        self.result: FitResult | None = None
        self.record = {}
        self.history = []
        self._completed = Counter()
        self._fitting = False
        self.add_cbs(cbs)

    # ---------------------------------------------------------------------------------- fit

    async def fit(
        self,
        n_epochs: int = 1,
        train: bool = True,
        valid: bool = True,
        cbs: Callback | Iterable[Callback] | None = None,
        lr: float | None = None,
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

        Raises:
            RuntimeError: this learner is fitting already.
            TypeError, ValueError: something asked for is missing or wrong; before any work.
            Exception: what a receiver, the model or the data raised, with a note saying where.
        """
        if isinstance(n_epochs, bool) or not isinstance(n_epochs, int) or n_epochs < 0:
            raise ValueError(f"n_epochs={n_epochs!r}: give a whole number, 0 or more")
        actions = ACTIONS if train else (Predict, GetLoss)
        return await self._fit(n_epochs, train, valid, cbs, lr, actions)

    async def _fit(
        self,
        n_epochs: int,
        train: bool,
        valid: bool,
        cbs: Callback | Iterable[Callback] | None,
        lr: float | None,
        actions: tuple[type[ActionEvent], ...],
    ) -> FitResult:
        self._check_idle()
        self._fitting = True
        temporary: tuple[Callback, ...] = ()
        try:
            temporary = self.add_cbs(cbs)
            check_performers(self, actions)
            self._prepare(n_epochs, train, valid, lr)
            with self._kept_optimizer_at(lr):
                return await self._run()
        finally:
            self.remove_cbs(cb for cb in temporary if any(cb is own for own in self.cbs))
            self._requests.clear()
            self._fitting = False

    def run(
        self,
        n_epochs: int = 1,
        train: bool = True,
        valid: bool = True,
        cbs: Callback | Iterable[Callback] | None = None,
        lr: float | None = None,
        *,
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
        fit = partial(self.fit, n_epochs, train, valid, cbs, lr)
        return anyio.run(fit, backend=backend, backend_options=backend_options)

    async def validate(self, dl: Any = None) -> dict[str, Any]:
        """Run one validating epoch; return its numbers, such as "loss" and the metrics.

        Args:
            dl: the loader to use, `dls.valid` by default.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.
        """
        from ..callbacks import MetricsCB  # at call time: callbacks are built on the engine

        measured = any(isinstance(cb, MetricsCB) for cb in self.cbs)
        with self._validating(dl):
            result = await self.fit(1, train=False, cbs=None if measured else MetricsCB())
        numbers = dict(result.history[-1]) if result.history else {}
        return {key: value for key, value in numbers.items() if key not in ("epoch", "train")}

    async def get_preds(self, dl: Any = None, with_targets: bool = False) -> Any:
        """Predict for every sample of a loader, without a loss.

        Args:
            dl: the loader to use, `dls.valid` by default.
            with_targets: whether to return the targets, too.

        Returns:
            The predictions on the CPU, concatenated along their first dimension; with targets,
            a tuple of both.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.
        """
        collected = CollectPredictions(with_targets)
        with self._validating(dl):
            result = await self._fit(1, False, True, collected, None, actions=(Predict,))
        if not collected.preds:
            raise RuntimeError(
                f"no predictions: {result.who or 'nobody'} ended the run before the first"
                f" ({result.reason or 'every batch was skipped'})"
            )
        preds = concatenate(collected.preds)
        return (preds, concatenate(collected.targets)) if with_targets else preds

    async def lr_find(
        self, lr_mult: float = 1.3, start_lr: float = 1e-5, max_epochs: int = 10
    ) -> LRFinderCB:
        """Try rising learning rates; leave model, optimizer and random states as they were.

        Args:
            lr_mult: the factor from one step to the next.
            start_lr: the first learning rate.
            max_epochs: end after these, if the loss has not exploded before.

        Returns:
            The finder: its `suggestion("valley")`, `suggestions`, `lrs`, `losses`, `plot()`.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.

        Source: the post's `lr_find`, after fastai's.
        """
        from ..callbacks import LRFinderCB  # at call time: callbacks are built on the engine

        self._check_idle()
        finder = LRFinderCB(lr_mult)
        with preserved(self):
            await self.fit(max_epochs, valid=False, cbs=finder, lr=start_lr)
        return finder

    @contextmanager
    def _validating(self, dl: Any) -> Iterator[None]:
        """Use `dl`, if given, and leave the model in the mode that it was in."""
        self._check_idle()
        dls = self.dls
        modes = [(module, module.training) for module in self.model.modules()]
        if dl is not None:
            self.dls = DataLoaders(valid=dl)
        elif getattr(dls, "valid", None) is None:
            raise ValueError(
                "there is no data for this: dls.valid is missing. Give DataLoaders a valid loader,"
                " or pass one here: dl=..."
            )
        try:
            yield
        finally:
            self.dls = dls
            for module, training in modes:
                module.training = training

    def stop(
        self, scope: Literal["fit", "epoch", "batch"] = "fit", reason: str | None = None
    ) -> bool:
        """Ask the training to leave a scope at its next event.

        From any thread, task or signal handler. A scope that ends by itself first is not
        waited for again.

        Args:
            scope: what to leave: "fit", "epoch" or "batch".
            reason: why, for the events, the logs and the result.

        Returns:
            Whether a fit is running that will hear of it.

        Raises:
            ValueError: there is no such scope.
        """
        if scope not in _CANCELS:
            raise ValueError(f"stop(scope={scope!r}): choose 'fit', 'epoch' or 'batch'")
        cancel = _CANCELS[scope](reason or "stop() was called")
        cancel.who = "Learner.stop"
        return self._request(cancel)

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
        self.run_id = uuid.uuid4().hex[:12]
        self.train, self.valid = train, valid
        self.n_epochs = n_epochs
        self.epochs = range(n_epochs)
        self.epoch = self.iter = self.n_samples = 0
        self.history = []
        self._completed.clear()
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
        groups = self.opt.param_groups if self.opt_func is None and lr is not None else []
        own = [group["lr"] for group in groups]
        for group in groups:
            group["lr"] = lr
        try:
            yield
        finally:
            for group, before in zip(groups, own, strict=True):
                group["lr"] = before

    async def _run(self) -> FitResult:
        runtime = Runtime(self)
        self._async_wrapper = runtime.async_wrapper
        self.audience = list(self.streams)
        for stream in self.audience:
            stream.begin()
        start = time.perf_counter()
        try:
            await runtime.run(self.one_fit)
        finally:
            self._async_wrapper = None
            for stream in (streams := tuple(self.audience)):
                stream.finish()
            self.result = self._make_result(time.perf_counter() - start, streams)
            if self.result.dropped:
                structlog.get_logger("eventrain").warning(
                    "events_dropped", run_id=self.run_id, dropped=dict(self.result.dropped)
                )
        return self.result

    def _make_result(self, seconds: float, streams: Iterable[EventStream[Any]]) -> FitResult:
        end = self._end  # the last scope to end was the fit
        dropped: Counter[str] = Counter()
        for stream in streams:
            dropped[stream.name] += stream.dropped
        return FitResult(
            run_id=self.run_id,
            status=end.status,
            who=end.who,
            reason=end.reason,
            n_epochs=self.n_epochs,
            epochs=self._completed[CleanupEpoch, self.train],
            batches=self._completed[CleanupBatch, True],
            valid_batches=self._completed[CleanupBatch, False],
            steps=self._completed[CleanupStep, True],
            seconds=seconds,
            history=tuple(row for row in self.history if len(row) > 2),
            dropped=MappingProxyType(+dropped),  # without the zeros
        )

    def _request(self, error: BaseException) -> bool:
        """Have the training thread raise `error` at its next event."""
        if not self._fitting:
            return False
        target = self._open_scope(type(error)) if isinstance(error, CancelException) else None
        self._requests.append((error, target))
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

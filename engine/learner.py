"""The Learner: the loop with its model, data and callbacks, awaited by an async host."""

from __future__ import annotations

import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, Literal, TextIO, TypeVar

import anyio
import anyio.lowlevel
from torch import nn, optim
from torch.nn import functional as F

from ..events import (
    Bus,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    Subscription,
)
from ..events.callback import Overflow
from .attachments import Attachments
from .data import loader_of
from .explain import check_performers, explain
from .loop import ACTIONS, Loop
from .observers import EventStream, Observer
from .result import FitResult
from .runtime import Runtime

E = TypeVar("E", bound=Event)
R = TypeVar("R", bound=Callable[..., Any])

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
        self.model = model
        self.dls = dls
        self.loss_func = loss_func
        self.lr = lr
        self.opt_func = opt_func
        self.bus = Bus() if bus is None else bus
        self.result: FitResult | None = None
        self.record = {}
        self.history = []
        self._completed = Counter()
        self._ends = {}
        self._requests = deque()
        self._methods = {action: getattr(self, action.hook, None) for action in ACTIONS}
        self._fitting = False
        self._runtime: Runtime | None = None
        self.streams: list[EventStream[Any]] = []
        self._attachments = Attachments(self, self.bus, self.observe)
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
        if self._fitting:
            raise RuntimeError(
                f"this learner is fitting already (run {self.run_id}); await that, or use another"
                " learner: one fits once at a time"
            )
        self._fitting = True
        temporary: tuple[Callback, ...] = ()
        try:
            temporary = self.add_cbs(cbs)
            self._prepare(n_epochs, train, valid, lr)
            return await self._run(train, valid)
        finally:
            self.remove_cbs(temporary)
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
        try:
            anyio.lowlevel.current_token()
        except anyio.NoEventLoopError:
            fit = partial(self.fit, n_epochs, train, valid, cbs, lr)
            return anyio.run(fit, backend=backend, backend_options=backend_options)
        raise RuntimeError(
            "run() starts an event loop, and one is running in this thread already: use"
            " `await learner.fit(...)` here"
        )

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

    @property
    def stopping(self) -> bool:
        """Whether something has asked the running fit to stop, and it has not done so yet."""
        return bool(self._requests)

    def _prepare(self, n_epochs: int, train: bool, valid: bool, lr: float | None) -> None:
        """Check what can be known before any work, and begin anew."""
        for training in [True] * train + [False] * valid:
            loader_of(self.dls, training)
        check_performers(self, ACTIONS if train else ACTIONS[:2])
        if train and self.opt_func is not None:
            self.opt = self._make_optimizer(self.lr if lr is None else lr)
        if train and self.opt is None:
            raise ValueError("opt_func is None, which keeps learner.opt, but that is not set")
        self.run_id = uuid.uuid4().hex[:12]
        self.n_epochs = n_epochs
        self.epochs = range(n_epochs)
        self.epoch = self.iter = self.n_samples = 0
        self.history = []
        self._completed.clear()
        self._ends.clear()
        self._requests.clear()

    def _make_optimizer(self, lr: float) -> Any:
        if isinstance(lr, int | float) and not lr >= 0:
            raise ValueError(f"lr={lr!r}: give a learning rate of 0 or more")
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

    async def _run(self, train: bool, valid: bool) -> FitResult:
        runtime = self._runtime = Runtime(self)
        self._async_wrapper = runtime.async_wrapper
        for stream in self.streams:
            stream.begin()
        start = time.perf_counter()
        try:
            await runtime.run(partial(self.one_fit, train, valid))
        finally:
            self._runtime = self._async_wrapper = None
            for stream in (streams := tuple(self.streams)):
                stream.finish()
            self.result = self._make_result(train, time.perf_counter() - start, streams)
        return self.result

    def _make_result(
        self, train: bool, seconds: float, streams: Iterable[EventStream[Any]]
    ) -> FitResult:
        end = self._ends[CleanupFit]
        dropped: Counter[str] = Counter()
        for stream in streams:
            dropped[stream.name] += stream.dropped
        return FitResult(
            run_id=self.run_id,
            status=end.status,
            who=end.who,
            reason=end.reason,
            n_epochs=self.n_epochs,
            epochs=self._completed[CleanupEpoch, train],
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

    # ---------------------------------------------------------------------------- callbacks

    @property
    def cbs(self) -> tuple[Callback, ...]:
        """The callbacks, in the order they were attached in. See `add_cbs`, `remove_cbs`."""
        return self._attachments.callbacks

    def add_cbs(self, cbs: Callback | Iterable[Callback] | None) -> tuple[Callback, ...]:
        """Attach one callback or several, all or none; return them.

        Raises:
            TypeError: one is no Callback.
            ValueError: one is attached already, or `run_after`/`run_before` make a circle.
        """
        cbs = () if cbs is None else (cbs,) if isinstance(cbs, Callback | type) else tuple(cbs)
        self._attachments.attach(cbs)
        return cbs

    def remove_cbs(self, cbs: Callback | Iterable[Callback]) -> None:
        """Detach one callback or several. Raises ValueError if one is not attached."""
        for callback in (cbs,) if isinstance(cbs, Callback) else tuple(cbs):
            self._attachments.detach(callback)

    def explain(self, file: TextIO | None = None) -> str:
        """Print, and return, what runs on every event, in order, and who performs each action.

        Args:
            file: where to print to, standard output by default.
        """
        text = explain(self)
        print(text, file=file)
        return text

    # ------------------------------------------------------------------------- subscriptions

    def on(
        self,
        event_type: type[E],
        *,
        order: float = 0,
        every: int = 1,
        once: bool = False,
        where: Callable[[E], bool] | None = None,
    ) -> Callable[[R], R]:
        """Subscribe the decorated function; the arguments are those of `Bus.subscribe`.

        Example:
            >>> import torch
            >>> from eventrain.engine import DataLoaders, TrainLearner
            >>> from eventrain.events import AfterBatch
            >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
            >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
            >>> @learner.on(AfterBatch, every=2)
            ... def tell(event):
            ...     print("batch", event.iter + 1, "of", event.n_iter)
            >>> result = learner.run(valid=False)
            batch 2 of 4
            batch 4 of 4
        """

        def decorate(receiver: R) -> R:
            self.subscribe(
                event_type, receiver, order=order, every=every, once=once, where=where
            )
            return receiver

        return decorate

    def subscribe(
        self,
        event_type: type[E],
        receiver: Callable[[E], Any],
        *,
        order: float = 0,
        every: int = 1,
        once: bool = False,
        where: Callable[[E], bool] | None = None,
    ) -> Subscription:
        """Call `receiver` with this learner's events, in order, in the training thread.

        It may change the learner and may raise a cancel; an `async def` is awaited on the
        caller's event loop while the training waits. The arguments are those of
        `Bus.subscribe`. Close what is returned to end it.
        """
        return self.bus.subscribe(
            event_type, receiver, order=order, every=every, once=once, where=where, learner=self
        )

    def events(
        self,
        *event_types: type[E],
        buffer: int = 1024,
        overflow: Overflow = "drop_oldest",
        where: Callable[[E], bool] | None = None,
    ) -> EventStream[E]:
        """This learner's events as an async stream, until the fit that is watched has ended.

        Args:
            event_types: event classes; all events if none is given.
            buffer: how many events are held for a slow reader.
            overflow: what happens when it is full: "drop_oldest"; "latest", which holds only
                the newest; or "block", which loses nothing and slows the training down.
            where: only events for which this is true; asked in the training thread.

        Raises:
            TypeError, ValueError: no event class, buffer below 1, or an unknown policy.

        Example:
            >>> import anyio, torch
            >>> from eventrain.engine import DataLoaders, TrainLearner
            >>> from eventrain.events import CleanupEpoch
            >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
            >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
            >>> async def main():
            ...     async with learner.events(CleanupEpoch) as stream, anyio.create_task_group() as tg:
            ...         tg.start_soon(learner.fit, 2)
            ...         async for event in stream:
            ...             print(event.epoch, "train" if event.training else "valid")
            >>> anyio.run(main)
            0 train
            0 valid
            1 train
            1 valid
        """
        return EventStream(self, event_types, buffer, overflow, where)

    def observe(
        self,
        receiver: Callable[[E], Any],
        *event_types: type[E],
        buffer: int = 1024,
        overflow: Overflow = "drop_oldest",
        where: Callable[[E], bool] | None = None,
        on_error: Literal["log", "raise"] = "log",
    ) -> Observer[E]:
        """Call `receiver`, plain or async, with events beside the training, on the event loop.

        It cannot cancel, change or hurt the run. The arguments are those of `events`, and:

        Args:
            on_error: what a receiver that raises leads to, besides being logged and detached:
                "log" nothing, "raise" the end of the fit with that error.
        """
        observer = Observer(self, event_types, buffer, overflow, where, receiver, on_error)
        return observer.open()

    def wake(self, stream: EventStream[Any]) -> None:
        """Have a reader woken at once, from the training thread."""
        if self._runtime is not None:
            self._runtime.wake(stream)

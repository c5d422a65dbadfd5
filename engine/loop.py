"""The training loop, on one screen. Every event it emits stands in it as a class name.

Source: "The Ultimate Training Loop", after fastai's miniai.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from types import CoroutineType
from typing import Any

import torch

from ..events import (
    ActionEvent,
    AfterBackward,
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    AfterPredict,
    AfterStep,
    Backward,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    Bus,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    GetLoss,
    Predict,
    ScopeEnd,
    Step,
    ZeroGrad,
)
from ..events.signal import AsyncWrapper, blame
from .data import length_of, read
from .explain import nobody_performs
from .listened import Listened
from .position import Done, Position
from .randomness import RandomState, random_state
from .resume import Resumption
from .scope import InterruptedFit, Open, innermost, scope, scope_within


class Loop(Listened):
    """Fit, epoch, batch, step: the four scopes, top to bottom. Runs in one thread, blocking."""

    @scope(CancelFitException, CleanupFit)
    def one_fit(self) -> None:
        self.emit(BeforeFit)
        self._resume()
        for self.epoch in self.epochs:
            if self.train and self._start_epoch(training=True):
                self.one_epoch()
            if self.valid and self._start_epoch(training=False):
                with torch.no_grad():
                    self.one_epoch()
        self.emit(AfterFit)

    @scope(CancelEpochException, CleanupEpoch)
    def one_epoch(self) -> None:
        self.emit(BeforeEpoch)
        for self.iter in self._read_batches():  # into self.batch
            self.one_batch()
        self.emit(AfterEpoch)
        self.done.epochs += 1

    @scope(CancelBatchException, CleanupBatch)
    def one_batch(self) -> None:
        self.loss = None
        self.emit(BeforeBatch)
        self.perform(Predict)
        self.emit(AfterPredict)
        self.perform(GetLoss)
        self.emit(AfterLoss)
        if self.training:
            self.perform(Backward)
            self.emit(AfterBackward)
            self.one_step()
        self.emit(AfterBatch)
        self.done.batches += 1

    @scope(CancelStepException, CleanupStep)
    def one_step(self) -> None:
        self.emit(BeforeStep)
        self.perform(Step)
        self.perform(ZeroGrad)
        self.emit(AfterStep)
        self.done.steps += 1

    # ------------------------------------------------------------- what the loop is made of

    # Slots, because CPython looks up whatever an instance has in its `__dict__`, its methods too,
    # the slow way once there are more than thirty of it there: 2 us a batch.
    __slots__ = (
        "_async_wrapper",
        "_cleaning",
        "_end",
        "_innermost",
        "_resumption",
        "batch",
        "dl",
        "dls",
        "done",
        "done_in",
        "ending",
        "epoch",
        "epochs",
        "going_on",
        "history",
        "iter",
        "loss",
        "model",
        "n_epochs",
        "n_iter",
        "n_samples",
        "opt",
        "preds",
        "random_at_epoch",
        "record",
        "start",
        "train",
        "training",
        "valid",
    )

    model: torch.nn.Module
    dls: Any
    dl: Any
    opt: Any
    batch: Any
    preds: Any
    loss: Any
    random_at_epoch: RandomState
    """The random states when the loader of this epoch was begun with, for those who resume it."""
    _end: ScopeEnd
    """How the fit has ended; while a scope in it is left, how that has."""

    def __init__(self, bus: Bus | None) -> None:
        super().__init__(bus)
        self.dl = self.opt = None
        self.batch = self.preds = self.loss = None
        self.train = True
        self.valid = True
        self.n_epochs = 0
        self.epochs = range(0)
        self.epoch = 0
        self.iter = 0
        self.n_iter: int | None = None
        self.n_samples = 0
        self.training = False
        self.record: dict[str, Any] = {}
        """The numbers of this epoch: a row of the history, which receivers may add to."""
        self.history: list[dict[str, Any]] = []
        self.done_in = {True: Done(), False: Done()}
        """What is done of this fit, in training and in validation."""
        self.done = self.done_in[True]
        """The one of the two that is being added to."""
        self.start = Position()
        """Where this fit begins: at the first batch, or where a checkpoint was saved."""
        self.going_on = True
        """For Cleanup* receivers: whether this scope alone is over, completed or by its own
        cancel."""
        self.ending = False
        """For Cleanup* receivers: whether a graceful `stop` takes effect when they are done."""
        self._resumption: Resumption | None = None
        self._innermost: Open | None = None
        self._cleaning = False
        """Whether a Cleanup* event is being sent: what it emits is sent too, cancelled or not."""
        self._async_wrapper: AsyncWrapper | None = None

    def scope(
        self, cancel: type[CancelException], cleanup: type[Event]
    ) -> AbstractContextManager[None]:
        """A scope of your own: `cancel` leaves it, `cleanup` is emitted when it is left."""
        return scope_within(self, cancel, cleanup)

    def emit(self, event_type: type[Event], *extra: Any) -> None:
        """Send an event of where the loop is now; not even made if nobody listens.

        Callbacks may emit events of their own; `extra` are the fields those add.
        """
        if self._requests and not self._cleaning:
            self._honour_requests()
        if event_type in self._unheard:
            return
        signal = self.signals[event_type]
        if signal.receivers:
            signal.send(event_type.of(self, *extra), _async_wrapper=self._async_wrapper)

    def perform(self, action: type[ActionEvent]) -> None:
        """Have an action done: by the first receiver in order, or else by our own method."""
        if action not in self._unheard and self._delegate(action):
            return
        try:
            result = getattr(self, action.hook)()
            if result is not None and result.__class__ is CoroutineType:
                self._await(result, action)
        except BaseException as exc:
            if not hasattr(self, action.hook):  # who performed it has left in the middle of the fit
                raise nobody_performs(self, action) from None
            blame(exc, f"{type(self).__qualname__}.{action.hook}", action.of(self))
            raise

    def _delegate(self, action: type[ActionEvent]) -> bool:
        """Have a receiver perform an action, if there is one for this learner."""
        signal = self.signals[action]
        performer = signal.performer(self)
        if performer is None:
            return False
        signal.send_to(performer, action.of(self), self._async_wrapper)
        return True

    def _await(self, coroutine: CoroutineType[Any, Any, Any], action: type[ActionEvent]) -> None:
        """Have a method of our own that is async done by the host's event loop."""
        assert self._async_wrapper is not None
        self._async_wrapper(lambda _event: coroutine)(action.of(self))

    def _resume(self) -> None:
        """Load the checkpoint, if this fit resumes one."""
        if self._resumption is not None:
            self._resumption.begin(self)

    def _read_batches(self) -> Iterator[int]:
        """Read the batches of this epoch, one by one, into `batch`, and yield their numbers; of
        an epoch that is resumed, those still to come."""
        if self._resumption is not None:
            return self._resumption.batches(self)
        self.random_at_epoch = random_state(self.dls)
        return read(self, self.dl)

    def _start_epoch(self, training: bool) -> bool:
        """Choose mode and loader, and begin a row of the history; not if it is done before the
        checkpoint that is resumed."""
        if self.start.is_beyond(self.epoch, training):
            return False
        if self._resumption is not None and not self.start.is_within(self.epoch, training):
            raise self._resumption.never_loaded()
        self.training = training
        self.done = self.done_in[training]
        self.model.train(training)
        self.dl = self.dls.train if training else self.dls.valid
        self.n_iter = length_of(self.dl)
        self.iter = self.n_samples = 0
        self.loss = None
        self.record = {"epoch": self.epoch, "train": "train" if training else "eval"}
        self.history.append(self.record)
        return True

    def _open_scope(self, cancel: type[CancelException]) -> Open | None:
        """The innermost open scope that catches `cancel`."""
        return innermost(self._innermost, lambda own: issubclass(cancel, own))

    def _honour_requests(self, gracefully: bool = False) -> None:
        """Raise what `stop`, the host or an observer asked for, if it is still due."""
        for request in tuple(self._requests):
            error, target, graceful = request
            if isinstance(error, InterruptedFit):
                raise InterruptedFit  # stays requested until the fit has ended
            if isinstance(error, CancelException):
                scope = self._open_scope(type(error))
                if target is not None and target is not scope:
                    self._requests.remove(request)
                    continue  # what was to be stopped has ended by itself
                if scope is None:
                    continue  # between two batches or epochs: meant for the next one
            if graceful and not gracefully:
                continue
            self._requests.remove(request)
            raise error

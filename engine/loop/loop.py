"""The training loop on one screen. Each event appears in it as a class name.

Source: "The Ultimate Training Loop", after fastai's miniai.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import CoroutineType
from typing import Any, Literal

import torch

from ...events import (
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
    Step,
    Subscription,
    ZeroGrad,
)
from ...events.base import lrs_of
from ...events.errors import annotate_error
from ..data.dataloaders import length_of
from .actions import nobody_performs, performers
from .clock import epoch_length, epochs_of
from .reading import BatchReader
from .requests import CANCELS, Request, scope_for
from .scope import scope, scope_within
from .state import LoopState


class Loop(LoopState):
    """Fit, epoch, batch, step: the four scopes, top to bottom. It blocks, in one thread."""

    @scope(CancelFitException, CleanupFit)
    def one_fit(self) -> None:
        self.emit(BeforeFit)
        self.batch_reader.begin(self)
        for self.epoch in epochs_of(self):
            if self.trains and self._start_epoch(training=True):
                self.one_epoch()
            if self.validates and self._start_epoch(training=False):
                with torch.no_grad():
                    self.one_epoch()
        self.emit(AfterFit)

    @scope(CancelEpochException, CleanupEpoch)
    def one_epoch(self) -> None:
        self.emit(BeforeEpoch)
        for self.iter in self.batch_reader.read(self):  # into self.batch
            self.one_batch()
        self.emit(AfterEpoch)
        self.done.epochs += 1

    @scope(CancelBatchException, CleanupBatch)
    def one_batch(self) -> None:
        self.loss = self.step_lrs = self.updated = None
        self.emit(BeforeBatch)
        self.perform(Predict)
        self.emit(AfterPredict)
        self.perform(GetLoss)
        if not self.updated:  # by learner.update(loss, ...)
            self.emit(AfterLoss)
            if self.training:
                self.gradients_pending = True
                self.perform(Backward)
                self.emit(AfterBackward)
                self.one_step()
        self.emit(AfterBatch)
        self.done.batches += 1

    @scope(CancelStepException, CleanupStep)
    def one_step(self) -> None:
        self.emit(BeforeStep)
        self.step_lrs = lrs_of(self.opt)
        self.perform(Step)
        self.done.steps += self.step_counts
        self.perform(ZeroGrad)
        self.gradients_pending = False
        self.emit(AfterStep)

    # ------------------------------------------------------------------- used by the loop above

    __slots__ = ()

    def __init__(self, bus: Bus | None) -> None:
        super().__init__(bus, BatchReader())

    def scope(
        self, cancel: type[CancelException], cleanup: type[Event]
    ) -> AbstractContextManager[None]:
        """A scope of your own: `cancel` leaves it, `cleanup` is emitted when it is left."""
        return scope_within(self, cancel, cleanup)

    def emit(self, event_type: type[Event], *extra: Any) -> None:
        """Send an event for the current position; without receivers, the event is not created.

        Callbacks may emit events of their own classes; `extra` are the fields that those add.
        """
        if self.pending_requests and not self.cleaning_up:
            self.pending_requests.raise_due(self.innermost_scope)
        if event_type in self.without_receivers:
            return
        signal = self.signals[event_type]
        if signal.receivers:
            signal.send(event_type.of(self, *extra), _async_wrapper=self.async_wrapper)

    def perform(
        self, action: type[ActionEvent], following: tuple[Subscription, ...] | None = None
    ) -> None:
        """Perform an action: by its first receiver in order, or else by the learner's method.

        Args:
            action: the class of the action.
            following: the receivers that are left, when one of them proceeds; by default all.
        """
        if action not in self.without_receivers and self._delegate(action, following):
            return
        try:
            result = getattr(self, action.hook)()
            if result is not None and result.__class__ is CoroutineType:
                self._await(result, action)
        except BaseException as exc:
            if not hasattr(self, action.hook):  # its performer was removed during the fit
                raise nobody_performs(self, action) from None
            error = annotate_error(exc, f"{type(self).__qualname__}.{action.hook}", action.of(self))
            if error is exc:
                raise
            raise error from None

    def _delegate(
        self, action: type[ActionEvent], following: tuple[Subscription, ...] | None
    ) -> bool:
        """Have the first receiver perform an action, if there is one for this learner."""
        found = performers(self, action) if following is None else following
        if not found:
            return False
        first, *others = found
        self.signals[action].send_to(first, action.of(self, tuple(others)), self.async_wrapper)
        return True

    def _await(self, coroutine: CoroutineType[Any, Any, Any], action: type[ActionEvent]) -> None:
        """Wait for an async method of the learner, which the host's event loop awaits."""
        assert self.async_wrapper is not None
        self.async_wrapper(lambda _event: coroutine)(action.of(self))

    def _start_epoch(self, training: bool) -> bool:
        """Choose mode and loader, and begin a row of the history.

        Returns False for an epoch that was completed before the checkpoint was saved.
        """
        if not self.batch_reader.includes(self.epoch, training):
            return False
        self.training = training
        self.done = self.progress[training]
        self.model.train(training)
        self.dl = self.dls.train if training else self.dls.valid
        loader, length = self.lengths.pop(training, (None, None))  # asked before the fit
        self.n_iter = epoch_length(self, length if loader is self.dl else length_of(self.dl))
        self.iter = self.n_samples = 0
        self.all_read = False
        self.loss = None
        self.record = {"epoch": self.epoch, "train": "train" if training else "eval"}
        self.history.append(self.record)
        return True

    # ------------------------------------------------------------------------------- requests

    def stop(
        self,
        scope: Literal["fit", "epoch", "batch"] = "fit",
        reason: str | None = None,
        *,
        graceful: bool = False,
        who: str = "Learner.stop",
    ) -> bool:
        """Ask the training to leave a scope at its next event.

        May be called from any thread, task or signal handler. If the scope ends by itself first,
        the request is dropped.

        Args:
            scope: what to leave: "fit", "epoch" or "batch".
            reason: the reason to report in the events, the logs and the result.
            graceful: let the current batch end first, and let `CheckpointCB` save there.
            who: the name of the caller to report there.

        Returns:
            Whether a fit is running, to which the request was added.

        Raises:
            ValueError: there is no such scope, or `graceful` is used with "batch".
        """
        if scope not in CANCELS:
            raise ValueError(f"stop(scope={scope!r}): choose 'fit', 'epoch' or 'batch'")
        if graceful and scope == "batch":
            raise ValueError("stop('batch', graceful=True): a batch that may end is not stopped")
        cancel = CANCELS[scope](reason or "stop() was called")
        cancel.who = who
        return self.request_error(cancel, graceful)

    def request_error(self, error: BaseException, graceful: bool = False) -> bool:
        """Have the training thread raise `error` at its next event. May be called anywhere.

        Returns whether a fit is running; without one, nothing is requested.
        """
        if not self.fitting:
            return False
        is_cancel = isinstance(error, CancelException)
        target = scope_for(type(error), self.innermost_scope) if is_cancel else None
        self.pending_requests.append(Request(error, target, graceful))
        return True

    @property
    def stopping(self) -> bool:
        """Whether a request to stop the running fit has not taken effect yet."""
        return bool(self.pending_requests)

"""One fit, from its plan to its result."""

from __future__ import annotations

import os
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from typing import cast

import anyio

from ...events import ScopeEnd
from ...events.types import numbers_of
from .. import log
from ..checkpoint.parts import SavedLearner, is_module, is_optimizer
from ..checkpoint.reader import Checkpoint
from ..checkpoint.resume import ResumableBatchReader, ResumedBatchReader, last_checkpoint
from ..checkpoint.search import parts_of
from ..data.dataloaders import check_can_be_read, loader_of
from ..imports import import_large
from ..loop.actions import check_performers
from ..loop.clock import expected_steps
from ..loop.parameters import drop_unused_gradients
from ..loop.state import COMPLETED
from ..loop.trained_parameters import trained_parameters
from .closure import check_closure
from .fittable import Fittable
from .forks import HostLoop, is_left_in_parent
from .graceful import GracefulStop
from .optimizer import as_one, make_optimizer, temporary_lr
from .plan import FitPlan, check_lr
from .result import FitResult
from .thread import TrainingThread


class Fit:
    """One fit of a learner: checks its arguments, runs the loop in a thread, makes the result.

    Args:
        learner: the learner that fits.
        plan: the arguments of the fit.

    Raises:
        RuntimeError: the learner is fitting already.
        ValueError: signals cannot end the fit gracefully; see `GracefulStop`.
    """

    def __init__(self, learner: Fittable, plan: FitPlan) -> None:
        check_idle(learner)
        self._learner = learner
        self._plan = plan
        self._graceful = None if plan.graceful is False else GracefulStop(learner, plan.graceful)
        self._resumed: ResumedBatchReader | None = None
        self._result: FitResult | None = None

    async def run(self) -> FitResult:
        """Run the fit; return or raise only when its thread has ended.

        Everything whose time grows with the model, the data or the user's own objects runs in that
        thread, the preparation and the restoring included. A fit that is refused has no result,
        and leaves the open streams to the next one.
        """
        learner = self._learner
        previous_run_id = learner.run_id
        learner.run_id = self._plan.run_id or uuid.uuid4().hex[:12]
        learner.pending_requests.clear()
        learner.fitting = True
        try:
            with self._graceful or nullcontext():
                await self._run_thread()
        finally:
            if self._result is None:
                learner.run_id = previous_run_id
            learner.pending_requests.clear()
            learner.lengths.clear()
            learner.end_use_of_cbs()
            learner.fitting = False
        assert self._result is not None
        return self._result

    # --------------------------------------------------------------------- on the event loop

    async def _run_thread(self) -> None:
        learner = self._learner
        self._thread = TrainingThread(learner, self._graceful)
        learner.async_wrapper = self._thread.async_wrapper
        learner.fit_streams = list(learner.streams)
        for stream in learner.fit_streams:
            stream.begin()
        try:
            with HostLoop(learner):
                await self._thread.run(self._work)
        except BaseException as exc:
            self._finish()
            if not isinstance(exc, GeneratorExit):  # the event loop still runs
                with suppress(anyio.get_cancelled_exc_class()):  # the first error is the one
                    await log.written()
            raise
        self._finish()
        await log.written()

    def _finish(self) -> None:
        """Close the streams, and complete the result, if there is one, with what they lost."""
        learner = self._learner
        learner.async_wrapper = None
        streams, learner.fit_streams = learner.fit_streams, []
        if self._result is None:
            return
        dropped: Counter[str] = Counter()
        for stream in streams:
            stream.finish()
            dropped[stream.name] += stream.dropped
        dropped = +dropped  # without the zeros
        learner.result = self._result = replace(self._result, dropped=dict(dropped))
        if dropped:
            log.warning("events_dropped", run_id=learner.run_id, dropped=dict(dropped))

    # ---------------------------------------------------------------- in the training thread

    def _work(self) -> None:
        """Prepare, run the loop, and restore what was changed for this fit alone."""
        learner, plan = self._learner, self._plan
        learner.begin_use_of_cbs()  # first: what follows may change their state
        with plan.within, self._temporary_callbacks():
            self._prepare()
            kept = plan.train and learner.opt_func is None and plan.lr is not None
            with temporary_lr(learner.opt, plan.lr) if kept else nullcontext():
                self._train()

    def _prepare(self) -> None:
        """Check what can be checked before the fit, and set the loop to its beginning."""
        learner, plan = self._learner, self._plan
        check_performers(learner, plan.actions)
        for training in [True] * plan.train + [False] * plan.valid:
            learner.lengths[training] = loader, _ = loader_of(learner.dls, training)
            bound = plan.epoch_length or plan.max_steps if training else plan.valid_length
            check_can_be_read(loader, training, plan.n_epochs, bound=bound is not None)
        check_lr(plan.lr)
        learner.fit_lr = plan.lr
        if plan.train and learner.opt_func is not None:
            import_large("torch._dynamo")  # as the first optimizer does
            learner.fit_lr = learner.lr if plan.lr is None else plan.lr
            learner.opt = make_optimizer(learner, learner.fit_lr)
        elif plan.train and learner.opt is None:
            raise ValueError(
                "opt_func is None, which keeps learner.opt, but that is not set: set one of them"
            )
        learner.opt = as_one(learner.opt, learner.model)
        learner.wants_closure = plan.train and check_closure(learner)
        purposes = [plan.purpose, *(cb.fit_purpose for cb in learner.cbs)]
        learner.begin_fit(
            ResumableBatchReader(),
            n_epochs=plan.n_epochs,
            max_steps=plan.max_steps,
            epoch_length=plan.epoch_length,
            valid_length=plan.valid_length,
            trains=plan.train,
            validates=plan.valid,
            purpose=next((purpose for purpose in purposes if purpose != "fit"), "fit"),
        )
        _, length = learner.lengths.get(True, (None, None))
        learner.n_steps = expected_steps(learner, length, learner.cbs)

    def _train(self) -> None:
        """Run the loop, from the checkpoint if one is given, and make the result."""
        self._thread.begin_observing()
        start = time.perf_counter()
        try:
            if self._plan.resume is not None:
                self._resume(self._plan.resume)
            self._run_loop()
        finally:
            if self._resumed is not None:
                self._resumed.drop_checkpoint()
            self._result = self._make_result(time.perf_counter() - start)

    def _run_loop(self) -> None:
        learner, resumed = self._learner, self._resumed
        if learner.trains:
            learner.trained_parameters = trained_parameters(learner)
        learner.scope_end = COMPLETED
        try:
            learner.one_fit()
        finally:
            learner.batch_reader.end()
            if learner.trains:
                found = [part.value for part in parts_of(cast(SavedLearner, learner))]
                modules, optimizers = filter(is_module, found), filter(is_optimizer, found)
                drop_unused_gradients(learner, modules, optimizers)
        if resumed is not None and not resumed.loaded and learner.scope_end.status == "completed":
            error = resumed.never_loaded()
            learner.scope_end = ScopeEnd("failed", None, str(error))
            raise error

    def _resume(self, resume: str | os.PathLike[str]) -> None:
        """Let the loop begin at a checkpoint. Only its reader holds it, so that it can be freed."""
        learner = self._learner
        last = resume == "last"
        checkpoint = last_checkpoint(learner.cbs) if last else Checkpoint.load(resume)
        if checkpoint is None:
            return
        learner.batch_reader = self._resumed = ResumedBatchReader(checkpoint)
        learner.run_id = self._plan.run_id or checkpoint.manifest["run_id"]

    @contextmanager
    def _temporary_callbacks(self) -> Iterator[None]:
        """Attach the plan's callbacks for the length of the fit."""
        learner = self._learner
        added = learner.add_cbs(self._plan.cbs)
        try:
            yield
        finally:
            learner.remove_cbs(cb for cb in added if any(cb is other for other in learner.cbs))

    def _make_result(self, seconds: float) -> FitResult:
        """The result but for the events that its observers lost, some of which still wait."""
        learner, end = self._learner, self._learner.scope_end
        return FitResult(
            run_id=learner.run_id,
            status=end.status,
            who=end.who,
            reason=end.reason,
            n_epochs=learner.n_epochs,
            epochs=learner.progress[learner.trains].epochs,
            batches=learner.progress[True].batches,
            valid_batches=learner.progress[False].batches,
            steps=learner.progress[True].steps,
            seconds=seconds,
            history=tuple(row for row in learner.history if numbers_of(row)),
            dropped={},
            resumed_from=None if learner.resumed_from is None else str(learner.resumed_from),
        )


def check_idle(learner: Fittable) -> None:
    """Raise a RuntimeError if the learner is fitting."""
    if is_left_in_parent(learner):
        raise RuntimeError(
            f"this learner was fitting (run {learner.run_id}) when this process was forked, and"
            " may be in the middle of a batch: make another learner here, or fork between two fits"
        )
    if learner.fitting:
        raise RuntimeError(
            f"this learner is fitting already (run {learner.run_id}); await that fit, or use"
            " another learner: a learner runs one fit at a time"
        )

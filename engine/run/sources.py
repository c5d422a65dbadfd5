"""How a fit reads its async sources: its tasks, its requests, and its thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Protocol, runtime_checkable

import anyio.from_thread
import anyio.lowlevel

from ...events import CancelEpochException
from ..context import call_soon_threadsafe
from ..loop.requests import InterruptedFit
from .extra_validation import ExtraReader
from .fittable import Fittable


@runtime_checkable
class SavesBetweenBatches(Protocol):
    """A callback that saves, such as `CheckpointCB`, where a graceful stop ends the fit.

    Usually it does so in CleanupBatch. It is called when the fit waits for its next batch, which
    may never come.
    """

    def save_between_batches(self, learner: Any) -> None: ...


class FitSourceHost:
    """The `SourceHost` of one fit; made on the event loop that awaits it.

    Args:
        learner: the learner that fits.
        start_soon: starts a task in the task group of the fit; called on the event loop.
    """

    def __init__(self, learner: Fittable, start_soon: Callable[..., object]) -> None:
        self._learner = learner
        self._start_soon = start_soon
        self._token = anyio.lowlevel.current_token()
        self._call_soon = call_soon_threadsafe()

    @property
    def run_id(self) -> str:
        return self._learner.run_id

    @property
    def cleanup_timeout(self) -> float:
        return self._learner.cleanup_timeout

    def check_thread(self) -> None:
        if threading.get_ident() != self._learner.training_thread:
            raise RuntimeError(
                "an async source is read by the fit's own thread, and this is another one, such as"
                " that of a Prefetcher: leave that out, as AsyncLoader(source, buffer=...) reads"
                " ahead by itself"
            )

    def start(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        anyio.from_thread.run_sync(self._start_soon, task, token=self._token)

    def call_soon(self, function: Callable[[], object]) -> None:
        with suppress(RuntimeError):  # the event loop has ended, and its tasks with it
            self._call_soon(function)

    def check_requests(self) -> None:
        """Raise what is due while the thread waits for a batch: graceful requests as well."""
        learner = self._learner
        if learner.pending_requests and not learner.cleaning_up:
            scope, reader = learner.innermost_scope, learner.batch_reader
            if isinstance(reader, ExtraReader):
                reader.check_stopped(learner)
            between_batches = scope is not None and scope[0] is CancelEpochException
            between_batches = between_batches and not learner.in_extra_validation
            if between_batches and learner.pending_requests.graceful_for(scope):
                for cb in learner.cbs:
                    if isinstance(cb, SavesBetweenBatches):
                        cb.save_between_batches(learner)
            learner.pending_requests.raise_due(scope, between_batches)

    def interruption(self) -> BaseException:
        return InterruptedFit()

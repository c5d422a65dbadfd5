"""The training thread: one for the whole fit, joined before `fit` returns, on any event loop.

The loop blocks, so it cannot run on the host's event loop, and handing each batch to a thread
would take longer than a small batch. So one thread per fit runs the loop from start to end, and
the task that awaits the fit waits for that thread, whatever happens: a cancellation, even a
repeated one, makes the training stop at its next event, and is raised when the thread has ended.

`anyio.to_thread` is not suitable: its threads belong to the host and are limited in number, and
after a native `Task.cancel()` it returns at once while the worker continues to run unnoticed.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import Any, ClassVar

import anyio
import anyio.from_thread
import anyio.lowlevel

from ...events import Event
from ...events.errors import unwrap
from .. import log
from ..context import caller_context
from ..data.async_reading import READINGS, Readings
from ..data.thread_state import torch_state
from ..listeners.observers import Observer
from ..loop.requests import InterruptedFit
from . import forks
from .fittable import Fittable
from .graceful import GracefulStop
from .openmp import end_idle_threads
from .sources import FitSourceHost
from .stack import thread_stack

PUMP_INTERVAL = 0.05
"""Seconds between two deliveries to the observers."""

PATIENCE = 0.1
"""Seconds after which the training thread checks why an async receiver has not returned."""

CANCEL_PATIENCE = 5.0
"""Seconds after a cancellation after which the stack of the training thread is logged."""


class TrainingThread:
    """Runs one blocking function in a thread for one fit, and serves it from the event loop.

    Args:
        learner: the learner that fits.
        graceful: its deadline is checked while the thread runs; None for a fit without it.
    """

    _warned_of_shared_rng: ClassVar[bool] = False

    def __init__(self, learner: Fittable, graceful: GracefulStop | None = None) -> None:
        self._learner = learner
        self._graceful = graceful
        self._token = anyio.lowlevel.current_token()
        self._finished = anyio.Event()
        self._error: BaseException | None = None
        self._reported: BaseException | None = None
        self._host = threading.get_ident()
        self._begun = threading.Event()
        self._observing_begun = False
        self._interrupted = False
        self._log_at = math.inf
        self._pump_scope = anyio.CancelScope(shield=True)
        self._receiver_scope: anyio.CancelScope | None = None
        self._observing: dict[Observer[Any], anyio.CancelScope] = {}

    async def run(self, work: Callable[[], object]) -> None:
        """Run `work` in a new thread; return, or raise, only when that thread has ended.

        Raises the error of `work`, or else the exception that interrupted it.
        """
        context = caller_context()
        host = FitSourceHost(self._learner, self._start_soon)
        self._readings = Readings(host)
        context.run(READINGS.set, self._readings)
        thread = threading.Thread(
            target=context.run,
            args=(self._main, work, torch_state()),
            name=f"eventrain-{self._learner.run_id}",
            daemon=True,
        )
        interruption: BaseException | None = None
        self._warn_of_shared_rng()
        end_idle_threads()
        try:
            async with anyio.create_task_group() as self._tasks:
                try:
                    self._tasks.start_soon(self._pump)
                    interruption = await self._until_finished(thread)
                finally:  # also after Ctrl-C between two lines
                    self._pump_scope.cancel()
                    self._finish_observers()
        except BaseException as exc:  # cancelled while the observers drained
            interruption = unwrap(exc)
        if self._error is not None and not isinstance(self._error, InterruptedFit):
            raise self._error
        if self._reported is not None:  # by an observer, after the training
            raise self._reported
        if interruption is not None:
            raise interruption

    def _start(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except BaseException as exc:
            # The system could not start the thread; or this is Ctrl-C while it was starting.
            if isinstance(exc, Exception) or not self._begun.wait(1):
                self._finished.set()  # there is no thread to wait for
            raise

    async def _until_finished(self, thread: threading.Thread) -> BaseException | None:
        """Start the thread and wait for it, through every cancellation; return the last one.

        The first cancellation may come from an anyio scope. Later ones are native, because the
        wait is shielded from anyio's, and must not be lost when that scope ends.
        """
        interruption: BaseException | None = None
        try:
            self._start(thread)
        except BaseException as exc:
            interruption = exc
            self._interrupt()
        while not self._finished.is_set():
            try:
                patience = self._log_at - time.monotonic()
                with anyio.move_on_after(patience, shield=interruption is not None) as scope:
                    await self._finished.wait()
                if scope.cancelled_caught:
                    self._log_waiting(thread)
            except GeneratorExit:  # the event loop has ended: nothing can be awaited
                self._interrupt()
                raise
            except BaseException as exc:
                interruption = exc
                self._interrupt()
        if self._begun.is_set():
            thread.join()
        return interruption

    def _interrupt(self) -> None:
        if not self._interrupted:
            self._interrupted = True
            self._log_at = time.monotonic() + CANCEL_PATIENCE
            self._learner.request_error(InterruptedFit())
        scope = self._receiver_scope
        if scope is not None and scope.shield:  # a Cleanup* receiver gets `cleanup_timeout`
            scope.deadline = min(scope.deadline, self._cleanup_deadline())
        elif scope is not None:
            scope.cancel()

    def _cleanup_deadline(self) -> float:
        return anyio.current_time() + self._learner.cleanup_timeout

    def _log_waiting(self, thread: threading.Thread) -> None:
        self._log_at = math.inf
        log.warning(
            "cancel_waits",
            run_id=self._learner.run_id,
            seconds=CANCEL_PATIENCE,
            where=thread_stack(thread.ident),
            hint="the fit was cancelled, and returns when its thread reaches its next event",
        )

    def _warn_of_shared_rng(self) -> None:
        if len(forks.running) > 1 and not TrainingThread._warned_of_shared_rng:
            TrainingThread._warned_of_shared_rng = True
            log.warning(
                "concurrent_fits_share_rng",
                hint="torch has one global random state per process: concurrent fits are"
                " reproducible only with generators of their own, e.g. DataLoader(generator=...)",
            )

    # ---------------------------------------------------------------- in the training thread

    def _main(self, work: Callable[[], object], enter_torch_state: Callable[[], None]) -> None:
        self._learner.training_thread = threading.get_ident()
        self._begun.set()
        try:
            enter_torch_state()
            work()
        except BaseException as exc:
            self._error = exc
        self._readings.leave()
        with suppress(anyio.RunFinishedError):  # the event loop has ended
            anyio.from_thread.run_sync(self._finished.set, token=self._token)

    def begin_observing(self) -> None:
        """Serve the observers from now on: the fit is prepared, and was not refused."""
        self._observing_begun = True

    def async_wrapper(
        self, receiver: Callable[[Any], Coroutine[Any, Any, Any]]
    ) -> Callable[[Any], Any]:
        """Blinker's `_async_wrapper`: turn an async receiver into a function that blocks."""

        def call(event: Event) -> object:
            if threading.get_ident() == self._host:
                receiver(event).close()
                raise RuntimeError(
                    f"an async receiver of {type(event).__name__} cannot be awaited here: an async"
                    " receiver emitted it, on the event loop, which would wait for itself; emit"
                    " it from a plain receiver"
                )
            while True:
                done: Future[object] = Future()
                anyio.from_thread.run_sync(
                    self._tasks.start_soon, self._serve, receiver, event, done, token=self._token
                )
                while not wait((done,), PATIENCE).done:
                    # A host that cancels all of its tasks may cancel `_serve` before it starts.
                    if self._interrupted and done.cancel():
                        break
                if not done.cancelled():
                    try:
                        return done.result()
                    finally:
                        del done  # avoids a reference cycle of its error and this frame
                if not event.deliver_to_all:
                    receiver(event).close()
                    raise InterruptedFit

        return call

    # --------------------------------------------------------------------- on the event loop

    def _start_soon(self, task: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self._tasks.start_soon(task)

    async def _serve(
        self,
        receiver: Callable[[Event], Coroutine[Any, Any, object]],
        event: Event,
        done: Future[object],
    ) -> None:
        """Await a receiver for the training thread. Cleanup* is shielded, with a deadline."""
        if not done.set_running_or_notify_cancel():
            return
        coroutine = receiver(event)
        try:
            with anyio.CancelScope(shield=event.deliver_to_all) as self._receiver_scope:
                if self._interrupted:
                    self._interrupt()
                done.set_result(await coroutine)
        except anyio.get_cancelled_exc_class():
            done.set_exception(InterruptedFit())
            raise
        except BaseException as exc:
            done.set_exception(exc)
        finally:
            self._receiver_scope = None
        if not done.done() and event.deliver_to_all:
            done.set_result(None)  # first: the training waits for it
            log.warning(
                "cleanup_cut_short",
                run_id=self._learner.run_id,
                receiver=coroutine.__qualname__,  # type: ignore[attr-defined]
                cleanup=type(event).__name__,
                cleanup_timeout=self._learner.cleanup_timeout,
            )
        elif not done.done():
            done.set_exception(InterruptedFit())
        del done  # avoids a reference cycle of its error and this frame

    async def _pump(self) -> None:
        """Wake the readers about twenty times a second, including new ones."""
        with self._pump_scope:
            while True:
                self._start_observers()
                for stream in tuple(self._learner.fit_streams):
                    stream.wake()
                    stream.check_reader()
                if self._graceful is not None:
                    self._graceful.check_deadline()
                await anyio.sleep(PUMP_INTERVAL)

    def _start_observers(self) -> None:
        if not self._observing_begun:
            return
        for stream in tuple(self._learner.fit_streams):
            if isinstance(stream, Observer) and stream not in self._observing:
                self._observing[stream] = anyio.CancelScope(shield=True)
                self._tasks.start_soon(self._observe, stream)

    async def _observe(self, observer: Observer[Any]) -> None:
        with self._observing[observer] as scope:
            await observer.run(scope, self._report)

    def _report(self, error: BaseException) -> None:
        """Let an observer's error end the fit, or be its outcome if the training is over."""
        if self._reported is None:
            self._reported = error
            self._learner.request_error(error)

    def _finish_observers(self) -> None:
        """Let the observers drain their buffers, until a deadline."""
        if not self._observing_begun:
            return
        deadline = anyio.current_time() + self._learner.drain_timeout
        self._start_observers()  # those that were opened after the last turn of the pump
        for stream in tuple(self._learner.fit_streams):
            stream.end()
        for scope in self._observing.values():
            scope.deadline = deadline

"""The runtime: one thread for the whole fit, joined before `fit` returns, on any event loop.

The loop blocks, so it cannot run on the host's event loop; a hop to a thread per batch would
cost more than a small batch. So one thread of our own runs it from start to end, and the task
that awaits the fit waits for that thread, whatever happens: a cancellation, once or often,
makes the training stop at its next event, and is raised when the thread has ended.

Not `anyio.to_thread`: its threads are the host's, limited in number, and under a native
`Task.cancel()` it returns at once while the worker runs on, unseen.
"""

from __future__ import annotations

import contextvars
import math
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, wait
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import anyio
import anyio.from_thread
import anyio.lowlevel
import structlog

from ..events import Event
from ..events.signal import unwrap
from .observers import Observer
from .openmp import end_idle_threads
from .scope import InterruptedFit
from .thread_state import torch_state
from .whereabouts import whereabouts

if TYPE_CHECKING:
    from .fitting import Fitting

log = structlog.get_logger("eventrain")

PUMP_INTERVAL = 0.05
"""Seconds between two deliveries to the observers."""

PATIENCE = 0.1
"""Seconds until the training thread asks why an async receiver has not answered."""

CANCEL_PATIENCE = 5.0
"""Seconds after a cancellation until it is told what the training thread is still at."""


class Runtime:
    """Runs one blocking function in a thread for one fit, and serves it from the event loop."""

    _running: ClassVar[set[Runtime]] = set()
    _told_of_rng: ClassVar[bool] = False

    def __init__(self, learner: Fitting) -> None:
        self._learner = learner
        self._token = anyio.lowlevel.current_token()
        self._finished = anyio.Event()
        self._error: BaseException | None = None
        self._reported: BaseException | None = None
        self._host = threading.get_ident()
        self._begun = threading.Event()
        self._interrupted = False
        self._patient_until = math.inf
        self._pump_scope = anyio.CancelScope(shield=True)
        self._receiver_scope: anyio.CancelScope | None = None
        self._observing: dict[Observer[Any], anyio.CancelScope] = {}

    async def run(self, work: Callable[[], object]) -> None:
        """Run `work` in a thread of its own; return, or raise, only when that has ended.

        Raises what `work` raised; or, if it was interrupted, what interrupted it.
        """
        context = contextvars.copy_context()
        context.run(_leave_event_loop)
        thread = threading.Thread(
            target=context.run,
            args=(self._main, work, torch_state()),
            name=f"eventrain-{self._learner.run_id}",
            daemon=True,
        )
        interruption: BaseException | None = None
        self._running.add(self)
        self._tell_of_rng()
        end_idle_threads()
        try:
            async with anyio.create_task_group() as self._tasks:
                try:
                    self._tasks.start_soon(self._pump)
                    interruption = await self._until_finished(thread)
                finally:  # whatever comes, also Ctrl-C between two lines
                    self._pump_scope.cancel()
                    self._finish_observers()
        except BaseException as exc:  # cancelled while the observers drained
            interruption = unwrap(exc)
        finally:
            self._running.discard(self)
        if self._error is not None and not isinstance(self._error, InterruptedFit):
            raise self._error
        if self._reported is not None:  # by an observer, when the training was over
            raise self._reported
        if interruption is not None:
            raise interruption

    def _start(self, thread: threading.Thread) -> None:
        try:
            thread.start()
        except BaseException as exc:
            # The system has no thread for us; or Ctrl-C, most likely while it was starting.
            if isinstance(exc, Exception) or not self._begun.wait(1):
                self._finished.set()  # there is none to wait for
            raise

    async def _until_finished(self, thread: threading.Thread) -> BaseException | None:
        """Start the thread and wait for it, through every cancellation; return the last one.

        The first may come from an anyio scope; those after it are native, as we are shielded
        from anyio's, and must not be lost when that scope ends.
        """
        interruption: BaseException | None = None
        try:
            self._start(thread)
        except BaseException as exc:
            interruption = exc
            self._interrupt()
        while not self._finished.is_set():
            try:
                patience = self._patient_until - time.monotonic()
                with anyio.move_on_after(patience, shield=interruption is not None) as scope:
                    await self._finished.wait()
                if scope.cancelled_caught:
                    self._tell_of_waiting(thread)
            except GeneratorExit:  # the event loop itself is gone: nothing can be awaited
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
            self._patient_until = time.monotonic() + CANCEL_PATIENCE
            self._learner._request(InterruptedFit())
        scope = self._receiver_scope
        if scope is not None and scope.shield:  # a Cleanup* receiver: it gets some more time
            scope.deadline = min(scope.deadline, self._cleanup_deadline())
        elif scope is not None:
            scope.cancel()

    def _cleanup_deadline(self) -> float:
        return anyio.current_time() + self._learner.cleanup_timeout

    def _tell_of_waiting(self, thread: threading.Thread) -> None:
        self._patient_until = math.inf
        with suppress(Exception):  # a logger that fails must not take the place of the cancel
            log.warning(
                "cancel_waits",
                run_id=self._learner.run_id,
                seconds=CANCEL_PATIENCE,
                where=whereabouts(thread.ident),
                hint="the fit was cancelled, and returns when its thread comes to its next event",
            )

    def _tell_of_rng(self) -> None:
        if len(self._running) > 1 and not Runtime._told_of_rng:
            Runtime._told_of_rng = True
            log.warning(
                "concurrent_fits_share_rng",
                hint="torch's global random state is one per process: fits at the same time are"
                " reproducible only with generators of their own, e.g. DataLoader(generator=...)",
            )

    # ---------------------------------------------------------------- in the training thread

    def _main(self, work: Callable[[], object], enter_torch_state: Callable[[], None]) -> None:
        self._learner._thread = threading.get_ident()
        self._begun.set()
        try:
            enter_torch_state()
            work()
        except BaseException as exc:
            self._error = exc
        with suppress(anyio.RunFinishedError):  # the event loop is gone, and nobody waits
            anyio.from_thread.run_sync(self._finished.set, token=self._token)

    def async_wrapper(
        self, receiver: Callable[[Any], Coroutine[Any, Any, Any]]
    ) -> Callable[[Any], Any]:
        """Blinker's `_async_wrapper`: an async receiver as a function that blocks this thread."""

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
                    # Who cancels every task of the loop may kill ours before it has begun.
                    if self._interrupted and done.cancel():
                        break
                if not done.cancelled():
                    try:
                        return done.result()
                    finally:
                        del done  # no circle of the error in it, its traceback and this frame
                if not event.reaches_all:
                    receiver(event).close()
                    raise InterruptedFit

        return call

    # --------------------------------------------------------------------- on the event loop

    async def _serve(
        self,
        receiver: Callable[[Event], Coroutine[Any, Any, object]],
        event: Event,
        done: Future[object],
    ) -> None:
        """Await a receiver for the training thread. Cleanup is shielded, with a deadline."""
        if not done.set_running_or_notify_cancel():
            return
        coroutine = receiver(event)
        try:
            with anyio.CancelScope(shield=event.reaches_all) as self._receiver_scope:
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
        if not done.done() and event.reaches_all:
            log.warning(
                "cleanup_cut_short",
                run_id=self._learner.run_id,
                receiver=coroutine.__qualname__,  # type: ignore[attr-defined]
                cleanup=type(event).__name__,
                cleanup_timeout=self._learner.cleanup_timeout,
            )
            done.set_result(None)
        elif not done.done():
            done.set_exception(InterruptedFit())
        del done  # no circle of the error in it, its traceback and this frame

    async def _pump(self) -> None:
        """Wake the readers about twenty times a second, the new ones among them."""
        with self._pump_scope:
            while True:
                self._start_observers()
                for stream in tuple(self._learner.audience):
                    stream.wake()
                if self._learner._graceful_end is not None:
                    self._learner._graceful_end.look()
                await anyio.sleep(PUMP_INTERVAL)

    def _start_observers(self) -> None:
        for stream in tuple(self._learner.audience):
            if isinstance(stream, Observer) and stream not in self._observing:
                self._observing[stream] = anyio.CancelScope(shield=True)
                self._tasks.start_soon(self._observe, stream)

    async def _observe(self, observer: Observer[Any]) -> None:
        with self._observing[observer] as scope:
            await observer.run(scope, self._report)

    def _report(self, error: BaseException) -> None:
        """An observer's error is to end the fit, or to be its outcome if that is over."""
        if self._reported is None:
            self._reported = error
            self._learner._request(error)

    def _finish_observers(self) -> None:
        """Let the observers drain what is left, until a deadline."""
        deadline = anyio.current_time() + self._learner.drain_timeout
        self._start_observers()  # those that came after the pump's last turn
        for stream in tuple(self._learner.audience):
            stream.end()
        for scope in self._observing.values():
            scope.deadline = deadline


def _leave_event_loop() -> None:
    """In the thread's context: the caller's event loop does not run there; another one may."""
    if sniffio := sys.modules.get("sniffio"):  # where trio is installed, anyio asks it
        sniffio.current_async_library_cvar.set(None)

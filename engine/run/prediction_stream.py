"""`Learner.iter_preds`: the predictions of each batch, as an async iterator with a bounded buffer.

An async generator cannot hold a task group open between its yields: the group belongs to the task
that is in it, but the body of an `async for` runs between the yields, and may be left without the
generator being told. So the fit is awaited by a task of its own, which the iterator starts, and
cancels when it is closed.
"""

from __future__ import annotations

import asyncio
import contextvars
import math
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from types import TracebackType
from typing import Any, NoReturn, Self, cast

import anyio
import anyio.lowlevel

from ...events import AfterPredict, BeforeBatch, Callback, CancelBatchException, CleanupEpoch
from ...events.checks import is_int
from ...events.errors import text_of
from .. import log
from ..context import call_soon_threadsafe
from ..loop.state import LoopState
from .predictions import PredictionForm
from .result import FitResult

PATIENCE = 0.05
"""Seconds after which a fit that waits for its reader checks whether it is to stop."""


class PredictionStream:
    """The predictions of one batch after the other: an async iterator, made by `iter_preds`.

    Read it with `async for`. The fit begins with the first batch that is asked for, and has ended
    when the loop over the iterator has, or has raised an error, or is cancelled while it waits for
    a batch. A loop that is left in another way, by `break` or by an error in its body, does not
    tell the iterator. `async with learner.iter_preds(dl) as preds` does: its end stops the fit and
    waits for its thread, and so does `aclose()`. Without them, the fit stops soon after the
    iterator is garbage collected, and nobody waits for it.

    Raises:
        RuntimeError: two tasks read it at the same time.
    """

    def __init__(self, run: PredictionRun) -> None:
        self._run = run
        self._reading = False

    def __aiter__(self) -> Self:
        return self

    def __iter__(self) -> NoReturn:
        raise TypeError("iter_preds() is read by `async for`; in a script, use run_iter_preds(...)")

    async def __anext__(self) -> Any:
        if self._reading:
            raise RuntimeError("these predictions have a reader already, in another task")
        self._reading = True
        try:
            box = await self._run.next()
        except BaseException:
            await self.aclose()
            raise
        finally:
            self._reading = False
        return box.pop()

    async def aclose(self) -> None:
        """Stop the fit, if it runs, and wait until its thread has ended."""
        await self._run.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __del__(self) -> None:
        self._run.abandon()


class PredictionRun:
    """The fit behind a `PredictionStream`, which does not keep the stream alive.

    Args:
        fit: predicts with the callbacks that it is given.
        form: what to keep of a batch.
        buffer: the most batches to predict ahead of the one in use.

    Raises:
        ValueError: `buffer` is not an integer of 1 or more.
    """

    def __init__(
        self,
        fit: Callable[[Callback], Awaitable[FitResult]],
        form: PredictionForm,
        buffer: int,
    ) -> None:
        if not is_int(buffer, 1):
            raise ValueError(f"buffer={buffer!r}: give a number of batches, 1 or more")
        self._fit = fit
        self._sender = _SendPredictions(self, form)
        self._buffer = buffer
        # Each batch is in a list, so that neither side keeps a reference.
        self._boxes: deque[list[Any]] = deque()
        self._has_room = threading.Event()
        self._arrived: anyio.Event | None = None
        self._started = self._closed = self._ended = False
        self._error: BaseException | None = None
        self._result: FitResult | None = None

    # ------------------------------------------------------------------------ in the fit's thread

    def wait_for_room(self, learner: LoopState) -> None:
        """Wait until fewer batches than `buffer` are waiting, or the fit is asked to stop."""
        while len(self._boxes) >= self._buffer:
            self._has_room.clear()
            if len(self._boxes) >= self._buffer:  # none was taken before the line above
                self._has_room.wait(PATIENCE)
            if learner.pending_requests:
                learner.pending_requests.raise_due(learner.innermost_scope)
                return

    def put(self, output: Any) -> None:
        self._boxes.append([output])
        arrived = self._arrived
        if arrived is not None:
            with suppress(RuntimeError):  # the event loop has ended
                self._call_soon(arrived.set)

    # ------------------------------------------------------------------------- on the event loop

    async def next(self) -> list[Any]:
        """The next output, alone in a list.

        Raises:
            StopAsyncIteration: that was the last one, or the run was closed.
            Exception: the error of the fit.
            RuntimeError: a receiver has ended the run before the last batch.
        """
        if not self._started and not self._closed:
            self._start()
        await anyio.lowlevel.checkpoint()
        while not self._boxes or self._closed:
            if self._ended or self._closed:
                self._raise_outcome()
            self._arrived = anyio.Event()
            if not self._boxes and not self._ended:
                await self._arrived.wait()
            self._arrived = None
        box = self._boxes.popleft()
        self._has_room.set()
        return box

    def _raise_outcome(self) -> None:
        error, self._error = self._error, None
        result, self._result = self._result, None
        if self._closed:
            raise StopAsyncIteration
        if error is not None:
            try:
                raise error
            finally:
                del error  # avoids a reference cycle of the error, its traceback and this frame
        if result is None:
            raise RuntimeError("the task that predicts was cancelled, and not its reader")
        self._sender.check_all_seen(result)
        raise StopAsyncIteration

    def _start(self) -> None:
        self._started = True
        self._call_soon = call_soon_threadsafe()
        self._finished = anyio.Event()
        self._scope = anyio.CancelScope()
        _start_task(self._main)

    async def _main(self) -> None:
        try:
            with self._scope:
                self._result = await self._fit(self._sender)
        except anyio.get_cancelled_exc_class():  # the event loop is about to end
            raise
        except BaseException as exc:
            self._error = exc
        finally:
            self._ended = True
            self._finished.set()
            if self._arrived is not None:
                self._arrived.set()

    async def close(self) -> None:
        """End the run, and return only when it has ended."""
        self._closed = True
        self._boxes.clear()
        if not self._started:
            return
        self._scope.cancel()
        interruption: BaseException | None = None
        while not self._finished.is_set():
            try:
                with anyio.CancelScope(shield=True):
                    await self._finished.wait()
            except GeneratorExit:  # the event loop has ended: nothing can be awaited
                raise
            except BaseException as exc:  # a native cancellation, which waits as well
                interruption = exc
        self._boxes.clear()
        error, self._error = self._error, None
        if error is not None:
            log.warning("predictions_ended_with_error", error=text_of(error), exc_info=error)
        if interruption is not None:
            raise interruption

    def abandon(self) -> None:
        """End the run without waiting. May be called in any thread."""
        if self._started and not self._ended:
            self._closed = True
            with suppress(RuntimeError):  # the event loop has ended
                self._call_soon(self._scope.cancel)


class _SendPredictions(Callback):
    """Sends predictions to the reader, and ends each batch after its prediction."""

    order: float = math.inf

    def __init__(self, run: PredictionRun, form: PredictionForm) -> None:
        self._run = run
        self._form = form
        self._n = 0
        self._all_read = False

    def before_batch(self, event: BeforeBatch) -> None:
        self._run.wait_for_room(cast(LoopState, event.learner))

    def after_predict(self, event: AfterPredict) -> None:
        learner = cast(LoopState, event.learner)
        self._run.put(self._form.of(learner))
        self._n += 1
        raise CancelBatchException("only predictions were requested")

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        self._all_read = cast(LoopState, event.learner).all_read

    def check_all_seen(self, fit: FitResult) -> None:
        """Raise a RuntimeError unless there was a prediction for every batch."""
        cause = f"{fit.who} ended the run ({fit.reason})" if fit.who else None
        if not self._n:
            raise RuntimeError(f"no predictions: {cause or 'every batch was skipped'}")
        if not self._all_read:
            raise RuntimeError(
                f"iter_preds() did not see all batches: {cause or 'its epoch was cancelled'}"
            )


_tasks: set[asyncio.Task[None]] = set()
"""Those that run: asyncio itself keeps weak references only."""


def _start_task(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Start a task that belongs to the event loop, and not to the current task."""
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        spawn = sys.modules["trio"].lowlevel.spawn_system_task
        spawn(main, name="eventrain-predictions", context=contextvars.copy_context())
        return
    task = loop.create_task(main(), name="eventrain-predictions")
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)

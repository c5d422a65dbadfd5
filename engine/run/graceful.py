"""`fit(graceful=...)`: the first SIGTERM or SIGINT ends the fit after the current batch.

The handlers are set by `signal.signal`, not by `anyio.open_signal_receiver`. On asyncio and uvloop,
the latter calls `loop.add_signal_handler`, and `loop.remove_signal_handler` at the end, which does
not restore the handlers of the host. If the host has a callback for SIGTERM on its loop, the
handlers are, with anyio 4.16:

                                SIGTERM                SIGINT
    before                      the host's callback    the handler of asyncio.Runner
    while it is open            only the receiver      only the receiver
    after                       SIG_DFL, which kills   Python's default

Here the host's handlers are restored when the first signal has arrived or the fit has ended. A
callback on the host's loop also gets that first signal, because a file descriptor wakes the loop.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, ClassVar

from .. import log
from .fittable import Fittable
from .stack import thread_stack

DEADLINE = 25.0
"""Seconds that `graceful=True` gives the current batch; Kubernetes kills after 30."""

# SIGINT comes first, so that no KeyboardInterrupt is raised while the handler of SIGTERM is set.
_DEFAULTS: Mapping[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class GracefulStop:
    """While this context is entered, the first signal ends the fit after the current batch.

    An ignored signal stays ignored, such as SIGINT in a process that a script started with `&`.

    A process that is forked meanwhile, such as the worker of a loader, ignores the first SIGINT,
    which a terminal sends to both, so that the current batch can be completed; SIGTERM gets to the
    host's handler there.

    Args:
        learner: the learner that fits.
        graceful: seconds after which the fit is stopped at its next event instead; True means 25.

    Raises:
        ValueError: `graceful` is not a positive time, or a handler could not be set or restored.

    Source: trio's `open_signal_receiver`, for signals that arrive too late to be handled.
    """

    _entered: ClassVar[list[GracefulStop]] = []
    _host_handlers: ClassVar[dict[signal.Signals, Any]] = {}
    """The handlers of the host that `_on_signal` replaces, or has replaced."""
    _process: ClassVar[int] = 0
    """The process in which they were entered, and not its forks."""
    _forwarding: ClassVar[bool] = False
    """Whether `_on_signal` is calling the host's handler."""

    def __init__(self, learner: Fittable, graceful: bool | float) -> None:
        prefix = f"graceful={graceful!r}: "
        if not isinstance(graceful, int | float) or not graceful > 0:
            raise ValueError(prefix + "give True, or seconds above 0; False leaves signals alone")
        if (thread := threading.current_thread()) is not threading.main_thread():
            raise ValueError(
                f"{prefix}signals reach only the main thread, and this fit is awaited in"
                f" {thread.name!r}: have a handler of your own call learner.stop(graceful=True)"
            )
        for signum in _DEFAULTS:
            if signal.getsignal(signum) is None:
                raise ValueError(
                    f"{prefix}{signum.name} has a handler that is not Python's and could not be"
                    " restored: have it call learner.stop(graceful=True) instead"
                )
        self._learner = learner
        self._seconds = DEADLINE if graceful is True else float(graceful)
        self._received = ""
        self._due = math.inf

    def __enter__(self) -> None:
        for signum in _DEFAULTS:
            host = signal.getsignal(signum)
            if host is not signal.SIG_IGN:
                if host is not _on_signal:
                    self._host_handlers[signum] = host
                signal.signal(signum, _on_signal)
        GracefulStop._process = os.getpid()
        self._entered.append(self)

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        with suppress(ValueError):  # a signal has removed it already
            self._entered.remove(self)
        if not self._entered:
            _restore_handlers()
        result = self._learner.result
        if self._received and exc is None and result and result.who != self._received:
            # The signal arrived too late to end the fit, so the host has to get it.
            signal.raise_signal(signal.Signals[self._received])

    def receive(self, name: str) -> None:
        """Request the stop. Called by the signal handler, between any two lines of other code."""
        self._received = name
        self._due = time.monotonic() + self._seconds
        self._learner.stop("fit", f"received {name}", graceful=True, who=name)

    def check_deadline(self) -> None:
        """After the deadline, stop the fit at its next event, and log that."""
        if time.monotonic() < self._due:
            return
        self._due = math.inf
        learner, name = self._learner, self._received
        hint = "the batch is completed, but the cleanup is not"
        if not learner.graceful_stop_due and any(
            r.graceful for r in tuple(learner.pending_requests)
        ):
            learner.stop("fit", f"received {name}", who=name)
            hint = (
                "the batch is not completed: the fit ends at its next event, without a checkpoint"
            )
        log.warning(
            "graceful_deadline_passed",
            run_id=learner.run_id,
            signal=name,
            deadline=self._seconds,
            where=thread_stack(learner.training_thread),
            hint=hint,
        )


def _on_signal(signum: int, frame: FrameType | None) -> None:
    """Ask all entered fits to stop; without any, forward the signal to the host's handler.

    It takes no lock, because the code that it interrupts may hold that lock; so it does not log.
    """
    stops = tuple(GracefulStop._entered)
    GracefulStop._entered.clear()
    was_set = signal.getsignal(signum) is _on_signal
    _restore_handlers()
    if os.getpid() != GracefulStop._process and signum == signal.SIGTERM:
        stops = ()  # of the parent's fits
    for stop in stops:
        stop.receive(signal.Signals(signum).name)
    if stops or GracefulStop._forwarding:
        return
    # Other code has saved this handler during a fit, and has set it again since, or calls it.
    host = GracefulStop._host_handlers.get(signal.Signals(signum), signal.SIG_DFL)
    if was_set or not callable(host):
        signal.signal(signum, host)
        signal.raise_signal(signum)
    else:
        GracefulStop._forwarding = True
        try:
            host(signum, frame)
        finally:
            GracefulStop._forwarding = False


def _restore_handlers() -> None:
    """Restore the host's handlers for the signals that `_on_signal` handles."""
    for signum, default in _DEFAULTS.items():
        if signal.getsignal(signum) is _on_signal:
            with suppress(ValueError):  # an abandoned fit may be collected in another thread
                signal.signal(signum, GracefulStop._host_handlers.get(signum, default))

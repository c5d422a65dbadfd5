"""`fit(graceful=...)`: the first SIGTERM or SIGINT ends the fit with the batch that is under way.

By `signal.signal`, not by `anyio.open_signal_receiver`: on asyncio and uvloop that begins with
`loop.add_signal_handler` and ends with `loop.remove_signal_handler`, whoever was there before.
Of a host with a callback for SIGTERM on its loop, anyio 4.16 leaves

                                SIGTERM                SIGINT
    before                      the host's callback    the handler of asyncio.Runner
    while it is open            the receiver alone     the receiver alone
    after                       SIG_DFL, which kills   Python's default

Here the host has its very own handlers back when the first signal has come, or the fit ended. A
callback on its loop hears that signal, too: what tells the loop is a file descriptor.
"""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, ClassVar

import structlog

from .fittable import Fittable
from .stack import thread_stack

DEADLINE = 25.0
"""Seconds that `graceful=True` gives the batch under way; Kubernetes kills after 30."""

# SIGINT first: once it is ours, no KeyboardInterrupt comes while the other is taken.
_DEFAULTS: Mapping[signal.Signals, Any] = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class GracefulStop:
    """While it is entered, the first signal ends a fit with the batch that is under way.

    A signal that is ignored, as SIGINT is by what a shell script starts with `&`, stays so.

    Args:
        learner: whose fit it is.
        graceful: seconds after which the fit is stopped at its next event instead; True for 25.

    Raises:
        ValueError: no such time, or handlers that could not be set, or not be given back.

    Source: trio's `open_signal_receiver`, for a signal that comes too late to be heard.
    """

    _entered: ClassVar[list[GracefulStop]] = []
    _hosts: ClassVar[dict[signal.Signals, Any]] = {}
    """The handlers in whose place ours is, or was."""
    _passing: ClassVar[bool] = False

    def __init__(self, learner: Fittable, graceful: bool | float) -> None:
        what = f"graceful={graceful!r}: "
        if not isinstance(graceful, int | float) or not graceful > 0:
            raise ValueError(what + "give True, or seconds above 0; False leaves signals alone")
        if (thread := threading.current_thread()) is not threading.main_thread():
            raise ValueError(
                f"{what}signals reach only the main thread, and this fit is awaited in"
                f" {thread.name!r}: have a handler of your own call learner.stop(graceful=True)"
            )
        for signum in _DEFAULTS:
            if signal.getsignal(signum) is None:
                raise ValueError(
                    f"{what}{signum.name} has a handler that is not Python's and could not be"
                    " given back: have that call learner.stop(graceful=True)"
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
                    self._hosts[signum] = host
                signal.signal(signum, _on_signal)
        self._entered.append(self)

    def __exit__(self, exc_type: object, exc: BaseException | None, traceback: object) -> None:
        with suppress(ValueError):  # a signal has taken it out
            self._entered.remove(self)
        if not self._entered:
            _give_back()
        result = self._learner.result
        if self._received and exc is None and result and result.who != self._received:
            # It came when there was no batch left to end with, and must not be lost.
            signal.raise_signal(signal.Signals[self._received])

    def receive(self, name: str) -> None:
        """Called with the name of the signal, between any two lines of the main thread."""
        self._received = name
        self._due = time.monotonic() + self._seconds
        self._learner.stop("fit", f"received {name}", graceful=True, who=name)

    def check_deadline(self) -> None:
        """Once the time is over, stop the fit at its next event, and log that."""
        if time.monotonic() < self._due:
            return
        self._due = math.inf
        learner, name = self._learner, self._received
        hint = "the batch is done, and what cleans up is not"
        if not learner.graceful_stop_due and any(r.graceful for r in tuple(learner.requests)):
            learner.stop("fit", f"received {name}", who=name)
            hint = "the batch is not done: the fit is left at its next event, without a checkpoint"
        structlog.get_logger("eventrain").warning(
            "graceful_deadline_passed",
            run_id=learner.run_id,
            signal=name,
            deadline=self._seconds,
            where=thread_stack(learner.training_thread),
            hint=hint,
        )


def _on_signal(signum: int, frame: FrameType | None) -> None:
    """Takes no lock, which what it interrupts may hold; so it does not log either."""
    ends = tuple(GracefulStop._entered)
    GracefulStop._entered.clear()
    was_ours = signal.getsignal(signum) is _on_signal
    _give_back()
    for end in ends:
        end.receive(signal.Signals(signum).name)
    if ends or GracefulStop._passing:
        return
    # Whoever has found it here in the middle of a fit has put it back since, or calls it.
    host = GracefulStop._hosts.get(signal.Signals(signum), signal.SIG_DFL)
    if was_ours or not callable(host):
        signal.signal(signum, host)
        signal.raise_signal(signum)
    else:
        GracefulStop._passing = True
        try:
            host(signum, frame)
        finally:
            GracefulStop._passing = False


def _give_back() -> None:
    """Put the host's handlers where ours are."""
    for signum, default in _DEFAULTS.items():
        if signal.getsignal(signum) is _on_signal:
            with suppress(ValueError):  # a fit that is thrown away in another thread
                signal.signal(signum, GracefulStop._hosts.get(signum, default))

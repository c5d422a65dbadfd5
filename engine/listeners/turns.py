"""The turns of all observers and streams of an event loop, which share one limit on their length.

While one of them has events, it takes turns with the other tasks of the loop. With a limit for
each of them, ten observers would hold the loop for ten limits between two turns of another task.
"""

from __future__ import annotations

from collections import deque
from time import perf_counter

import anyio.lowlevel

MAX_HOLD = 0.005
"""Seconds for which all readers together may run on an event loop before other tasks get a turn."""


class Turns:
    """The turns of the readers of one event loop.

    A turn belongs to the loop, not to one reader: what one leaves of it, others may use. When it is
    over, each reader that has more events waits in a queue. Per pass of the loop, the first in the
    queue begins the next turn, so that every reader gets one, whichever the loop runs first.
    """

    __slots__ = ("_begun", "_end", "_queue")

    def __init__(self) -> None:
        self._end = 0.0
        self._begun = 0
        self._queue: deque[object] = deque()

    @property
    def over(self) -> bool:
        """Whether the current turn is over."""
        return perf_counter() > self._end

    async def next(self) -> None:
        """Wait until the other tasks of the loop have run, and begin a turn."""
        me = object()
        self._queue.append(me)
        try:
            while True:
                begun = self._begun
                await anyio.lowlevel.checkpoint()  # every task that can run does so once
                if self._queue[0] is me and self._begun == begun:
                    break
        finally:
            self._queue.remove(me)
        self._begun += 1
        self._end = perf_counter() + MAX_HOLD


_turns: anyio.lowlevel.RunVar[Turns] = anyio.lowlevel.RunVar("eventrain_turns")


def turns_of_this_loop() -> Turns:
    """The turns of the event loop that runs in this thread."""
    try:
        return _turns.get()
    except LookupError:
        turns = Turns()
        _turns.set(turns)
        return turns

"""The messages of one run, numbered, which any number of clients follow."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import anyio
import anyio.from_thread
import anyio.lowlevel
from eventrain.callbacks import RecordCB

current_journal: ContextVar[Journal | None] = ContextVar("current_journal", default=None)
"""The journal of the run in whose context the code runs."""


class Message(NamedTuple):
    """A record as it is sent to clients."""

    id: int
    event: str
    data: str


class Journal:
    """The last `size` messages of a run, numbered from 1.

    A client is only a number, that of the last message that it received. A client that is slow,
    or that was disconnected, continues from there, and is informed how many messages it missed.
    So no client has a buffer of its own, and none holds up the run.
    """

    def __init__(self, size: int) -> None:
        self.last = 0
        self.ended = False
        self._messages: deque[Message] = deque(maxlen=size)
        self._news = anyio.Event()
        self._thread = threading.get_ident()
        self._token = anyio.lowlevel.current_token()

    def append(self, record: dict[str, Any]) -> None:
        """Add a record. Can be called from any thread."""
        if threading.get_ident() != self._thread:
            anyio.from_thread.run_sync(self.append, record, token=self._token)
            return
        self.last += 1
        self._messages.append(Message(self.last, record["event"], json.dumps(record)))
        self._notify()

    def end(self) -> None:
        """Mark it as complete: followers end when they have read the messages that are held."""
        self.ended = True
        self._notify()

    def _notify(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def follow(self, last: int = 0) -> AsyncIterator[Message | int]:
        """Yield the messages after number `last`, and then new ones, until the run has ended.

        If some are no longer held, yield how many they are in their place.
        """
        while True:
            start = last - (self.last - len(self._messages))  # index of the next one
            if start < 0:
                yield -start
                last -= start
            elif last < self.last:
                stop = min(start + 64, len(self._messages))
                # Copied, some at a time: the deque changes while a client is slow.
                for message in [self._messages[i] for i in range(start, stop)]:
                    yield message
                    last = message.id
            elif self.ended:
                return
            else:
                await self._news.wait()


class JournalCB(RecordCB):
    """Puts the records of a fit into a journal."""

    def __init__(self, journal: Journal, every_seconds: float) -> None:
        super().__init__(every=1, every_seconds=every_seconds)
        self.journal = journal

    def write(self, record: dict[str, Any]) -> None:
        self.journal.append(record)

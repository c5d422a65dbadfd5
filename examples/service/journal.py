"""What happened in one run, as numbered messages that any number of clients follow."""

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
"""That of the run in whose context something happens."""


class Message(NamedTuple):
    """A record as it goes to the clients."""

    id: int
    event: str
    data: str


class Journal:
    """The last `size` messages of a run, numbered from 1.

    A client is no more than a number, that of the last message it has: whoever is slow, or was
    away, goes on from there, and is told how many it missed. So no client has a buffer, and
    none holds up the run.
    """

    def __init__(self, size: int) -> None:
        self.last = 0
        self.ended = False
        self._messages: deque[Message] = deque(maxlen=size)
        self._news = anyio.Event()
        self._thread = threading.get_ident()
        self._token = anyio.lowlevel.current_token()

    def append(self, record: dict[str, Any]) -> None:
        """Add a record; from any thread."""
        if threading.get_ident() != self._thread:
            anyio.from_thread.run_sync(self.append, record, token=self._token)
            return
        self.last += 1
        self._messages.append(Message(self.last, record["event"], json.dumps(record)))
        self._tell()

    def end(self) -> None:
        """Nothing more will come: followers end when they have read what is there."""
        self.ended = True
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = anyio.Event()

    async def follow(self, last: int = 0) -> AsyncIterator[Message | int]:
        """Yield the messages after number `last`, and those to come, until the run has ended.

        Where some are held no longer, their number comes in their place.
        """
        while True:
            start = last - (self.last - len(self._messages))  # where the next one is held
            if start < 0:
                yield -start
                last -= start
            elif last < self.last:
                stop = min(start + 64, len(self._messages))
                # Copied, some at a time: they change while a client takes its time.
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

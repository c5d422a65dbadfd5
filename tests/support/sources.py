"""Async sources of batches that say where and when they are read and closed."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterable
from typing import Any

import anyio
import anyio.lowlevel


class Awaited:
    """An async iterable: each iteration yields the batches from the first one on."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    async def __aiter__(self) -> AsyncIterator[Any]:
        for batch in self.batches:
            await anyio.lowlevel.checkpoint()
            yield batch


class Source:
    """An async iterator that counts, and waits for ever after its batches, unless it ends.

    Attributes:
        asked: how often it was asked for a batch.
        given: how many batches it has given.
        waits: whether it waits for a batch that never comes.
        threads: the threads in which it was asked and closed.
        closed: how often it was closed.
    """

    def __init__(self, batches: Iterable[Any], ends: bool = False) -> None:
        self.batches = list(batches)
        self.ends = ends
        self.asked = self.given = self.closed = 0
        self.waits = False
        self.threads: set[int] = set()

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> Any:
        self.asked += 1
        self.threads.add(threading.get_ident())
        await anyio.lowlevel.checkpoint()
        if self.given == len(self.batches):
            if self.ends:
                raise StopAsyncIteration
            self.waits = True
            await anyio.sleep_forever()
        self.given += 1
        return self.batches[self.given - 1]

    async def aclose(self) -> None:
        self.threads.add(threading.get_ident())
        await anyio.lowlevel.checkpoint()
        self.closed += 1

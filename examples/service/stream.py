"""A run's journal as server-sent events, for an EventSource.

`stream.schema.json` is the schema of their data.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import anyio
import structlog
from eventrain.callbacks import SCHEMA_VERSION
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse, ServerSentEvent
from sse_starlette.sse import SendTimeoutError
from starlette.types import Receive, Scope, Send

from .runs import Run
from .settings import Settings

log = structlog.get_logger("eventrain.service")

RETRY = 2000
"""Milliseconds after which a browser that lost the stream reconnects."""


class EventStream(EventSourceResponse):
    """The messages of a run after number `last`, until the run ends or the client disconnects.

    Args:
        open_streams: all open streams; this one is added while it is open.
    """

    def __init__(
        self, run: Run, last: int, settings: Settings, open_streams: set[EventStream]
    ) -> None:
        super().__init__(
            _messages(run, last),
            ping=settings.heartbeat,
            send_timeout=settings.send_timeout,
            shutdown_event=anyio.Event(),
            shutdown_grace_period=settings.deadline,  # to send how the run ended
        )
        self._run = run
        self._max_clients = settings.max_clients
        self._open_streams = open_streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if len(self._open_streams) >= self._max_clients:
            busy = JSONResponse({"detail": "too many clients"}, 429, {"retry-after": "10"})
            return await busy(scope, receive, send)
        self._open_streams.add(self)
        self._run.clients += 1
        try:
            await super().__call__(scope, receive, send)
        except SendTimeoutError:
            log.info("client_too_slow", run_id=self._run.id)
        finally:
            self._run.clients -= 1
            self._open_streams.remove(self)


async def _messages(run: Run, last: int) -> AsyncIterator[ServerSentEvent]:
    yield ServerSentEvent(comment=f"run {run.id}", retry=RETRY)
    async for message in run.journal.follow(last):
        if isinstance(message, int):
            gap = {"event": "gap", "schema_version": SCHEMA_VERSION, "run_id": run.id}
            yield ServerSentEvent(json.dumps({**gap, "missed": message}), event="gap")
        else:
            yield ServerSentEvent(message.data, event=message.event, id=str(message.id))

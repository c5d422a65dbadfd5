"""Start the service: python -m examples.service [--port 8000] [--data FOLDER].

It serves a page and an API on 127.0.0.1. On another address (--host) it requires a token in the
environment variable EVENTRAIN_TOKEN. Put TLS in front of it there, by a proxy that preserves the
Host header and whose address is in FORWARDED_ALLOW_IPS. SIGTERM and Ctrl-C stop the runs at their
next event, and then the service, with exit code 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from dataclasses import fields
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import anyio
import structlog
import torch
import uvicorn

from .app import create_app
from .data import load
from .guard import HEADERS
from .logs import configure_logging
from .runs import Runs
from .settings import Settings

LAST_SECONDS = 2
"""Seconds for connections to close after the runs have ended, and again for everything else."""

log = structlog.get_logger("eventrain.service")


class Server(uvicorn.Server):
    """Stops the runs first, while clients can still receive how they ended.

    Also closes connections that send no complete request, or that do not read the answer.
    """

    def __init__(self, config: uvicorn.Config, settings: Settings) -> None:
        super().__init__(config)
        self.settings = settings
        self._since: WeakKeyDictionary[Any, float] = WeakKeyDictionary()

    async def on_tick(self, counter: int) -> bool:
        now = monotonic()
        for connection in tuple(self.server_state.connections):
            patience = self._patience(connection)
            if patience is None:
                self._since.pop(connection, None)
            elif now - self._since.setdefault(connection, now) > patience:
                connection.transport.abort()
        return await super().on_tick(counter)

    def _patience(self, connection: Any) -> float | None:
        """Return how many seconds a connection may stay in its present state; None for no limit."""
        if connection.transport.is_closing():  # with data left that the client does not read
            return LAST_SECONDS
        if connection.cycle is None or connection.cycle.more_body:  # no request, or part of one
            return self.settings.idle_timeout
        return None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        runs: Runs = self.config.app.state.runs  # type: ignore[union-attr]
        log.info("shutting_down", runs=len(runs.active))
        await runs.close(self.settings.deadline)
        with anyio.move_on_after(2 * LAST_SECONDS):
            await super().shutdown(sockets)
        if runs.active:  # in a batch that does not end: threads cannot be killed
            log.error("runs_abandoned", run_ids=[run.id for run in runs.active])
            os._exit(1)


def exit_successfully(signum: int, frame: FrameType | None) -> None:
    """Exit with code 0: uvicorn, when it has shut down, raises the signal that ended it again."""
    sys.exit(0)


def main() -> None:
    """Serve until a signal arrives."""
    parser = argparse.ArgumentParser(
        prog="examples.service",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--port", type=int, default=8000, help="0 for any free port")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with Fashion-MNIST")
    parser.add_argument(
        "--allow-host",
        action="append",
        dest="names",
        default=[],
        metavar="NAME",
        help="host name of the service, in addition to those of loopback; may be repeated",
    )
    for limit in fields(Settings):
        if limit.name not in ("token", "names"):
            parser.add_argument(
                f"--{limit.name.replace('_', '-')}",
                type=type(limit.default),
                default=limit.default,
                help=limit.metadata["help"],
            )
    args = vars(parser.parse_args())
    port, data = args.pop("port"), args.pop("data")
    try:
        names = tuple(args.pop("names"))
        settings = Settings(token=os.environ.get("EVENTRAIN_TOKEN"), names=names, **args)
    except ValueError as exc:
        parser.error(str(exc))
    configure_logging()
    # The runs share the cores: more OpenMP threads than cores would only wait for each other.
    torch.set_num_threads(max(1, torch.get_num_threads() // settings.max_concurrent))
    config = uvicorn.Config(
        create_app(settings, load(data)),
        host=settings.host,
        port=port,
        log_config=None,
        access_log=False,
        server_header=False,
        headers=list(HEADERS.items()),
        http="h11",
        ws="none",
        limit_concurrency=settings.max_clients + 100,
        timeout_graceful_shutdown=LAST_SECONDS,
        h11_max_incomplete_event_size=settings.max_body,
    )
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, exit_successfully)
    Server(config, settings).run()


if __name__ == "__main__":
    main()

"""A service that runs in a process of its own, on loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.support.waiting import wait_until


@dataclass
class Service:
    """A running service: its process, where its log goes, and a client of it."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str
    client: httpx.Client

    def start(self, **request: Any) -> str:
        """Start a run; return its id."""
        answer = self.client.post("/runs", json=request)
        assert answer.status_code == 201, answer.text
        run_id: str = answer.json()["id"]
        assert answer.headers["location"] == f"/runs/{run_id}"
        return run_id

    def state(self, run_id: str) -> dict[str, Any]:
        state: dict[str, Any] = self.client.get(f"/runs/{run_id}").raise_for_status().json()
        return state

    def wait(self, run_id: str) -> dict[str, Any]:
        """The state of a run when it has ended."""
        wait_until(lambda: self.state(run_id)["status"] != "running", 240, every=0.05)
        return self.state(run_id)

    def connect(self) -> socket.socket:
        """A bare connection, with a small buffer for what it does not read."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect((host, int(port)))
        return connection

    def deaf(self, run_id: str) -> socket.socket:
        """A client that asks for a run's events, and does not read them."""
        connection = self.connect()
        request = f"GET /runs/{run_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
        connection.sendall(request.encode())
        return connection

    def files(self) -> int:
        """How many files and connections it has open."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def terminate(self) -> int:
        """Send SIGTERM; return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def wait_for_log(self, event: str, times: int = 1) -> None:
        """Wait until it has logged an event that often."""
        wait_until(lambda: self.log.read_text().count(f'"{event}"') >= times, every=0.05)

    def lines(self) -> list[dict[str, Any]]:
        """What it logged."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]


Serve = Callable[..., Service]


class Gate:
    """Decides when the images of tests.service.faulty may be read: give its path as GATE."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def let_through(self, images: int) -> None:
        """Let that many more be read."""
        with self.path.open("ab") as file:
            file.write(b"x" * images)

    def open(self) -> None:
        """Let all that a test can need be read."""
        self.let_through(1_000_000)


def address(log: Path, process: subprocess.Popen[bytes]) -> str:
    """Where a server says, in its log, that it runs."""
    deadline = time.monotonic() + 120
    while not (found := re.search(r"running on (http://\S+:\d+)", log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    return found[1]


def rest(connection: socket.socket) -> bytes:
    """All that arrives until the other side closes or resets the connection."""
    connection.settimeout(60)
    got = bytearray()
    with suppress(ConnectionResetError):
        while part := connection.recv(65_536):
            got += part
    return bytes(got)

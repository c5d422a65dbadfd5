"""The service as it is used: a process of its own, on loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.service.running import Gate, Serve, Service, address

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts services; they end with the module."""
    with ExitStack() as stack:

        def start(*args: object, module: str = "examples.service", **env: str) -> Service:
            log = tmp_path_factory.mktemp("service") / "log.jsonl"
            command = [sys.executable, "-m", module, "--port", "0", *map(str, args)]
            with log.open("wb") as stderr:
                process = subprocess.Popen(
                    command, cwd=ROOT, stderr=stderr, env={**os.environ, **env}
                )
            stack.callback(process.wait, 60)
            stack.callback(process.kill)
            url = address(log, process)
            # It may say so a moment before it listens.
            transport = httpx.HTTPTransport(retries=5, trust_env=False)
            client = httpx.Client(base_url=url, transport=transport, timeout=60)
            stack.enter_context(client)
            return Service(process, log, url, client)

        yield start


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    """Closed; see `tests.service.faulty`."""
    return Gate(tmp_path / "gate")


@pytest.fixture(scope="module")
def service(serve: Serve, data_folder: Path | None) -> Service:
    """One for all tests of a module."""
    return serve("--max-concurrent", 20, *(["--data", data_folder] if data_folder else []))

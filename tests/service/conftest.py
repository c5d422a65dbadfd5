"""The service as it is used: a process of its own, on loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.service.running import Serve, Service

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
            deadline = time.monotonic() + 60
            while not (found := re.search(r"running on (http://\S+:\d+)", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.05)
            # It may say so a moment before it listens.
            transport = httpx.HTTPTransport(retries=5, trust_env=False)
            client = httpx.Client(base_url=found[1], transport=transport, timeout=60)
            stack.enter_context(client)
            return Service(process, log, found[1], client)

        yield start


@pytest.fixture(scope="module")
def service(serve: Serve) -> Service:
    """One for all tests of a module."""
    return serve("--max-concurrent", 20, "--data", "../shared/data")

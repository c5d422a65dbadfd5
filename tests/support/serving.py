"""An example that is a web app, as a process of its own that is asked over loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).parent.parent.parent


@contextmanager
def serving(app: str) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """A server on a free port, and a client of it; killed if it lives for too long."""
    process = subprocess.Popen(
        [sys.executable, "-m", "uvicorn", app, "--port", "0"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    guard = threading.Timer(120, process.kill)
    guard.start()
    try:
        with process:
            assert process.stdout
            log = ""
            while not (url := re.search(r"http://127\.0\.0\.1:\d+", log)):
                line = process.stdout.readline()
                assert line, f"it ended: {log}"
                log += line
            try:
                with httpx.Client(base_url=url[0], trust_env=False, timeout=60) as client:
                    yield process, client
            except BaseException:
                process.kill()  # or the end of `with process` would wait for it
                raise
    finally:
        process.kill()
        guard.cancel()

"""Many runs and many clients at once, half of them slow: python -m benchmarks.service.

Serves `examples.service` in a process of its own, with a tick of 10 ms on its event loop. Starts
the same runs one by one, and then all at once, several times. Prints as JSON whether every run has
the weights that it has alone, what its clients received, how late the tick was, and the resources
of the service each time after all clients had left: threads, tasks, file descriptors, memory. Slow
clients never read: their streams are larger than all buffers on the way to them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import anyio
import httpx
import structlog
import torch
import uvicorn
from fastapi import FastAPI
from httpx_sse import aconnect_sse

from examples.datasets import digits_in_memory
from examples.service.app import create_app
from examples.service.settings import Settings

TICK = 0.01
"""Seconds."""
BATCH_SIZE = 16
SEND_BUFFER = 16_384
"""Bytes. On loopback, the kernel would buffer megabytes for a client that does not read."""


async def serve(settings: Settings) -> None:
    """Run the service with a tick on its event loop, and a route that reports its resources."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("error"))
    app = create_app(settings, {"digits": digits_in_memory()})
    late: list[float] = []
    add_probe(app, late)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, http="h11", timeout_graceful_shutdown=5
    )
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
    print("http://{}:{}".format(*listener.getsockname()), flush=True)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick, late)
        await uvicorn.Server(config).serve([listener])
        tasks.cancel_scope.cancel()


async def tick(late: list[float]) -> None:
    """Add to `late` how late each tick is, in milliseconds."""
    due = perf_counter()
    while True:
        due += TICK
        await anyio.sleep(max(0.0, due - perf_counter()))
        late.append((perf_counter() - due) * 1000)
        due = max(due, perf_counter() - TICK)  # missed ticks are skipped


def add_probe(app: FastAPI, late: list[float]) -> None:
    """Add a route that reports resources, and how late the ticks were since the last request."""

    @app.get("/probe")
    async def probe() -> dict[str, Any]:
        ticks, late[:] = sorted(late), []
        at = {"median": ticks[len(ticks) // 2], "p99": ticks[len(ticks) * 99 // 100]}
        at["max"] = ticks[-1]
        return {
            "ticks": len(ticks),
            "tick_late_ms": {name: round(value, 2) for name, value in at.items()},
            "tasks": len(asyncio.all_tasks()),
            **resources(),
        }


def resources() -> dict[str, float]:
    """Return the resources of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "threads": threading.active_count(),
        "file_descriptors": len(os.listdir("/proc/self/fd")),
        "resident_mb": round(resident * os.sysconf("SC_PAGE_SIZE") / 1e6, 1),
    }


class Load:
    """The clients.

    Args:
        client: sends the requests.
        n_runs, n_clients, epochs: the numbers of runs, of clients, and of epochs per run.
    """

    def __init__(self, client: httpx.AsyncClient, n_runs: int, n_clients: int, epochs: int):
        self.client = client
        self.n_runs = n_runs
        self.n_clients = n_clients
        self.epochs = epochs

    async def start(self, seed: int) -> str:
        """Start a run, and return its id."""
        request = {"epochs": self.epochs, "batch_size": BATCH_SIZE, "seed": seed}
        answer = await self.client.post("/runs", json=request)
        run_id: str = answer.raise_for_status().json()["id"]
        return run_id

    async def weights(self, run_id: str) -> bytes:
        """Wait until a run has ended, and return its weights."""
        while (await self.client.get(f"/runs/{run_id}")).json()["status"] == "running":
            await anyio.sleep(0.05)
        answer = await self.client.get(f"/runs/{run_id}/weights")
        return answer.raise_for_status().content

    async def connected(self, n: int) -> int:
        """Return how many clients follow runs, once at most `n` do, or after 30 seconds."""
        deadline = perf_counter() + 30
        while True:
            left: int = sum(run["clients"] for run in (await self.client.get("/runs")).json())
            if left <= n or perf_counter() > deadline:
                return left
            await anyio.sleep(0.05)

    async def probe(self) -> dict[str, Any]:
        """Return the resources of the service after all clients have left."""
        left = await self.connected(0)
        return {"clients_left": left, **(await self.client.get("/probe")).json()}

    async def alone(self) -> list[bytes]:
        """Run one after another, and return the weights of each."""
        return [await self.weights(await self.start(seed)) for seed in range(self.n_runs)]

    async def together(self) -> tuple[list[bytes], dict[str, int]]:
        """Run all at once, with every other client slow; return weights and figures of clients."""
        fast: list[int] = []
        with ExitStack() as slow:
            async with anyio.create_task_group() as tasks:
                runs = [await self.start(seed) for seed in range(self.n_runs)]
                for i in range(self.n_clients):
                    if i % 2:
                        tasks.start_soon(self.listen, runs[i % self.n_runs], fast)
                    else:
                        slow.enter_context(self.slow_client(runs[i % self.n_runs]))
                weights = [await self.weights(run_id) for run_id in runs]
            held_up = await self.connected((self.n_clients + 1) // 2)
        return weights, {
            "fast_clients_that_got_all": len(fast),
            "slow_clients_held_up_to_the_end": held_up,
            "bytes_of_one_stream": min(fast, default=0),
        }

    async def listen(self, run_id: str, whole: list[int]) -> None:
        """Read as fast as possible; add the number of bytes to `whole` if no message is missing."""
        ids, last = [], ""
        async with aconnect_sse(self.client, "GET", f"/runs/{run_id}/events") as source:
            async for message in source.aiter_sse():
                if message.data:
                    ids.append(int(message.id))
                    last = message.event
        if ids == list(range(1, len(ids) + 1)) and last == "run_ended":
            whole.append(source.response.num_bytes_downloaded)

    def slow_client(self, run_id: str) -> socket.socket:
        """Return the connection of a client that sends a request, and never reads."""
        url = self.client.base_url
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect((url.host, url.port))
        request = f"GET /runs/{run_id}/events HTTP/1.1\r\nHost: {url.host}\r\n\r\n"
        connection.sendall(request.encode())
        return connection


async def measure(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the runs alone, and then together."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=1)
    transport = httpx.AsyncHTTPTransport(limits=limits, trust_env=False)
    async with httpx.AsyncClient(base_url=url, transport=transport, timeout=300) as client:
        load = Load(client, args.runs, args.clients, args.epochs)
        alone = await load.alone()
        figures: dict[str, Any] = {
            "different_runs": len(set(alone)),
            "one_by_one": await load.probe(),
            "together": [],
        }
        for _ in range(args.rounds):
            weights, received = await load.together()
            as_alone = sum(a == b for a, b in zip(weights, alone, strict=True))
            left = await load.probe()
            figures["together"].append({"weights_as_alone": as_alone, **received, **left})
        return figures


def main() -> None:
    """Start the service and the load."""
    parser = argparse.ArgumentParser(prog="benchmarks.service", description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        torch.set_num_threads(1)  # the runs share the cores
        settings = Settings(
            max_concurrent=args.runs,
            max_kept=args.runs,
            max_clients=args.clients,
            journal_size=100_000,
            interval=0.0,  # every batch is reported
            send_timeout=3600.0,  # no client is disconnected
        )
        anyio.run(serve, settings)
        return
    command = [sys.executable, "-m", "benchmarks.service", "--serve", *sys.argv[1:]]
    # It inherits standard error, where it reports errors.
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        url = service.stdout.readline().strip()
        if not url:
            sys.exit(f"the service ended with exit code {service.wait()}: see its messages above")
        try:
            figures = anyio.run(measure, url, args)
        finally:
            service.terminate()
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()

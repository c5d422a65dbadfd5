"""SIGTERM: runs stop at their next event, say why, and the process ends with exit code 0."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anyio
import httpx
import pytest
from httpx_sse import connect_sse

from examples.datasets import digits_in_memory
from examples.service.runs import NewRun, Runs
from examples.service.settings import Settings
from tests.service.running import Gate, Serve, Service, address, rest

ROOT = Path(__file__).parents[2]
REASON = "the service is shutting down"


def last_message(service: Service, run_id: str, listening: threading.Barrier) -> dict[str, Any]:
    """Follow a run to its end."""
    with (
        httpx.Client(base_url=service.url, trust_env=False, timeout=60) as client,
        connect_sse(client, "GET", f"/runs/{run_id}/events") as source,
    ):
        messages = source.iter_sse()
        next(messages)
        listening.wait(30)
        *_, last = messages
    data: dict[str, Any] = json.loads(last.data)
    return data


def test_three_runs_stop_and_say_why(serve: Serve) -> None:
    service = serve("--max-concurrent", 3)
    runs = [service.start(epochs=1000, seed=seed) for seed in range(3)]
    listening = threading.Barrier(4)
    with ThreadPoolExecutor() as pool:
        ends = [pool.submit(last_message, service, run_id, listening) for run_id in runs]
        listening.wait(30)
        assert service.terminate() == 0
        for run_id, end in zip(runs, ends, strict=True):
            last = end.result(30)
            assert (last["event"], last["run_id"]) == ("run_ended", run_id)
            assert (last["status"], last["who"]) == ("cancelled", "Learner.stop")
            assert last["reason"] == REASON
    ended = [line for line in service.lines() if line["event"] == "fit_ended"]
    assert {line["run_id"] for line in ended} == set(runs)
    assert {line["reason"] for line in ended} == {REASON}


def test_a_run_that_has_just_started_stops(serve: Serve) -> None:
    service = serve("--max-concurrent", 4)
    runs = [service.start(epochs=1000) for _ in range(4)]
    assert service.terminate() == 0
    lines = service.lines()
    assert not [line for line in lines if line["level"] == "error"]
    assert {line["run_id"] for line in lines if line["event"] == "fit_ended"} == set(runs)


async def test_a_run_that_has_not_begun_its_fit_stops() -> None:
    """At once after its start: what could be told it only later would train to its end."""
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            runs = Runs(tasks, {"digits": digits_in_memory()}, Settings())
            run = await runs.start(NewRun(epochs=1000))
            await runs.close(30)
            assert run.ended
            state = run.state()
            assert (state.status, state.reason) == ("cancelled", REASON)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_ends_with_exit_code_0(serve: Serve, signum: signal.Signals) -> None:
    service = serve()
    service.process.send_signal(signum)
    assert service.process.wait(30) == 0
    assert not [line for line in service.lines() if line["level"] in ("warning", "error")]


def test_while_it_stops_it_answers_but_takes_no_runs(serve: Serve, gate: Gate) -> None:
    options = ("--max-concurrent", 1, "--deadline", 600)
    service = serve(*options, module="tests.service.faulty", GATE=str(gate.path))
    request = {"dataset": "fashion-mnist", "batch_size": 1}
    run_id = service.start(**request)
    service.wait_for_log("waiting_for_image")
    assert service.client.post("/runs", json=request).status_code == 429
    service.process.send_signal(signal.SIGTERM)
    while (answer := service.client.post("/runs", json=request)).status_code == 429:
        assert service.process.poll() is None
    assert (answer.status_code, answer.json()["detail"]) == (503, REASON)
    assert service.state(run_id)["status"] == "running"
    gate.open()
    assert service.process.wait(60) == 0


def test_a_client_that_does_not_read_holds_up_no_shutdown(serve: Serve) -> None:
    service = serve("--interval", 0, "--send-timeout", 600, module="tests.service.faulty")
    run_id = service.start(dataset="fashion-mnist", epochs=1000, batch_size=1)
    with service.deaf(run_id) as deaf:
        deaf.recv(100)
        read = 0
        with service.client.stream("GET", f"/runs/{run_id}/events") as response:
            for part in response.iter_raw():
                read += len(part)
                if read > 500_000:  # more than all buffers between the service and `deaf`
                    break
        assert service.state(run_id)["clients"] > 0
        assert service.terminate() == 0
        held = rest(deaf)
    assert b"event: batch" in held
    assert b"run_ended" not in held
    assert service.lines()[-1]["event"].startswith("Finished server process")


def test_a_batch_that_does_not_end_is_abandoned_at_the_deadline(serve: Serve, gate: Gate) -> None:
    service = serve("--deadline", 0.5, module="tests.service.faulty", GATE=str(gate.path))
    run_id = service.start(dataset="fashion-mnist")
    service.wait_for_log("waiting_for_image")
    assert service.terminate() == 1
    (line,) = (line for line in service.lines() if line["event"] == "runs_abandoned")
    assert (line["level"], line["run_ids"]) == ("error", [run_id])


FIT_IN_A_REQUEST = """
import signal, threading, torch, uvicorn
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch
from fastapi import FastAPI

def threads():
    return [t.name for t in threading.enumerate() if t.name.startswith("eventrain-")]

app = FastAPI()
batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 100
learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))

@app.get("/")
async def fit():
    learner.subscribe(AfterBatch, lambda event: print("fitting", threads(), flush=True), once=True)
    await learner.fit(10**9, valid=False)

signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end
uvicorn.run(app, port=0, timeout_graceful_shutdown=1, access_log=False)
print("after", threads(), learner.result.status, flush=True)
"""


def test_uvicorns_own_graceful_timeout_leaves_no_thread(tmp_path: Path) -> None:
    """G4: it cancels the tasks of requests natively; here one awaits a fit itself."""
    script, log = tmp_path / "script.py", tmp_path / "log"
    script.write_text(FIT_IN_A_REQUEST)
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(script)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
    try:
        assert process.stdout is not None
        url = address(log, process)
        with ThreadPoolExecutor() as pool:
            request = pool.submit(httpx.get, url, trust_env=False, timeout=60)
            fitting = process.stdout.readline()
            assert fitting.startswith(b"fitting ['eventrain-")
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read()
            # Cut off, or with an answer that says so: whichever is first.
            assert request.exception(60) is not None or request.result().status_code == 500
        assert rest.decode().splitlines() == ["after [] cancelled"]
        assert "timeout graceful shutdown exceeded" in log.read_text()
    finally:
        process.kill()
        process.wait(30)
        process.stdout.close()

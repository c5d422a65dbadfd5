"""Training on what clients send, as its example does: over loopback, and with a held training."""

from __future__ import annotations

import signal
import threading
from typing import Any

import anyio
import httpx
import pytest
import torch
from eventrain.events import BeforeBatch
from torch import nn

from examples import train_from_queue
from tests.support.serving import serving
from tests.support.waiting import GUARD, thread_has_ended, until, wait_until

APP = "examples.train_from_queue:app"


def samples(i: int) -> dict[str, Any]:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(i))
    return {"inputs": x.tolist(), "targets": x.sum(1).tolist()}


def by_hand(n: int) -> list[float]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    opt = torch.optim.SGD(model.parameters(), 0.01)
    for i in range(n):
        x, y = (torch.tensor(part) for part in samples(i).values())
        nn.functional.mse_loss(model(x), y[:, None]).backward()
        opt.step()
        opt.zero_grad()
    return model.weight.flatten().tolist()  # type: ignore[no-any-return]


def send(client: httpx.Client, i: int) -> None:
    """Until it is accepted: the first fit of a process takes its time to begin."""
    wait_until(lambda: client.post("/batches", json=samples(i)).status_code == 202)


def test_the_model_is_trained_on_what_is_sent_and_on_all_of_it_at_the_end() -> None:
    with serving(APP) as (process, client):
        for i in range(20):
            send(client, i)
        wait_until(lambda: client.get("/model").json() == [20, by_hand(20)])
        for i in range(20, 25):
            send(client, i)
        process.send_signal(signal.SIGTERM)
        assert process.wait(GUARD) in (0, -signal.SIGTERM)  # uvicorn raises it again at its end
        assert process.stdout
        log = process.stdout.read()
    assert "completed: 25 batches" in log
    assert "Application shutdown complete" in log


def test_a_batch_that_is_none_is_refused() -> None:
    wrong: list[dict[str, Any]] = [{"inputs": [[1, 2]]}, {"inputs": []}]
    wrong += [{"targets": ["one"]}, {"targets": [1, 2]}]
    with serving(APP) as (process, client):
        for part in wrong:
            assert client.post("/batches", json=samples(0) | part).status_code == 422
        assert client.get("/model").json()[0] == 0
        process.terminate()


async def test_clients_wait_for_the_training_and_then_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    released = threading.Event()

    def hold(event: BeforeBatch) -> None:
        assert released.wait(GUARD)

    app = train_from_queue.app
    most = 1 + train_from_queue.AHEAD + train_from_queue.WAITING
    monkeypatch.setattr(train_from_queue, "PATIENCE", GUARD)
    async with (
        train_from_queue.lifespan(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://queue") as client,
    ):
        learner = app.state.learner
        with learner.subscribe(BeforeBatch, hold):
            for i in range(most):
                assert (await client.post("/batches", json=samples(i))).status_code == 202
            monkeypatch.setattr(train_from_queue, "PATIENCE", 0.01)
            full = await client.post("/batches", json=samples(most))
            assert (full.status_code, full.headers["retry-after"]) == (503, "1")
            assert full.json() == {"detail": "the training is behind"}
            monkeypatch.setattr(train_from_queue, "PATIENCE", GUARD)
            released.set()
            assert (await client.post("/batches", json=samples(most))).status_code == 202
    assert learner.result.status == "completed"
    assert learner.result.batches == most + 1
    assert learner.model.weight.flatten().tolist() == by_hand(most + 1)
    assert thread_has_ended(learner)


async def test_a_training_that_has_ended_takes_no_batches() -> None:
    app = train_from_queue.app
    async with (
        train_from_queue.lifespan(app),
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://queue") as client,
    ):
        learner = app.state.learner
        with anyio.fail_after(GUARD):
            await until(lambda: learner.fitting)
            learner.stop(reason="enough")
            await until(lambda: not learner.fitting)
        answer = await client.post("/batches", json=samples(0))
        assert answer.json() == {"detail": "the training has ended"}

"""Fits in a FastAPI app, as their example serves them: a process of its own, asked over HTTP."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import httpx
import pytest
from httpx_sse import connect_sse

from tests.support.serving import serving


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """A client of a server that these tests share."""
    with serving("examples.embed_fastapi:app") as (process, client):
        yield client
        process.terminate()
        process.wait(60)


def start(client: httpx.Client, **numbers: float) -> str:
    answer = client.post("/fits", params=numbers)
    assert answer.status_code == 202, answer.text
    return f"/fits/{answer.json()}"


def listen(client: httpx.Client, fit: str) -> Iterator[tuple[int, dict[str, float | None]]]:
    """The epochs of a fit, and what was measured in them."""
    with connect_sse(client, "GET", f"{fit}/events") as source:
        for message in source.iter_sse():
            epoch, metrics = message.json()
            yield epoch, metrics


@pytest.mark.parametrize(
    ("field", "value"), [("epochs", 0), ("epochs", "many"), ("lr", -1), ("lr", "nan")]
)
def test_a_bad_number_is_refused_by_name(client: httpx.Client, field: str, value: object) -> None:
    answer = client.post("/fits", params={field: value})
    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert error["loc"] == ["query", field]


def test_an_unknown_fit_has_no_events_and_cannot_be_stopped(client: httpx.Client) -> None:
    assert client.get("/fits/99/events").status_code == 204
    assert client.post("/fits/99/stop").json() is False


def test_every_epoch_is_told_until_the_fit_is_complete(client: httpx.Client) -> None:
    fit = start(client, epochs=10, lr=1e9)  # so high that the loss becomes NaN
    told = list(listen(client, fit))
    epochs = [epoch for epoch in range(10) for _ in ("train", "valid")]
    assert [epoch for epoch, _ in told] == epochs[-len(told) :]
    assert told[-1] == (9, {"loss": None})
    assert client.get(f"{fit}/events").status_code == 204


def test_fits_are_limited_and_stopped_one_by_one(client: httpx.Client) -> None:
    fits = [start(client, epochs=100_000) for _ in range(2)]
    refused = client.post("/fits")
    assert refused.status_code == 429
    assert "two fits are running" in refused.text
    for fit in fits:
        told = listen(client, fit)
        _, metrics = next(told)
        assert metrics["loss"] is not None
        assert metrics["loss"] > 0
        assert client.post(f"{fit}/stop").json() is True
        list(told)  # it ends
        assert client.post(f"{fit}/stop").json() is False
    start(client, epochs=1)


def test_sigterm_ends_the_server_with_its_fits_and_its_streams() -> None:
    with serving("examples.embed_fastapi:app") as (process, client):
        told = listen(client, start(client, epochs=100_000))
        next(told)  # it is running, and somebody listens
        process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.RemoteProtocolError):  # cut off
            list(told)
        assert process.wait(60) in (0, -signal.SIGTERM)  # uvicorn raises it again at its end
        assert process.stdout
        assert "Application shutdown complete" in process.stdout.read()

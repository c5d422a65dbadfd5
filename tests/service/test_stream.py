"""A run's events, server-sent: typed, numbered, resumable, for clients of any speed."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from httpx_sse import ServerSentEvent, connect_sse
from jsonschema import Draft202012Validator
from referencing import Registry, Resource

from tests.service.running import Serve, Service
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    """That of a message's data."""
    record = json.loads((ROOT / "docs" / "record.schema.json").read_text())
    stream = json.loads((ROOT / "examples" / "service" / "stream.schema.json").read_text())
    registry = Registry().with_resource(record["$id"], Resource.from_contents(record))
    return Draft202012Validator(stream, registry=registry)


def read(service: Service, run_id: str, last: int | None = None) -> Iterator[ServerSentEvent]:
    """The messages of a run after number `last`, to the end; close it to leave earlier."""
    headers = {} if last is None else {"last-event-id": str(last)}
    url = f"/runs/{run_id}/events"
    with connect_sse(service.client, "GET", url, headers=headers) as source:
        source.response.raise_for_status()
        # The first block has no data, only when to come back: no message to a browser.
        yield from (message for message in source.iter_sse() if message.data)


def as_sent(messages: Iterable[ServerSentEvent]) -> list[tuple[str, str, str]]:
    return [(message.id, message.event, message.data) for message in messages]


def ids(messages: list[ServerSentEvent]) -> list[int]:
    return [int(message.id) for message in messages]


def test_messages_are_numbered_typed_and_as_the_schema_says(
    service: Service, schema: Draft202012Validator
) -> None:
    run_id = service.start(epochs=2)
    messages = list(read(service, run_id))
    assert ids(messages) == list(range(1, len(messages) + 1))
    data = [json.loads(message.data) for message in messages]
    for message, record in zip(messages, data, strict=True):
        schema.validate(record)
        assert message.event == record["event"]
        assert record["run_id"] == run_id
    assert (messages[0].event, messages[-1].event) == ("fit_started", "run_ended")
    assert {message.event for message in messages} == {
        "fit_started",
        "batch",
        "epoch",
        "log",
        "fit_ended",
        "run_ended",
    }

    history = service.state(run_id)["history"]
    epochs = [record for record in data if record["event"] == "epoch"]
    phases = {"train": "train", "valid": "eval"}
    assert [
        {"epoch": each["epoch"], "train": phases[each["phase"]], **each["metrics"]}
        for each in epochs
    ] == history
    logged = [record["message"] for record in data if record["event"] == "log"]
    assert logged == ["fit_started", *["epoch"] * 4, "fit_ended"]


def test_the_schema_refuses_invalid_messages(schema: Draft202012Validator) -> None:
    gap = {"event": "gap", "schema_version": 1, "run_id": "r", "missed": 3}
    assert schema.is_valid(gap)
    for wrong in ({"missed": 0}, {"event": "other"}, {"schema_version": 2}, {"more": 1}):
        assert not schema.is_valid({**gap, **wrong})


def test_a_run_that_has_ended_is_streamed_once_from_the_start(service: Service) -> None:
    run_id = service.start(epochs=1)
    live = list(read(service, run_id))
    assert as_sent(read(service, run_id)) == as_sent(live)
    url = f"/runs/{run_id}/events"
    answer = service.client.get(url, headers={"last-event-id": live[-1].id})
    assert answer.status_code == 204  # an EventSource does not come back after this


def test_last_event_id_resumes_without_loss_or_repetition(service: Service) -> None:
    """Leaving again and again, in the middle of the run and after it."""
    run_id = service.start(epochs=12)
    got: list[ServerSentEvent] = []
    while not got or got[-1].event != "run_ended":
        last = int(got[-1].id) if got else None
        got += islice(read(service, run_id, last), 7)
    assert ids(got) == list(range(1, len(got) + 1))
    assert len(got) > 21
    assert as_sent(got) == as_sent(read(service, run_id))


@pytest.mark.parametrize("value", ["-1", "one", "1.5", ""])
def test_an_invalid_last_event_id_is_named(service: Service, value: str) -> None:
    run_id = service.start(epochs=1)
    answer = service.client.get(f"/runs/{run_id}/events", headers={"last-event-id": value})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["header", "last-event-id"]


def test_a_last_event_id_of_the_future_is_refused(service: Service) -> None:
    run_id = service.start(epochs=1)
    answer = service.client.get(f"/runs/{run_id}/events", headers={"last-event-id": "99999"})
    assert answer.status_code == 409


def test_a_client_learns_how_many_messages_the_journal_no_longer_holds(
    serve: Serve, schema: Draft202012Validator
) -> None:
    service = serve("--journal-size", 5)
    run_id = service.start(epochs=3)
    service.wait(run_id)
    gap, *messages = read(service, run_id)
    schema.validate(json.loads(gap.data))
    assert (gap.event, gap.id) == ("gap", "")
    assert len(messages) == 5
    assert ids(messages)[0] == json.loads(gap.data)["missed"] + 1
    assert messages[-1].event == "run_ended"
    assert len(service.state(run_id)["history"]) == 6  # the epochs are not lost


@pytest.fixture(scope="module")
def slow(serve: Serve) -> Service:
    """Its runs take their time; it has at most two clients, and a heartbeat each 0.2 s."""
    return serve(
        *("--max-clients", 2, "--heartbeat", 0.2),
        module="tests.service.faulty",
        SECONDS="0.2",
    )


def test_a_quiet_stream_has_a_heartbeat(slow: Service) -> None:
    run_id = slow.start(dataset="fashion-mnist", epochs=1000)
    with slow.client.stream("GET", f"/runs/{run_id}/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        pings = (line for line in response.iter_lines() if line.startswith(": ping"))
        assert len(list(islice(pings, 3))) == 3
    assert slow.state(run_id)["status"] == "running"
    slow.client.post(f"/runs/{run_id}/stop", json={})
    slow.wait(run_id)


def test_clients_are_counted_bounded_and_forgotten_when_they_go(slow: Service) -> None:
    run_id = slow.start(dataset="fashion-mnist", epochs=1000)
    first, second = read(slow, run_id), read(slow, run_id)
    for stream in (first, second):
        next(stream)
    assert slow.state(run_id)["clients"] == 2
    answer = slow.client.get(f"/runs/{run_id}/events")
    assert answer.status_code == 429
    assert answer.headers["retry-after"]
    first.close()  # type: ignore[attr-defined]
    wait_for_clients(slow, run_id, 1)
    third = read(slow, run_id)
    next(third)
    slow.client.post(f"/runs/{run_id}/stop", json={"reason": "seen enough"})
    for stream in (second, third):
        *_, last = stream
        assert json.loads(last.data)["reason"] == "seen enough"
    wait_for_clients(slow, run_id, 0)


def wait_for_clients(service: Service, run_id: str, n: int) -> None:
    wait_until(lambda: service.state(run_id)["clients"] == n, every=0.05)


def test_a_client_that_does_not_read_slows_down_nobody(serve: Serve) -> None:
    """Its run loses nothing either: no client has a buffer of its own."""
    service = serve(
        *("--interval", 0, "--send-timeout", 600, "--journal-size", 10_000),
        module="tests.service.faulty",
    )
    run_id = service.start(dataset="fashion-mnist", epochs=150, batch_size=1)
    with service.deaf(run_id):
        messages = list(read(service, run_id))
        assert ids(messages) == list(range(1, len(messages) + 1))
        state = service.state(run_id)
        assert (state["status"], state["steps"], state["dropped"]) == ("completed", 1200, {})
        wait_for_clients(service, run_id, 1)


def test_a_client_that_does_not_read_is_disconnected(serve: Serve) -> None:
    """No other client is there: one that reads could be too slow as well on a busy machine."""
    service = serve("--interval", 0, "--send-timeout", 0.5, module="tests.service.faulty")
    run_id = service.start(dataset="fashion-mnist", epochs=150, batch_size=1)
    with service.deaf(run_id):
        service.wait_for_log("client_too_slow")
        wait_for_clients(service, run_id, 0)
    state = service.wait(run_id)
    assert (state["status"], state["steps"], state["dropped"]) == ("completed", 1200, {})


def last_of(stream: Iterator[ServerSentEvent]) -> dict[str, Any]:
    *_, last = stream
    data: dict[str, Any] = json.loads(last.data)
    return data


def test_a_failure_is_the_last_message_and_forges_no_other(serve: Serve) -> None:
    service = serve(module="tests.service.faulty", SECONDS="0.01")
    ended = last_of(read(service, service.start(epochs=2)))
    assert (ended["event"], ended["status"]) == ("run_ended", "failed")
    assert ended["reason"] == "OSError: the disk is gone\nand with it the data"

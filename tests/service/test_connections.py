"""Connections that are of no use any more are closed, and nothing is left of them."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from httpx_sse import connect_sse

from tests.service.running import Serve, rest, wait_until


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc/PID/fd")
def test_connections_of_disconnected_clients_are_closed(serve: Serve) -> None:
    """Though there was something to send, which they never took."""
    service = serve("--interval", 0, "--send-timeout", 0.5, module="tests.service.faulty")
    run_id = service.start(dataset="fashion-mnist", epochs=1000, batch_size=1)
    wait_until(lambda: service.state(run_id)["history"])  # it has opened what a run needs
    before = service.files()
    with ExitStack() as stack:
        deaf = [stack.enter_context(service.deaf(run_id)) for _ in range(5)]
        service.wait_for_log("client_too_slow", 5)
        wait_until(lambda: service.files() <= before)
        assert service.state(run_id)["clients"] == 0
        for each in deaf:
            held = rest(each)
            assert b"event: batch" in held
            assert b"run_ended" not in held
    assert service.state(run_id)["status"] == "running"


def send(connection: socket.socket, part: bytes) -> None:
    """Send part of a request; it may be too late already."""
    with suppress(ConnectionError):
        connection.sendall(part)


def test_connections_that_ask_nothing_are_closed_and_streams_are_not(serve: Serve) -> None:
    """Nor do they lock others out for long: there are more of them than may be connected."""
    service = serve(
        *("--max-clients", 1, "--idle-timeout", 5, "--heartbeat", 60),
        module="tests.service.faulty",
        SECONDS="0.02",
    )
    run_id = service.start(dataset="fashion-mnist", epochs=1000)
    with ExitStack() as stack:
        source = stack.enter_context(connect_sse(service.client, "GET", f"/runs/{run_id}/events"))
        messages = source.iter_sse()
        next(messages)
        idle = [stack.enter_context(service.connect()) for _ in range(120)]
        for connection in idle[::3]:
            send(connection, b"GET / HTTP/1.1\r\nHost: local")
        for connection in idle[1::3]:
            send(connection, b"POST /session HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n")
        for connection in idle:
            assert rest(connection) == b""
        stop = service.client.post(f"/runs/{run_id}/stop", json={})
        assert stop.status_code == 202
        *_, last = messages
        assert json.loads(last.data)["event"] == "run_ended"
    assert not [line for line in service.lines() if line["level"] == "error"]

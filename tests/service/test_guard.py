"""Attacks on the service: by other sites, without the token, with malformed requests."""

from __future__ import annotations

import json
import re
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPMessage, HTTPResponse
from math import inf, nan
from typing import Any, NamedTuple

import pytest
from starlette.datastructures import Headers
from starlette.types import Message, Receive, Scope, Send

from examples.service import __main__ as service_main
from examples.service import guard
from examples.service.guard import Guard, Sessions
from examples.service.settings import Settings
from tests.service.running import Serve, Service

TOKEN = "open-sesame"
BEARER = f"Authorization: Bearer {TOKEN}"
JSON = "Content-Type: application/json"
SESSION = json.dumps({"token": TOKEN})


class Answer(NamedTuple):
    status: int
    headers: HTTPMessage
    text: str


def ask(service: Service, line: str, *headers: str, body: str = "", host: str = "") -> Answer:
    """Send a request as it stands: no client that tidies it up."""
    address, port = service.url.removeprefix("http://").split(":")
    lines = [f"{line} HTTP/1.1", f"Host: {host or f'{address}:{port}'}", "Connection: close"]
    content = body.encode("utf-8", "surrogateescape")
    if content and not any(h.startswith(("Content-Length", "Transfer")) for h in headers):
        lines.append(f"Content-Length: {len(content)}")
    head = "\r\n".join([*lines, *headers, "", ""]).replace("PORT", port)
    with socket.create_connection((address, int(port)), timeout=60) as connection:
        connection.sendall(head.encode("latin-1") + content)
        with HTTPResponse(connection, method=line.split()[0]) as response:
            response.begin()
            return Answer(response.status, response.headers, response.read().decode())


@pytest.fixture(scope="module")
def started(serve: Serve) -> Service:
    return serve("--interval", 0, EVENTRAIN_TOKEN=TOKEN)


@pytest.fixture
def guarded(started: Service) -> Iterator[Service]:
    """A service with a token; that no attack is an error of it, or gets a secret into its log."""
    before = len(started.lines())
    yield started
    lines = started.lines()[before:]
    assert not [line for line in lines if line["level"] in ("error", "critical")]
    assert TOKEN not in json.dumps(lines)


@pytest.fixture(scope="module")
def run_id(started: Service) -> str:
    """A run that has ended."""
    answer = ask(started, "POST /runs", BEARER, JSON, body='{"epochs": 1}')
    assert answer.status == 201
    found: str = json.loads(answer.text)["id"]
    assert "run_ended" in ask(started, f"GET /runs/{found}/events", BEARER).text
    return found


def runs(service: Service) -> list[str]:
    """The ids of those there are."""
    return [run["id"] for run in json.loads(ask(service, "GET /runs", BEARER).text)]


# Other sites: DNS rebinding, forged requests.


@pytest.mark.parametrize(
    "host",
    [
        *("evil.example", "evil.example:PORT", "127.0.0.1.evil.example", "a.localhost"),
        *("127.0.0.1@evil.example", "evil.example@127.0.0.1", "localhost:PORT@evil.example"),
        *("localhost.", "localhost/", "localhost,evil.example", "localhost:x", "localhost%00"),
        *("::1", "[::1", "[::1%25lo]", "0.0.0.0", "127.1", "2130706433", " "),
    ],
)
def test_a_host_that_is_not_ours_is_refused(guarded: Service, host: str) -> None:
    for line in ("GET /", "GET /runs", "POST /runs"):
        answer = ask(guarded, line, BEARER, host=host)
        assert (answer.status, answer.text) == (400, "Invalid host header")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:PORT", "LOCALHOST", "[::1]:PORT"])
def test_our_hosts_are_served(guarded: Service, host: str) -> None:
    assert ask(guarded, "GET /runs", BEARER, host=host).status == 200


def test_no_host_two_hosts_or_a_host_in_the_target_get_nothing(guarded: Service) -> None:
    assert ask(guarded, "GET /runs", "Host: evil.example", BEARER).status == 400
    assert ask(guarded, "GET http://evil.example/runs", BEARER).status == 404
    for missing in (b"GET /runs HTTP/1.0\r\n\r\n", b"GET /runs HTTP/1.1\r\n\r\n"):
        assert send_raw(guarded, missing).startswith(b"HTTP/1.1 400 ")


def send_raw(service: Service, *chunks: bytes) -> bytes:
    """The answer; or nothing, when the server closed while we were sending."""
    address, port = service.url.removeprefix("http://").split(":")
    answer = b""
    with socket.create_connection((address, int(port)), timeout=60) as connection:
        with suppress(ConnectionError):
            for chunk in chunks:
                connection.sendall(chunk)
        with suppress(ConnectionError):
            while received := connection.recv(65536):
                answer += received
    return answer


FOREIGN = [
    "Origin: http://evil.example",
    "Origin: null",
    "Origin: http://127.0.0.1:1",
    "Origin: http://127.0.0.1",
    "Origin: https://127.0.0.1:PORT",
    "Origin: http://localhost:PORT",
    "Origin: http://127.0.0.1:PORT.evil.example",
    "Origin: http://127.0.0.1:PORT@evil.example",
    "Sec-Fetch-Site: cross-site",
    "Sec-Fetch-Site: same-site",
    "Sec-Fetch-Site: CROSS-SITE",
]


@pytest.mark.parametrize("header", FOREIGN)
def test_no_other_site_starts_a_run_logs_in_or_reads(
    guarded: Service, run_id: str, header: str
) -> None:
    before = runs(guarded)
    for line, body in [
        ("POST /runs", "{}"),
        ("POST /session", SESSION),
        ("GET /runs", ""),
        (f"GET /runs/{run_id}/events", ""),
        (f"GET /runs/{run_id}/weights", ""),
        ("GET /page/page.js", ""),
    ]:
        answer = ask(guarded, line, header, BEARER, JSON, body=body)
        assert answer.status == 403
        assert "set-cookie" not in answer.headers
        assert run_id not in answer.text
    assert runs(guarded) == before


@pytest.mark.parametrize(
    "kind",
    ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""],
)
def test_a_form_of_another_site_is_not_a_valid_request(guarded: Service, kind: str) -> None:
    """Even from a browser so old that it does not say where it comes from."""
    before = runs(guarded)
    content_type = [f"Content-Type: {kind}"] if kind else []
    assert ask(guarded, "POST /runs", BEARER, *content_type, body="{}").status == 422
    answer = ask(guarded, "POST /session", *content_type, body=SESSION)
    assert (answer.status, TOKEN in answer.text) == (422, False)
    assert runs(guarded) == before


@pytest.mark.parametrize(
    "header",
    ["Origin: http://127.0.0.1:PORT", "Sec-Fetch-Site: same-origin", "Sec-Fetch-Site: none"],
)
def test_our_own_page_is_served(guarded: Service, header: str) -> None:
    assert ask(guarded, "POST /session", header, JSON, body=SESSION).status == 204


def test_another_site_may_link_to_the_page_and_to_nothing_else(guarded: Service) -> None:
    foreign, link = "Sec-Fetch-Site: cross-site", "Sec-Fetch-Mode: navigate"
    assert ask(guarded, "GET /", foreign, link).status == 200
    assert ask(guarded, "GET /", foreign, "Sec-Fetch-Mode: no-cors").status == 403
    assert ask(guarded, "GET /runs", foreign, link, BEARER).status == 403
    assert ask(guarded, "POST /", foreign, link).status == 403


def test_a_preflight_is_allowed_nothing(guarded: Service) -> None:
    wanted = ("Access-Control-Request-Method: POST", "Access-Control-Request-Headers: content-type")
    answer = ask(guarded, "OPTIONS /runs", "Origin: http://evil.example", *wanted)
    assert answer.status == 403
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


# The token.


@pytest.mark.parametrize(
    "path",
    [
        *("/runs", "/runs/", "/runs?", "/runs#x", "/%72uns", "/runs%2f", "/runs%0a", "/runs%00"),
        *("//runs", "/RUNS", "/%2fruns", "/./runs", "/runs/../runs", "/page/../runs", "runs"),
        *("/page/%2e%2e/runs", "http://127.0.0.1:PORT/runs", "/;/runs", "/runs;x", "*"),
        *("/runs/RUN", "/runs/RUN/", "/runs/RUN/events", "/runs/RUN/weights", "/%72uns%2fRUN"),
    ],
)
def test_no_spelling_of_a_path_gets_by_without_the_token(
    guarded: Service, run_id: str, path: str
) -> None:
    for method in ("GET", "HEAD", "OPTIONS", "PUT", "POST"):
        answer = ask(guarded, f"{method} {path.replace('RUN', run_id)}")
        assert answer.status in (401, 404, 405)
        assert run_id not in answer.text
        if answer.status == 401:
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "credentials",
    [
        *("Bearer wrong", "Bearer", "Bearer ", "Bearer open", f"Bearer {TOKEN}x", "Bearer \xe9"),
        *(TOKEN, f"Basic {TOKEN}", f"Token {TOKEN}", f"Bearer,{TOKEN}", f"Bearer {TOKEN} x", ""),
    ],
)
def test_a_wrong_token_is_refused(guarded: Service, credentials: str) -> None:
    answer = ask(guarded, "GET /runs", f"Authorization: {credentials}")
    assert answer.status == 401
    assert "POST /session" in answer.text


def test_the_token_is_exchanged_for_a_cookie_that_opens_all(guarded: Service, run_id: str) -> None:
    for wrong in ("wrong", "", "op\u00e9n", "x" * 1001, 7, None):
        answer = ask(guarded, "POST /session", JSON, body=json.dumps({"token": wrong}))
        assert answer.status in (401, 422)
        assert "set-cookie" not in answer.headers

    answer = ask(guarded, "POST /session", JSON, body=SESSION)
    assert answer.status == 204
    cookie, *flags = answer.headers["set-cookie"].split("; ")
    port = guarded.url.rpartition(":")[2]
    assert cookie.startswith(f"eventrain_{port}=")
    assert sorted(flags) == ["HttpOnly", "Max-Age=28800", "Path=/", "SameSite=strict"]

    assert ask(guarded, "GET /runs", f"Cookie: {cookie}").status == 200
    assert ask(guarded, "GET /runs", f"Cookie: a=b;eventrain_{port}=x;  {cookie};").status == 200
    stream = ask(guarded, f"GET /runs/{run_id}/events", f"Cookie: {cookie}")
    assert (stream.status, stream.headers.get_content_type()) == (200, "text/event-stream")
    for forged in (f"{cookie}x", cookie[:-1], f"x{cookie}", cookie.partition("=")[2], "="):
        assert ask(guarded, "GET /runs", f"Cookie: {forged}").status == 401
    both = ("Authorization: Bearer wrong", f"Cookie: {cookie}")
    assert ask(guarded, "GET /runs", *both).status == 401


def test_behind_tls_the_cookie_is_for_tls_alone(guarded: Service) -> None:
    proxied = ("X-Forwarded-Proto: https", "Origin: https://127.0.0.1:PORT")
    answer = ask(guarded, "POST /session", *proxied, JSON, body=SESSION)
    assert answer.status == 204
    assert "; Secure" in answer.headers["set-cookie"]


def test_there_are_no_websockets(guarded: Service, run_id: str) -> None:
    upgrade = ("Upgrade: websocket", "Connection: Upgrade", "Sec-WebSocket-Version: 13")
    upgrade += ("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",)
    line = f"GET /runs/{run_id}"
    assert ask(guarded, line, *upgrade).status == 401
    assert ask(guarded, line, *upgrade, BEARER).status == 200
    assert ask(guarded, line, *upgrade, BEARER, "Origin: http://evil.example").status == 403


# Malformed requests.


@pytest.mark.parametrize(
    "made_up",
    [
        *("..", "...", "%2e%2e", "a" * 15, "a" * 17, "A" * 16, "a" * 5000, "g" * 16, "-1" * 8),
        *("a" * 16 + "%0a", "%0a" + "a" * 16, "a" * 15 + "%00", "%D9%A1" * 16, "%ff" * 16),
    ],
)
def test_an_invalid_id_is_refused(guarded: Service, made_up: str) -> None:
    for line in ("GET /runs/{}", "GET /runs/{}/events", "GET /runs/{}/weights"):
        answer = ask(guarded, line.format(made_up), BEARER)
        assert answer.status == 422
        assert [error["loc"] for error in json.loads(answer.text)["detail"]] == [["path", "run_id"]]
    assert ask(guarded, f"POST /runs/{made_up}/stop", BEARER, JSON, body="{}").status == 422


@pytest.mark.parametrize("path", ["//x", "/../x", "/..%2fx", "/%2e%2e%2fx", "/" + "a" * 16])
def test_a_run_that_never_was_is_not_found(guarded: Service, path: str) -> None:
    assert ask(guarded, f"GET /runs{path}/events", BEARER).status == 404


@pytest.mark.parametrize(
    "path",
    [
        *("../app.py", "%2e%2e/app.py", "..%2fapp.py", "..%5capp.py", "vendor/../../app.py"),
        *("/etc/passwd", "%2fetc%2fpasswd", "../../../../../../../../etc/passwd"),
        *("", ".", "vendor", "vendor/", "..", "%00", "page.js%00", "a" * 5000),
    ],
)
def test_only_files_of_the_page_are_served(guarded: Service, path: str) -> None:
    answer = ask(guarded, f"GET /page/{path}")
    assert (answer.status, answer.text) == (404, '{"detail":"Not Found"}')


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("epochs", value) for value in ('"3"', "true", "1.0", "null", "[3]", "{}", "NaN")),
        *(("epochs", value) for value in ("9" * 4000, "-1", "1e999", "[" * 900 + "]" * 900)),
        *(("lr", value) for value in ("NaN", "Infinity", "-Infinity", "1e999", "1e-999", '"0.1"')),
        *(("dataset", value) for value in ('"\\ud800"', '"digits\\u0000"', '"../data"')),
        *(("more", value) for value in ("1", "NaN", '"\\udfff"')),
    ],
)
def test_an_invalid_value_is_named_and_not_repeated(
    guarded: Service, field: str, value: str
) -> None:
    before = runs(guarded)
    answer = ask(guarded, "POST /runs", BEARER, JSON, body=f'{{"{field}": {value}}}')
    assert answer.status == 422
    (error,) = json.loads(answer.text)["detail"]
    assert error["loc"] == ["body", field]
    assert error.keys() == {"loc", "msg", "type"}
    assert runs(guarded) == before


@pytest.mark.parametrize(
    "body",
    [
        *("", "{", "[]", "null", "1", '"{}"', '{"epochs":1}x', "\x00", "\udcff\udcfe", "\udced{}"),
        *("[" * 900 + "]" * 900, "[" * 8000, '{"a":' * 3000, '{"\\ud800": 1}', "NaN"),
        '{"epochs": ' + "9" * 8000 + "}",
    ],
)
def test_a_body_that_is_not_a_json_object_is_refused(guarded: Service, body: str) -> None:
    for path in ("/runs", "/session"):
        answer = ask(guarded, f"POST {path}", BEARER, JSON, body=body)
        assert answer.status in (400, 422)
        assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("header", "body", "status"),
    [
        ("X: y", " " * 16_385, 413),
        ("Content-Length: 16385", "", 413),
        ("Content-Length: 9999999999999999999", "", 413),
        ("Content-Length: " + "9" * 5000, "", 400),
        ("Content-Length: -1", "{}", 400),
        ("Content-Length: +2", "{}", 400),
        ("Content-Length: 0x2", "{}", 400),
        ("Content-Length: 2\r\nContent-Length: 3", "{}", 400),
        ("Transfer-Encoding: chunked", "2\r\n{}\r\n0\r\n\r\n", 411),
        ("Transfer-Encoding: chunked", "8000\r\n" + " " * 0x8000 + "\r\n0\r\n\r\n", 411),
        ("Transfer-Encoding: chunked\r\nContent-Length: 2", "2\r\n{}\r\n0\r\n\r\n", 411),
        ("Transfer-Encoding: gzip, chunked", "0\r\n\r\n", 400),
    ],
)
def test_a_body_too_long_or_of_unknown_length_is_refused(
    guarded: Service, header: str, body: str, status: int
) -> None:
    before = runs(guarded)
    for line in ("POST /runs", "POST /session", "GET /page/page.js"):
        assert ask(guarded, line, BEARER, JSON, header, body=body).status == status
    assert runs(guarded) == before


def test_a_header_without_end_is_cut_off(guarded: Service) -> None:
    begin = b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "
    answer = send_raw(guarded, begin, *[b"x" * 65536] * 64)
    assert not answer or answer.startswith(b"HTTP/1.1 400 ")
    assert ask(guarded, "GET /").status == 200


@pytest.mark.parametrize(
    ("value", "status"),
    [("9" * 5000, 422), ("-" + "9" * 30, 422), ("\xb2", 422), ("0x1", 422), ("9" * 18, 409)],
)
def test_an_event_id_that_never_was_is_refused(
    guarded: Service, run_id: str, value: str, status: int
) -> None:
    answer = ask(guarded, f"GET /runs/{run_id}/events", BEARER, f"Last-Event-ID: {value}")
    assert answer.status == status
    assert value not in answer.text or status == 409


# What is answered and logged.


@pytest.mark.parametrize(
    ("line", "headers", "status"),
    [
        ("GET /", (), 200),
        ("GET /page/page.js", (), 200),
        ("GET /page/page.js", ("If-None-Match: *",), 304),
        ("GET /page", (), 307),
        ("GET /", ("Host: evil.example", "Host: evil.example"), 400),
        ("GET /runs", ("Authorization: Bearer x",), 401),
        ("GET /", ("Origin: null",), 403),
        ("GET /nothing", (), 404),
        ("PUT /", (), 405),
        ("POST /runs", (BEARER, "Transfer-Encoding: chunked"), 411),
        ("POST /runs", (BEARER, "Content-Length: 99999"), 413),
        ("POST /runs", (BEARER,), 422),
        ("GET /runs", (BEARER,), 200),
        ("GET /runs/RUN/events", (BEARER,), 200),
        ("GET /runs/RUN/weights", ("Origin: null", BEARER), 403),
        ("GET /openapi.json", (), 200),
    ],
)
def test_every_answer_tells_browsers_to_keep_others_out(
    guarded: Service, run_id: str, line: str, headers: tuple[str, ...], status: int
) -> None:
    if status == 400:
        answer = ask(guarded, line, host="evil.example")
    else:
        answer = ask(guarded, line.replace("RUN", run_id), *headers)
    assert answer.status == status
    for name, value in guard.HEADERS.items():
        assert answer.headers.get_all(name) == [value]
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    assert "server" not in answer.headers
    assert not re.search(r"/work|/home|/usr|\.py\b|Traceback", answer.text)


def test_a_redirect_leads_nowhere_else(guarded: Service, run_id: str) -> None:
    for path in ("/page", "/session/", "/runs/", f"/runs/{run_id}/", "/runs/..%2f"):
        answer = ask(guarded, f"GET {path}", BEARER, host="localhost:1")
        assert answer.status == 307
        assert answer.headers["location"].startswith("http://localhost:1/")


def test_a_reason_cannot_forge_events_or_lines_of_the_log(guarded: Service) -> None:
    """And no other site stops the run before."""
    reason = 'a\r\n\r\nevent: forged\rdata: {}\n\n{"event": "x"}\x1b[2J\x00\u2028\x85<script>"}'
    started = ask(guarded, "POST /runs", BEARER, JSON, body='{"epochs": 1000}')
    path = f"/runs/{json.loads(started.text)['id']}"
    for header in FOREIGN:
        assert ask(guarded, f"POST {path}/stop", header, BEARER, JSON, body="{}").status == 403
    for body in ("", "{", '{"reason": "\\ud800"}', '{"reason": ""}', '{"reason": 1}', '{"x": 1}'):
        assert ask(guarded, f"POST {path}/stop", BEARER, JSON, body=body).status == 422
    assert json.loads(ask(guarded, f"GET {path}", BEARER).text)["status"] == "running"

    body = json.dumps({"reason": reason})
    assert ask(guarded, f"POST {path}/stop", BEARER, JSON, body=body).status == 202
    stream = ask(guarded, f"GET {path}/events", BEARER).text
    _, *events, end = re.sub(r"\r\n?", "\n", stream).split("\n\n")
    assert end == ""
    for number, event in enumerate(events, 1):
        id_, name, data = event.split("\n")
        record = json.loads(data.removeprefix("data: "))
        assert (id_, name) == (f"id: {number}", f"event: {record['event']}")
    assert (record["event"], record["reason"]) == ("run_ended", reason)
    assert json.loads(ask(guarded, f"GET {path}", BEARER).text)["reason"] == reason

    logged = [line for line in guarded.lines() if line["event"] == "fit_ended"][-1]
    assert logged["reason"].startswith("a\\r\\n")
    assert logged["reason"].isprintable()
    assert not [line for line in guarded.lines() if line["event"] == "x"]


# Starting it.


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "gpu1.example.org", ""])
def test_it_does_not_start_where_others_reach_it_without_a_token(
    host: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["service", "--host", host, "--port", "0"])
    monkeypatch.delenv("EVENTRAIN_TOKEN", raising=False)
    with pytest.raises(SystemExit) as exit_:
        service_main.main()
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert f"--host {host} can be reached by others: set a token (EVENTRAIN_TOKEN=" in message
    assert "or bind to 127.0.0.1" in message


def test_with_a_token_it_starts_where_others_reach_it(serve: Serve) -> None:
    token = secrets.token_urlsafe()
    service = serve("--host", "0.0.0.0", "--allow-host", "gpu1.example.org", EVENTRAIN_TOKEN=token)
    bearer = f"Authorization: Bearer {token}"
    assert ask(service, "GET /runs").status == 401
    for host in ("gpu1.example.org", "GPU1.example.org:80", "0.0.0.0", "localhost"):
        assert ask(service, "GET /runs", bearer, host=host).status == 200
    assert ask(service, "GET /runs", bearer, host="gpu2.example.org").status == 400


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    allowed = Settings(host=host).allowed_hosts
    assert (f"[{host}]" if ":" in host else host) in allowed
    assert not [name for name in allowed if "*" in name]


@pytest.mark.parametrize("token", ["", " ", "two words", "line\n", "\u00e9", "\udcff", "\x00"])
def test_a_token_that_no_header_carries_is_refused_and_not_shown(token: str) -> None:
    """An empty one, too: who sets it means to have one."""
    with pytest.raises(ValueError, match=r"^EVENTRAIN_TOKEN is empty, or .* or unset it$"):
        Settings(token=token)
    assert TOKEN not in repr(Settings(token=TOKEN))


@pytest.mark.parametrize("name", ["*", "*.example.org", "https://a.example", "a:80", "a b", ""])
def test_a_name_that_no_host_has_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="give the name alone"):
        Settings(names=("gpu1.example.org", name))


@pytest.mark.parametrize(
    "limit",
    [*({"max_clients": value} for value in (0, -1)), *({"interval": v} for v in (-0.1, inf, nan))],
)
def test_an_invalid_limit_is_named(limit: dict[str, Any]) -> None:
    (name,) = limit
    with pytest.raises(ValueError, match=f"^{name}="):
        Settings(**limit)


# Sessions, and what is behind the guard.


def admits(sessions: Sessions, cookie: str | None, name: str = "c") -> bool:
    return sessions.admits(Headers({"cookie": f"{name}={cookie}"}), "c")


def test_a_session_is_opened_by_the_token_alone() -> None:
    sessions = Sessions(TOKEN)
    assert [sessions.open(wrong) for wrong in ("", "x", TOKEN[:-1], "\u00e9")] == [None] * 4
    cookie = sessions.open(TOKEN)
    assert admits(sessions, cookie)
    assert sessions.open(TOKEN) != cookie
    assert not admits(sessions, cookie, name="d")
    assert not admits(sessions, "")
    assert not admits(Sessions(TOKEN), cookie)


def test_without_a_token_all_are_admitted_and_none_logs_in() -> None:
    sessions = Sessions(None)
    assert admits(sessions, "x")
    assert sessions.open("") is None


def test_a_session_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    sessions = Sessions(TOKEN)
    monkeypatch.setattr(guard, "SESSION_SECONDS", 0)
    assert not admits(sessions, sessions.open(TOKEN))


def test_the_oldest_session_makes_room_for_one_too_many() -> None:
    sessions = Sessions(TOKEN)
    first, second, *_ = cookies = [sessions.open(TOKEN) for _ in range(guard.MAX_SESSIONS)]
    assert all(admits(sessions, cookie) for cookie in cookies)
    sessions.open(TOKEN)
    assert not admits(sessions, first)
    assert admits(sessions, second)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_cookies_are_not_parsed_behind_the_guard(anyio_backend: str) -> None:
    """Python's own parser takes seconds for one of backslashes (CVE-2024-7592)."""
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    async def nothing(message: Message | None = None) -> Any:
        raise AssertionError(message)

    cookie = b'c="' + b"\\" * 60_000 + b'"'
    headers = [(b"host", b"localhost"), (b"cookie", cookie), (b"x", b"y"), (b"cookie", cookie)]
    scope = {"type": "http", "method": "GET", "path": "/", "scheme": "http", "headers": headers}
    await Guard(app, Sessions(TOKEN), 100, "/runs")(scope, nothing, nothing)
    assert [pair[0] for pair in seen[0]["headers"]] == [b"host", b"x"]
    assert len(headers) == 4

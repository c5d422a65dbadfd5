"""Which requests are admitted: the origin, the size and the token of each are checked.

A page of another site can send requests to a service on loopback from its visitor's browser,
and, by DNS rebinding, even read the answers. Starlette's TrustedHostMiddleware prevents the latter
by a check of the Host header. This module prevents the former by a check of the origin that the
browser reports. A token, if one is set, is sent as a bearer token, or in a SameSite cookie because
EventSource cannot send headers.
"""

from __future__ import annotations

import secrets
import time

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

SESSION_SECONDS = 8 * 3600
MAX_SESSIONS = 100

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:;"
        " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    ),
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}
"""Headers of every answer. The server adds them, so that its own answers have them, too."""


class Sessions:
    """Browsers that have sent the token: random cookies, valid for some hours.

    Args:
        token: the secret; None for a service without one.
    """

    def __init__(self, token: str | None) -> None:
        self.token = token
        self._ends: dict[str, float] = {}

    def open(self, token: str) -> str | None:
        """Return the cookie of a new session, or None if the token is wrong."""
        if not self.token or not secrets.compare_digest(token.encode(), self.token.encode()):
            return None
        while len(self._ends) >= MAX_SESSIONS:
            del self._ends[next(iter(self._ends))]
        cookie = secrets.token_urlsafe(32)
        self._ends[cookie] = time.monotonic() + SESSION_SECONDS
        return cookie

    def admits(self, headers: Headers, cookie_name: str) -> bool:
        """Return whether a request may read and change runs."""
        if not self.token:
            return True
        kind, _, token = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer":
            return secrets.compare_digest(token.strip().encode(), self.token.encode())
        now = time.monotonic()
        pairs = (pair.partition("=") for pair in headers.get("cookie", "").split(";"))
        return any(
            name.strip() == cookie_name and self._ends.get(value.strip(), now) > now
            for name, _, value in pairs
        )


def cookie_name(scope: Scope) -> str:
    """Return a name that has the port in it: browsers share cookies between ports of a host."""
    return f"eventrain_{(scope.get('server') or ('', 0))[1]}"


class Guard:
    """ASGI middleware that refuses requests before they reach the routes.

    Args:
        app: the application to protect.
        sessions: admits requests whose path begins with `private`.
        max_body: the size limit of a request in bytes; its Content-Length is checked.
        private: the beginning of the paths that need the token.
    """

    def __init__(self, app: ASGIApp, sessions: Sessions, max_body: int, private: str) -> None:
        self.app = app
        self.sessions = sessions
        self.max_body = max_body
        self.private = private

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return None  # there are no websockets here: the server then refuses them
        headers = Headers(scope=scope)
        if refusal := self._refusal(scope, headers):
            return await refusal(scope, receive, send)
        # FastAPI parses cookies for every route. Before 3.11.10 and 3.12.6, Python's parser takes
        # seconds for a long one (CVE-2024-7592). The routes do not use cookies.
        scope = {**scope, "headers": [pair for pair in scope["headers"] if pair[0] != b"cookie"]}
        return await self.app(scope, receive, send)

    def _refusal(self, scope: Scope, headers: Headers) -> JSONResponse | None:
        if not _same_origin(scope, headers):
            return _answer(403, "this request comes from another site")
        if "transfer-encoding" in headers:
            return _answer(411, "the request needs a Content-Length header")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body:
            return _answer(413, f"a request may have at most {self.max_body} bytes")
        private = scope["path"].startswith(self.private)
        if private and not self.sessions.admits(headers, cookie_name(scope)):
            detail = "a token is required: send Authorization: Bearer ..., or POST /session"
            return _answer(401, detail, {"www-authenticate": "Bearer"})
        return None


def _same_origin(scope: Scope, headers: Headers) -> bool:
    """Return whether the request comes from this page, or from a client that is not a browser."""
    origin = headers.get("origin")
    if origin is not None and origin != f"{scope['scheme']}://{headers.get('host', '')}":
        return False
    if headers.get("sec-fetch-site", "none") in ("same-origin", "none"):
        return True
    return (  # a link to the page
        scope["method"] == "GET"
        and scope["path"] == "/"
        and headers.get("sec-fetch-mode") == "navigate"
    )


def _answer(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, headers)

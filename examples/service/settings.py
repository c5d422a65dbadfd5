"""The settings of the service, most of which are limits."""

from __future__ import annotations

import ipaddress
import math
import re
from dataclasses import dataclass, field, fields
from typing import Any


def _limit(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of the service.

    Attributes:
        token: the secret that clients must send; required on an address that others can reach.
        names: host names of the service, in addition to `host` and those of loopback.

    Raises:
        ValueError: if others can reach `host` and there is no token, or if a value is invalid.
    """

    token: str | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()
    host: str = _limit("127.0.0.1", "address to bind to")
    max_concurrent: int = _limit(2, "runs at the same time; more are refused with 429")
    max_kept: int = _limit(50, "runs to remember")
    max_clients: int = _limit(100, "event streams at the same time")
    max_body: int = _limit(16_384, "largest allowed request, in bytes")
    journal_size: int = _limit(2_000, "messages per run that are held for clients")
    interval: float = _limit(0.1, "seconds between two batches that are reported to clients")
    heartbeat: float = _limit(15.0, "seconds between two heartbeats on a quiet stream")
    send_timeout: float = _limit(
        30.0, "seconds after which a client that does not read is disconnected"
    )
    idle_timeout: float = _limit(
        30.0, "seconds after which a connection without a complete request is closed"
    )
    deadline: float = _limit(10.0, "seconds that the runs have to stop at shutdown")

    def __post_init__(self) -> None:
        if self.token is not None and not re.fullmatch("[!-~]+", self.token):
            raise ValueError(
                "EVENTRAIN_TOKEN is empty, or has characters that a header cannot carry: set it to"
                " letters and digits, such as those of `openssl rand -hex 16`, or unset it"
            )
        for name in self.names:
            if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", name, re.ASCII):
                raise ValueError(
                    f"--allow-host {name}: give the name alone, such as gpu1.example.org,"
                    " without scheme, port, or *"
                )
        for limit in fields(self):
            value, kind = getattr(self, limit.name), type(limit.default)
            if kind is int and value < 1:
                raise ValueError(f"{limit.name}={value}: give 1 or more")
            if kind is float and not 0 <= value < math.inf:
                raise ValueError(f"{limit.name}={value}: give a number of seconds, 0 or more")
        for name in ("heartbeat", "send_timeout", "idle_timeout"):
            if not getattr(self, name):
                raise ValueError(f"{name}=0: give a number of seconds greater than 0")
        if self.token is None and not _is_loopback(self.host):
            raise ValueError(
                f"--host {self.host} can be reached by others: set a token"
                " (EVENTRAIN_TOKEN=$(openssl rand -hex 16)), or bind to 127.0.0.1"
            )

    @property
    def allowed_hosts(self) -> list[str]:
        """Values that the Host header of a request may have."""
        own = f"[{self.host}]" if ":" in self.host else self.host
        return [own, "localhost", "127.0.0.1", "[::1]", *self.names]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

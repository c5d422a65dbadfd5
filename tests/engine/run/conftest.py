"""Fixtures: a host that uses asyncio alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.support.waiting import in_a_thread


@pytest.fixture
def run_native(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Run a coroutine function on asyncio alone; see `tests.support.native.natively`."""
    factory = None
    if request.param == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop

    def run(main: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        with asyncio.Runner(loop_factory=factory) as runner:
            return runner.run(main())

    return lambda main: in_a_thread(lambda: run(main))

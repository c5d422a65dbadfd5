"""The host's event loop: how late a tick on it is, and how fast it empties an observer's buffer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import anyio
import torch
from eventrain.engine import Observer, TrainLearner
from eventrain.events import AfterBatch

from .report import Cell

TICK = 0.001
"""Seconds."""
BACKENDS: dict[str, dict[str, Any]] = {
    "asyncio": {"backend": "asyncio"},
    "uvloop": {"backend": "asyncio", "backend_options": {"use_uvloop": True}},
    "trio": {"backend": "trio"},
}


async def tick_during(
    work: Callable[[], Awaitable[object]], late: list[float], interval: float = TICK
) -> float:
    """Tick until `work` is done, and add to `late` by how many seconds each tick was late.

    Returns:
        The largest value of `late`.
    """

    async def tick() -> None:
        while True:
            due = time.perf_counter() + interval
            await anyio.sleep(interval)
            late.append(time.perf_counter() - due)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(tick)
        await work()
        tasks.cancel_scope.cancel()
    return max(late, default=0.0)


def delivery_rate(learner: TrainLearner, n: int, backend: dict[str, Any]) -> float:
    """Return how many events per second the only observer of `learner` takes from a buffer of `n`.

    Nothing else runs at the same time, so this is the most that the host can take.
    """
    (observer,) = learner.streams
    assert isinstance(observer, Observer)
    learner.training, learner.loss = True, torch.tensor(1.0)
    for learner.iter in range(n):
        learner.bus.send(AfterBatch.of(learner))
    observer.end()
    start = time.perf_counter()
    anyio.run(_deliver, observer, **backend)
    seconds = time.perf_counter() - start
    assert observer.delivered == n
    return n / seconds


async def _deliver(observer: Observer[Any]) -> None:
    errors: list[BaseException] = []
    with anyio.CancelScope() as scope:
        await observer.run(scope, errors.append)
    assert not errors


def milliseconds(values: Sequence[float], *quantiles: float) -> list[Cell]:
    """Return quantiles of seconds in milliseconds; None if there are no values.

    Example:
        >>> milliseconds([0.003, 0.001, 0.002], 0.5, 1)
        [2.0, 3.0]
    """
    if not values:
        return [None for _ in quantiles]
    ordered = sorted(values)
    return [1e3 * ordered[round(q * (len(ordered) - 1))] for q in quantiles]

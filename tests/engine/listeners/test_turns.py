"""All observers and streams of an event loop share one limit on how long they may hold it."""

from __future__ import annotations

from collections import Counter

import anyio
import anyio.lowlevel
import pytest
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.listeners import turns
from eventrain.events import BeforeFit, Event
from torch import nn

from tests.support.waiting import GUARD

EVENTS = 100
LONGEST_TURN = 6
"""Events of 1 ms that fit into a turn of 5 ms, the last of which makes it too long."""


class Clock:
    """A clock that only receivers move, by 1 ms per event."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(turns, "perf_counter", clock)
    return clock


def learners_with_events(observed: list[TrainLearner]) -> None:
    for learner in observed:
        for _ in range(EVENTS):
            learner.bus.send(BeforeFit(learner, "by hand", 0.0, "fit", 1, None))


async def deliver_all(observed: list[TrainLearner]) -> None:
    """What the tasks of the fits do at their end: empty the buffers of all observers."""
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            for learner in observed:
                for observer in learner.streams:
                    observer.end()
                    tasks.start_soon(observer.run, anyio.CancelScope(), pytest.fail)


async def count_passes(seen: list[str]) -> None:
    while True:
        seen.append("pass")
        await anyio.lowlevel.checkpoint()


async def test_ten_observers_of_two_learners_hold_the_loop_no_longer_than_one(
    clock: Clock,
) -> None:
    """G6: between two turns of another task they take 5 ms together, and each its share."""
    seen: list[str] = []
    observed = [TrainLearner(nn.Linear(1, 1), DataLoaders()) for _ in range(2)]
    counts: Counter[str] = Counter()
    spread: list[int] = []

    def receiver(name: str) -> object:
        def receive(event: Event) -> None:
            clock.now += 0.001
            seen.append(name)
            counts[name] += 1
            if max(counts.values()) < EVENTS:
                spread.append(max(counts.values()) - min(counts[n] for n in names))

        return receive

    names = [f"{i} of learner {j}" for j in range(2) for i in range(5)]
    for name in names:
        observed[int(name[-1])].observe(receiver(name), BeforeFit)
    learners_with_events(observed)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_passes, seen)
        await deliver_all(observed)
        tasks.cancel_scope.cancel()

    assert counts == dict.fromkeys(names, EVENTS)
    between = " ".join("." if entry != "pass" else "pass" for entry in seen).split("pass")
    # Trio runs the tasks of a pass in a random order: its turns may touch.
    assert max(part.count(".") for part in between) <= 2 * LONGEST_TURN
    assert max(spread) <= 2 * LONGEST_TURN


async def test_an_observer_that_awaits_something_else_does_not_keep_the_others_waiting(
    clock: Clock,
) -> None:
    """G8: the turn that it began is the loop's, not its own."""
    learner = TrainLearner(nn.Linear(1, 1), DataLoaders())
    others: list[Event] = []
    waited: list[int] = []

    async def wait(event: Event) -> None:
        while len(others) < EVENTS:
            await anyio.lowlevel.checkpoint()
        waited.append(len(others))

    def receive(event: Event) -> None:
        clock.now += 0.001
        others.append(event)

    learner.observe(wait, BeforeFit)
    learner.observe(receive, BeforeFit)
    learners_with_events([learner])
    await deliver_all([learner])
    assert waited == [EVENTS] * EVENTS


async def test_a_reader_that_is_cancelled_while_it_waits_for_its_turn_leaves_the_queue(
    clock: Clock,
) -> None:
    """G8: the others go on."""
    learner = TrainLearner(nn.Linear(1, 1), DataLoaders())
    heard: list[Event] = []

    def receive(event: Event) -> None:
        clock.now += 1
        heard.append(event)

    async def read(stream: object) -> None:
        async for event in stream:
            receive(event)
            tasks.cancel_scope.cancel()

    learner.observe(receive, BeforeFit)
    async with learner.events(BeforeFit) as stream:
        learners_with_events([learner])
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(read, stream)
        assert 0 < stream.delivered < EVENTS
    learner.streams[0].begin()
    learners_with_events([learner])
    heard.clear()
    await deliver_all([learner])
    assert len(heard) == EVENTS

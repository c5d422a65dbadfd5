"""The journal: numbered messages, bounded, that any number of clients follow at their own pace."""

from __future__ import annotations

import json
import threading

import anyio
import anyio.lowlevel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.service.journal import Journal, Message
from tests.support.waiting import GUARD


def record(number: int) -> dict[str, object]:
    return {"event": "batch", "number": number}


async def read(journal: Journal, last: int = 0) -> list[int]:
    """The numbers of the messages; those missed, negative."""
    seen = []
    async for message in journal.follow(last):
        if isinstance(message, Message):
            assert message == (message.id, "batch", json.dumps(record(message.id)))
            seen.append(message.id)
        else:
            seen.append(-message)
    return seen


async def test_followers_get_old_and_new_messages_each_at_its_own_pace() -> None:
    journal = Journal(100)
    results: dict[str, list[int]] = {}

    async def follow(name: str, last: int) -> None:
        results[name] = await read(journal, last)

    with anyio.fail_after(GUARD):
        journal.append(record(1))
        journal.append(record(2))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow, "from the start", 0)
            tasks.start_soon(follow, "from the second", 1)
            await anyio.wait_all_tasks_blocked()
            journal.append(record(3))
            await anyio.wait_all_tasks_blocked()
            tasks.start_soon(follow, "late", 0)
            journal.append(record(4))
            journal.end()
    assert results == {
        "from the start": [1, 2, 3, 4],
        "from the second": [2, 3, 4],
        "late": [1, 2, 3, 4],
    }


async def test_a_late_follower_learns_how_many_messages_it_missed() -> None:
    journal = Journal(3)
    for number in range(1, 11):
        journal.append(record(number))
    journal.end()
    assert await read(journal) == [-7, 8, 9, 10]
    assert await read(journal, 5) == [-2, 8, 9, 10]
    assert await read(journal, 9) == [10]
    assert await read(journal, 10) == []


async def test_messages_from_a_thread_are_numbered_in_their_order() -> None:
    journal = Journal(100)

    def append() -> None:
        for number in range(1, 11):
            journal.append(record(number))

    with anyio.fail_after(GUARD):
        thread = threading.Thread(target=append)
        thread.start()
        while thread.is_alive():
            await anyio.sleep(0.001)
        journal.end()
        assert await read(journal) == list(range(1, 11))


@settings(max_examples=60)
@given(
    size=st.integers(1, 8),
    steps=st.lists(st.sampled_from(["append", "turn", "read"]), max_size=200),
    last=st.integers(0, 5),
)
@pytest.mark.parametrize("anyio_backend", ["asyncio"], ids=["asyncio"])
def test_read_and_missed_together_are_all_there_were(
    anyio_backend: str, size: int, steps: list[str], last: int
) -> None:
    """However appends and a slow reader's turns fall: nothing twice, in order, none untold."""

    async def main() -> None:
        journal = Journal(size)
        for number in range(1, last + 1):
            journal.append(record(number))
        got: list[int] = []
        stream = journal.follow(last)
        for step in [*steps, "end"]:
            if step == "append":
                journal.append(record(journal.last + 1))
            elif step == "turn":
                await anyio.lowlevel.checkpoint()
            elif step == "read" and (sum(1 if n > 0 else -n for n in got) + last < journal.last):
                message = await anext(stream)
                got.append(message.id if isinstance(message, Message) else -message)
        journal.end()
        got += [m.id if isinstance(m, Message) else -m async for m in stream]

        at = last
        for number in got:
            at = at + 1 if number > 0 else at - number
            assert number < 0 or number == at
        assert at == journal.last

    anyio.run(main, backend=anyio_backend)

"""Reading a checkpoint does not block the host, and can be cancelled."""

from __future__ import annotations

import threading
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import (
    CheckpointCB,
)

from tests.support.resuming import (
    EPOCHS,
    KINDS,
    assert_same,
    disturb,
    interrupt,
    make_learner,
    outcome,
    traces,
)
from tests.support.waiting import GUARD


async def test_on_every_backend_it_is_the_undisturbed_fit(tmp_path: Path) -> None:
    make = KINDS["all-at-once"]
    disturb(0)
    learner = make()
    expected = outcome(learner, await learner.fit(EPOCHS))
    disturb(0)
    learner = make()
    interrupt(learner, 4, "graceful")
    with anyio.fail_after(GUARD):
        await learner.fit(EPOCHS, cbs=CheckpointCB(tmp_path))
        disturb(9)
        learner = make()
        result = await learner.fit(EPOCHS, cbs=CheckpointCB(tmp_path), resume="last")
    assert_same(outcome(learner, result), expected)


class Gate:
    """`torch.load` that waits until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._load = torch.load
        monkeypatch.setattr(torch, "load", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        assert self.open.wait(GUARD)
        return self._load(*args, **kwargs)


async def test_the_host_goes_on_while_a_checkpoint_is_read(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    learner = make_learner()

    async def host() -> None:
        while not gate.reached.is_set():
            await anyio.sleep(0.001)
        gate.open.set()

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(host)
            result = await learner.fit(2, resume=done)
    assert result.epochs == 2


async def test_cancelled_while_a_checkpoint_is_read_nothing_is_changed(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    learner = make_learner()
    before = traces(learner)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(learner.fit, 2, resume=done))
            while not gate.reached.is_set():
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                while not learner.stopping:  # until the fit has heard of it
                    await anyio.sleep(0.001)
            gate.open.set()
    assert learner.result is not None
    assert (learner.result.status, learner.result.who) == ("cancelled", "host")
    assert learner.result.batches == 0
    assert_same(traces(learner), before)

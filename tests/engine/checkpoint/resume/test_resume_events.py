"""Receivers and observers get the events of what is still to do."""

from __future__ import annotations

import json
import threading
from collections import Counter
from io import StringIO
from pathlib import Path
from typing import Any

from eventrain.callbacks import (
    CheckpointCB,
    ProgressCB,
    StructlogCB,
)
from eventrain.engine import (
    Checkpoint,
    Position,
)
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CleanupEpoch,
    record_events,
)
from rich.console import Console

from tests.support.resuming import EPOCH, EPOCHS, interrupt, make_learner


def test_the_events_are_those_of_what_is_still_to_do(in_the_middle: Path) -> None:
    learner = make_learner()
    with record_events(learner) as events:
        learner.run(1, resume=in_the_middle)
    heard = [
        (type(event).__name__, getattr(event, "epoch", None), getattr(event, "iter", None))
        for event in events
        if not event.hook.startswith(("after_", "before_step", "cleanup_step"))
    ]
    batches = [("BeforeBatch", 0, i) for i in (3, 4)], [("BeforeBatch", 0, i) for i in (0, 1)]
    assert heard == [
        ("BeforeFit", None, None),
        *(
            line
            for part in batches
            for line in (
                ("BeforeEpoch", 0, None),
                *((name, *place) for _, *place in part for name in ("BeforeBatch", "CleanupBatch")),
                ("CleanupEpoch", 0, None),
            )
        ),
        ("CleanupFit", None, None),
    ]
    seen = [event.n_samples for event in events if isinstance(event, AfterBatch)]
    assert seen == [64, 72, 20, 40]


def test_between_training_and_validation_only_that_is_to_come(tmp_path: Path) -> None:
    learner = make_learner()
    learner.subscribe(AfterEpoch, lambda _: learner.stop(graceful=True), once=True)
    learner.run(1, cbs=CheckpointCB(tmp_path))
    assert Checkpoint.load(tmp_path).position == Position(0, training=False)
    resumed = make_learner()
    with record_events(resumed) as events:
        resumed.run(1, resume=tmp_path)
    assert Counter(events.names)["BeforeEpoch"] == 1
    assert {event.training for event in events if isinstance(event, CleanupEpoch)} == {False}


class Loads(Callback):
    """Counts batches, by itself and over all fits; notes what it heard and when it loaded."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.n = 0

    def before_fit(self, event: BeforeFit) -> None:
        self.heard.append("before_fit")
        self.n = -100

    def before_epoch(self, event: BeforeEpoch) -> None:
        self.heard.append("before_epoch")
        self.n = -200 if event.epoch == 0 and event.training else self.n

    def before_batch(self, event: BeforeBatch) -> None:
        self.heard.append(f"batch {event.iter}")
        self.n += 1

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard.append(f"load {threading.current_thread().name.partition('-')[0]}")
        self.n = state["n"]


def test_what_is_loaded_has_the_last_word(tmp_path: Path) -> None:
    """In the middle of an epoch it is loaded after `before_epoch`; in the training thread."""
    learner = make_learner(Loads())
    interrupt(learner, 3, "graceful")
    learner.run(1, cbs=CheckpointCB(tmp_path))
    cb = Loads()
    make_learner(cb).run(1, resume=tmp_path)
    assert cb.heard[:4] == ["before_fit", "before_epoch", "load eventrain", "batch 3"]
    assert cb.n == -200 + EPOCH


def test_between_two_epochs_it_is_loaded_before_the_next_one_begins(tmp_path: Path) -> None:
    make_learner(Loads()).run(1, cbs=CheckpointCB(tmp_path))
    cb = Loads()
    make_learner(cb).run(2, resume=tmp_path)
    assert cb.heard[:4] == ["before_fit", "load eventrain", "before_epoch", "batch 0"]
    assert cb.n == -200 + 2 * EPOCH


def test_observers_hear_what_receivers_hear(in_the_middle: Path, backend: dict[str, Any]) -> None:
    learner = make_learner()
    observed: list[Any] = []
    learner.observe(observed.append)
    with record_events(learner) as events:
        learner.run(EPOCHS, resume=in_the_middle, **backend)
    assert observed == events
    assert {event.run_id for event in observed} == {
        Checkpoint.load(in_the_middle).manifest["run_id"]
    }


def test_those_who_show_a_fit_show_a_resumed_one(in_the_middle: Path) -> None:
    screen, log = StringIO(), StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    learner = make_learner(ProgressCB(console), StructlogCB(every=1, format="json", file=log))
    result = learner.run(EPOCHS, resume=in_the_middle)
    assert "completed" in screen.getvalue()
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert {line["run_id"] for line in lines} == {result.run_id}
    assert [line["iter"] for line in lines if line["event"] == "batch"] == [3, 4, 0, 1, 2, 3, 4]
    epochs = [(line["epoch"], line["phase"]) for line in lines if line["event"] == "epoch"]
    assert epochs == [(0, "train"), (0, "valid"), (1, "train"), (1, "valid")]
    assert lines[-1]["event"] == "fit_ended"

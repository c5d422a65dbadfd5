"""CheckpointCB: when it saves, what it keeps, and what it costs the training."""

from __future__ import annotations

import errno
import gc
import itertools
import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import CheckpointCB, MetricsCB
from eventrain.engine import Checkpoint, DataLoaders, TrainLearner
from eventrain.engine.checkpoint import folder as checkpoint_folder
from eventrain.engine.checkpoint.snapshot import Snapshot
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    Event,
)
from structlog.testing import capture_logs
from torch import nn

GUARD = 20
"""Seconds after which something has hung."""

MakeModel = Callable[[], nn.Module]
Place = tuple[int, bool, int]


@pytest.fixture(autouse=True)
def _fit_for_the_test() -> Iterator[None]:
    """No thread outlives a fit."""
    yield
    assert writers() == []


def writers() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("eventrain")]


@pytest.fixture
def learner(dls: DataLoaders, make_model: MakeModel) -> TrainLearner:
    """Three training batches and two for validation an epoch."""
    return TrainLearner(make_model(), dls, lr=0.05, cbs=MetricsCB())


def saved(folder: Path) -> list[Place]:
    """Where what is there was saved, the last one last."""
    return [place_of(path) for path in sorted(folder.glob("checkpoint-*"))]


def place_of(path: Path) -> Place:
    position = Checkpoint.load(path).position
    return position.epoch, position.training, position.batches


def leave(
    learner: TrainLearner,
    event_type: type[Any],
    error: type[BaseException],
    training: bool = True,
    **where: int,
) -> None:
    """Have `error` raised there, by a receiver."""

    def here(event: Any) -> bool:
        same = all(getattr(event, name) == value for name, value in where.items())
        return event.training is training and same

    @learner.on(event_type, where=here)
    def out(event: Any) -> None:
        raise error("out")


# ------------------------------------------------------------------------------- when it saves


@pytest.mark.parametrize(
    ("when", "places"),
    [
        ({}, [(1, True, 0), (2, True, 0), (3, True, 0)]),
        ({"every_epochs": 1}, [(1, True, 0), (2, True, 0), (3, True, 0)]),
        ({"every_epochs": 2}, [(2, True, 0), (3, True, 0)]),
        ({"every_epochs": 9}, [(3, True, 0)]),
        ({"every_batches": 4}, [(1, True, 1), (2, True, 2), (3, True, 0)]),
        ({"every_batches": 3}, [(0, True, 3), (1, True, 3), (2, True, 3), (3, True, 0)]),
        ({"every_batches": 99}, [(3, True, 0)]),
        ({"every_seconds": 1000.0}, [(3, True, 0)]),
        ({"every_seconds": 1000}, [(3, True, 0)]),
        (
            {"every_epochs": 2, "every_batches": 4},
            [(1, True, 1), (2, True, 0), (2, True, 2), (3, True, 0)],
        ),
    ],
)
@pytest.mark.parametrize("background", [True, False])
def test_it_saves_when_it_is_to_and_at_the_end(
    when: dict[str, Any],
    places: list[Place],
    background: bool,
    learner: TrainLearner,
    tmp_path: Path,
) -> None:
    learner.run(3, cbs=CheckpointCB(tmp_path, **when, keep_last=None, background=background))
    assert saved(tmp_path) == places


def test_by_the_clock_it_saves_after_any_batch(learner: TrainLearner, tmp_path: Path) -> None:
    learner.run(1, cbs=CheckpointCB(tmp_path, every_seconds=1e-9, keep_last=None))
    assert saved(tmp_path) == [
        *((0, True, n) for n in (1, 2, 3)),
        *((0, False, n) for n in (1, 2)),
        (1, True, 0),
    ]


def test_the_clock_begins_anew_with_every_save(learner: TrainLearner, tmp_path: Path) -> None:
    cb = CheckpointCB(tmp_path, every_seconds=1000.0, every_batches=2, keep_last=None)
    dues = []
    learner.subscribe(AfterBatch, lambda event: dues.append(cb._due))
    learner.run(1, cbs=cb)
    assert [later > earlier for earlier, later in itertools.pairwise(dues)] == [
        False,
        True,
        False,
        False,
    ]


def test_without_validation_an_epoch_is_over_when_it_is_trained(
    learner: TrainLearner, tmp_path: Path
) -> None:
    learner.run(2, valid=False, cbs=CheckpointCB(tmp_path))
    assert saved(tmp_path) == [(1, True, 0), (2, True, 0)]


@pytest.mark.parametrize("background", [True, False])
def test_a_graceful_stop_is_saved_where_it_is(
    background: bool, learner: TrainLearner, tmp_path: Path
) -> None:
    cb = CheckpointCB(tmp_path, every_epochs=9, background=background)
    at = (1, True, 1), (1, False, 0)
    for epoch, training, i in at:
        here = partial(
            lambda place, e: (e.epoch, e.training, e.iter) == place, (epoch, training, i)
        )
        with learner.subscribe(
            BeforeBatch, lambda _: learner.stop("fit", "enough", graceful=True), where=here
        ):
            result = learner.run(3, cbs=cb)
        assert (result.status, result.who, result.reason) == ("cancelled", "Learner.stop", "enough")
        assert cb.last is not None
        assert place_of(cb.last) == (epoch, training, i + 1)
        assert result.batches == epoch * 3 + (i + 1 if training else 3)


def test_a_graceful_stop_where_it_has_just_saved_saves_once(
    learner: TrainLearner, tmp_path: Path
) -> None:
    learner.subscribe(BeforeBatch, lambda _: learner.stop(graceful=True), once=True)
    learner.run(3, cbs=CheckpointCB(tmp_path, every_batches=1))
    assert saved(tmp_path) == [(0, True, 1)]


def test_of_an_epoch_that_is_stopped_gracefully_both_ends_are_saved(
    learner: TrainLearner, tmp_path: Path
) -> None:
    learner.subscribe(BeforeBatch, lambda _: learner.stop("epoch", graceful=True), once=True)
    result = learner.run(1, cbs=CheckpointCB(tmp_path))
    assert saved(tmp_path) == [(0, True, 1), (1, True, 0)]
    assert (result.status, result.batches, result.valid_batches) == ("completed", 1, 2)


def test_a_plain_stop_saves_nothing_more(learner: TrainLearner, tmp_path: Path) -> None:
    learner.subscribe(BeforeBatch, lambda _: learner.stop(), where=lambda e: e.iter == 2)
    learner.run(3, cbs=CheckpointCB(tmp_path, every_batches=2))
    assert saved(tmp_path) == [(0, True, 2)]


def test_batches_that_were_cancelled_do_not_count(learner: TrainLearner, tmp_path: Path) -> None:
    leave(learner, BeforeBatch, CancelBatchException, iter=1)
    learner.run(3, cbs=CheckpointCB(tmp_path, every_batches=2, keep_last=None))
    assert saved(tmp_path) == [(0, True, 3), (1, True, 3), (2, True, 3), (3, True, 0)]


@pytest.mark.parametrize("event_type", [BeforeEpoch, BeforeBatch, AfterEpoch])
@pytest.mark.parametrize("training", [True, False])
def test_an_epoch_that_was_cancelled_is_over_too(
    event_type: type[Event], training: bool, learner: TrainLearner, tmp_path: Path
) -> None:
    """A callback that validates every tenth epoch, say, cancels the others."""
    leave(learner, event_type, CancelEpochException, training)
    learner.run(2, cbs=CheckpointCB(tmp_path))
    assert saved(tmp_path) == [(1, True, 0), (2, True, 0)]


@pytest.mark.parametrize("event_type", [BeforeEpoch, BeforeBatch, AfterEpoch])
def test_a_fit_that_is_cancelled_has_not_ended_the_epoch(
    event_type: type[Event], learner: TrainLearner, tmp_path: Path
) -> None:
    leave(learner, event_type, CancelFitException, training=False, epoch=1)
    learner.run(3, cbs=CheckpointCB(tmp_path))
    assert saved(tmp_path) == [(1, True, 0)]


@pytest.mark.parametrize("event_type", [BeforeBatch, AfterBatch, CleanupBatch])
def test_a_fit_that_fails_keeps_what_was_saved_before(
    event_type: type[Event], learner: TrainLearner, tmp_path: Path
) -> None:
    leave(learner, event_type, ZeroDivisionError, epoch=1, iter=0)
    cb = CheckpointCB(tmp_path)
    with pytest.raises(ZeroDivisionError):
        learner.run(3, cbs=cb)
    assert saved(tmp_path) == [(1, True, 0)]
    assert cb.last == tmp_path / "checkpoint-000001"


def test_a_callback_that_ends_the_fit_with_an_epoch_has_it_saved(
    learner: TrainLearner, tmp_path: Path
) -> None:
    """As EarlyStoppingCB does, in its `cleanup_epoch`."""
    leave(learner, CleanupEpoch, CancelFitException, training=False, epoch=1)
    learner.run(3, cbs=CheckpointCB(tmp_path))
    assert saved(tmp_path) == [(1, True, 0), (2, True, 0)]


async def test_what_is_no_run_is_not_saved(
    dls: DataLoaders, make_model: MakeModel, tmp_path: Path
) -> None:
    cb = CheckpointCB(tmp_path / "new", every_batches=1)
    learner = TrainLearner(make_model(), dls, cbs=cb)
    await learner.validate()
    await learner.get_preds()
    await learner.lr_find(max_epochs=2)
    await learner.fit(0)
    await learner.fit(2, train=False)
    assert saved(tmp_path / "new") == []
    assert cb.last is None


def test_a_resumed_fit_saves_where_the_undisturbed_one_would(
    dls: DataLoaders, make_model: MakeModel, tmp_path: Path
) -> None:
    def run(folder: Path, resume: str | None = None, stop: bool = False) -> None:
        learner = TrainLearner(make_model(), dls)
        if stop:
            learner.subscribe(
                BeforeBatch,
                lambda event: learner.stop(graceful=True),
                where=lambda event: event.epoch == 1,
            )
        learner.run(3, cbs=CheckpointCB(folder, every_batches=2, keep_last=None), resume=resume)

    run(tmp_path / "whole")
    run(tmp_path / "parts", stop=True)
    assert saved(tmp_path / "parts") == [(0, True, 2), (1, True, 1)]
    run(tmp_path / "parts", "last")
    assert saved(tmp_path / "parts") == saved(tmp_path / "whole")


# ------------------------------------------------------------------------------- what it keeps


@pytest.mark.parametrize(("keep_last", "kept"), [(1, [4]), (2, [3, 4]), (None, [1, 2, 3, 4])])
def test_the_last_ones_are_kept(
    keep_last: int | None, kept: list[int], learner: TrainLearner, tmp_path: Path
) -> None:
    cb = CheckpointCB(tmp_path, keep_last=keep_last)
    learner.run(4, cbs=cb)
    assert [epoch for epoch, _, _ in saved(tmp_path)] == kept
    assert cb.last == tmp_path / "checkpoint-000004"
    assert cb.best is None


def scored(learner: TrainLearner, scores: list[float | None], training: bool = False) -> None:
    """Each epoch gets the next number."""

    @learner.on(AfterEpoch, where=lambda event: event.training is training)
    def score(event: AfterEpoch) -> None:
        if (number := scores[event.epoch]) is not None:
            learner.record["score"] = number


@pytest.mark.parametrize(
    ("mode", "scores", "best"),
    [
        ("min", [3.0, 1.0, 2.0, 4.0], 2),
        ("max", [3.0, 5.0, 2.0, 4.0], 2),
        ("max", [3, 5, 2, 4], 2),
        ("min", [1.0, 1.0, 1.0, 1.0], 1),  # the first of equals
        ("min", [math.nan, 2.0, 3.0, math.nan], 2),
        ("min", [-math.inf, 2.0, 3.0, 4.0], 2),  # what is not finite is no number to be best
        ("max", [1.0, 2.0, 3.0, 4.0], 4),
    ],
)
def test_the_best_one_is_kept_too(
    mode: Any, scores: list[Any], best: int, learner: TrainLearner, tmp_path: Path
) -> None:
    scored(learner, scores)
    cb = CheckpointCB(tmp_path, keep_last=1, keep_best=("score", mode))
    learner.run(4, cbs=cb)
    assert cb.best == tmp_path / f"checkpoint-00000{best}"
    assert cb.last == tmp_path / "checkpoint-000004"
    assert [epoch for epoch, _, _ in saved(tmp_path)] == sorted({best, 4})


def test_where_no_number_is_finite_there_is_no_best(learner: TrainLearner, tmp_path: Path) -> None:
    scored(learner, [math.nan, math.inf])
    cb = CheckpointCB(tmp_path, keep_best=("score", "min"))
    learner.run(2, cbs=cb)
    assert cb.best is None


def test_without_validation_the_best_is_that_of_training(
    learner: TrainLearner, tmp_path: Path
) -> None:
    scored(learner, [1.0, 2.0, 3.0], training=True)
    cb = CheckpointCB(tmp_path, keep_last=1, keep_best=("score", "min"))
    learner.run(3, valid=False, cbs=cb)
    assert [epoch for epoch, _, _ in saved(tmp_path)] == [1, 3]


def test_of_those_saved_in_an_epoch_none_is_the_best(learner: TrainLearner, tmp_path: Path) -> None:
    scored(learner, [1.0, 2.0])
    cb = CheckpointCB(tmp_path, 1, every_batches=1, keep_last=1, keep_best=("score", "min"))
    learner.run(2, cbs=cb)
    assert saved(tmp_path) == [(1, True, 0), (2, True, 0)]


def test_an_epoch_that_was_cancelled_is_not_the_best(learner: TrainLearner, tmp_path: Path) -> None:
    leave(learner, AfterEpoch, CancelEpochException, training=False, epoch=0)
    scored(learner, [1.0, 2.0])
    cb = CheckpointCB(tmp_path, keep_best=("score", "min"))
    learner.run(2, cbs=cb)
    assert saved(tmp_path) == [(1, True, 0), (2, True, 0)]
    assert cb.best == tmp_path / "checkpoint-000002"


def test_the_best_one_stays_the_best_of_a_resumed_run(
    dls: DataLoaders, make_model: MakeModel, tmp_path: Path
) -> None:
    for n_epochs in (2, 4):
        learner = TrainLearner(make_model(), dls)
        scored(learner, [1.0, 2.0, 3.0, 4.0])
        cb = CheckpointCB(tmp_path, keep_last=1, keep_best=("score", "min"))
        learner.run(n_epochs, cbs=cb, resume="last")
        assert cb.best == tmp_path / "checkpoint-000001"
    assert [epoch for epoch, _, _ in saved(tmp_path)] == [1, 4]


@pytest.mark.parametrize("scores", [[None, 1.0], [1.0, None]])
def test_a_number_that_is_not_there_is_named(
    scores: list[float | None], learner: TrainLearner, tmp_path: Path
) -> None:
    scored(learner, scores)
    told = r"keep_best=\('score', 'max'\): the epoch has no metric 'score'; it has loss"
    with pytest.raises(ValueError, match=told):
        learner.run(2, cbs=CheckpointCB(tmp_path, keep_best=("score", "max")))
    assert saved(tmp_path) != []  # what was trained is not lost by it


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        *(
            ({name: value}, f"^{name}=.*: give a positive number, or None$")
            for name in ("every_epochs", "every_batches", "keep_last")
            for value in (0, -1, 1.5, True, "3", math.nan)
        ),
        *(
            ({"every_seconds": value}, "^every_seconds=.*: give a positive number, or None$")
            for value in (0, -1.0, math.nan, math.inf, True, "3")
        ),
        *(
            ({"keep_best": value}, "^keep_best=.*: give a pair, such as")
            for value in ("loss", ("loss",), ("loss", "min", 1), {"loss": "min"}, 3)
        ),
        ({"keep_best": ("loss", "best")}, r"^keep_best=\('loss', 'best'\): .* 'min' or 'max'$"),
        ({"keep_best": (1, "min")}, r"^keep_best=\(1, 'min'\): the first must be the name"),
        (
            {"keep_best": ("loss", "min"), "every_batches": 3},
            "^keep_best needs checkpoints of whole epochs: add every_epochs$",
        ),
    ],
)
def test_a_bad_argument_is_named(arguments: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        CheckpointCB(tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_a_list_is_as_good_a_pair(tmp_path: Path) -> None:
    """As a configuration file has it."""
    assert CheckpointCB(tmp_path, keep_best=["loss", "min"]).keep_best == [  # type: ignore[arg-type]
        "loss",
        "min",
    ]


# ------------------------------------------------------------------------- several fits, one folder


def test_several_fits_with_one_callback_leave_each_other_alone(
    learner: TrainLearner, tmp_path: Path
) -> None:
    cb = CheckpointCB(tmp_path, keep_last=1)
    last = []
    for n_epochs in (2, 1, 3):
        learner.run(n_epochs, cbs=cb)
        last.append(cb.last)
    assert saved(tmp_path) == [(2, True, 0), (1, True, 0), (3, True, 0)]
    assert last == sorted(tmp_path.iterdir())


def test_a_fit_that_saves_nothing_has_no_last_one(learner: TrainLearner, tmp_path: Path) -> None:
    cb = CheckpointCB(tmp_path)
    learner.run(1, cbs=cb)
    assert cb.last is not None
    leave(learner, BeforeBatch, CancelFitException)
    learner.run(1, cbs=cb)
    assert cb.last is None


@pytest.mark.parametrize("shared", [False, True])
async def test_two_fits_at_once_do_not_write_into_one_folder(
    shared: bool, dls: DataLoaders, make_model: MakeModel, tmp_path: Path
) -> None:
    """Not even with one callback for both; and the first does not suffer from the second."""
    first, second = (TrainLearner(make_model(), dls) for _ in range(2))
    cb = CheckpointCB(tmp_path, every_batches=1, keep_last=None)
    other = cb if shared else CheckpointCB(tmp_path / ".")
    told = "run first is using it" if shared else "run first writes its checkpoints into"
    begun, go_on = anyio.Event(), anyio.Event()

    async def wait(event: BeforeBatch) -> None:
        begun.set()
        await go_on.wait()

    first.subscribe(BeforeBatch, wait, where=lambda event: event.iter == 1)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(first.fit, 1, cbs=cb, run_id="first"))
            await begun.wait()
            with pytest.raises(RuntimeError, match=told):
                await second.fit(1, cbs=other)
            go_on.set()
    assert saved(tmp_path) == [(0, True, 1), (0, True, 2), (0, True, 3), (1, True, 0)]
    with anyio.fail_after(GUARD):
        await second.fit(1, cbs=other)  # now it may


def test_two_callbacks_may_save_one_fit(learner: TrainLearner, tmp_path: Path) -> None:
    often = CheckpointCB(tmp_path / "often", every_batches=1, keep_last=1)
    best = CheckpointCB(tmp_path / "best", keep_last=1, keep_best=("loss", "min"))
    learner.run(2, cbs=[often, best])
    assert often.last == tmp_path / "often" / "checkpoint-000007"
    assert best.best is not None


# --------------------------------------------------------------------- what it does to the training


def digest(learner: TrainLearner) -> list[float]:
    return [x for p in learner.model.parameters() for x in p.flatten().tolist()]


@pytest.mark.parametrize("background", [True, False])
def test_saved_or_not_the_weights_are_the_same(
    background: bool, dls: DataLoaders, tmp_path: Path
) -> None:
    def run(*cbs: Callback) -> tuple[list[float], Any]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        learner = TrainLearner(model, dls, cbs=MetricsCB())
        result = learner.run(3, cbs=cbs)
        return digest(learner), (result.history, torch.rand(3).tolist())

    assert run(CheckpointCB(tmp_path, every_batches=1, background=background)) == run()


class Late(Callback):
    """Changes its state, and the model, later than most, and is attached later than it."""

    order = 1000

    def __init__(self) -> None:
        self.n = 0

    def cleanup_batch(self, event: CleanupBatch) -> None:
        self.n += 1
        with torch.no_grad():
            event.learner.model.bias += 1

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        self.n += 100

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def test_what_is_saved_is_what_all_others_have_left(learner: TrainLearner, tmp_path: Path) -> None:
    cb = CheckpointCB(tmp_path, 1, every_batches=3, keep_last=None)
    bias: list[float] = []

    @learner.on(CleanupBatch, order=1001)
    def look(event: CleanupBatch) -> None:
        bias.append(event.learner.model.bias.item())

    learner.run(1, cbs=[cb, Late()])
    states = [Checkpoint.load(path).state for path in sorted(tmp_path.iterdir())]
    assert [state["callbacks"]["Late"]["n"] for state in states] == [3, 205]
    assert [state["model"]["bias"].item() for state in states] == [bias[2], bias[4]]


class SlowDisk:
    """Writing takes until it is told to be over."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.over = threading.Event(), threading.Event()
        self.told: list[str] = []
        self._lock = threading.Lock()
        self._write = checkpoint_folder.write_checkpoint
        monkeypatch.setattr(checkpoint_folder, "write_checkpoint", self)

    def __call__(self, *args: Any) -> Path:
        assert self._lock.acquire(blocking=False)  # one after the other
        self.told.append("write begins")
        self.begun.set()
        assert self.over.wait(GUARD)
        path = self._write(*args)
        self.told.append("write ends")
        self._lock.release()
        return path

    def note(self, event: BeforeBatch) -> None:
        self.told.append(f"batch {event.iter}")


def test_the_training_goes_on_while_it_is_written(
    learner: TrainLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    weights: list[list[float]] = []
    learner.subscribe(BeforeBatch, disk.note)
    learner.subscribe(CleanupBatch, lambda _: weights.append(digest(learner)))

    @learner.on(AfterBatch, where=lambda event: not event.training)
    def later(event: AfterBatch) -> None:  # three batches after the save
        assert disk.begun.wait(GUARD)
        disk.over.set()

    learner.run(1, cbs=CheckpointCB(tmp_path, every_batches=2, keep_last=None))
    assert disk.told.index("write ends") > disk.told.index("batch 2")
    assert [told for told in disk.told if told.startswith("write")] == [
        "write begins",
        "write ends",
    ] * 2
    model = Checkpoint.load(tmp_path / "checkpoint-000001").model
    assert [*model["weight"].flatten().tolist(), *model["bias"].tolist()] == weights[1]
    assert weights[1] != weights[2]  # it was trained on meanwhile


def test_the_next_save_waits_for_the_one_before(
    learner: TrainLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    learner.subscribe(BeforeBatch, disk.note)

    def release() -> None:
        assert disk.begun.wait(GUARD)
        disk.over.set()

    thread = threading.Thread(target=release)
    thread.start()
    learner.run(1, valid=False, cbs=CheckpointCB(tmp_path, every_batches=1, keep_last=None))
    thread.join()
    assert disk.told.count("write ends") == len(saved(tmp_path)) == 4
    for n in (2, 3):  # when batch n begins, save n - 1 is done: save n could not begin before
        before = disk.told[: [*disk.told, f"batch {n}"].index(f"batch {n}")]
        assert before.count("write ends") >= n - 1


def test_not_in_the_background_the_training_waits(
    learner: TrainLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    disk.over.set()
    learner.subscribe(BeforeBatch, disk.note)
    cb = CheckpointCB(tmp_path, every_batches=1, background=False)
    threads = []
    learner.subscribe(BeforeBatch, lambda _: threads.append(writers()))
    learner.run(1, valid=False, cbs=cb)
    written = ["write begins", "write ends"]
    assert disk.told == [*(x for n in range(3) for x in (f"batch {n}", *written)), *written]
    assert {name.startswith("eventrain-checkpoint") for names in threads for name in names} == {
        False
    }


async def test_fit_returns_when_all_is_on_the_disk_even_if_it_is_cancelled(
    learner: TrainLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SlowDisk(monkeypatch)
    ended = []

    async def fit() -> None:
        try:
            await learner.fit(1000, cbs=CheckpointCB(tmp_path, every_batches=2))
        finally:
            ended.append(writers())

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fit)
            while not disk.begun.is_set():
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await anyio.sleep(0.05)
                assert ended == []  # it waits for the disk, and the host does not
                disk.over.set()
    assert ended == [[]]
    assert (0, True, 2) in saved(tmp_path)
    assert learner.result is not None
    assert learner.result.who == "host"


@pytest.mark.parametrize("background", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_what_the_disk_says_is_what_the_fit_raises(
    background: bool,
    n: int,
    learner: TrainLearner,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The n-th write fails: one of several, or the last one, of which only the end can hear."""
    write, calls = checkpoint_folder.write_checkpoint, []

    def full(*args: Any) -> Path:
        calls.append(args)
        if len(calls) == n:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    monkeypatch.setattr(checkpoint_folder, "write_checkpoint", full)
    cb = CheckpointCB(tmp_path, keep_last=None, background=background)
    with pytest.raises(OSError, match="No space left on device"):
        learner.run(3, cbs=cb)
    assert len(saved(tmp_path)) == n - 1
    assert cb.last == (tmp_path / f"checkpoint-{n - 1:06}" if n > 1 else None)
    assert learner.result is not None
    assert learner.result.status == "failed"
    assert learner.run(1, cbs=cb).status == "completed"


@pytest.mark.parametrize("background", [True, False])
def test_of_what_was_written_one_copy_is_held_and_none_after_the_fit(
    background: bool, learner: TrainLearner, tmp_path: Path
) -> None:
    gc.collect()
    before = snapshots()
    during = []
    learner.subscribe(BeforeBatch, lambda _: during.append(snapshots() - before))
    cb = CheckpointCB(tmp_path, every_batches=1, background=background)
    learner.run(2, cbs=cb)
    assert snapshots() == before
    assert cb.last is not None
    assert max(during) == 1


def snapshots() -> int:
    return sum(type(thing) is Snapshot for thing in gc.get_objects())


def test_after_a_fit_that_is_saved_no_thread_is_left(learner: TrainLearner, tmp_path: Path) -> None:
    during = []
    learner.subscribe(AfterEpoch, lambda _: during.append(writers()))
    learner.run(2, cbs=CheckpointCB(tmp_path, every_batches=1))
    assert all(any("checkpoint" in name for name in names) for names in during)
    assert writers() == []


def test_a_callback_in_front_that_fails_leaves_nothing_open(
    learner: TrainLearner, tmp_path: Path
) -> None:
    cb = CheckpointCB(tmp_path)

    def fail(event: BeforeFit) -> None:
        raise ZeroDivisionError

    for order in (0, math.inf):  # before it has begun, and after
        with learner.subscribe(BeforeFit, fail, order=order):
            with pytest.raises(ZeroDivisionError):
                learner.run(1, cbs=cb)
    learner.run(1, cbs=cb)
    assert saved(tmp_path) == [(1, True, 0)]


def test_a_folder_that_cannot_be_written_is_told_before_any_work(
    learner: TrainLearner, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        learner.run(1, cbs=CheckpointCB(tmp_path / "file"))
    assert learner.result is not None
    assert learner.result.batches == 0


def test_it_says_nothing_where_all_is_well(learner: TrainLearner, tmp_path: Path) -> None:
    with capture_logs() as logs:
        learner.run(1, cbs=CheckpointCB(tmp_path, every_batches=1))
    assert logs == []


def test_the_copy_of_before_the_fit_is_the_memory_of_the_first_save(
    learner: TrainLearner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies: list[Snapshot | None] = []
    init = Snapshot.__init__

    def noting(self: Snapshot, *args: Any, over: Snapshot | None = None, **kwargs: Any) -> None:
        init(self, *args, over=over, **kwargs)
        copies.extend([over, self])

    monkeypatch.setattr(Snapshot, "__init__", noting)
    learner.run(2, cbs=CheckpointCB(tmp_path))
    before, first, second = copies[1::2]
    assert copies[::2] == [None, before, first]
    addresses = [
        copy.value["model"]["weight"].data_ptr() for copy in (before, first, second) if copy
    ]
    assert len(addresses) == 3
    assert len(set(addresses)) == 1


FORK_DURING_A_FIT = """
import os, sys, torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch

def learner():
    return TrainLearner(torch.nn.Linear(1, 1), DataLoaders([(torch.ones(1, 1), torch.ones(1, 1))]))

def fork(event):
    if (pid := os.fork()) == 0:
        try:
            learner().run(2, valid=False, cbs=CheckpointCB(sys.argv[1]))
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7

first = learner()
first.subscribe(AfterBatch, fork, once=True)
first.run(1, valid=False, cbs=CheckpointCB(sys.argv[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here")
def test_a_process_forked_during_a_fit_may_save_into_its_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORK_DURING_A_FIT, str(tmp_path)]
    subprocess.run(command, check=True, timeout=5 * GUARD)
    assert len(list(tmp_path.iterdir())) == 3

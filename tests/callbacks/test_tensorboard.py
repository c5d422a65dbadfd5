"""TensorBoardCB: what TensorBoard reads back from the files is what the fit did."""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import CheckpointCB, TensorBoardCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    BeforeBatch,
    BeforeEpoch,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
    record_events,
)
from structlog.testing import capture_logs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard import SummaryWriter

from tests.support.reporting import recording_learner
from tests.support.waiting import GUARD

Backend = dict[str, Any]
PHASES = ("train", "valid")


def scalars(folder: Path) -> dict[str, list[Any]]:
    """(wall time, step, value) of every scalar in a run's folder, by tag."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {tag: accumulator.Scalars(tag) for tag in accumulator.Tags()["scalars"]}


def steps(folder: Path, tag: str = "batch/loss") -> list[int]:
    return [scalar.step for scalar in scalars(folder).get(tag, [])]


def single(value: Any) -> float:
    """As it is in the file: with single precision."""
    return float(torch.tensor(value, dtype=torch.float32))


def until_next_second() -> None:
    """The names of the files have the second; those of one second are read in any order."""
    began = int(time.time())
    while int(time.time()) == began:
        time.sleep(0.01)


def writer_threads() -> list[str]:
    return [
        repr(thread)
        for thread in threading.enumerate()
        if type(thread).__module__.startswith("tensorboard.")
    ]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    assert writer_threads() == []
    yield
    assert writer_threads() == []


# ------------------------------------------------------------------------------ what is written


def test_what_is_read_back_is_what_the_fit_did(
    dls: DataLoaders, tmp_path: Path, backend: Backend
) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1), accuracy=0.75)
    with record_events(learner) as events:
        result = learner.run(2, **backend)

    batches = [e for e in events if isinstance(e, AfterBatch) and e.training]
    epochs = [e for e in events if isinstance(e, CleanupEpoch)]
    read = scalars(tmp_path / result.run_id)
    assert set(read) == {
        "batch/loss",
        "batch/lr",
        "batch/samples_per_second",
        "loss/train",
        "loss/valid",
        "accuracy/train",
        "accuracy/valid",
    }
    for tag, values in (
        ("batch/loss", [e.loss.item() for e in batches]),
        ("batch/lr", [0.01] * 6),
    ):
        assert [s.step for s in read[tag]] == [0, 1, 2, 3, 4, 5]
        assert [s.value for s in read[tag]] == [single(value) for value in values]
        assert [s.wall_time for s in read[tag]] == pytest.approx(
            [e.time for e in batches], abs=2e-3
        )
    assert all(s.value > 0 for s in read["batch/samples_per_second"])
    for phase, name in (("train", "train"), ("valid", "eval")):
        ended = [e.time for e in epochs if e.training == (phase == "train")]
        rows = [row for row in result.history if row["train"] == name]
        for metric in ("loss", "accuracy"):
            scalar = read[f"{metric}/{phase}"]
            assert [s.step for s in scalar] == [0, 1]
            assert [s.value for s in scalar] == [single(row[metric]) for row in rows]
            assert [s.wall_time for s in scalar] == pytest.approx(ended, abs=2e-3)
    assert result.dropped == {}


def test_every_fit_has_a_folder_of_its_own(dls: DataLoaders, tmp_path: Path) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path / "made" / "here", every=1))
    learner.run(1, run_id="first")
    learner.run(2, train=False, run_id="second.b-1")
    folder = tmp_path / "made" / "here"
    assert sorted(os.listdir(folder)) == ["first", "second.b-1"]
    assert steps(folder / "first") == [0, 1, 2]
    assert set(scalars(folder / "second.b-1")) == {"loss/valid"}
    assert steps(folder / "second.b-1", "loss/valid") == [0, 1]


def test_a_validation_of_the_same_id_is_added_to_the_run(dls: DataLoaders, tmp_path: Path) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))
    learner.run(1, run_id="again")
    learner.run(1, train=False, run_id="again")
    assert len(os.listdir(tmp_path / "again")) == 2
    assert steps(tmp_path / "again", "loss/valid") == [0, 0]


def test_a_fit_of_the_same_id_takes_the_place_of_the_one_before(
    dls: DataLoaders, tmp_path: Path, backend: Backend
) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1), accuracy=0.5)
    learner.run(3, run_id="again", **backend)
    until_next_second()
    learner.run(2, run_id="again", **backend)
    read = scalars(tmp_path / "again")
    assert {tag: [s.step for s in found] for tag, found in read.items()} == {
        **{f"batch/{name}": [*range(6)] for name in ("loss", "lr", "samples_per_second")},
        **{f"{name}/{phase}": [0, 1] for name in ("loss", "accuracy") for phase in PHASES},
    }
    assert learner.result is not None
    rows = [row["loss"] for row in learner.result.history if row["train"] == "train"]
    assert [s.value for s in read["loss/train"]] == [single(loss) for loss in rows]


async def test_only_fits_are_written(dls: DataLoaders, tmp_path: Path) -> None:
    """Not the loss of a test set as one more point, nor the rates of `lr_find`."""
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))
    with anyio.fail_after(GUARD):
        await learner.validate()
        await learner.get_preds()
        await learner.lr_find(max_epochs=1)
        assert os.listdir(tmp_path) == []
        await learner.fit(1, run_id="fit")
        await learner.validate()
    assert os.listdir(tmp_path) == ["fit"]
    assert steps(tmp_path / "fit", "loss/valid") == [0]


# ----------------------------------------------------------------------- a run that is resumed


class Killed(BaseException):
    """As the process would end."""


@pytest.mark.parametrize("length", [4, None])
@pytest.mark.parametrize(
    ("at", "every"),
    [
        ((2, 3, True), {"every_epochs": 1}),
        ((1, 1, False), {"every_batches": 3}),
        ((3, 2, True), {"every_epochs": 2}),
    ],
    ids=["in an epoch", "in a validation", "epochs after the checkpoint"],
)
def test_a_run_that_was_killed_and_resumed_does_not_go_back_in_time(
    make_batches: Callable[..., Any],
    tmp_path: Path,
    backend: Backend,
    at: tuple[int, int, bool],
    every: dict[str, int],
    length: int | None,
) -> None:
    """Its files have what those of a run that was not killed have; and what was read since."""

    def run(name: str, **fit: Any) -> TrainLearner:
        batches = make_batches(4)
        train: Any = batches if length else Unsized(batches)
        torch.manual_seed(0)
        cbs = [TensorBoardCB(tmp_path / name, every=1), CheckpointCB(tmp_path / "saved", **every)]
        learner = recording_learner(DataLoaders(train, make_batches(2)), *cbs)

        @learner.on(BeforeBatch)
        def kill(event: BeforeBatch) -> None:
            here = (event.epoch, event.iter, event.training)
            if name == "killed" and here == at and "resume" not in fit:
                raise Killed

        learner.run(4, run_id="a", **fit, **backend)
        return learner

    with pytest.raises(BaseException):  # noqa: B017, PT011 - a Killed, perhaps in a group
        run("killed")
    before = scalars(tmp_path / "killed" / "a")
    until_next_second()
    resumed = run("killed", resume="last")
    assert resumed.result is not None
    assert resumed.result.resumed_from is not None
    shutil.rmtree(tmp_path / "saved")
    run("whole")
    whole, killed = scalars(tmp_path / "whole" / "a"), scalars(tmp_path / "killed" / "a")
    assert set(whole) == set(killed) >= {"batch/loss", "batch/lr", "loss/train", "loss/valid"}
    for tag in set(whole) - {"batch/samples_per_second"}:
        assert [(s.step, s.value) for s in killed[tag]] == [(s.step, s.value) for s in whole[tag]]
    steps_of = [s.step for s in killed["batch/samples_per_second"]]
    assert steps_of == list(range(16))
    times = [s.wall_time for s in killed["batch/loss"]]
    assert times == sorted(times)
    assert times[0] == before["batch/loss"][0].wall_time


class Unsized:
    """A loader without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


@pytest.mark.parametrize(("every", "expected"), [(0, []), (2, [1, 3, 5]), (3, [2, 5]), (4, [3])])
def test_every_is_every_how_many_training_batches(
    dls: DataLoaders, tmp_path: Path, every: int, expected: list[int]
) -> None:
    recording_learner(dls, TensorBoardCB(tmp_path, every=every)).run(2, run_id="a")
    assert steps(tmp_path / "a") == expected
    assert steps(tmp_path / "a", "loss/train") == [0, 1]


def test_numbers_that_are_not_finite_are_kept_and_what_is_no_number_is_not_written(
    dls: DataLoaders, tmp_path: Path, backend: Backend
) -> None:
    recorded = {
        "nan": math.nan,
        "up": math.inf,
        "down": -math.inf,
        "a.b": torch.tensor(math.nan),
        "count": 7,
        "large": 1e300,
        "huge": 10**400,
        "flag": True,
        "none": None,
        "text": "a",
        "list": [1.0, math.nan],
        "half \ud800": 1.0,
    }
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1), **recorded)
    with torch.no_grad():
        learner.model.weight.fill_(math.nan)
    learner.run(1, run_id="a", **backend)
    read = {tag: [repr(s.value) for s in found] for tag, found in scalars(tmp_path / "a").items()}
    valid = {tag: values for tag, values in read.items() if tag.endswith("/valid")}
    assert valid == {
        "loss/valid": ["nan"],
        "nan/valid": ["nan"],
        "up/valid": ["inf"],
        "down/valid": ["-inf"],
        "a.b/valid": ["nan"],
        "count/valid": ["7.0"],
        "large/valid": ["inf"],
        "half \\ud800/valid": ["1.0"],
    }
    assert read["batch/loss"] == ["nan"] * 3


# ------------------------------------------------------------------------------------ the steps


class Generated:
    """A loader without a length, or of another one every epoch."""

    def __init__(self, batches: list[Any], *lengths: int) -> None:
        self.batches = batches
        self.lengths = iter(lengths)

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches[: next(self.lengths)]


class Sized(Generated):
    """The same, with a length."""

    def __init__(self, batches: list[Any], *lengths: int) -> None:
        super().__init__(batches, *lengths)
        self.length = iter(lengths)

    def __len__(self) -> int:
        return next(self.length)


def test_without_a_length_all_batches_are_counted_also_those_not_written(
    make_batches: Callable[..., Any], tmp_path: Path, backend: Backend
) -> None:
    learner = recording_learner(
        DataLoaders(Generated(make_batches(5), 5, 3, 4)), TensorBoardCB(tmp_path, every=2)
    )
    learner.run(3, valid=False, run_id="a", **backend)
    assert steps(tmp_path / "a") == [1, 3, 5, 7, 9, 11]


def test_an_epoch_cut_short_leaves_a_gap_and_the_next_begins_where_it_always_does(
    dls: DataLoaders, tmp_path: Path
) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))

    @learner.on(BeforeBatch, where=lambda event: event.epoch == 0 and event.iter == 1)
    def cancel(event: BeforeBatch) -> None:
        raise CancelEpochException("enough of this one")

    learner.run(2, valid=False, run_id="a")
    assert steps(tmp_path / "a") == [0, 3, 4, 5]


def test_steps_never_go_back_when_a_loader_gets_shorter(
    make_batches: Callable[..., Any], tmp_path: Path
) -> None:
    learner = recording_learner(DataLoaders(make_batches(4)), TensorBoardCB(tmp_path, every=1))

    @learner.on(BeforeEpoch, where=lambda event: event.epoch == 0)
    def shorten(event: BeforeEpoch) -> None:
        learner.dls.train = make_batches(1)

    learner.run(3, valid=False, run_id="a")
    assert steps(tmp_path / "a") == [0, 1, 2, 3, 4, 5]


def test_steps_begin_anew_with_every_fit(dls: DataLoaders, tmp_path: Path) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))
    for run_id in ("a", "b"):
        learner.run(2, valid=False, run_id=run_id)
        assert steps(tmp_path / run_id) == [0, 1, 2, 3, 4, 5]


def test_one_that_comes_in_the_middle_of_a_fit_knows_the_step(
    dls: DataLoaders, tmp_path: Path
) -> None:
    learner = recording_learner(dls)

    @learner.on(BeforeBatch, where=lambda event: event.epoch == 1 and event.iter == 1, once=True)
    def attach(event: BeforeBatch) -> None:
        learner.add_cbs(TensorBoardCB(tmp_path, every=1))

    learner.run(2, valid=False, run_id="a")
    assert steps(tmp_path / "a") == [4, 5]


# ---------------------------------------------------------------------------------- the folders


ODD_IDS = [
    "../../outside",
    "/etc/outside",
    "..",
    ".",
    ".hidden",
    "a/b",
    "a_b",
    "a\\b",
    "C:\\outside",
    "a\0b",
    "a\n",
    "a.",
    " ",
    "ü" * 300,
    "x" * 300,
    "half \ud800",
    "-rf",
]


def test_no_run_id_leaves_the_folder_or_shares_the_one_of_another(
    dls: DataLoaders, tmp_path: Path
) -> None:
    log_dir = tmp_path / "up" / "logs"
    learner = recording_learner(dls, TensorBoardCB(log_dir))
    for run_id in ODD_IDS:
        learner.run(1, train=False, run_id=run_id)
    folders = os.listdir(log_dir)
    assert len(folders) == len(ODD_IDS)
    assert all(re.fullmatch(r"[\w-]{1,89}", name, re.ASCII) for name in folders)
    assert "a_b" in folders
    assert {len(os.listdir(log_dir / name)) for name in folders} == {1}
    assert os.listdir(tmp_path) == ["up"]
    assert os.listdir(tmp_path / "up") == ["logs"]
    learner.run(1, train=False, run_id="a/b")
    assert sorted(os.listdir(log_dir)) == sorted(folders)  # the same one for the same id


# ------------------------------------------------------------------------- however the fit ends


def test_a_cancelled_fit_is_whole_on_the_disk(
    dls: DataLoaders, tmp_path: Path, backend: Backend
) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))

    @learner.on(BeforeBatch, where=lambda event: event.epoch == 1 and event.iter == 2)
    def cancel(event: BeforeBatch) -> None:
        raise CancelFitException("enough")

    learner.run(3, valid=False, run_id="a", **backend)
    assert writer_threads() == []
    assert steps(tmp_path / "a") == [0, 1, 2, 3, 4]
    assert steps(tmp_path / "a", "loss/train") == [0]


def test_a_failed_fit_is_whole_on_the_disk(
    dls: DataLoaders, tmp_path: Path, backend: Backend
) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))

    @learner.on(BeforeBatch, where=lambda event: not event.training)
    def fail(event: BeforeBatch) -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        learner.run(3, run_id="a", **backend)
    assert writer_threads() == []
    assert steps(tmp_path / "a") == [0, 1, 2]


async def test_a_fit_that_the_host_cancels_is_whole_on_the_disk(
    dls: DataLoaders, tmp_path: Path
) -> None:
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learner.on(BeforeBatch, where=lambda event: event.iter == 2)
        async def cancel(event: BeforeBatch) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await learner.fit(5, run_id="a")
    assert writer_threads() == []
    assert steps(tmp_path / "a") == [0, 1]


def test_a_folder_that_cannot_be_made_ends_the_writing_and_not_the_fit(
    dls: DataLoaders, tmp_path: Path, backend: Backend
) -> None:
    (tmp_path / "a").write_text("in the way")
    learner = recording_learner(dls, TensorBoardCB(tmp_path))
    with capture_logs() as logs:
        result = learner.run(1, run_id="a", **backend)
    assert result.status == "completed"
    (failed,) = (line for line in logs if line["event"] == "observer_failed")
    assert failed["observer"] == "TensorBoardCB.observe"
    assert "FileExistsError" in failed["error"]


def test_one_that_fails_leaves_what_it_has_written_and_no_thread(
    dls: DataLoaders, tmp_path: Path, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_scalar = SummaryWriter.add_scalar

    def break_at_the_second_epoch(self: Any, tag: str, value: float, step: int, *time: Any) -> None:
        add_scalar(self, tag, value, step, *time)
        if step == 1:
            raise OSError("no more of this")

    monkeypatch.setattr(SummaryWriter, "add_scalar", break_at_the_second_epoch)
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=0))
    with capture_logs() as logs:
        learner.run(3, valid=False, run_id="a", **backend)
        assert writer_threads() == []
    assert "no more of this" in logs[0]["error"]
    assert steps(tmp_path / "a", "loss/train") == [0, 1]


def lost(learner: TrainLearner, cb: TensorBoardCB, run_id: str) -> None:
    """A fit whose end does not reach the callback: it is detached before."""

    @learner.on(BeforeEpoch, where=lambda event: event.epoch == 1, once=True)
    async def detach(event: BeforeEpoch) -> None:
        while not writer_threads():  # the fit has reached it
            await anyio.lowlevel.checkpoint()
        learner.remove_cbs(cb)

    learner.run(2, valid=False, run_id=run_id)


def test_the_files_of_a_fit_from_which_it_was_detached_are_closed_at_its_end(
    dls: DataLoaders, tmp_path: Path
) -> None:
    cb = TensorBoardCB(tmp_path, every=1)
    learner = recording_learner(dls, cb)
    lost(learner, cb, "a")
    assert writer_threads() == []
    learner.run(1, cbs=cb, run_id="b")
    assert writer_threads() == []
    assert steps(tmp_path / "a") == steps(tmp_path / "b") == [0, 1, 2]


def test_files_that_are_closed_during_a_fit_are_opened_again(
    dls: DataLoaders, tmp_path: Path
) -> None:
    cb = TensorBoardCB(tmp_path, every=1)
    learner = recording_learner(dls, cb)

    @learner.on(BeforeEpoch, where=lambda event: event.epoch == 1, once=True)
    async def close(event: BeforeEpoch) -> None:
        while not any(fit._writer for fit in cb._fits):
            await anyio.lowlevel.checkpoint()
        cb.close()
        assert writer_threads() == []
        cb.close()

    learner.run(2, valid=False, run_id="a")
    assert writer_threads() == []
    assert steps(tmp_path / "a") == list(range(6))


async def test_files_are_made_and_closed_beside_the_event_loop(
    dls: DataLoaders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[int] = []
    make, close = EventFileWriter.__init__, EventFileWriter.close

    def spied_make(*args: Any) -> None:
        where.append(threading.get_ident())
        make(*args)

    def spied_close(writer: EventFileWriter) -> None:
        where.append(threading.get_ident())
        close(writer)

    monkeypatch.setattr(EventFileWriter, "__init__", spied_make)
    monkeypatch.setattr(EventFileWriter, "close", spied_close)
    learner = recording_learner(dls, TensorBoardCB(tmp_path, every=1))
    limiter = anyio.to_thread.current_default_thread_limiter()
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            gate = threading.Event()
            for _ in range(int(limiter.total_tokens)):  # the host's own threads are all busy
                tasks.start_soon(anyio.to_thread.run_sync, gate.wait)
            await learner.fit(1, run_id="a")
            gate.set()
    assert len(where) == 2
    assert threading.get_ident() not in where
    assert steps(tmp_path / "a") == [0, 1, 2]


# ------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("log_dir", "options", "error", "said"),
    [
        (None, {}, TypeError, "NoneType"),
        (b"logs", {}, TypeError, "path as str"),
        ("", {}, ValueError, "log_dir=''"),
        (__file__, {}, ValueError, "is not a folder"),
        ("logs", {"every": -1}, ValueError, "every=-1"),
        ("logs", {"every_seconds": -1}, ValueError, "every_seconds=-1"),
    ],
)
def test_bad_arguments_are_refused(
    log_dir: Any, options: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        TensorBoardCB(log_dir, **options)


def test_without_tensorboard_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(torch.utils, "tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'eventrain[tensorboard]'")):
        TensorBoardCB(tmp_path)

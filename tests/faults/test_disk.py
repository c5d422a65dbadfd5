"""Disks that fail, are full, are slow, and processes that end: what was saved stays whole."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import Checkpoint, DataLoaders, TrainLearner
from eventrain.engine.checkpoint.reader import checkpoints_in
from eventrain.events import AfterEpoch, BeforeBatch, Callback, CleanupFit
from structlog.testing import capture_logs
from torch import nn

from tests.faults import disk
from tests.faults.disk import Disk, die_at, make_learner, run_out_of_space, tensors_of
from tests.support.waiting import GUARD

ROOT = Path(__file__).parents[2]


def train(folder: Path, n_epochs: int, **options: Any) -> Any:
    """Train, or go on training, to the end of so many epochs; return the learner."""
    learner = make_learner()
    cb = CheckpointCB(folder, **{"keep_last": 2, **options})
    learner.run(n_epochs, valid=False, cbs=cb, resume="last")
    return learner


@pytest.fixture(scope="module")
def after_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of two epochs."""
    folder = tmp_path_factory.mktemp("two") / "checkpoints"
    train(folder, 2)
    return folder


@pytest.fixture(scope="module")
def undisturbed() -> dict[int, list[torch.Tensor]]:
    """Weights and momenta after so many epochs that nothing disturbed."""
    after = {}
    for n in (3, 4):
        learner = make_learner()
        learner.run(n, valid=False)
        after[n] = tensors_of(learner)
    return after


@pytest.fixture(scope="module")
def operations(after_two: Path, tmp_path_factory: Any) -> list[tuple[str, str]]:
    """Of a fit that saves once, and removes one: every operation on files, in order."""
    folder = shutil.copytree(after_two, tmp_path_factory.mktemp("recorded") / "checkpoints")
    with pytest.MonkeyPatch.context() as monkeypatch:
        seen = Disk(folder).insert(monkeypatch)
        train(folder, 3)
    return seen.done


def some_of(operations: list[tuple[str, str]]) -> list[int]:
    """The numbers of operations to disturb: all, but of the many writes in a row every eighth.

    All of them where EVENTRAIN_LONG is set.
    """
    every = 1 if os.environ.get("EVENTRAIN_LONG") else 8
    numbers: list[int] = []
    for _, row in groupby(range(1, len(operations) + 1), key=lambda n: operations[n - 1]):
        numbers += list(row)[::every]
    return numbers


def same(tensors: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return len(tensors) == len(others) and all(map(torch.equal, tensors, others))


def epochs_in(folder: Path) -> list[int]:
    """Of every checkpoint in a folder, all of which must be whole, the epochs that were done."""
    return [Checkpoint.load(path).position.epoch for path in checkpoints_in(folder)]


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if not path.name.startswith("checkpoint-")]


# ------------------------------------------------------------------------------------- the order


def test_data_is_on_the_disk_before_its_name_and_removed_is_last(
    operations: list[tuple[str, str]],
) -> None:
    new, old = ".unfinished-checkpoint-000003", ".unfinished-checkpoint-000001"
    state, manifest = f"{new}/state.pt", f"{new}/manifest.json"
    in_order = [operation for operation, _ in groupby(operations)]
    in_order[-3:-1] = sorted(in_order[-3:-1])  # in which order files are removed is all the same
    assert in_order == [
        ("mkdir", "."),  # before the fit: whether anything can be written
        ("mkdir", ".unfinished-probe"),
        ("open", "."),
        ("fsync", "."),
        ("rmdir", ".unfinished-probe"),
        ("mkdir", new),
        *((name, state) for name in ("create", "write", "flush", "fsync", "close")),
        *((name, manifest) for name in ("create", "write", "flush", "fsync", "close")),
        ("open", new),
        ("fsync", new),
        ("rename", new),
        ("open", "."),
        ("fsync", "."),
        ("rename", "checkpoint-000001"),  # and from here on it is not there
        ("open", old),
        *(("unlink", f"{old}/{name}") for name in ("manifest.json", "state.pt")),
        ("rmdir", old),
    ]


def test_the_names_of_new_folders_reach_the_disk_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = Disk(tmp_path).insert(monkeypatch)
    train(tmp_path / "a" / "b", 1)
    before = seen.done[: seen.done.index(("mkdir", "a/b/.unfinished-probe"))]
    assert ("mkdir", "a/b") in before
    assert {path for name, path in before if name == "fsync"} == {".", "a"}


# ------------------------------------------------------------------------- operations that fail


@pytest.mark.parametrize(
    ("number", "for_ever", "background"),
    [(errno.ENOSPC, False, True), (errno.EIO, True, False)],
    ids=["one fails, in the background", "all fail from there on"],
)
def test_whichever_operation_fails_the_fit_says_so_and_nothing_is_lost(
    tmp_path: Path,
    after_two: Path,
    undisturbed: dict[int, list[torch.Tensor]],
    operations: list[tuple[str, str]],
    number: int,
    for_ever: bool,
    background: bool,
) -> None:
    begin_of_save = operations.index(("mkdir", ".unfinished-checkpoint-000003"))
    seen: Counter[str] = Counter()
    numbers = some_of(operations)[1:]  # the first is of a folder that is there already
    for n in numbers:
        folder = shutil.copytree(after_two, tmp_path / str(n))
        learner = make_learner()
        before = [weight.clone() for weight in learner.model.state_dict().values()]
        raised = []

        def fail(count: int, name: str, path: str, n: int = n, raised: Any = raised) -> None:
            if count >= n if for_ever else not raised and count == n:
                raised.append(OSError(number, os.strerror(number), path))
                raise raised[-1]

        cb = CheckpointCB(folder, keep_last=2, background=background)
        with pytest.MonkeyPatch.context() as monkeypatch:
            failing = Disk(folder, fail).insert(monkeypatch)
            with pytest.raises(OSError, match=os.strerror(number)) as caught:
                learner.run(3, valid=False, cbs=cb, resume="last")
        where = operations[n - 1]
        assert any(caught.value is error for error in raised), where
        assert failing.done == operations[: n - 1] or not for_ever, where

        if n <= begin_of_save:
            assert learner.result.batches == 0, where
            assert same(list(learner.model.state_dict().values()), before), where
        else:
            assert same(tensors_of(learner), undisturbed[3]), where

        with capture_logs() as logs:
            epochs = epochs_in(folder)
            assert Checkpoint.load(folder).position.epoch == epochs[-1]
        assert logs == []
        # The new one is there from its renaming on, and the oldest until then at least.
        renamed = ("rename", ".unfinished-checkpoint-000003") in failing.done
        assert epochs[:1] == [1] or renamed, where
        assert [2, 3][: 1 + renamed] == epochs[-1 - renamed :], where
        seen["new one there" if renamed else "only those before"] += 1
        seen["something left over"] += bool(unfinished(folder))

        again = train(folder, 4)
        assert same(tensors_of(again), undisturbed[4]), where
        assert unfinished(folder) == [], where
        assert epochs_in(folder)[-1] == 4, where
        shutil.rmtree(folder)
    assert seen["new one there"] + seen["only those before"] == len(numbers) > 25
    print(f"{number=} {for_ever=}: {len(numbers)} operations failed: {dict(seen)}")


@pytest.mark.parametrize("when", ["while it trains", "at its end"])
def test_an_error_in_the_background_comes_out_of_the_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    number = 2 if when == "while it trains" else 3

    def fail(_count: int, name: str, path: str) -> None:
        if name == "rename" and path.endswith(str(number)):
            raise OSError(errno.EDQUOT, "over quota")

    Disk(tmp_path, fail).insert(monkeypatch)
    learner = make_learner()
    cb = CheckpointCB(tmp_path, every_batches=1)
    with pytest.raises(OSError, match="over quota") as caught:
        learner.run(1, valid=False, cbs=cb)
    assert caught.value.errno == errno.EDQUOT
    assert len(checkpoints_in(tmp_path)) == number - 1
    assert learner.result.status == "failed"


# -------------------------------------------------------------------------- processes that end


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.ForkServerContext:
    """Processes that are forks of a fresh one, where everything is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([disk.__name__])
    return context


def test_wherever_a_process_ends_the_last_or_the_new_checkpoint_is_whole(
    tmp_path: Path,
    after_two: Path,
    undisturbed: dict[int, list[torch.Tensor]],
    operations: list[tuple[str, str]],
    processes: multiprocessing.context.ForkServerContext,
) -> None:
    folders = {n: tmp_path / str(n) for n in some_of(operations)}
    for some in _chunks(list(folders.items()), 4):
        dying = []
        for n, folder in some:
            shutil.copytree(after_two, folder)
            dying.append(processes.Process(target=die_at, args=(n, folder)))
            dying[-1].start()
        for process in dying:
            process.join(60)
            assert process.exitcode == disk.DIED
    seen: Counter[str] = Counter()
    for n, folder in folders.items():
        where = operations[n - 1]
        epochs = epochs_in(folder)
        renamed = ("rename", ".unfinished-checkpoint-000003") in operations[: n - 1]
        assert epochs[-1] == (3 if renamed else 2), where
        assert Checkpoint.load(folder).position.epoch == epochs[-1]
        seen["the new one" if renamed else "the one before"] += 1
        seen["something left over"] += bool(unfinished(folder))
        again = train(folder, 4)
        assert same(tensors_of(again), undisturbed[4]), where
        assert unfinished(folder) == [], where
    assert seen["the new one"] >= 7
    assert seen["something left over"] > 20
    print(f"{len(folders)} processes ended, each in another operation: {dict(seen)}")


def _chunks(items: list[Any], n: int) -> Iterator[list[Any]]:
    for i in range(0, len(items), n):
        yield items[i : i + n]


# ------------------------------------------------------------------------- disks that are full


def test_a_file_that_may_not_grow_is_an_error_and_no_half_file(
    tmp_path: Path, processes: multiprocessing.context.ForkServerContext
) -> None:
    (tmp_path / "whole").mkdir()
    train(tmp_path / "whole", 1)
    limits = (0, 1, 500, 4096, 5_000, 6_000)
    with ProcessPoolExecutor(1, processes, max_tasks_per_child=1) as pool:
        for limit in limits:
            folder = shutil.copytree(tmp_path / "whole", tmp_path / str(limit))
            told = pool.submit(run_out_of_space, folder, limit).result(60)
            assert told.pop("epochs") in (1, 2)  # the second, where the error waited for it
            assert told == {
                "errno": errno.EFBIG,
                "whole": [1],
                "others": [],
                "as without": True,
            }


def test_a_disk_that_is_really_full_is_an_error_and_no_half_file(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=200k tmpfs {tmp_path}"
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    try:
        subprocess.run([*command, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this system lets nobody mount a small disk")
    script = f"{mount} && exec {sys.executable} -m tests.faults.disk {tmp_path}/checkpoints"
    done = subprocess.run([*command, script], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    n = len(told["whole"])
    assert n > 5
    assert told.pop("epochs") in (n + 1, n + 2)
    assert told == {
        "errno": errno.ENOSPC,
        "whole": list(range(1, n + 1)),
        "others": [],
        "as without": True,
    }
    print(f"{n} checkpoints on a disk of 200 KB, and an error instead of the next")


# ------------------------------------------------------------- folders that cannot be written


class Batches(Callback):
    def __init__(self) -> None:
        self.n = 0

    def before_batch(self, event: BeforeBatch) -> None:
        self.n += 1


@pytest.mark.parametrize("why", ["a file", "below a file", "a long name", "not allowed"])
def test_a_folder_that_cannot_be_written_is_reported_before_any_work(
    tmp_path: Path, why: str
) -> None:
    (tmp_path / "file").write_text("mine")
    if why == "not allowed":
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        (tmp_path / "closed").mkdir(mode=0o500)
    folder, error = {
        "a file": (tmp_path / "file", FileExistsError),
        "below a file": (tmp_path / "file" / "checkpoints", NotADirectoryError),
        "a long name": (tmp_path / ("x" * 300), OSError),
        "not allowed": (tmp_path / "closed", PermissionError),
    }[why]
    batches = Batches()
    with pytest.raises(error) as caught:
        make_learner().run(1, valid=False, cbs=[batches, CheckpointCB(folder)])
    assert str(folder) in str(caught.value)
    assert batches.n == 0
    assert (tmp_path / "file").read_text() == "mine"


def test_two_runs_in_one_folder_are_refused_by_name(tmp_path: Path) -> None:
    refused = []

    class Second(Callback):
        def before_batch(self, event: BeforeBatch) -> None:
            if not refused:
                again = tmp_path / "x" / ".." / "checkpoints"
                with pytest.raises(RuntimeError) as caught:
                    make_learner().run(1, valid=False, cbs=CheckpointCB(again))
                refused.append(str(caught.value))

    (tmp_path / "x").mkdir()
    folder = tmp_path / "checkpoints"
    learner = make_learner()
    learner.run(2, valid=False, cbs=[Second(), CheckpointCB(folder)], run_id="the-first")
    assert "run the-first writes its checkpoints into" in refused[0]
    assert epochs_in(folder) == [1, 2]
    train(folder, 3)  # and when it has ended, the folder is free


# ------------------------------------------------------------------------- disks that are slow


def test_training_goes_on_while_a_slow_disk_is_written_and_fit_ends_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    happened: list[str] = []
    writing, may_write = ([threading.Event() for _ in range(4)] for _ in range(2))

    def wait(_count: int, name: str, path: str) -> None:
        if name == "create" and path.endswith("state.pt"):
            i = sum("begins" in line for line in happened)
            happened.append(f"write {i} begins")
            writing[i].set()
            assert may_write[i].wait(GUARD)
        if name == "rename" and path.startswith(".unfinished"):
            happened.append(f"write {sum('done' in line for line in happened)} is done")

    class Watch(Callback):
        def meanwhile(self, what: str, i: int) -> None:
            assert writing[i].wait(GUARD)
            assert len(checkpoints_in(tmp_path)) == i
            happened.append(what)
            may_write[i].set()

        def before_batch(self, event: BeforeBatch) -> None:
            if event.iter:
                self.meanwhile(f"batch {event.iter}", event.iter - 1)

        def after_epoch(self, event: AfterEpoch) -> None:
            self.meanwhile("epoch ends", 2)

        def cleanup_fit(self, event: CleanupFit) -> None:
            self.meanwhile("fit ends", 3)

    Disk(tmp_path, wait).insert(monkeypatch)
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(disk.batches(3)))
    learner.run(1, valid=False, cbs=[Watch(), CheckpointCB(tmp_path, every_batches=1, keep_last=4)])
    assert len(checkpoints_in(tmp_path)) == 4
    assert happened == [
        "write 0 begins",
        "batch 1",
        "write 0 is done",
        "write 1 begins",
        "batch 2",
        "write 1 is done",
        "write 2 begins",
        "epoch ends",
        "write 2 is done",
        "write 3 begins",
        "fit ends",
        "write 3 is done",
    ]


def test_a_checkpoint_written_late_has_the_state_of_when_it_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on = threading.Event()

    def wait(_count: int, name: str, path: str) -> None:
        if name == "create" and "000001" in path:
            assert trained_on.wait(GUARD)

    class Watch(Callback):
        def before_batch(self, event: BeforeBatch) -> None:
            if event.iter == 2:
                trained_on.set()

    class Weights(Callback):
        def __init__(self) -> None:
            self.seen: list[torch.Tensor] = []

        def after_batch(self, event: Any) -> None:
            self.seen.append(event.learner.model.weight.detach().clone())

    Disk(tmp_path, wait).insert(monkeypatch)
    weights = Weights()
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(disk.batches(4)))
    cb = CheckpointCB(tmp_path, every_batches=2)
    learner.run(1, valid=False, cbs=[Watch(), weights, cb])
    first, second = checkpoints_in(tmp_path)[:2]
    assert torch.equal(Checkpoint.load(first).model["weight"], weights.seen[1])
    assert torch.equal(Checkpoint.load(second).model["weight"], weights.seen[3])
    assert not torch.equal(weights.seen[1], weights.seen[3])

"""Corrupted checkpoints: every change is reported, and none is trained on.

EVENTRAIN_LONG in the environment has every bit of the state flipped; otherwise it is 3,000 of them.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from eventrain.callbacks import CheckpointCB
from eventrain.engine import Checkpoint
from eventrain.engine.checkpoint.reader import (
    FORMAT,
    CheckpointDamagedError,
    CheckpointError,
    checkpoints_in,
)
from structlog.testing import capture_logs

from tests.faults.disk import make_learner
from tests.faults.forge import forge_manifest

FILES = ("manifest.json", "state.pt")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of two epochs."""
    folder = tmp_path_factory.mktemp("written")
    make_learner().run(2, valid=False, cbs=CheckpointCB(folder), run_id="whole")
    assert len(checkpoints_in(folder)) == 2
    return folder


@pytest.fixture
def folder(tmp_path: Path, written: Path) -> Path:
    return shutil.copytree(written, tmp_path / "checkpoints")


def assert_is_found_out(checkpoint: Path, name: str) -> None:
    """Loading it says that it is damaged, and where; loading from the folder takes the other."""
    with pytest.raises(CheckpointDamagedError, match=f"{checkpoint.name}/{name}"):
        Checkpoint.load(checkpoint)
    before = checkpoints_in(checkpoint.parent)[-2]
    with capture_logs() as logs:
        assert Checkpoint.load(checkpoint.parent).path == before
    (line,) = logs
    assert (line["event"], line["log_level"]) == ("checkpoint_damaged", "warning")
    assert line["path"] == str(checkpoint)
    assert name in line["error"]


class Damage:
    """Damages a file again and again, and sees that it is found out each time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.whole = path.read_bytes()
        self.found_out = 0

    def is_found_out(self) -> None:
        with pytest.raises(CheckpointDamagedError) as caught:
            Checkpoint.load(self.path.parent)
        assert str(self.path) in str(caught.value)
        self.found_out += 1

    def put(self, content: bytes) -> None:
        assert content != self.whole
        self.path.write_bytes(content)
        self.is_found_out()

    def repair(self) -> None:
        self.path.write_bytes(self.whole)
        Checkpoint.load(self.path.parent)


def test_every_flipped_bit_is_found_out(folder: Path) -> None:
    chance = random.Random(0)
    found_out = {}
    for name in FILES:
        damage = Damage(checkpoints_in(folder)[-1] / name)
        bits: range | list[int] = range(8 * len(damage.whole))
        if name == "state.pt" and not os.environ.get("EVENTRAIN_LONG"):
            bits = chance.sample(bits, 3000)
        with open(damage.path, "r+b", buffering=0) as file:
            for bit in bits:
                byte, flipped = damage.whole[bit // 8], 1 << bit % 8
                os.pwrite(file.fileno(), bytes([byte ^ flipped]), bit // 8)
                damage.is_found_out()
                os.pwrite(file.fileno(), bytes([byte]), bit // 8)
        assert damage.found_out == len(bits) >= 3000
        damage.repair()
        found_out[name] = damage.found_out
    print(f"flipped bits, all found out: {found_out}")


def test_every_file_cut_off_is_found_out(folder: Path) -> None:
    found_out = {}
    for name in FILES:
        damage = Damage(checkpoints_in(folder)[-1] / name)
        for n in reversed(range(len(damage.whole))):
            os.truncate(damage.path, n)
            damage.is_found_out()
        assert damage.found_out == len(damage.whole) > 400
        damage.repair()
        found_out[name] = damage.found_out
    print(f"files cut off, all found out: {found_out}")


def test_blocks_that_are_lost_swapped_or_added_are_found_out(folder: Path) -> None:
    found_out = 0
    for name in FILES:
        damage = Damage(checkpoints_in(folder)[-1] / name)
        whole, size = damage.whole, 128
        for begin in range(0, len(whole), size):
            head, block, tail = whole[:begin], whole[begin : begin + size], whole[begin + size :]
            changed = {
                head + bytes(len(block)) + tail,
                head + b"\xff" * len(block) + tail,
                head + tail,
                head + block + block + tail,
                head + tail[: len(block)] + block + tail[len(block) :],
                head + bytes(len(whole) - begin),
            }
            for content in changed - {whole}:
                damage.put(content)
        for more in (b"\0", b"\n", b" ", whole):
            damage.put(whole + more)
            damage.put(more + whole)
        damage.repair()
        found_out += damage.found_out
    assert found_out > 150
    print(f"lost, swapped and added blocks, all found out: {found_out}")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["flipped", "cut off", "emptied", "missing", "a folder", "a pipe"])
def test_the_one_before_is_loaded_and_the_damage_is_logged(
    folder: Path, name: str, how: str
) -> None:
    path = checkpoints_in(folder)[-1] / name
    whole = path.read_bytes()
    path.unlink()
    if how == "flipped":
        path.write_bytes(whole.replace(b"a", b"b", 1))
    elif how == "cut off":
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "emptied":
        path.touch()
    elif how == "a folder":
        path.mkdir()
    elif how == "a pipe":
        os.mkfifo(path)
    assert_is_found_out(path.parent, name)


@pytest.mark.parametrize("name", FILES)
def test_files_of_two_checkpoints_that_were_swapped_are_found_out(folder: Path, name: str) -> None:
    first, second = (path / name for path in checkpoints_in(folder))
    one, other = first.read_bytes(), second.read_bytes()
    second.write_bytes(one)
    assert_is_found_out(second.parent, "state.pt")  # a manifest is whole by itself
    first.write_bytes(other)
    for path in (first, second):
        with pytest.raises(CheckpointDamagedError, match=f"{path.parent.name}/state.pt"):
            Checkpoint.load(path.parent)


def test_a_checkpoint_that_lost_both_its_files_is_passed_over(folder: Path) -> None:
    last = checkpoints_in(folder)[-1]
    for name in FILES:
        (last / name).unlink()
    with pytest.raises(CheckpointError, match="there is no checkpoint in"):
        Checkpoint.load(last)
    with capture_logs() as logs:
        assert Checkpoint.load(folder).path == checkpoints_in(folder)[-2]
    assert [line["path"] for line in logs] == [str(last)]


def test_another_format_is_reported_with_the_versions_and_not_skipped(folder: Path) -> None:
    versions = {"eventrain": "9.1", "torch": "4.0", "python": "3.20"}
    last = checkpoints_in(folder)[-1]
    forge_manifest(last, format=FORMAT + 1, versions=versions, files=None)
    for path in (last, folder):
        with pytest.raises(
            CheckpointError,
            match=rf"format {FORMAT + 1}, but .* reads {FORMAT}: .* eventrain 9\.1",
        ) as e:
            Checkpoint.load(path)
        assert not isinstance(e.value, CheckpointDamagedError)


def test_a_fit_goes_on_from_the_last_that_is_whole(folder: Path) -> None:
    first, last = checkpoints_in(folder)
    (last / "state.pt").write_bytes(b"")
    learner = make_learner()
    with capture_logs() as logs:
        result = learner.run(3, valid=False, cbs=CheckpointCB(folder), resume="last")
    assert result.resumed_from == str(first)
    assert result.epochs == 3
    assert [line["path"] for line in logs if line["event"] == "checkpoint_damaged"] == [str(last)]
    assert Checkpoint.load(folder).position.epoch == 3


@pytest.mark.parametrize("name", FILES)
def test_where_all_are_damaged_nothing_begins_anew(folder: Path, name: str) -> None:
    for path in checkpoints_in(folder):
        (path / name).write_bytes(b"rotten")
    for resume in ("last", folder):
        learner = make_learner()
        with capture_logs() as logs:
            with pytest.raises(
                CheckpointDamagedError, match=r"all 2 checkpoints in .* are damaged"
            ):
                learner.run(3, valid=False, cbs=CheckpointCB(folder), resume=resume)
        assert learner.result.batches == 0
        assert len([line for line in logs if line["event"] == "checkpoint_damaged"]) == 2
    assert len(checkpoints_in(folder)) == 2

"""The files of a checkpoint, and which checkpoints of a folder are kept."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter, OrderedDict, deque, namedtuple
from collections.abc import Callable, Iterator
from enum import Enum, IntEnum
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import Checkpoint, DataLoaders, MomentumLearner, Position
from eventrain.engine.checkpoint.background import BackgroundWriter
from eventrain.engine.checkpoint.folder import CheckpointFolder
from eventrain.engine.checkpoint.reader import (
    CheckpointDamagedError,
    CheckpointError,
    checkpoints_in,
    read_manifest,
)
from eventrain.engine.checkpoint.snapshot import Snapshot
from eventrain.engine.checkpoint.writer import write_checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn

from tests.support.waiting import GUARD

RUN = "this-run"


def write(folder: Path, state: Any = None, run_id: str = RUN, **metrics: Any) -> Path:
    return write_checkpoint(folder, run_id, Position(1), metrics, state or {"n": 1})


def round_trip(folder: Path, value: Any) -> Any:
    """What is read of a value that was written, with `CheckpointCB`'s means."""
    path = write(folder, {"value": Snapshot(value, "value").wait()})
    return Checkpoint.load(path).state["value"]


@pytest.fixture
def folder_of(tmp_path: Path) -> Iterator[Callable[..., CheckpointFolder]]:
    """Objects for one folder, one at a time."""
    opened: list[CheckpointFolder] = []

    def make(
        keep_last: int | None = None,
        keep_best: tuple[str, str] | None = None,
        run_id: str = RUN,
    ) -> CheckpointFolder:
        for checkpoints in opened:
            checkpoints.close()
        opened[:] = [CheckpointFolder(tmp_path, run_id, keep_last, keep_best)]
        return opened[0]

    yield make
    for checkpoints in opened:
        checkpoints.close()


def put(checkpoints: CheckpointFolder, *losses: float) -> None:
    for loss in losses:
        checkpoints.put(Position(1), {"loss": loss}, {"n": 1})


def numbers(folder: Path) -> list[int]:
    """The numbers in the names of the checkpoints that are there."""
    return [int(path.name.removeprefix("checkpoint-")) for path in checkpoints_in(folder)]


# ----------------------------------------------------------------------------- what is in them


def test_a_checkpoint_is_two_files_that_say_what_they_are(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, RUN, Position(3, False, 2), {"loss": 0.5}, {"n": 1})
    assert path == tmp_path / "checkpoint-000001"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "state.pt"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["run_id"] == RUN
    assert manifest["position"] == {"epoch": 3, "training": False, "batches": 2}
    assert manifest["metrics"] == {"loss": 0.5}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["files"]["state.pt"]["size"] == (path / "state.pt").stat().st_size
    loaded = Checkpoint.load(path)
    assert loaded.position == Position(3, False, 2)
    assert loaded.state == {"n": 1}
    assert loaded.path == path


def test_the_weights_can_be_read_with_torch_alone(
    tmp_path: Path, dls: DataLoaders, make_model: Callable[[], nn.Module]
) -> None:
    learner = MomentumLearner(make_model(), dls, cbs=CheckpointCB(tmp_path))
    learner.run(1)
    state = torch.load(checkpoints_in(tmp_path)[-1] / "state.pt", weights_only=True)
    model = make_model()
    model.load_state_dict(state["model"])
    for name, weight in learner.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_of_a_folder_the_last_is_loaded_and_by_its_path_any(tmp_path: Path) -> None:
    first, second = write(tmp_path, {"n": 1}), write(tmp_path, {"n": 2})
    assert Checkpoint.load(str(tmp_path)).state == {"n": 2}
    assert Checkpoint.load(first).state == {"n": 1}
    assert Checkpoint.load(second).path == second


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "other files"])
def test_where_there_is_none_that_is_told(tmp_path: Path, there: str) -> None:
    folder = tmp_path / "checkpoints"
    if there != "nothing":
        folder.mkdir()
    if there == "other files":
        (folder / "checkpoint-1").mkdir()
        (folder / "checkpoint-000001.zip").touch()
        (folder / ".unfinished-checkpoint-000001").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no checkpoint in .*checkpoints"):
        Checkpoint.load(folder)


def test_a_file_instead_of_a_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").touch()
    with pytest.raises(CheckpointError, match=r"weights\.pt is a file"):
        Checkpoint.load(tmp_path / "weights.pt")


def test_values_that_cannot_be_read_back_are_not_written(tmp_path: Path) -> None:
    write(tmp_path)
    for value in (Path("x"), {1, 2}, np.float64(1), b"bytes", 1 << 3000, object()):
        with pytest.raises(TypeError, match="could not be read back"):
            write(tmp_path, {"value": value})
    assert numbers(tmp_path) == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


# ------------------------------------------------------------------------- which of them stay


def test_numbering_goes_on_after_the_last_that_is_there(tmp_path: Path) -> None:
    write(tmp_path).rename(tmp_path / "checkpoint-000041")
    assert write(tmp_path).name == "checkpoint-000042"


def test_numbering_goes_on_beyond_six_digits(tmp_path: Path, folder_of: Any) -> None:
    write(tmp_path).rename(tmp_path / "checkpoint-999999")
    put(folder_of(keep_last=2), 1, 1, 1)
    assert numbers(tmp_path) == [1000001, 1000002]
    assert Checkpoint.load(tmp_path).path.name == "checkpoint-1000002"


def test_the_last_ones_are_kept(tmp_path: Path, folder_of: Any) -> None:
    checkpoints = folder_of(keep_last=2)
    assert checkpoints.last is None
    put(checkpoints, 1, 2, 3, 4)
    assert numbers(tmp_path) == [3, 4]
    assert checkpoints.last == tmp_path / "checkpoint-000004"


def test_one_that_somebody_has_removed_is_removed(tmp_path: Path, folder_of: Any) -> None:
    checkpoints = folder_of(keep_last=2)
    put(checkpoints, 1, 2)
    shutil.rmtree(tmp_path / "checkpoint-000001")
    put(checkpoints, 3)
    assert numbers(tmp_path) == [2, 3]


def test_all_are_kept_without_a_number(tmp_path: Path, folder_of: Any) -> None:
    put(folder_of(keep_last=None, keep_best=("loss", "min")), 3, 1, 2)
    assert numbers(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(("mode", "losses", "best"), [
    ("min", (3, 1, 2, 4), 2),
    ("max", (3, 1, 9, 4), 3),
    ("min", (5, 5, 6, 7), 1),  # of equals the first
    ("max", (6, 7, 7, 5), 2),
    ("min", (math.nan, 2, math.nan, 3), 2),
    ("max", (math.inf, 2, -math.inf, 1), 2),  # no number that is none is the best
])  # fmt: skip
def test_the_best_is_kept_with_the_last(
    tmp_path: Path, folder_of: Any, mode: str, losses: tuple[float, ...], best: int
) -> None:
    checkpoints = folder_of(1, ("loss", mode))
    put(checkpoints, *losses)
    assert numbers(tmp_path) == [best, len(losses)]
    assert checkpoints.best == tmp_path / f"checkpoint-{best:06}"


def test_without_any_number_there_is_no_best(tmp_path: Path, folder_of: Any) -> None:
    checkpoints = folder_of(1, ("loss", "min"))
    put(checkpoints, math.nan, math.nan)
    assert checkpoints.best is None
    assert numbers(tmp_path) == [2]
    assert read_manifest(checkpoints.last)["metrics"] == {"loss": None}


def test_the_best_of_a_missing_metric_is_an_error(tmp_path: Path, folder_of: Any) -> None:
    checkpoints = folder_of(1, ("accuracy", "max"))
    with pytest.raises(ValueError, match="the epoch has no metric 'accuracy'; it has loss"):
        put(checkpoints, 1)
    assert numbers(tmp_path) == [1]


def test_one_between_epochs_has_no_number_and_is_never_the_best(
    tmp_path: Path, folder_of: Any
) -> None:
    checkpoints = folder_of(1, ("loss", "min"))
    put(checkpoints, 1)
    checkpoints.put(Position(1, True, 2), {}, {"n": 1})
    checkpoints.put(Position(1, True, 3), {}, {"n": 1})
    assert numbers(tmp_path) == [1, 3]


def test_a_resumed_run_knows_its_own(tmp_path: Path, folder_of: Any) -> None:
    put(folder_of(2, ("loss", "min")), 0, 5, 4)
    again = folder_of(2, ("loss", "min"))
    assert again.last == tmp_path / "checkpoint-000003"
    assert again.best == tmp_path / "checkpoint-000001"
    put(again, 3)
    assert numbers(tmp_path) == [1, 3, 4]


def test_checkpoints_of_other_runs_are_left_alone(tmp_path: Path, folder_of: Any) -> None:
    put(folder_of(run_id="another"), 0, 0)
    put(folder_of(1, ("loss", "min")), 2, 1, 3)
    assert numbers(tmp_path) == [1, 2, 4, 5]
    assert [read_manifest(path)["run_id"] for path in checkpoints_in(tmp_path)] == [
        "another",
        "another",
        RUN,
        RUN,
    ]


def test_damaged_checkpoints_are_reported_and_left_alone(tmp_path: Path, folder_of: Any) -> None:
    put(folder_of(run_id="another"), 0)
    put(folder_of(), 0)
    for path in checkpoints_in(tmp_path):
        (path / "manifest.json").write_bytes(b"{}")
    with capture_logs() as logs:
        checkpoints = folder_of(keep_last=1)
    assert [line["path"] for line in logs] == [str(path) for path in checkpoints_in(tmp_path)]
    assert {line["event"] for line in logs} == {"checkpoint_damaged"}
    put(checkpoints, 1, 2)
    assert numbers(tmp_path) == [1, 2, 4]


def test_what_a_run_that_died_left_is_removed_and_nothing_else(
    tmp_path: Path, folder_of: Any
) -> None:
    put(folder_of(), 0)
    half = tmp_path / ".unfinished-checkpoint-000002"
    half.mkdir()
    (half / "state.pt").write_bytes(b"half")
    (tmp_path / ".unfinished-probe").mkdir()
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden").mkdir()
    folder_of()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == [".hidden", "checkpoint-000001", "notes.txt"]


def test_a_folder_is_made_and_its_parents_too(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    CheckpointFolder(folder, RUN, None, None).close()
    assert list(folder.iterdir()) == []


def test_a_folder_is_free_again_when_a_run_has_ended_wherever_that_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    checkpoints = CheckpointFolder(Path("checkpoints"), RUN, None, None)
    with pytest.raises(RuntimeError, match=f"run {RUN} writes its checkpoints into"):
        CheckpointFolder(tmp_path / "elsewhere" / ".." / "checkpoints", "another", None, None)
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpoints.close()
    CheckpointFolder(tmp_path / "checkpoints", "another", None, None).close()


def test_background_jobs_are_done_one_after_the_other() -> None:
    writer, done, may_go_on = BackgroundWriter(background=True), [], threading.Event()

    def first() -> None:
        may_go_on.wait(GUARD)
        done.append("first")

    writer.write(first)
    assert done == []
    may_go_on.set()
    writer.write(lambda: done.append("second"))
    assert done[0] == "first"
    writer.close()
    assert done == ["first", "second"]


@pytest.mark.parametrize("background", [True, False])
def test_an_error_of_a_job_is_raised_once(background: bool) -> None:
    writer = BackgroundWriter(background)

    def fail() -> None:
        raise OSError("full")

    def write_and_wait() -> None:
        writer.write(fail)
        writer.wait()

    with pytest.raises(OSError, match="full"):
        write_and_wait()
    done: list[str] = []
    writer.write(lambda: done.append("next"))
    writer.close()
    assert done == ["next"]


# --------------------------------------------------------------------- what a state may be made of


class Colour(Enum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(("value", "read"), [
    (np.float64(0.5), 0.5),  # is a float, too
    (np.float32(0.5), 0.5),
    (np.int64(3), 3),
    (np.bool_(True), True),
    (np.str_("text"), "text"),  # is a str, too
    (np.array(2.5), 2.5),
    (Path("a/b"), "a/b"),
    (PurePosixPath("a"), "a"),
    (Colour.RED, "red"),
    (Level.HIGH, 3),
    (deque([1, 2], maxlen=2), [1, 2]),
    (Pair(1, Colour.RED), (1, "red")),
    ({"a": (1, [2.5, None, True])}, {"a": (1, [2.5, None, True])}),
    ({1: "a", (0, "b"): 2}, {1: "a", (0, "b"): 2}),
    ({Colour.RED: 1, np.int64(2): 3}, {"red": 1, 2: 3}),
    (Counter(a=2), Counter(a=2)),
    (1 + 2j, 1 + 2j),
    (-(1 << 600), -(1 << 600)),
    (math.inf, math.inf),
    ("\N{SNOWMAN} \ud800 \0", "\N{SNOWMAN} \ud800 \0"),
    (torch.bfloat16, torch.bfloat16),
    (torch.Size([2, 3]), torch.Size([2, 3])),
    (torch.device("cpu"), torch.device("cpu")),
])  # fmt: skip
def test_plain_values_come_back_plain(tmp_path: Path, value: Any, read: Any) -> None:
    back = round_trip(tmp_path, value)
    assert back == read
    assert type(back) is type(read)


@pytest.mark.parametrize("dtype", [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.int64,
    torch.uint8, torch.bool, torch.uint16, torch.float8_e4m3fn,
], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", [(2, 3), (), (0,), (2, 0, 3)], ids=str)
def test_tensors_of_any_type_come_back(
    tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    back = round_trip(tmp_path, tensor)
    assert back.dtype == dtype
    assert back.shape == tensor.shape
    assert torch.equal(back.to(torch.complex64), tensor.to(torch.complex64))


@pytest.mark.parametrize("tensor", [
    torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.randn(3, 4).t(),
    torch.randn(2, 3, 4).permute(2, 0, 1),
], ids=["channels_last", "transposed", "permuted"])  # fmt: skip
def test_how_a_tensor_lies_in_memory_is_kept(tmp_path: Path, tensor: torch.Tensor) -> None:
    back = round_trip(tmp_path, tensor)
    assert back.stride() == tensor.stride()
    assert torch.equal(back, tensor)


@pytest.mark.parametrize("tensor", [
    torch.randn(1, 4).expand(1000, 4),
    torch.randn(()).expand(3),
    torch.randn(10, 10)[::2, 1:3],
    torch.arange(6.0)[2:2],
    torch.randn(3, dtype=torch.complex64).conj(),
    torch.randn(3, dtype=torch.complex64).conj().imag,
    nn.Parameter(torch.randn(2)),
    torch.ones(2, requires_grad=True) * 2,
], ids=["expanded", "expanded number", "view", "empty view", "conj", "neg", "parameter", "of a graph"])  # fmt: skip  # noqa: E501
def test_views_and_parts_of_a_graph_come_back_as_tensors(
    tmp_path: Path, tensor: torch.Tensor
) -> None:
    back = round_trip(tmp_path, tensor)
    assert type(back) is torch.Tensor
    assert not back.requires_grad
    assert torch.equal(back, tensor)


def test_of_a_view_only_what_it_shows_is_written(tmp_path: Path) -> None:
    big = torch.zeros(100_000)
    path = write(tmp_path, {"part": Snapshot(big[:10]).wait()})
    assert (path / "state.pt").stat().st_size < 5_000


def test_numpy_arrays_come_back_as_tensors(tmp_path: Path) -> None:
    back = round_trip(tmp_path, {"a": np.arange(6).reshape(2, 3)})
    assert torch.equal(back["a"], torch.arange(6).reshape(2, 3))


def test_later_changes_are_not_in_the_copy(tmp_path: Path) -> None:
    tensor, array, listed = torch.zeros(2), np.zeros(2), [1]
    snapshot = Snapshot({"t": tensor, "a": array, "l": listed})
    tensor += 1
    array += 1
    listed.append(2)
    copy = snapshot.wait()
    assert copy["t"].tolist() == copy["a"].tolist() == [0, 0]
    assert copy["l"] == [1]


def test_tied_weights_stay_tied_and_are_written_once(tmp_path: Path) -> None:
    one = nn.Linear(100, 100, bias=False)
    sizes = {}
    for name, model in (("tied", [one, one]), ("own", [one, nn.Linear(100, 100, bias=False)])):
        state = Snapshot(nn.Sequential(*model).state_dict()).wait()
        path = write(tmp_path, {"model": state})
        sizes[name] = (path / "state.pt").stat().st_size
        weights = Checkpoint.load(path).model
        same = weights["0.weight"].data_ptr() == weights["1.weight"].data_ptr()
        assert same == (name == "tied")
    assert sizes["own"] - sizes["tied"] > 0.9 * 4 * 100 * 100


def test_the_versions_of_modules_are_kept(tmp_path: Path) -> None:
    state = nn.Sequential(nn.BatchNorm1d(2)).state_dict()
    back = round_trip(tmp_path, state)
    assert type(back) is OrderedDict
    assert back._metadata == state._metadata
    assert back._metadata["0"]["version"] == 2


@pytest.mark.parametrize(("value", "place"), [
    ({"a": [1, {2, 3}]}, r"value\['a'\]\[1\] is \{2, 3\}"),
    ({"a": {"b": object()}}, r"value\['a'\]\['b'\] is <object"),
    ((len,), r"value\[0\] is <built-in function len>"),
    ([b"bytes"], r"value\[0\] is b'bytes'"),
    ({"a": 1 << 3000}, r"value\['a'\]"),
    ({"a": {b"key": 1}}, r"value\['a'\].*b'key'"),
    ([torch.empty(2, device="meta")], r"value\[0\].*meta"),
], ids=["set", "object", "function", "bytes", "large", "key", "meta"])  # fmt: skip
def test_a_value_that_cannot_be_saved_is_named_with_its_place(value: Any, place: str) -> None:
    with pytest.raises(TypeError, match=place):
        Snapshot(value, "value")


texts = st.text(max_size=5)
plain = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | texts
states = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(texts | st.integers(), inner, max_size=4)
    ),
    max_leaves=15,
)


@settings(max_examples=100)
@given(state=states)
def test_any_plain_state_comes_back(tmp_path_factory: Any, state: Any) -> None:
    back = round_trip(tmp_path_factory.mktemp("any"), state)
    assert repr(back) == repr(state)  # distinguishes 1 from True, 0.0 from -0.0, and nan is itself


def test_a_damaged_checkpoint_given_by_its_path_is_reported_too(tmp_path: Path) -> None:
    path = write(tmp_path)
    (path / "state.pt").unlink()
    with pytest.raises(CheckpointDamagedError, match=r"checkpoint-000001/state\.pt"):
        Checkpoint.load(path)

"""Checkpoints made to do harm: every digest is right, and still nothing of it happens."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import Checkpoint, CheckpointMismatchError
from eventrain.engine.checkpoint.reader import (
    CheckpointDamagedError,
    checkpoints_in,
    read_manifest,
)
from eventrain.engine.checkpoint.writer import remove_unfinished

from tests.faults import disk
from tests.faults.disk import make_learner, tensors_of
from tests.faults.forge import (
    Op,
    archive,
    called,
    forge_manifest,
    forge_state,
    named,
    op,
    storage,
    tensor,
)

MB = 1 << 20
LONG = "q" * 2000
FOUR = b"\0" * 16
"""The bytes of four numbers."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("written")
    make_learner().run(1, valid=False, cbs=CheckpointCB(folder))
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, written: Path) -> Path:
    """One that is whole, to begin with."""
    return checkpoints_in(shutil.copytree(written, tmp_path / "checkpoints"))[0]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """One process, for what might take all memory."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([disk.__name__])
    with ProcessPoolExecutor(1, context, initializer=_bounded) as executor:
        yield executor


def _bounded() -> None:
    """Whatever goes wrong here, the machine is to stay usable."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + 4096 * MB,) * 2)
    torch.set_num_threads(1)


def load(path: Path) -> tuple[str, str, int]:
    """What comes of loading a checkpoint: the kind of error, its text, the MB that it took."""
    signal.alarm(50)  # where it never ends, this process does
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kind = text = ""
    try:
        Checkpoint.load(path)
    except Exception as exc:
        kind, text = type(exc).__name__, str(exc)
    signal.alarm(0)
    return kind, text, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def of(value: Any, *records: bytes) -> bytes:
    """A state that has `value` in it."""
    return archive(op({"model": {"weight": value}}).whole, *records)


# ----------------------------------------------------------------------------------------- code


class Calls:
    """What a pickler writes for it, is a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def calls(marker: Path) -> Iterator[tuple[str, bytes]]:
    """Pickles that write a file when they are read in the usual way."""
    touch, name = f"touch {marker}", str(marker)
    code = f"__import__('os').mknod({name!r})"
    for protocol in range(6):
        yield f"os.system, protocol {protocol}", pickle.dumps(Calls(os.system, touch), protocol)
    yield "eval", pickle.dumps(Calls(eval, code), 2)
    yield "exec", pickle.dumps(Calls(exec, code), 2)
    yield "a copy", pickle.dumps(Calls(shutil.copyfile, __file__, name), 2)
    yield "touch", pickle.dumps(Calls(Path.touch, marker), 2)
    yield "torch.save", pickle.dumps(Calls(torch.save, {}, name), 2)
    yield "a partial", pickle.dumps(Calls(partial(os.system, touch)), 2)
    system = called(GETATTR, called(GETATTR, named("os", "path"), "os"), "system")
    yield "an attribute", called(system, touch).whole
    yield "an old instruction", Op(b"(" + op(touch).code + b"iposix\nsystem\n").whole
    yield "another", Op(b"(" + named("posix", "system").code + op(touch).code + b"o").whole
    call = Op(called(named("posix", "system"), touch).code)
    yield "an item", op({"model": (1, call)}).whole
    yield "a key", op({call: 1}).whole
    yield "a state to be set", Op(called(TENSOR).code + op({"a": call}).code + b"b").whole
    yield "an argument", tensor(call, (1,), (1,)).whole
    yield "a memory", Op(op(("storage", call, "0", "cpu", 1)).code + b"Q").whole


GETATTR = named("builtins", "getattr")
TENSOR = named("torch", "Tensor")


def test_the_calls_would_be_made_by_a_reader_that_trusts_them(tmp_path: Path) -> None:
    class Trusting(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return pid

    for what, pickled in calls(tmp_path / "marker"):
        with suppress(Exception):  # what is made of the call's result is of no account
            Trusting(io.BytesIO(pickled)).load()
        assert (tmp_path / "marker").exists(), what
        (tmp_path / "marker").unlink()


def test_no_call_in_a_state_is_made(tmp_path: Path, checkpoint: Path) -> None:
    refused = 0
    for _, pickled in calls(tmp_path / "marker"):
        inner = Op(pickled[2 if pickled[:1] == b"\x80" else 0 : -1])
        for state in (archive(pickled), of(inner), pickled):
            forge_state(checkpoint, state)
            with pytest.raises(CheckpointDamagedError, match=r"state\.pt"):
                Checkpoint.load(checkpoint)
            refused += 1
    assert not (tmp_path / "marker").exists()
    assert refused >= 50
    print(f"states that would run code, all refused: {refused}")


def hidden(evil: bytes) -> Iterator[tuple[str, bytes]]:
    """A state that is none of it, and a call in another place of the file."""
    good = op({"model": {}}).whole
    yield "below", archive(good, more=[("archive/x/data.pkl", evil)])
    yield "twice", archive(good, more=[("archive/DATA.PKL", evil)])
    yield "in capitals", archive(good, more=[("archive/Data.pkl", evil)])
    yield "of a script", archive(good, more=[("archive/constants.pkl", evil)])
    yield "only in capitals", _zip(("archive/DATA.PKL", evil), ("archive/x/data.pkl", good))
    yield "of another folder", _zip(("archive/data.pkl", evil), ("b/data.pkl", good))
    yield "before the archive", evil + archive(good)
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as tar:
        info = tarfile.TarInfo("pickle")
        info.size = len(evil)
        tar.addfile(info, io.BytesIO(evil))
    yield "a tar", held.getvalue()


def _zip(*items: tuple[str, bytes]) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as file:
        for name, content in (
            *items,
            ("archive/version", b"3\n"),
            ("archive/byteorder", b"little"),
        ):
            file.writestr(name, content)
    return held.getvalue()


def test_no_call_hidden_elsewhere_in_the_file_is_made(tmp_path: Path, checkpoint: Path) -> None:
    evil = pickle.dumps(Calls(os.system, f"touch {tmp_path}/marker"), 2)
    outcomes = {}
    for where, state in hidden(evil):
        forge_state(checkpoint, state)
        try:
            assert Checkpoint.load(checkpoint).state == {"model": {}}
            outcomes[where] = "never read"
        except CheckpointDamagedError:
            outcomes[where] = "refused"
        assert not (tmp_path / "marker").exists()
    print(outcomes)
    assert outcomes["in capitals"] == outcomes["only in capitals"] == "refused"


# --------------------------------------------------------------------------------------- memory


def test_what_these_are_made_of_would_be_a_state(checkpoint: Path) -> None:
    numbers = torch.arange(4.0)
    forge_state(checkpoint, of(tensor(storage(4), (2, 2), (2, 1)), numbers.numpy().tobytes()))
    assert torch.equal(Checkpoint.load(checkpoint).model["weight"], numbers.reshape(2, 2))


def grown(times: int) -> Op:
    """Bytes that were turned into digits of digits of digits."""
    value: Any = LONG
    for codec in ("latin1", *["hex"] * times):
        value = called(named("_codecs", "encode"), value, codec)
    return op(value)


def nested(depth: int) -> Op:
    """A list of ten times a list of ten times a list."""
    code = b"]q\x00"
    for i in range(depth):
        code = b"(" + code + (b"h" + bytes([i])) * 9 + b"tq" + bytes([i + 1])
    return Op(code)


def deep(depth: int) -> Op:
    return Op(b"N" + b"\x85" * depth)


def claiming(size: int) -> bytes:
    """An archive one of whose records claims to have so many bytes, when it is unpacked."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", op({"model": {}}).whole)
        file.writestr("archive/data/0", bytes(1000))
        file.writestr("archive/version", b"3\n")
        file.filelist[1].file_size = size
    return held.getvalue()


def bomb(mb: int) -> bytes:
    """A pickle with a text of so many MB, compressed."""
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", op({"model": "0" * (mb * MB)}).whole)
        file.writestr("archive/version", b"3\n")
    return held.getvalue()


GREEDY: dict[str, Callable[[], bytes]] = {
    "a bytearray of 10**12": lambda: of(called(named("builtins", "bytearray"), 10**12)),
    "a bytearray of 10**9": lambda: of(called(named("__builtin__", "bytearray"), 10**9)),
    "a bytearray in capitals": lambda: _zip(
        ("archive/DATA.PKL", op(called(named("builtins", "bytearray"), 10**9)).whole),
        ("archive/x/data.pkl", op({"model": {}}).whole),
    ),
    "a tensor of 10**12 from its size": lambda: of(called(TENSOR, 10**12)),
    "a tensor of 10**8 from its size": lambda: of(called(TENSOR, 10**8)),
    "a tensor type of 10**8": lambda: of(called(named("torch", "FloatTensor"), 10**8)),
    "a storage of 10**12": lambda: of(called(named("torch.storage", "UntypedStorage"), 10**12)),
    "digits of digits": lambda: of(grown(40)),
    "digits, a little": lambda: of(grown(18)),
    "numbers that are not there": lambda: of(tensor(storage(5), (4,), (1,)), FOUR),
    "10**12 that are not there": lambda: of(tensor(storage(10**12), (4,), (1,)), FOUR),
    "less than nothing": lambda: of(tensor(storage(-4), (4,), (1,)), FOUR),
    "no record": lambda: of(tensor(storage(4, "7"), (4,), (1,)), FOUR),
    "beyond its memory": lambda: of(tensor(storage(4), (10**6,), (1,)), FOUR),
    "10**12 beyond its memory": lambda: of(tensor(storage(4), (10**12,), (1,)), FOUR),
    "before its memory": lambda: of(tensor(storage(4), (4,), (1,), -100), FOUR),
    "behind its memory": lambda: of(tensor(storage(4), (4,), (1,), 4), FOUR),
    "backwards": lambda: of(tensor(storage(4), (4,), (-1,)), FOUR),
    "one number 10**12 times": lambda: of(tensor(storage(4), (10**12,), (0,)), FOUR),
    "that one in a list": lambda: of((tensor(storage(4), (10**12,), (0,)),), FOUR),
    "a stride beyond": lambda: of(tensor(storage(4), (2, 2), (10**12, 1)), FOUR),
    "nowhere": lambda: of(called(
        named("torch._utils", "_rebuild_meta_tensor_no_storage"),
        named("torch", "float32"), (10**12,), (1,), False,
    )),
    "sparse": lambda: of(called(
        named("torch._utils", "_rebuild_sparse_tensor"),
        called(named("torch.serialization", "_get_layout"), "torch.sparse_coo"),
        (
            tensor(storage(2, "0", "LongStorage"), (1, 2), (2, 1)),
            tensor(storage(2, "1"), (2,), (1,)),
            (10**12,),
            False,
        ),
    ), FOUR, b"\0" * 8),
    "a list of lists of lists": lambda: of(nested(30)),
    "ever deeper": lambda: of(deep(100_000)),
    "a text longer than the file": lambda: of(Op(b"X\xff\xff\xff\x7fabc")),
    "a number longer than the file": lambda: of(Op(b"\x8b\xff\xff\xff\x7fabc")),
    "a place far away": lambda: archive(Op(b"Nr\xff\xff\xff\xff").whole),
    "a record that claims 10 GB": lambda: claiming(10 << 30),
    "a record that claims 10**18": lambda: claiming(10**18),
    "a bomb of 128 MB": lambda: bomb(128),
    "nothing": lambda: b"",
    "no state": lambda: archive(op((1, 2)).whole),
    "an endless pickle": lambda: archive(b"\x80\x02" + b"N" * 100_000),
    "an archive of nothing": lambda: _zip(),
    "many empty records": lambda: archive(
        op({"model": {}}).whole, more=[(f"archive/x/{i}", b"") for i in range(2000)]
    ),
}  # fmt: skip

HARMLESS = {"a list of lists of lists", "many empty records"}
"""These may be loaded: they are small, and reading them ends."""


@pytest.mark.parametrize("what", GREEDY)
def test_no_state_takes_memory_that_it_does_not_fill(
    checkpoint: Path, pool: ProcessPoolExecutor, what: str
) -> None:
    forge_state(checkpoint, GREEDY[what]())
    kind, text, taken = pool.submit(load, checkpoint).result(60)
    if what in HARMLESS:
        assert kind == ""
    else:
        assert kind == "CheckpointDamagedError"
        assert str(checkpoint / "state.pt") in text
        assert len(text) < 2000
    assert taken < 64


# ------------------------------------------------------------------------------------- manifests


def test_a_manifest_that_is_long_is_not_read(checkpoint: Path, pool: ProcessPoolExecutor) -> None:
    forge_manifest(checkpoint, run_id="x" * 2 * MB)
    kind, text, _ = pool.submit(load, checkpoint).result(60)
    assert kind == "CheckpointDamagedError"
    assert text.endswith("manifest.json: it is longer than a manifest can be")
    with open(checkpoint / "manifest.json", "wb") as file:
        file.truncate(1 << 40)  # of nothing but zeros, which take no room
    kind, text, taken = pool.submit(load, checkpoint).result(60)
    assert (kind, "longer" in text) == ("CheckpointDamagedError", True)
    assert taken < 64


@pytest.mark.parametrize("content", [
    b"[" * 500_000, b'{"a":' * 100_000, b"9" * 500_000, b"null", b"[]", b"{}", b'{"sha256": 1}',
    b"\xff\xfe", b"\0" * 1000, b'{"sha256": NaN}',
], ids=range(10))  # fmt: skip
def test_a_file_that_is_not_a_manifest_is_damaged(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointDamagedError, match=r"manifest\.json"):
        Checkpoint.load(checkpoint)


STATE = {"size": 1, "sha256": "0" * 64}
POSITION = {"epoch": 1, "training": True, "batches": 0}


@pytest.mark.parametrize("changes", [
    {"format": None},
    {"run_id": None},
    {"run_id": 5},
    {"position": None},
    {"position": {"epoch": 1}},
    {"position": {**POSITION, "epoch": "1"}},
    {"position": {**POSITION, "__class__": "os"}},
    {"metrics": None},
    {"metrics": {"loss": "low"}},
    {"metrics": {"loss": {"a": 1}}},
    {"versions": None},
    {"versions": {}},
    {"versions": {"eventrain": "1"}},
    {"files": None},
    {"files": []},
    {"files": {"../../etc/passwd": STATE}},
    {"files": {"/etc/passwd": STATE}},
    {"files": {"state.pt": "../../etc/passwd"}},
    {"files": {"state.pt": {"size": "1", "sha256": None}}},
], ids=str)  # fmt: skip
def test_a_manifest_with_wrong_content_is_damaged(
    checkpoint: Path, changes: dict[str, Any]
) -> None:
    forge_manifest(checkpoint, **changes)
    for read in (Checkpoint.load, read_manifest):
        with pytest.raises(CheckpointDamagedError, match=r"manifest\.json"):
            read(checkpoint)
    # Neither does a run that only saves there stumble over it.
    make_learner().run(1, valid=False, cbs=CheckpointCB(checkpoint.parent))
    assert checkpoint.exists()


@pytest.mark.parametrize("size", [10**18, -1, 0, 10**400])
def test_a_manifest_that_claims_another_size_is_found_out(checkpoint: Path, size: int) -> None:
    written = read_manifest(checkpoint)["files"]["state.pt"]
    forge_manifest(checkpoint, files={"state.pt": {**written, "size": size}})
    with pytest.raises(CheckpointDamagedError, match=rf"state\.pt: .* {size} were written"):
        Checkpoint.load(checkpoint)


def test_no_file_that_a_manifest_names_is_read_but_the_state(checkpoint: Path) -> None:
    os.mkfifo(checkpoint.parent / "pipe")  # who opens it, waits for ever
    files = read_manifest(checkpoint)["files"]
    forge_manifest(checkpoint, files={**files, "../pipe": STATE, "/dev/zero": STATE})
    assert "model" in Checkpoint.load(checkpoint).state


# ----------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("target", ["/dev/zero", "/dev/stdin", "itself", "nowhere", "/proc/kmsg"])
def test_a_link_to_something_that_is_not_a_file_is_not_followed(
    checkpoint: Path, pool: ProcessPoolExecutor, name: str, target: str
) -> None:
    (checkpoint / name).unlink()
    (checkpoint / name).symlink_to(name if target == "itself" else target)
    kind, text, taken = pool.submit(load, checkpoint).result(60)
    assert kind == "CheckpointDamagedError"
    assert str(checkpoint / name) in text
    assert taken < 64


def test_of_a_linked_file_it_is_the_content_that_counts(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "state.pt").rename(tmp_path / "elsewhere.pt")
    (checkpoint / "state.pt").symlink_to(tmp_path / "elsewhere.pt")
    assert "model" in Checkpoint.load(checkpoint).state
    (tmp_path / "elsewhere.pt").write_bytes(b"another")
    with pytest.raises(CheckpointDamagedError, match=r"state\.pt"):
        Checkpoint.load(checkpoint)


def test_nothing_is_removed_behind_a_link(checkpoint: Path, tmp_path: Path) -> None:
    folder, outside = checkpoint.parent, tmp_path / "outside"
    checkpoint.rename(outside)
    checkpoint.symlink_to(outside)
    (folder / ".unfinished-checkpoint-000009").symlink_to(outside)
    (outside / ".unfinished-checkpoint-000001").mkdir()
    remove_unfinished(folder)
    learner = make_learner()
    learner.run(3, valid=False, cbs=CheckpointCB(folder, keep_last=1), resume="last")
    assert not checkpoint.is_symlink()
    names = [".unfinished-checkpoint-000001", "manifest.json", "state.pt"]
    assert sorted(path.name for path in outside.iterdir()) == names
    assert "model" in Checkpoint.load(outside).state


# ----------------------------------------------------------------- what fits no learner of ours


def huge(state: dict[str, Any]) -> None:
    state["model"]["weight"] = torch.zeros(1000, 1000)


def other_type(state: dict[str, Any]) -> None:
    state["model"]["weight"] = state["model"]["weight"].to(torch.complex128)


def no_tensor(state: dict[str, Any]) -> None:
    state["model"]["weight"] = [[0.0] * 3]


def huge_momentum(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(1000, 1000)


def momentum_of_no_parameter(state: dict[str, Any]) -> None:
    state["optimizer"]["state"][10**9] = state["optimizer"]["state"].pop(0)


def huge_gradient(state: dict[str, Any]) -> None:
    state["gradients"]["weight"] = torch.zeros(1000, 1000)


def gradient_of_nothing(state: dict[str, Any]) -> None:
    state["gradients"]["__class__"] = torch.zeros(1)


def gradient_that_is_none(state: dict[str, Any]) -> None:
    state["gradients"]["weight"] = "text"


def part_missing(state: dict[str, Any]) -> None:
    del state["optimizer"]


def part_of_another_kind(state: dict[str, Any]) -> None:
    state["callbacks"] = 5


def attributes_of_another_kind(state: dict[str, Any]) -> None:
    state["attributes"] = {"learner": 5}


def attribute_of_nothing(state: dict[str, Any]) -> None:
    state["attributes"] = {"learner": {"__class__": {"state": {}}}}


def huge_parameter_of_the_optimizer(state: dict[str, Any]) -> None:
    parameter = {"value": torch.zeros(1000, 1000), "gradient": None}
    state["optimizer_parameters"] = {0: parameter}


def settings_of_another_kind(state: dict[str, Any]) -> None:
    state["settings"] = 5


@pytest.mark.parametrize("change", [
    attributes_of_another_kind, attribute_of_nothing, huge_parameter_of_the_optimizer,
    settings_of_another_kind,
    huge, other_type, no_tensor, huge_momentum, momentum_of_no_parameter, huge_gradient,
    gradient_of_nothing, gradient_that_is_none, part_missing, part_of_another_kind,
])  # fmt: skip
def test_a_state_of_another_shape_is_refused_and_nothing_changed(
    checkpoint: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    state = Checkpoint.load(checkpoint).state
    change(state)
    held = io.BytesIO()
    torch.save(state, held)
    forge_state(checkpoint, held.getvalue())
    learner = make_learner()
    learner.run(1, valid=False)
    before = tensors_of(learner)
    learner.opt_func = None  # keeps the optimizer, and with it its momentum
    with pytest.raises(CheckpointMismatchError, match="the checkpoint does not fit"):
        learner.run(3, valid=False, resume=checkpoint)
    assert learner.result.batches == 0
    assert all(map(torch.equal, tensors_of(learner), before))

"""Checkpoints on disk: whole, or not there; and read without running code.

A checkpoint is a folder of two files: `state.pt`, which `torch.load(weights_only=True)` reads, and
`manifest.json`, with its size, its SHA-256, and what a person wants to know. It is written under
a temporary name, flushed to the disk, and renamed; so one that has its name is whole, and one
that has rotted since is told by its digest.

Source: the order of writing is that of "Files are hard" (Dan Luu) and of SQLite's "Atomic Commit".
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickletools
import platform
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import structlog
import torch

from .position import Position

FORMAT = 1
"""Goes up when checkpoints of before cannot be read any more."""

STATE, MANIFEST = "state.pt", "manifest.json"
MANIFEST_LIMIT = 1 << 20
"""Bytes of a manifest; ours have less than a thousand, and a metric more or less."""


class CheckpointError(Exception):
    """There is no checkpoint to be read."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is not what was written: cut off, rotten, or not ours."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: its folder.
        manifest: what a person wants to know: "run_id", "created", "position", "metrics" (of
            the epoch, if it was saved at the end of one), "versions", "files".
        state: the whole state: "model", "optimizer", "callbacks" and more.

    Example:
        >>> import tempfile, torch
        >>> from eventrain.callbacks import CheckpointCB
        >>> from eventrain.engine import Checkpoint, DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> model = torch.nn.Linear(3, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     learner = TrainLearner(model, DataLoaders(batches), cbs=CheckpointCB(folder))
        ...     result = learner.run(2, valid=False)
        ...     checkpoint = Checkpoint.load(folder)
        >>> checkpoint.position
        Position(epoch=2, training=True, batches=0)
        >>> model.load_state_dict(checkpoint.model)
        <All keys matched successfully>
    """

    path: Path
    manifest: dict[str, Any]
    state: dict[str, Any]

    @property
    def position(self) -> Position:
        """Where in the fit it was saved."""
        return Position(**self.manifest["position"])

    @property
    def model(self) -> dict[str, Any]:
        """The model's `state_dict`, on the CPU."""
        return self.state["model"]  # type: ignore[no-any-return]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a checkpoint; of a folder of checkpoints, the last that is whole.

        No code in it is run, and nothing is read before its digest is right. One of a folder
        that is damaged is logged as a warning, and passed over.

        Args:
            path: the folder of one checkpoint, or of several.

        Raises:
            CheckpointError: there is none.
            CheckpointDamagedError: it, or every one of them, is damaged.
        """
        path = Path(path)
        if (path / MANIFEST).exists() or (path / STATE).exists():
            return cls._load_one(path)
        found = checkpoints_in(path)
        for candidate in reversed(found):
            try:
                return cls._load_one(candidate)
            except CheckpointDamagedError as exc:
                structlog.get_logger("eventrain").warning(
                    "checkpoint_damaged", path=str(candidate), error=str(exc)
                )
        if found:
            raise CheckpointDamagedError(f"all {len(found)} checkpoints in {path} are damaged")
        raise CheckpointError(f"there is no checkpoint in {path}")

    @classmethod
    def _load_one(cls, path: Path) -> Checkpoint:
        manifest = read_manifest(path)
        try:
            with open(path / STATE, "rb") as file:
                _check_file(file, manifest["files"][STATE])
                state = torch.load(file, map_location="cpu", weights_only=True)
            _check_tensors(state)
            return cls(path, manifest, state)
        except CheckpointDamagedError as exc:
            raise CheckpointDamagedError(f"{path / STATE}: {exc}") from None
        except Exception as exc:  # what torch raises of a file that is none is of many kinds
            raise CheckpointDamagedError(f"{path / STATE} cannot be read: {exc}") from exc


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints of a folder, the last one last; none if there is no such folder."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        raise CheckpointError(f"{folder} is a file; checkpoints are in a folder") from None
    numbered = [(int(found[1]), name) for name in names if (found := _NAME.fullmatch(name))]
    return [folder / name for _, name in sorted(numbered)]


_NAME = re.compile(r"checkpoint-(\d{6,})")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        CheckpointDamagedError: it is not what was written.
        CheckpointError: it is of a later format.
    """
    try:
        with open(path / MANIFEST, "rb") as file:
            written = file.read(MANIFEST_LIMIT + 1)
        if len(written) > MANIFEST_LIMIT:
            raise CheckpointDamagedError("it is longer than any manifest")
        manifest = json.loads(written)
        digest = manifest.pop("sha256")
        if _encode(manifest, digest) != written or _digest(manifest) != digest:
            raise CheckpointDamagedError("it is not what its digest says")
    except CheckpointDamagedError as exc:
        raise CheckpointDamagedError(f"{path / MANIFEST}: {exc}") from None
    except Exception as exc:
        raise CheckpointDamagedError(f"{path / MANIFEST} cannot be read: {exc!r}") from exc
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {manifest['format']!r}, and this version of eventrain reads"
            f" {FORMAT}: it was written by eventrain {manifest['versions']['eventrain']}"
        )
    return manifest  # type: ignore[no-any-return]


def _encode(manifest: Mapping[str, Any], digest: str) -> bytes:
    return json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True).encode()


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_file(file: io.BufferedReader, expected: Mapping[str, Any]) -> None:
    """Raise unless the file is what was written, and no larger inside than outside."""
    size = os.fstat(file.fileno()).st_size
    if size != expected["size"]:
        raise CheckpointDamagedError(f"it has {size} bytes, and {expected['size']} were written")
    if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
        raise CheckpointDamagedError("it is not what its digest says")
    with zipfile.ZipFile(file) as archive:
        items = archive.infolist()
        if sum(item.file_size for item in items) > size:
            raise CheckpointDamagedError("it claims to hold more than it does")
        (pickled,) = (item for item in items if item.filename.endswith("/data.pkl"))
        for _, argument, _ in pickletools.genops(archive.read(pickled)):
            if argument in ("builtins bytearray", "__builtin__ bytearray"):
                raise CheckpointDamagedError("it asks for memory that it does not fill")
    file.seek(0)


def _check_tensors(state: Any) -> None:
    """Raise if a tensor claims to be larger than what there is of it."""
    for tensor in _tensors(state):
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise CheckpointDamagedError(f"a tensor of {tuple(tensor.shape)} is not all there")


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# ------------------------------------------------------------------------------------- writing


def write_checkpoint(
    folder: Path, run_id: str, position: Position, metrics: Mapping[str, Any], state: Any
) -> Path:
    """Write a checkpoint into `folder`, whole or not at all; return its path.

    Raises:
        OSError: what the system says; nothing of it is left then.
        TypeError: something in the state could not be read back.
    """
    found = checkpoints_in(folder)
    number = int(found[-1].name.rpartition("-")[2]) + 1 if found else 1
    path = folder / f"checkpoint-{number:06}"
    unfinished = folder / f"{_UNFINISHED}{path.name}"
    try:
        os.mkdir(unfinished)
        manifest = {
            "format": FORMAT,
            "run_id": run_id,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "position": {
                "epoch": position.epoch,
                "training": position.training,
                "batches": position.batches,
            },
            "metrics": dict(metrics),
            "versions": _versions(),
            "files": {STATE: _write_state(unfinished / STATE, state)},
        }
        _write(unfinished / MANIFEST, _encode(manifest, _digest(manifest)))
        sync_folder(unfinished)
        os.rename(unfinished, path)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return path


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, so that it is there whole or not at all."""
    unfinished = path.with_name(_UNFINISHED + path.name)
    os.rename(path, unfinished)
    shutil.rmtree(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Remove what a run that died left half written, or half removed."""
    for path in folder.glob(_UNFINISHED + "*"):
        shutil.rmtree(path, ignore_errors=True)


_UNFINISHED = ".unfinished-"


def _versions() -> dict[str, str]:
    return {
        "eventrain": version("eventrain"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


class _Digesting(io.RawIOBase):
    """A file that keeps the digest of what is written to it, and its first error.

    torch would tell of an error in its own words, after it has tried to write on.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._size = 0
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        data = memoryview(data).cast("B")
        if self.error is None:
            try:
                self._file.write(data)
                self._digest.update(data)
                self._size += len(data)
            except OSError as exc:
                self.error = exc
        return len(data)

    def finish(self) -> dict[str, Any]:
        if self.error is not None:
            raise self.error
        return {"size": self._size, "sha256": self._digest.hexdigest()}


def _write_state(path: Path, state: Any) -> dict[str, Any]:
    with open(path, "xb") as file:
        digesting = _Digesting(file)
        torch.save(state, digesting)  # type: ignore[arg-type]  # it only writes and flushes
        written = digesting.finish()
        file.flush()
        os.fsync(file.fileno())
    if unsafe := torch.serialization.get_unsafe_globals_in_checkpoint(path):
        raise TypeError(
            f"the state holds what could not be read back without running code: {unsafe};"
            " a state_dict is to hold tensors, numbers, texts, lists and dicts of them"
        )
    return written


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Have the names in a folder reach the disk, where the system can (Windows cannot)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

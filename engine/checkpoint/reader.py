"""Checkpoints on disk: whole, or refused; and read without running code.

A checkpoint is a folder of two files: `state.pt`, which `torch.load(weights_only=True)` reads, and
`manifest.json`, with its size, its SHA-256, and what a person wants to know. How it comes to be
whole stands in `writer.py`; one that has rotted since is told by its digest.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch

from ..loop.state import Position
from .validate import foreign_names, shapes_not_there

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
            with _open(path / STATE) as file:
                _check_file(file, manifest["files"][STATE])
                state = torch.load(file, map_location="cpu", weights_only=True)
            if not isinstance(state, dict):
                raise CheckpointDamagedError("it is no state")
            if shapes := shapes_not_there(state):
                raise CheckpointDamagedError(f"tensors of {shapes} are not all there")
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
        CheckpointError: it is of another format.
    """
    try:
        with _open(path / MANIFEST) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MANIFEST_LIMIT:
                raise CheckpointDamagedError("it is longer than any manifest")
            written = file.read(size)
        manifest = json.loads(written)
        digest = manifest.pop("sha256")
        if encode_manifest(manifest, digest) != written or manifest_digest(manifest) != digest:
            raise CheckpointDamagedError("it is not what its digest says")
        written_by, its_format = manifest["versions"]["eventrain"], manifest["format"]
        if its_format == FORMAT and not _is_complete(manifest):
            raise CheckpointDamagedError("it does not say what a manifest says")
    except CheckpointDamagedError as exc:
        raise CheckpointDamagedError(f"{path / MANIFEST}: {exc}") from None
    except Exception as exc:
        raise CheckpointDamagedError(f"{path / MANIFEST} cannot be read: {exc!r}") from exc
    if its_format != FORMAT:
        raise CheckpointError(
            f"{path} has format {its_format!r}, and this version of eventrain reads {FORMAT}:"
            f" it was written by eventrain {written_by}"
        )
    return manifest  # type: ignore[no-any-return]


def _is_complete(manifest: Any) -> bool:
    match manifest:
        case {
            "run_id": str(),
            "position": {"epoch": int(), "training": bool(), "batches": int(), **others},
            "metrics": dict(metrics),
            "versions": {"torch": str()},
            "files": {"state.pt": {"size": int(), "sha256": str()}},
        }:
            return not others and all(isinstance(n, float | int | None) for n in metrics.values())
    return False


def _open(path: Path) -> io.BufferedReader:
    """Open a file to be read; a pipe, where one would wait, is none."""
    if not path.is_file():
        raise CheckpointDamagedError("there is no such file")
    return open(path, "rb")


def encode_manifest(manifest: Mapping[str, Any], digest: str) -> bytes:
    """A manifest as it stands in its file."""
    return json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True).encode()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest, which stands in it."""
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
        if names := foreign_names(archive):
            raise CheckpointDamagedError(f"it asks for what no state is made of: {names}")
    file.seek(0)

"""Reading checkpoints: a damaged one is refused, and no code in it is run.

A checkpoint is a folder of two files: `state.pt`, which `torch.load(weights_only=True)` reads, and
`manifest.json`, which holds the size and the SHA-256 of `state.pt`, and information for people.
`writer.py` writes both so that an interrupted write cannot leave an incomplete checkpoint; later
corruption is detected by the SHA-256.
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

import torch

from .. import log
from ..loop.state import Position
from .sparse import decode_sparse
from .validate import disallowed_names, incomplete_shapes

FORMAT = 4
"""Increased when the checkpoints of earlier versions can no longer be read."""

STATE, MANIFEST = "state.pt", "manifest.json"
MANIFEST_LIMIT = 1 << 20
"""The most bytes that a manifest may have; a usual one has about a thousand."""


class CheckpointError(Exception):
    """A checkpoint does not exist, or cannot be read."""


class CheckpointDamagedError(CheckpointError):
    """A checkpoint is not as it was written: truncated, corrupted, or not made by eventrain."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that has been read and verified.

    Attributes:
        path: its folder.
        manifest: information for people: "run_id", "created", "position", "metrics" (of the
            epoch, if it was saved at the end of one), "versions", "files".
        state: the whole state: "model", "optimizer", "callbacks", "attributes" (of the learner and
            of callbacks) and more.

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
        """The position in the fit at which it was saved."""
        return Position(**self.manifest["position"])

    @property
    def model(self) -> dict[str, Any]:
        """The model's `state_dict`, on the CPU."""
        return self.state["model"]  # type: ignore[no-any-return]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a checkpoint; in a folder of checkpoints, the last one that is not damaged.

        No code in it is run, and it is loaded only after its digest has been verified. In a folder
        of several, a damaged one is logged as a warning and skipped.

        Args:
            path: the folder of one checkpoint, or of several.

        Raises:
            CheckpointError: there is none, or it has another format.
            CheckpointDamagedError: it is damaged, or all of them are.
        """
        path = Path(path)
        if (path / MANIFEST).exists() or (path / STATE).exists():
            return cls._load_one(path)
        found = checkpoints_in(path)
        for candidate in reversed(found):
            try:
                return cls._load_one(candidate)
            except CheckpointDamagedError as exc:
                log.warning("checkpoint_damaged", path=str(candidate), error=str(exc))
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
                raise CheckpointDamagedError("it does not hold a dictionary")
            if shapes := incomplete_shapes(state):
                raise CheckpointDamagedError(f"the data of tensors of shape {shapes} is incomplete")
            return cls(path, manifest, decode_sparse(state))
        except CheckpointDamagedError as exc:
            raise CheckpointDamagedError(f"{path / STATE}: {exc}") from None
        except Exception as exc:  # torch raises many kinds of errors for an invalid file
            raise CheckpointDamagedError(f"{path / STATE} cannot be read: {exc}") from exc


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, in the order of writing; none if the folder does not exist."""
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
        CheckpointDamagedError: it is not as it was written.
        CheckpointError: it has another format.
    """
    try:
        with _open(path / MANIFEST) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MANIFEST_LIMIT:
                raise CheckpointDamagedError("it is longer than a manifest can be")
            written = file.read(size)
        manifest = json.loads(written)
        digest = manifest.pop("sha256")
        if encode_manifest(manifest, digest) != written or manifest_digest(manifest) != digest:
            raise CheckpointDamagedError("its content does not match its SHA-256")
        written_by, its_format = manifest["versions"]["eventrain"], manifest["format"]
        if its_format == FORMAT and not _is_complete(manifest):
            raise CheckpointDamagedError("a field is missing or has the wrong type")
    except CheckpointDamagedError as exc:
        raise CheckpointDamagedError(f"{path / MANIFEST}: {exc}") from None
    except Exception as exc:
        raise CheckpointDamagedError(f"{path / MANIFEST} cannot be read: {exc!r}") from exc
    if its_format != FORMAT:
        raise CheckpointError(
            f"{path} has format {its_format!r}, but this version of eventrain reads {FORMAT}:"
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
    """Open a regular file for reading; a pipe is refused, because opening it would block."""
    if not path.is_file():
        raise CheckpointDamagedError("it is missing, or not a regular file")
    return open(path, "rb")


def encode_manifest(manifest: Mapping[str, Any], digest: str) -> bytes:
    """The content of a manifest's file."""
    return json.dumps({**manifest, "sha256": digest}, indent=1, sort_keys=True).encode()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """The SHA-256 of a manifest, which its file also holds."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _check_file(file: io.BufferedReader, expected: Mapping[str, Any]) -> None:
    """Raise unless a state file is as it was written, and unpacks to no more than its size."""
    size = os.fstat(file.fileno()).st_size
    if size != expected["size"]:
        raise CheckpointDamagedError(f"it has {size} bytes, but {expected['size']} were written")
    if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
        raise CheckpointDamagedError("its content does not match its SHA-256")
    with zipfile.ZipFile(file) as archive:
        items = archive.infolist()
        if sum(item.file_size for item in items) > size:
            raise CheckpointDamagedError("it claims to hold more data than its size")
        if names := disallowed_names(archive):
            raise CheckpointDamagedError(f"it uses names that no state needs: {names}")
    file.seek(0)

"""Writing and removing checkpoints atomically: a folder named as a checkpoint is complete.

A checkpoint is written under a temporary name in the same folder, flushed to the disk, and renamed.

Source: "Files are hard" (Dan Luu) and SQLite's "Atomic Commit".
"""

from __future__ import annotations

import hashlib
import io
import os
import platform
import shutil
import zipfile
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..loop.state import Position
from .reader import (
    FORMAT,
    MANIFEST,
    STATE,
    checkpoints_in,
    encode_manifest,
    manifest_digest,
)
from .validate import disallowed_names


def write_checkpoint(
    folder: Path, run_id: str, position: Position, metrics: Mapping[str, Any], state: Any
) -> Path:
    """Write a checkpoint into `folder`, completely or not at all; return its path.

    Raises:
        OSError: writing failed; what was written has been removed.
        TypeError: the state contains something that could not be read back.
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
        _write(unfinished / MANIFEST, encode_manifest(manifest, manifest_digest(manifest)))
        sync_folder(unfinished)
        os.rename(unfinished, path)
        sync_folder(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return path


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint atomically: it exists completely or not at all."""
    unfinished = path.with_name(_UNFINISHED + path.name)
    try:
        os.rename(path, unfinished)
    except FileNotFoundError:
        return  # it has been removed already
    if unfinished.is_symlink():  # a user has moved it elsewhere: remove only the link
        unfinished.unlink()
    else:
        shutil.rmtree(unfinished)


def remove_unfinished(folder: Path) -> None:
    """Remove checkpoints that a killed run has only partly written or removed."""
    for path in folder.glob(_UNFINISHED + "*"):
        shutil.rmtree(path, ignore_errors=True)


_UNFINISHED = ".unfinished-"


def _versions() -> dict[str, str]:
    return {
        "eventrain": version("eventrain"),
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }


class _HashingFile(io.RawIOBase):
    """A file that computes the SHA-256 of its content, and keeps the first error of a write.

    torch would continue to write after an error, and then raise a different one.
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
        hashing = _HashingFile(file)
        torch.save(state, hashing)  # type: ignore[arg-type]  # it only writes and flushes
        written = hashing.finish()
        file.flush()
        os.fsync(file.fileno())
    with zipfile.ZipFile(path) as archive:
        if names := disallowed_names(archive):
            raise TypeError(
                "the state contains values that could not be read back without running code:"
                f" {names}; use only tensors, numbers, strings, lists and dicts in a state_dict"
            )
    return written


def _write(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, except on Windows, which cannot."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

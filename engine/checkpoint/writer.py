"""Writing a checkpoint so that one which has its name is whole, and removing it the same way.

It is written under a temporary name in the same folder, flushed to the disk, and renamed.

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
from .validate import foreign_names


def write_checkpoint(
    folder: Path, run_id: str, position: Position, metrics: Mapping[str, Any], state: Any
) -> Path:
    """Write a checkpoint into `folder`, whole or not at all; return its path.

    Raises:
        OSError: what the system says; nothing half of it is left then.
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
        _write(unfinished / MANIFEST, encode_manifest(manifest, manifest_digest(manifest)))
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
    try:
        os.rename(path, unfinished)
    except FileNotFoundError:
        return  # somebody was first
    if unfinished.is_symlink():  # somebody has put it elsewhere, where it stays
        unfinished.unlink()
    else:
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
    with zipfile.ZipFile(path) as archive:
        if names := foreign_names(archive):
            raise TypeError(
                f"the state holds what could not be read back without running code: {names};"
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

"""The checkpoints of one run in a folder: the last, the best, and those to remove."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

from .. import log
from ..loop.state import Position
from .reader import CheckpointError, checkpoints_in, read_manifest
from .writer import (
    remove_checkpoint,
    remove_unfinished,
    sync_folder,
    write_checkpoint,
)


class CheckpointFolder:
    """Writes the checkpoints of one run into a folder, and removes those that are not kept.

    Args:
        folder: created if it does not exist.
        run_id: checkpoints of other runs are not touched.
        keep_last: how many of the last checkpoints to keep; None keeps all.
        keep_best: (metric, "min" or "max"): also keep the checkpoint with the best metric.

    Raises:
        RuntimeError: another run of this process writes into the folder.
        OSError: the folder is not writable.
    """

    _in_use: ClassVar[dict[tuple[int, Path], CheckpointFolder]] = {}
    """By process, because a forked one inherits those of its parent, and by absolute path."""

    def __init__(
        self,
        folder: Path,
        run_id: str,
        keep_last: int | None,
        keep_best: tuple[str, str] | None,
    ) -> None:
        self.folder = folder
        self.run_id = run_id
        self.keep_last = keep_last
        self.keep_best = keep_best
        # The metrics of each checkpoint of this run, in the order of writing.
        self._metrics: dict[Path, Mapping[str, Any]] = {}
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync_folder(path.parent)
        self._key = os.getpid(), folder.resolve()  # the working directory may change
        other = self._in_use.setdefault(self._key, self)
        if other is not self:
            raise RuntimeError(
                f"run {other.run_id} writes its checkpoints into {folder}: give concurrent runs"
                " different folders"
            )
        try:
            remove_unfinished(folder)
            _check_writable(folder)
            for path in checkpoints_in(folder):
                self._add_existing(path)
        except BaseException:
            self.close()
            raise

    def _add_existing(self, path: Path) -> None:
        try:
            manifest = read_manifest(path)
        except CheckpointError as exc:
            log.warning("checkpoint_damaged", path=str(path), error=str(exc))
            return
        if manifest["run_id"] == self.run_id:
            self._metrics[path] = manifest["metrics"]

    @property
    def last(self) -> Path | None:
        """The last checkpoint of this run."""
        return next(reversed(self._metrics), None)

    @property
    def best(self) -> Path | None:
        """The checkpoint with the best metric, the first of equals; None if none has the metric."""
        if self.keep_best is None:
            return None
        name, mode = self.keep_best
        values = {
            path: value
            for path, metrics in self._metrics.items()
            if (value := metrics.get(name)) is not None
        }
        return (min if mode == "min" else max)(values, key=values.__getitem__, default=None)

    def put(self, position: Position, metrics: Mapping[str, Any], state: Any) -> None:
        """Write a checkpoint, then remove those that are not kept.

        Raises:
            OSError: writing failed; the existing checkpoints stay.
            ValueError: the metric of `keep_best` is not among the metrics.
        """
        values = {
            name: float(value) if math.isfinite(value) else None
            for name, value in metrics.items()
            if isinstance(value, Real)
        }
        path = write_checkpoint(self.folder, self.run_id, position, values, state)
        self._metrics[path] = values
        if self.keep_best is not None and metrics and self.keep_best[0] not in values:
            raise ValueError(
                f"keep_best={self.keep_best!r}: the epoch has no metric {self.keep_best[0]!r};"
                f" it has {', '.join(values) or 'none'}"
            )
        if self.keep_last is not None:
            kept = {*list(self._metrics)[-self.keep_last :], self.best}
            for old in [old for old in self._metrics if old not in kept]:
                remove_checkpoint(old)
                del self._metrics[old]

    def close(self) -> None:
        """Let other runs write into the folder."""
        self._in_use.pop(self._key, None)


def _check_writable(folder: Path) -> None:
    probe = folder / ".unfinished-probe"
    probe.mkdir()
    sync_folder(folder)
    probe.rmdir()

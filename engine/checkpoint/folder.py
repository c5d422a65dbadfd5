"""The checkpoints of one run in a folder: which is the last, which the best, which may go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, ClassVar

import structlog

from ..loop.state import Position
from .reader import CheckpointError, checkpoints_in, read_manifest
from .writer import (
    remove_checkpoint,
    remove_unfinished,
    sync_folder,
    write_checkpoint,
)


class CheckpointFolder:
    """Puts the checkpoints of one run into a folder, and removes those not to be kept.

    Args:
        folder: made if it is not there.
        run_id: checkpoints of other runs are left alone.
        keep_last: keep the last so many; None for all.
        keep_best: (number, "min" or "max"): keep the one where it is best, too.

    Raises:
        RuntimeError: another run of this process writes there.
        OSError: nothing can be written there.
    """

    _in_use: ClassVar[dict[Path, CheckpointFolder]] = {}

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
        self._metrics: dict[Path, Mapping[str, Any]] = {}  # of our checkpoints, the last one last
        new = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        for path in new:
            sync_folder(path.parent)
        self._place = folder.resolve()  # the working directory may change
        other = self._in_use.setdefault(self._place, self)
        if other is not self:
            raise RuntimeError(f"run {other.run_id} writes its checkpoints into {folder}, too")
        try:
            remove_unfinished(folder)
            _try_to_write(folder)
            for path in checkpoints_in(folder):
                self._find(path)
        except BaseException:
            self.close()
            raise

    def _find(self, path: Path) -> None:
        try:
            manifest = read_manifest(path)
        except CheckpointError as exc:
            structlog.get_logger("eventrain").warning(
                "checkpoint_damaged", path=str(path), error=str(exc)
            )
            return
        if manifest["run_id"] == self.run_id:
            self._metrics[path] = manifest["metrics"]

    @property
    def last(self) -> Path | None:
        """The last checkpoint of this run."""
        return next(reversed(self._metrics), None)

    @property
    def best(self) -> Path | None:
        """The one with the best number, the first of equals; None without one."""
        if self.keep_best is None:
            return None
        name, mode = self.keep_best
        numbers = {
            path: number
            for path, metrics in self._metrics.items()
            if (number := metrics.get(name)) is not None
        }
        return (min if mode == "min" else max)(numbers, key=numbers.__getitem__, default=None)

    def put(self, position: Position, metrics: Mapping[str, Any], state: Any) -> None:
        """Write a checkpoint, then remove what is not to be kept.

        Raises:
            OSError: what the system says; those that are there stay.
            ValueError: `keep_best` is a number that is not among the metrics.
        """
        numbers = {
            name: float(value) if math.isfinite(value) else None
            for name, value in metrics.items()
            if isinstance(value, Real)
        }
        path = write_checkpoint(self.folder, self.run_id, position, numbers, state)
        self._metrics[path] = numbers
        if self.keep_best is not None and metrics and self.keep_best[0] not in numbers:
            raise ValueError(
                f"keep_best={self.keep_best!r}: there is no number {self.keep_best[0]!r} of an"
                f" epoch, but {', '.join(numbers) or 'none'}"
            )
        if self.keep_last is not None:
            kept = {*list(self._metrics)[-self.keep_last :], self.best}
            for old in [old for old in self._metrics if old not in kept]:
                remove_checkpoint(old)
                del self._metrics[old]

    def close(self) -> None:
        """Others may write there."""
        self._in_use.pop(self._place, None)


def _try_to_write(folder: Path) -> None:
    probe = folder / ".unfinished-probe"
    probe.mkdir()
    sync_folder(folder)
    probe.rmdir()

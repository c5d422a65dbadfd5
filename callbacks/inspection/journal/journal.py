"""A journal of a run: one line per event, so that two runs can be compared."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ....engine.checkpoint.random_state import random_state
from ....events import (
    AfterBatch,
    AfterEpoch,
    BatchEvent,
    BeforeFit,
    Callback,
    CleanupEpoch,
    CleanupFit,
    EpochEvent,
    Event,
    ScopeEnd,
    StepEvent,
)
from ..._checks import check_int
from ..._purpose import is_training
from ._digest import digest

# The keys of a line, which `compare_runs` also uses.
PLACE = ("event", "epoch", "phase", "iter")
END = ("status", "who", "reason")
DIGESTS = {  # in the order in which a difference propagates
    "random": "the random states",
    "batch": "the batch",
    "loss": "the loss",
    "weights": "the weights",
    "optimizer": "the optimizer's state",
}


class JournalCB(Callback):
    """Writes a line of JSON for every event of a training; `compare_runs` compares such files.

    A line has the event and its place (epochs and batches count from 0), how a scope ended, and
    the exact metrics of an epoch. The lines of BeforeFit and AfterEpoch also have digests of the
    random states (Python, numpy, torch, devices in use, generators of the loaders), the weights
    and the optimizer's state. So does every n-th AfterBatch, training and validating batches
    counted together, with digests of the batch and the loss. An event that another callback
    cancelled has no line; the line for the end of the cancelled scope says so.

    It holds no times and no run id: identical runs have identical journals, to the byte. A fit
    overwrites the file. A fit that resumes from a checkpoint continues it from the place at which
    that was saved, so that the result is the journal of an uninterrupted run. `validate`,
    `get_preds` and `lr_find` do not write. An instance serves one fit at a time.

    It runs after all other callbacks, and changes nothing. For digests the host waits for the
    device; they take about 2 ms, and a second per gigabyte of weights, optimizer state and batch.
    The rest costs about 10 us per event, and 650 bytes per training batch.

    Args:
        path: the file, in a folder that exists.
        every: digest after every n-th batch; 1 finds the exact batch in which two runs diverge.

    Raises:
        ValueError: `every` is not a positive integer.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from eventrain.callbacks import JournalCB, compare_runs
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> def fit(path, lr):
        ...     _ = torch.manual_seed(0)
        ...     learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), lr=lr)
        ...     _ = learner.run(1, valid=False, cbs=JournalCB(path, every=1))
        ...     return path
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     one, two, three = (Path(folder, name) for name in ("one", "two", "three"))
        ...     print(compare_runs(fit(one, lr=0.1), fit(two, lr=0.1)))
        ...     print(compare_runs(one, fit(three, lr=0.2)))
        None
        at line 1, BeforeFit, these differ: the optimizer's state (... and ...); these are equal:
        the random states, the weights
    """

    order: float = math.inf  # a line has what the other callbacks have changed
    in_extra_validation = False

    def __init__(self, path: str | os.PathLike[str], every: int = 100) -> None:
        self.path = Path(path)
        self.every = check_int("every", every, "a number of batches, 1 for all of them")
        self._learner: Any = None  # the one whose fit is written
        self._file: BinaryIO | None = None
        self._size: int | None = None  # of the file, in bytes; None where nothing is written
        self._batches = 0

    def event(self, event: Event) -> None:
        if isinstance(event, BeforeFit) or self._learner is None:  # there may be no BeforeFit
            self._begin(event.learner)
        if event.learner is not self._learner:
            return
        try:
            if self._size is not None:
                self._write(event)
        finally:
            if isinstance(event, CleanupFit):
                self._end()

    def _begin(self, learner: Any) -> None:
        self._end()
        self._learner = learner
        # The file already has the events of a resumed fit up to the loading of its state.
        resumed = learner.resumed_from is not None
        if is_training(learner) and not resumed:
            self._size = self._batches = 0

    def _end(self) -> None:
        file, self._file, self._size, self._learner = self._file, None, None, None
        if file is not None:
            file.close()

    def _open(self) -> BinaryIO:
        size, self._size = self._size, None  # for the case that it fails
        if not self.path.parent.is_dir():
            raise FileNotFoundError(
                f"the journal {self.path} cannot be written: create the folder {self.path.parent}"
            )
        self._file = file = open(self.path, "r+b" if size else "wb")  # noqa: SIM115  # by _end
        file.truncate(size)
        file.seek(size or 0)
        self._size = size
        return file

    def _write(self, event: Event) -> None:
        file = self._file or self._open()
        line: dict[str, Any] = {"event": type(event).__name__}
        if isinstance(event, EpochEvent | BatchEvent | StepEvent):
            line |= {"epoch": event.epoch, "phase": event.phase}
        if isinstance(event, BatchEvent | StepEvent):
            line["iter"] = event.iter
        if isinstance(end := getattr(event, "end", None), ScopeEnd):
            line |= {key: _exact(getattr(end, key)) for key in END}
        if isinstance(event, CleanupEpoch):
            line["metrics"] = _exact(event.metrics)
        digests = self._digests(event)
        text = json.dumps(line | digests, separators=(",", ":")).encode() + b"\n"
        self._size = (self._size or 0) + file.write(text)
        if digests:
            file.flush()

    def _digests(self, event: Event) -> dict[str, str]:
        learner = event.learner
        parts: dict[str, Any] = {}
        if isinstance(event, AfterBatch):
            self._batches += 1
            if self._batches % self.every:
                return {}
            parts = {"batch": learner.batch, "loss": learner.loss}
        elif not isinstance(event, BeforeFit | AfterEpoch):
            return {}
        opt = learner.opt.state_dict() if hasattr(learner.opt, "state_dict") else None
        parts |= {"weights": learner.model.state_dict(), "optimizer": opt}
        parts["random"] = random_state(learner.dls)
        # The host waits for the device here.
        return {key: digest(parts[key]) for key in DIGESTS if key in parts}

    def state_dict(self) -> dict[str, Any]:
        """The length of the journal."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())  # a checkpoint survives a power failure, so this must too
        return {"size": self._size, "batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; in a resumed fit, truncate the file to that length.

        Raises:
            ValueError: the file is missing, or shorter than it was.
        """
        size = state["size"]
        if self._learner is not None and size is not None:
            there = self.path.stat().st_size if self.path.exists() else 0
            if there < size:
                has = f"has {there} bytes" if there else "is missing or empty (0 bytes)"
                raise ValueError(
                    f"the journal {self.path} {has}, and had {size} when the checkpoint was"
                    " saved: restore the file that this run wrote"
                )
        self._size, self._batches = size, state["batches"]


def _exact(value: Any) -> Any:
    """As JSON that differs if any bit differs."""
    if isinstance(value, Mapping):
        return {str(key): _exact(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(item) for item in value]
    if hasattr(value, "tolist"):  # a tensor or a numpy number; the host waits for the device here
        return _exact(value.tolist())
    if value is None or isinstance(value, int) or (isinstance(value, float) and value - value == 0):
        return value
    # Text, also for NaN. The address of an object in memory is not a part of the run.
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))

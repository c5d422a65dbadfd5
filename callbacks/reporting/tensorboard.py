"""The run as TensorBoard scalars, one folder per fit."""

from __future__ import annotations

import os
import re
import weakref
from collections import deque
from collections.abc import Callable
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import anyio
import anyio.to_thread

from ...engine.imports import import_large
from ...events import AfterBatch, AfterValidation, Callback, CleanupEpoch, Event, Watcher
from .._checks import check_installed
from ._not_reported import NotReported
from ._sampling import check_sampling
from ._tensorboard_files import event_files, purge_steps, remove_epochs
from .jsonable import numbers
from .records import RecordCB, RecordWatcher, take_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 5
"""Seconds between flushes of the files; TensorBoard reads them as often."""


class TensorBoardCB(Callback):
    """Writes batches and epochs as scalars for TensorBoard.

    It observes: on the host's event loop, numbers are put into a queue (about 10 us per number),
    and a thread of the writer writes them to the disk. Files are created at the start of a fit
    and closed at its end, however it ends, in a worker thread.

    | tag | step |
    |---|---|
    | `batch/loss`, `batch/lr`, `batch/samples_per_second` | training batches of the fit, from 0 |
    | `batch/lr/0`, `batch/lr/1`, ...: those of all parameter groups, if several | the same |
    | `loss/train`, `loss/valid`, `accuracy/valid`, ... | the epoch, from 0 |
    | `clean/loss`, ... of a `ValidateCB(name="clean")` | the training batch after which it was |

    For an epoch that was completed, each number that callbacks such as `MetricsCB` recorded is
    written; lists, strings, graphs, histograms and images are not. NaN and infinities are kept, and
    all numbers have single precision. Wall times are the times at which the events were emitted.

    The step of a batch is `epoch * n_iter + iter`. If a loader has no length, or a shorter one than
    before, the count of batches is continued.

    A fit that trains takes the place of what its folder has from an earlier one of the same
    `run_id`, from its own first step and epoch on: a run that was killed after its last checkpoint
    and resumed does not go back in time. `validate`, `get_preds` and `lr_find` write nothing.

    Args:
        log_dir: the folder for `tensorboard --logdir`. Each fit has a folder in it, named by its
            `run_id`. If that is not a plain name (letters, digits, "_", and "-" and "." in
            between), other characters become "_" and a digest is added, so the folder is always
            inside `log_dir`.
        every: write every n-th training batch; 0 for none.
        every_seconds: leave out batches within this many seconds of the last one written.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError: `log_dir` is not a path.
        ValueError: `log_dir` is empty or a file; `every` or `every_seconds` is negative.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from eventrain.callbacks import TensorBoardCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
        >>> with tempfile.TemporaryDirectory() as log_dir:
        ...     result = learner.run(1, valid=False, cbs=TensorBoardCB(log_dir), run_id="first")
        ...     for file in Path(log_dir).rglob("*"):
        ...         print(file.relative_to(log_dir).as_posix())
        first
        first/events.out.tfevents...
    """

    observes = RecordCB.observes
    buffer = RecordCB.buffer

    def __init__(
        self, log_dir: str | os.PathLike[str], *, every: int = 10, every_seconds: float = 0
    ) -> None:
        check_sampling(every, every_seconds)
        self.log_dir = _checked(log_dir)
        self.every = every
        self.every_seconds = every_seconds
        check_installed("TensorBoardCB", "tensorboard", "tensorboard")
        self._fits: WeakSet[_FitFiles] = WeakSet()

    def watcher(self, event: Event) -> Watcher:
        """The object that writes the files of one fit."""
        if event.purpose != "fit":
            return NotReported()
        fit = _FitFiles(self, event)
        self._fits.add(fit)
        return fit

    def close(self) -> None:
        """Flush and close all files, and end the threads of the writers.

        This happens by itself at the end of a fit, and when the observer fails or is detached.
        Closing again is harmless.
        """
        for fit in list(self._fits):
            fit.close_files()


class _FitFiles(RecordWatcher):
    """The files of one fit, and the steps of its batches."""

    def __init__(self, callback: TensorBoardCB, event: Event) -> None:
        super().__init__(callback.every, callback.every_seconds)
        self._folder = os.path.join(callback.log_dir, _folder(event.run_id))
        self._replaces = event.learner.trains
        self._earlier: list[Path] | None = None  # the files of earlier fits of this run
        self._first_step: int | None = None  # of this fit, until the earlier ones are purged
        self._first_steps: dict[int, int] = {}  # the step of the first batch, by epoch
        self._next_step = 0
        self._step = 0
        self._validation_steps: deque[tuple[Event, int]] = deque()
        self._replaced: set[str] = set()  # the phases whose epochs have been
        self._writer: SummaryWriter | None = None
        self._close: Callable[[], object] | None = None

    def wants(self, event: Event) -> bool:
        if isinstance(event, AfterBatch) and event.training:
            first = self._first_steps.get(event.epoch)
            if first is None:
                first = self._first_step_of(event)
                if not self._first_steps:
                    self._first_step = first + event.iter
                self._first_steps[event.epoch] = first
            self._next_step = first + event.iter + 1
        if isinstance(event, AfterValidation):
            done = event.learner.progress[True].batches
            self._validation_steps.append((event, max(self._next_step, done) - 1))
        return super().wants(event)

    def _first_step_of(self, event: AfterBatch) -> int:
        """The step of the first batch of an epoch; those before a checkpoint count as well."""
        before = event.learner.progress[True].batches - event.iter
        return max(self._next_step, before, event.epoch * (event.n_iter or 0))

    async def observe(self, event: Event) -> None:
        if self._writer is None:
            await _in_thread(self._open)
        if self._earlier:
            await self._replace(event, self._earlier)
        if isinstance(event, AfterBatch):
            self._step = self._first_steps[event.epoch] + event.iter
        elif isinstance(event, AfterValidation):
            self._step = take_of(self._validation_steps, event)
        waiting = super().observe(event)
        if waiting is not None:  # for the loss, which is not there yet
            await waiting

    async def _replace(self, event: Event, earlier: list[Path]) -> None:
        """Take the place of what earlier fits have written of this step or epoch and later."""
        if self._first_step is not None:
            assert self._writer is not None
            purge_steps(self._writer, self._first_step)
            self._first_step = None
        if isinstance(event, CleanupEpoch) and event.phase not in self._replaced:
            self._replaced.add(event.phase)
            await _in_thread(partial(remove_epochs, earlier, event.phase, event.epoch))

    async def close(self) -> None:
        await _in_thread(self.close_files)

    def _open(self) -> None:
        writer_class = import_large("torch.utils.tensorboard").SummaryWriter
        if self._earlier is None:
            self._earlier = event_files(self._folder) if self._replaces else []
        # The queue has no bound: a full one would block the host's event loop.
        writer = self._writer = writer_class(self._folder, max_queue=0, flush_secs=FLUSH_SECONDS)
        self._close = weakref.finalize(self, writer.close)

    def close_files(self) -> None:
        self._writer = None
        if self._close is not None:
            self._close()

    def write(self, record: dict[str, Any]) -> None:
        """Queue the numbers of a record for the files."""
        if record["event"] == "batch":
            step, found = self._step, numbers(record)
            keys = ("loss", "lr", "samples_per_second")
            scalars = {f"batch/{key}": found[key] for key in keys if key in found}
            for i, lr in enumerate(record.get("lrs", ())):
                scalars |= {} if lr is None else {f"batch/lr/{i}": lr}
        elif record["event"] == "epoch" and record["all_read"]:
            step, phase = record["epoch"], record["phase"]
            found = numbers(record, "metrics")
            scalars = {f"{name}/{phase}": value for name, value in found.items()}
        elif record["event"] == "validation":
            step, found = self._step, numbers(record, "metrics")
            scalars = {f"{record['name']}/{name}": value for name, value in found.items()}
        else:
            return
        assert self._writer is not None
        walltime = datetime.fromisoformat(record["timestamp"]).timestamp()
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step, walltime)


async def _in_thread(function: Callable[[], None]) -> None:
    # With a limiter of its own: all threads of the host's default limiter may be in use for long.
    await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))


def _checked(log_dir: Any) -> str:
    path = os.fspath(log_dir)
    if not isinstance(path, str):
        raise TypeError(f"log_dir={log_dir!r}: give a path as str")
    if not path:
        raise ValueError("log_dir='': give the folder for `tensorboard --logdir`")
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"log_dir={path!r} is not a folder")
    return path


def _folder(run_id: str) -> str:
    """A folder name for any text: never hidden, never a parent, and unique to the text."""
    if re.fullmatch(r"\w([\w.-]{0,98}\w)?", run_id, re.ASCII):
        return run_id
    digest = sha256(run_id.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^a-zA-Z0-9_-]', '_', run_id)[:80]}-{digest}"

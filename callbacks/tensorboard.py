"""The run as TensorBoard scalars, one folder a fit."""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import anyio
import anyio.to_thread

from ..events import AfterBatch, BeforeFit, CleanupFit, Event
from .records import RecordCB, numbers

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FLUSH_SECONDS = 5
"""Seconds after which what was written can be seen; as often as TensorBoard looks."""


class TensorBoardCB(RecordCB):
    """Writes batches and epochs as scalars for TensorBoard.

    It observes: what is written on the host's event loop goes into a queue (about 10 us a
    number); a thread of the writer's own brings it to the disk. Files are made at the start
    of a fit and closed at its end, however it ends, in a worker thread.

    | tag | step |
    |---|---|
    | `batch/loss`, `batch/lr`, `batch/samples_per_second` | training batches of the fit, from 0 |
    | `loss/train`, `loss/valid`, `accuracy/valid`, ... | the epoch, from 0 |

    Written for an epoch is each number that callbacks such as `MetricsCB` recorded in it; not
    lists and texts, and no graphs, histograms or images. NaN and the infinities are kept, and
    all numbers have single precision. Wall times are when the event was emitted.

    The step of a batch is `epoch * n_iter + iter`. Where a loader has no length, or a shorter
    one than before, the batches are counted on. An instance watches one fit at a time.

    Args:
        log_dir: the folder for `tensorboard --logdir`. Each fit gets one in it, named by its
            `run_id`. An id that makes no plain name (of letters, digits, "_", and "-" and "."
            in between) gets "_" for the rest and a digest, and never leaves `log_dir`.
        every: write every n-th training batch; 0 for none.
        every_seconds: and not before this many seconds after the last one written.

    Raises:
        ImportError: tensorboard is not installed.
        TypeError: `log_dir` is no path.
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

    def __init__(
        self, log_dir: str | os.PathLike[str], *, every: int = 10, every_seconds: float = 0
    ) -> None:
        super().__init__(every, every_seconds)
        self.log_dir = _checked(log_dir)
        _summary_writer()
        self._writer: SummaryWriter | None = None
        self._run_id: str | None = None
        self._close_writer: Callable[[], object] | None = None
        self._first: dict[int, int] = {}  # the step of an epoch's first batch
        self._next = 0
        self._step = 0

    def wants(self, event: Event) -> bool:
        """All but the batches between those that get a record; these are counted here."""
        if isinstance(event, BeforeFit):
            self._first.clear()
            self._next = 0
        elif isinstance(event, AfterBatch) and event.training:
            first = self._first.get(event.epoch)
            if first is None:
                first = max(self._next, event.epoch * (event.n_iter or 0))
                self._first[event.epoch] = first
            self._next = first + event.iter + 1
        return super().wants(event)

    async def observe(self, event: Event) -> None:  # type: ignore[override]  # it may be async
        """Write an event."""
        try:
            if event.run_id != self._run_id:
                await _in_thread(partial(self._open, event.run_id))
            if isinstance(event, AfterBatch):
                self._step = self._first[event.epoch] + event.iter
            super().observe(event)
            if isinstance(event, CleanupFit):
                await _in_thread(self.close)
        except BaseException:
            with suppress(Exception):  # the first error is the one to tell
                self.close()
            raise

    def write(self, record: dict[str, Any]) -> None:
        """Queue the numbers of a record for the files."""
        assert self._writer is not None  # `observe` has opened it
        if record["event"] == "batch":
            step, found = self._step, numbers(record)
            keys = ("loss", "lr", "samples_per_second")
            scalars = {f"batch/{key}": found[key] for key in keys if key in found}
        elif record["event"] == "epoch":
            step, phase = record["epoch"], record["phase"]
            found = numbers(record, "metrics")
            scalars = {f"{name}/{phase}": value for name, value in found.items()}
        else:
            return
        walltime = datetime.fromisoformat(record["timestamp"]).timestamp()
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step, walltime)

    def close(self) -> None:
        """Bring all to the disk, close the file and end the writer's thread.

        The end of the fit does; so does an observer that fails, the next fit, and the end of
        this object. Again is harmless.
        """
        self._writer = self._run_id = None
        if self._close_writer is not None:
            self._close_writer()

    def _open(self, run_id: str) -> None:
        self.close()  # one whose fit ended without our hearing of it
        folder = os.path.join(self.log_dir, _folder(run_id))
        # The queue has no bound: a full one would hold up the host's event loop.
        writer = _summary_writer()(folder, max_queue=0, flush_secs=FLUSH_SECONDS)
        self._close_writer = weakref.finalize(self, writer.close)
        self._writer, self._run_id = writer, run_id


async def _in_thread(function: Callable[[], None]) -> None:
    # With a limiter of its own: the host's may have no thread to spare for long.
    await anyio.to_thread.run_sync(function, limiter=anyio.CapacityLimiter(1))


def _summary_writer() -> type[SummaryWriter]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise ImportError(
            "TensorBoardCB needs tensorboard: pip install 'eventrain[tensorboard]'"
        ) from exc
    return SummaryWriter


def _checked(log_dir: Any) -> str:
    path = os.fspath(log_dir)
    if not isinstance(path, str):
        raise TypeError(f"log_dir={log_dir!r}: give a path as text")
    if not path:
        raise ValueError("log_dir='': give the folder that TensorBoard is to show")
    if os.path.exists(path) and not os.path.isdir(path):
        raise ValueError(f"log_dir={path!r} is no folder")
    return path


def _folder(run_id: str) -> str:
    """A folder's name for any text: never hidden, a parent, or shared by two."""
    if re.fullmatch(r"\w([\w.-]{0,98}\w)?", run_id, re.ASCII):
        return run_id
    digest = sha256(run_id.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{re.sub(r'[^a-zA-Z0-9_-]', '_', run_id)[:80]}-{digest}"

"""The state of the loop: its position, and the objects that it works on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ...events import Bus, ScopeEnd
from ...events.learner import Purpose
from ...events.signal import AsyncWrapper
from ...events.types import numbers_of
from ..data.batch_size import size_of
from .requests import OpenScope, Requests

COMPLETED = ScopeEnd("completed")
_SEQUENCES = (tuple, list)


@dataclass(frozen=True, slots=True)
class Position:
    """A position between two batches of a fit.

    Attributes:
        epoch: the index of the epoch, from 0.
        training: True in the training part of the epoch, False in its validation part.
        batches: the number of batches of that part that are completed.
    """

    epoch: int = 0
    training: bool = True
    batches: int = 0

    def is_beyond(self, epoch: int, training: bool) -> bool:
        """Whether that part of that epoch is completed."""
        return (epoch, not training) < (self.epoch, not self.training)

    def is_within(self, epoch: int, training: bool) -> bool:
        """Whether the position is in that part of that epoch, after its first batch."""
        return self.batches > 0 and (epoch, training) == (self.epoch, self.training)


@dataclass(slots=True)
class Progress:
    """How much of a fit is completed, in training or in validation.

    In a resumed fit, the part before the checkpoint is included.

    Attributes:
        epochs: epochs completed.
        batches: batches completed.
        steps: optimizer steps taken, including the one whose AfterStep is being sent; skipped and
            accumulated steps do not count. Where a learner steps several optimizers on their own,
            with `update`, these are the steps of the first one.
    """

    epochs: int = 0
    batches: int = 0
    steps: int = 0


class AnyBatchReader(Protocol):
    """Reads the batches of one fit; see `reading.BatchReader`."""

    first_epoch: int
    guess: str | None

    def begin(self, loop: LoopState) -> None: ...

    def includes(self, epoch: int, training: bool) -> bool: ...

    def read(self, loop: LoopState) -> Iterator[int]: ...

    def end(self) -> None: ...

    def note_guess(self, loop: LoopState, size: int, why: str) -> None: ...


class LoopState:
    """The state of the loop: the attributes that every batch needs, in slots.

    If an instance's `__dict__` has more than thirty attributes, CPython 3.11 looks up all of its
    attributes and methods without its caches, which takes 2 us per batch.
    """

    __slots__ = (
        "all_read",
        "async_wrapper",
        "batch",
        "batch_reader",
        "bus",
        "cleaning_up",
        "dl",
        "dls",
        "done",
        "epoch",
        "epoch_length",
        "fitting",
        "graceful_stop_due",
        "gradients_pending",
        "history",
        "in_extra_validation",
        "innermost_scope",
        "iter",
        "lengths",
        "loss",
        "max_steps",
        "model",
        "n_epochs",
        "n_iter",
        "n_samples",
        "n_steps",
        "opt",
        "outer_continues",
        "pending_requests",
        "preds",
        "progress",
        "purpose",
        "record",
        "run_id",
        "scope_end",
        "signals",
        "step_counts",
        "step_lrs",
        "trained_parameters",
        "training",
        "training_thread",
        "trains",
        "updated",
        "updating",
        "valid_length",
        "validates",
        "wants_closure",
        "without_receivers",
    )

    model: torch.nn.Module
    dls: Any
    """An object with the loaders, `train` and `valid`."""
    dl: Any
    """The loader of the current epoch."""
    opt: Any
    batch: Any
    preds: Any
    loss: Any

    n_epochs: int | None
    """The number of epochs that were requested; None if `max_steps` alone ends the fit."""
    max_steps: int | None
    """The number of optimizer steps after which the fit ends; None for no limit."""
    epoch_length: int | None
    """The number of batches in a training epoch; None for one pass over the loader."""
    valid_length: int | None
    """The most batches in a validation epoch; None for all."""
    n_steps: int | None
    """The number of optimizer steps that the fit will take, if none is skipped; None if it is not
    known."""
    trains: bool
    validates: bool
    purpose: Purpose
    batch_reader: AnyBatchReader
    history: list[dict[str, Any]]
    progress: dict[bool, Progress]
    """What is completed in training (True) and in validation (False)."""

    epoch: int
    iter: int
    n_iter: int | None
    """The number of batches in the epoch as the loader tells it; None if it cannot, or once there
    have been more."""
    n_samples: int
    lengths: dict[bool, tuple[Any, int | None]]
    """The loaders of training (True) and validation (False) whose lengths are known before the
    fit, until their first epoch begins."""
    all_read: bool
    """Whether the loader of the current epoch is exhausted."""
    training: bool
    trained_parameters: Sequence[tuple[str, torch.Tensor]]
    """Until BeforeFit has been sent: the model's parameters that its optimizer has, by name."""
    step_counts: bool
    """Whether `done.steps` counts the step: with several optimizers, those of the first alone."""
    step_lrs: tuple[Any, ...] | None
    """The learning rates of all groups that the step of this batch uses; None before."""
    wants_closure: bool
    """Whether the step of the optimizer is given a closure."""
    updated: bool | None
    """Whether `update` has been called in this batch."""
    updating: str | None
    """The name of the optimizer whose update is being done; None for all, and outside of one."""
    gradients_pending: bool | list[str]
    """Whether there has been a backward pass since the last ZeroGrad; in updates, the names of the
    optimizers for whose gradients that is so."""
    in_extra_validation: bool
    """Whether the current epoch is an extra validation, within an epoch of the fit."""
    record: dict[str, Any]
    """The values recorded in this epoch: a row of the history, to which receivers may add."""
    done: Progress
    """The progress of the current phase."""

    outer_continues: bool
    """For Cleanup* receivers: whether this scope was completed, or left by its own cancel."""
    graceful_stop_due: bool
    """For Cleanup* receivers: whether a graceful `stop` takes effect when they have returned."""
    scope_end: ScopeEnd
    """How the scope that is being left has ended; after the fit, how the fit ended."""
    innermost_scope: OpenScope | None
    cleaning_up: bool
    """Whether a Cleanup* event is being sent: requests wait until its receivers have returned."""

    run_id: str
    fitting: bool
    """Whether a fit is running."""
    pending_requests: Requests
    training_thread: int | None
    """The identifier of the thread that runs the current fit, or ran the last one."""
    async_wrapper: AsyncWrapper | None
    """Lets the training thread wait for an async receiver; None while no fit is running."""

    def __init__(self, bus: Bus | None, reader: AnyBatchReader) -> None:
        self.bus = Bus() if bus is None else bus
        self.signals = self.bus.signals_of(self)
        self.without_receivers = self.signals.without_receivers
        self.pending_requests = Requests()
        self.run_id = ""
        self.fitting = False
        self.training_thread = None
        self.async_wrapper = None
        self.dl = self.opt = None
        self.batch = self.preds = self.loss = None
        self.n_iter = self.step_lrs = None
        self.lengths = {}
        self.all_read = self.training = self.gradients_pending = self.in_extra_validation = False
        self.updated, self.updating, self.step_counts = False, None, True
        self.wants_closure = False
        self.record = {}
        self.innermost_scope = None
        self.cleaning_up = False
        self.outer_continues = True
        self.graceful_stop_due = False
        self.begin_fit(reader)

    def batch_size(self, batch: Any) -> int:
        """The number of samples in a batch: override it if yours are counted in another way.

        It weighs the batch in the mean loss and counts `n_samples`, and `get_preds` tells by it
        whether a list holds samples. By default, the parts of a batch are its columns: their
        length is counted, or the number of items in a list of samples that are not collated, of
        sequences in a PackedSequence, and of graphs in a batch of torch_geometric or DGL. Where
        that may be wrong, "batch_size_is_a_guess" is logged, once per fit.

        Args:
            batch: a batch as the loader yields it, or as callbacks have changed it.

        Example:
            >>> from eventrain.engine import TrainLearner
            >>> class Tokens(TrainLearner):
            ...     def batch_size(self, batch):
            ...         return int(batch["mask"].sum())
        """
        if type(batch) in _SEQUENCES and len(batch) == 2:
            x, y = batch
            if type(x) is torch.Tensor and type(y) is torch.Tensor:
                # The usual case takes a third of the time here. A scalar and a nested tensor raise.
                try:
                    if (n := x.shape[0]) == y.shape[0]:
                        return n
                except (IndexError, RuntimeError):
                    pass
        size, guess = size_of(batch)
        if guess is not None:
            self.batch_reader.note_guess(self, size, guess)
        return size

    def measured(self) -> dict[str, Any]:
        """What has been measured in the current epoch so far; asked when it is cut short."""
        return {}

    def record_cut_epoch(self, status: str) -> None:
        """Record what has been measured and, unless all batches were read, how the epoch ended."""
        self.record.update(self.measured())
        if not self.all_read and numbers_of(self.record):
            self.record["status"] = status

    def begin_fit(
        self,
        reader: AnyBatchReader,
        *,
        n_epochs: int | None = 0,
        max_steps: int | None = None,
        epoch_length: int | None = None,
        valid_length: int | None = None,
        trains: bool = True,
        validates: bool = True,
        purpose: Purpose = "fit",
    ) -> None:
        """Set the state to the beginning of a new fit."""
        self.batch_reader = reader
        self.trains, self.validates = trains, validates
        self.purpose = purpose
        self.n_epochs, self.max_steps = n_epochs, max_steps
        self.epoch_length, self.valid_length = epoch_length, valid_length
        self.n_steps = None
        self.epoch = self.iter = self.n_samples = 0
        self.history = []
        self.trained_parameters = []
        self.progress = {True: Progress(), False: Progress()}
        self.done = self.progress[trains]
        self.scope_end = ScopeEnd("failed", None, "the training could not begin")

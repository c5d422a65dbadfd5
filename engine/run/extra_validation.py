"""A validation within a fit, which leaves the epoch around it as it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from ...events import Bus, Callback, CancelEpochException, CancelFitException
from ...events.learner import LearnerLike
from ...events.types import numbers_of
from ..checkpoint.generators import generator_state, is_generator, set_generator_state
from ..checkpoint.parts import SavedLearner
from ..checkpoint.random_state import all_generators, random_state, set_random_state
from ..checkpoint.search import Search
from ..data.dataloaders import DataLoaders, length_of
from ..listeners.streams import EventStream
from ..loop.reading import BatchReader, read_batches
from ..loop.state import AnyBatchReader, LoopState, Progress
from .fittable import Fittable


@dataclass(frozen=True)
class ExtraValidation:
    """What an extra validation has measured.

    Attributes:
        numbers: the loss and the metrics; None if a receiver has cut it short.
        n_samples: the number of samples.
        stopped: whether it was cut short because the fit is to be stopped gracefully.
    """

    numbers: dict[str, Any] | None
    n_samples: int
    stopped: bool


def validate_within(
    learner: LearnerLike,
    loader: Iterable[Any],
    measuring: Iterable[Callback],
    *,
    model: nn.Module | None = None,
    length: int | None = None,
    stoppable: bool = False,
) -> ExtraValidation:
    """Run a validation epoch within the running fit, from a receiver in its thread.

    The learner is used as it is, with its callbacks, for a loader and a model of its own. What
    belongs to the epoch around it is restored, the modes of all modules and the random states
    included: the training is the same to the bit as without it.

    Args:
        learner: the learner that is fitting.
        loader: the batches to validate on.
        measuring: callbacks that measure it, instead of those of the learner.
        model: the model to validate; by default the learner's.
        length: the most batches to read.
        stoppable: whether to end after the current batch if the fit is to be stopped gracefully.
    """
    loop = cast(Fittable, learner)
    reader = ExtraReader(loop.batch_reader, length, stoppable)
    with _epoch_around_kept(loop, [model or loop.model], loader):
        _begin_epoch(loop, loader, measuring, reader)
        loop.model = model or loop.model
        loop.model.eval()
        with torch.no_grad():
            loop.one_epoch()
        completed = loop.done.epochs == 1
        numbers = numbers_of(loop.record) if completed else None
        return ExtraValidation(numbers, loop.n_samples, reader.stopped)


def _begin_epoch(
    loop: Fittable, loader: Any, measuring: Iterable[Callback], reader: ExtraReader
) -> None:
    lengths = [n for n in (length_of(loader), reader.length) if n is not None]
    bus = _bus_for(loop, measuring)
    loop.signals, loop.without_receivers = bus.signals, bus.without_receivers
    loop.dls, loop.dl, loop.batch_reader = DataLoaders(valid=loader), loader, reader
    loop.purpose, loop.training, loop.in_extra_validation = "validate", False, True
    loop.progress = {True: loop.progress[True], False: Progress()}
    loop.done = loop.progress[False]
    loop.n_iter = min(lengths, default=None)
    loop.iter = loop.n_samples = 0
    loop.all_read = False
    loop.batch = loop.preds = loop.loss = loop.step_lrs = loop.updating = None
    loop.record = {"epoch": loop.epoch, "train": "eval"}


@contextmanager
def _epoch_around_kept(loop: LoopState, models: Iterable[nn.Module], loader: Any) -> Iterator[None]:
    kept = {name: getattr(loop, name) for name in _OF_THE_EPOCH_AROUND}
    modes = [(module, module.training) for model in models for module in model.modules()]
    random = random_state(loop.dls)
    search = Search(cast(SavedLearner, loop))
    # Such as a hidden state, which `predict` passes from batch to batch.
    holding = [name for holder, name in search.holders.values() if holder is loop]
    own = {name: vars(loop)[name] for name in holding if name in vars(loop)}
    found = [part.value for part in search.parts if is_generator(part.value)]
    found += all_generators(DataLoaders(valid=loader))
    own_random = [(generator, generator_state(generator)) for generator in found]
    try:
        yield
    finally:
        for name, value in {**own, **kept}.items():
            setattr(loop, name, value)
        for module, training in modes:
            module.training = training
        set_random_state(loop.dls, random)
        for generator, state in own_random:
            set_generator_state(generator, state)


_OF_THE_EPOCH_AROUND = (
    *("in_extra_validation", "purpose", "signals", "without_receivers"),
    *("batch_reader", "progress", "done"),
    *("model", "dls", "dl", "training", "n_iter", "iter", "n_samples", "all_read"),
    *("batch", "preds", "loss", "step_lrs", "updated", "updating", "record"),
)


def _bus_for(loop: LoopState, measuring: Iterable[Callback]) -> Bus:
    """A bus with the receivers that an extra validation has, in their order."""
    bus = Bus()
    for subscription in (*loop.bus.signals.held(), *loop.signals.held()):
        owner = getattr(subscription.receiver, "__self__", None)
        left_out = isinstance(owner, EventStream) or not getattr(owner, "in_extra_validation", True)
        filters = subscription.filters
        if not filters.pop("once") and not left_out:
            copy = bus.subscribe(subscription.event_type, subscription.receiver, **filters)
            copy.order, copy.key = subscription.order, subscription.key
    for callback in measuring:
        for event_type, receiver in callback.receivers(loop):
            bus.subscribe(event_type, receiver, order=callback.order)
    bus.reorder()
    return bus


def _is_to_be_stopped(loop: LoopState) -> bool:
    """Whether a graceful request waits for the end of the batch in which the validation runs."""
    requests = tuple(loop.pending_requests)
    return any(r.graceful and isinstance(r.error, CancelFitException) for r in requests)


class ExtraReader(BatchReader):
    """Reads the batches of an extra validation.

    Attributes:
        length: the most batches to read.
        stopped: whether it was ended because the fit is to be stopped gracefully.
    """

    def __init__(self, around: AnyBatchReader, length: int | None, stoppable: bool) -> None:
        self.length = length
        self.stopped = False
        self._around = around
        self._stoppable = stoppable

    def read(self, loop: LoopState) -> Iterator[int]:
        return read_batches(loop, self._until_stopped(loop))

    def _until_stopped(self, loop: LoopState) -> Iterator[Any]:
        batches = islice(loop.dl, self.length)
        while True:
            self.check_stopped(loop)
            try:
                yield next(batches)  # without a name: it would keep the batch alive
            except StopIteration:
                return

    def check_stopped(self, loop: LoopState) -> None:
        """End the validation if it may be, and the fit is to be stopped."""
        if self._stoppable and _is_to_be_stopped(loop):
            self.stopped = True
            raise CancelEpochException("the fit is to be stopped")

    def note_guess(self, loop: LoopState, size: int, why: str) -> None:
        self._around.note_guess(loop, size, why)

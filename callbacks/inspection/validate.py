"""Validation on other data, with another model, or more often than once per epoch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn

from ...engine.data.async_loader import readable
from ...engine.data.dataloaders import check_can_be_read, length_of, why_empty
from ...engine.loop.parameters import modules_of
from ...engine.run.extra_validation import validate_within
from ...events import (
    AfterBatch,
    AfterEpoch,
    AfterValidation,
    BeforeBatch,
    BeforeFit,
    Callback,
    LearnerLike,
)
from .._checks import check_int
from .._purpose import is_training
from .metrics import MetricsCB


class ValidateCB(Callback):
    """Validates on a loader of its own, within or after epochs, with the model or another one.

    It runs a validation epoch with the learner's own actions and callbacks. The training does not
    notice: modes, random states, the current batch, the metrics of the epoch around it, and tensors
    in attributes of the learner are restored. The weights are the same to the bit as without it.

    Its numbers are put into the `learner.record` of the epoch, under names such as "clean.loss",
    and so are in its `CleanupEpoch`, in the history, in logs and plots, and can be monitored by
    `EarlyStoppingCB` and `CheckpointCB(keep_best=...)`. Those of the last validation of an epoch
    are kept, in its training part and its validation part. Each one is also emitted as an
    `AfterValidation`.

    Its events have the purpose "validate". All receivers get them, except callbacks whose
    `in_extra_validation` is False, such as metrics, loggers and what stops a fit, and except
    observers. It does nothing in `validate`, `get_preds` and `lr_find`.

    Args:
        loader: the batches to validate on; it is read from its start each time.
        every_steps: validate after every n-th optimizer step, at the end of its batch.
        every_epochs: validate at the end of every n-th epoch, after its other validation. By
            default 1, without `every_steps`.
        name: the first part of the names of its numbers.
        model: the model to validate, such as an average of weights or a teacher, or a function of
            the learner that returns it; by default the learner's.
        metrics: a `MetricsCB`, or a mapping of names to metrics for one, of which every fit uses a
            copy. By default that of the learner's `MetricsCB`, or the loss alone if it has none.
        length: the most batches to read of the loader; by default all.

    Raises:
        TypeError, ValueError: an argument is not allowed; in the fit, before any work, there are
            two of the same name, or the loader cannot be read more than once.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import MetricsCB, ValidateCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches, clean = ([(torch.ones(2, 3), torch.zeros(2, 1))] * n for n in (4, 3))
        >>> cbs = [MetricsCB(), ValidateCB(clean, every_steps=2, name="clean")]
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), cbs=cbs)
        >>> sorted(learner.run(1, valid=False).history[0])
        ['clean.loss', 'epoch', 'loss', 'train']

    Source: Lightning's `val_check_interval` and its lists of validation loaders.
    """

    order: float = 100  # after what changes weights, such as averages
    in_extra_validation = False

    def __init__(
        self,
        loader: Any,
        *,
        every_steps: int | None = None,
        every_epochs: int | None = None,
        name: str = "extra",
        model: nn.Module | Callable[[LearnerLike], nn.Module] | None = None,
        metrics: MetricsCB | Mapping[str, Any] | None = None,
        length: int | None = None,
    ) -> None:
        if every_steps is not None and every_epochs is not None:
            raise ValueError(
                f"ValidateCB(every_steps={every_steps}, every_epochs={every_epochs}): give one of"
                " them, and another ValidateCB for the other"
            )
        if not isinstance(name, str) or not name or "." in name:
            raise ValueError(f"name={name!r}: give a name without a dot, such as 'clean'")
        if model is not None and not callable(model):
            raise TypeError(f"model={model!r}: give a module, or a function of the learner")
        for key, value in ("every_steps", every_steps), ("every_epochs", every_epochs):
            if value is not None:
                check_int(key, value, "a number, 1 or more")
        if length is not None:
            check_int("length", length, "a number of batches, 1 or more")
        self.loader = readable(loader)
        self.every_steps = every_steps
        self.every_epochs = 1 if every_steps is None and every_epochs is None else every_epochs
        self.name = name
        self.model = model
        self.length = length
        if metrics is not None and not isinstance(metrics, MetricsCB):
            metrics = MetricsCB(**metrics)
        self.metrics = metrics
        self._measuring: list[MetricsCB] = []
        self._done = _Done()

    def before_fit(self, event: BeforeFit) -> None:
        learner = event.learner
        self._done = _Done()
        if not is_training(learner):
            return
        others = [cb for cb in learner.cbs if isinstance(cb, ValidateCB) and cb is not self]
        if any(cb.name == self.name for cb in others):
            raise ValueError(f"two ValidateCB have the name {self.name!r}: give name=...")
        if not isinstance(self.loader, Iterable) and not hasattr(self.loader, "__getitem__"):
            raise TypeError(f"ValidateCB({self.loader!r}): give a loader, such as a DataLoader")
        if length_of(self.loader) == 0:
            raise ValueError(f"ValidateCB {self.name!r}: {why_empty(self.loader, 'valid')}")
        check_can_be_read(self.loader, False, 2, bound=False)
        self._measuring = _copies(learner, self.metrics)

    def before_batch(self, event: BeforeBatch) -> None:
        self._validate_if_due(event)  # in a resumed fit: see `_Done.owed`

    def after_batch(self, event: AfterBatch) -> None:
        self._validate_if_due(event)

    def after_epoch(self, event: AfterEpoch) -> None:
        learner = event.learner
        self._validate_if_due(event)  # a step may have been taken for the last batches
        if not is_training(learner):
            return
        if self.every_epochs is None:
            if self._done.epoch == event.epoch:
                learner.record.update(self._done.numbers)
        elif event.training != learner.validates and (event.epoch + 1) % self.every_epochs == 0:
            self._validate(learner, event.epoch)

    def _validate_if_due(self, event: BeforeBatch | AfterBatch | AfterEpoch) -> None:
        learner = event.learner
        if self.every_steps is None or not event.training or not is_training(learner):
            return
        now, done = learner.progress[True].steps // self.every_steps, self._done
        if done.owed or now > done.steps // self.every_steps:
            self._validate(learner, event.epoch)

    def _validate(self, learner: LearnerLike, epoch: int) -> None:
        start, steps = time.perf_counter(), learner.progress[True].steps
        try:
            measured = validate_within(
                learner,
                self.loader,
                self._measuring,
                model=self._model_of(learner),
                length=self.length,
                stoppable=self.every_steps is not None,
            )
        except Exception as exc:
            exc.add_note(f"raised in the validation {self.name!r} of a ValidateCB")
            raise
        self._done.steps, self._done.owed = steps, measured.stopped
        if measured.numbers is None:
            return
        self._done.epoch = epoch
        self._done.numbers = {f"{self.name}.{key}": n for key, n in measured.numbers.items()}
        learner.record.update(self._done.numbers)
        seconds = time.perf_counter() - start
        learner.emit(
            AfterValidation, self.name, measured.numbers, measured.n_samples, steps, seconds
        )

    def _model_of(self, learner: LearnerLike) -> nn.Module | None:
        if self.model is None or isinstance(self.model, nn.Module):
            return self.model
        model = self.model(learner)
        if not isinstance(model, nn.Module):
            raise TypeError(f"ValidateCB {self.name!r}: model(learner) is {model!r}, not a module")
        return model


def _copies(learner: LearnerLike, metrics: MetricsCB | None) -> list[MetricsCB]:
    """Copies of `metrics`, or of the learner's: those keep the numbers of the epoch around.

    A metric that looks at the learner or its modules looks at the same ones in its copy.
    """
    found = (
        [cb for cb in learner.cbs if isinstance(cb, MetricsCB)] if metrics is None else [metrics]
    )
    looked_at = [learner, *(part for module in modules_of(learner) for part in module.modules())]
    try:
        copies = [deepcopy(cb, {id(part): part for part in looked_at}) for cb in found]
    except Exception as exc:
        exc.add_note(
            "raised while a ValidateCB copied the metrics: give it others, ValidateCB(metrics=...),"
            " or give the metric a __deepcopy__"
        )
        raise
    for copy in copies:
        copy.history = []
    return copies or [MetricsCB()]


@dataclass
class _Done:
    """What has been done in this fit: the part of a ValidateCB that checkpoints have.

    Attributes:
        steps: the optimizer steps at the last validation.
        epoch: the epoch of the last one that was completed.
        numbers: what it has measured.
        owed: whether the last one was cut short by a graceful stop: a resumed fit repeats it.
    """

    steps: int = 0
    epoch: int = -1
    numbers: dict[str, Any] = field(default_factory=dict)
    owed: bool = False

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

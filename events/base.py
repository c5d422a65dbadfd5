"""The base classes of all events: what an event carries, and which callback method receives it."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass, field
from time import time
from typing import Any, ClassVar, Literal, Self

import torch

from .learner import LearnerLike, Purpose

HOOKS: dict[str, tuple[type[Event], ...]] = {}
"""The event classes by the name of the callback method that receives them.

A name has several classes if several packages define an event class of that name.
"""


@dataclass(frozen=True, slots=True)
class ScopeEnd:
    """How a scope ended.

    Attributes:
        status: "completed"; "cancelled" by a receiver, `stop` or the host; or "failed".
        who: the receiver that cancelled or failed, if it is known.
        reason: the reason of the cancel, or the error.
    """

    status: Literal["completed", "cancelled", "failed"]
    who: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """Base of all events: subscribe to it to receive every event except the actions.

    Attributes:
        learner: the live learner that emitted it.
        run_id: identifies the fit; shared by all of its events.
        time: when it was emitted, seconds since the epoch (`time.time()`).
        purpose: what the run is for: "fit"; or "validate", "predict" or "lr_find" in a run of
            `validate`, `get_preds` or `lr_find`, whose numbers are not those of a training.
    """

    hook: ClassVar[str]
    """The name of the callback method that receives this class of events."""
    deliver_to_all: ClassVar[bool] = False
    """Whether the remaining receivers are still called after one has raised."""

    learner: LearnerLike = field(repr=False)
    run_id: str
    time: float
    purpose: Purpose

    def __init_subclass__(cls) -> None:
        # `slots=True` makes a second class, which replaces the first. It has no qualified name
        # yet when this runs, so a class is identified by its plain name.
        cls.hook = hook_name(cls.__name__)
        if not cls.__name__.startswith("_"):
            _register(cls)

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        """Make the event for the learner's current position.

        Args:
            learner: the learner that emits it.
            extra: the fields that a subclass adds.
        """
        return cls(*cls._position(learner), *extra)

    @staticmethod
    def _position(learner: Any) -> tuple[Any, ...]:
        """The values of the fields for the learner's current position, in their order."""
        return learner, learner.run_id, time(), learner.purpose


def hook_name(class_name: str) -> str:
    """The name of the callback method for an event class.

    Example:
        >>> hook_name("BeforeBatch")
        'before_batch'
    """
    words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
    return re.sub(words, "_", class_name).lower()


def _register(cls: type[Event]) -> None:
    """Add an event class to `HOOKS`; a redefined class replaces its earlier definition."""
    others = [
        other
        for other in HOOKS.get(cls.hook, ())
        if (other.__module__, other.__name__) != (cls.__module__, cls.__name__)
    ]
    HOOKS[cls.hook] = (*others, cls)


Event.hook = hook_name(Event.__name__)
_register(Event)


@dataclass(frozen=True, slots=True, eq=False)
class FitEvent(Event):
    """Concerns the whole fit.

    Attributes:
        n_epochs: the number of epochs that were requested; None if `max_steps` alone ends the fit.
        n_steps: the number of optimizer steps that the fit will take if none is skipped; None if
            that is not known.
    """

    n_epochs: int | None
    n_steps: int | None

    @staticmethod
    def _position(learner: Any) -> tuple[Any, ...]:
        purpose, n_epochs = learner.purpose, learner.n_epochs
        return learner, learner.run_id, time(), purpose, n_epochs, learner.n_steps


@dataclass(frozen=True, slots=True, eq=False)
class _InEpoch(Event):
    n_epochs: int | None
    epoch: int
    training: bool
    n_iter: int | None

    @staticmethod
    def _position(learner: Any) -> tuple[Any, ...]:
        return (
            learner,
            learner.run_id,
            time(),
            learner.purpose,
            learner.n_epochs,
            learner.epoch,
            learner.training,
            learner.n_iter,
        )

    @property
    def phase(self) -> Literal["train", "valid"]:
        """The phase by its name: "train" while training, "valid" while validating."""
        return "train" if self.training else "valid"


@dataclass(frozen=True, slots=True, eq=False)
class EpochEvent(_InEpoch):
    """Concerns one epoch, in training or validation.

    Attributes:
        n_epochs: the number of epochs that were requested; None if `max_steps` alone ends the fit.
        epoch: the index of the epoch, from 0.
        training: True in a training epoch, False in a validation epoch.
        n_iter: the number of batches in the epoch; None if it is not known, because the loader has
            no length.
    """


def lrs_of(opt: Any) -> tuple[Any, ...]:
    """The learning rates of all groups; copies of tensors, which schedulers change in place."""
    groups = opt.param_groups
    if len(groups) == 1 and not isinstance(lr := groups[0].get("lr"), torch.Tensor):
        return (lr,)  # the usual case
    rates = [group.get("lr") for group in groups]
    return tuple([lr.clone() if isinstance(lr, torch.Tensor) else lr for lr in rates])


@dataclass(frozen=True, slots=True, eq=False)
class _InBatch(_InEpoch):
    iter: int
    n_samples: int
    steps: int
    lr: float | torch.Tensor | None
    lrs: tuple[float | torch.Tensor | None, ...]
    loss: torch.Tensor | None
    opt: str | None

    @staticmethod
    def _position(learner: Any) -> tuple[Any, ...]:
        lrs = learner.step_lrs
        if lrs is None:
            lrs = () if learner.opt is None else lrs_of(learner.opt)
        loss = learner.loss
        return (
            learner,
            learner.run_id,
            time(),
            learner.purpose,
            learner.n_epochs,
            learner.epoch,
            learner.training,
            learner.n_iter,
            learner.iter,
            learner.n_samples,
            learner.progress[True].steps,
            lrs[0] if lrs else None,
            lrs,
            loss.detach() if isinstance(loss, torch.Tensor) else None,
            learner.updating,
        )


@dataclass(frozen=True, slots=True, eq=False)
class BatchEvent(_InBatch):
    """Concerns one batch. In addition to the fields of an `EpochEvent`:

    Attributes:
        iter: the index of the batch in the epoch, from 0.
        n_samples: samples seen in this epoch so far, including this batch.
        steps: optimizer steps taken in the fit so far, also before its checkpoint.
        lr: the learning rate of the first parameter group, None without an optimizer. After the
            optimizer has stepped in this batch, it is the rate that the step used, even if a
            scheduler has set the next one.
        lrs: those of all parameter groups.
        loss: the loss of this batch, detached, on its device; None before `GetLoss`. Reading
            its value (`.item()`, `float`) makes the host wait for the device.
        opt: in `learner.update(loss, "D")`, the name of its optimizer; otherwise None.
    """


@dataclass(frozen=True, slots=True, eq=False)
class StepEvent(_InBatch):
    """Concerns one optimizer step; the fields are those of a `BatchEvent`."""


@dataclass(frozen=True, slots=True, eq=False)
class ActionEvent(_InEpoch):
    """A request to do one part of a batch.

    Its receivers perform it in their order: one that calls `proceed` wraps the next, one that does
    not takes the action over. The last in this chain is the learner's own method.

    Attributes:
        iter: the index of the batch in the epoch, from 0; the other fields are those of an
            `EpochEvent`.
        following: the receivers that come after the one that gets this event.
    """

    iter: int
    following: tuple[Any, ...] = field(repr=False)

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        return cls(*cls._position(learner), *(extra or ((),)))

    @staticmethod
    def _position(learner: Any) -> tuple[Any, ...]:
        return (*_InEpoch._position(learner), learner.iter)

    def proceed(self) -> None:
        """Have the next receiver perform this action, or else the learner's own method.

        Call it in the training thread, so not from an `async def`.

        Raises:
            RuntimeError: it is called in another thread, which would then do the training's work.
            TypeError: nobody comes next, and the learner has no method for this action.

        Example:
            >>> import torch
            >>> from eventrain.engine import DataLoaders, TrainLearner
            >>> from eventrain.events import Step
            >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 2
            >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
            >>> @learner.on(Step)
            ... def around(event):
            ...     print("before step", event.iter)
            ...     event.proceed()
            ...     print("after step", event.iter)
            >>> learner.run(1, valid=False).steps
            before step 0
            after step 0
            before step 1
            after step 1
            2
        """
        if threading.get_ident() != self.learner.training_thread:
            raise RuntimeError(
                f"{type(self).__name__}.proceed() was called outside of the training thread: call"
                " it from a plain receiver, not from an `async def`, which the event loop runs"
            )
        self.learner.perform(type(self), self.following)

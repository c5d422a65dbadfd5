"""The events: what happened, where in the run, and how the scope ended.

Each is a frozen, slotted dataclass. Its light data is a snapshot, safe to keep and to read
from any thread; `learner` is the live object, which ordered receivers may read and change.
No event holds a batch, predictions or a graph, so a buffer full of events holds no memory
of a step.

    Event
    ├── FitEvent      BeforeFit    AfterFit     CleanupFit
    ├── EpochEvent    BeforeEpoch  AfterEpoch   CleanupEpoch
    ├── BatchEvent    BeforeBatch  AfterPredict AfterLoss  AfterBackward  AfterBatch  CleanupBatch
    ├── StepEvent     BeforeStep   AfterStep    CleanupStep
    └── ActionEvent   Predict  GetLoss  Backward  Step  ZeroGrad

Subscribing to a class subscribes to all below it, except for the five actions: exactly one
receiver performs each, so they are only subscribed to by their own names.

Source: the hooks of fastai's miniai; one line of doc under each event as in pytorch-ignite.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import time
from types import MappingProxyType
from typing import Any, ClassVar, Literal, Self

import torch

HOOKS: dict[str, type[Event]] = {}
"""Every event class by the name of the callback method that receives it."""


@dataclass(frozen=True, slots=True)
class ScopeEnd:
    """How a scope ended.

    Attributes:
        status: "completed"; "cancelled" by a receiver, `stop` or the host; or "failed".
        who: the receiver that cancelled or failed, where it is known.
        reason: what it said: the cancel's reason, or the error.
    """

    status: Literal["completed", "cancelled", "failed"]
    who: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Event:
    """Base of all events: subscribe to it to receive every one but the actions.

    Attributes:
        learner: the live Learner that emitted it.
        run_id: identifies the fit; shared by all of its events.
        time: when it was emitted, seconds since the epoch (`time.time()`).
    """

    hook: ClassVar[str]
    """The name of the callback method that receives this class of events."""
    reaches_all: ClassVar[bool] = False
    """Whether a receiver that raises keeps the ones behind it from being called."""

    learner: Any = field(repr=False)
    run_id: str
    time: float

    def __init_subclass__(cls) -> None:
        # Runs twice a class: `slots=True` makes a second one, which is the one that stays. At
        # that time it has no qualified name yet, so it is known by its plain one.
        words = r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])"
        cls.hook = re.sub(words, "_", cls.__name__).lower()
        if cls.__name__.startswith("_"):
            return
        taken = HOOKS.get(cls.hook)
        if taken and (taken.__module__, taken.__name__) != (cls.__module__, cls.__name__):
            raise TypeError(
                f"event class {cls.__qualname__!r} of {cls.__module__} would share the callback"
                f" method {cls.hook!r} with the one of {taken.__module__}: give it another name"
            )
        HOOKS[cls.hook] = cls

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        """Make the event of where `learner` is now; `extra` are the fields a subclass adds."""
        return cls(learner, learner.run_id, time(), *extra)


Event.hook = "event"
HOOKS[Event.hook] = Event


@dataclass(frozen=True, slots=True, eq=False)
class FitEvent(Event):
    """Something about the whole fit.

    Attributes:
        n_epochs: how many epochs the fit was asked for.
    """

    n_epochs: int

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        return cls(learner, learner.run_id, time(), learner.n_epochs, *extra)


@dataclass(frozen=True, slots=True, eq=False)
class _InEpoch(Event):
    n_epochs: int
    epoch: int
    training: bool
    n_iter: int | None


@dataclass(frozen=True, slots=True, eq=False)
class EpochEvent(_InEpoch):
    """Something about one epoch, training or validating.

    Attributes:
        n_epochs: how many epochs the fit was asked for.
        epoch: which one this is, from 0.
        training: whether it trains; otherwise it validates.
        n_iter: its number of batches, None where the loader has no length.
    """

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        return cls(
            learner,
            learner.run_id,
            time(),
            learner.n_epochs,
            learner.epoch,
            learner.training,
            learner.n_iter,
            *extra,
        )


def _lr(opt: Any) -> float | torch.Tensor | None:
    if opt is None:
        return None
    lr = opt.param_groups[0]["lr"]
    return lr.clone() if isinstance(lr, torch.Tensor) else lr  # schedulers change it in place


@dataclass(frozen=True, slots=True, eq=False)
class _InBatch(_InEpoch):
    iter: int
    n_samples: int
    lr: float | torch.Tensor | None
    loss: torch.Tensor | None

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        loss = learner.loss
        return cls(
            learner,
            learner.run_id,
            time(),
            learner.n_epochs,
            learner.epoch,
            learner.training,
            learner.n_iter,
            learner.iter,
            learner.n_samples,
            _lr(learner.opt),
            loss.detach() if isinstance(loss, torch.Tensor) else None,
            *extra,
        )


@dataclass(frozen=True, slots=True, eq=False)
class BatchEvent(_InBatch):
    """Something about one batch. Adds to the fields of an `EpochEvent`:

    Attributes:
        iter: which batch of the epoch this is, from 0.
        n_samples: samples seen in this epoch so far, this batch included.
        lr: the learning rate of the first parameter group, None without an optimizer.
        loss: this batch's loss, detached, on the device; None before `GetLoss`. Reading its
            number (`.item()`, `float`) makes the host wait for the device.
    """


@dataclass(frozen=True, slots=True, eq=False)
class StepEvent(_InBatch):
    """Something about one optimizer step; the fields are those of a `BatchEvent`."""


@dataclass(frozen=True, slots=True, eq=False)
class ActionEvent(_InEpoch):
    """A request to do one part of a batch; exactly one receiver performs it.

    Attributes:
        iter: which batch of the epoch this is, from 0; the others are those of an `EpochEvent`.
    """

    iter: int

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        return cls(
            learner,
            learner.run_id,
            time(),
            learner.n_epochs,
            learner.epoch,
            learner.training,
            learner.n_iter,
            learner.iter,
            *extra,
        )


# ------------------------------------------------------------------------------------- fit


@dataclass(frozen=True, slots=True, eq=False)
class BeforeFit(FitEvent):
    """The fit begins: optimizer made, no batch read."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterFit(FitEvent):
    """All epochs are done; not emitted if the fit was cancelled or failed."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanupFit(FitEvent):
    """The fit is over, however it ended (`end`). Emitted exactly once a fit."""

    reaches_all: ClassVar[bool] = True
    end: ScopeEnd


# ----------------------------------------------------------------------------------- epoch


@dataclass(frozen=True, slots=True, eq=False)
class BeforeEpoch(EpochEvent):
    """An epoch begins: the model is in its mode, the loader not yet iterated."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterEpoch(EpochEvent):
    """The loader is exhausted; not emitted if the epoch was cancelled or failed."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanupEpoch(EpochEvent):
    """The epoch is over, however it ended (`end`), with what was measured in it.

    Attributes:
        metrics: the numbers that callbacks put into `learner.record` during the epoch.
        n_samples: samples seen in the epoch.
    """

    reaches_all: ClassVar[bool] = True
    end: ScopeEnd
    metrics: Mapping[str, Any]
    n_samples: int

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        numbers = {k: v for k, v in learner.record.items() if k not in ("epoch", "train")}
        metrics = MappingProxyType(numbers)
        # No bare super(): the class that `slots=True` makes is not the one compiled here.
        return super(CleanupEpoch, cls).of(learner, *extra, metrics, learner.n_samples)


# ----------------------------------------------------------------------------------- batch


@dataclass(frozen=True, slots=True, eq=False)
class BeforeBatch(BatchEvent):
    """A batch was read into `learner.batch`; receivers may replace it."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterPredict(BatchEvent):
    """`learner.preds` is there."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterLoss(BatchEvent):
    """`learner.loss` is there; in training, the backward pass comes next."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterBackward(BatchEvent):
    """The gradients are there, still scaled in mixed precision (see BeforeStep)."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterBatch(BatchEvent):
    """The batch is done; not emitted if it was cancelled or failed."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanupBatch(BatchEvent):
    """The batch is over, however it ended (`end`)."""

    reaches_all: ClassVar[bool] = True
    end: ScopeEnd


# ------------------------------------------------------------------------------------ step


@dataclass(frozen=True, slots=True, eq=False)
class BeforeStep(StepEvent):
    """The optimizer is about to step: the place to unscale, clip and look at gradients."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterStep(StepEvent):
    """The weights have changed and `ZeroGrad` is done: the place to step a scheduler."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanupStep(StepEvent):
    """The step is over; `end` says when it was skipped, by whom and why."""

    reaches_all: ClassVar[bool] = True
    end: ScopeEnd


# --------------------------------------------------------------------------------- actions


@dataclass(frozen=True, slots=True, eq=False)
class Predict(ActionEvent):
    """Set `learner.preds` from `learner.batch`."""


@dataclass(frozen=True, slots=True, eq=False)
class GetLoss(ActionEvent):
    """Set `learner.loss` from `learner.preds` and `learner.batch`."""


@dataclass(frozen=True, slots=True, eq=False)
class Backward(ActionEvent):
    """Add the gradients of `learner.loss` to the parameters' `.grad`."""


@dataclass(frozen=True, slots=True, eq=False)
class Step(ActionEvent):
    """Change the weights."""


@dataclass(frozen=True, slots=True, eq=False)
class ZeroGrad(ActionEvent):
    """Make the gradients ready for the next batch."""


ACTIONS: tuple[type[ActionEvent], ...] = (Predict, GetLoss, Backward, Step, ZeroGrad)
"""In the order in which a training batch asks for them."""

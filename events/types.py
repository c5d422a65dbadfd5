"""The events of the loop: what happened, and at which position of the fit.

Each is a frozen, slotted dataclass. Its fields are a small snapshot, safe to keep and to read from
any thread, except `learner`: the live object, which ordered receivers may read and change. No event
holds a batch, predictions or a graph, so a buffer full of events keeps no memory of a step alive.

    Event
    ├── FitEvent      BeforeFit    AfterFit     CleanupFit
    ├── EpochEvent    BeforeEpoch  AfterEpoch   CleanupEpoch
    ├── BatchEvent    BeforeBatch  AfterPredict AfterLoss  AfterBackward  AfterBatch  CleanupBatch
    ├── StepEvent     BeforeStep   AfterStep    CleanupStep
    └── ActionEvent   Predict  GetLoss  Backward  Step  ZeroGrad

Subscribing to a class subscribes to all of its subclasses, except the five actions: an action
is a request to do something, so subscribe to it by its own class.

Source: the hooks of fastai's miniai; the one-line docstring of each event as in pytorch-ignite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Self

from .base import ActionEvent, BatchEvent, EpochEvent, FitEvent, ScopeEnd, StepEvent

# ------------------------------------------------------------------------------------- fit


@dataclass(frozen=True, slots=True, eq=False)
class BeforeFit(FitEvent):
    """The fit begins: the optimizer exists, and no batch has been read yet."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterFit(FitEvent):
    """All epochs are completed; not emitted if the fit was cancelled or failed."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanupFit(FitEvent):
    """The fit is over, however it ended (`end`). Emitted exactly once per fit."""

    deliver_to_all: ClassVar[bool] = True
    end: ScopeEnd


# ----------------------------------------------------------------------------------- epoch


@dataclass(frozen=True, slots=True, eq=False)
class BeforeEpoch(EpochEvent):
    """An epoch begins: the model is in its mode, the loader has not been iterated yet."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterEpoch(EpochEvent):
    """All batches of the epoch are done; not emitted if the epoch was cancelled or failed."""


def numbers_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values that callbacks have recorded in a row of the history."""
    return {k: v for k, v in row.items() if k not in ("epoch", "train", "status")}


class _Metrics(dict[str, Any]):
    """The metrics of an epoch; the error for a missing one names those that there are."""

    def __missing__(self, name: str) -> Any:
        raise KeyError(
            f"no {name!r} was recorded in this epoch, but {', '.join(self) or 'nothing'}: use"
            " event.metrics.get(), or check event.purpose and event.end first"
        )


@dataclass(frozen=True, slots=True, eq=False)
class CleanupEpoch(EpochEvent):
    """The epoch is over, however it ended (`end`), with the metrics measured in it.

    Attributes:
        metrics: the values that callbacks put into `learner.record` during the epoch; if it was cut
            short, those measured until then.
        n_samples: samples seen in the epoch.
        all_read: whether all of its batches were read, so that the metrics are those of the whole
            epoch, even if a receiver of AfterEpoch has cancelled it.
    """

    deliver_to_all: ClassVar[bool] = True
    end: ScopeEnd
    metrics: Mapping[str, Any]
    n_samples: int
    all_read: bool

    @classmethod
    def of(cls, learner: Any, *extra: Any) -> Self:
        metrics = MappingProxyType(_Metrics(numbers_of(learner.record)))
        # Not a bare super(): that refers to this class, which `slots=True` replaces by another.
        return super(CleanupEpoch, cls).of(
            learner, *extra, metrics, learner.n_samples, learner.all_read
        )


@dataclass(frozen=True, slots=True, eq=False)
class AfterValidation(EpochEvent):
    """A `ValidateCB` has validated, in or after the epoch that the other fields are of.

    Attributes:
        name: its name, such as "clean".
        metrics: what was measured; in `learner.record` its names begin with `name` and a dot.
        n_samples: the number of samples.
        steps: optimizer steps taken in the fit so far.
        seconds: how long the training has waited for it.
    """

    name: str
    metrics: Mapping[str, Any]
    n_samples: int
    steps: int
    seconds: float


# ----------------------------------------------------------------------------------- batch


@dataclass(frozen=True, slots=True, eq=False)
class BeforeBatch(BatchEvent):
    """A batch has been read into `learner.batch`; receivers may replace it."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterPredict(BatchEvent):
    """`learner.preds` is set."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterLoss(BatchEvent):
    """`learner.loss` is set; in training, the backward pass comes next."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterBackward(BatchEvent):
    """The gradients are computed; in mixed precision they are still scaled (see BeforeStep)."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterBatch(BatchEvent):
    """The batch is completed; not emitted if it was cancelled or failed."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanupBatch(BatchEvent):
    """The batch is over, however it ended (`end`)."""

    deliver_to_all: ClassVar[bool] = True
    end: ScopeEnd


# ------------------------------------------------------------------------------------ step


@dataclass(frozen=True, slots=True, eq=False)
class BeforeStep(StepEvent):
    """The optimizer is about to step: the place to unscale, clip and inspect gradients."""


@dataclass(frozen=True, slots=True, eq=False)
class AfterStep(StepEvent):
    """The weights have changed and `ZeroGrad` is done: the place to step a scheduler."""


@dataclass(frozen=True, slots=True, eq=False)
class CleanupStep(StepEvent):
    """The step is over; `end` says whether it was skipped, by which receiver and why."""

    deliver_to_all: ClassVar[bool] = True
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
    """Prepare the gradients for the next batch."""


ACTIONS: tuple[type[ActionEvent], ...] = (Predict, GetLoss, Backward, Step, ZeroGrad)
"""In the order in which a training batch performs them."""

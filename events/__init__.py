"""The typed events of a training run, the bus that delivers them, and the callback class.

This package does not depend on the engine.
"""

from .base import ActionEvent, BatchEvent, EpochEvent, Event, FitEvent, ScopeEnd, StepEvent
from .bus import Bus
from .callback import Callback, Watcher
from .cancel import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
)
from .learner import LearnerLike
from .record import record_events
from .signal import EventSignal
from .subscription import Subscription
from .types import (
    AfterBackward,
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    AfterPredict,
    AfterStep,
    AfterValidation,
    Backward,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    GetLoss,
    Predict,
    Step,
    ZeroGrad,
)

__all__ = [
    "ActionEvent",
    "AfterBackward",
    "AfterBatch",
    "AfterEpoch",
    "AfterFit",
    "AfterLoss",
    "AfterPredict",
    "AfterStep",
    "AfterValidation",
    "Backward",
    "BatchEvent",
    "BeforeBatch",
    "BeforeEpoch",
    "BeforeFit",
    "BeforeStep",
    "Bus",
    "Callback",
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelFitException",
    "CancelStepException",
    "CleanupBatch",
    "CleanupEpoch",
    "CleanupFit",
    "CleanupStep",
    "EpochEvent",
    "Event",
    "EventSignal",
    "FitEvent",
    "GetLoss",
    "LearnerLike",
    "Predict",
    "ScopeEnd",
    "Step",
    "StepEvent",
    "Subscription",
    "Watcher",
    "ZeroGrad",
    "record_events",
]

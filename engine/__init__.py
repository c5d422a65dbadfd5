"""The Learner, its scopes and its runtime."""

from ..events import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
)
from .data import DataLoaders
from .learner import Learner
from .learners import MomentumLearner, TrainLearner
from .observers import EventStream, Observer
from .result import FitResult

__all__ = [
    "Callback",
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelFitException",
    "CancelStepException",
    "DataLoaders",
    "EventStream",
    "FitResult",
    "Learner",
    "MomentumLearner",
    "Observer",
    "TrainLearner",
]

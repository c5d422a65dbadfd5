"""The Learner, its scopes and its runtime."""

from ..events import (
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
)
from .checkpoint import Checkpoint, CheckpointDamagedError, CheckpointError
from .data import DataLoaders
from .learner import Learner
from .learners import MomentumLearner, TrainLearner
from .observers import EventStream, Observer
from .prefetch import Prefetcher
from .result import FitResult
from .seeding import seed_everything
from .state import CheckpointMismatchError
from .tensor_loader import TensorLoader

__all__ = [
    "Callback",
    "CancelBatchException",
    "CancelEpochException",
    "CancelException",
    "CancelFitException",
    "CancelStepException",
    "Checkpoint",
    "CheckpointDamagedError",
    "CheckpointError",
    "CheckpointMismatchError",
    "DataLoaders",
    "EventStream",
    "FitResult",
    "Learner",
    "MomentumLearner",
    "Observer",
    "Prefetcher",
    "TensorLoader",
    "TrainLearner",
    "seed_everything",
]

"""The Learner, its data loaders, its checkpoints, and how a fit runs."""

from .checkpoint.compatibility import CheckpointMismatchError
from .checkpoint.reader import Checkpoint, CheckpointDamagedError, CheckpointError
from .data.async_loader import AsyncLoader
from .data.dataloaders import DataLoaders
from .data.prefetch import Prefetcher
from .data.sample_random import sample_generator
from .data.tensor_loader import TensorLoader
from .data.thread_loader import ThreadLoader
from .learner import Learner
from .learners import MomentumLearner, TrainLearner
from .listeners.observers import Observer
from .listeners.streams import EventStream
from .loop.actions import replaceable
from .loop.optimizers import Optimizers
from .loop.state import Position, Progress
from .parameter_groups import lr_groups, no_decay_groups
from .run.prediction_stream import PredictionStream
from .run.result import FitResult
from .seeding import seed_everything

__all__ = [
    "AsyncLoader",
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
    "Optimizers",
    "Position",
    "PredictionStream",
    "Prefetcher",
    "Progress",
    "TensorLoader",
    "ThreadLoader",
    "TrainLearner",
    "lr_groups",
    "no_decay_groups",
    "replaceable",
    "sample_generator",
    "seed_everything",
]

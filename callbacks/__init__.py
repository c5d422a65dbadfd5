"""Callbacks: one idea per file. They combine freely, in whatever order they are given."""

from ..engine.run.lr_finder import LRFinderCB
from .checkpoint import CheckpointCB
from .inspection.journal.compare import Difference, compare_runs
from .inspection.journal.journal import JournalCB
from .inspection.metrics import MetricsCB
from .inspection.summary import LayerSummary, SummaryCB
from .inspection.validate import ValidateCB
from .reporting.curve import LossCurveCB
from .reporting.jsonable import to_jsonable
from .reporting.logs import StructlogCB
from .reporting.otel import OpenTelemetryCB
from .reporting.progress import ProgressCB
from .reporting.prometheus import PrometheusCB
from .reporting.records import SCHEMA_VERSION, RecordCB
from .reporting.tensorboard import TensorBoardCB
from .stopping.early_stopping import EarlyStoppingCB
from .stopping.single import SingleBatchCB, SingleEpochCB
from .stopping.terminate_on_nan import TerminateOnNaNCB
from .stopping.time_limit import TimeLimitCB
from .training.accelerate import AccelerateCB
from .training.accumulation import GradientAccumulationCB
from .training.channels_last import ChannelLastCB
from .training.clipping import GradientClippingCB
from .training.compile import CompileCB
from .training.device import DeviceCB, def_device, to_cpu, to_device
from .training.mixed import MixedTrainingCB
from .training.scheduler import SchedulerCB
from .training.train import TrainCB
from .training.unfreeze import UnfreezeCB

__all__ = [
    "AccelerateCB",
    "ChannelLastCB",
    "CheckpointCB",
    "CompileCB",
    "DeviceCB",
    "Difference",
    "EarlyStoppingCB",
    "GradientAccumulationCB",
    "GradientClippingCB",
    "JournalCB",
    "LRFinderCB",
    "LayerSummary",
    "LossCurveCB",
    "MetricsCB",
    "MixedTrainingCB",
    "OpenTelemetryCB",
    "ProgressCB",
    "PrometheusCB",
    "SCHEMA_VERSION",
    "RecordCB",
    "SchedulerCB",
    "SingleBatchCB",
    "SingleEpochCB",
    "StructlogCB",
    "SummaryCB",
    "TensorBoardCB",
    "TerminateOnNaNCB",
    "TimeLimitCB",
    "TrainCB",
    "UnfreezeCB",
    "ValidateCB",
    "compare_runs",
    "def_device",
    "to_cpu",
    "to_device",
    "to_jsonable",
]

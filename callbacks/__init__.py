"""Callbacks: one idea a file. Any may be used with any other, in any order given."""

from ..events import Callback
from .accelerate import AccelerateCB
from .accumulation import GradientAccumulationCB
from .channels_last import ChannelLastCB
from .checkpoint import CheckpointCB
from .clipping import GradientClippingCB
from .compare import Difference, compare_runs
from .compile import CompileCB
from .curve import LossCurveCB
from .device import DeviceCB, def_device, to_cpu, to_device
from .early_stopping import EarlyStoppingCB
from .journal import JournalCB
from .logs import StructlogCB
from .lr_finder import LRFinderCB
from .metrics import MetricsCB
from .mixed import MixedTrainingCB
from .otel import OpenTelemetryCB
from .progress import ProgressCB
from .prometheus import PrometheusCB
from .records import RecordCB
from .scheduler import SchedulerCB
from .single import SingleBatchCB, SingleEpochCB
from .summary import LayerSummary, SummaryCB
from .tensorboard import TensorBoardCB
from .terminate_on_nan import TerminateOnNaNCB
from .time_limit import TimeLimitCB
from .train import TrainCB

__all__ = [
    "AccelerateCB",
    "Callback",
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
    "compare_runs",
    "def_device",
    "to_cpu",
    "to_device",
]

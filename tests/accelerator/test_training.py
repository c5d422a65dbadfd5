"""Training on a device: the CPU's weights to the bit, and the host waits only for numbers."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import structlog
import torch
from eventrain.callbacks import (
    ChannelLastCB,
    CheckpointCB,
    DeviceCB,
    EarlyStoppingCB,
    GradientAccumulationCB,
    GradientClippingCB,
    LossCurveCB,
    MetricsCB,
    MixedTrainingCB,
    ProgressCB,
    PrometheusCB,
    RecordCB,
    SchedulerCB,
    StructlogCB,
    SummaryCB,
    TensorBoardCB,
    TerminateOnNaNCB,
    def_device,
    to_cpu,
)
from eventrain.engine import DataLoaders, MomentumLearner, Prefetcher, TensorLoader, TrainLearner
from eventrain.events import AfterBatch, BeforeFit, Callback, CancelFitException
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from tests.support.accelerator import DEVICE, counted, is_here, uploads, waits
from tests.support.training import weights

Digits = tuple[torch.Tensor, torch.Tensor]
Cbs = Callable[[], list[Callback]]

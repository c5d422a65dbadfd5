"""Learners whose fits are reported, and strict JSON."""

from __future__ import annotations

import json
from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterEpoch
from torch import nn

from tests.support.training import line_model


def line_learner(train: int = 3, valid: int = 2, *cbs: Any, **kwargs: Any) -> TrainLearner:
    """A line with that many training and validation batches; the same one every time."""

    def batches(n: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(n)
        inputs = [torch.randn(4, 3, generator=generator) for _ in range(n)]
        return [(x, x.sum(1, keepdim=True)) for x in inputs]

    dls = DataLoaders(batches(train), batches(valid))
    return TrainLearner(line_model(), dls, cbs=cbs, **kwargs)


def recording_learner(dls: DataLoaders, *cbs: Any, **recorded: Any) -> TrainLearner:
    """A learner with MetricsCB that records some more numbers, as any callback may."""
    learner = TrainLearner(nn.Linear(3, 1), dls, lr=0.01, cbs=[MetricsCB(), *cbs])

    @learner.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        learner.record.update(recorded)

    return learner


def parse_json(text: str) -> Any:
    """Parse strict JSON: neither NaN nor Infinity, which `json.loads` accepts."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)

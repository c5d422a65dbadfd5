"""The callback that collects predictions for `Learner.get_preds`."""

from __future__ import annotations

import math
from typing import Any

import torch

from ...events import AfterPredict, Callback, CancelBatchException
from ..data.batches import targets_of


class CollectPredictions(Callback):
    """Collects predictions (and targets) on the CPU, and ends each batch after its prediction."""

    order: float = math.inf

    def __init__(self, with_targets: bool) -> None:
        self.with_targets = with_targets
        self.preds: list[Any] = []
        self.targets: list[Any] = []

    def after_predict(self, event: AfterPredict) -> None:
        learner = event.learner
        # The host waits for the device here, once per batch: the predictions of a whole dataset
        # may not fit on it.
        self.preds.append(_to_cpu(learner.preds))
        if self.with_targets:
            self.targets.append(_to_cpu(targets_of(learner.batch)))
        raise CancelBatchException("only predictions were requested")


def _to_cpu(x: Any) -> Any:
    if isinstance(x, tuple | list):
        return tuple(_to_cpu(item) for item in x)
    if isinstance(x, dict):
        return {key: _to_cpu(value) for key, value in x.items()}
    return x.detach().cpu()


def concatenate(parts: list[Any]) -> Any:
    """Concatenate the outputs of batches along the samples; tuples and dicts item by item.

    Example:
        >>> concatenate([{"x": torch.zeros(2)}, {"x": torch.ones(1)}])
        {'x': tensor([0., 0., 1.])}
    """
    first = parts[0]
    if isinstance(first, tuple):
        return tuple(concatenate(list(column)) for column in zip(*parts, strict=True))
    if isinstance(first, dict):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    return torch.cat(parts)

"""The tasks, and the loops written by hand that the contenders are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torcheval.metrics import Mean, MeanSquaredError, MulticlassAccuracy

from examples.datasets import get_model

Batches = list[tuple[torch.Tensor, torch.Tensor]]
LR = 0.01
CALLS = 8


@dataclass
class Task:
    """A model to train, its batches, and its loss.

    Attributes:
        classes: how many there are, if the targets are labels and the metric is the accuracy; 0
            if the targets are numbers and the metric is the mean squared error.
        opt: plain SGD.
    """

    model: nn.Module
    batches: Batches
    loss_func: Callable[..., torch.Tensor]
    classes: int = 0
    opt: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.opt = torch.optim.SGD(self.model.parameters(), LR)


class Outcome(NamedTuple):
    """How long the loop took, and the "loss" and "metric" measured in it."""

    seconds: float
    numbers: Mapping[str, Any] = {}


def linear(n: int, device: str = "cpu") -> Task:
    """The smallest model: nn.Linear(4, 2) on batches of 8."""
    batch = torch.randn(8, 4).to(device), torch.randn(8, 2).to(device)
    return Task(nn.Linear(4, 2).to(device), [batch] * n, F.mse_loss)


def cnn(n: int, device: str = "cpu") -> Task:
    """The post's CNN on batches of 64 images of 28x28."""
    batch = torch.randn(64, 1, 28, 28).to(device), torch.randint(10, (64,)).to(device)
    return Task(get_model().to(device), [batch] * n, F.cross_entropy, classes=10)


def by_hand(task: Task) -> Outcome:
    """Plain PyTorch."""
    model, opt, loss_func = task.model, task.opt, task.loss_func
    start = time.perf_counter()
    model.train()
    for x, y in task.batches:
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    return Outcome(time.perf_counter() - start)


def by_hand_calling(task: Task) -> Outcome:
    """Plain PyTorch that calls `CALLS` empty functions every batch."""
    model, opt, loss_func = task.model, task.opt, task.loss_func
    functions = [empty_function() for _ in range(CALLS)]
    start = time.perf_counter()
    model.train()
    for x, y in task.batches:
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        for function in functions:
            function(None)
    return Outcome(time.perf_counter() - start)


def by_hand_with_mean(task: Task) -> Outcome:
    """Plain PyTorch that updates torcheval's Mean of the loss every batch."""
    model, opt, loss_func = task.model, task.opt, task.loss_func
    mean, _ = torcheval(task)
    start = time.perf_counter()
    model.train()
    for x, y in task.batches:
        loss = loss_func(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        mean.update(loss.detach(), weight=len(x))
    numbers = {"loss": mean.compute()}
    return Outcome(time.perf_counter() - start, numbers)


def by_hand_with_metric(task: Task) -> Outcome:
    """Plain PyTorch that updates the same Mean, and a metric of the predictions, every batch."""
    model, opt, loss_func = task.model, task.opt, task.loss_func
    mean, metric = torcheval(task)
    start = time.perf_counter()
    model.train()
    for x, y in task.batches:
        preds = model(x)
        loss = loss_func(preds, y)
        loss.backward()
        opt.step()
        opt.zero_grad()
        mean.update(loss.detach(), weight=len(x))
        metric.update(preds.detach(), y)
    numbers = {"loss": mean.compute(), "metric": metric.compute()}
    return Outcome(time.perf_counter() - start, numbers)


def empty_function() -> Callable[[object], None]:
    """Return a new function on each call."""
    return lambda event: None


def torcheval(task: Task) -> tuple[Any, Any]:
    """Return torcheval's mean of the loss, and its metric."""
    device = task.batches[0][0].device
    metric = MulticlassAccuracy if task.classes else MeanSquaredError
    return Mean(device=device), metric(device=device)

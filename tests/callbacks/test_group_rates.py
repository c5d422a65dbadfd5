"""The learning rates of all parameter groups: in events, records and what is shown of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import PrometheusCB, RecordCB, SchedulerCB, TensorBoardCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, AfterStep, BeforeBatch, BeforeStep
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from torch import nn, optim

SCHEMA = json.loads((Path(__file__).parents[2] / "docs/record.schema.json").read_text())
BATCHES = [(torch.ones(2, 3), torch.zeros(2, 1))] * 3


def groups_of(rates: list[float], **kwargs: Any) -> Callable[[Any, float], optim.Optimizer]:
    def make(parameters: Any, lr: float) -> optim.Optimizer:
        del parameters, lr
        groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
        return optim.SGD(groups, 0.1, **kwargs)

    return make


class Records(RecordCB):
    def __init__(self) -> None:
        super().__init__(every=1)
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)


@settings(max_examples=20, deadline=None)
@given(rates=st.lists(st.floats(0, 1), min_size=1, max_size=5), gamma=st.floats(0.1, 1))
def test_events_tell_the_rates_that_the_step_used(rates: list[float], gamma: float) -> None:
    seen: list[Any] = []
    schedule = SchedulerCB(partial(optim.lr_scheduler.ExponentialLR, gamma=gamma))
    learner = TrainLearner(
        nn.Linear(3, 1), DataLoaders(BATCHES), opt_func=groups_of(rates), cbs=schedule
    )
    for kind in (BeforeBatch, BeforeStep, AfterStep, AfterBatch):
        learner.subscribe(kind, lambda event: seen.append((event.lr, event.lrs)), order=100)
    learner.run(1, valid=False)
    expected, now = [], list(rates)
    for _ in BATCHES:
        expected += [(now[0], tuple(now))] * 4
        now = [lr * gamma for lr in now]
    assert seen == expected


def test_rates_that_are_tensors_are_copies() -> None:
    seen: list[Any] = []
    model = nn.Linear(3, 1)

    def make(parameters: Any, lr: float) -> optim.Optimizer:
        return optim.Adam([{"params": [p], "lr": torch.tensor(lr)} for p in parameters])

    learner = TrainLearner(model, DataLoaders(BATCHES), lr=0.5, opt_func=make)

    @learner.on(AfterStep)
    def halve(event: AfterStep) -> None:
        seen.append(event.lrs)
        for group in learner.opt.param_groups:
            group["lr"].mul_(0.5)

    learner.run(1, valid=False)
    assert [[float(lr) for lr in lrs] for lrs in seen] == [[0.5] * 2, [0.25] * 2, [0.125] * 2]


def test_without_an_optimizer_there_are_no_rates() -> None:
    seen: list[Any] = []
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(valid=BATCHES))
    learner.subscribe(AfterBatch, lambda event: seen.append((event.lr, event.lrs)))
    learner.run_validate()
    assert seen == [(None, ())] * 3


def test_the_events_of_a_batch_tell_the_rates_of_all_optimizers() -> None:
    class Two(TrainLearner):
        def get_loss(self) -> None:
            for name in ("b", "a"):
                self.update(self.model[name](self.batch[0]).square().mean(), name)

        def predict(self) -> None:
            self.preds = None

    nets = nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(3, 1)})
    opt = {
        "a": optim.SGD([{"params": [p]} for p in nets["a"].parameters()], 0.1),
        "b": optim.SGD(nets["b"].parameters(), 0.2),
    }
    halve = partial(optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learner = Two(nets, DataLoaders(BATCHES[:2]), opt=opt)
    seen: list[Any] = []
    learner.subscribe(BeforeStep, lambda event: seen.append((event.opt, event.lrs)))
    learner.subscribe(AfterBatch, lambda event: seen.append((event.lr, event.lrs)))
    learner.run(1, valid=False, cbs=[SchedulerCB(halve, opt="b"), SchedulerCB(halve, opt="a")])
    assert seen == [
        *[("b", (0.2,)), ("a", (0.1, 0.1)), (0.1, (0.1, 0.1, 0.2))],
        *[("b", (0.1,)), ("a", (0.05, 0.05)), (0.05, (0.05, 0.05, 0.1))],
    ]


@pytest.mark.parametrize("rates", [[0.1], [0.1, 0.01]])
def test_a_record_has_the_rates_of_several_groups(rates: list[float]) -> None:
    cb = Records()
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(BATCHES), opt_func=groups_of(rates))
    learner.run(1, valid=False, cbs=cb)
    found = [record for record in cb.records if record["event"] == "batch"]
    assert [record["lr"] for record in found] == [0.1] * 3
    assert [record.get("lrs") for record in found] == [rates if len(rates) > 1 else None] * 3
    for record in cb.records:
        Draft202012Validator(SCHEMA).validate(record)


def test_tensorboard_and_prometheus_show_each(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    registry = CollectorRegistry()
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(BATCHES), opt_func=groups_of([0.25, 0.5]))
    cbs = [TensorBoardCB(tmp_path, every=1), PrometheusCB(registry=registry, every=1)]
    learner.run(1, valid=False, cbs=cbs)
    for i, rate in enumerate([0.25, 0.5]):
        labels = {"phase": "train", "param_group": str(i)}
        name = "eventrain_learning_rate_by_group"
        assert registry.get_sample_value(name, labels) == rate
    (folder,) = {path.parent for path in tmp_path.rglob("*tfevents*")}
    events = EventAccumulator(str(folder)).Reload()
    assert [e.value for e in events.Scalars("batch/lr/1")] == [0.5] * 3

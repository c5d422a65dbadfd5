"""G19: counts, rates, purposes and the numbers of an epoch are true where they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    GradientAccumulationCB,
    MetricsCB,
    SchedulerCB,
)
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterLoss,
    AfterStep,
    BeforeBatch,
    BeforeEpoch,
    BeforeStep,
    Callback,
    CancelBatchException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    CleanupStep,
    Event,
    record_events,
)
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import ExponentialLR

MakeModel = Callable[[], nn.Module]


# --------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("event_type", [AfterStep, CleanupStep, AfterBatch, CleanupBatch])
def test_a_receiver_that_stops_at_four_steps_takes_four(
    event_type: type[Event], make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)

    @learner.on(event_type)
    def stop_at_four(event: Any) -> None:
        if event.training and event.learner.done.steps == 4:
            event.learner.stop()

    result = learner.run(3)
    assert result.steps == 4


def test_the_count_of_steps_includes_the_one_that_is_told_of(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=GradientAccumulationCB(2))
    told: list[int] = []
    learner.subscribe(AfterStep, lambda event: told.append(event.learner.done.steps))
    learner.run(2, valid=False)
    assert told == [1, 2, 3, 4]


def test_a_stop_after_a_batch_does_not_read_another_one(make_model: MakeModel) -> None:
    """A loader that is fed from a queue would wait for it for ever."""
    feed: SimpleQueue[Any] = SimpleQueue()
    for _ in range(2):
        feed.put((torch.ones(4, 3), torch.ones(4, 1)))

    class Fed:
        def __iter__(self) -> Iterator[Any]:
            while True:
                yield feed.get(timeout=60)

    learner = TrainLearner(make_model(), DataLoaders(Fed()))
    learner.subscribe(AfterBatch, lambda event: event.iter == 1 and event.learner.stop())
    with record_events(learner) as events:
        result = learner.run(1, valid=False)
    assert (result.status, result.batches) == ("cancelled", 2)
    assert events.names[-3:] == ["CleanupBatch", "CleanupEpoch", "CleanupFit"]


# ---------------------------------------------------------------------------------------- rates


@pytest.mark.parametrize("as_tensor", [False, True])
def test_an_event_after_the_step_has_the_rate_that_the_step_used(
    as_tensor: bool, make_model: MakeModel, dls: DataLoaders
) -> None:
    """SchedulerCB sets the next rate in AfterStep, before the others hear of it."""
    rate: Any = torch.tensor(1.0) if as_tensor else 1.0
    learner = TrainLearner(
        make_model(),
        dls,
        lr=rate,
        cbs=SchedulerCB(lambda opt: ExponentialLR(opt, 0.5)),
        opt_func=lambda params, lr: torch.optim.SGD(params, lr, foreach=False),
    )
    told: dict[type[Event], list[float]] = {}
    for event_type in (BeforeBatch, AfterLoss, BeforeStep, AfterStep, CleanupStep, AfterBatch):

        @learner.on(event_type, order=100)
        def tell(event: Any) -> None:
            told.setdefault(type(event), []).append(float(event.lr))

    learner.run(1, valid=False)
    assert all(rates == [1.0, 0.5, 0.25] for rates in told.values())
    assert len(told) == 6


def test_a_batch_without_a_step_has_the_rate_that_the_next_step_will_use(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    schedule = SchedulerCB(lambda opt: ExponentialLR(opt, 0.5))
    learner = TrainLearner(make_model(), dls, lr=1.0, cbs=[GradientAccumulationCB(2), schedule])
    rates: list[float] = []
    learner.subscribe(AfterBatch, lambda event: rates.append(event.lr), order=100)
    learner.run(2, valid=False)
    assert rates == [1.0, 1.0, 0.5, 0.25, 0.25, 0.125]


# ------------------------------------------------------------------------------------- purposes


async def test_every_event_says_what_its_run_is_for(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)
    with record_events(learner) as events:
        for run in (learner.fit(1), learner.validate(), learner.get_preds(), learner.lr_find()):
            await run
    purposes = [event.purpose for event in events]
    assert list(dict.fromkeys(purposes)) == ["fit", "validate", "predict", "lr_find"]
    ends = [event.purpose for event in events if type(event).__name__ == "CleanupFit"]
    assert ends == ["fit", "validate", "predict", "lr_find"]


async def test_the_history_of_metrics_is_that_of_the_fits(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    metrics = MetricsCB()
    learner = TrainLearner(make_model(), dls, cbs=metrics)
    await learner.fit(2)
    before = list(metrics.history)
    numbers = await learner.validate(dls.train)
    await learner.lr_find()
    await learner.get_preds()
    assert metrics.history == before
    x, y = (torch.cat(part) for part in zip(*dls.train, strict=True))
    assert numbers["loss"] == pytest.approx(F.mse_loss(learner.model(x), y).item(), rel=1e-5)


async def test_a_metric_that_a_prediction_lacks_is_an_error_that_says_so(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls, cbs=MetricsCB())
    learner.subscribe(CleanupEpoch, lambda event: event.metrics["loss"])
    await learner.fit(1)
    with pytest.raises(KeyError) as raised:
        await learner.get_preds()
    assert raised.value.args[0] == (
        "no 'loss' was recorded in this epoch, but nothing: use event.metrics.get(), or check"
        " event.purpose and event.end first"
    )


# ---------------------------------------------------------------------- epochs that are cut short


def cut_by(how: str) -> Callable[[Any], None]:
    def cut(event: Any) -> None:
        if how == "stop":
            event.learner.stop()
        elif how == "cancel":
            raise CancelFitException("enough")
        else:
            raise ZeroDivisionError("enough")

    return cut


@pytest.mark.parametrize(
    ("how", "status"), [("stop", "cancelled"), ("cancel", "cancelled"), ("fail", "failed")]
)
def test_a_cut_epoch_keeps_what_was_measured(
    how: str, status: str, make_model: MakeModel, dls: DataLoaders
) -> None:
    metrics, losses = MetricsCB(), []
    learner = TrainLearner(make_model(), dls, cbs=metrics)
    learner.subscribe(AfterBatch, lambda event: losses.append(event.loss.item()))
    learner.on(BeforeBatch, where=lambda event: event.iter == 2)(cut_by(how))
    with record_events(learner) as events:
        if how == "fail":
            with pytest.raises(ZeroDivisionError):
                learner.run(1, valid=False)
        else:
            learner.run(1, valid=False)
    mean = pytest.approx(sum(losses) / 2, rel=1e-6)
    assert learner.result is not None
    assert learner.result.history == (
        {"epoch": 0, "train": "train", "loss": mean, "status": status},
    )
    (end,) = [event for event in events if isinstance(event, CleanupEpoch)]
    assert dict(end.metrics) == {"loss": mean}
    assert end.end.status == status
    assert metrics.history == []  # completed epochs alone, as in the post


def test_an_epoch_cut_before_its_first_batch_has_no_numbers_of_the_one_before(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)
    learner.on(BeforeEpoch, where=lambda event: event.epoch == 1, order=-1)(cut_by("cancel"))
    learner.add_cbs(MetricsCB())
    result = learner.run(2, valid=False)
    assert [row["epoch"] for row in result.history] == [0]


def test_a_callback_of_ones_own_is_asked_for_what_it_has_measured(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    class Batches(Callback):
        def before_epoch(self, event: BeforeEpoch) -> None:
            self.n = 0

        def after_batch(self, event: AfterBatch) -> None:
            self.n += 1

        def after_epoch(self, event: AfterEpoch) -> None:
            event.learner.record.update(self.measured())

        def measured(self) -> dict[str, Any]:
            return {"n": self.n}

    learner = TrainLearner(make_model(), dls, cbs=Batches())
    learner.on(AfterLoss, where=lambda event: event.iter == 1, order=1)(cut_by("cancel"))
    assert learner.run(1).history == (
        {"epoch": 0, "train": "train", "n": 1, "status": "cancelled"},
    )


async def test_a_validation_that_is_cut_short_returns_no_numbers(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)
    learner.on(AfterBatch)(cut_by("cancel"))
    assert await learner.validate() == {}


def test_a_cancelled_batch_keeps_the_counts_of_the_others(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)

    @learner.on(AfterLoss, where=lambda event: event.iter == 0)
    def skip(event: AfterLoss) -> None:
        raise CancelBatchException

    result = learner.run(2, valid=False)
    assert (result.steps, result.batches, result.epochs) == (4, 4, 2)


def test_an_epoch_that_is_cancelled_after_its_last_batch_has_all_its_numbers(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """As SingleEpochCB does: reporters show them."""
    learner = TrainLearner(make_model(), dls, cbs=MetricsCB())
    learner.on(AfterEpoch, order=-1)(cut_by("cancel"))
    with record_events(learner) as events:
        result = learner.run(1, valid=False)
    (end,) = [event for event in events if isinstance(event, CleanupEpoch)]
    assert (end.end.status, end.all_read) == ("cancelled", True)
    (row,) = result.history
    assert row == {"epoch": 0, "train": "train", "loss": end.metrics["loss"]}

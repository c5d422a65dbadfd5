"""The arguments, the events and the result of `fit` without errors; custom events; `stop`."""

from __future__ import annotations

import dataclasses
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, dataclass
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, FitResult, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    AfterStep,
    BatchEvent,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelFitException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    Event,
    FitEvent,
    ScopeEnd,
    record_events,
)
from torch import nn, optim
from torch.nn import functional as F
from torcheval.metrics import MulticlassAccuracy

from tests.support.training import TRAIN_BATCH, VALID_BATCH
from tests.support.waiting import GUARD

MakeModel = Callable[[], nn.Module]
Digits = tuple[torch.Tensor, torch.Tensor]

TRAIN_EPOCH = ["BeforeEpoch", *TRAIN_BATCH * 3, "AfterEpoch", "CleanupEpoch"]
VALID_EPOCH = ["BeforeEpoch", *VALID_BATCH * 2, "AfterEpoch", "CleanupEpoch"]


def counts(result: FitResult) -> tuple[int, int, int, int]:
    return result.epochs, result.batches, result.valid_batches, result.steps


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """To the bit."""
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# ------------------------------------------------------------------------------- train and valid


@pytest.mark.parametrize(
    ("options", "names", "counted"),
    [
        ({}, TRAIN_EPOCH + VALID_EPOCH, (1, 3, 2, 3)),
        ({"valid": False}, TRAIN_EPOCH, (1, 3, 0, 3)),
        ({"train": False}, VALID_EPOCH, (1, 0, 2, 0)),
        ({"train": False, "valid": False}, [], (0, 0, 0, 0)),
        ({"n_epochs": 2}, (TRAIN_EPOCH + VALID_EPOCH) * 2, (2, 6, 4, 6)),
        ({"n_epochs": 0}, [], (0, 0, 0, 0)),
        ({"n_epochs": 2, "train": False}, VALID_EPOCH * 2, (2, 0, 4, 0)),
    ],
    ids=["both", "train", "valid", "neither", "two epochs", "no epochs", "two of validation"],
)
async def test_a_fit_emits_its_events_and_counts_what_it_did(
    options: dict[str, Any],
    names: list[str],
    counted: tuple[int, int, int, int],
    learner: TrainLearner,
) -> None:
    with record_events(learner) as recorded, anyio.fail_after(GUARD):
        result = await learner.fit(**options)
    assert recorded.names == ["BeforeFit", *names, "AfterFit", "CleanupFit"]
    assert counts(result) == counted
    assert (result.status, result.who, result.reason) == ("completed", None, None)
    assert result.n_epochs == options.get("n_epochs", 1)
    assert result is learner.result
    assert {event.run_id for event in recorded} == {result.run_id} == {learner.run_id}


async def test_the_arguments_may_be_given_by_place(learner: TrainLearner) -> None:
    """In the post's order: n_epochs, train, valid, cbs, lr."""
    metrics = MetricsCB()
    result = await learner.fit(2, True, False, metrics, 0.25)
    assert counts(result) == (2, 6, 0, 6)
    assert [row["train"] for row in metrics.history] == ["train", "train"]
    assert learner.opt.param_groups[0]["lr"] == 0.25


async def test_the_events_have_the_position_of_the_loop(learner: TrainLearner) -> None:
    with record_events(learner) as recorded:
        await learner.fit(2)
    told = [
        (e.epoch, e.training, e.iter, e.n_iter, e.n_samples, e.lr)
        for e in recorded
        if isinstance(e, AfterBatch)
    ]
    assert told == [
        (epoch, training, i, n, 4 * (i + 1), 0.1)
        for epoch in range(2)
        for training, n in ((True, 3), (False, 2))
        for i in range(n)
    ]
    assert [e.time for e in recorded] == sorted(e.time for e in recorded)


def test_model_and_grad_mode_are_those_of_the_phase(learner: TrainLearner) -> None:
    """G9: and grad mode is the caller's own again afterwards."""
    modes: set[tuple[str, bool, bool, bool]] = set()

    @learner.on(Event)
    def look(event: Any) -> None:
        if hasattr(event, "training"):
            phase = "train" if event.training else "valid"
            model = event.learner.model
            modes.add((phase, event.learner.training, model.training, torch.is_grad_enabled()))

    with torch.no_grad():
        learner.run(2)
        assert not torch.is_grad_enabled()
    assert modes == {("train", True, True, True), ("valid", False, False, False)}


async def test_each_run_has_an_id_of_its_own(learner: TrainLearner) -> None:
    ids = [(await learner.fit(0)).run_id for _ in range(5)]
    assert len(set(ids)) == 5


def test_progress_is_counted_by_phase_and_anew_in_every_fit(learner: TrainLearner) -> None:
    seen = [(learner.done.epochs, learner.done.batches, learner.done.steps)]

    @learner.on(CleanupEpoch)
    def look(event: CleanupEpoch) -> None:
        seen.append((learner.done.epochs, learner.done.batches, learner.done.steps))

    n_train, n_valid = len(learner.dls.train), len(learner.dls.valid)
    for _ in range(2):
        learner.run(2)
    one_fit = [
        (n, batches, steps)
        for n in (1, 2)
        for batches, steps in ((n * n_train, n * n_train), (n * n_valid, 0))
    ]
    assert seen == [(0, 0, 0), *one_fit, *one_fit]


def test_a_result_cannot_be_changed(learner: TrainLearner) -> None:
    result = learner.run(1)
    with pytest.raises(FrozenInstanceError):
        result.steps = 0  # type: ignore[misc]
    assert result.seconds > 0


async def test_fitting_says_whether_a_fit_is_running(learner: TrainLearner) -> None:
    seen: list[bool] = []
    learner.on(Event)(lambda event: seen.append(event.learner.fitting))
    assert not learner.fitting
    await learner.fit(1)
    assert not learner.fitting
    assert set(seen) == {True}


class Unsized:
    """An iterable of batches that has no length."""

    def __init__(self, batches: list[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches)


async def test_a_loader_without_a_length_trains_with_no_n_iter(
    learner: TrainLearner, make_model: MakeModel
) -> None:
    expected = TrainLearner(make_model(), learner.dls)
    await expected.fit(2)
    learner.dls = DataLoaders(Unsized(learner.dls.train), Unsized(learner.dls.valid))
    with record_events(learner) as recorded:
        result = await learner.fit(2)
    assert counts(result) == (2, 6, 4, 6)
    assert {e.n_iter for e in recorded if hasattr(e, "n_iter")} == {None}
    assert recorded.names[1:-2] == (TRAIN_EPOCH + VALID_EPOCH) * 2
    assert_same(learner.model, expected.model)


def test_a_generator_serves_one_epoch(learner: TrainLearner) -> None:
    learner.dls.train = (batch for batch in list(learner.dls.train))
    assert counts(learner.run(1)) == (1, 3, 2, 3)


def test_the_length_may_change_from_epoch_to_epoch(learner: TrainLearner) -> None:
    @learner.on(CleanupEpoch, once=True)
    def shorten(event: CleanupEpoch) -> None:
        event.learner.dls.train = event.learner.dls.train[:1]

    with record_events(learner) as recorded:
        assert counts(learner.run(2, valid=False)) == (2, 4, 0, 4)
    assert [e.n_iter for e in recorded if isinstance(e, BeforeEpoch)] == [3, 1]


# ------------------------------------------------------------------------------------ optimizer


def by_hand(
    model: nn.Module, dls: DataLoaders, n_epochs: int, opt: optim.Optimizer
) -> optim.Optimizer:
    """One fit in plain PyTorch."""
    for _ in range(n_epochs):
        model.train()
        for x, y in dls.train:
            F.mse_loss(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    return opt


MOMENTUM = partial(optim.SGD, momentum=0.9)


async def test_two_fits_are_those_written_by_hand_with_an_optimizer_for_each(
    learner: TrainLearner, make_model: MakeModel
) -> None:
    """G11: to the bit; the second optimizer knows nothing of the first one's momentum."""
    learner.opt_func = MOMENTUM
    await learner.fit(2, lr=0.05)
    first = learner.opt
    await learner.fit(1)
    assert learner.opt is not first
    model = make_model()
    by_hand(model, learner.dls, 2, MOMENTUM(model.parameters(), 0.05))
    by_hand(model, learner.dls, 1, MOMENTUM(model.parameters(), 0.1))
    assert_same(learner.model, model)


async def test_without_an_opt_func_the_optimizer_is_kept(
    learner: TrainLearner, make_model: MakeModel
) -> None:
    """G11: with its momentum, and its own learning rate."""
    learner.opt_func = None
    opt = learner.opt = MOMENTUM(learner.model.parameters(), 0.02)
    await learner.fit(2)
    await learner.fit(1)
    assert learner.opt is opt
    model = make_model()
    reference = MOMENTUM(model.parameters(), 0.02)
    by_hand(model, learner.dls, 2, reference)
    by_hand(model, learner.dls, 1, reference)
    assert_same(learner.model, model)


def lrs_of(recorded: list[Event]) -> list[float]:
    return [event.lr for event in recorded if isinstance(event, AfterStep)]


@pytest.mark.parametrize("lr", [0.01, 0, 1, 1e-9])
async def test_a_learning_rate_is_for_one_fit_alone(lr: float, learner: TrainLearner) -> None:
    with record_events(learner) as recorded:
        await learner.fit(1, valid=False, lr=lr)
        assert lrs_of(recorded) == [lr] * 3
        assert learner.lr == 0.1
        recorded.clear()
        await learner.fit(1, valid=False)
    assert lrs_of(recorded) == [0.1] * 3


async def test_a_learning_rate_reaches_an_optimizer_that_is_kept(learner: TrainLearner) -> None:
    """For this fit alone, too: afterwards the optimizer has its own again."""
    learner.opt_func = None
    learner.opt = optim.SGD(learner.model.parameters(), 0.1)
    with record_events(learner) as recorded:
        await learner.fit(1, valid=False, lr=0.01)
        await learner.fit(1, valid=False)
    assert lrs_of(recorded) == [0.01] * 3 + [0.1] * 3


async def test_a_learning_rate_may_be_a_tensor(learner: TrainLearner) -> None:
    with record_events(learner) as recorded:
        await learner.fit(1, valid=False, lr=torch.tensor(0.01))  # type: ignore[arg-type]
    assert [float(lr) for lr in lrs_of(recorded)] == [pytest.approx(0.01)] * 3


async def test_validation_makes_no_optimizer_and_needs_none(learner: TrainLearner) -> None:
    with record_events(learner) as recorded:
        await learner.fit(1, train=False)
    assert learner.opt is None
    assert {e.lr for e in recorded if isinstance(e, BatchEvent)} == {None}


async def test_the_optimizer_is_there_before_the_fit_and_before_any_batch(
    learner: TrainLearner,
) -> None:
    steps: list[Any] = []

    @learner.on(BeforeFit)
    def schedule(event: BeforeFit) -> None:
        opt = event.learner.opt
        scheduler = optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
        steps.append(event.learner.subscribe(AfterStep, lambda _: scheduler.step()))

    with record_events(learner) as recorded:
        await learner.fit(1, valid=False)
    assert lrs_of(recorded) == [0.1, 0.05, 0.025]
    steps[0].close()


# ------------------------------------------------------------------------------------ callbacks


class Probe(Callback):
    """Counts the batches it sees."""

    def __init__(self) -> None:
        self.batches = 0

    def after_batch(self, event: AfterBatch) -> None:
        self.batches += 1


def test_callbacks_come_alone_in_a_list_or_from_a_generator(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    a, b, c, d, e = (Probe() for _ in range(5))
    learner = TrainLearner(make_model(), dls, cbs=a)
    assert learner.cbs == (a,)
    assert learner.add_cbs(b) == (b,)
    assert learner.add_cbs([c, d]) == (c, d)
    assert learner.add_cbs(cb for cb in [e]) == (e,)
    assert learner.add_cbs(None) == ()
    assert learner.cbs == (a, b, c, d, e)
    learner.remove_cbs(c)
    learner.remove_cbs([a, e])
    assert learner.cbs == (b, d)
    learner.run(1)
    assert [probe.batches for probe in (a, b, c, d, e)] == [0, 5, 0, 5, 0]
    learner.remove_cbs(learner.cbs)
    assert learner.cbs == ()
    assert learner.bus.subscriptions() == ()
    assert TrainLearner(make_model(), dls).cbs == ()


def test_a_list_given_to_a_learner_stays_the_callers(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    cbs = [Probe()]
    learner = TrainLearner(make_model(), dls, cbs=cbs)
    cbs.append(Probe())
    assert learner.cbs == (cbs[0],)
    learner.add_cbs(Probe())
    assert len(cbs) == 2


def test_a_callback_may_come_and_go_in_the_middle_of_a_fit(learner: TrainLearner) -> None:
    probe = Probe()

    @learner.on(BeforeEpoch, where=lambda event: event.epoch == 1)
    def swap(event: BeforeEpoch) -> None:
        if event.training:
            event.learner.add_cbs(probe)
        else:
            event.learner.remove_cbs(probe)

    learner.run(3)
    assert probe.batches == 3


def cancel(event: Event) -> None:
    raise CancelFitException("enough")


def fail(event: Event) -> None:
    raise ValueError("no")


@pytest.mark.parametrize("ending", ["completed", "cancelled", "failed", "refused", "stopped"])
async def test_callbacks_of_a_fit_are_gone_after_it(ending: str, learner: TrainLearner) -> None:
    """G9: whatever happened."""
    own = Probe()
    learner.add_cbs(own)
    before = learner.cbs, learner.bus.subscriptions(), list(learner.streams)
    temporary = Probe()
    subscription = None
    if ending in ("cancelled", "failed"):
        subscription = learner.subscribe(AfterLoss, cancel if ending == "cancelled" else fail)
    if ending == "refused":
        learner.opt_func = lambda parameters, lr: None
    with anyio.fail_after(GUARD):
        if ending in ("completed", "cancelled"):
            assert (await learner.fit(1, cbs=temporary)).status == ending
        elif ending == "stopped":
            learner.on(AfterBatch, once=True)(lambda event: event.learner.stop())
            assert (await learner.fit(1, cbs=temporary)).status == "cancelled"
        else:
            with pytest.raises((ValueError, TypeError)):
                await learner.fit(1, cbs=temporary)
    if subscription is not None:
        subscription.close()
    assert (learner.cbs, learner.bus.subscriptions(), list(learner.streams)) == before

    learner.opt_func = optim.SGD
    seen = temporary.batches
    assert (await learner.fit(1)).status == "completed"
    assert temporary.batches == seen
    await learner.fit(1, cbs=temporary)
    assert temporary.batches == seen + 5


async def test_callbacks_of_a_fit_are_gone_after_the_host_cancelled_it(
    learner: TrainLearner,
) -> None:
    """G9."""
    temporary = Probe()
    with anyio.move_on_after(GUARD) as scope:

        @learner.on(AfterBatch, once=True)
        async def cancel_host(event: AfterBatch) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        await learner.fit(1, cbs=temporary)
    assert scope.cancelled_caught
    assert learner.result is not None
    assert learner.result.status == "cancelled"
    assert learner.cbs == ()
    assert (await learner.fit(0)).status == "completed"


def test_a_temporary_callback_that_takes_itself_off_does_no_harm(learner: TrainLearner) -> None:
    class Once(Probe):
        def before_epoch(self, event: BeforeEpoch) -> None:
            event.learner.remove_cbs(self)

    assert learner.run(1, cbs=Once()).status == "completed"
    assert learner.cbs == ()
    assert learner.run(1).status == "completed"


# -------------------------------------------------------------------------------------- numbers


def test_the_history_is_what_metrics_measured(
    digits: Digits, make_cnn: Callable[[], nn.Module]
) -> None:
    images, labels = digits
    batches = [(images[i : i + 30], labels[i : i + 30]) for i in range(0, 120, 30)]
    batches.append((images[120:130], labels[120:130]))
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    model = make_cnn()
    result = TrainLearner(model, DataLoaders(batches, batches), F.cross_entropy, cbs=metrics).run(2)

    reference = make_cnn()
    opt = optim.SGD(reference.parameters(), 0.1)
    expected = []
    for epoch in range(2):
        for phase in ("train", "eval"):
            losses, right = 0.0, 0.0
            for x, y in batches:
                with torch.set_grad_enabled(phase == "train"):
                    preds = reference(x)
                    loss = F.cross_entropy(preds, y)
                if phase == "train":
                    loss.backward()
                    opt.step()
                    opt.zero_grad()
                losses += loss.item() * len(x)
                right += (preds.argmax(1) == y).sum().item()
            row = {"epoch": epoch, "train": phase, "accuracy": right / 130, "loss": losses / 130}
            expected.append(row)
    assert_same(model, reference)
    assert list(result.history) == metrics.history
    assert [list(row) for row in result.history] == [list(row) for row in expected]
    for row, by_hand_row in zip(result.history, expected, strict=True):
        assert (row["epoch"], row["train"]) == (by_hand_row["epoch"], by_hand_row["train"])
        assert row["loss"] == pytest.approx(by_hand_row["loss"], rel=1e-6)
        assert row["accuracy"] == pytest.approx(by_hand_row["accuracy"], rel=1e-6)


def test_without_numbers_the_history_is_empty(learner: TrainLearner) -> None:
    assert learner.run(2).history == ()


@dataclass
class Recorder(Callback):
    """Adds to the record at several points of an epoch."""

    def before_epoch(self, event: BeforeEpoch) -> None:
        event.learner.record["started"] = True

    def after_batch(self, event: AfterBatch) -> None:
        record = event.learner.record
        record["batches"] = record.get("batches", 0) + 1

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.record["double"] = 2 * event.learner.record["batches"]


async def test_what_a_callback_records_is_in_the_cleanup_event_and_in_the_history(
    learner: TrainLearner,
) -> None:
    with record_events(learner) as recorded:
        result = await learner.fit(2, cbs=[Recorder(), MetricsCB()])
    numbers = [
        {"started": True, "batches": 3, "double": 6},
        {"started": True, "batches": 2, "double": 4},
    ] * 2
    losses = [row["loss"] for row in result.history]
    assert [dict(e.metrics) for e in recorded if isinstance(e, CleanupEpoch)] == [
        {**row, "loss": loss} for row, loss in zip(numbers, losses, strict=True)
    ]
    places = [(epoch, phase) for epoch in range(2) for phase in ("train", "eval")]
    assert list(result.history) == [
        {"epoch": epoch, "train": phase, **row, "loss": loss}
        for (epoch, phase), row, loss in zip(places, numbers, losses, strict=True)
    ]


def test_an_epoch_that_was_cut_short_keeps_what_was_recorded(learner: TrainLearner) -> None:
    learner.add_cbs(Recorder())
    learner.on(BeforeBatch, where=lambda e: e.epoch == 1 and e.iter == 2)(cancel)
    with record_events(learner) as recorded:
        result = learner.run(3, valid=False)
    assert [dict(e.metrics) for e in recorded if isinstance(e, CleanupEpoch)] == [
        {"started": True, "batches": 3, "double": 6},
        {"started": True, "batches": 2},
    ]
    assert result.history[1] == {
        "epoch": 1,
        "train": "train",
        "started": True,
        "batches": 2,
        "status": "cancelled",
    }
    assert counts(result) == (1, 5, 0, 5)


def test_the_metrics_of_an_event_stay_as_they_were_told(learner: TrainLearner) -> None:
    """A snapshot: what comes later is in the history alone."""
    learner.add_cbs(Recorder())
    learner.on(CleanupEpoch)(lambda event: event.learner.record.update(late=1))
    with record_events(learner) as recorded:
        result = learner.run(1, valid=False)
    (event,) = [e for e in recorded if isinstance(e, CleanupEpoch)]
    assert dict(event.metrics) == {"started": True, "batches": 3, "double": 6}
    assert result.history[0]["late"] == 1
    with pytest.raises(TypeError):
        event.metrics["late"] = 1  # type: ignore[index]


def test_the_history_of_a_result_is_not_touched_by_the_next_fit(learner: TrainLearner) -> None:
    learner.add_cbs(Recorder())
    first = learner.run(1)
    second = learner.run(2, valid=False)
    assert [row["train"] for row in first.history] == ["train", "eval"]
    assert [row["train"] for row in second.history] == ["train", "train"]


# -------------------------------------------------------------------------------- custom events


def test_a_result_goes_where_hosts_send_it(dls: DataLoaders, backend: dict[str, Any]) -> None:
    """Into JSON, and into another process; with losses in it, too."""
    learner = TrainLearner(nn.Linear(3, 1), dls)
    with learner.observe(lambda event: None, AfterBatch, overflow="latest"):
        result = learner.run(3, **backend)
    assert result.dropped
    assert pickle.loads(pickle.dumps(result)) == result
    assert json.loads(json.dumps(dataclasses.asdict(result)))["dropped"] == result.dropped


@dataclass(frozen=True, slots=True, eq=False)
class LossJumped(BatchEvent):
    """The loss has changed by a lot.

    Attributes:
        by: how much.
    """

    by: float


@dataclass(frozen=True, slots=True, eq=False)
class PhaseChanged(FitEvent):
    """Nothing but the fields of a fit event."""


class Jumps(Callback):
    """Emits an event of its own; needs no base class and no registration."""

    def after_loss(self, event: AfterLoss) -> None:
        event.learner.emit(LossJumped, event.iter / 2)

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.emit(PhaseChanged)


async def test_events_of_a_users_own_travel_like_those_of_the_loop(learner: TrainLearner) -> None:
    """G2: to subscribers, to those of a base class, to async ones and to callback methods."""
    heard: list[tuple[str, int, float]] = []

    class Hears(Callback):
        def loss_jumped(self, event: LossJumped) -> None:
            heard.append(("callback", event.iter, event.by))

    def base(event: BatchEvent) -> None:
        if isinstance(event, LossJumped):
            heard.append(("base", event.iter, event.by))

    async def waits(event: LossJumped) -> None:
        await anyio.lowlevel.checkpoint()
        heard.append(("async", event.iter, event.by))

    learner.subscribe(LossJumped, waits, order=1)
    learner.subscribe(BatchEvent, base, order=-1)
    with record_events(learner) as recorded, anyio.fail_after(GUARD):
        result = await learner.fit(1, valid=False, cbs=[Jumps(), Hears()])
    assert heard == [(who, i, i / 2) for i in range(3) for who in ("base", "callback", "async")]
    jumped = [event for event in recorded if isinstance(event, LossJumped)]
    assert [(e.run_id, e.epoch, e.training, e.iter, e.n_iter) for e in jumped] == [
        (result.run_id, 0, True, i, 3) for i in range(3)
    ]
    assert recorded.names.count("PhaseChanged") == 1
    assert recorded.names.index("LossJumped") == recorded.names.index("AfterLoss") + 1


def test_an_event_nobody_listens_to_is_not_even_made(
    learner: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []

    def of(cls: type[LossJumped], learner: Any, *extra: Any) -> LossJumped:
        made.append(learner.iter)
        return super(LossJumped, cls).of(learner, *extra)

    monkeypatch.setattr(LossJumped, "of", classmethod(of))
    learner.add_cbs(Jumps())
    learner.run(1, valid=False)
    assert made == []
    subscription = learner.subscribe(LossJumped, lambda event: None)
    learner.run(1, valid=False)
    assert made == [0, 1, 2]
    subscription.close()
    learner.run(1, valid=False)
    assert made == [0, 1, 2]


def test_a_cancel_on_an_event_of_a_users_own_ends_the_scope_it_was_emitted_in(
    learner: TrainLearner,
) -> None:
    """G3."""
    learner.add_cbs(Jumps())
    learner.on(LossJumped, where=lambda event: event.iter == 1)(cancel)
    result = learner.run(1)
    assert (result.status, result.who, result.reason) == ("cancelled", "cancel", "enough")
    assert counts(result) == (0, 1, 0, 1)


@pytest.mark.parametrize("make_async", [False, True], ids=["plain", "async"])
async def test_an_async_receiver_may_emit_an_event(
    make_async: bool, anyio_backend: tuple[str, dict[str, Any]], learner: TrainLearner
) -> None:
    """G6: if that event has an async receiver too, the host's loop is not blocked for ever."""
    name, options = anyio_backend
    heard: list[int] = []
    errors: list[Exception] = []

    @learner.on(AfterBatch)
    async def emits(event: AfterBatch) -> None:
        event.learner.emit(LossJumped, 1.0)

    @learner.on(LossJumped)
    def plain(event: LossJumped) -> None:
        heard.append(event.iter)

    if make_async:

        @learner.on(LossJumped, order=1)
        async def waits(event: LossJumped) -> None:
            await anyio.lowlevel.checkpoint()

    def run() -> None:
        try:
            learner.run(1, valid=False, backend=name, backend_options=options)
        except Exception as exc:
            errors.append(exc)

    # In a thread, so that a loop that is blocked does not block the tests.
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    await anyio.to_thread.run_sync(thread.join, GUARD)
    assert not thread.is_alive()
    assert errors == [] or "async" in str(errors[0])
    assert heard == ([0] if errors else [0, 1, 2])


# ----------------------------------------------------------------------------------------- stop


def ends_of(recorded: list[Event]) -> list[tuple[str, str]]:
    """Of each scope but the steps: which, and how it ended."""
    kinds = (CleanupFit, CleanupEpoch, CleanupBatch)
    return [(type(e).__name__, e.end.status) for e in recorded if isinstance(e, kinds)]


@pytest.mark.parametrize(
    ("scope", "counted", "cut"),
    [
        ("batch", (1, 2, 0, 2), ["CleanupBatch"]),
        ("epoch", (0, 1, 0, 1), ["CleanupBatch", "CleanupEpoch"]),
        ("fit", (0, 1, 0, 1), ["CleanupBatch", "CleanupEpoch", "CleanupFit"]),
    ],
)
@pytest.mark.parametrize("how", ["plain", "async"])
async def test_stop_leaves_the_scope_it_names_at_the_next_event(
    how: str, scope: Any, counted: tuple[int, ...], cut: list[str], learner: TrainLearner
) -> None:
    """G1, G3: and no wider one."""
    said: list[bool] = []

    def stop(event: AfterLoss) -> None:
        said.append(event.learner.stop(scope, reason="seen enough"))

    async def stop_async(event: AfterLoss) -> None:
        await anyio.lowlevel.checkpoint()
        stop(event)

    receiver = stop if how == "plain" else stop_async
    learner.subscribe(AfterLoss, receiver, where=lambda event: event.iter == 1)
    with record_events(learner) as recorded, anyio.fail_after(GUARD):
        result = await learner.fit(1, valid=False)
    assert said == [True]
    assert counts(result) == counted
    ended = {type(e).__name__: e.end for e in recorded if hasattr(e, "end") and e.end.who}
    assert ended == dict.fromkeys(cut, ScopeEnd("cancelled", "Learner.stop", "seen enough"))
    second = recorded.names[recorded.names.index("CleanupBatch") + 1 :]
    assert second[:4] == ["BeforeBatch", "AfterPredict", "AfterLoss", "CleanupBatch"]
    assert result.status == ("cancelled" if scope == "fit" else "completed")


def test_stop_in_a_validating_epoch_leaves_that_one(learner: TrainLearner) -> None:
    learner.on(AfterBatch, where=lambda e: not e.training and e.epoch == 0)(
        lambda event: event.learner.stop("epoch")
    )
    with record_events(learner) as recorded:
        result = learner.run(2)
    assert counts(result) == (2, 6, 1 + 2, 6)
    assert [e.end.status for e in recorded if isinstance(e, CleanupEpoch)] == [
        *["completed", "cancelled", "completed", "completed"]
    ]
    assert result.status == "completed"


def test_a_reason_is_given_if_none_was(learner: TrainLearner) -> None:
    learner.on(AfterBatch)(lambda event: event.learner.stop())
    result = learner.run(1)
    assert (result.status, result.who) == ("cancelled", "Learner.stop")
    assert result.reason == "stop() was called"


@pytest.mark.parametrize("caller", ["thread", "task"])
async def test_stop_from_another_thread_and_from_a_task(caller: str, learner: TrainLearner) -> None:
    reached, release = anyio.Event(), threading.Event()
    token = anyio.lowlevel.current_token()

    @learner.on(BeforeBatch, once=True)
    def hold(event: BeforeBatch) -> None:
        anyio.from_thread.run_sync(reached.set, token=token)
        assert release.wait(GUARD)

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learner.fit, 3)
            await reached.wait()
            if caller == "thread":
                assert await anyio.to_thread.run_sync(learner.stop, "fit", "from a thread")
            else:
                assert learner.stop("fit", "from a task")
            assert learner.stopping
            release.set()
    assert learner.result is not None
    assert (learner.result.status, learner.result.batches) == ("cancelled", 0)
    assert learner.result.reason == f"from a {caller}"
    assert not learner.stopping


def test_stop_when_nothing_runs_says_so_and_stops_nothing(learner: TrainLearner) -> None:
    assert [learner.stop(), learner.stop("epoch"), learner.stop("batch", "why")] == [False] * 3
    assert learner.run(1).status == "completed"
    assert learner.stop() is False
    assert counts(learner.run(1)) == (1, 3, 2, 3)


@pytest.mark.parametrize(
    ("scope", "on"),
    [
        ("batch", CleanupBatch),
        ("epoch", CleanupEpoch),
        ("fit", CleanupFit),
        ("fit", AfterFit),
    ],
    ids=["batch", "epoch", "fit", "after fit"],
)
def test_a_stop_that_comes_too_late_stops_nothing_else(
    scope: Any, on: type[Event], learner: TrainLearner
) -> None:
    """G3: what was to be stopped has ended by itself; the next one was not meant."""
    subscription = learner.subscribe(on, lambda event: event.learner.stop(scope))
    with record_events(learner) as recorded:
        result = learner.run(2)
    assert {status for _, status in ends_of(recorded)} == {"completed"}
    assert result.status == "completed"
    assert counts(result) == (2, 6, 4, 6)
    subscription.close()
    assert counts(learner.run(1)) == (1, 3, 2, 3)


def test_a_late_stop_in_the_last_batch_stops_the_epoch_that_is_still_open(
    learner: TrainLearner,
) -> None:
    learner.on(CleanupBatch, where=lambda e: e.training and e.iter == 2)(
        lambda event: event.learner.stop("epoch")
    )
    with record_events(learner) as recorded:
        result = learner.run(1)
    assert counts(result) == (0, 3, 2, 3)
    assert recorded.names.count("AfterEpoch") == 1


@pytest.mark.parametrize(
    ("scope", "on", "counted"),
    [
        ("epoch", BeforeFit, (1, 3, 2 * 2, 3)),
        ("batch", BeforeFit, (2, 5, 2 * 2, 5)),
        ("batch", BeforeEpoch, (2, 4, 2, 4)),
    ],
)
def test_a_stop_before_the_scope_has_begun_is_meant_for_the_next_one(
    scope: Any, on: type[Event], counted: tuple[int, ...], learner: TrainLearner
) -> None:
    learner.on(on)(lambda event: event.learner.stop(scope))
    assert counts(learner.run(2)) == counted


def test_a_scope_that_was_cancelled_is_not_taken_for_open(learner: TrainLearner) -> None:
    """G3: between two epochs no batch is open, though the last one was cancelled."""

    @learner.on(BeforeBatch, where=lambda event: event.epoch == 0 and event.iter == 2)
    def skip(event: BeforeBatch) -> None:
        raise CancelBatchException("the last one")

    learner.on(AfterEpoch, once=True)(lambda event: event.learner.stop("batch"))
    with record_events(learner) as recorded:
        result = learner.run(2, valid=False)
    ends = [(e.epoch, e.iter, e.end.who) for e in recorded if isinstance(e, CleanupBatch)]
    assert [end for end in ends if end[2]] == [(0, 2, skip.__qualname__), (1, 0, "Learner.stop")]
    assert counts(result) == (2, 4, 0, 4)


def test_two_stops_are_both_honoured(learner: TrainLearner) -> None:
    @learner.on(AfterLoss, once=True)
    def stop(event: AfterLoss) -> None:
        assert event.learner.stop("batch", "first")
        assert event.learner.stop("fit", "second")

    with record_events(learner) as recorded:
        result = learner.run(2)
    assert (result.status, result.reason) == ("cancelled", "second")
    ends = [e.end for e in recorded if hasattr(e, "end")]
    assert [end.reason for end in ends] == ["first", "second", "second"]  # no second batch
    assert result.batches == 0


def test_stops_of_one_fit_are_forgotten_in_the_next(learner: TrainLearner) -> None:
    """G9."""

    def stop_all(event: AfterLoss) -> None:
        for scope in ("fit", "epoch", "batch") * 2:
            event.learner.stop(scope)

    with learner.subscribe(AfterLoss, stop_all):
        assert learner.run(2).status == "cancelled"
    assert not learner.stopping
    assert counts(learner.run(1)) == (1, 3, 2, 3)


# -------------------------------------------------------------------------------------- scripts


def test_run_is_fit_on_an_event_loop_of_its_own(
    backend: dict[str, Any], learner: TrainLearner, make_model: MakeModel
) -> None:
    """G11: the same weights, to the bit, on each backend."""
    libraries: set[str] = set()

    @learner.on(AfterBatch)
    async def note(event: AfterBatch) -> None:
        libraries.add(type(anyio.lowlevel.current_token().native_token).__module__.split(".")[0])

    metrics = MetricsCB()
    result = learner.run(2, True, False, metrics, 0.05, **backend)
    assert counts(result) == (2, 6, 0, 6)
    assert len(metrics.history) == 2
    expected = "uvloop" if backend["backend_options"] else backend["backend"]
    assert libraries == {expected}
    model = make_model()
    by_hand(model, learner.dls, 2, optim.SGD(model.parameters(), 0.05))
    assert_same(learner.model, model)


def test_run_again_and_again_and_on_another_backend(learner: TrainLearner) -> None:
    """G9."""
    for backend in ("asyncio", "trio", "asyncio"):
        assert learner.run(1, backend=backend).steps == 3


def test_an_unknown_backend_is_reported_by_anyio(learner: TrainLearner) -> None:
    with pytest.raises(LookupError, match="curio"):
        learner.run(1, backend="curio")
    assert not learner.fitting


def test_a_receiver_may_run_another_learner(
    backend: dict[str, Any], learner: TrainLearner, make_model: MakeModel
) -> None:
    """In the training thread no event loop runs, so a script's `run` is right there too."""
    other = TrainLearner(make_model(), learner.dls)
    learner.on(AfterEpoch, where=lambda event: event.training)(lambda event: other.run(1))
    assert learner.run(2, **backend).status == "completed"
    assert other.result is not None
    assert other.result.status == "completed"


async def test_an_async_receiver_may_fit_another_learner(
    learner: TrainLearner, make_model: MakeModel
) -> None:
    other = TrainLearner(make_model(), learner.dls)

    @learner.on(AfterEpoch, where=lambda event: event.training)
    async def fit(event: AfterEpoch) -> None:
        await other.fit(1)

    with anyio.fail_after(GUARD):
        assert (await learner.fit(1)).status == "completed"
    assert_same(learner.model, other.model)

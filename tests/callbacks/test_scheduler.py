"""SchedulerCB: the learning rates, and so the weights, of a loop written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    GradientAccumulationCB,
    LRFinderCB,
    MetricsCB,
    MixedTrainingCB,
    SchedulerCB,
)
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    AfterEpoch,
    AfterPredict,
    BeforeFit,
    BeforeStep,
    CancelEpochException,
    CancelFitException,
)
from torch import nn, optim
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]
MakeModel = Callable[[], nn.Module]
Digits = tuple[torch.Tensor, torch.Tensor]
Make = Callable[[Any], Any]

LR = 0.1


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def momentum(params: Any, lr: float) -> optim.Optimizer:
    return optim.SGD(params, lr, momentum=0.9)


def lr_of(opt: Any) -> float:
    return float(opt.param_groups[0]["lr"])


def note_lrs(learner: TrainLearner) -> list[float]:
    """The learning rate of every step that is taken."""
    lrs: list[float] = []
    learner.subscribe(BeforeStep, lambda _: lrs.append(lr_of(learner.opt)), order=100)
    return lrs


def halved(opt: Any) -> Any:
    return schedulers.ExponentialLR(opt, 0.5)


# ------------------------------------------------------------------------- the loop by hand


@pytest.fixture
def digit_batches(digits: Digits) -> Batches:
    images, labels = digits
    return [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 128, 32)]


@pytest.mark.parametrize("every", ["step", "epoch"])
def test_lrs_and_weights_are_those_of_a_loop_by_hand(
    every: Any, digit_batches: Batches, make_cnn: MakeModel, backend: dict[str, Any]
) -> None:
    def make(opt: Any) -> Any:
        return schedulers.OneCycleLR(opt, 0.5, total_steps=8 if every == "step" else 2)

    dls = DataLoaders(digit_batches, digit_batches[:1])
    schedule = SchedulerCB(make, every)
    learner = TrainLearner(make_cnn(), dls, F.cross_entropy, LR, schedule, momentum)
    lrs = note_lrs(learner)
    learner.run(2, **backend)

    model = make_cnn()
    opt = momentum(model.parameters(), LR)
    scheduler = make(opt)
    expected = []
    for _ in range(2):
        for x, y in digit_batches:
            F.cross_entropy(model(x), y).backward()
            expected.append(lr_of(opt))
            opt.step()
            opt.zero_grad()
            if every == "step" and len(expected) < 8:
                scheduler.step()
        if every == "epoch" and len(expected) < 8:
            scheduler.step()
    assert lrs == expected
    assert len(set(lrs)) > 1
    assert torch.equal(weights(learner.model), weights(model))


def test_a_plateau_is_told_the_number_of_every_validation(
    digit_batches: Batches, make_cnn: MakeModel, backend: dict[str, Any]
) -> None:
    def make(opt: Any) -> Any:
        return schedulers.ReduceLROnPlateau(opt, factor=0.5, patience=0)

    dls = DataLoaders(digit_batches[:2], digit_batches[2:])
    learner = TrainLearner(make_cnn(), dls, F.cross_entropy, 0.9, MetricsCB())
    lrs = note_lrs(learner)
    result = learner.run(8, cbs=SchedulerCB(make, "epoch", monitor="loss"), **backend)

    model = make_cnn()
    opt = optim.SGD(model.parameters(), 0.9)
    scheduler = make(opt)
    expected = []
    for row in result.history[1::2]:
        assert row["train"] == "eval"
        for x, y in digit_batches[:2]:
            F.cross_entropy(model(x), y).backward()
            expected.append(lr_of(opt))
            opt.step()
            opt.zero_grad()
        scheduler.step(row["loss"])
    assert lrs == expected
    assert lrs[-1] < 0.9
    assert torch.equal(weights(learner.model), weights(model))


def test_without_validation_a_plateau_is_told_the_number_of_training(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    schedule = SchedulerCB(
        lambda opt: schedulers.ReduceLROnPlateau(opt, patience=0, factor=0.5), "epoch", "loss"
    )
    learner = TrainLearner(make_model(), dls, lr=0.0, cbs=[MetricsCB(), schedule])
    learner.subscribe(BeforeFit, lambda _: learner.opt.param_groups[0].update(lr=1e-9))
    result = learner.run(3, valid=False)
    assert schedule.scheduler.best == min(row["loss"] for row in result.history)
    assert schedule.scheduler.last_epoch == 3


class Told:
    """A scheduler of the user's own."""

    def __init__(self, opt: Any) -> None:
        self.steps: list[tuple[Any, ...]] = []

    def step(self, *args: Any) -> None:
        self.steps.append(args)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps = state["steps"]


def test_anything_with_a_step_and_a_state_is_a_scheduler(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    told = []
    for options in ({}, {"every": "epoch"}, {"every": "epoch", "monitor": "loss"}):
        schedule = SchedulerCB(Told, **options)
        learner = TrainLearner(make_model(), dls, cbs=[schedule, MetricsCB()])
        result = learner.run(2)
        told.append(schedule.scheduler.steps)
    losses = [(row["loss"],) for row in result.history[1::2]]
    assert told == [[()] * 6, [()] * 2, losses]


# ------------------------------------------------------------------------ what counts as a step


def test_steps_that_accumulation_leaves_out_do_not_count(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    schedule = SchedulerCB(halved)
    cbs = [schedule, GradientAccumulationCB(2)]
    learner = TrainLearner(make_model(), DataLoaders(make_batches(5)), lr=1.0, cbs=cbs)
    lrs: list[float] = []
    learner.subscribe(AfterBatch, lambda event: lrs.append(event.lr))
    learner.run(1, valid=False)
    assert lrs == [1.0, 1.0, 0.5, 0.5, 0.25]  # the rates that the steps used, or will use


@pytest.fixture(params=["MixedTrainingCB", "AccelerateCB"])
def fp16(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "MixedTrainingCB":
        yield MixedTrainingCB("fp16", init_scale=1024.0)
        return
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    cb = AccelerateCB("no")  # it refuses float16 on a CPU when it is made; the rest is the same
    cb.accelerator.state._mixed_precision = "fp16"
    cb.accelerator.native_amp = True
    cb.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    yield cb
    state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("scheduler_first", [True, False])
def test_a_first_step_that_overflows_does_not_count_and_torch_does_not_warn(
    scheduler_first: bool, fp16: Any, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    cbs = [SchedulerCB(halved), fp16]
    learner = TrainLearner(
        make_model(),
        DataLoaders(make_batches(4)),
        lr=LR,
        cbs=cbs if scheduler_first else cbs[::-1],
    )

    @learner.on(AfterBackward, where=lambda event: event.iter == 0)
    def overflow(event: AfterBackward) -> None:
        learner.model.bias.grad += math.inf

    lrs = note_lrs(learner)
    result = learner.run(1, valid=False)
    assert result.steps == 3
    assert lrs == [LR, LR, LR / 2, LR / 4]


def test_an_epoch_without_any_step_does_not_count_and_torch_does_not_warn(
    fp16: Any, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(
        make_model(), DataLoaders(make_batches(2)), lr=LR, cbs=[SchedulerCB(halved, "epoch"), fp16]
    )

    @learner.on(AfterBackward, where=lambda event: event.epoch == 0)
    def overflow(event: AfterBackward) -> None:
        learner.model.bias.grad += math.inf

    lrs = note_lrs(learner)
    learner.run(3, valid=False)
    assert lrs == [LR, LR, LR, LR, LR / 2, LR / 2]


@pytest.mark.parametrize("valid", [True, False])
def test_an_epoch_that_was_left_counts_when_the_fit_goes_on(
    valid: bool, dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls, lr=LR, cbs=SchedulerCB(halved, "epoch"))

    @learner.on(AfterBatch, where=lambda event: event.training and event.iter == 1)
    def leave(event: AfterBatch) -> None:
        raise CancelEpochException

    lrs = note_lrs(learner)
    learner.run(3, valid=valid)
    assert lrs == [LR, LR, LR / 2, LR / 2, LR / 4, LR / 4]


def test_an_epoch_that_the_fit_ends_in_does_not_count(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    """Where it is taken up again there, it is still to be ended."""
    learner = TrainLearner(make_model(), dls, lr=LR, cbs=SchedulerCB(halved, "epoch"))

    @learner.on(AfterBatch, where=lambda event: event.iter == 1)
    def leave(event: AfterBatch) -> None:
        raise CancelFitException

    learner.run(3)
    assert lr_of(learner.opt) == LR
    learner.run(1, train=False)  # nor does what follows end it
    assert lr_of(learner.opt) == LR


# --------------------------------------------------------------------------- the fits around it


async def test_validate_and_lr_find_do_not_touch_it(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    schedule = SchedulerCB(halved)
    learner = TrainLearner(make_model(), dls, lr=LR, cbs=[schedule, MetricsCB()])
    await learner.fit(1)
    scheduler, opt, state = schedule.scheduler, learner.opt, schedule.state_dict()
    before = lr_of(opt)
    await learner.validate()
    await learner.get_preds()
    finder = await learner.lr_find(lr_mult=1.5)
    ratios = [b / a for a, b in zip(finder.lrs, finder.lrs[1:], strict=False)]
    assert ratios == pytest.approx([1.5] * len(ratios))  # rising, not halved
    assert len(ratios) > 3
    assert schedule.scheduler is scheduler
    assert learner.opt is opt
    assert schedule.state_dict() == state
    assert lr_of(opt) == before
    lrs = note_lrs(learner)
    await learner.fit(2, valid=False, cbs=LRFinderCB(2.0), lr=1e-5)
    assert lrs == pytest.approx([1e-5 * 2**i for i in range(6)])


async def test_validate_before_any_fit_makes_no_scheduler(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    schedule = SchedulerCB(halved)
    learner = TrainLearner(make_model(), dls, cbs=[schedule, MetricsCB()])
    await learner.validate()
    await learner.lr_find()
    assert schedule.scheduler is None


def test_every_fit_has_a_schedule_of_its_own_from_its_own_lr(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    schedule = SchedulerCB(halved)
    learner = TrainLearner(make_model(), dls, lr=LR, cbs=schedule)
    lrs = note_lrs(learner)
    learner.run(1)
    first = schedule.scheduler
    learner.run(1, lr=1.0)
    assert lrs == [LR, LR / 2, LR / 4, 1.0, 0.5, 0.25]
    assert schedule.scheduler is not first


@pytest.mark.parametrize("lr", [None, 1.0])
def test_an_optimizer_that_is_kept_has_its_own_options_back_after_the_fit(
    lr: float | None, dls: DataLoaders, make_model: MakeModel
) -> None:
    model = make_model()
    learner = TrainLearner(model, dls, opt_func=None)
    learner.opt = optim.SGD(model.parameters(), LR, momentum=0.5)
    before = {k: v for k, v in learner.opt.param_groups[0].items() if k != "params"}
    lrs = note_lrs(learner)
    one_cycle = SchedulerCB(lambda opt: schedulers.OneCycleLR(opt, 0.5, total_steps=9))
    for cbs in ([SchedulerCB(halved)], [SchedulerCB(halved), SchedulerCB(halved, "epoch")]):
        learner.run(1, lr=lr, cbs=cbs)
        start = lr or LR
        assert lrs == [start, start / 2, start / 4]
        lrs.clear()
        learner.run(1, lr=lr, cbs=one_cycle)
        lrs.clear()
        after = {k: v for k, v in learner.opt.param_groups[0].items() if k != "params"}
        assert after == before


def test_accelerate_steps_it_as_its_own_optimizer_does(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    try:
        runs = []
        for cbs in ([], [AccelerateCB("no")]):
            learner = TrainLearner(make_model(), dls, lr=LR, cbs=[*cbs, SchedulerCB(halved)])
            lrs = note_lrs(learner)
            learner.run(2)
            runs.append((lrs, weights(learner.model).tolist(), lr_of(learner.opt)))
    finally:
        state.AcceleratorState._reset_state(reset_partial_state=True)
    assert runs[0] == runs[1]


# ----------------------------------------------------------------------------------- resuming


def sequential(opt: Any) -> Any:
    parts = [schedulers.LinearLR(opt, 0.1), schedulers.CosineAnnealingLR(opt, 9)]
    return schedulers.SequentialLR(opt, parts, [3])


def chained(opt: Any) -> Any:
    parts = [schedulers.ConstantLR(opt, 0.5, 3), schedulers.ExponentialLR(opt, 0.9)]
    return schedulers.ChainedScheduler(parts)


class Decay:
    """A function with a memory, which torch writes and reads."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, _: int) -> float:
        self.calls += 1
        return 0.9**self.calls


ALL: dict[str, Make] = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda i: 0.9**i),
    "LambdaLR, object": lambda o: schedulers.LambdaLR(o, Decay()),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda i: 1 - 1 / (i + 2)),
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5, 5, 7]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=5),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=6),
    "ExponentialLR": halved,
    "SequentialLR": sequential,
    "SequentialLR, MultiStepLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.5), schedulers.MultiStepLR(o, [1, 2])], [4]
    ),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 8, 2.0),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 9),
    "ChainedScheduler": chained,
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, mode="exp_range", gamma=0.9),
    "CyclicLR, lambda": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 3, scale_fn=lambda i: 0.5**i),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, 0.3, total_steps=20),
    "SWALR": lambda o: SWALR(o, 0.01, anneal_epochs=6),
}


def test_all_schedulers_of_torch_are_among_those() -> None:
    names = {name.partition(",")[0] for name in ALL} - {"SWALR"}
    assert names == {name for name in schedulers.__all__ if name != "LRScheduler"}


def of(name: str, every: Any) -> SchedulerCB:
    monitored = name == "ReduceLROnPlateau"
    return SchedulerCB(ALL[name], every, "score" if monitored else None)


def learner_of(schedule: SchedulerCB, model: nn.Module, batches: Batches) -> TrainLearner:
    learner = TrainLearner(model, DataLoaders(batches), lr=LR, cbs=schedule, opt_func=momentum)
    learner.subscribe(AfterEpoch, lambda e: learner.record.update(score=1.0))
    return learner


INTERRUPTED = [("step", (1, 2)), ("step", (2, 1)), ("epoch", (1, 1)), ("epoch", (1, 2))]


@pytest.mark.parametrize(
    ("name", "every", "at"),
    [
        (name, every, at)
        for name in ALL
        for every, at in INTERRUPTED
        if (name, every) != ("ReduceLROnPlateau", "step")  # it is told a number, once an epoch
    ],
)
def test_a_resumed_fit_has_the_lrs_and_weights_of_the_undisturbed_one(
    name: str,
    every: Any,
    at: tuple[int, int],
    tmp_path: Path,
    make_batches: MakeBatches,
    make_model: MakeModel,
) -> None:
    """Also after the last batch of an epoch, when the steps were another optimizer object's:
    torch would warn."""
    batches = make_batches(2)
    whole = learner_of(of(name, every), make_model(), batches)
    expected = note_lrs(whole)
    whole.run(6, valid=False)
    assert len(set(expected)) > 1

    learner = learner_of(of(name, every), make_model(), batches)
    lrs = note_lrs(learner)

    @learner.on(AfterBatch, where=lambda e: (e.epoch, e.iter) == (at[0] - 1, at[1] - 1))
    def stop(event: AfterBatch) -> None:
        learner.stop(graceful=True)

    learner.run(6, valid=False, cbs=CheckpointCB(tmp_path))
    assert len(lrs) == (at[0] - 1) * 2 + at[1]

    learner = learner_of(of(name, every), make_model(), batches)
    after = note_lrs(learner)
    learner.run(6, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert lrs + after == expected
    assert torch.equal(weights(learner.model), weights(whole.model))


def test_the_state_is_a_copy(dls: DataLoaders, make_model: MakeModel) -> None:
    schedule = SchedulerCB(Told)
    learner = TrainLearner(make_model(), dls, cbs=schedule)
    states = []
    learner.subscribe(AfterBatch, lambda e: states.append(schedule.state_dict()))
    learner.run(1, valid=False)
    assert [len(state["scheduler"]["steps"]) for state in states] == [1, 2, 3]
    schedule.load_state_dict(states[0])
    schedule.scheduler.step()
    assert [len(state["scheduler"]["steps"]) for state in states] == [1, 2, 3]


# ------------------------------------------------------------------------------------- errors


def test_a_scheduler_where_a_function_is_asked_for_is_refused() -> None:
    opt = optim.SGD([torch.zeros(1, requires_grad=True)], LR)
    with pytest.raises(TypeError, match=r"make is a scheduler, ExponentialLR: .*\(lambda opt:"):
        SchedulerCB(halved(opt))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": "batch"}, "every='batch': choose 'step' or 'epoch'"),
        ({"every": 1}, "every=1: choose 'step' or 'epoch'"),
        ({"every": "epoch", "monitor": ""}, "monitor=''"),
        ({"every": "epoch", "monitor": 1}, "monitor=1"),
        ({"monitor": "loss"}, "monitor='loss': .*once per epoch: .*every='epoch'"),
        ({"every": "step", "monitor": "loss"}, "every='epoch'"),
    ],
)
def test_bad_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SchedulerCB(halved, **options)


def run_with(schedule: SchedulerCB, dls: DataLoaders, make_model: MakeModel) -> None:
    learner = TrainLearner(make_model(), dls, cbs=[schedule, MetricsCB()])
    seen: list[object] = []
    learner.subscribe(AfterPredict, seen.append)
    try:
        learner.run(1)
    finally:
        assert seen == [] or schedule.scheduler is not None  # before any work


@pytest.mark.parametrize("made", [None, 0.1, object()])
def test_what_is_made_must_be_a_scheduler(
    made: Any, dls: DataLoaders, make_model: MakeModel
) -> None:
    with pytest.raises(TypeError, match=r"make=.* returned .*, which has no step\(\)"):
        run_with(SchedulerCB(lambda opt: made), dls, make_model)


class LikeTimm(Told):
    """Has the methods of timm's schedulers, which are told the epoch."""

    def step(self, epoch: int, metric: float | None = None) -> None:
        self.steps.append((epoch,))


@pytest.mark.parametrize(
    ("options", "call"),
    [({}, r"step\(\)"), ({"every": "epoch", "monitor": "loss"}, r"step\(number\)")],
    ids=["without a number", "with a number"],
)
def test_a_scheduler_whose_step_takes_other_arguments_is_refused(
    options: dict[str, Any], call: str, dls: DataLoaders, make_model: MakeModel
) -> None:
    """With a number, it would take the loss for the epoch."""
    told = rf"LikeTimm\.step\(epoch.*\) does not fit: SchedulerCB calls {call}\. Wrap it in a class"
    with pytest.raises(TypeError, match=told):
        run_with(SchedulerCB(LikeTimm, **options), dls, make_model)


def test_a_scheduler_of_another_optimizer_is_refused(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    other = optim.SGD([torch.zeros(1, requires_grad=True)], LR)
    with pytest.raises(ValueError, match="another optimizer"):
        run_with(SchedulerCB(lambda opt: halved(other)), dls, make_model)


def test_a_plateau_without_a_monitor_is_refused(dls: DataLoaders, make_model: MakeModel) -> None:
    for every in ("step", "epoch"):
        with pytest.raises(ValueError, match=r"ReduceLROnPlateau .*monitor='loss'"):
            run_with(SchedulerCB(schedulers.ReduceLROnPlateau, every), dls, make_model)


def test_a_monitor_for_a_scheduler_that_takes_none_is_refused(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    with pytest.raises(ValueError, match="monitor='loss': ExponentialLR"):
        run_with(SchedulerCB(halved, "epoch", "loss"), dls, make_model)


def test_a_monitor_that_is_not_there_names_what_there_is(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    with pytest.raises(ValueError, match=r"monitor='f1'.* but loss"):
        run_with(SchedulerCB(schedulers.ReduceLROnPlateau, "epoch", "f1"), dls, make_model)


def test_what_make_raises_says_what_was_called(dls: DataLoaders, make_model: MakeModel) -> None:
    def make(opt: Any) -> Any:
        return schedulers.OneCycleLR(opt, 0.1)

    with pytest.raises(ValueError, match="total_steps") as caught:
        run_with(SchedulerCB(make), dls, make_model)
    assert any(
        "called as make(opt); a parameter n_steps would get" in note
        for note in caught.value.__notes__
    )

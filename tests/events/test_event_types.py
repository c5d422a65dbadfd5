"""The events as data: what they hold, what they do not, and classes that users add."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import FrozenInstanceError, dataclass, fields, is_dataclass
from typing import Any, ClassVar

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    ActionEvent,
    AfterBackward,
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    AfterPredict,
    AfterStep,
    AfterValidation,
    Backward,
    BatchEvent,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    Bus,
    Callback,
    CancelBatchException,
    CancelException,
    CancelStepException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    EpochEvent,
    Event,
    FitEvent,
    GetLoss,
    Predict,
    ScopeEnd,
    Step,
    StepEvent,
    ZeroGrad,
    record_events,
)
from eventrain.events.base import HOOKS
from torch import nn

EVENT = ["learner", "run_id", "time", "purpose"]
POSITION = [*EVENT, "n_epochs"]
FIT = [*POSITION, "n_steps"]
EPOCH = [*POSITION, "epoch", "training", "n_iter"]
BATCH = [*EPOCH, "iter", "n_samples", "steps", "lr", "lrs", "loss", "opt"]
ACTION = [*EPOCH, "iter", "following"]

FIELDS: dict[type[Event], list[str]] = {
    Event: EVENT,
    FitEvent: FIT,
    BeforeFit: FIT,
    AfterFit: FIT,
    CleanupFit: [*FIT, "end"],
    EpochEvent: EPOCH,
    BeforeEpoch: EPOCH,
    AfterEpoch: EPOCH,
    CleanupEpoch: [*EPOCH, "end", "metrics", "n_samples", "all_read"],
    AfterValidation: [*EPOCH, "name", "metrics", "n_samples", "steps", "seconds"],
    BatchEvent: BATCH,
    BeforeBatch: BATCH,
    AfterPredict: BATCH,
    AfterLoss: BATCH,
    AfterBackward: BATCH,
    AfterBatch: BATCH,
    CleanupBatch: [*BATCH, "end"],
    StepEvent: BATCH,
    BeforeStep: BATCH,
    AfterStep: BATCH,
    CleanupStep: [*BATCH, "end"],
    ActionEvent: ACTION,
    Predict: ACTION,
    GetLoss: ACTION,
    Backward: ACTION,
    Step: ACTION,
    ZeroGrad: ACTION,
}

HOOK_NAMES = {
    Event: "event",
    FitEvent: "fit_event",
    BeforeFit: "before_fit",
    AfterFit: "after_fit",
    CleanupFit: "cleanup_fit",
    EpochEvent: "epoch_event",
    BeforeEpoch: "before_epoch",
    AfterEpoch: "after_epoch",
    CleanupEpoch: "cleanup_epoch",
    AfterValidation: "after_validation",
    BatchEvent: "batch_event",
    BeforeBatch: "before_batch",
    AfterPredict: "after_predict",
    AfterLoss: "after_loss",
    AfterBackward: "after_backward",
    AfterBatch: "after_batch",
    CleanupBatch: "cleanup_batch",
    StepEvent: "step_event",
    BeforeStep: "before_step",
    AfterStep: "after_step",
    CleanupStep: "cleanup_step",
    ActionEvent: "action_event",
    Predict: "predict",
    GetLoss: "get_loss",
    Backward: "backward",
    Step: "step",
    ZeroGrad: "zero_grad",
}

each_class = pytest.mark.parametrize("event_type", FIELDS, ids=lambda cls: cls.__name__)


# ------------------------------------------------------------------------------ what they hold


@each_class
def test_an_event_holds_these_fields_and_no_batch_or_predictions(event_type: type[Event]) -> None:
    """G12: no field could hold a batch, predictions or a graph."""
    assert is_dataclass(event_type)
    assert [field.name for field in fields(event_type)] == FIELDS[event_type]


@each_class
def test_an_event_is_frozen_and_slotted(
    event_type: type[Event], make_event: Callable[..., Any]
) -> None:
    event = make_event(event_type)
    assert not hasattr(event, "__dict__")
    for name in FIELDS[event_type]:
        with pytest.raises(FrozenInstanceError):
            setattr(event, name, None)


@each_class
def test_the_repr_of_an_event_shows_its_values_and_no_learner_or_receivers(
    event_type: type[Event], make_event: Callable[..., Any]
) -> None:
    event = make_event(event_type, learner=nn.Linear(1, 1))
    names = [name for name in FIELDS[event_type] if name not in ("learner", "following")]
    shown = ", ".join(f"{name}={getattr(event, name)!r}" for name in names)
    assert repr(event) == f"{event_type.__name__}({shown})"


def test_events_are_compared_by_identity(make_event: Callable[..., Any]) -> None:
    one, other = make_event(AfterLoss), make_event(AfterLoss)
    assert one != other
    assert len({one, other, one}) == 2


def test_these_are_the_classes_below_event() -> None:
    def below(event_type: type[Event]) -> Iterator[type[Event]]:
        for cls in event_type.__subclasses__():
            yield cls
            yield from below(cls)

    ours = {
        cls
        for cls in below(Event)
        if cls.__module__.startswith("eventrain.") and not cls.__name__.startswith("_")
    }
    # `slots=True` makes a class anew: the names, as the first one may not be collected yet.
    assert {cls.__name__ for cls in ours} | {"Event"} == {cls.__name__ for cls in FIELDS}
    ours = {cls for classes in HOOKS.values() for cls in classes}
    assert {cls for cls in ours if cls.__module__.startswith("eventrain.")} == set(FIELDS)


@pytest.mark.parametrize("event_type", FIELDS, ids=lambda cls: cls.__name__)
def test_only_cleanup_events_reach_all_receivers(event_type: type[Event]) -> None:
    assert event_type.deliver_to_all == event_type.__name__.startswith("Cleanup")


def test_how_a_scope_ended_is_a_value() -> None:
    end = ScopeEnd("cancelled", "Stopper.after_loss", "good enough")
    assert end == ScopeEnd(status="cancelled", who="Stopper.after_loss", reason="good enough")
    assert ScopeEnd("completed") == ScopeEnd("completed", None, None)
    assert not hasattr(end, "__dict__")
    with pytest.raises(FrozenInstanceError):
        end.status = "failed"  # type: ignore[misc]


# ----------------------------------------------------------------------------------- in a fit


def test_the_events_of_a_fit_say_where_it_is(dls: DataLoaders, make_model: Any) -> None:
    learner = TrainLearner(make_model(), dls, lr=0.25)
    with record_events(learner) as events:
        result = learner.run(2)
    assert {event.run_id for event in events} == {result.run_id}
    assert {event.learner for event in events} == {learner}
    assert {event.n_epochs for event in events} == {2}
    assert [event.time for event in events] == sorted(event.time for event in events)
    batches = [event for event in events if isinstance(event, AfterBatch)]
    assert [(e.epoch, e.training, e.iter, e.n_iter, e.n_samples, e.lr) for e in batches] == [
        (epoch, training, i, n, 4 * (i + 1), 0.25)
        for epoch in range(2)
        for training, n in ((True, 3), (False, 2))
        for i in range(n)
    ]
    assert [e.n_samples for e in events if isinstance(e, CleanupEpoch)] == [12, 8, 12, 8]


def test_no_event_has_a_loss_before_there_is_one(dls: DataLoaders, make_model: Any) -> None:
    learner = TrainLearner(make_model(), dls)
    with record_events(learner) as events:
        learner.run(2)
    without = {type(e) for e in events if isinstance(e, BatchEvent | StepEvent) and e.loss is None}
    with_one = {type(e) for e in events if isinstance(e, BatchEvent | StepEvent)} - without
    assert without == {BeforeBatch, AfterPredict}
    assert with_one == {
        AfterLoss, AfterBackward, BeforeStep, AfterStep, CleanupStep, AfterBatch, CleanupBatch
    }  # fmt: skip


def test_the_loss_of_an_event_hangs_on_no_graph(dls: DataLoaders, make_model: Any) -> None:
    """G12: it is detached."""
    learner = TrainLearner(make_model(), dls)
    attached = []
    learner.subscribe(AfterLoss, lambda event: attached.append(learner.loss.requires_grad))
    with record_events(learner) as events:
        learner.run()
    losses = [e.loss for e in events if isinstance(e, AfterLoss)]
    assert attached == [True] * 3 + [False] * 2
    assert [(loss.requires_grad, loss.grad_fn) for loss in losses] == [(False, None)] * 5


@pytest.mark.parametrize("validating", [False, True])
def test_events_that_are_kept_keep_no_batch_prediction_or_graph(
    make_batches: Any, make_model: Any, validating: bool
) -> None:
    """G12: all events of the fit are held, and every earlier batch is gone, without the gc."""

    class Fresh:
        def __iter__(self) -> Iterator[Any]:
            return (tuple(t.clone() for t in batch) for batch in make_batches(4))

    learner = TrainLearner(make_model(), DataLoaders(Fresh(), Fresh()))
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    @learner.on(AfterPredict)
    def count(event: AfterPredict) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        seen.clear()
        seen.extend(map(weakref.ref, [*learner.batch, learner.preds]))

    @learner.on(AfterLoss)
    def graph(event: AfterLoss) -> None:
        seen.append(weakref.ref(learner.loss))

    gc.disable()
    try:
        with record_events(learner) as events:
            learner.run(train=not validating, valid=validating)
    finally:
        gc.enable()
    assert events.names.count("AfterPredict") == 4
    assert alive == [0, 0, 0, 0]


@pytest.mark.parametrize("way", ["receiver", "async receiver", "action", "cleanup"])
@pytest.mark.parametrize("cancel", [CancelBatchException, CancelStepException])
def test_a_cancel_keeps_nothing_of_its_batch_alive(
    make_batches: Any, make_model: Any, cancel: type[CancelException], way: str
) -> None:
    """G12: the predictions that the receiver had in hand are gone before the next ones come,
    without the gc: on a GPU it would not run before the memory is full."""
    learner = TrainLearner(make_model(), DataLoaders(make_batches(4)))
    seen: list[weakref.ref[Any]] = []
    alive: list[int] = []

    @learner.on(AfterPredict)
    def count(event: AfterPredict) -> None:
        alive.append(sum(ref() is not None for ref in seen))
        seen.append(weakref.ref(learner.preds))

    def in_hand(event: Event) -> None:
        preds = learner.preds
        raise cancel(f"shape {preds.shape}")

    async def in_hand_async(event: Event) -> None:
        preds = learner.preds
        await anyio.lowlevel.checkpoint()
        raise cancel(f"shape {preds.shape}")

    if way == "action":
        learner.subscribe(Step, in_hand)
    elif way == "cleanup":
        learner.subscribe(CleanupStep, in_hand)
    else:
        learner.subscribe(BeforeStep, in_hand if way == "receiver" else in_hand_async)
    gc.disable()
    try:
        result = learner.run(valid=False)
    finally:
        gc.enable()
    assert result.status == "completed"
    assert result.steps == (4 if way == "cleanup" else 0)
    assert alive == [0, 0, 0, 0]


def test_the_metrics_of_an_epoch_are_a_copy_that_cannot_be_changed(
    dls: DataLoaders, make_model: Any
) -> None:
    learner = TrainLearner(make_model(), dls)

    @learner.on(AfterEpoch)
    def measure(event: AfterEpoch) -> None:
        learner.record["samples"] = learner.n_samples

    @learner.on(CleanupEpoch, order=1)
    def change(event: CleanupEpoch) -> None:
        learner.record["samples"] = -1

    with record_events(learner) as events:
        learner.run()
    ends = [event for event in events if isinstance(event, CleanupEpoch)]
    assert [dict(event.metrics) for event in ends] == [{"samples": 12}, {"samples": 8}]
    with pytest.raises(TypeError):
        ends[0].metrics["samples"] = 0  # type: ignore[index]


def test_a_learning_rate_that_is_a_tensor_is_a_snapshot_too(
    dls: DataLoaders, make_model: Any
) -> None:
    """Schedulers change such a rate in place: events that were kept must not change with it."""
    learner = TrainLearner(
        make_model(), dls, opt_func=lambda params, lr: torch.optim.SGD(params, torch.tensor(lr))
    )
    learner.subscribe(AfterStep, lambda event: learner.opt.param_groups[0]["lr"].mul_(0.5))
    with record_events(learner) as events:
        learner.run(lr=0.5, valid=False)
    assert [float(e.lr) for e in events if isinstance(e, BeforeStep)] == [0.5, 0.25, 0.125]


# ------------------------------------------------------------------------------- hooks by name


@pytest.mark.parametrize(
    ("event_type", "hook"), HOOK_NAMES.items(), ids=lambda x: getattr(x, "__name__", x)
)
def test_an_event_class_knows_the_callback_method_that_receives_it(
    event_type: type[Event], hook: str
) -> None:
    assert event_type.hook == hook
    assert HOOKS[hook] == (event_type,)


def test_a_custom_event_class_has_a_hook_and_reaches_callbacks(
    dls: DataLoaders, make_model: Any
) -> None:
    @dataclass(frozen=True, slots=True, eq=False)
    class GradientsMeasured(BatchEvent):
        """The length of all gradients together."""

        norm: float

    class Measure(Callback):
        def before_step(self, event: BeforeStep) -> None:
            grads = torch.cat([p.grad.flatten() for p in event.learner.model.parameters()])
            event.learner.emit(GradientsMeasured, grads.norm().item())

    class Keep(Callback):
        def __init__(self) -> None:
            self.events: list[GradientsMeasured] = []

        def gradients_measured(self, event: GradientsMeasured) -> None:
            self.events.append(event)

    keep = Keep()
    learner = TrainLearner(make_model(), dls, cbs=[Measure(), keep])
    with record_events(learner) as events:
        learner.run(valid=False)
    assert GradientsMeasured.hook == "gradients_measured"
    assert keep.events == [e for e in events if isinstance(e, GradientsMeasured)]
    assert [(e.iter, e.training, math.isfinite(e.norm)) for e in keep.events] == [
        (i, True, True) for i in range(3)
    ]
    step = events.names[events.names.index("BeforeStep") :][:3]
    assert step == ["BeforeStep", "GradientsMeasured", "AfterStep"]


def test_an_event_class_need_not_be_a_dataclass_itself(
    make_event: Callable[..., Any],
) -> None:
    class RoundBegins(FitEvent):
        """Nothing is added to a FitEvent."""

    bus, heard = Bus(), []
    bus.subscribe(RoundBegins, heard.append)
    bus.send(event := make_event(RoundBegins, n_epochs=7))
    assert heard == [event]
    assert (event.n_epochs, RoundBegins.hook) == (7, "round_begins")


class WithDict(BatchEvent):
    """Neither a dataclass of its own nor slotted."""


@dataclass(frozen=True, slots=True, eq=False)
class WithDefault(BatchEvent):
    """Has a field with a default."""

    norm: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class WithPostInit(BatchEvent):
    """Checks what it is made of."""

    def __post_init__(self) -> None:
        if self.n_samples > 4:
            raise ValueError("more than one batch")


class WithInit(BatchEvent):
    """Has a constructor of its own."""

    __slots__ = ()
    made: ClassVar[list[int]] = []

    def __init__(self, *values: Any) -> None:
        super().__init__(*values)
        self.made.append(self.iter)


def test_the_constructor_of_a_batch_event_of_ones_own_is_called(
    dls: DataLoaders, make_model: Any
) -> None:
    learner = TrainLearner(make_model(), dls)
    learner.on(BeforeStep)(lambda event: event.learner.emit(WithInit))
    learner.on(WithInit)(lambda event: None)
    learner.run(1, valid=False)
    assert WithInit.made == [0, 1, 2]


@pytest.mark.parametrize("event_type", [WithDict, WithDefault])
def test_a_custom_batch_event_is_made_by_its_own_init(
    event_type: type[Any], dls: DataLoaders, make_model: Any
) -> None:
    learner = TrainLearner(make_model(), dls)
    learner.on(BeforeStep)(lambda event: event.learner.emit(event_type))
    with record_events(learner) as events:
        learner.run(1, valid=False)
    own = [event for event in events if type(event) is event_type]
    assert [(e.iter, e.n_samples, e.lr, e.loss is not None) for e in own] == [
        (0, 4, 0.1, True),
        (1, 8, 0.1, True),
        (2, 12, 0.1, True),
    ]
    assert all(getattr(event, "norm", 1.0) == 1.0 for event in own)


def test_the_post_init_of_a_custom_batch_event_is_called(dls: DataLoaders, make_model: Any) -> None:
    learner = TrainLearner(make_model(), dls)
    learner.on(BeforeStep)(lambda event: event.learner.emit(WithPostInit))
    learner.on(WithPostInit)(lambda event: None)
    with pytest.raises(ValueError, match="more than one batch"):
        learner.run(1, valid=False)
    assert learner.result.batches == 1


def event_class_of_package(package: str, name: str) -> type[Event]:
    """Define an event class as a module of that package would."""
    namespace = {"__module__": package, "__qualname__": name}
    return dataclass(frozen=True, slots=True, eq=False)(type(name, (FitEvent,), namespace))


def test_two_packages_may_each_define_an_event_class_of_the_same_name() -> None:
    first, second = (event_class_of_package(name, "AfterSave") for name in ("first", "second"))
    assert HOOKS["after_save"] == (first, second)


def test_a_class_defined_again_in_the_same_place_takes_the_place_of_the_first() -> None:
    """So that a notebook cell can be run twice."""

    def cell() -> type[Event]:
        @dataclass(frozen=True, slots=True, eq=False)
        class RoundEnds(FitEvent):
            """The cell's."""

        return RoundEnds

    first, second = cell(), cell()
    assert first is not second
    assert HOOKS["round_ends"] == (second,)


def test_a_class_with_an_underscore_in_front_has_no_callback_method() -> None:
    class _InRound(FitEvent):
        """Only a base of others."""

    assert [hook for hook, classes in HOOKS.items() if _InRound in classes] == []

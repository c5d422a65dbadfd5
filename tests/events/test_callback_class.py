"""Callbacks as groups of receivers: which methods are received, which names are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partialmethod
from typing import Any

import pytest
from eventrain.callbacks import LossCurveCB, MetricsCB, ProgressCB, RecordCB, TensorBoardCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterLoss,
    BatchEvent,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelFitException,
    CleanupFit,
    EpochEvent,
    Event,
    FitEvent,
    GetLoss,
    Predict,
    StepEvent,
    Watcher,
    record_events,
)
from structlog.testing import capture_logs


def make_callback(name: str, value: Any = None) -> type[Callback]:
    """A callback class with one method, or whatever is given, under a name."""

    def method(self: Callback, event: Event) -> None: ...

    return type("Mine", (Callback,), {name: method if value is None else value})


@pytest.fixture
def learner(make_batches: Any, make_model: Any) -> TrainLearner:
    """One training batch, no validation."""
    return TrainLearner(make_model(), DataLoaders(make_batches(1)))


# --------------------------------------------------------------------------- what is received


def test_methods_named_after_events_receive_them_while_attached(learner: TrainLearner) -> None:
    class Mine(Callback):
        def __init__(self) -> None:
            self.heard: list[Event] = []

        def before_fit(self, event: BeforeFit) -> None:
            self.heard.append(event)

        def after_loss(self, event: AfterLoss) -> None:
            self.heard.append(event)

        def cleanup_fit(self, event: CleanupFit) -> None:
            self.heard.append(event)

    mine = Mine()
    learner.add_cbs(mine)
    with record_events(learner) as events:
        learner.run(valid=False)
    learner.remove_cbs(mine)
    learner.run(valid=False)
    assert mine.heard == [e for e in events if isinstance(e, BeforeFit | AfterLoss | CleanupFit)]
    assert [type(event) for event in mine.heard] == [BeforeFit, AfterLoss, CleanupFit]


def test_methods_named_after_base_classes_receive_all_below(learner: TrainLearner) -> None:
    heard: dict[str, list[Event]] = {}

    class Mine(Callback):
        def event(self, event: Event) -> None:
            heard.setdefault("event", []).append(event)

        def fit_event(self, event: FitEvent) -> None:
            heard.setdefault("fit_event", []).append(event)

        def epoch_event(self, event: EpochEvent) -> None:
            heard.setdefault("epoch_event", []).append(event)

        def batch_event(self, event: BatchEvent) -> None:
            heard.setdefault("batch_event", []).append(event)

        def step_event(self, event: StepEvent) -> None:
            heard.setdefault("step_event", []).append(event)

    with record_events(learner) as events:
        learner.run(valid=False, cbs=Mine())
    assert heard == {
        hook: [event for event in events if isinstance(event, base)]
        for hook, base in [
            ("event", Event),
            ("fit_event", FitEvent),
            ("epoch_event", EpochEvent),
            ("batch_event", BatchEvent),
            ("step_event", StepEvent),
        ]
    }


def test_methods_named_after_actions_perform_them_and_the_learners_do_not(
    learner: TrainLearner,
) -> None:
    performed: list[str] = []

    class Mine(Callback):
        def predict(self, event: Predict) -> None:
            performed.append("predict")
            event.learner.preds = event.learner.model(event.learner.batch[0])

        def get_loss(self, event: GetLoss) -> None:
            performed.append("get_loss")
            event.learner.loss = 0 * event.learner.preds.sum()

    before = learner.model.weight.clone()
    learner.run(valid=False, cbs=Mine())
    assert performed == ["predict", "get_loss"]
    assert learner.model.weight.equal(before)


def test_receivers_are_the_methods_with_their_events(learner: TrainLearner) -> None:
    class Base(Callback):
        def before_fit(self, event: BeforeFit) -> None: ...

        def after_batch(self, event: AfterBatch) -> None: ...

    class Below(Base):
        before_fit = None  # type: ignore[assignment]

        def before_batch(self, event: BeforeBatch) -> None: ...

    below = Below()
    below.after_epoch = print  # type: ignore[attr-defined]
    assert set(below.receivers(learner)) == {
        (AfterBatch, below.after_batch),
        (BeforeBatch, below.before_batch),
        (AfterEpoch, print),
    }
    assert list(Callback().receivers(learner)) == []


def test_one_instance_gets_the_events_of_each_learner_it_is_attached_to(
    make_batches: Any, make_model: Any
) -> None:
    class Mine(Callback):
        def __init__(self) -> None:
            self.heard: list[Any] = []

        def before_fit(self, event: BeforeFit) -> None:
            self.heard.append(event.learner)

    mine = Mine()
    learners = [
        TrainLearner(make_model(), DataLoaders(make_batches(1)), cbs=mine) for _ in range(2)
    ]
    for learner in learners:
        learner.run(valid=False)
    assert mine.heard == learners


def test_an_event_class_made_after_the_callback_class_is_received(learner: TrainLearner) -> None:
    heard: list[Event] = []

    class Mine(Callback):
        def round_ended(self, event: Event) -> None:
            heard.append(event)

        def before_fit(self, event: BeforeFit) -> None:
            event.learner.emit(RoundEnded, 7)

    @dataclass(frozen=True, slots=True, eq=False)
    class RoundEnded(FitEvent):
        """Defined when the callback was defined already."""

        number: int

    with record_events(learner) as events:
        learner.run(valid=False, cbs=Mine())
    assert heard == [event for event in events if isinstance(event, RoundEnded)]
    assert [event.number for event in heard] == [7]  # type: ignore[attr-defined]


def test_a_receiver_that_cancels_is_named_by_class_and_method(learner: TrainLearner) -> None:
    class Stopper(Callback):
        def after_loss(self, event: AfterLoss) -> None:
            raise CancelFitException("enough")

    result = learner.run(valid=False, cbs=Stopper())
    assert (result.status, result.reason) == ("cancelled", "enough")
    assert result.who == f"{Stopper.__qualname__}.after_loss"


def test_a_hook_that_takes_no_event_is_refused_when_attached(learner: TrainLearner) -> None:
    class Mine(Callback):
        def before_fit(self) -> None: ...

        def after_fit(self, event: Event) -> None: ...

    with pytest.raises(TypeError, match=r"before_fit\(\).* cannot receive BeforeFit.*one argument"):
        learner.add_cbs(Mine())
    assert learner.cbs == ()
    assert learner.bus.subscriptions() == ()


# -------------------------------------------------------------------------- names that are refused


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("befor_batch", "before_batch"),
        ("before_bach", "before_batch"),
        ("after_bach", "after_batch"),
        ("afterbatch", "after_batch"),
        ("after_lose", "after_loss"),
        ("before_epochs", "before_epoch"),
        ("cleanup_fits", "cleanup_fit"),
        ("clean_up_batch", "cleanup_batch"),
        ("after_pred", "after_predict"),
        ("get_losses", "get_loss"),
        ("zero_grads", "zero_grad"),
        ("backwards", "backward"),
    ],
)
def test_a_misspelt_hook_is_refused_with_a_suggestion(name: str, meant: str) -> None:
    with pytest.raises(
        TypeError,
        match=rf"^Mine\.{name} does not receive an event: did you mean '{meant}'\?"
        rf".*underscore.*_{name}",
    ):
        make_callback(name)


@pytest.mark.parametrize("name", ["before_breakfast", "after_all", "cleanup_files"])
def test_a_method_with_the_prefix_of_a_hook_is_refused_with_the_hooks_there_are(name: str) -> None:
    with pytest.raises(
        TypeError,
        match=rf"Mine\.{name} does not receive an event: the events are .*after_batch.*zero_grad",
    ):
        make_callback(name)


@pytest.mark.parametrize(
    "value",
    [
        lambda self, event: None,
        staticmethod(lambda event: None),
        classmethod(lambda cls, event: None),
        partialmethod(lambda self, event: None),
    ],
    ids=["lambda", "staticmethod", "classmethod", "partialmethod"],
)
def test_a_misspelt_hook_is_refused_however_it_is_made(value: Any) -> None:
    with pytest.raises(TypeError, match=r"did you mean 'before_batch'"):
        make_callback("befor_batch", value)


def test_a_misspelt_async_hook_is_refused() -> None:
    with pytest.raises(TypeError, match="did you mean 'after_epoch'"):

        class Mine(Callback):
            async def after_epock(self, event: AfterEpoch) -> None: ...


def test_a_misspelt_hook_of_a_subclass_is_refused() -> None:
    class Base(Callback):
        def before_epoch(self, event: BeforeEpoch) -> None: ...

    with pytest.raises(TypeError, match=r"Below\.befor_epoch does not receive an event"):

        class Below(Base):
            def befor_epoch(self, event: BeforeEpoch) -> None: ...


@pytest.mark.parametrize("name", ["preditc", "backwrd", "get_los", "zero_grd"])
def test_a_misspelt_action_is_refused_whatever_its_parameter_is_called(name: str) -> None:
    with pytest.raises(TypeError, match="did you mean"):
        make_callback(name, lambda self, x: None)


@pytest.mark.parametrize("name", ["steps", "events", "backwards", "predicts", "step_events"])
def test_a_method_may_have_a_name_close_to_a_short_hook(name: str) -> None:
    make_callback(name, lambda self: None)
    make_callback(name, lambda self, n: None)
    make_callback(name, lambda self, n, event: None)


def test_a_builtin_without_a_signature_may_have_a_near_name_but_not_an_ambiguous_one() -> None:
    make_callback("steps", max)
    for package in ("first", "second"):
        package_with_after_save(package)
    with pytest.raises(TypeError, match=r"first\.AfterSave and second\.AfterSave"):
        make_callback("after_save", max)


def test_a_near_name_is_refused_if_its_parameter_is_annotated_with_an_event() -> None:
    with pytest.raises(TypeError, match="did you mean 'step'"):

        class Mine(Callback):
            def steps(self, e: BeforeEpoch) -> None: ...


# ------------------------------------------------------- two event classes of the same name


def package_with_after_save(package: str) -> type[Event]:
    """Define an event class AfterSave as a module of that package would."""
    namespace = {"__module__": package, "__qualname__": "AfterSave"}
    cls = type("AfterSave", (FitEvent,), namespace)
    return dataclass(frozen=True, slots=True, eq=False)(cls)


def test_a_method_that_two_event_classes_could_mean_is_refused_with_both_named() -> None:
    for package in ("first", "second"):
        package_with_after_save(package)
    with pytest.raises(
        TypeError,
        match=r"Mine\.after_save could receive first\.AfterSave and second\.AfterSave: annotate",
    ):
        make_callback("after_save")


def test_the_annotation_tells_which_of_two_event_classes_a_method_receives(
    learner: TrainLearner,
) -> None:
    first, second = map(package_with_after_save, ("first", "second"))

    def after_save(self: Any, event: Event) -> None:
        heard.append(event)

    after_save.__annotations__["event"] = second
    heard: list[Event] = []
    learner.add_cbs(make_callback("after_save", after_save)())
    learner.emit(first)
    learner.emit(second)
    assert [type(event) for event in heard] == [second]


def test_an_optional_annotation_and_a_partial_method_tell_it_as_well(
    learner: TrainLearner,
) -> None:
    first, second = map(package_with_after_save, ("first", "second"))

    def after_save(self: Any, n: int, event: Event | None) -> None:
        heard.append(event)

    after_save.__annotations__["event"] = second | None
    heard: list[Event | None] = []
    learner.add_cbs(make_callback("after_save", partialmethod(after_save, 1))())
    learner.emit(first)
    learner.emit(second)
    assert [type(event) for event in heard] == [second]


def test_a_second_event_class_that_comes_later_is_noticed_when_the_callback_is_attached(
    learner: TrainLearner,
) -> None:
    package_with_after_save("first")
    callback = make_callback("after_save")()
    package_with_after_save("second")
    with pytest.raises(TypeError, match=r"first\.AfterSave and second\.AfterSave"):
        learner.add_cbs(callback)
    assert learner.cbs == ()


def test_the_callbacks_of_the_library_receive_its_own_events_whatever_others_define(
    learner: TrainLearner,
) -> None:
    namespace = {"__module__": "other", "__qualname__": "AfterBatch"}
    dataclass(frozen=True, slots=True, eq=False)(type("AfterBatch", (BatchEvent,), namespace))
    learner.add_cbs(MetricsCB())
    assert learner.run(1, valid=False).history[0]["loss"] > 0


# ---------------------------------------------------------------------------------- watchers


@pytest.mark.parametrize("name", ["wants", "observe"])
@pytest.mark.parametrize("base", [RecordCB, TensorBoardCB, ProgressCB, LossCurveCB])
def test_an_override_that_a_watcher_bypasses_is_refused(base: type[Callback], name: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{name} would never be called: .*watcher\(event\)"):
        type("Mine", (base,), {name: lambda self, event: True})


def test_an_override_is_accepted_where_the_class_has_a_watcher_of_its_own() -> None:
    class Mine(RecordCB):
        def watcher(self, event: Event) -> Watcher:
            return self  # type: ignore[return-value]

        def observe(self, event: Event) -> None: ...

        def write(self, record: dict[str, Any]) -> None: ...


def generator(self: Callback, event: Event) -> Any:
    yield event


@pytest.mark.parametrize("observe", [generator, lambda self: None], ids=["generator", "no event"])
def test_an_observe_that_cannot_receive_events_is_refused_when_attached(
    learner: TrainLearner, observe: Any
) -> None:
    callback = type("Mine", (Callback,), {"observes": (AfterBatch,), "observe": observe})()
    with pytest.raises(TypeError, match=r"generator|cannot receive AfterBatch"):
        learner.add_cbs(callback)
    assert learner.cbs == ()


def test_the_watcher_of_a_fit_is_closed_after_its_last_event(learner: TrainLearner) -> None:
    said: list[str] = []

    class OneFit:
        def wants(self, event: Event) -> bool:
            return True

        def observe(self, event: Event) -> None:
            said.append(type(event).__name__)

        async def close(self) -> None:
            said.append("close")

    class Mine(Callback):
        observes = (BeforeFit, CleanupFit)

        def watcher(self, event: Event) -> Watcher:
            said.append("made")
            return OneFit()

    learner.add_cbs(Mine())
    for _ in range(2):
        learner.run(1, valid=False)
    assert said == ["made", "BeforeFit", "CleanupFit", "close"] * 2


def test_a_watcher_that_cannot_be_closed_is_logged_and_does_not_end_the_fit(
    learner: TrainLearner,
) -> None:
    class OneFit:
        def wants(self, event: Event) -> bool:
            return True

        def observe(self, event: Event) -> None: ...

        async def close(self) -> None:
            raise OSError("disk full")

    class Mine(Callback):
        observes = (BeforeFit,)

        def watcher(self, event: Event) -> Watcher:
            return OneFit()

    with capture_logs() as logs:
        result = learner.run(1, valid=False, cbs=Mine())
    assert result.status == "completed"
    assert [(line["event"], line["observer"]) for line in logs] == [
        ("observer_failed", f"{Mine.__qualname__}.observe")
    ]


def test_a_hook_of_all_actions_is_refused_as_no_receiver_can_have_it() -> None:
    """`action_event` would never be called: exactly one receiver performs each action."""
    with pytest.raises(TypeError, match="action_event"):
        make_callback("action_event")


def test_a_misspelt_hook_of_a_custom_event_class_is_refused() -> None:
    @dataclass(frozen=True, slots=True, eq=False)
    class GradientsMeasured(BatchEvent):
        """With a hook to be misspelt."""

    with pytest.raises(TypeError, match="did you mean 'gradients_measured'"):
        make_callback("gradient_measured")
    make_callback("gradients_measured")


@pytest.mark.parametrize(
    "name",
    [
        "_befor_batch",
        "_after_bach",
        "__after_batch",
        "plot",
        "report",
        "state_dict",
        "load_state_dict",
        "on_plateau",
        "is_better",
        "unscale",
    ],
)
def test_a_helper_with_another_name_or_an_underscore_is_fine(
    name: str, learner: TrainLearner
) -> None:
    mine = make_callback(name)()
    assert list(mine.receivers(learner)) == []


@pytest.mark.parametrize("value", [3, "text", (1, 2), None, property(lambda self: 3)])
def test_an_attribute_may_have_any_name(value: Any, learner: TrainLearner) -> None:
    cls = type("Mine", (Callback,), {"after_bach": value, "before_n_steps": value})
    assert list(cls().receivers(learner)) == []


def test_a_nested_class_may_have_any_name(learner: TrainLearner) -> None:
    class Mine(Callback):
        class after_bach: ...

    assert list(Mine().receivers(learner)) == []


def test_the_methods_of_a_callback_itself_may_be_overridden(learner: TrainLearner) -> None:
    class Mine(Callback):
        def receivers(self, learner: Any) -> Any:
            yield AfterEpoch, self.done

        def wants(self, event: Event) -> bool:
            return False

        def done(self, event: AfterEpoch) -> None:
            heard.append(event)

    heard: list[Event] = []
    learner.run(valid=False, cbs=Mine())
    assert [type(event) for event in heard] == [AfterEpoch]


# ---------------------------------------------------------------------------------- observing


def test_a_callback_that_observes_needs_a_method_for_it() -> None:
    with pytest.raises(TypeError, match=r"has `observes`, but no method `observe`"):
        type("Mine", (Callback,), {"observes": (AfterBatch,)})


@pytest.mark.parametrize("observe", [None, 3, "observe"])
def test_an_observe_that_is_not_a_method_is_refused(observe: Any) -> None:
    with pytest.raises(TypeError, match=r"no method `observe`"):
        type("Mine", (Callback,), {"observes": (AfterBatch,), "observe": observe})


def test_a_callback_may_inherit_its_observe_method() -> None:
    class Base(Callback):
        def observe(self, event: Event) -> None: ...

    class Below(Base):
        observes = (AfterBatch, AfterEpoch)

    assert Below().observes == (AfterBatch, AfterEpoch)
    assert Base().observes == ()


def test_the_defaults_of_a_callback() -> None:
    callback = Callback()
    wants: Callable[[Any], bool] = callback.wants
    assert (callback.order, callback.run_after, callback.run_before) == (0, (), ())
    assert (callback.observes, callback.buffer, callback.overflow) == ((), 1024, "drop_oldest")
    assert wants(None) is True

"""The five actions: exactly one receiver performs each, and it is clear which."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    GradientAccumulationCB,
    MixedTrainingCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner, replaceable
from eventrain.events import (
    ActionEvent,
    AfterBatch,
    Backward,
    BeforeBatch,
    BeforeFit,
    BeforeStep,
    Bus,
    Callback,
    Event,
    GetLoss,
    Predict,
    Step,
    ZeroGrad,
    record_events,
)
from eventrain.events.types import ACTIONS
from torch import nn

from tests.support.waiting import GUARD

TRAINING_BATCH = ["predict", "get_loss", "backward", "step", "zero_grad"]
VALIDATING_BATCH = ["predict", "get_loss"]
MakeModel = Callable[[], nn.Module]


class Spoken(Learner):
    """Performs the actions, and says so. Callbacks may take them over."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.said: list[str] = []
        self.train_cb = TrainCB()

    def do(self, action: type[ActionEvent], by: str) -> None:
        self.said.append(f"{by}.{action.hook}")
        getattr(self.train_cb, action.hook)(action.of(self))

    @replaceable
    def predict(self) -> None:
        self.do(Predict, "method")

    @replaceable
    def get_loss(self) -> None:
        self.do(GetLoss, "method")

    @replaceable
    def backward(self) -> None:
        self.do(Backward, "method")

    @replaceable
    def step(self) -> None:
        self.do(Step, "method")

    @replaceable
    def zero_grad(self) -> None:
        self.do(ZeroGrad, "method")


class Judge(Learner):
    """Can validate, and nothing else."""

    def predict(self) -> None:
        self.preds = self.model(self.batch[0])

    def get_loss(self) -> None:
        self.loss = self.loss_func(self.preds, self.batch[1])


def taking_over(action: type[ActionEvent], by: str, order: float = 0) -> Callback:
    """A callback that performs one action of a `Spoken` learner."""

    def perform(self: Callback, event: ActionEvent) -> None:
        event.learner.do(action, by)

    perform.__name__ = action.hook
    return type(by, (Callback,), {action.hook: perform, "order": order})()


@pytest.fixture
def learner(make_model: MakeModel, dls: DataLoaders) -> Spoken:
    return Spoken(make_model(), dls)


def said_by_method(batch: list[str], n: int) -> list[str]:
    return [f"method.{hook}" for hook in batch * n]


def trained_by_hand(make_model: MakeModel, dls: DataLoaders) -> nn.Module:
    model = make_model()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    for x, y in dls.train:
        nn.functional.mse_loss(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


# --------------------------------------------------------------------------------- who performs


def test_the_learners_methods_perform_each_action_once_a_batch(learner: Spoken) -> None:
    learner.run(1)
    assert learner.said == said_by_method(TRAINING_BATCH, 3) + said_by_method(VALIDATING_BATCH, 2)


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.hook)
def test_a_callback_takes_an_action_over_from_the_method(
    action: type[ActionEvent], learner: Spoken, make_model: MakeModel
) -> None:
    learner.add_cbs(taking_over(action, "callback"))
    learner.run(1, valid=False)
    assert learner.said == [
        f"callback.{hook}" if hook == action.hook else f"method.{hook}"
        for hook in TRAINING_BATCH * 3
    ]
    assert_same(learner.model, trained_by_hand(make_model, learner.dls))


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.hook)
def test_the_first_in_order_performs_and_the_others_do_not(
    action: type[ActionEvent], learner: Spoken
) -> None:
    """G2: whichever was attached first."""
    for by, order in (("middle", 0), ("last", 0.5), ("first", -1)):
        learner.add_cbs(taking_over(action, by, order))
    learner.run(1, valid=False)
    performed = [said for said in learner.said if said.endswith(f".{action.hook}")]
    assert performed == [f"first.{action.hook}"] * 3


def test_run_before_decides_who_is_first(learner: Spoken) -> None:
    """Where it is stated who goes first nothing is left to chance, so nothing is refused."""
    early = taking_over(Predict, "early", order=-5)
    late = taking_over(Predict, "late", order=5)
    late.run_before = ("early",)
    learner.add_cbs([early, late])
    learner.run(1, valid=False)
    assert learner.said.count("late.predict") == 3
    assert learner.said.count("early.predict") == 0


def test_subscribers_and_callbacks_are_in_one_order(learner: Spoken) -> None:
    learner.add_cbs(taking_over(Step, "callback", order=1))
    learner.on(Step, order=2)(lambda event: event.learner.do(Step, "behind"))
    learner.on(ZeroGrad, order=-1)(lambda event: event.learner.do(ZeroGrad, "front"))
    learner.add_cbs(taking_over(ZeroGrad, "callback", order=0))
    learner.run(1, valid=False)
    assert (
        learner.said
        == [
            "method.predict",
            "method.get_loss",
            "method.backward",
            "callback.step",
            "front.zero_grad",
        ]
        * 3
    )


def test_who_listens_to_everything_performs_nothing(learner: Spoken) -> None:
    """A subscription to a base class gets no actions, so it takes none over."""
    heard: list[Event] = []
    learner.on(Event)(heard.append)
    learner.run(1)
    assert len(learner.said) == 3 * 5 + 2 * 2
    assert not any(isinstance(event, ActionEvent) for event in heard)


async def test_a_plain_subscriber_performs_an_action(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = TrainLearner(make_model(), dls)
    threads: set[str] = set()

    @learner.on(Predict)
    def predict(event: Predict) -> None:
        threads.add(threading.current_thread().name)
        event.learner.preds = event.learner.model(event.learner.batch[0])

    with anyio.fail_after(GUARD):
        result = await learner.fit(1, valid=False)
    assert result.steps == 3
    assert threads == {f"eventrain-{result.run_id}"}
    assert_same(learner.model, trained_by_hand(make_model, dls))


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.hook)
async def test_an_async_receiver_performs_an_action(
    action: type[ActionEvent], learner: Spoken, make_model: MakeModel
) -> None:
    """G2: it is awaited in the caller's thread, and the training waits for it."""
    threads: set[int] = set()

    @learner.on(action)
    async def perform(event: ActionEvent) -> None:
        await anyio.lowlevel.checkpoint()
        threads.add(threading.get_ident())
        event.learner.do(type(event), "async")

    with anyio.fail_after(GUARD):
        result = await learner.fit(1, valid=False)
    assert result.status == "completed"
    assert [said for said in learner.said if said.startswith("async")] == [
        f"async.{action.hook}"
    ] * 3
    assert [said.split(".")[1] for said in learner.said] == TRAINING_BATCH * 3
    assert threads == {threading.get_ident()}
    assert_same(learner.model, trained_by_hand(make_model, learner.dls))


async def test_an_async_callback_performs_an_action(learner: Spoken) -> None:
    class Remote(Callback):
        async def get_loss(self, event: GetLoss) -> None:
            await anyio.lowlevel.checkpoint()
            event.learner.do(GetLoss, "remote")

    with anyio.fail_after(GUARD):
        await learner.fit(1, cbs=Remote())
    assert learner.said.count("remote.get_loss") == 3 + 2
    assert learner.said.count("method.get_loss") == 0


class Distant(TrainLearner):
    """Its model is somewhere else."""

    async def predict(self) -> None:
        await anyio.lowlevel.checkpoint()
        self.preds = self.model(self.batch[0])


async def test_an_async_method_of_the_learner_is_awaited(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = Distant(make_model(), dls)
    with anyio.fail_after(GUARD):
        result = await learner.fit(1, valid=False)
    assert result.steps == 3
    assert_same(learner.model, trained_by_hand(make_model, dls))


def test_a_performer_that_comes_and_goes_in_the_middle_of_a_fit(learner: Spoken) -> None:
    second = taking_over(Predict, "callback")

    @learner.on(BeforeBatch, where=lambda event: event.iter == 1)
    def attach(event: BeforeBatch) -> None:
        event.learner.add_cbs(second)

    @learner.on(AfterBatch, where=lambda event: event.iter == 1)
    def detach(event: AfterBatch) -> None:
        event.learner.remove_cbs(second)

    learner.run(1, valid=False)
    assert [said for said in learner.said if said.endswith("predict")] == [
        "method.predict",
        "callback.predict",
        "method.predict",
    ]
    assert learner.cbs == ()


def test_a_performer_that_closes_itself_leaves_the_action_to_the_next(learner: Spoken) -> None:
    learner.on(Backward, once=True)(lambda event: event.learner.do(Backward, "once"))
    learner.run(1, valid=False)
    assert [said for said in learner.said if said.endswith("backward")] == [
        "once.backward",
        "method.backward",
        "method.backward",
    ]


def test_learners_that_share_a_bus_perform_their_own_actions(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """G10: a subscriber of one is not a performer for the other."""
    bus = Bus()
    one, other = (Spoken(make_model(), dls, bus=bus) for _ in range(2))
    one.add_cbs(taking_over(Predict, "callback"))
    one.run(1, valid=False)
    other.run(1, valid=False)
    assert one.said.count("callback.predict") == 3
    assert other.said == said_by_method(TRAINING_BATCH, 3)


def test_an_action_event_has_the_position_of_the_loop(learner: Spoken) -> None:
    told: list[tuple[int, bool, int, int | None]] = []

    @learner.on(Predict)
    def predict(event: Predict) -> None:
        assert event.run_id == event.learner.run_id
        told.append((event.epoch, event.training, event.iter, event.n_iter))
        event.learner.do(Predict, "subscriber")

    learner.run(2)
    one_epoch = [(True, 0, 3), (True, 1, 3), (True, 2, 3), (False, 0, 2), (False, 1, 2)]
    assert told == [(epoch, *rest) for epoch in (0, 1) for rest in one_epoch]


# -------------------------------------------------------------------------------- TrainCB & Co.


def test_train_cb_trains_a_plain_learner(make_model: MakeModel, dls: DataLoaders) -> None:
    learner = Learner(make_model(), dls, cbs=TrainCB())
    assert learner.run(1).steps == 3
    assert_same(learner.model, trained_by_hand(make_model, dls))


def test_train_cb_next_to_a_train_learner_performs_each_action_once(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """In the post each would perform it, and the backward pass would run twice."""
    learner = TrainLearner(make_model(), dls, cbs=TrainCB())
    assert learner.run(1).steps == 3
    assert_same(learner.model, trained_by_hand(make_model, dls))


def test_whoever_performs_an_action_does_so_before_train_cb(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    said: list[str] = []

    class Backwards(Callback):
        order = 999

        def backward(self, event: Backward) -> None:
            said.append("callback.backward")
            event.learner.loss.backward()

    learner = Learner(make_model(), dls, cbs=[TrainCB(), Backwards()])
    learner.run(1, valid=False)
    assert said == ["callback.backward"] * 3
    assert_same(learner.model, trained_by_hand(make_model, dls))


def test_train_cb_leaves_to_a_learner_what_its_own_class_has_a_method_for(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """G18."""

    class Own(TrainLearner):
        calls = 0

        def get_loss(self) -> None:
            self.calls += 1
            super().get_loss()

    learner = Own(make_model(), dls, cbs=TrainCB())
    learner.run(1)
    assert learner.calls == 3 + 2


def test_momentum_learner_does_not_shadow_mixed_precision(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """In the post its methods win, and nothing is ever scaled."""
    mixed = MixedTrainingCB("fp16", init_scale=8.0)
    learner = MomentumLearner(make_model(), dls, cbs=mixed)
    scaled: list[float] = []

    @learner.on(BeforeStep, order=-1)
    def look(event: BeforeStep) -> None:
        scaled.append(mixed.scaler.get_scale())

    explained = learner.explain().splitlines()
    assert (
        "Backward: performed by MixedTrainingCB.backward (order 60), around"
        " MomentumLearner.backward" in explained
    )
    assert "ZeroGrad: performed by MomentumLearner.zero_grad" in explained
    assert learner.run(1, valid=False).steps == 3
    assert scaled == [8.0] * 3


@pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["mixed first", "accelerate first"])
def test_mixed_precision_and_accelerate_together_are_refused(
    order: list[int], make_model: MakeModel, dls: DataLoaders
) -> None:
    """Both scale the loss; which of them would win is nobody's to guess."""
    both = [MixedTrainingCB("fp16"), AccelerateCB("no")]
    learner = TrainLearner(make_model(), dls, cbs=[both[i] for i in order])
    with record_events(learner) as recorded, pytest.raises(ValueError, match="both perform") as e:
        learner.run(1)
    assert "MixedTrainingCB.backward" in str(e.value)
    assert "AccelerateCB.backward" in str(e.value)
    assert "order 60: remove one of them" in str(e.value)
    assert recorded == []


def test_bf16_autocast_goes_with_accelerate_as_neither_scales(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    alone = TrainLearner(make_model(), dls, cbs=MixedTrainingCB("bf16"))
    alone.run(1)
    for cbs in ([MixedTrainingCB("bf16"), AccelerateCB("no")], [AccelerateCB("no")]):
        learner = TrainLearner(make_model(), dls, cbs=cbs)
        learner.run(1)
        same = all(map(torch.equal, learner.model.parameters(), alone.model.parameters()))
        assert same == (len(cbs) == 2)


# ------------------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("action", ACTIONS, ids=lambda action: action.hook)
def test_two_callbacks_of_one_order_are_refused_by_name(
    action: type[ActionEvent], learner: Spoken
) -> None:
    learner.add_cbs([taking_over(action, "Anna", 7), taking_over(action, "Otto", 7)])
    opt = learner.opt
    with record_events(learner) as recorded, pytest.raises(ValueError, match="both") as raised:
        learner.run(1)
    assert str(raised.value) == (
        f"Anna.{action.hook} and Otto.{action.hook} both perform {action.__name__} at order 7:"
        " remove one of them, or give one a lower order"
    )
    assert recorded == []
    assert learner.said == []
    assert learner.opt is opt
    assert learner.result is None


def test_the_same_order_is_refused_for_a_temporary_callback_which_is_gone_then(
    learner: Spoken,
) -> None:
    """G9."""
    learner.add_cbs(taking_over(Predict, "Anna"))
    with pytest.raises(ValueError, match=r"Anna.predict and Otto.predict both perform Predict"):
        learner.run(1, cbs=taking_over(Predict, "Otto"))
    assert [type(cb).__name__ for cb in learner.cbs] == ["Anna"]
    learner.run(1, valid=False)
    assert learner.said.count("Anna.predict") == 3


def test_two_subscribers_of_one_order_are_refused_too(learner: Spoken) -> None:
    for name in ("one", "two"):

        def perform(event: Step) -> None: ...

        perform.__qualname__ = name
        learner.on(Step)(perform)
    with pytest.raises(ValueError, match="one and two both perform Step at order 0"):
        learner.run(1)


def test_two_of_one_order_behind_a_third_harm_nobody(learner: Spoken) -> None:
    """Neither performs it, so neither is passed over by chance."""
    for by, order in (("one", 1), ("two", 1), ("first", 0)):
        learner.add_cbs(taking_over(Predict, by, order))
    learner.run(1, valid=False)
    assert learner.said.count("first.predict") == 3


def test_two_that_perform_a_training_action_do_not_keep_one_from_validating(
    learner: Spoken,
) -> None:
    for by in ("one", "two"):
        learner.add_cbs(taking_over(Backward, by))
    learner.run(1, train=False)
    assert learner.said == said_by_method(VALIDATING_BATCH, 2)


@pytest.mark.parametrize("missing", ACTIONS, ids=lambda action: action.hook)
def test_nobody_to_perform_an_action_is_an_error_before_the_first_event(
    missing: type[ActionEvent], make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = Learner(make_model(), dls)
    before = [p.clone() for p in learner.model.parameters()]
    for action in ACTIONS:
        if action is not missing:
            learner.on(action)(getattr(TrainCB(), action.hook))
    with record_events(learner) as recorded, pytest.raises(TypeError) as raised:
        learner.run(1)
    assert str(raised.value) == (
        f"nobody performs {missing.__name__}: give Learner a method {missing.hook}(), or use"
        " TrainLearner, or add TrainCB() to the callbacks"
    )
    assert recorded == []
    assert (learner.opt, learner.result) == (None, None)
    assert all(map(torch.equal, before, learner.model.parameters()))
    assert learner.run(1, cbs=TrainCB()).steps == 3


def test_a_learner_that_only_validates_needs_two_actions(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = Judge(make_model(), dls)
    assert learner.run(1, train=False).valid_batches == 2
    with pytest.raises(TypeError, match=r"nobody performs Backward: give Judge a method backward"):
        learner.run(1)


def test_a_performer_that_leaves_in_the_middle_and_has_no_deputy_is_a_clear_error(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """What could not be known before is said the same way, through every cleanup."""
    train_cb = TrainCB()
    learner = Learner(make_model(), dls, cbs=train_cb)

    @learner.on(AfterBatch, once=True)
    def leave(event: AfterBatch) -> None:
        event.learner.remove_cbs(train_cb)

    with record_events(learner) as recorded:
        with pytest.raises(TypeError, match="nobody performs Predict"):
            learner.run(1)
    assert recorded.names[-4:] == ["BeforeBatch", "CleanupBatch", "CleanupEpoch", "CleanupFit"]


def test_accumulation_skips_the_step_and_its_actions_alone(learner: Spoken) -> None:
    learner.add_cbs(GradientAccumulationCB(2))
    learner.run(1, valid=False)
    assert learner.said == [
        *["method.predict", "method.get_loss", "method.backward"],
        *[f"method.{hook}" for hook in TRAINING_BATCH * 2],
    ]


def test_the_base_of_the_actions_cannot_be_subscribed_to(learner: Spoken) -> None:
    with pytest.raises(TypeError, match="subscribe to one action by its class"):
        learner.on(ActionEvent)(lambda event: None)


@pytest.mark.parametrize("filter_", [{"every": 2}, {"where": lambda event: event.iter}])
def test_a_performer_that_would_skip_batches_is_refused(
    filter_: dict[str, Any], learner: Spoken
) -> None:
    """Where it is filtered out nobody would perform the action: stale predictions, no step."""
    with pytest.raises(ValueError, match=r"every|where"):
        learner.on(Step, **filter_)(lambda event: event.learner.do(Step, "sometimes"))


def test_who_performs_is_decided_after_before_fit(learner: Spoken) -> None:
    @learner.on(BeforeFit)
    def late(event: BeforeFit) -> None:
        event.learner.add_cbs(taking_over(GetLoss, "late"))

    learner.run(1, train=False)
    assert learner.said == ["method.predict", "late.get_loss"] * 2

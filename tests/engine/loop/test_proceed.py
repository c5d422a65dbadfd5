"""`event.proceed()`: an action goes through its receivers, from the outermost to the learner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import AccelerateCB, MixedTrainingCB, TrainCB
from eventrain.engine import DataLoaders, Learner, TrainLearner
from eventrain.events import Backward, Callback, Predict, Step, ZeroGrad, record_events
from torch import nn
from torch.nn import functional as F

from tests.support.training import weights
from tests.support.waiting import GUARD

MakeModel = Callable[[], nn.Module]
SEEDS = range(6)


class Around(Callback):
    """Says when it enters and leaves a step."""

    def __init__(self, name: str, said: list[str], order: float = 0) -> None:
        self.name, self.said, self.order = name, said, order

    def step(self, event: Step) -> None:
        self.said.append(f"{self.name} enters")
        event.proceed()
        self.said.append(f"{self.name} leaves")


class Mine(TrainLearner):
    """Has a step of its own."""

    def step(self) -> None:
        self.stepped = getattr(self, "stepped", 0) + 1
        super().step()


class Takes(Callback):
    """Steps itself."""

    def step(self, event: Step) -> None:
        event.learner.opt.step()


class Backwards(Callback):
    """Runs the backward pass itself."""

    def backward(self, event: Backward) -> None:
        event.learner.loss.backward()


def test_receivers_wrap_each_other_in_order_and_the_learners_method_is_innermost(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    said: list[str] = []
    learner = Mine(make_model(), dls, cbs=[Around("inner", said, 2), Around("outer", said, 1)])
    plain = TrainLearner(make_model(), dls)
    learner.run(1)
    plain.run(1)
    assert said == ["outer enters", "inner enters", "inner leaves", "outer leaves"] * 3
    assert learner.stepped == 3
    assert torch.equal(weights(learner.model), weights(plain.model))
    assert (
        "Step: performed by Around.step (order 1), around Around.step (order 2), around Mine.step"
        in learner.explain()
    )


def test_a_receiver_may_proceed_never_or_twice(make_model: MakeModel, dls: DataLoaders) -> None:
    learner = Mine(make_model(), dls)

    @learner.on(Step)
    def step(event: Step) -> None:
        for _ in range(event.iter):
            event.proceed()

    learner.run(1, valid=False)
    assert learner.stepped == 0 + 1 + 2


def test_an_error_inside_is_raised_through_the_receivers_around_it(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    class Fails(TrainLearner):
        def step(self) -> None:
            raise ZeroDivisionError("mine")

    said: list[str] = []
    with pytest.raises(ZeroDivisionError, match="mine") as raised:
        Fails(make_model(), dls, cbs=Around("around", said)).run(1)
    assert said == ["around enters"]
    assert "Fails.step on Step" in raised.value.__notes__[0]


def test_an_error_whose_text_cannot_be_made_is_raised_all_the_same(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise ZeroDivisionError

    class Fails(TrainLearner):
        def step(self) -> None:
            raise Silent

    learner = Fails(make_model(), dls)
    with pytest.raises(Silent):
        learner.run(1)
    assert learner.result is not None
    assert learner.result.reason is not None
    assert learner.result.reason.startswith("Silent: ")


def test_taking_over_a_method_of_the_users_is_refused_with_both_named(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """G18."""
    learner = Mine(make_model(), dls, cbs=Takes())
    with record_events(learner) as recorded, pytest.raises(ValueError, match="Takes") as raised:
        learner.run(1)
    assert str(raised.value) == (
        "Takes.step would take Step over from Mine.step, which would never be called: call"
        " event.proceed() in it to have that called, or, to replace it, make it a method of a"
        " Callback with takes_over = (Step,)"
    )
    assert recorded == []

    class MeansTo(Takes):
        takes_over = (Step,)

    learner = Mine(make_model(), dls, cbs=MeansTo())
    assert learner.run(1).steps == 3
    assert not hasattr(learner, "stepped")


def test_an_attribute_of_that_name_is_not_the_call(make_model: MakeModel, dls: DataLoaders) -> None:
    class Named(Callback):
        proceed = False

        def step(self, event: Step) -> None:
            if not self.proceed:
                event.learner.opt.step()

    with pytest.raises(ValueError, match=r"would take Step over from Mine\.step"):
        Mine(make_model(), dls, cbs=Named()).run(1)


def test_a_method_of_the_engines_own_may_be_taken_over(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner, plain = TrainLearner(make_model(), dls, cbs=Takes()), TrainLearner(make_model(), dls)
    assert learner.run(1).steps == plain.run(1).steps == 3
    assert torch.equal(weights(learner.model), weights(plain.model))


def test_taking_over_from_a_callback_that_wraps_is_refused_with_both_named(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """Mixed precision would unscale gradients that were never scaled."""
    mixed = MixedTrainingCB("fp16", init_scale=8.0)
    learner = TrainLearner(make_model(), dls, cbs=[mixed, Backwards()])
    with pytest.raises(ValueError, match="take Backward over") as raised:
        learner.run(1)
    assert str(raised.value) == (
        "Backwards.backward (order 0) would take Backward over from MixedTrainingCB.backward (order"
        " 60), which wraps it: call event.proceed() in Backwards.backward, or give its callback an"
        " order above 60"
    )
    late = Backwards()
    late.order = 61
    inside = TrainLearner(make_model(), dls, cbs=[MixedTrainingCB("fp16", 8.0), late])
    plain = TrainLearner(make_model(), dls, cbs=MixedTrainingCB("fp16", 8.0))
    inside.run(1)
    plain.run(1)
    assert torch.equal(weights(inside.model), weights(plain.model))


async def test_proceeding_on_the_event_loop_is_refused(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """The optimizer would step in the host's thread."""

    async def step(event: Step) -> None:
        event.proceed()

    learner = TrainLearner(make_model(), dls)
    learner.subscribe(Step, step)
    with anyio.fail_after(GUARD):
        with pytest.raises(RuntimeError, match=r"Step.proceed\(\) was called outside of the train"):
            await learner.fit(1)


def test_proceeding_where_nobody_is_left_names_what_is_missing(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = Learner(make_model(), dls, cbs=[TrainCB(), Around("around", [])])
    assert learner.run(1).steps == 3
    learner = Learner(make_model(), dls, cbs=Around("around", []))
    learner.subscribe(Predict, lambda event: None)
    with pytest.raises(TypeError, match="nobody performs GetLoss"):
        learner.run(1)


def test_the_call_may_be_in_a_lambda_or_an_inner_function(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """The engine looks for the call in the receiver, and in functions defined inside it."""

    def inner(event: ZeroGrad) -> None:
        (lambda: event.proceed())()

    learner = Mine(make_model(), dls)
    learner.subscribe(Step, lambda event: event.proceed())
    learner.subscribe(ZeroGrad, inner)
    assert learner.run(1).steps == learner.stepped == 3


# ----------------------------------------------------- a GAN, whose step updates its generator, too


class GAN(TrainLearner):
    """`model` is the discriminator; the generator has an optimizer of its own."""

    def __init__(self, generator: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.generator = generator
        self.generator_opt = torch.optim.SGD(generator.parameters(), 0.1)

    def step(self) -> None:
        self.opt.step()
        self.generator_opt.zero_grad()
        inputs, _ = self.batch
        F.mse_loss(self.model(self.generator(inputs)), torch.ones(len(inputs), 1)).backward()
        self.generator_opt.step()


def gan(dls: DataLoaders, make_model: MakeModel, cbs: Any) -> GAN:
    torch.manual_seed(7)
    return GAN(nn.Linear(3, 3), make_model(), dls, cbs=cbs)


@pytest.mark.parametrize(
    "make", [lambda: MixedTrainingCB("fp16", init_scale=8.0), lambda: AccelerateCB("no")]
)
def test_the_generator_of_a_gan_trains_under_mixed_precision_and_accelerate(
    make: Callable[[], Callback], dls: DataLoaders, make_model: MakeModel
) -> None:
    """G18: their takeover of Step left the learner's own uncalled."""
    plain, wrapped = gan(dls, make_model, None), gan(dls, make_model, make())
    plain.run(2)
    wrapped.run(2)
    # Autocast predicts in float16; accelerate without it changes no bit.
    tolerance = 1e-2 if isinstance(wrapped.cbs[0], MixedTrainingCB) else 0
    for a, b in (plain.model, wrapped.model), (plain.generator, wrapped.generator):
        assert torch.allclose(weights(a), weights(b), rtol=tolerance, atol=tolerance)


class TwoOptimizers(TrainLearner):
    """A head with an optimizer of its own, which steps on the gradients of the same loss."""

    def __init__(self, head: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heads = {"one": head}
        self.others = [torch.optim.SGD(head.parameters(), 0.1)]

    def predict(self) -> None:
        self.preds = self.heads["one"](self.model(self.batch[0]))

    def step(self) -> None:
        super().step()
        for opt in self.others:
            opt.step()

    def zero_grad(self) -> None:
        super().zero_grad()
        for opt in self.others:
            opt.zero_grad()


def two_optimizers(dls: DataLoaders, make_model: MakeModel, *cbs: Callback) -> TwoOptimizers:
    torch.manual_seed(7)
    return TwoOptimizers(nn.Linear(1, 1), make_model(), dls, cbs=cbs)


def test_every_optimizer_of_the_learner_steps_on_unscaled_gradients(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    plain = two_optimizers(dls, make_model)
    mixed = two_optimizers(dls, make_model, MixedTrainingCB("fp16", init_scale=1024.0))
    plain.run(2)
    assert mixed.run(2).steps == 6
    for a, b in (plain.model, mixed.model), (plain.heads["one"], mixed.heads["one"]):
        assert torch.allclose(weights(a), weights(b), rtol=1e-2, atol=1e-2)


def test_a_step_in_which_another_optimizer_would_overflow_is_skipped(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = two_optimizers(dls, make_model, MixedTrainingCB("fp16", init_scale=1024.0))
    head = learner.heads["one"]
    before = weights(head)
    head.weight.register_hook(lambda gradient: gradient * float("inf"))
    assert learner.run(1, valid=False).steps == 0
    assert torch.equal(weights(head), before)
    assert head.weight.grad is None

"""`learner.update`: several updates per batch, each with the events of a step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
    SchedulerCB,
    TerminateOnNaNCB,
    ValidateCB,
)
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.engine.run.extra_validation import validate_within
from eventrain.events import (
    AfterBatch,
    AfterLoss,
    AfterStep,
    BatchEvent,
    BeforeBatch,
    BeforeStep,
    Callback,
    CancelBatchException,
    CancelStepException,
    CleanupBatch,
    CleanupFit,
    CleanupStep,
    StepEvent,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from tests.support.training import weights

IMAGES = torch.tensor(load_digits().data[:96], dtype=torch.float32) / 8 - 1
LATENT = 6


class GAN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.G = nn.Sequential(
            nn.Linear(LATENT, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 64), nn.Tanh()
        )
        self.D = nn.Sequential(
            nn.Linear(64, 32), nn.BatchNorm1d(32), nn.LeakyReLU(0.2), nn.Linear(32, 1)
        )


def adams(model: GAN, order: str = "GD") -> dict[str, optim.Optimizer]:
    nets = {"G": model.G, "D": model.D}
    return {n: optim.Adam(nets[n].parameters(), 2e-3, betas=(0.5, 0.999)) for n in order}


def bce(logits: torch.Tensor, target: float) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, target))


class GANLearner(TrainLearner):
    def predict(self) -> None:
        (self.real,) = self.batch
        self.preds = self.model.G(torch.randn(len(self.real), LATENT))

    def get_loss(self) -> None:
        judge = self.model.D
        self.update(bce(judge(self.real), 1) + bce(judge(self.preds.detach()), 0), "D")
        self.update(bce(judge(self.preds), 1), "G")


def loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES), 16, shuffle=True)


def gan(*cbs: Callback, **kwargs: Any) -> GANLearner:
    model = GAN()
    kwargs.setdefault("opt", adams(model))
    return GANLearner(model, DataLoaders(loader(), loader()), cbs=cbs, **kwargs)


def dcgan_by_hand(
    epochs: int,
    n: int = 1,
    clip: float | None = None,
    on_step: Callable[[str], object] = lambda name: None,
) -> torch.Tensor:
    """The loop of pytorch/examples' dcgan: D on real and on fake images, then G."""
    model, batches = GAN(), loader()
    opts, nets = adams(model), {"D": model.D, "G": model.G}

    def step(name: str) -> None:
        if clip is not None:
            nn.utils.clip_grad_norm_(nets[name].parameters(), clip)
        opts[name].step()
        on_step(name)

    for _ in range(epochs):
        for i, (real,) in enumerate(batches):
            fake = model.G(torch.randn(len(real), LATENT))
            if i % n == 0:
                model.D.zero_grad()
                model.G.zero_grad()
            due = i % n == n - 1 or i == len(batches) - 1
            size = min(n, len(batches) - i // n * n)
            if n == 1:
                bce(model.D(real), 1).backward()
                bce(model.D(fake.detach()), 0).backward()
            else:
                ((bce(model.D(real), 1) + bce(model.D(fake.detach()), 0)) / size).backward()
            if due:
                step("D")
            # What the loss of G adds to these is not for the step of D.
            kept = [None if p.grad is None else p.grad.clone() for p in model.D.parameters()]
            (bce(model.D(fake), 1) / size).backward()
            for p, gradient in zip(model.D.parameters(), kept, strict=True):
                p.grad = gradient
            if due:
                step("G")
    return weights(model)


# ---------------------------------------------------------------------------------- the training


def test_a_gan_is_trained_as_by_hand_to_the_bit() -> None:
    torch.manual_seed(0)
    learner = gan()
    result = learner.run(3, valid=False)
    torch.manual_seed(0)
    assert torch.equal(weights(learner.model), dcgan_by_hand(3))
    assert (result.steps, result.batches) == (18, 18)


def test_a_batch_of_ones_own_may_update() -> None:
    class OwnBatch(GANLearner):
        def one_batch(self) -> None:
            with self.scope(CancelBatchException, CleanupBatch):
                self.emit(BeforeBatch)
                self.predict()
                self.get_loss()
                self.emit(AfterBatch)
                self.done.batches += 1

    trained = []
    for cls in (GANLearner, OwnBatch):
        torch.manual_seed(0)
        model = GAN()
        learner = cls(model, DataLoaders(loader(), loader()), opt=adams(model), cbs=MetricsCB())
        result = learner.run(2)
        trained.append((weights(model).tolist(), result.history, result.steps, result.batches))
    assert trained[0] == trained[1]


@pytest.mark.parametrize("at", [1, 4, 6, 7])
def test_a_gan_is_resumed_to_the_bit(at: int, tmp_path: Path) -> None:
    def make() -> GANLearner:
        return gan(
            SchedulerCB(partial(optim.lr_scheduler.StepLR, step_size=4), opt="D"), MetricsCB()
        )

    torch.manual_seed(0)
    whole = make()
    right = whole.run(3)
    torch.manual_seed(0)
    cut = make()
    n = 0

    @cut.on(AfterBatch)
    def stop(event: AfterBatch) -> None:
        nonlocal n
        n += 1
        if n == at:
            cut.stop(graceful=True)

    cut.run(3, cbs=CheckpointCB(tmp_path))
    torch.manual_seed(99)
    rest = make()
    result = rest.run(3, cbs=CheckpointCB(tmp_path), resume="last")
    assert torch.equal(weights(rest.model), weights(whole.model))
    assert result.history == right.history
    assert result.steps == right.steps == 18


@pytest.mark.parametrize("n", [2, 4])
def test_each_optimizer_accumulates_on_its_own(n: int) -> None:
    steps: list[str] = []
    torch.manual_seed(0)
    learner = gan(GradientAccumulationCB(n))
    learner.subscribe(AfterStep, lambda event: steps.append(event.opt))
    learner.run(2, valid=False)
    by_hand: list[str] = []
    torch.manual_seed(0)
    right = dcgan_by_hand(2, n, on_step=by_hand.append)
    assert steps == by_hand
    assert torch.equal(weights(learner.model), right)


def test_the_last_group_of_each_is_stepped_where_the_length_is_not_known() -> None:
    class Unsized:
        def __iter__(self) -> Any:
            return iter(DataLoader(TensorDataset(IMAGES), 16))

    ends: list[Any] = []
    model = GAN()
    learner = GANLearner(
        model, DataLoaders(Unsized()), cbs=GradientAccumulationCB(4), opt=adams(model)
    )
    learner.subscribe(AfterStep, lambda event: ends.append((event.iter, event.opt, event.steps)))
    assert learner.run(1, valid=False).steps == 2
    assert ends == [(3, "D", 0), (3, "G", 1), (5, "D", 1), (5, "G", 2)]


def test_clipping_is_that_of_the_optimizer_that_steps() -> None:
    torch.manual_seed(0)
    learner = gan(GradientClippingCB(0.05), TerminateOnNaNCB())
    learner.run(2, valid=False)
    torch.manual_seed(0)
    assert torch.equal(weights(learner.model), dcgan_by_hand(2, clip=0.05))


def test_a_scheduler_counts_the_steps_of_its_optimizer() -> None:
    class TwoOfD(GANLearner):
        def get_loss(self) -> None:
            judge = self.model.D
            for _ in range(2):
                self.update(bce(judge(self.real), 1) + bce(judge(self.preds.detach()), 0), "D")
            self.update(bce(judge(self.preds), 1), "G")

    model = GAN()
    halve = partial(optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learner = TwoOfD(
        model,
        DataLoaders(loader()),
        opt_func=lambda params, lr: adams(model),
        cbs=[SchedulerCB(halve, opt="D"), SchedulerCB(halve, every="epoch", opt="G")],
    )
    learner.run(1, valid=False)
    assert learner.opt["D"].param_groups[0]["lr"] == 2e-3 / 2**12
    assert learner.opt["G"].param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("order", ["GD", "DG"])
def test_the_first_optimizer_is_the_clock(order: str) -> None:
    class GEveryThird(GANLearner):
        def get_loss(self) -> None:
            judge = self.model.D
            self.update(bce(judge(self.real), 1) + bce(judge(self.preds.detach()), 0), "D")
            if self.iter % 3 == 2:
                self.update(bce(judge(self.preds), 1), "G")

    model = GAN()
    learner = GEveryThird(model, DataLoaders(loader()), opt=adams(model, order))
    rates: list[float] = []
    learner.opt["D"].param_groups[0]["lr"] = 1e-3
    learner.subscribe(AfterBatch, lambda event: rates.append(event.lr))
    result = learner.run(max_steps=4, valid=False)
    assert (result.steps, result.batches) == ((4, 12) if order == "GD" else (4, 4))
    assert set(rates) == {2e-3 if order == "GD" else 1e-3}


@settings(max_examples=25, deadline=None)
@given(
    plan=st.lists(st.lists(st.sampled_from("ab"), max_size=4), min_size=1, max_size=6),
    n=st.integers(1, 3),
    momentum=st.sampled_from([0.0, 0.9]),
)
def test_any_order_of_updates_is_that_of_a_plain_loop(
    plan: list[list[str]], n: int, momentum: float
) -> None:
    """Updates of two networks that share their loss; each accumulates `n` of its own."""
    batches = [torch.full((2, 3), float(i + 1)) for i in range(len(plan))]

    def make() -> tuple[nn.ModuleDict, dict[str, optim.Optimizer]]:
        torch.manual_seed(5)
        nets = nn.ModuleDict({"a": nn.Linear(3, 2), "b": nn.Linear(2, 1)})
        return nets, {
            name: optim.SGD(nets[name].parameters(), 0.01, momentum=momentum) for name in "ab"
        }

    def loss_of(nets: nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        return nets["b"](nets["a"](x)).square().mean()

    class Planned(TrainLearner):
        def predict(self) -> None:
            self.preds = self.batch

        def get_loss(self) -> None:
            for name in plan[self.iter]:
                self.update(loss_of(self.model, self.batch), name)
            if not plan[self.iter]:
                self.loss = loss_of(self.model, self.batch)
                self.updated = True

    class EveryNth(Callback):
        """Accumulates as the callback does, without a tail."""

        def __init__(self) -> None:
            self.done = {"a": 0, "b": 0}

        def before_step(self, event: BeforeStep) -> None:
            self.done[event.opt] += 1
            if self.done[event.opt] % n:
                raise CancelStepException("not yet")

    nets, opts = make()
    Planned(nets, DataLoaders(batches), opt=opts, cbs=EveryNth()).run(1, valid=False)

    hand, hand_opts = make()
    done = {"a": 0, "b": 0}
    for x, names in zip(batches, plan, strict=True):
        for name in names:
            own = list(hand[name].parameters())
            gradients = torch.autograd.grad(loss_of(hand, x), own)
            for p, gradient in zip(own, gradients, strict=True):
                p.grad = gradient if p.grad is None else p.grad + gradient
            done[name] += 1
            if done[name] % n == 0:
                hand_opts[name].step()
                hand_opts[name].zero_grad()
    assert torch.equal(weights(nets), weights(hand))
    assert all(p.grad is None for p in nets.parameters())  # what was begun is dropped at the end


# ------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("cb", [lambda: MixedTrainingCB("bf16"), lambda: MixedTrainingCB("fp16")])
def test_mixed_precision_covers_all_updates_and_no_backward(cb: Callable[[], Callback]) -> None:
    seen: list[Any] = []
    learner = gan(cb())

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(torch.is_autocast_enabled("cpu"))
            return x

    learner.model.D.append(Look())
    learner.subscribe(AfterLoss, lambda event: seen.append(event.opt), order=100)
    learner.subscribe(BeforeStep, lambda event: seen.append(torch.is_autocast_enabled("cpu")))
    learner.run(1, epoch_length=1, valid_length=1)
    train = [True, True, "D", False, True, "G", False]
    valid = [True, True, None, True, None]
    assert seen == train + valid
    assert not torch.is_autocast_enabled("cpu")


def scaled_by_accelerate() -> AccelerateCB:
    """accelerate refuses float16 on a CPU when it is made; what follows is the same there."""
    cb = AccelerateCB("no")
    cb.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    return cb


@pytest.mark.parametrize("whole", [False, True])
def test_scaling_by_accelerate_changes_nothing_but_the_scale(whole: bool) -> None:
    """Powers of two round nowhere here."""

    class Both(GANLearner):
        def get_loss(self) -> None:
            judge = self.model.D
            self.loss = bce(judge(self.real), 1) + bce(judge(self.preds), 1)

    trained = []
    for cbs in [], [scaled_by_accelerate()], [AccelerateCB("no")]:
        torch.manual_seed(0)
        model = GAN()
        learner = (Both if whole else GANLearner)(
            model, DataLoaders(loader()), opt=adams(model), cbs=cbs
        )
        assert learner.run(2, valid=False).steps == 12
        trained.append(weights(model))
    assert torch.allclose(trained[1], trained[0], atol=1e-5)
    assert torch.allclose(trained[2], trained[0], atol=1e-5)


def test_an_overflow_of_one_optimizer_skips_its_step_alone() -> None:
    mixed = MixedTrainingCB("fp16", init_scale=2.0**10)
    learner = gan(mixed)
    ends: list[tuple[str | None, str]] = []
    learner.subscribe(CleanupStep, lambda event: ends.append((event.opt, event.end.status)))
    learner.model.D[0].weight.register_hook(
        lambda gradient: gradient * float("inf") if learner.iter == 1 else gradient
    )
    learner.run(1, valid=False, epoch_length=3)
    ok, skipped = "completed", "cancelled"
    assert ends == [("D", ok), ("G", ok), ("D", skipped), ("G", ok), ("D", ok), ("G", ok)]
    assert (mixed.skipped_steps, mixed.scaler.get_scale()) == (1, 2.0**9)


def test_an_overflow_of_one_that_accumulates_leaves_the_step_of_another_counted() -> None:
    mixed = MixedTrainingCB("fp16", init_scale=2.0**10)
    learner = gan(mixed, GradientAccumulationCB(2))
    ends: list[tuple[str | None, int, str]] = []
    learner.subscribe(CleanupStep, lambda e: ends.append((e.opt, e.iter, e.end.status)))
    learner.model.G[0].weight.register_hook(
        lambda gradient: gradient * float("inf") if learner.iter == 0 else gradient
    )
    before = weights(learner.model.D)
    result = learner.run(1, valid=False, epoch_length=2)
    assert not torch.equal(weights(learner.model.D), before)
    none = "cancelled"
    assert ends == [("D", 0, none), ("G", 0, none), ("D", 1, "completed"), ("G", 1, none)]
    assert (mixed.skipped_steps, result.steps) == (1, 0)  # those of G, the first one


@pytest.mark.parametrize("mixed", [False, True])
def test_an_extra_validation_between_two_updates_changes_nothing(mixed: bool) -> None:
    trained, told = [], []
    for validated in (False, True):
        torch.manual_seed(0)
        learner = gan(*[MixedTrainingCB("bf16")] * mixed)
        if validated:
            learner.add_cbs(ValidateCB(DataLoader(TensorDataset(IMAGES), 16), every_steps=1))
            learner.subscribe(AfterStep, lambda event: told.append((event.opt, event.lr)))
        learner.run(2, valid=False)
        trained.append(weights(learner.model))
    assert torch.equal(*trained)
    assert told == [("D", 2e-3), ("G", 2e-3)] * 12


def test_an_extra_validation_after_an_update_leaves_no_precision_behind(
    make_batches: Callable[..., Any],
) -> None:
    class Once(TrainLearner):
        def get_loss(self) -> None:
            self.update(F.mse_loss(self.model(self.batch[0]), self.batch[1]))

    torch.manual_seed(0)
    model, hand, batches = nn.Linear(3, 1), nn.Linear(3, 1), make_batches(4)
    hand.load_state_dict(model.state_dict())
    cbs = [MixedTrainingCB("bf16"), ValidateCB(batches, every_steps=1)]
    learner = Once(model, DataLoaders(batches), lr=0.05, cbs=cbs)
    open_at_the_end: list[bool] = []
    learner.subscribe(
        CleanupFit, lambda event: open_at_the_end.append(torch.is_autocast_enabled("cpu"))
    )
    learner.run(2, valid=False)
    opt = optim.SGD(hand.parameters(), 0.05)
    for x, y in batches * 2:
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.mse_loss(hand(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(weights(model), weights(hand))
    assert open_at_the_end == [False]


def test_precision_is_the_same_after_a_validation_between_two_updates() -> None:
    """Also where a batch of it is cancelled before its precision is set."""
    seen: list[tuple[Any, bool]] = []
    learner = gan(MixedTrainingCB("bf16"))
    images = [(IMAGES[:16],)] * 3

    @learner.on(CleanupStep, order=100)
    def validate(event: CleanupStep) -> None:
        if event.opt == "D":
            validate_within(learner, images, [])

    @learner.on(BeforeBatch)
    def cancel(event: BeforeBatch) -> None:
        if event.purpose == "validate" and event.iter == 1:
            raise CancelBatchException

    class Look(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((learner.purpose, torch.is_autocast_enabled("cpu")))
            return x

    learner.model.D.append(Look())
    at_the_end: list[bool] = []
    learner.subscribe(CleanupFit, lambda e: at_the_end.append(torch.is_autocast_enabled("cpu")))
    learner.run(1, valid=False, epoch_length=2)
    judged = ["fit"] * 2 + ["validate"] * 6 + ["fit"]
    assert seen == [(purpose, True) for purpose in judged * 2]
    assert at_the_end == [False]


class Twice(TrainLearner):
    def get_loss(self) -> None:
        for _ in range(2):
            self.update(F.mse_loss(self.model(self.batch[0]), self.batch[1]))


def test_max_steps_ends_between_two_updates_of_a_batch(make_batches: Callable[..., Any]) -> None:
    learner = Twice(nn.Linear(3, 1), DataLoaders(make_batches(4)), lr=0.05)
    result = learner.run(max_steps=3, valid=False)
    assert (result.status, result.steps, result.batches) == ("completed", 3, 2)


def test_a_schedule_that_is_too_short_for_the_updates_says_so(
    make_batches: Callable[..., Any],
) -> None:
    schedule = SchedulerCB(lambda opt, n_steps: CosineAnnealingLR(opt, n_steps))
    learner = Twice(nn.Linear(3, 1), DataLoaders(make_batches(4)), lr=0.05, cbs=schedule)
    with pytest.raises(RuntimeError, match="n_steps=4, and this is a further step"):
        learner.run(1, valid=False)
    assert learner.run(max_steps=6, valid=False).steps == 6


# ---------------------------------------------------------------------------------------- events


def test_an_update_has_the_events_of_a_step_with_the_name_of_its_optimizer() -> None:
    learner = gan()
    with record_events(learner) as recorded:
        learner.run(1, epoch_length=1, valid_length=1)
    told = [(type(e).__name__, e.opt) for e in recorded if isinstance(e, BatchEvent | StepEvent)]

    def update(opt: str) -> list[tuple[str, str]]:
        names = ("AfterLoss", "AfterBackward", "BeforeStep", "AfterStep", "CleanupStep")
        return [(name, opt) for name in names]

    begin = [("BeforeBatch", None), ("AfterPredict", None)]
    end = [("AfterBatch", None), ("CleanupBatch", None)]
    train = [*begin, *update("D"), *update("G"), *end]
    valid = [*begin, ("AfterLoss", None), ("AfterLoss", None), *end]
    assert told == train + valid


def test_the_gradients_of_a_step_are_those_of_its_loss_alone() -> None:
    learner = gan()
    nets = {"G": learner.model.G, "D": learner.model.D}

    @learner.on(BeforeStep)
    def look(event: BeforeStep) -> None:
        (other,) = nets.keys() - {event.opt}
        assert all(p.grad is not None for p in nets[event.opt].parameters())
        assert all(p.grad is None for p in nets[other].parameters())
        assert learner.opt.param_groups == learner.opt[event.opt].param_groups
        assert learner.opt["G"].param_groups

    assert learner.run(1, valid=False).steps == 6


def test_several_updates_with_one_optimizer_are_several_steps(
    make_batches: Callable[..., Any],
) -> None:
    class Thrice(TrainLearner):
        def get_loss(self) -> None:
            for _ in range(3):
                self.update(F.mse_loss(self.model(self.batch[0]), self.batch[1]))

    torch.manual_seed(0)
    model, hand, batches = nn.Linear(3, 1), nn.Linear(3, 1), make_batches(4)
    hand.load_state_dict(model.state_dict())
    result = Thrice(model, DataLoaders(batches), lr=0.05).run(1, valid=False)
    opt = optim.SGD(hand.parameters(), 0.05)
    for x, y in batches:
        for _ in range(3):
            opt.zero_grad()
            F.mse_loss(hand(x), y).backward()
            opt.step()
    assert torch.equal(weights(model), weights(hand))
    assert result.steps == 12


def test_momentum_is_kept_for_each(make_batches: Callable[..., Any]) -> None:
    class Momentum(MomentumLearner):
        predict, get_loss = GANLearner.predict, GANLearner.get_loss

    model = GAN()
    learner = Momentum(model, DataLoaders(loader()), opt=adams(model), mom=0.5)
    learner.run(1, valid=False)
    assert all(p.grad is not None for p in model.parameters())


def test_lr_find_works_and_restores(make_batches: Callable[..., Any]) -> None:
    learner = gan()
    before = weights(learner.model)
    finder = learner.run_lr_find(max_epochs=4)
    assert len(finder.lrs) == len(finder.losses) > 5
    assert finder.lrs == sorted(finder.lrs)
    assert torch.equal(weights(learner.model), before)


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("opt", "says"),
    [
        (None, "opt='D': learner.opt is one SGD, without a name: leave opt out, or give"),
        ("X", "opt='D': there is no optimizer 'D', but 'X', 'Y'"),
    ],
)
def test_an_update_of_an_optimizer_that_is_not_there_says_which_are(
    opt: str | None, says: str
) -> None:
    learner = gan(opt=None)
    if opt:
        model = learner.model
        learner.opt_func = lambda params, lr: {
            "X": optim.SGD(model.G.parameters(), lr),
            "Y": optim.SGD(model.D.parameters(), lr),
        }
    with pytest.raises(ValueError, match=says):
        learner.run(1)


def test_an_update_with_a_loss_of_another_optimizer_says_so() -> None:
    """It would step without a gradient, and nothing would train."""

    class Mistaken(TrainLearner):
        def predict(self) -> None:
            self.preds = None

        def get_loss(self) -> None:
            self.update(self.model["D"](self.batch).mean(), "G")

    nets = nn.ModuleDict({"D": nn.Linear(3, 1), "G": nn.Linear(3, 1)})
    opt = {name: torch.optim.Adam(net.parameters(), 0.1) for name, net in nets.items()}
    learner = Mistaken(nets, DataLoaders([torch.ones(2, 3)] * 3), opt=opt)
    message = r"update\(loss, 'G'\): the loss does not depend on .* of 'G'.* has reached 'D'"
    with pytest.raises(ValueError, match=message):
        learner.run(1, valid=False)


def test_an_update_within_a_step_or_outside_of_a_fit_is_refused() -> None:
    learner = gan()
    with pytest.raises(RuntimeError, match="outside of a fit"):
        learner.update(torch.ones(()), "D")
    learner.subscribe(BeforeStep, lambda event: learner.update(learner.loss, "G"))
    with pytest.raises(RuntimeError, match="within a step, of which it has one of its own"):
        learner.run(1)
    assert learner.opt.param_groups == learner.opt.all_param_groups
    assert learner.updating is None

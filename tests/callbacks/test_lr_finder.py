"""The learning-rate finder: what it tries, what it suggests, and that it leaves no trace."""

from __future__ import annotations

import copy
import io
import math
import random
import sys
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from eventrain.callbacks import GradientAccumulationCB, LRFinderCB, MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterStep,
    CancelFitException,
    CleanupEpoch,
    record_events,
)
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from tests.support.waiting import GUARD

Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]
MakeModel = Callable[[], nn.Module]
Digits = tuple[torch.Tensor, torch.Tensor]


def scripted(losses: list[float]) -> Callable[..., torch.Tensor]:
    """A loss function that returns these numbers, whatever was predicted."""
    script = iter(losses)
    return lambda preds, targets: preds.mean() * 0 + next(script)


def found(losses: list[float], lr: float = 1.0) -> LRFinderCB:
    """A finder that has seen `losses`, at learning rates ten times the one before."""
    finder = LRFinderCB()
    finder.lrs = [lr * 10.0**i for i in range(len(losses))]
    finder.losses = losses
    return finder


# ------------------------------------------------------------------------------- what it tries


@pytest.mark.parametrize("opt_func", [torch.optim.SGD, torch.optim.Adam])
async def test_the_learning_rates_and_losses_are_those_of_the_loop_written_by_hand(
    opt_func: Any, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    batches = make_batches(3)
    learner = TrainLearner(make_model(), DataLoaders(batches), opt_func=opt_func)
    finder = await learner.lr_find(lr_mult=2.0, start_lr=0.01, max_epochs=20)

    model, lrs, losses, lr = make_model(), [], [], 0.01
    opt = opt_func(model.parameters(), lr)
    for x, y in batches * 20:
        opt.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        lrs.append(lr)
        losses.append(loss.item())
        lr *= 2
        if lr > 10:
            break
        for group in opt.param_groups:
            group["lr"] = lr
    assert finder.lrs == pytest.approx(lrs, rel=1e-12)
    assert finder.losses == losses
    assert 3 < len(losses) < 60
    result = learner.result
    assert result is not None
    assert (result.status, result.who, result.reason, result.steps) == (
        "cancelled",
        "LRFinderCB.after_batch",
        "the learning rate has reached end_lr=10",
        len(losses),
    )


EXPLODED = "the smoothed loss is more than four times its best value"
FLAT = [2.3, 2.2, 2.4] * 13


@pytest.mark.parametrize(
    ("losses", "n", "reason"),
    [
        ([*FLAT, 20.0, 60.0, 200.0, 600.0], 41, EXPLODED),
        ([*FLAT, 9.0, 2.3, 2.3, 30.0, 2.3, 2.3], 45, None),  # single losses do not end it
        ([-loss for loss in FLAT] + [5.0, 20.0, 100.0, 500.0], 42, EXPLODED),
        ([0.0] * 40 + [1.0], 41, EXPLODED),
        ([1.0, 9.0, 99.0, 999.0], 4, None),  # too few to tell noise from an explosion
        ([1.0, 0.5, math.nan, 0.5, 0.5, 0.5], 2, "the loss is nan"),
        ([1.0, math.inf, 0.5, 0.5, 0.5, 0.5], 1, "the loss is inf"),
        ([1.0, -math.inf, 0.5, 0.5, 0.5, 0.5], 1, "the loss is -inf"),
        ([math.nan] * 6, 0, "the loss is nan"),
        ([1.0, 0.9, 0.8, 0.7, 0.8, 0.9], 6, None),  # no end but that of the epochs
    ],
)
async def test_it_stops_when_the_loss_explodes_or_the_epochs_are_over(
    losses: list[float],
    n: int,
    reason: str | None,
    make_batches: MakeBatches,
    make_model: MakeModel,
) -> None:
    dls = DataLoaders(make_batches(1) * len(losses))
    learner = TrainLearner(make_model(), dls, scripted(losses))
    finder = await learner.lr_find(lr_mult=1.1, start_lr=1e-3, max_epochs=1)
    assert finder.losses == pytest.approx(losses[:n])
    assert finder.lrs == pytest.approx([1e-3 * 1.1**i for i in range(n)], rel=1e-12)
    assert learner.result is not None
    assert learner.result.reason == reason
    assert learner.result.status == ("completed" if reason is None else "cancelled")


@pytest.mark.parametrize(("end_lr", "n"), [(0.1, 1), (0.79, 3), (0.8, 4), (10.0, 7)])
async def test_no_learning_rate_is_above_the_highest(
    end_lr: float, n: int, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), DataLoaders(make_batches(20)), F.l1_loss)
    finder = await learner.lr_find(lr_mult=2.0, start_lr=0.1, end_lr=end_lr)
    assert finder.lrs == pytest.approx([0.1 * 2**i for i in range(n)], rel=1e-12)
    assert learner.result is not None
    assert learner.result.reason == f"the learning rate has reached end_lr={end_lr:g}"


async def test_without_a_highest_learning_rate_it_goes_on(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), DataLoaders(make_batches(25)), F.l1_loss)
    finder = await learner.lr_find(lr_mult=2.0, start_lr=0.1, max_epochs=1, end_lr=math.inf)
    assert finder.lrs[-1] == pytest.approx(0.1 * 2**24)


@pytest.mark.parametrize("start_lr", [0.0, 11.0])
async def test_a_search_that_cannot_begin_is_refused(
    start_lr: float, dls: DataLoaders, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), dls)
    with pytest.raises(ValueError, match=rf"begins at lr={start_lr:g} and ends at end_lr=10: give"):
        await learner.lr_find(start_lr=start_lr)


async def test_validation_is_skipped(dls: DataLoaders, make_model: MakeModel) -> None:
    learner = TrainLearner(make_model(), dls)
    with record_events(learner) as events:
        await learner.fit(2, cbs=LRFinderCB(), lr=1e-4)
    ends = [event for event in events if isinstance(event, CleanupEpoch)]
    assert [(e.training, e.end.status, e.end.reason) for e in ends] == [
        (True, "completed", None),
        (False, "cancelled", "the learning-rate finder does not validate"),
    ] * 2
    assert all(getattr(event, "training", True) for event in events if event.hook == "before_batch")
    with record_events(learner) as events:
        await learner.lr_find(max_epochs=1)
    assert events.names.count("BeforeEpoch") == 1


async def test_a_finder_that_is_used_again_begins_anew(
    dls: DataLoaders, make_model: MakeModel
) -> None:
    finder = LRFinderCB(2.0)
    learner = TrainLearner(make_model(), dls, cbs=finder)
    for _ in range(2):
        await learner.fit(1, valid=False, lr=1e-3)
        assert finder.lrs == pytest.approx([1e-3, 2e-3, 4e-3], rel=1e-12)
        assert len(finder.losses) == 3


async def test_every_parameter_group_takes_part(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    def opt_func(params: Any, lr: float) -> torch.optim.Optimizer:
        weight, bias = params
        return torch.optim.SGD([{"params": [weight]}, {"params": [bias], "lr": lr / 2}], lr)

    learner = TrainLearner(make_model(), DataLoaders(make_batches(3)), opt_func=opt_func)
    seen = []

    @learner.on(AfterBatch, order=99)
    def look(event: AfterBatch) -> None:
        seen.append([group["lr"] for group in learner.opt.param_groups])

    await learner.lr_find(lr_mult=2.0, start_lr=1e-4, max_epochs=1)
    assert seen == [[2e-4, 1e-4], [4e-4, 2e-4], [8e-4, 4e-4]]


def groups_of(model: nn.Module, *lrs: float) -> list[dict[str, Any]]:
    return [{"params": [p], "lr": lr} for p, lr in zip(model.parameters(), lrs, strict=True)]


@pytest.mark.parametrize(
    ("factors", "first"),
    [((1.0, 1.0), 1e-4), ((0.01, 1.0), 1e-4), ((1.0, 10.0), 1e-4), ((0.01, 0.1), 1e-6)],
    ids=["equal", "slow backbone", "fast head", "both slower"],
)
async def test_with_groups_it_tells_the_learning_rate_to_pass(
    factors: tuple[float, float], first: float, make_batches: MakeBatches, make_model: MakeModel
) -> None:
    """That of the group that has it as it was passed, else that of the first group."""
    model = make_model()

    def opt_func(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups_of(model, *(lr * factor for factor in factors)))

    learner = TrainLearner(model, DataLoaders(make_batches(3)), opt_func=opt_func)
    finder = await learner.lr_find(lr_mult=2.0, start_lr=1e-4, max_epochs=1)
    assert finder.lrs == pytest.approx([first, 2 * first, 4 * first], rel=1e-9)


@pytest.mark.parametrize("own", [(0.3, 0.3), (0.01, 1.0)])
async def test_groups_of_a_kept_optimizer_keep_their_ratio(
    own: tuple[float, float], make_batches: MakeBatches, make_model: MakeModel
) -> None:
    model = make_model()
    learner = TrainLearner(model, DataLoaders(make_batches(3)), opt_func=None)
    learner.opt = torch.optim.SGD(groups_of(model, *own))
    ratios = []

    @learner.on(AfterBatch)
    def look(event: AfterBatch) -> None:
        first, second = (group["lr"] for group in learner.opt.param_groups)
        ratios.append(second / first)

    finder = await learner.lr_find(lr_mult=2.0, start_lr=1e-4, max_epochs=1)
    assert ratios == pytest.approx([own[1] / own[0]] * 3)
    assert finder.lrs == pytest.approx([1e-4, 2e-4, 4e-4])
    assert [group["lr"] for group in learner.opt.param_groups] == list(own)


async def test_groups_that_share_a_tensor_are_multiplied_once(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    def opt_func(params: Any, lr: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam([{"params": [p], "lr": lr} for p in params])

    learner = TrainLearner(make_model(), DataLoaders(make_batches(3)), opt_func=opt_func)
    start = torch.tensor(1e-4)
    finder = await learner.lr_find(2.0, start, 1)  # type: ignore[arg-type]
    assert finder.lrs == pytest.approx([1e-4, 2e-4, 4e-4])
    assert start == 1e-4


async def test_it_agrees_with_the_rate_that_the_events_of_the_batch_tell(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    learner = TrainLearner(make_model(), DataLoaders(make_batches(3)))
    with record_events(learner) as events:
        finder = await learner.lr_find(lr_mult=2.0, start_lr=1e-4, max_epochs=1)
    assert [e.lr for e in events if isinstance(e, AfterStep)] == finder.lrs
    assert [e.lr for e in events if isinstance(e, AfterBatch)] == finder.lrs


async def test_the_rate_of_a_loss_is_the_one_its_step_used(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    """Though a receiver changes it right after the step, as schedulers do."""
    learner = TrainLearner(make_model(), DataLoaders(make_batches(3)))

    @learner.on(AfterStep, order=-1)
    def halve(event: AfterStep) -> None:
        for group in learner.opt.param_groups:
            group["lr"] /= 2

    finder = await learner.lr_find(lr_mult=4.0, start_lr=1e-4, max_epochs=1)
    assert finder.lrs == pytest.approx([1e-4, 2e-4, 4e-4])


async def test_with_an_optimizer_of_the_hosts_own_it_begins_where_it_was_told_to(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    model = make_model()
    learner = TrainLearner(model, DataLoaders(make_batches(3)), opt_func=None)
    learner.opt = torch.optim.SGD(model.parameters(), 0.3)
    finder = await learner.lr_find(lr_mult=2.0, start_lr=1e-4, max_epochs=1)
    assert finder.lrs == pytest.approx([1e-4, 2e-4, 4e-4], rel=1e-12)
    assert learner.opt.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("end_lr", [0, -1.0, math.nan, "10"])
def test_a_highest_learning_rate_that_is_not_one_is_refused(end_lr: Any) -> None:
    with pytest.raises(ValueError, match=r"end_lr=.*: give the highest learning rate to try"):
        LRFinderCB(end_lr=end_lr)


@pytest.mark.parametrize("lr_mult", [1, 1.0, 0.5, 0, -2, math.nan, "2"])
async def test_a_factor_that_does_not_raise_is_refused(
    lr_mult: Any, dls: DataLoaders, make_model: MakeModel
) -> None:
    with pytest.raises(ValueError, match="give a factor above 1"):
        LRFinderCB(lr_mult)
    with pytest.raises(ValueError, match="give a factor above 1"):
        await TrainLearner(make_model(), dls).lr_find(lr_mult)


# ---------------------------------------------------------------------------- what it suggests


def search(seed: int | None = None, noise: float = 0.0, exploding: int = 6) -> LRFinderCB:
    """Flat for 35 steps, falling for 20, flat for 5; then it explodes."""
    rng = np.random.default_rng(seed)
    finder = LRFinderCB()
    losses = [2.0] * 35 + [2.0 - 0.05 * i for i in range(1, 21)] + [1.0] * 5
    finder.losses = [loss + noise * rng.standard_normal() for loss in losses]
    finder.losses += [10.0 ** (i + 1) for i in range(exploding)]
    finder.lrs = [1e-6 * 1.3**i for i in range(len(finder.losses))]
    return finder


def test_suggestions_on_a_curve_whose_answer_is_known() -> None:
    """It falls from 1e-2 to 1.9, and explodes after 5.3."""
    finder = search()
    falls, lowest, explodes = finder.lrs[34], finder.lrs[54], finder.lrs[60]
    assert falls < finder.suggestion("steep") <= explodes / 3
    assert finder.suggestion("valley") == finder.lrs[34 + 20 * 2 // 3]
    assert lowest / 10 < finder.suggestion("minimum") < explodes / 10
    assert finder.suggestion() == finder.suggestion("valley")
    assert finder.suggestions == {
        method: finder.suggestion(method)  # type: ignore[arg-type]
        for method in ("steep", "valley", "minimum")
    }


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("method", ["valley", "minimum"])
def test_noise_moves_a_suggestion_by_less_than_a_factor_of_ten(method: Any, seed: int) -> None:
    """The noise of a single loss is half of the whole fall."""
    finder = search(seed, noise=0.5)
    assert 0.1 < finder.suggestion(method) / search().suggestion(method) < 10


@pytest.mark.parametrize("seed", range(5))
def test_a_loss_that_only_explodes_tells_to_stay_below(seed: int) -> None:
    rng = np.random.default_rng(seed)
    finder = LRFinderCB()
    finder.losses = [*rng.exponential(0.3, 45), 30.0, 300.0, 3000.0]
    finder.lrs = [1e-5 * 1.3**i for i in range(48)]
    edge = finder.lrs[44]
    for lr in finder.suggestions.values():
        assert edge / 300 < lr < edge


@pytest.mark.parametrize("method", ["steep", "valley", "minimum"])
@pytest.mark.parametrize("losses", [[1.0, 2.0, 4.0], [2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
def test_without_a_fall_a_suggestion_is_below_the_highest_rate_tried(
    losses: list[float], method: Any
) -> None:
    finder = found(losses)
    assert 0 < finder.suggestion(method) < finder.lrs[-1]


def test_smoothed_losses_are_exponentially_weighted_means() -> None:
    losses = [3.0, 1.0, 2.0, 5.0]
    expected = []
    for n in range(1, 5):
        weights = [0.8 ** (n - 1 - i) for i in range(n)]
        pairs = zip(weights, losses, strict=False)
        expected.append(sum(w * loss for w, loss in pairs) / sum(weights))
    assert found(losses).smoothed == pytest.approx(expected)


@given(
    st.lists(st.integers(-1000, 1000).map(float), min_size=3, max_size=40),
    st.sampled_from([0.5, 2.0, 1024.0]),
)
def test_suggestions_depend_on_the_shape_of_the_curve_alone(
    losses: list[float], factor: float
) -> None:
    finder = found(losses, lr=1e-8)
    assert found([loss * factor for loss in losses], lr=1e-8).suggestions == finder.suggestions
    assert all(0 < lr < finder.lrs[-1] for lr in finder.suggestions.values())


@pytest.mark.parametrize("batch_size", [1, 2, 64])
@pytest.mark.parametrize("seed", range(2))
def test_the_suggestion_for_a_model_that_is_trained_already_is_not_noise(
    seed: int, batch_size: int
) -> None:
    """After an epoch on all digits; training with 0.01 to 0.2 is best there, with more diverges."""
    x, y = map(torch.tensor, load_digits(return_X_y=True))
    loader = DataLoader(TensorDataset(x.float() / 16, y), batch_size, shuffle=True)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 50), nn.ReLU(), nn.Linear(50, 10))
    opt = torch.optim.SGD(model.parameters(), 0.02)
    for images, labels in loader:
        F.cross_entropy(model(images), labels).backward()
        opt.step()
        opt.zero_grad()
    finder = TrainLearner(model, DataLoaders(loader), F.cross_entropy).run_lr_find()
    assert finder.lrs[-1] > 0.4
    assert 1e-3 < finder.suggestion() < 1.0
    assert 1e-3 < finder.suggestion("minimum") < 1.0


def test_the_suggestion_for_a_loss_that_cannot_explode_is_below_the_limit() -> None:
    x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(x, torch.tanh(x.sum(1, keepdim=True))), 8, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1), nn.Tanh())
    finder = TrainLearner(model, DataLoaders(loader), F.l1_loss).run_lr_find()
    assert finder.lrs[-1] <= 10
    assert 1e-3 < finder.suggestion() <= 10 / 3


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_losses_are_reported(n: int) -> None:
    finder = found([1.0] * n)
    with pytest.raises(ValueError, match=f"{n} losses are too few for a suggestion"):
        finder.suggestion()
    with pytest.raises(ValueError, match=f"{n} losses are too few for a suggestion"):
        _ = finder.suggestions


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method='slide': choose 'steep', 'valley', 'minimum'"):
        found([3.0, 2.0, 1.0]).suggestion("slide")  # type: ignore[arg-type]


# ----------------------------------------------------------------------------- that it restores


class Everything(nn.Module):
    """A model with all that a fit may change: weights, buffers, modes, random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(1)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(64, 10)
        self.frozen = nn.BatchNorm1d(10).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.head(self.drop(self.norm(x).flatten(1))))


def everything(learner: TrainLearner) -> dict[str, Any]:
    """All that `lr_find` must leave as it was, as a copy."""
    model = learner.model
    opt = learner.opt
    return copy.deepcopy(
        {
            "weights": dict(model.state_dict()),
            "buffers": dict(model.named_buffers()),
            "gradients": [p.grad for p in model.parameters()],
            "modes": [module.training for module in model.modules()],
            "optimizer": None if opt is None else opt.state_dict(),
            "python": random.getstate(),
            "numpy": np.random.get_state(),
            "torch": torch.get_rng_state(),
            "generators": [
                learner.dls.train.generator.get_state(),
                learner.dls.valid.sampler.generator.get_state(),
            ],
            "callbacks": [cb.state_dict() for cb in learner.cbs],
            "position": (learner.epoch, learner.iter, learner.n_epochs, learner.training),
        }
    )


def assert_equal(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, np.ndarray):
        assert np.array_equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_equal(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{path}[{i}]")
    else:
        assert a == b, path


def make_learner(digits: Digits) -> TrainLearner:
    """It draws from every generator there is, in every batch."""
    images, labels = digits
    train, valid = (TensorDataset(images[i : i + 48], labels[i : i + 48]) for i in (0, 48))
    sampler = RandomSampler(valid, generator=torch.Generator().manual_seed(2))
    dls = DataLoaders(
        DataLoader(train, 16, shuffle=True, generator=torch.Generator().manual_seed(1)),
        DataLoader(valid, 16, sampler=sampler),
    )
    torch.manual_seed(0)
    model = Everything()
    learner = TrainLearner(
        model,
        dls,
        F.cross_entropy,
        1e-2,
        [MetricsCB(accuracy=MulticlassAccuracy()), GradientAccumulationCB(2)],
        torch.optim.Adam,
    )

    @learner.on(AfterBatch)
    def draw(event: AfterBatch) -> None:
        random.random()
        np.random.random()

    return learner


class Broken(Exception):
    """What the host's own code raised."""


def raise_(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("opt_func", [torch.optim.Adam, None])
@pytest.mark.parametrize("before", ["fitted", "new"])
@pytest.mark.parametrize("end", ["epochs", "nan", "cancelled", "failed", "host"])
async def test_it_leaves_everything_as_it_was_whatever_ended_it(
    end: str, before: str, opt_func: Any, digits: Digits
) -> None:
    """G9: weights, buffers, gradients, optimizer, modes, random states, callbacks."""
    learner = make_learner(digits)
    if before == "fitted":
        await learner.fit(1)
        F.cross_entropy(learner.model(digits[0][:8]), digits[1][:8]).backward()
    learner.model.frozen.eval()
    if opt_func is None:
        learner.opt_func = None
        learner.opt = learner.opt or torch.optim.Adam(learner.model.parameters(), 1e-2)
    cbs, opt = learner.cbs, learner.opt
    state = everything(learner)
    endings: dict[str, Callable[[AfterBatch], Any]] = {
        "epochs": lambda event: None,
        "nan": lambda event: learner.loss.fill_(math.nan),
        "cancelled": lambda event: raise_(CancelFitException("enough")),
        "failed": lambda event: raise_(Broken()),
    }
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        async def by_host(event: AfterBatch) -> None:
            scope.cancel()
            await anyio.sleep_forever()

        receiver = endings.get(end, by_host)
        with learner.subscribe(AfterBatch, receiver, where=lambda event: event.iter == 1):
            if end == "failed":
                with pytest.raises(Broken):
                    await learner.lr_find(max_epochs=2)
            else:
                await learner.lr_find(max_epochs=2)
    assert scope.cancelled_caught == (end == "host")
    assert_equal(everything(learner), state)
    assert learner.cbs == cbs
    assert learner.opt is opt
    assert not learner.fitting


class Counts(nn.Linear):
    """Counts its calls in a buffer that is not part of its state."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return super().forward(x)


async def test_it_restores_buffers_that_are_not_saved(dls: DataLoaders) -> None:
    learner = TrainLearner(Counts(), dls)
    await learner.lr_find(max_epochs=1)
    assert learner.model.calls == 0


@pytest.mark.parametrize("before", ["fitted", "new"])
async def test_a_fit_after_it_is_the_fit_without_it(before: str, digits: Digits) -> None:
    """G11: same weights, to the bit, and the same history."""
    ends = []
    for find in (False, True):
        random.seed(5)
        np.random.seed(5)
        learner = make_learner(digits)
        torch.manual_seed(5)
        if before == "fitted":
            await learner.fit(1)
        if find:
            await learner.lr_find(max_epochs=3)
        result = await learner.fit(2)
        ends.append((everything(learner), result.history))
    assert_equal(ends[0], ends[1])


# ------------------------------------------------------------------------------------- the plot


def test_plot_draws_the_curve_and_the_suggestions() -> None:
    finder = search(exploding=0)
    ax = finder.plot()
    single, smoothed, *points = ax.get_lines()
    assert list(single.get_xdata()) == list(smoothed.get_xdata()) == finder.lrs
    assert list(single.get_ydata()) == finder.losses
    assert list(smoothed.get_ydata()) == finder.smoothed
    assert [(p.get_label(), p.get_xdata()[0]) for p in points] == [
        (f"{name}: {lr:.2e}", lr) for name, lr in finder.suggestions.items()
    ]
    for point in points:
        i = finder.smoothed.index(point.get_ydata()[0])
        assert finder.lrs[i] == pytest.approx(point.get_xdata()[0], rel=0.3)
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "learning rate", "loss")
    file = io.BytesIO()
    ax.figure.savefig(file, dpi=20)  # a whole figure, without pyplot
    assert file.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("exploding", [1, 6])
def test_plot_leaves_out_the_explosion_and_shows_the_valley(exploding: int) -> None:
    finder = search(0, noise=0.02, exploding=exploding)
    ax = finder.plot()
    low, high = ax.get_ylim()
    assert 0.5 < low < 1.0
    assert 2.0 < high < 2.5
    drawn = len(ax.get_lines()[1].get_xdata())
    assert 60 < drawn <= 61  # one loss above the range, so that the line leaves it


def test_plot_draws_on_the_axes_that_it_is_given() -> None:
    from matplotlib.figure import Figure

    left, right = Figure().subplots(1, 2)
    assert found([3.0, 2.0, 1.0]).plot(right) is right
    assert len(right.get_lines()) == 5
    assert len(left.get_lines()) == 0


@pytest.mark.parametrize("losses", [[], [3.0], [3.0, 2.0]])
def test_plot_of_too_few_losses_has_no_suggestions(losses: list[float]) -> None:
    assert len(found(losses).plot().get_lines()) == 2


def test_plotting_does_without_pyplot_and_its_global_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    ax = found([3.0, 2.0, 1.0]).plot()
    ax.figure.savefig(io.BytesIO(), format="svg")
    assert len(ax.get_lines()) == 5


def test_without_matplotlib_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("lr_plot", "notebook_figure"):
        monkeypatch.delitem(sys.modules, f"eventrain.engine.run.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'eventrain\[plot\]'"):
        found([3.0, 2.0, 1.0]).plot()

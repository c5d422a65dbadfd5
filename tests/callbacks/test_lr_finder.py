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
    CancelFitException,
    CleanupEpoch,
    record_events,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torcheval.metrics import MulticlassAccuracy

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
        if losses[-1] > 3 * min(losses):
            break
        lr *= 2
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
        "the loss is more than three times its minimum",
        len(losses),
    )


@pytest.mark.parametrize(
    ("losses", "n", "reason"),
    [
        ([1.0, 0.5, 1.4, 1.6, 9.0, 9.0], 4, "the loss is more than three times its minimum"),
        ([-1.0, -2.0, 1.9, 2.1, 9.0, 9.0], 4, "the loss is more than three times its minimum"),
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
    learner = TrainLearner(make_model(), DataLoaders(make_batches(3)), scripted(losses))
    finder = await learner.lr_find(lr_mult=1.5, start_lr=0.1, max_epochs=2)
    assert finder.losses == pytest.approx(losses[:n])
    assert finder.lrs == pytest.approx([0.1 * 1.5**i for i in range(n)], rel=1e-12)
    assert learner.result is not None
    assert learner.result.reason == reason
    assert learner.result.status == ("completed" if reason is None else "cancelled")


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


async def test_with_an_optimizer_of_the_hosts_own_it_begins_where_it_was_told_to(
    make_batches: MakeBatches, make_model: MakeModel
) -> None:
    model = make_model()
    learner = TrainLearner(model, DataLoaders(make_batches(3)), opt_func=None)
    learner.opt = torch.optim.SGD(model.parameters(), 0.3)
    finder = await learner.lr_find(lr_mult=2.0, start_lr=1e-4, max_epochs=1)
    assert finder.lrs == pytest.approx([1e-4, 2e-4, 4e-4], rel=1e-12)
    assert learner.opt.param_groups[0]["lr"] == 0.3


@pytest.mark.parametrize("lr_mult", [1, 1.0, 0.5, 0, -2, math.nan])
async def test_a_factor_that_does_not_raise_is_refused(
    lr_mult: float, dls: DataLoaders, make_model: MakeModel
) -> None:
    with pytest.raises(ValueError, match="give a factor above 1"):
        LRFinderCB(lr_mult)
    with pytest.raises(ValueError, match="give a factor above 1"):
        await TrainLearner(make_model(), dls).lr_find(lr_mult)


# ---------------------------------------------------------------------------- what it suggests


@pytest.mark.parametrize(
    ("losses", "steep", "valley", "minimum"),
    [
        # falls fastest from the third; the longest fall is the first to the sixth; least there
        ([5.0, 4.9, 4.5, 2.0, 1.5, 1.4, 3.0], 1e2, 1e3, 1e4),
        # the fall begins after a hump
        ([3.0, 3.1, 3.0, 2.5, 2.0, 1.5, 4.0], 1e2, 1e3, 1e4),
        # two valleys: the second is steeper, and shorter
        ([9.0, 8.0, 7.0, 6.0, 5.0, 9.5, 5.5], 1e5, 1e2, 1e3),
        # it only falls
        ([4.0, 3.0, 1.0, 0.5], 1e1, 1e2, 1e2),
        # it only rises: the first is the best there is
        ([1.0, 2.0, 4.0], 1e0, 1e0, 1e-1),
        # it stays
        ([2.0, 2.0, 2.0], 1e0, 1e0, 1e-1),
    ],
)
def test_suggestions_on_curves_whose_answer_is_known(
    losses: list[float], steep: float, valley: float, minimum: float
) -> None:
    finder = found(losses)
    assert finder.suggestions == {"steep": steep, "valley": valley, "minimum": minimum}
    assert finder.suggestion() == valley
    for method, lr in finder.suggestions.items():
        assert finder.suggestion(method) == lr  # type: ignore[arg-type]


def test_steep_is_by_the_logarithm_of_the_learning_rate() -> None:
    finder = found([5.0, 4.0, 2.5])
    finder.lrs = [1.0, 2.0, 200.0]  # the second fall is greater, over a far longer way
    assert finder.suggestion("steep") == 1.0


@given(
    st.lists(st.integers(-1000, 1000).map(float), min_size=3, max_size=30),
    st.integers(-1000, 1000),
    st.sampled_from([0.5, 2.0, 1024.0]),
)
def test_suggestions_depend_on_the_shape_of_the_curve_alone(
    losses: list[float], shift: int, factor: float
) -> None:
    finder = found(losses, lr=1e-8)
    moved = found([(loss + shift) * factor for loss in losses], lr=1e-8)
    assert moved.suggestions == finder.suggestions
    tried = set(finder.lrs)
    assert finder.suggestion("steep") in tried
    assert finder.suggestion("valley") in tried
    assert finder.suggestion("minimum") == finder.lrs[losses.index(min(losses))] / 10


@pytest.mark.parametrize("n", [0, 1, 2])
def test_too_few_losses_are_told(n: int) -> None:
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
    with anyio.fail_after(30), anyio.CancelScope() as scope:

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
    """Counts its calls in a buffer that is no part of its state."""

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
    finder = found([5.0, 4.9, 4.5, 2.0, 1.5, 1.4, 3.0], lr=1e-5)
    ax = finder.plot()
    curve, *points = ax.get_lines()
    assert list(curve.get_xdata()) == finder.lrs
    assert list(curve.get_ydata()) == finder.losses
    assert [(p.get_label(), p.get_xdata()[0], p.get_ydata()[0]) for p in points] == [
        ("steep: 1.00e-03", pytest.approx(1e-3), 4.5),
        ("valley: 1.00e-02", pytest.approx(1e-2), 2.0),
        ("minimum: 1.00e-01", pytest.approx(1e-1), 1.5),
    ]
    assert (ax.get_xscale(), ax.get_xlabel(), ax.get_ylabel()) == ("log", "learning rate", "loss")
    file = io.BytesIO()
    ax.figure.savefig(file, dpi=20)  # a whole figure, without pyplot
    assert file.getvalue().startswith(b"\x89PNG")


def test_plot_draws_on_the_axes_that_it_is_given() -> None:
    from matplotlib.figure import Figure

    left, right = Figure().subplots(1, 2)
    assert found([3.0, 2.0, 1.0]).plot(right) is right
    assert len(right.get_lines()) == 4
    assert len(left.get_lines()) == 0


def test_plot_of_too_few_losses_has_no_suggestions() -> None:
    ax = found([3.0, 2.0]).plot()
    assert len(ax.get_lines()) == 1
    assert ax.get_legend() is None


def test_plotting_does_without_pyplot_and_its_global_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    ax = found([3.0, 2.0, 1.0]).plot()
    ax.figure.savefig(io.BytesIO(), format="svg")
    assert len(ax.get_lines()) == 4


def test_without_matplotlib_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "eventrain.engine.run.notebook_figure", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'eventrain\[plot\]'"):
        found([3.0, 2.0, 1.0]).plot()

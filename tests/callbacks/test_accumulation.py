"""GradientAccumulationCB: one step for several batches, which metrics still see one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    GradientAccumulationCB,
    MetricsCB,
    MixedTrainingCB,
    SingleBatchCB,
)
from eventrain.engine import DataLoaders, MomentumLearner, TensorLoader, TrainLearner
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    AfterLoss,
    AfterStep,
    BeforeBatch,
    BeforeStep,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CancelStepException,
    CleanupStep,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

Batch = tuple[torch.Tensor, torch.Tensor]
Batches = list[Batch]
LR = 0.05

SKIPPED = [
    "BeforeBatch",
    "AfterPredict",
    "AfterLoss",
    "AfterBackward",
    "BeforeStep",
    "CleanupStep",
    "AfterBatch",
    "CleanupBatch",
]
STEPPED = [
    "BeforeBatch",
    "AfterPredict",
    "AfterLoss",
    "AfterBackward",
    "BeforeStep",
    "AfterStep",
    "CleanupStep",
    "AfterBatch",
    "CleanupBatch",
]


class Unsized:
    """A loader without a length, as one over an iterable dataset."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def line() -> nn.Module:
    torch.manual_seed(42)
    return nn.Linear(3, 1)


def data(n: int) -> Batches:
    generator = torch.Generator().manual_seed(n)
    inputs = [torch.randn(4, 3, generator=generator) for _ in range(n)]
    return [(x, x.sum(1, keepdim=True)) for x in inputs]


def by_hand(
    model: nn.Module, groups: Iterable[Batches], mom: float = 0.0, lr: float = LR
) -> nn.Module:
    """A step for each group, on the mean of its batches."""
    opt = torch.optim.SGD(model.parameters(), lr)
    for group in groups:
        for x, y in group:
            (F.mse_loss(model(x), y) / len(group)).backward()
        opt.step()
        for p in model.parameters():
            p.grad = p.grad * mom if mom else None
    return model


def groups_of(batches: Batches, n: int) -> list[Batches]:
    return [batches[i : i + n] for i in range(0, len(batches), n)]


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradients(model: nn.Module) -> list[Any]:
    return [p.grad for p in model.parameters()]


def learner(batches: Any, n: int, *cbs: Any, valid: Any = None) -> TrainLearner:
    return TrainLearner(
        line(), DataLoaders(batches, valid), lr=LR, cbs=[*cbs, GradientAccumulationCB(n)]
    )


# ------------------------------------------------------------------------------------ events


def test_every_batch_is_completed_and_a_step_is_taken_every_n(backend: dict[str, Any]) -> None:
    learn = learner(data(5), 2)
    with record_events(learn) as events:
        result = learn.run(1, valid=False, **backend)
    assert events.names == [
        "BeforeFit",
        "BeforeEpoch",
        *SKIPPED,
        *STEPPED,
        *SKIPPED,
        *STEPPED,
        *STEPPED,  # the tail, known to be of one batch
        "AfterEpoch",
        "CleanupEpoch",
        "AfterFit",
        "CleanupFit",
    ]
    ends = [event.end for event in events if isinstance(event, CleanupStep)]
    assert [(end.status, end.who, end.reason) for end in ends] == [
        ("cancelled", "GradientAccumulationCB.before_step", "accumulating, 1 of 2"),
        ("completed", None, None),
        ("cancelled", "GradientAccumulationCB.before_step", "accumulating, 1 of 2"),
        ("completed", None, None),
        ("completed", None, None),
    ]
    assert (result.batches, result.steps) == (5, 3)


def test_without_a_length_the_tail_is_stepped_with_when_the_epoch_ends(
    backend: dict[str, Any],
) -> None:
    learn = learner(Unsized(data(3)), 2)
    with record_events(learn) as events:
        result = learn.run(1, valid=False, **backend)
    assert events.names == [
        "BeforeFit",
        "BeforeEpoch",
        *SKIPPED,
        *STEPPED,
        *SKIPPED,
        "AfterEpoch",
        "BeforeStep",
        "AfterStep",
        "CleanupStep",
        "CleanupEpoch",
        "AfterFit",
        "CleanupFit",
    ]
    assert (result.batches, result.steps) == (3, 2)


def test_a_full_tail_makes_no_empty_step(backend: dict[str, Any]) -> None:
    learn = learner(Unsized(data(4)), 2)
    with record_events(learn) as events:
        result = learn.run(1, valid=False, **backend)
    assert events.names[-4:] == ["AfterEpoch", "CleanupEpoch", "AfterFit", "CleanupFit"]
    assert (result.batches, result.steps) == (4, 2)


# ----------------------------------------------------------------------- losses and metrics


def test_metrics_and_events_see_every_batch_with_its_true_loss() -> None:
    """The same as without accumulation, as long as no step has made a difference."""
    rows, losses = [], []
    for n in (1, 3):
        metrics, seen = MetricsCB(), []
        learn = learner(data(3), n, metrics, valid=data(2))
        learn.opt_func = lambda params, lr: torch.optim.SGD(params, 0.0)
        for event_type in (AfterLoss, AfterBackward, AfterBatch):
            learn.subscribe(event_type, lambda e, seen=seen: seen.append(e.loss.item()), order=99)
        learn.run(2)
        rows.append(metrics.history)
        losses.append(seen)
    assert rows[0] == rows[1]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2 * (3 * 3 + 2 * 2)


def test_the_validation_loss_is_untouched() -> None:
    metrics, valid = MetricsCB(), data(2)
    learn = learner(data(4), 4, metrics, valid=valid)
    learn.run(1)
    with torch.no_grad():
        true = [F.mse_loss(learn.model(x), y).item() for x, y in valid]
    assert metrics.history[1]["loss"] == pytest.approx(sum(true) / 2, rel=1e-6)


# ------------------------------------------------------------------------------------ weights


@settings(max_examples=40)
@given(n_batches=st.integers(1, 9), n=st.integers(1, 10), sized=st.booleans())
def test_any_number_of_batches_makes_the_steps_and_weights_made_by_hand(
    n_batches: int, n: int, sized: bool
) -> None:
    batches = data(n_batches)
    learn = learner(batches if sized else Unsized(batches), n)
    result = learn.run(2, valid=False)
    assert (result.batches, result.steps) == (2 * n_batches, 2 * math.ceil(n_batches / n))
    ours, reference = weights(learn.model), weights(by_hand(line(), groups_of(batches, n) * 2))
    if sized or n_batches % n == 0:
        assert torch.equal(ours, reference)
    else:  # the tail was corrected afterwards
        assert torch.allclose(ours, reference, rtol=1e-5, atol=1e-6)


def test_momentum_is_carried_from_group_to_group() -> None:
    batches = data(5)
    learn = MomentumLearner(
        line(), DataLoaders(batches), lr=LR, cbs=GradientAccumulationCB(2), mom=0.9
    )
    learn.run(2, valid=False)
    reference = by_hand(line(), groups_of(batches, 2) * 2, mom=0.9)
    assert torch.equal(weights(learn.model), weights(reference))


@pytest.mark.parametrize("sized", [True, False])
def test_a_batch_cancelled_in_a_group_is_replaced_by_the_next(sized: bool) -> None:
    batches = data(5)
    learn = learner(batches if sized else Unsized(batches), 2)

    @learn.on(BeforeBatch, where=lambda event: event.iter == 1)
    def leave(event: BeforeBatch) -> None:
        raise CancelBatchException

    result = learn.run(1, valid=False)
    b = batches
    reference = by_hand(line(), [[b[0], b[2]], [b[3], b[4]]])
    assert torch.equal(weights(learn.model), weights(reference))
    assert (result.batches, result.steps) == (4, 2)


def test_the_last_batch_cancelled_leaves_a_tail_of_the_others() -> None:
    batches = data(4)
    learn = learner(batches, 2)

    @learn.on(AfterLoss, where=lambda event: event.iter == 3)
    def leave(event: AfterLoss) -> None:
        raise CancelBatchException

    result = learn.run(1, valid=False)
    reference = by_hand(line(), [batches[:2], batches[2:3]])
    assert torch.equal(weights(learn.model), weights(reference))
    assert (result.batches, result.steps) == (3, 2)


def test_a_step_that_another_receiver_cancels_is_taken_with_the_next_batch() -> None:
    batches = data(3)
    learn = learner(Unsized(batches), 2)

    @learn.on(BeforeStep, where=lambda event: event.iter == 1)
    def leave(event: BeforeStep) -> None:
        raise CancelStepException

    result = learn.run(1, valid=False)
    reference = by_hand(line(), [batches])
    assert torch.allclose(weights(learn.model), weights(reference), rtol=1e-6)
    assert result.steps == 1


# --------------------------------------------------------------------------- ends in between


def fail() -> Exception:
    return KeyError("broken")


@pytest.mark.parametrize("make", [CancelEpochException, CancelFitException, fail])
def test_an_epoch_left_in_the_middle_of_a_group_leaves_nothing_behind(
    make: Callable[[], BaseException], backend: dict[str, Any]
) -> None:
    """G9: the next fit is the one that a fresh callback would make."""
    batches = data(5)
    learn = learner(batches, 2)

    def leave(event: AfterBatch) -> None:
        raise make()

    with learn.subscribe(AfterBatch, leave, where=lambda event: event.iter == 2):
        if make is fail:
            with pytest.raises(KeyError, match="broken"):
                learn.run(1, valid=False, **backend)
        else:
            learn.run(1, valid=False, **backend)
    assert gradients(learn.model) == [None, None]
    learn.run(1, valid=False, **backend)
    reference = by_hand(line(), [batches[:2], *groups_of(batches, 2)])
    assert torch.equal(weights(learn.model), weights(reference))


def test_an_epoch_left_in_the_middle_of_a_group_leaves_nothing_for_the_next_epoch() -> None:
    batches = data(4)
    learn = learner(batches, 3)

    @learn.on(AfterBatch, where=lambda event: (event.epoch, event.iter) == (0, 1))
    def leave(event: AfterBatch) -> None:
        raise CancelEpochException

    result = learn.run(2, valid=False)
    reference = by_hand(line(), groups_of(batches, 3))
    assert torch.equal(weights(learn.model), weights(reference))
    assert (result.epochs, result.steps) == (1, 2)


def test_a_single_batch_of_a_group_takes_no_step() -> None:
    learn = learner(data(4), 2, SingleBatchCB())
    result = learn.run(1, valid=False)
    assert (result.status, result.steps) == ("cancelled", 0)
    assert torch.equal(weights(learn.model), weights(line()))
    assert gradients(learn.model) == [None, None]


# ------------------------------------------------------------------------------------ lr_find


@pytest.mark.parametrize("sized", [True, False])
async def test_the_lr_finder_counts_steps_and_averages_their_losses(sized: bool) -> None:
    batches = data(5)
    learn = learner(batches if sized else Unsized(batches), 2)
    finder = await learn.lr_find(lr_mult=1.5, start_lr=1e-3, max_epochs=2)

    model, lr = line(), 1e-3
    lrs, losses = [], []
    for group in groups_of(batches, 2) * 2:
        losses.append(sum(F.mse_loss(model(x), y).item() for x, y in group) / len(group))
        lrs.append(lr)
        by_hand(model, [group], lr=lr)
        lr *= 1.5
    assert finder.lrs == pytest.approx(lrs, rel=1e-12)
    assert finder.losses == pytest.approx(losses, rel=1e-6)
    assert learn.result is not None
    assert learn.result.steps == 6
    assert torch.equal(weights(learn.model), weights(line()))
    assert gradients(learn.model) == [None, None]


# ---------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("n", [0, -1, True, 2.0, "2", None])
def test_a_number_that_is_no_count_is_refused(n: Any) -> None:
    with pytest.raises(ValueError, match=f"n={n!r}: give the number of batches"):
        GradientAccumulationCB(n)


def test_a_loss_without_gradient_is_told_as_anywhere_else() -> None:
    learn = learner(data(2), 2)
    learn.model.requires_grad_(False)
    with pytest.raises(ValueError, match="the loss does not require grad"):
        learn.run(1, valid=False)


def test_the_state_says_how_far_the_group_is() -> None:
    accumulation = GradientAccumulationCB(3)
    learn = TrainLearner(line(), DataLoaders(data(5)), lr=LR, cbs=accumulation)
    states: list[dict[str, Any]] = []
    learn.subscribe(AfterBatch, lambda event: states.append(accumulation.state_dict()))
    learn.run(1, valid=False)
    assert [(state["waiting"], state["group"]) for state in states] == [
        (1, 3),
        (2, 3),
        (0, 3),
        (1, 2),
        (0, 3),
    ]
    other = GradientAccumulationCB(3)
    other.load_state_dict(states[1])
    assert other.state_dict() == states[1] != GradientAccumulationCB(3).state_dict()


def test_stopping_in_the_middle_of_a_group_is_an_end_like_any_other() -> None:
    learn = learner(data(4), 4)

    @learn.on(AfterBatch, where=lambda event: event.iter == 1)
    def stop(event: AfterBatch) -> None:
        assert learn.stop("fit", "enough")

    result = learn.run(1, valid=False)
    assert (result.status, result.reason, result.steps) == ("cancelled", "enough", 0)
    assert gradients(learn.model) == [None, None]


# ----------------------------------------------------------------------- gradients that are kept


@pytest.mark.parametrize("sized", [True, False])
def test_an_epoch_cut_in_a_group_keeps_the_momentum_from_before_it(sized: bool) -> None:
    """As SGD with momentum does: the gradients are dropped, its buffer is not."""
    batches = data(5)
    learn = MomentumLearner(
        line(),
        DataLoaders(batches if sized else Unsized(batches)),
        lr=LR,
        cbs=GradientAccumulationCB(2),
        mom=0.9,
    )

    @learn.on(AfterBatch, where=lambda event: (event.epoch, event.iter) == (0, 2))
    def leave(event: AfterBatch) -> None:
        raise CancelEpochException

    learn.run(2, valid=False)
    groups = [batches[:2], *groups_of(batches, 2)]  # the third batch of the first epoch is gone
    ours = weights(learn.model)
    assert torch.allclose(ours, weights(by_hand(line(), groups, mom=0.9)), rtol=1e-5, atol=1e-7)

    model = line()
    opt = torch.optim.SGD(model.parameters(), LR, momentum=0.9)
    for group in groups:
        for x, y in group:
            (F.mse_loss(model(x), y) / len(group)).backward()
        opt.step()
        opt.zero_grad()
    assert torch.allclose(ours, weights(model), rtol=1e-5, atol=1e-7)


def test_the_correction_of_a_tail_leaves_the_momentum_as_it_is() -> None:
    batches = data(5)
    learn = MomentumLearner(
        line(), DataLoaders(Unsized(batches)), lr=LR, cbs=GradientAccumulationCB(3), mom=0.9
    )
    learn.run(2, valid=False)
    reference = by_hand(line(), groups_of(batches, 3) * 2, mom=0.9)
    assert torch.allclose(weights(learn.model), weights(reference), rtol=1e-5, atol=1e-6)


def test_the_gradients_that_a_resumed_group_puts_back_are_in_its_state() -> None:
    accumulation, states = GradientAccumulationCB(2), []
    learn = MomentumLearner(line(), DataLoaders(data(4)), lr=LR, cbs=accumulation, mom=0.9)
    learn.subscribe(AfterBatch, lambda event: states.append(accumulation.state_dict()))
    learn.run(1, valid=False)
    assert [state["kept"] is not None for state in states] == [False, False, True, False]
    other = GradientAccumulationCB(2)
    other.load_state_dict(states[2])
    assert all(map(torch.equal, other.state_dict()["kept"], states[2]["kept"]))


# --------------------------------------------------------------------------- weights of batches


def tokens(counts: list[int]) -> Batches:
    """Batches of six tokens each, of which so many are not padding."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for count in counts:
        y = torch.randint(0, 3, (6,), generator=generator)
        y[count:] = -100
        batches.append((torch.randn(6, 3, generator=generator), y))
    return batches


def classifier() -> nn.Module:
    torch.manual_seed(5)
    return nn.Linear(3, 3)


def n_targets(learner: Any) -> torch.Tensor:
    return (learner.batch[1] != -100).sum()


def one_large_batch(groups: Iterable[Batches], loss_func: Any = F.cross_entropy) -> nn.Module:
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), LR)
    for group in groups:
        x, y = (torch.cat(column) for column in zip(*group, strict=True))
        loss_func(model(x), y).backward()
        opt.step()
        opt.zero_grad()
    return model


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "tensor": n_targets,
    "int": lambda learner: int(n_targets(learner)),
    "float": lambda learner: float(n_targets(learner)),
    "float64": lambda learner: n_targets(learner).double(),
    "thousands": lambda learner: n_targets(learner) * 4096,
    "fractions": lambda learner: n_targets(learner) / 4096,
}


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("counts", [[1, 6, 3, 2, 5], [6, 0, 4, 0, 2], [0, 3, 1, 0, 0]])
def test_with_the_number_of_targets_a_group_is_one_large_batch(
    counts: list[int], weight: str, sized: bool
) -> None:
    batches = tokens(counts)
    learn = TrainLearner(
        classifier(),
        DataLoaders(batches if sized else Unsized(batches)),
        F.cross_entropy,
        LR,
        GradientAccumulationCB(2, weight=WEIGHTS[weight]),
    )
    result = learn.run(3, valid=False)
    assert result.steps == 9
    reference = one_large_batch(groups_of(batches, 2) * 3)
    assert torch.allclose(weights(learn.model), weights(reference), rtol=1e-5, atol=1e-6)


def test_without_it_a_group_is_another_batch() -> None:
    batches = tokens([1, 6, 3, 2, 5, 1])
    learn = TrainLearner(
        classifier(), DataLoaders(batches), F.cross_entropy, LR, GradientAccumulationCB(2)
    )
    learn.run(3, valid=False)
    reference = one_large_batch(groups_of(batches, 2) * 3)
    assert not torch.allclose(weights(learn.model), weights(reference), atol=1e-3)


def test_weights_of_classes_make_a_group_one_large_batch() -> None:
    loss_func = nn.CrossEntropyLoss(torch.tensor([0.1, 0.5, 4.0]))
    batches = tokens([6, 6, 6, 6, 6])
    accumulation = GradientAccumulationCB(
        3, weight=lambda learner: loss_func.weight[learner.batch[1]].sum()
    )
    learn = TrainLearner(classifier(), DataLoaders(batches), loss_func, LR, accumulation)
    learn.run(2, valid=False)
    reference = one_large_batch(groups_of(batches, 3) * 2, loss_func)
    assert torch.allclose(weights(learn.model), weights(reference), rtol=1e-5, atol=1e-6)


def test_a_weighted_group_keeps_the_momentum_from_before_it() -> None:
    batches, weight = tokens([1, 6, 3, 2]), n_targets
    learn = MomentumLearner(
        classifier(),
        DataLoaders(batches),
        F.cross_entropy,
        LR,
        GradientAccumulationCB(2, weight=weight),
        mom=0.5,
    )
    learn.run(2, valid=False)
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), LR, momentum=0.5)
    for group in groups_of(batches, 2) * 2:
        x, y = (torch.cat(column) for column in zip(*group, strict=True))
        opt.zero_grad()
        F.cross_entropy(model(x), y).backward()
        opt.step()
    assert torch.allclose(weights(learn.model), weights(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sized", [True, False])
def test_a_full_tail_is_divided_by_n(sized: bool) -> None:
    """As by a loop that divides every loss by n."""
    batches = data(5)
    accumulation = GradientAccumulationCB(3, tail="full")
    learn = TrainLearner(
        line(), DataLoaders(batches if sized else Unsized(batches)), lr=LR, cbs=accumulation
    )
    result = learn.run(2, valid=False)
    model = line()
    opt = torch.optim.SGD(model.parameters(), LR)
    for group in groups_of(batches, 3) * 2:
        for x, y in group:
            (F.mse_loss(model(x), y) / 3).backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(weights(learn.model), weights(model))
    assert result.steps == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight": 3}, "weight=3: give a function of the learner"),
        ({"weight": lambda preds, y: 1}, "write lambda learner: function"),
        ({"tail": "half"}, "tail='half': choose 'mean' or 'full'"),
        ({"weight": n_targets, "tail": "full"}, "leave one of them out"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(options: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        GradientAccumulationCB(2, **options)


@pytest.mark.parametrize("value", ["2", None, torch.ones(2), -1])
def test_a_weight_that_is_not_a_number_is_told(value: Any) -> None:
    accumulation = GradientAccumulationCB(2, weight=lambda learner: value)
    learn = TrainLearner(line(), DataLoaders(data(2)), lr=LR, cbs=accumulation)
    with pytest.raises((TypeError, ValueError), match=r"weight=.* returned"):
        learn.run(1, valid=False)


def groups_of_a_clock(
    batches: Batches, n: int, n_epochs: int, epoch_length: int | None, max_steps: int | None
) -> list[Batches]:
    """The batches of every step of a fit, as read from a loader that begins again at its end."""
    stream, groups = itertools.cycle(batches), []
    for _ in range(n_epochs):
        epoch = list(itertools.islice(stream, epoch_length or len(batches)))
        groups += groups_of(epoch, n)
    return groups[:max_steps]


def weighted_by_hand(groups: Iterable[Batches], mom: float = 0.0) -> nn.Module:
    """A step for each group, on the mean over all of its targets."""
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), LR)
    for group in groups:
        n = sum((y != -100).sum() for _, y in group)
        for x, y in group:
            (F.cross_entropy(model(x), y, reduction="sum") / n.clamp(min=1)).backward()
        opt.step()
        for p in model.parameters():
            p.grad = p.grad * mom if mom else None
    return model


@settings(deadline=None, max_examples=60)
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    n=st.integers(1, 4),
    epoch_length=st.none() | st.integers(1, 9),
    max_steps=st.none() | st.integers(1, 9),
    mom=st.sampled_from([0.0, 0.5]),
    sized=st.booleans(),
)
def test_a_weighted_group_is_one_large_batch_by_any_clock(
    counts: list[int],
    n: int,
    epoch_length: int | None,
    max_steps: int | None,
    mom: float,
    sized: bool,
) -> None:
    batches = tokens(counts)
    learn = MomentumLearner(
        classifier(),
        DataLoaders(batches if sized else Unsized(batches)),
        F.cross_entropy,
        LR,
        GradientAccumulationCB(n, weight=n_targets),
        mom=mom,
    )
    result = learn.run(3, valid=False, epoch_length=epoch_length, max_steps=max_steps)
    groups = groups_of_a_clock(batches, n, 3, epoch_length, max_steps)
    assert result.steps == len(groups)
    assert torch.allclose(
        weights(learn.model), weights(weighted_by_hand(groups, mom)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("mom", [0.0, 0.5])
@pytest.mark.parametrize("cancel", [CancelEpochException, CancelFitException])
@pytest.mark.parametrize("event_type", [AfterLoss, AfterBackward, AfterBatch])
def test_a_weighted_group_that_is_cut_is_dropped_whole(
    event_type: Any, cancel: Any, mom: float
) -> None:
    batches = tokens([2, 6, 3, 1, 5, 4])
    learn = MomentumLearner(
        classifier(),
        DataLoaders(batches),
        F.cross_entropy,
        LR,
        GradientAccumulationCB(3, weight=n_targets),
        mom=mom,
    )

    @learn.on(event_type, order=99, where=lambda event: (event.epoch, event.iter) == (1, 4))
    def leave(event: Any) -> None:
        raise cancel

    result = learn.run(3, valid=False)
    groups = groups_of(batches, 3) * (3 if cancel is CancelEpochException else 2)
    del groups[3]
    assert result.steps == len(groups)
    reference = weighted_by_hand(groups, mom)
    assert torch.allclose(weights(learn.model), weights(reference), rtol=1e-5, atol=1e-6)


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """Its state is one per process, precision included."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
@pytest.mark.parametrize("kind", [TrainLearner, partial(MomentumLearner, mom=0.5)])
@pytest.mark.parametrize(
    ("make", "dtype"),
    [
        (lambda: AccelerateCB("no"), None),
        (lambda: AccelerateCB("bf16"), torch.bfloat16),
        (lambda: MixedTrainingCB("bf16"), torch.bfloat16),
        (lambda: MixedTrainingCB("fp16", init_scale=1024.0), torch.float16),
    ],
)
def test_a_weighted_group_is_one_large_batch_in_mixed_precision(
    make: Any, dtype: torch.dtype | None, kind: Any
) -> None:
    batches = tokens([1, 6, 3, 2, 5])
    learn = kind(
        classifier(),
        DataLoaders(batches),
        F.cross_entropy,
        LR,
        [make(), GradientAccumulationCB(2, weight=n_targets)],
    )
    learn.run(2, valid=False)
    model = classifier()
    opt = torch.optim.SGD(model.parameters(), LR, momentum=getattr(learn, "mom", 0.0))
    for group in groups_of(batches, 2) * 2:
        x, y = (torch.cat(column) for column in zip(*group, strict=True))
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()
    rounding = {"atol": 1e-6} if dtype is None else {"atol": 2e-3}  # of the gradients of a layer
    assert torch.allclose(weights(learn.model), weights(model), rtol=1e-5, **rounding)


def test_a_step_skipped_by_mixed_precision_begins_a_new_group() -> None:
    batches = tokens([1, 6, 3, 2, 5, 4])
    mixed = MixedTrainingCB("fp16", init_scale=2.0**100)  # the first steps overflow
    learn = TrainLearner(
        classifier(),
        DataLoaders(batches),
        F.cross_entropy,
        LR,
        [mixed, GradientAccumulationCB(2, weight=n_targets)],
    )
    taken: list[int] = []
    learn.subscribe(AfterStep, lambda event: taken.append(event.iter))
    result = learn.run(40, valid=False)
    assert mixed.skipped_steps > 2
    assert result.steps == 120 - mixed.skipped_steps
    assert set(taken) == {1, 3, 5}
    reference = weighted_by_hand((groups_of(batches, 2) * 40)[mixed.skipped_steps :])
    assert torch.allclose(weights(learn.model), weights(reference), atol=2e-2)


def test_a_weighted_group_is_resumed_in_its_middle(tmp_path: Any) -> None:
    """To the bit."""
    batches = tokens([1, 6, 3, 2, 5])

    def learner(*cbs: Any) -> MomentumLearner:
        accumulation = GradientAccumulationCB(3, weight=n_targets)
        dls = DataLoaders(
            TensorLoader(*(torch.cat(c) for c in zip(*batches, strict=True)), batch_size=6)
        )
        return MomentumLearner(
            classifier(), dls, F.cross_entropy, LR, [accumulation, *cbs], mom=0.5
        )

    whole = learner()
    whole.run(3, valid=False)
    saving = learner(CheckpointCB(tmp_path))
    saving.subscribe(
        AfterBatch,
        lambda event: saving.stop(graceful=True),
        where=lambda event: (event.epoch, event.iter) == (1, 1),
    )
    saving.run(3, valid=False)
    resumed = learner(CheckpointCB(tmp_path))
    resumed.run(3, valid=False, resume="last")
    assert torch.equal(weights(resumed.model), weights(whole.model))

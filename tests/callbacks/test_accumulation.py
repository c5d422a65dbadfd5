"""GradientAccumulationCB: one step for several batches, which metrics still see one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from eventrain.callbacks import GradientAccumulationCB, MetricsCB, SingleBatchCB
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBackward,
    AfterBatch,
    AfterLoss,
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

"""`max_steps`, `epoch_length` and `valid_length`: which batches are read, and which steps taken."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    CheckpointCB,
    GradientAccumulationCB,
    MetricsCB,
    MixedTrainingCB,
    SchedulerCB,
)
from eventrain.engine import DataLoaders, FitResult, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    CancelBatchException,
    CancelEpochException,
    CancelStepException,
    CleanupEpoch,
    CleanupFit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, IterableDataset

from tests.support.training import line_model, weights


def batches(n: int, first: int = 0) -> list[Any]:
    """Batches of two samples that can be told apart by their first value."""
    numbers = torch.arange(first, first + n, dtype=torch.float32)
    return [(torch.tensor([[i, 1.0, 2.0], [i, 3.0, 1.0]]) / 10, i.repeat(2, 1)) for i in numbers]


class Seen:
    """The number of each batch, per epoch and phase, and what the epochs were."""

    def __init__(self, learner: TrainLearner) -> None:
        self.batches: list[tuple[int, bool, int]] = []
        self.ended: list[tuple[int, bool, str, bool]] = []
        learner.subscribe(BeforeBatch, self._batch)
        learner.subscribe(CleanupEpoch, self._epoch)

    def _batch(self, event: BeforeBatch) -> None:
        number = int(event.learner.batch[1][0])
        self.batches.append((event.epoch, event.training, number))

    def _epoch(self, event: CleanupEpoch) -> None:
        self.ended.append((event.epoch, event.training, event.end.status, event.all_read))

    def epochs(self, training: bool = True) -> list[list[int]]:
        """The numbers of the batches of each epoch."""
        found = [(epoch, number) for epoch, phase, number in self.batches if phase == training]
        groups = itertools.groupby(found, lambda pair: pair[0])
        return [[number for _, number in group] for _, group in groups]


def make_learner(train: Any, valid: Any = None, cbs: Any = (), **kwargs: Any) -> TrainLearner:
    return TrainLearner(line_model(), DataLoaders(train, valid), lr=0.01, cbs=cbs, **kwargs)


def fit(
    train: Any, valid: Any = None, cbs: Any = (), *args: Any, **kwargs: Any
) -> tuple[Seen, FitResult, TrainLearner]:
    learner = make_learner(train, valid, cbs)
    seen = Seen(learner)
    result = learner.run(*args, valid=valid is not None, **kwargs)
    return seen, result, learner


# ----------------------------------------------------------------------------------- epoch_length


def test_an_epoch_continues_where_the_last_one_left_the_loader() -> None:
    seen, result, _ = fit(batches(5), None, (), 3, epoch_length=2)
    assert seen.epochs() == [[0, 1], [2, 3], [4, 0]]
    assert (result.status, result.epochs, result.batches, result.steps) == ("completed", 3, 6, 6)


def test_an_epoch_may_be_several_passes() -> None:
    seen, result, _ = fit(batches(2), None, (), 2, epoch_length=5)
    assert seen.epochs() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    assert result.batches == 10


def test_all_events_of_an_epoch_of_some_batches_are_those_of_a_whole_one() -> None:
    seen, result, learner = fit(batches(5), batches(2, 90), MetricsCB(), 2, epoch_length=3)
    assert seen.ended == [
        (0, True, "completed", True),
        (0, False, "completed", True),
        (1, True, "completed", True),
        (1, False, "completed", True),
    ]
    assert [row["train"] for row in result.history] == ["train", "eval"] * 2
    assert not any("status" in row for row in result.history)
    assert learner.n_iter == 2


def test_validation_between_two_epochs_does_not_disturb_the_pass() -> None:
    seen, _, _ = fit(batches(4), batches(2, 90), (), 2, epoch_length=3)
    assert seen.epochs() == [[0, 1, 2], [3, 0, 1]]
    assert seen.epochs(training=False) == [[90, 91], [90, 91]]


def test_an_endless_stream_has_epochs() -> None:
    def endless() -> Iterator[Any]:
        return (batches(1, i)[0] for i in itertools.count())

    seen, result, learner = fit(endless(), None, (), 3, epoch_length=2)
    assert seen.epochs() == [[0, 1], [2, 3], [4, 5]]
    assert (result.status, learner.n_iter) == ("completed", 2)


def test_no_batch_is_read_that_is_not_used() -> None:
    read: list[int] = []

    def stream() -> Iterator[Any]:
        for i in itertools.count():
            read.append(i)
            yield batches(1, i)[0]

    fit(stream(), None, (), 2, epoch_length=3)
    assert read == [0, 1, 2, 3, 4, 5]


class _Counted(IterableDataset[Any]):
    """Counts how often it is begun."""

    def __init__(self) -> None:
        self.begun = 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        return iter([(x[0], y[0]) for x, y in batches(6)])


def test_a_pass_over_several_epochs_is_begun_once() -> None:
    data = _Counted()
    seen, _, _ = fit(DataLoader(data, batch_size=2), None, (), 3, epoch_length=1)
    assert (data.begun, seen.epochs()) == (1, [[0], [2], [4]])


def test_a_cancelled_epoch_leaves_the_rest_of_the_pass_to_the_next() -> None:
    learner = make_learner(batches(6))
    seen = Seen(learner)

    @learner.on(AfterBatch)
    def cut(event: AfterBatch) -> None:
        if (event.epoch, event.iter) == (0, 0):
            raise CancelEpochException("enough")

    learner.run(2, valid=False, epoch_length=2)
    assert seen.epochs() == [[0], [1, 2]]


def test_a_loader_that_is_replaced_begins_a_pass() -> None:
    learner = make_learner(batches(6))
    seen = Seen(learner)

    @learner.on(CleanupEpoch)
    def grow(event: CleanupEpoch) -> None:
        event.learner.dls.train = batches(3, 50)

    learner.run(2, valid=False, epoch_length=2)
    assert seen.epochs() == [[0, 1], [50, 51]]


def test_the_loader_is_released_when_the_fit_ends() -> None:
    ended: list[str] = []

    def stream() -> Iterator[Any]:
        try:
            yield from batches(10)
        finally:
            ended.append("closed")

    class Stream:
        def __iter__(self) -> Iterator[Any]:
            return stream()

    fit(Stream(), None, (), 2, epoch_length=2)
    assert ended == ["closed"]


def test_an_iterator_that_ends_too_early_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match="it is an iterator, which can be read only once, and it"):
        fit(iter(batches(3)), None, (), 2, epoch_length=2)


# ----------------------------------------------------------------------------------- valid_length


def test_validation_is_bounded_and_begins_anew_each_time() -> None:
    seen, result, _ = fit(batches(2), batches(5, 90), MetricsCB(), 2, valid_length=3)
    assert seen.epochs(training=False) == [[90, 91, 92]] * 2
    assert (result.valid_batches, len(result.history)) == (6, 4)


def test_validation_that_is_shorter_than_its_bound_reads_no_sample_twice() -> None:
    seen, result, _ = fit(batches(2), batches(2, 90), (), valid_length=5)
    assert (seen.epochs(training=False), result.status) == ([[90, 91]], "completed")


def test_validation_on_an_endless_stream() -> None:
    seen, _, _ = fit(batches(2), itertools.cycle(batches(2, 90)), (), valid_length=3)
    assert seen.epochs(training=False) == [[90, 91, 90]]


# -------------------------------------------------------------------------------------- max_steps


def test_the_fit_ends_after_its_steps_as_a_completed_one() -> None:
    learner = make_learner(batches(4), batches(1, 90), MetricsCB())
    ends: list[str] = []
    learner.on(AfterEpoch)(lambda event: ends.append(f"{event.epoch} {event.phase}"))
    learner.on(CleanupFit)(lambda event: ends.append(event.end.status))
    seen = Seen(learner)
    result = learner.run(max_steps=6)
    assert seen.epochs() == [[0, 1, 2, 3], [0, 1]]
    assert ends == ["0 train", "0 valid", "1 train", "1 valid", "completed"]
    assert (result.status, result.steps, result.batches, result.epochs) == ("completed", 6, 6, 2)
    assert (result.n_epochs, len(result.history)) == (None, 4)
    assert seen.ended[-2:] == [(1, True, "completed", True), (1, False, "completed", True)]


def test_the_steps_end_an_endless_stream() -> None:
    seen, result, _ = fit(itertools.cycle(batches(3)), max_steps=5)
    assert seen.epochs() == [[0, 1, 2, 0, 1]]
    assert (result.status, result.epochs) == ("completed", 1)


def test_whichever_comes_first_ends_the_fit() -> None:
    _, by_epochs, _ = fit(batches(3), None, (), 2, max_steps=100)
    _, by_steps, _ = fit(batches(3), None, (), 2, max_steps=4)
    assert (by_epochs.steps, by_epochs.status) == (6, "completed")
    assert (by_steps.steps, by_steps.status) == (4, "completed")


def test_no_batch_is_read_after_the_last_step() -> None:
    read: list[int] = []

    def stream() -> Iterator[Any]:
        for i in itertools.count():
            read.append(i)
            yield batches(1, i)[0]

    fit(stream(), max_steps=3)
    assert read == [0, 1, 2]


@pytest.mark.parametrize(
    ("max_steps", "expected"),
    [(1, [[0, 1]]), (2, [[0, 1, 2, 3]]), (3, [[0, 1, 2, 3, 4]]), (4, [[0, 1, 2, 3, 4], [0, 1]])],
)
@pytest.mark.parametrize("length", ["known", "unknown"])
def test_accumulated_steps_are_counted_and_the_tail_is_one(
    max_steps: int, expected: list[list[int]], length: str
) -> None:
    class Unknown:
        def __iter__(self) -> Iterator[Any]:
            return iter(batches(5))

    train = batches(5) if length == "known" else Unknown()
    seen, result, _ = fit(train, None, GradientAccumulationCB(2), max_steps=max_steps)
    assert (seen.epochs(), result.steps, result.status) == (expected, max_steps, "completed")


def test_skipped_steps_do_not_count() -> None:
    """With a scale of 2^127, float16 overflows in the first steps."""
    scaled = MixedTrainingCB("fp16", init_scale=2.0**127)
    _, result, _ = fit(batches(3), None, scaled, max_steps=4)
    assert scaled.skipped_steps > 0
    assert result.steps == 4
    assert result.batches == 4 + scaled.skipped_steps


def test_cancels_on_the_way_do_not_count() -> None:
    learner = make_learner(batches(4))

    @learner.on(BeforeBatch)
    def cancel_batch(event: BeforeBatch) -> None:
        if event.iter == 1:
            raise CancelBatchException("bad data")

    @learner.on(BeforeStep)
    def cancel_step(event: BeforeStep) -> None:
        if event.iter == 2:
            raise CancelStepException("not this one")

    result = learner.run(valid=False, max_steps=5)
    assert (result.steps, result.epochs, result.status) == (5, 3, "completed")


def test_steps_that_never_come_are_an_error_and_not_a_hang() -> None:
    learner = make_learner(batches(1))

    @learner.on(BeforeStep)
    def skip(event: BeforeStep) -> None:
        raise CancelStepException("never")

    with pytest.raises(RuntimeError, match=r"max_steps=2 is never reached: .* in 100 epochs"):
        learner.run(valid=False, max_steps=2)


def test_a_checkpoint_is_saved_when_the_steps_are_done(tmp_path: Any) -> None:
    saver = CheckpointCB(tmp_path, every_epochs=10)
    fit(batches(4), None, saver, max_steps=6)
    assert saver.last is not None


def test_a_fit_whose_steps_are_done_has_nothing_to_resume(tmp_path: Any) -> None:
    fit(batches(4), batches(1, 90), CheckpointCB(tmp_path), max_steps=6)
    seen, result, _ = fit(
        batches(4), batches(1, 90), CheckpointCB(tmp_path), max_steps=6, resume="last"
    )
    assert (seen.batches, result.steps, result.status) == ([], 6, "completed")


def test_a_checkpoint_beyond_the_steps_is_refused(tmp_path: Any) -> None:
    fit(batches(4), None, CheckpointCB(tmp_path), max_steps=6)
    with pytest.raises(ValueError, match="saved after 6 steps, but this fit has max_steps=5"):
        fit(batches(4), None, CheckpointCB(tmp_path), max_steps=5, resume="last")


@pytest.mark.parametrize("n", [1, 2, 3])
def test_checkpoints_are_saved_by_steps(tmp_path: Any, n: int) -> None:
    saved: list[int] = []

    class Saver(CheckpointCB):
        def _save(self, learner: Any, *args: Any) -> None:
            saved.append(learner.done.steps)
            super()._save(learner, *args)

    accumulation = GradientAccumulationCB(2)
    fit(batches(12), None, [accumulation, Saver(tmp_path, every_steps=n)])
    assert saved == [*range(n, 7, n), 6]  # also at the end of the last epoch


# ------------------------------------------------------------------------------------ by reference


def by_hand(
    n_batches: int, n_epochs: int | None, max_steps: int | None, length: int | None, group: int
) -> tuple[list[list[int]], int, torch.Tensor]:
    """The same training in plain PyTorch: the batches of each epoch, steps and weights."""
    model, data = line_model(), batches(n_batches)
    opt = torch.optim.SGD(model.parameters(), 0.01)
    stream = itertools.cycle(range(n_batches))
    epochs: list[list[int]] = []
    steps = 0
    for epoch in itertools.count():
        if epoch == n_epochs or steps == max_steps:
            return epochs, steps, weights(model)
        numbers = [next(stream) for _ in range(length)] if length else list(range(n_batches))
        used: list[int] = []
        for first in range(0, len(numbers), group):
            if steps == max_steps:
                break
            for i in (members := numbers[first : first + group]):
                used.append(i)
                x, y = data[i]
                (nn.functional.mse_loss(model(x), y) / len(members)).backward()
            opt.step()
            opt.zero_grad()
            steps += 1
        epochs.append(used)
    raise AssertionError


@given(
    n_batches=st.integers(1, 6),
    n_epochs=st.one_of(st.none(), st.integers(1, 4)),
    max_steps=st.one_of(st.none(), st.integers(1, 12)),
    length=st.one_of(st.none(), st.integers(1, 9)),
    group=st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_batches_steps_and_weights_are_those_of_a_loop_by_hand(
    n_batches: int, n_epochs: int | None, max_steps: int | None, length: int | None, group: int
) -> None:
    if n_epochs is None and max_steps is None:
        n_epochs = 1
    epochs, steps, expected = by_hand(n_batches, n_epochs, max_steps, length, group)
    seen, result, learner = fit(
        batches(n_batches),
        None,
        [MetricsCB(), GradientAccumulationCB(group)],
        n_epochs,
        max_steps=max_steps,
        epoch_length=length,
    )
    assert seen.epochs() == epochs
    assert (result.steps, result.epochs, result.status) == (steps, len(epochs), "completed")
    assert [row["epoch"] for row in result.history] == list(range(len(epochs)))
    assert torch.equal(weights(learner.model), expected)


# ---------------------------------------------------------------------------------------- n_steps


def n_steps_of(train: Any, cbs: Any = (), *args: Any, **kwargs: Any) -> int | None:
    learner = make_learner(train, None, cbs)
    told: list[int | None] = []
    learner.on(BeforeFit)(lambda event: told.append(event.n_steps))
    learner.run(*args, valid=False, **kwargs)
    assert told == [learner.n_steps]
    return learner.n_steps


def test_the_number_of_steps_is_known_before_the_first() -> None:
    assert n_steps_of(batches(5), (), 2) == 10
    assert n_steps_of(batches(5), GradientAccumulationCB(2), 2) == 6
    assert n_steps_of(batches(5), (), 2, epoch_length=3) == 6
    assert n_steps_of(batches(5), (), 2, max_steps=7) == 7
    assert n_steps_of(batches(5), (), max_steps=12) == 12
    assert n_steps_of(itertools.cycle(batches(5)), (), max_steps=3) == 3
    assert n_steps_of((b for b in batches(5)), (), 1) is None


def test_a_scheduler_is_sized_by_the_steps_of_the_fit() -> None:
    rates: list[Any] = []
    schedule = SchedulerCB(lambda opt, n_steps: OneCycleLR(opt, 0.1, total_steps=n_steps))
    learner = make_learner(batches(5), None, [schedule, GradientAccumulationCB(2)])
    learner.on(BeforeStep, order=1000)(lambda event: rates.append(event.lr))
    learner.run(2, valid=False)

    opt = torch.optim.SGD(line_model().parameters(), 0.01)
    by_torch = OneCycleLR(opt, 0.1, total_steps=6)
    expected = []
    for _ in range(6):
        expected.append(opt.param_groups[0]["lr"])
        opt.step()
        by_torch.step()
    assert rates == expected


def test_a_scheduler_that_needs_steps_that_are_not_known_is_an_error_before_the_first() -> None:
    schedule = SchedulerCB(lambda opt, n_steps: OneCycleLR(opt, 0.1, total_steps=n_steps))
    with pytest.raises(ValueError, match=r"wants n_steps, .* give fit\(max_steps="):
        fit(iter(batches(5)), None, schedule)


# ----------------------------------------------------------------------------------- first errors


@pytest.mark.parametrize("name", ["max_steps", "epoch_length", "valid_length"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", math.inf], ids=repr)
def test_what_is_not_a_number_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}: give a number of .*1 or more"):
        fit(batches(2), batches(2), **{name: value})


@pytest.mark.parametrize(
    ("name", "phase"),
    [("max_steps", "train"), ("epoch_length", "train"), ("valid_length", "valid")],
)
def test_what_would_have_no_effect_is_refused(name: str, phase: str) -> None:
    learner = make_learner(batches(2), batches(2))
    with pytest.raises(ValueError, match=f"{name}=3 has no effect with {phase}=False"):
        learner.run(**{name: 3, phase: False})


@pytest.mark.parametrize("endless", [itertools.cycle, lambda data: itertools.repeat(data[0])])
def test_an_endless_loader_without_a_length_is_refused(endless: Any) -> None:
    with pytest.raises(ValueError, match=r"dls\.train is endless: .* epoch_length=.*max_steps="):
        fit(endless(batches(2)))
    with pytest.raises(ValueError, match=r"dls\.valid is endless: .* Give valid_length="):
        fit(batches(2), endless(batches(2)))


def test_an_iterator_that_would_be_read_twice_is_refused_before_the_first_batch() -> None:
    learner = make_learner(iter(batches(2)))
    seen = Seen(learner)
    with pytest.raises(ValueError, match=r"can be read only once, and 2 epochs .* epoch_length="):
        learner.run(2, valid=False)
    assert seen.batches == []


def test_an_epoch_that_is_cancelled_as_it_begins_is_none_of_the_steps() -> None:
    learner = make_learner(batches(2))

    @learner.on(BeforeEpoch)
    def skip(event: BeforeEpoch) -> None:
        if event.epoch == 0:
            raise CancelEpochException("not yet")

    result = learner.run(valid=False, max_steps=3)
    assert (result.steps, result.epochs, learner.epoch) == (3, 2, 2)

"""ValidateCB: numbers of other sets and models, and a training that does not notice."""

from __future__ import annotations

import copy
import random
import shutil
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import numpy
import pytest
import torch
from eventrain.callbacks import (
    CheckpointCB,
    DeviceCB,
    EarlyStoppingCB,
    GradientAccumulationCB,
    MetricsCB,
    MixedTrainingCB,
    StructlogCB,
    TensorBoardCB,
    ValidateCB,
)
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterStep,
    AfterValidation,
    BeforeBatch,
    BeforeEpoch,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from tests.support.resuming import (
    KINDS,
    TRAIN,
    VALIDATION,
    X,
    Y,
    assert_same,
    in_pieces,
    make_dls,
    make_learner,
    outcome,
    restless_model,
    undisturbed,
)
from tests.support.training import weights
from tests.support.waiting import GUARD

CLEAN = TensorDataset(X[30:80], Y[30:80])


def clean(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(CLEAN, 16, **kwargs)


def by_hand(model: nn.Module, data: TensorDataset = CLEAN) -> dict[str, float]:
    """The loss and the accuracy of all samples at once."""
    model = copy.deepcopy(model).eval()
    x, y = data.tensors
    with torch.no_grad():
        preds = model(x)
    accuracy = (preds.argmax(1) == y).float().mean().item()
    return {"loss": F.cross_entropy(preds, y).item(), "accuracy": accuracy}


def validations(learner: TrainLearner) -> list[AfterValidation]:
    found: list[AfterValidation] = []
    learner.subscribe(AfterValidation, found.append)
    return found


# ------------------------------------------------------------------------------------ the numbers


def test_it_measures_every_n_steps_as_by_hand() -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=3, name="clean"), model=restless_model)
    learner.cbs[0].metrics["accuracy"] = MulticlassAccuracy()  # type: ignore[attr-defined]
    expected: list[dict[str, float]] = []

    @learner.on(AfterStep, every=3)
    def measure(event: AfterStep) -> None:
        expected.append(by_hand(event.learner.model))

    found = validations(learner)
    learner.run(2)
    assert [event.steps for event in found] == [3, 6, 9]
    assert [event.epoch for event in found] == [0, 1, 1]
    for event, right in zip(found, expected, strict=True):
        assert dict(event.metrics) == pytest.approx(right)
        assert (event.name, event.n_samples, event.training) == ("clean", 50, True)


def test_the_last_numbers_of_an_epoch_are_in_both_of_its_rows() -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=2, name="clean"))
    found = validations(learner)
    history = learner.run(1).history
    assert [row["clean.loss"] for row in history] == [found[-1].metrics["loss"]] * 2
    assert learner.metrics.history == list(history)


def test_at_the_end_of_an_epoch_its_numbers_are_in_the_last_row() -> None:
    learner = make_learner(ValidateCB(clean(), every_epochs=2, name="clean"))
    history = learner.run(3).history
    assert ["clean.loss" in row for row in history] == [False, False, False, True, False, False]
    without = make_learner(ValidateCB(clean()))
    assert "extra.loss" in without.run(1, valid=False).history[0]


def test_several_sets_have_numbers_of_their_own() -> None:
    other = TensorDataset(X[:20], Y[:20])
    cbs = [ValidateCB(clean(), name="clean"), ValidateCB(DataLoader(other, 7), name="other")]
    learner = make_learner(*cbs)
    row = learner.run(1).history[-1]
    assert row["clean.loss"] == pytest.approx(by_hand(learner.model)["loss"])
    assert row["other.loss"] == pytest.approx(by_hand(learner.model, other)["loss"])
    assert row["loss"] == pytest.approx(by_hand(learner.model, VALIDATION)["loss"])


class Average(Callback):
    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model)

    def after_step(self, event: AfterStep) -> None:
        mine, new = self.model.parameters(), event.learner.model.parameters()
        torch._foreach_lerp_([p.data for p in mine], [p.data for p in new], 0.5)


def test_another_model_is_validated_and_left_in_its_mode() -> None:
    learner = make_learner(model=restless_model)
    average, teacher = Average(learner.model), restless_model().eval()
    by_name = ValidateCB(clean(), every_steps=5, name="average", model=average.model)
    by_function = ValidateCB(clean(), name="teacher", model=lambda learner: teacher)
    learner.add_cbs([average, by_name, by_function])
    row = learner.run(1).history[-1]
    assert row["average.loss"] == pytest.approx(by_hand(average.model)["loss"])
    assert row["teacher.loss"] == pytest.approx(by_hand(teacher)["loss"])
    assert average.model.training
    assert not teacher.training


def test_metrics_of_its_own_take_the_place_of_the_learners() -> None:
    accuracy = {"right": MulticlassAccuracy()}
    learner = make_learner(ValidateCB(clean(), name="clean", metrics=accuracy))
    row = learner.run(1).history[-1]
    assert row["clean.right"] == pytest.approx(by_hand(learner.model)["accuracy"])
    assert learner.metrics is learner.cbs[0]


def test_metrics_that_are_shared_are_measured_apart() -> None:
    """A MetricsCB, or a metric in two of them: as the learner's and as that of the validation."""

    def history(own: MetricsCB, metrics: Any) -> tuple[dict[str, Any], ...]:
        torch.manual_seed(0)
        learner = make_learner(ValidateCB(clean(), every_steps=2, name="clean", metrics=metrics))
        learner.remove_cbs(learner.cbs[0])
        learner.add_cbs(own)
        return learner.run(1).history

    def accuracy() -> MetricsCB:
        return MetricsCB(accuracy=MulticlassAccuracy())

    apart = history(accuracy(), accuracy())
    both = accuracy()
    assert history(both, both) == apart
    assert history(both, both.metrics) == apart


def test_a_metric_of_the_learner_or_the_model_looks_at_these_themselves() -> None:
    """Copies of them would have the weights of before the fit."""

    class Norm:
        def __init__(self, owner: Any) -> None:
            self.owner = owner

        def __call__(self, *args: Any) -> float:
            return float(weights(getattr(self.owner, "model", self.owner)).norm())

        update = reset = lambda self, *args: None
        compute = __call__

    learner = make_learner(ValidateCB(clean(), name="clean"))
    of_model, of_learner = Norm(learner.model), Norm(learner)
    learner.add_cbs(MetricsCB(a=of_model, b=lambda _: of_learner(), c=partial(of_learner)))
    row = learner.run(1).history[-1]
    norm = of_model()
    assert [row["clean.a"], row["clean.b"], row["clean.c"]] == pytest.approx([norm] * 3)


def test_length_bounds_what_it_reads() -> None:
    learner = make_learner(ValidateCB(clean(), name="clean", length=2))
    found = validations(learner)
    learner.run(1)
    assert found[0].n_samples == 32


def test_receivers_prepare_its_batches_too() -> None:
    """A batch that a receiver changes is changed here as well: the numbers would be wrong."""
    learner = make_learner(ValidateCB(clean(), name="clean"))

    @learner.on(BeforeBatch)
    def shift(event: BeforeBatch) -> None:
        x, y = event.learner.batch
        event.learner.batch = x + 1, y

    row = learner.run(1).history[-1]
    shifted = TensorDataset(X[30:80] + 1, Y[30:80])
    assert row["clean.loss"] == pytest.approx(by_hand(learner.model, shifted)["loss"])


# ------------------------------------------------------------------- the training does not notice


class Restless(DataLoader[Any]):
    """A loader that draws from every source of random numbers."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        random.random()
        numpy.random.rand()
        yield from super().__iter__()


def extra(**every: int) -> ValidateCB:
    loader = Restless(CLEAN, 16, shuffle=True)
    return ValidateCB(loader, name="clean", metrics=MetricsCB(), **every)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_is_the_same_to_the_bit(kind: str) -> None:
    def watched() -> TrainLearner:
        learner = KINDS[kind]()
        learner.add_cbs([extra(every_steps=2)])
        return learner

    without, with_it = undisturbed(KINDS[kind]), undisturbed(watched)
    rows = without.pop("history of the result"), with_it.pop("history of the result")
    for ours, theirs in zip(*rows, strict=True):
        assert {k: v for k, v in theirs.items() if not k.startswith("clean.")} == ours
    for run in without, with_it:
        del run["history"], run["attributes"], run["callbacks"]["MetricsCB"]
    assert_same(without, with_it)


class Noisy(TrainLearner):
    """Draws from generators of its own, in training and in validation."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise = torch.Generator().manual_seed(0)
        self.numpy_noise = numpy.random.default_rng(0)

    def predict(self) -> None:
        x = self.batch[0] + 0.1 * torch.randn(self.batch[0].shape, generator=self.noise)
        self.preds = self.model(x + float(self.numpy_noise.standard_normal()))


def test_generators_of_the_learner_go_on_as_without_it() -> None:
    without = make_learner(cls=Noisy)
    torch.manual_seed(1)
    with_it = make_learner(ValidateCB(clean(), every_steps=2), cls=Noisy)
    with_it.model.load_state_dict(without.model.state_dict())
    for learner in without, with_it:
        torch.manual_seed(2)
        learner.run(2)
    assert torch.equal(weights(without.model), weights(with_it.model))


def test_a_hidden_state_goes_on_as_without_it() -> None:
    """It is passed from batch to batch, and begun anew by every epoch, that of `ValidateCB` too."""

    class Recurrent(nn.LSTM):
        def forward(self, x: torch.Tensor, hidden: Any) -> Any:
            y, hidden = super().forward(x, hidden)
            return y, tuple(part.detach() for part in hidden)

    class Truncated(TrainLearner):
        def predict(self) -> None:
            self.preds, self.hidden = self.model(self.batch[0], self.hidden)

    def trained(validated: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = Recurrent(2, 2)
        batches = [(torch.randn(3, 4, 2), torch.randn(3, 4, 2)) for _ in range(6)]
        learner = Truncated(model, DataLoaders(batches))
        if validated:
            learner.add_cbs(ValidateCB(batches[:2], every_steps=2))

        @learner.on(BeforeEpoch)
        def begin(event: BeforeEpoch) -> None:
            learner.hidden = None

        learner.run(2, valid=False)
        return weights(model)

    assert torch.equal(trained(True), trained(False))


def test_the_batch_and_the_modes_around_it_are_restored() -> None:
    learner = make_learner(model=restless_model)
    frozen = learner.model[1]
    before: list[Any] = []

    @learner.on(AfterBatch)
    def note(event: AfterBatch) -> None:
        if event.purpose == "fit" and event.training:
            frozen.eval()
            before.append((learner.batch, learner.preds, learner.loss, learner.iter, learner.dl))

    @learner.on(AfterBatch, order=101)
    def compare(event: AfterBatch) -> None:
        if event.purpose == "fit" and event.training:
            now = learner.batch, learner.preds, learner.loss, learner.iter, learner.dl
            assert all(a is b for a, b in zip(now, before[-1], strict=True))
            assert learner.model.training
            assert not frozen.training
            assert torch.is_grad_enabled()
            assert (learner.purpose, learner.in_extra_validation, learner.training) == (
                "fit",
                False,
                True,
            )

    learner.add_cbs(ValidateCB(clean(), every_steps=1))
    assert learner.run(1).status == "completed"
    assert len(before) == TRAIN


def test_its_events_have_their_purpose_and_are_complete() -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=TRAIN))
    with record_events(learner) as events:
        learner.run(1, valid=False)
    within = [type(event).__name__ for event in events if event.purpose == "validate"]
    batch = ["BeforeBatch", "AfterPredict", "AfterLoss", "AfterBatch", "CleanupBatch"]
    assert within == ["BeforeEpoch", *batch * 4, "AfterEpoch", "CleanupEpoch"]
    outside = [type(event).__name__ for event in events if event.purpose == "fit"]
    assert outside.count("AfterValidation") == 1
    assert outside.count("CleanupEpoch") == 1


def test_observers_see_the_result_alone() -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=TRAIN))
    seen: list[Any] = []
    learner.observe(seen.append)
    learner.run(1, valid=False)
    assert {event.purpose for event in seen} == {"fit"}
    assert [type(event) for event in seen].count(AfterValidation) == 1


@settings(max_examples=25)
@given(
    every=st.integers(1, 7),
    n=st.integers(1, 4),
    steps=st.integers(1, 12),
    cancelled=st.sets(st.integers(0, 11), max_size=4),
)
def test_it_is_due_whenever_n_more_steps_are_taken(
    every: int, n: int, steps: int, cancelled: set[int]
) -> None:
    """Whatever is accumulated, and whichever batches are cancelled after their step."""
    cbs = [ValidateCB(clean(), every_steps=every), GradientAccumulationCB(n)]
    learner = make_learner(*cbs, dls=make_dls(DataLoader(CLEAN, 16)))
    batches = iter(range(1000))

    @learner.on(AfterBatch, where=lambda event: event.purpose == "fit")
    def cancel(event: AfterBatch) -> None:
        if next(batches) in cancelled:
            raise CancelBatchException

    found = validations(learner)
    taken = learner.run(max_steps=steps, valid=False).steps
    assert taken == steps
    # One that is due after a batch that was cancelled is run before the next batch.
    due = [k * every for k in range(1, steps // every + 1)]
    measured = [event.steps // every for event in found]
    assert measured == sorted(set(measured))
    assert all(event.steps >= k * every for k, event in zip(measured, found, strict=True))
    if not cancelled:
        assert [event.steps for event in found] == due


# ------------------------------------------------------------------------------ cancel and resume


@pytest.mark.parametrize("kind", ["sgd", "dropout-batchnorm", "accumulation", "all-at-once"])
@pytest.mark.parametrize("every", [{"every_steps": 2}, {"every_epochs": 1}], ids=str)
def test_a_fit_that_is_interrupted_in_it_is_the_same_when_resumed(
    kind: str, every: dict[str, int]
) -> None:
    def watched() -> TrainLearner:
        learner = KINDS[kind]()
        learner.add_cbs(ValidateCB(clean(shuffle=True), name="clean", **every))
        return learner

    whole = undisturbed(watched)
    for at in range(2, 20, 3):  # batches of the fit and of its validations
        for how in "graceful", "error":
            each = {"every_batches": 1} if how == "error" else None
            assert_same(whole, in_pieces(watched, [(at, how), (at, how)], each=each))


def test_a_graceful_stop_cuts_it_short_and_saves(tmp_path: Path) -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=2), CheckpointCB(tmp_path))
    found = validations(learner)

    @learner.on(BeforeBatch, where=lambda event: event.purpose == "validate", once=False)
    def stop(event: BeforeBatch) -> None:
        learner.stop(graceful=True)

    with record_events(learner) as events:
        result = learner.run(1)
    assert (result.status, result.steps, found) == ("cancelled", 2, [])
    within = [type(event).__name__ for event in events if event.purpose == "validate"]
    assert within.count("AfterBatch") == 1
    ends = [e.end.status for e in events if isinstance(e, CleanupEpoch)]
    assert ends == ["cancelled", "cancelled"]
    resumed = make_learner(ValidateCB(clean(), every_steps=2), CheckpointCB(tmp_path))
    found = validations(resumed)
    resumed.run(1, resume="last")
    assert [event.steps for event in found] == [2, 4]


def test_a_receiver_that_cancels_it_leaves_no_numbers() -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=2))

    @learner.on(BeforeBatch, where=lambda event: event.purpose == "validate")
    def cancel(event: BeforeBatch) -> None:
        raise CancelEpochException

    result = learner.run(1, valid=False)
    assert (result.status, result.steps) == ("completed", TRAIN)
    assert set(result.history[0]) == {"epoch", "train", "loss"}


def test_a_cancelled_fit_ends_within_it_and_the_next_one_is_whole() -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=2))
    subscription = learner.subscribe(BeforeBatch, _cancel_the_fit)
    result = learner.run(1)
    assert (result.status, result.steps, result.reason) == ("cancelled", 2, "enough")
    assert (learner.purpose, learner.in_extra_validation) == ("fit", False)
    subscription.close()
    assert learner.run(1).status == "completed"


def _cancel_the_fit(event: BeforeBatch) -> None:
    if event.purpose == "validate":
        raise CancelFitException("enough")


def test_an_error_in_it_names_it() -> None:
    wrong = [(torch.zeros(4, 3), torch.zeros(4))]
    learner = make_learner(ValidateCB(wrong, every_steps=2, name="wrong"))
    with pytest.raises(RuntimeError, match="shapes") as raised:
        learner.run(1)
    assert "raised in the validation 'wrong' of a ValidateCB" in raised.value.__notes__


# ----------------------------------------------------------------- what follows from its numbers


def test_early_stopping_and_the_best_checkpoint_go_by_its_numbers(tmp_path: Path) -> None:
    checkpoints = CheckpointCB(tmp_path, keep_best=("clean.loss", "min"))
    learner = make_learner(
        ValidateCB(clean(), name="clean"),
        EarlyStoppingCB("clean.loss", patience=2, min_delta=1e6),
        checkpoints,
    )
    result = learner.run(9)
    assert result.epochs == 3
    losses = [row["clean.loss"] for row in result.history if "clean.loss" in row]
    assert checkpoints.best is not None
    assert f"{losses.index(min(losses)) + 1}" in checkpoints.best.name


def test_an_epoch_without_a_validation_of_that_name_does_not_count() -> None:
    stopping = EarlyStoppingCB("clean.loss", patience=2, min_delta=1e6)
    learner = make_learner(ValidateCB(clean(), every_epochs=2, name="clean"), stopping)
    assert learner.run(20).epochs == 6
    with pytest.raises(ValueError, match=r"monitor='clear\.loss'.*clean\.loss"):
        make_learner(ValidateCB(clean(), name="clean"), EarlyStoppingCB("clear.loss")).run(1)


def test_it_is_logged_by_steps_and_drawn_by_batches(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    learner = make_learner(ValidateCB(clean(), every_steps=2, name="clean"))
    with capture_logs() as logs:
        result = learner.run(1, cbs=[StructlogCB(), TensorBoardCB(tmp_path)])
    lines = [line for line in logs if line["event"] == "validation"]
    assert [(line["name"], line["steps"], line["samples"]) for line in lines] == [
        ("clean", 2, 50),
        ("clean", 4, 50),
    ]
    accumulator = EventAccumulator(str(tmp_path / result.run_id)).Reload()
    points = [(point.step, point.value) for point in accumulator.Scalars("clean/loss")]
    losses = [pytest.approx(line["metrics"]["loss"]) for line in lines]
    assert points == list(zip([1, 3], losses, strict=True))


@pytest.mark.parametrize("n", [1, 2])
def test_the_points_of_a_run_that_is_resumed_are_those_of_one_that_was_not(
    n: int, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def points(folder: Path) -> list[int]:
        accumulator = EventAccumulator(str(folder / "run")).Reload()
        return [point.step for point in accumulator.Scalars("clean/loss")]

    def run(folder: Path, stop_at: int | None = None) -> None:
        extra = ValidateCB(clean(), every_steps=1, name="clean")
        cbs = [extra, GradientAccumulationCB(n), CheckpointCB(tmp_path / "saved", every_batches=3)]
        learner = make_learner(*cbs)

        @learner.on(BeforeBatch, where=lambda event: event.purpose == "fit" and event.training)
        def fall(event: BeforeBatch) -> None:
            if event.epoch * TRAIN + event.iter == stop_at:
                raise ZeroDivisionError

        resume = "last" if folder.name == "parts" else None
        with suppress(ZeroDivisionError):
            learner.run(2, cbs=TensorBoardCB(folder), run_id="run", resume=resume)

    run(tmp_path / "whole")
    shutil.rmtree(tmp_path / "saved")
    run(tmp_path / "parts", stop_at=8)
    run(tmp_path / "parts")
    assert points(tmp_path / "parts") == points(tmp_path / "whole")


def test_a_metric_that_cannot_be_copied_names_the_way_out() -> None:
    lock = threading.Lock()
    metrics = MetricsCB(locked=lambda learner, lock=lock: 1.0)
    metrics.lock = lock  # type: ignore[attr-defined]
    learner = TrainLearner(nn.Linear(64, 10), make_dls(), F.cross_entropy, cbs=metrics)
    learner.add_cbs(ValidateCB(clean()))
    with pytest.raises(TypeError, match="lock") as raised:
        learner.run(1)
    assert any("ValidateCB(metrics=...)" in note for note in raised.value.__notes__)


def test_it_works_with_what_prepares_batches_and_models() -> None:
    cbs = [DeviceCB(), MixedTrainingCB("bf16"), ValidateCB(clean(), every_steps=2, name="clean")]
    learner = make_learner(*cbs)
    plain = make_learner(*cbs[:2])
    plain.model.load_state_dict(learner.model.state_dict())
    torch.manual_seed(1)
    row = learner.run(1).history[-1]
    torch.manual_seed(1)
    plain.run(1)
    assert torch.equal(weights(learner.model), weights(plain.model))
    assert "clean.loss" in row


@pytest.mark.parametrize("call", ["run_validate", "run_get_preds", "run_lr_find"])
def test_it_does_nothing_outside_of_training(call: str) -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=1))
    found = validations(learner)
    getattr(learner, call)()
    assert found == []


# ------------------------------------------------------------------------------------- arguments


def test_wrong_arguments_are_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"every_steps=1, every_epochs=1\): give one of them"):
        ValidateCB(clean(), every_steps=1, every_epochs=1)
    with pytest.raises(ValueError, match="every_steps=0: give a number, 1 or more"):
        ValidateCB(clean(), every_steps=0)
    with pytest.raises(ValueError, match="length=0: give a number of batches"):
        ValidateCB(clean(), length=0)
    with pytest.raises(ValueError, match=r"name='a\.b': give a name without a dot"):
        ValidateCB(clean(), name="a.b")
    with pytest.raises(TypeError, match="model=3: give a module, or a function of the learner"):
        ValidateCB(clean(), model=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (iter([1]), "is an iterator, which can be read only once"),
        ([], "it has no batches"),
        (7, "ValidateCB(7): give a loader"),
    ],
)
def test_a_loader_that_cannot_be_read_again_is_refused_before_any_work(
    loader: Any, message: str
) -> None:
    learner = make_learner(ValidateCB(loader))
    before = weights(learner.model)
    with pytest.raises((TypeError, ValueError)) as raised:
        learner.run(2)
    assert message in str(raised.value)
    assert torch.equal(weights(learner.model), before)


def test_two_of_one_name_are_refused_before_any_work() -> None:
    learner = make_learner(ValidateCB(clean()), ValidateCB(clean()))
    with pytest.raises(ValueError, match="two ValidateCB have the name 'extra': give name="):
        learner.run(1)


def test_what_model_returns_is_checked() -> None:
    learner = make_learner(ValidateCB(clean(), model=lambda learner: None))  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match=r"model\(learner\) is None, not a module"):
        learner.run(1)


async def test_a_fit_that_is_awaited_validates_too() -> None:
    learner = make_learner(ValidateCB(clean(), every_steps=2, name="clean"))
    result = await learner.fit(1)
    assert outcome(learner, result)["counts"] == (1, TRAIN, 2, TRAIN)
    assert "clean.loss" in result.history[0]


def test_the_names_of_the_example() -> None:
    batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
    learner = TrainLearner(
        nn.Linear(3, 1), DataLoaders(batches), cbs=[ValidateCB(batches, every_steps=2)]
    )
    assert set(learner.run(1, valid=False).history[0]) == {"epoch", "train", "extra.loss"}


class Silent:
    """An async source that has one batch, and then waits for another one."""

    async def __aiter__(self) -> AsyncIterator[Any]:
        yield CLEAN[:16]
        self.waits.set()
        await anyio.sleep_forever()

    def __init__(self) -> None:
        self.waits = threading.Event()


async def test_a_graceful_stop_ends_one_that_waits_for_its_source(tmp_path: Path) -> None:
    silent = Silent()
    extra = ValidateCB(silent, every_steps=2, name="clean")
    learner = make_learner(extra, CheckpointCB(tmp_path))
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learner.fit, 1)
            await anyio.to_thread.run_sync(silent.waits.wait, GUARD)
            learner.stop(graceful=True)
    assert learner.result is not None
    assert (learner.result.status, learner.result.steps) == ("cancelled", 2)
    resumed = make_learner(ValidateCB(clean(), every_steps=2, name="clean"))
    found = validations(resumed)
    await resumed.fit(1, resume=tmp_path)
    assert [event.steps for event in found] == [2, 4]

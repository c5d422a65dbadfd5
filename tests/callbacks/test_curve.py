"""LossCurveCB: every loss of the run, on a figure that anybody may save."""

from __future__ import annotations

import io
import math
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import LossCurveCB, MetricsCB
from eventrain.callbacks.reporting import curve
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
    Event,
    Watcher,
)
from matplotlib.figure import Figure
from torch import nn

Backend = dict[str, Any]
Batches = list[tuple[torch.Tensor, torch.Tensor]]
MakeBatches = Callable[..., Batches]
Points = list[tuple[float, float]]


@pytest.fixture
def learner(dls: DataLoaders, make_model: Callable[[], nn.Module]) -> TrainLearner:
    """Of three training batches and two for validation."""
    return TrainLearner(make_model(), dls, lr=0.1)


def losses_of(learner: TrainLearner) -> list[float]:
    """Filled with the loss of every training batch of the fits to come."""
    losses: list[float] = []
    learner.on(AfterBatch, where=lambda event: event.training)(
        lambda event: losses.append(event.loss.item())
    )
    return losses


def drawn(cb: LossCurveCB) -> dict[str, Points]:
    """The points of every line on the figure."""
    assert cb.figure is not None
    (ax,) = cb.figure.axes
    return {line.get_label(): [tuple(p) for p in line.get_xydata()] for line in ax.get_lines()}


def png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=20)
    return file.getvalue()


# ------------------------------------------------------------------------------ what it shows


def test_it_shows_the_loss_of_every_batch_and_of_every_validation(
    learner: TrainLearner, backend: Backend
) -> None:
    losses, metrics, cb = losses_of(learner), MetricsCB(), LossCurveCB()
    assert cb.figure is None
    result = learner.run(2, cbs=[metrics, cb], **backend)
    assert cb.train == list(enumerate(losses, start=1))
    assert [batch for batch, _ in cb.valid] == [3, 6]
    validated = [row["loss"] for row in metrics.history if row["train"] == "eval"]
    assert [loss for _, loss in cb.valid] == pytest.approx(validated, rel=1e-12)
    assert drawn(cb) == {"train": cb.train, "valid": cb.valid}
    assert result.dropped == {}


def test_validation_losses_are_averaged_over_samples(make_batches: MakeBatches) -> None:
    valid = [*make_batches(1, size=8), *make_batches(1, size=2, seed=1)]
    metrics, cb = MetricsCB(), LossCurveCB()
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(make_batches(1), valid))
    learner.run(1, cbs=[metrics, cb])
    assert cb.valid == [(1, pytest.approx(metrics.history[1]["loss"], rel=1e-12))]


def test_a_cancelled_validation_leaves_no_point(learner: TrainLearner) -> None:
    @learner.on(AfterBatch, where=lambda event: not event.training and event.epoch == 0)
    def leave(event: AfterBatch) -> None:
        raise CancelEpochException

    metrics, cb = MetricsCB(), LossCurveCB()
    learner.run(2, cbs=[metrics, cb])
    # Nothing of the validation that was left is in the next one's loss.
    assert cb.valid == [(6, pytest.approx(metrics.history[-1]["loss"], rel=1e-12))]


def test_the_lines_can_be_told_apart_without_colors(learner: TrainLearner) -> None:
    cb = LossCurveCB()
    learner.run(2, cbs=cb)
    assert cb.figure is not None
    (ax,) = cb.figure.axes
    train, valid = ax.get_lines()
    assert (train.get_linestyle(), train.get_marker()) == ("-", "None")
    assert (valid.get_linestyle(), valid.get_marker()) == ("--", "s")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "valid"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("batch", "loss")
    assert all(tick == round(tick) for tick in ax.get_xticks())
    low, high = ax.get_ylim()
    assert low <= min(y for _, y in cb.train + cb.valid)
    assert high >= max(y for _, y in cb.train + cb.valid)


def test_without_validation_there_is_one_line(learner: TrainLearner) -> None:
    cb = LossCurveCB()
    learner.run(1, valid=False, cbs=cb)
    assert list(drawn(cb)) == ["train"]


def test_a_single_batch_is_shown_at_a_whole_number(make_batches: MakeBatches) -> None:
    cb = LossCurveCB()
    TrainLearner(nn.Linear(3, 1), DataLoaders(*[make_batches(1)] * 2)).run(1, cbs=cb)
    assert cb.figure is not None
    (ax,) = cb.figure.axes
    low, high = ax.get_xlim()
    assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


def test_a_loss_that_is_not_finite_is_a_gap(make_batches: MakeBatches) -> None:
    model = nn.Linear(3, 1)
    script = iter([2.0, math.inf, math.nan, 1.0])
    learner = TrainLearner(
        model, DataLoaders(make_batches(4)), lambda preds, y: preds.mean() * 0 + next(script)
    )
    cb = LossCurveCB()
    learner.run(1, valid=False, cbs=cb)
    assert str([loss for _, loss in cb.train]) == "[2.0, inf, nan, 1.0]"
    assert cb.figure is not None
    assert png(cb.figure).startswith(b"\x89PNG")
    low, high = cb.figure.axes[0].get_ylim()
    assert 0.9 < low < 1
    assert 2 < high < 2.1


@pytest.mark.parametrize("n", [15, 16, 17, 32, 33, 100, 1000])
def test_of_many_batches_it_shows_every_so_manyth_the_first_and_the_last(
    monkeypatch: pytest.MonkeyPatch, make_batches: MakeBatches, n: int
) -> None:
    monkeypatch.setattr(curve, "MAX_POINTS", 8)
    cb = LossCurveCB()
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(make_batches(1) * n))
    losses = losses_of(learner)
    learner.run(1, valid=False, cbs=cb)
    batches = [batch for batch, _ in cb.train]
    assert cb.train == [(batch, losses[batch - 1]) for batch in batches]
    assert len(batches) in range(min(n, 9), 18)
    every = batches[1] - 1
    assert batches[:-1] == list(range(1, batches[-1], every))
    assert batches[-1] == n
    assert drawn(cb) == {"train": cb.train}


def test_of_many_epochs_it_shows_some_too(
    monkeypatch: pytest.MonkeyPatch, make_batches: MakeBatches
) -> None:
    monkeypatch.setattr(curve, "MAX_POINTS", 4)
    cb = LossCurveCB()
    TrainLearner(nn.Linear(3, 1), DataLoaders(*[make_batches(1)] * 2)).run(20, cbs=cb)
    assert [batch for batch, _ in cb.valid] == [1, 5, 9, 13, 17, 20]


# ------------------------------------------------------------------------------ how a fit ends


class Ends(Callback):
    """Raises in the second batch of the second epoch."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def before_batch(self, event: BeforeBatch) -> None:
        if (event.epoch, event.iter) == (1, 1):
            raise self.error


def test_a_cancelled_fit_is_drawn_to_its_end(learner: TrainLearner, backend: Backend) -> None:
    cb = LossCurveCB()
    learner.run(5, cbs=[cb, Ends(CancelFitException())], **backend)
    assert [batch for batch, _ in cb.train] == [1, 2, 3, 4]
    assert drawn(cb) == {"train": cb.train, "valid": cb.valid}


def test_a_failed_fit_is_drawn_to_its_end(learner: TrainLearner, backend: Backend) -> None:
    cb = LossCurveCB()
    with pytest.raises(ValueError, match="broken"):
        learner.run(5, cbs=[cb, Ends(ValueError("broken"))], **backend)
    assert [batch for batch, _ in cb.train] == [1, 2, 3, 4]
    assert drawn(cb) == {"train": cb.train, "valid": cb.valid}


async def test_a_fit_that_the_host_cancels_is_drawn_to_its_end(learner: TrainLearner) -> None:
    cb = LossCurveCB()
    losses = losses_of(learner)
    with anyio.fail_after(30), anyio.CancelScope() as scope:

        @learner.on(BeforeEpoch, where=lambda event: event.epoch == 1)
        async def cancel(event: BeforeEpoch) -> None:
            scope.cancel()

        await learner.fit(5, cbs=cb)
    assert cb.train == list(enumerate(losses, start=1))
    assert len(losses) >= 3
    assert drawn(cb)["train"] == cb.train


# ----------------------------------------------------------------------- when and where it draws


class Watched(LossCurveCB):
    """Says when it has drawn, and in which thread."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = threading.Event()
        self.threads: set[int] = set()

    def watcher(self, event: Event) -> Watcher:
        watcher = super().watcher(event)
        draw = watcher.observe

        def observe(event: Event) -> None:
            draw(event)
            self.threads.add(threading.get_ident())
            self.drawn.set()

        watcher.observe = observe  # type: ignore[method-assign]
        return watcher


def test_it_draws_on_the_hosts_thread_while_the_training_runs(
    learner: TrainLearner, backend: Backend
) -> None:
    cb, drawn_by_then = Watched(), []

    @learner.on(AfterBatch, once=True)
    def hold(event: AfterBatch) -> None:
        drawn_by_then.append(cb.drawn.wait(30))

    learner.run(1, cbs=cb, **backend)
    assert drawn_by_then == [True]
    assert cb.threads == {threading.get_ident()}


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_it_draws_every_half_second_and_once_for_a_host_that_was_busy(
    learner: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, cb = Clock(), LossCurveCB()
    monkeypatch.setattr(curve, "monotonic", clock)
    learner.trains = True
    learner.batch = None
    fit = {"learner": learner, "run_id": "r1", "time": 0.0, "purpose": "fit", "n_epochs": 1}
    begin = BeforeFit(**fit, n_steps=60)
    epoch = {"epoch": 0, "training": True, "n_iter": 60}
    batch = {
        "n_samples": 0,
        "steps": 0,
        "lr": 0.1,
        "lrs": (0.1,),
        "loss": torch.tensor(1.0),
        "opt": None,
    }
    watcher = cb.watcher(begin)
    assert not watcher.wants(begin)
    handed_over, waiting = [], []
    for i in range(60):
        event = AfterBatch(**fit, **epoch, **batch, iter=i)
        if watcher.wants(event):
            handed_over.append(i)
            waiting.append(event)
        while waiting and i >= 20:  # until then the host is busy
            watcher.observe(waiting.pop())
            assert drawn(cb)["train"] == [(j + 1, 1.0) for j in range(i + 1)]
        clock.now += 1 / 16
    assert handed_over == [0, 28, 36, 44, 52]


def test_every_fit_has_a_figure_of_its_own(learner: TrainLearner) -> None:
    cb = LossCurveCB()
    learner.run(1, cbs=cb)
    first, before = cb.figure, drawn(cb)
    learner.run(2, cbs=cb)
    assert cb.figure is not first
    assert len(cb.train) == 6
    assert first is not None
    assert [len(line.get_xdata()) for line in first.axes[0].get_lines()] == [3, 1]
    assert [batch for batch, _ in before["train"]] == [1, 2, 3]


async def test_validating_leaves_the_curve_as_it_is(learner: TrainLearner) -> None:
    cb = LossCurveCB()
    learner.add_cbs(cb)
    await learner.fit(1)
    figure, shown = cb.figure, drawn(cb)
    await learner.validate()
    assert cb.figure is figure
    assert drawn(cb) == shown == {"train": cb.train, "valid": cb.valid}


async def test_a_run_id_that_is_used_again_does_not_mix_two_fits(learner: TrainLearner) -> None:
    cb = LossCurveCB()
    learner.add_cbs(cb)
    await learner.fit(1, run_id="again")
    figure, shown = cb.figure, drawn(cb)
    await learner.fit(1, train=False, run_id="again")
    assert drawn(cb) == shown == {"train": cb.train, "valid": cb.valid}
    await learner.fit(2, run_id="again")
    assert cb.figure is not figure
    assert (len(cb.train), len(cb.valid)) == (6, 2)


async def test_a_fit_it_came_late_to_is_not_taken_for_another_of_its_run_id(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    cb = LossCurveCB()
    await learner.fit(1, cbs=cb, run_id="again")
    shown = drawn(cb)
    late = TrainLearner(nn.Linear(3, 1), DataLoaders(make_batches(5)))
    late.subscribe(BeforeBatch, lambda event: late.add_cbs(cb), once=True)
    await late.fit(1, valid=False, run_id="again")
    assert drawn(cb) == shown == {"train": cb.train, "valid": cb.valid}


async def test_a_validation_of_another_learner_meanwhile_leaves_it_watching(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    cb = LossCurveCB()
    losses = losses_of(learner)
    other = TrainLearner(nn.Linear(3, 1), DataLoaders(None, make_batches(5)), cbs=cb)

    @learner.on(BeforeBatch, once=True)
    async def meanwhile(event: BeforeBatch) -> None:
        await other.fit(1, train=False, run_id="same")

    with anyio.fail_after(30):
        await learner.fit(1, valid=False, cbs=cb, run_id="same")
    assert drawn(cb) == {"train": list(enumerate(losses, start=1))}
    assert len(losses) == 3


async def test_of_two_fits_at_once_it_shows_the_later(
    learner: TrainLearner, make_batches: MakeBatches
) -> None:
    cb = LossCurveCB()
    other = TrainLearner(nn.Linear(3, 1), DataLoaders(make_batches(5)), cbs=cb)
    others = losses_of(other)

    @learner.on(BeforeBatch, once=True)
    async def meanwhile(event: BeforeBatch) -> None:
        await other.fit(1, valid=False)

    with anyio.fail_after(30):
        await learner.fit(1, cbs=cb)
    assert cb.train == list(enumerate(others, start=1))
    assert drawn(cb) == {"train": cb.train}


def test_it_draws_on_the_axes_that_it_is_given_one_fit_after_the_other(
    learner: TrainLearner,
) -> None:
    left, right = Figure().subplots(1, 2)
    right.axhline(0.5, label="goal")
    cb = LossCurveCB(right)
    learner.run(1, cbs=cb)
    learner.run(2, cbs=cb)
    assert cb.figure is right.figure
    assert [line.get_label() for line in right.get_lines()] == ["goal", "train", "valid"]
    assert len(right.get_lines()[1].get_xdata()) == 6
    assert left.get_lines() == []


def test_drawing_does_without_pyplot_and_its_global_figures(
    learner: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    cb = LossCurveCB()
    learner.run(1, cbs=cb)
    assert cb.figure is not None
    assert png(cb.figure).startswith(b"\x89PNG")


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'eventrain[plot]'")):
        LossCurveCB()


# --------------------------------------------------------------------------------- what it costs


def test_weights_are_the_same_drawn_or_not(
    dls: DataLoaders, make_model: Callable[[], nn.Module], backend: Backend
) -> None:
    """G11: watched by a curve."""

    def weights(*cbs: Callback) -> list[torch.Tensor]:
        learner = TrainLearner(make_model(), dls, cbs=cbs)
        learner.run(2, **backend)
        return list(learner.model.parameters())

    assert all(map(torch.equal, weights(), weights(LossCurveCB())))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_loss_on_a_device_is_shown_without_waiting_for_it(make_batches: MakeBatches) -> None:
    """G14: it is shown when it has arrived, at the latest when the fit has ended."""
    batches = [(x.cuda(), y.cuda()) for x, y in make_batches(3)]
    learner = TrainLearner(nn.Linear(3, 1).cuda(), DataLoaders(batches))
    cb, known = LossCurveCB(), []
    learner.run(1, valid=False, cbs=cb)  # whatever must be compiled and allocated first
    learner.on(BeforeBatch, once=True)(lambda event: torch.cuda._sleep(10**9))
    learner.on(CleanupEpoch)(lambda event: known.append(len(cb.train)))
    learner.run(1, valid=False, cbs=cb)
    assert known == [0]
    assert [batch for batch, _ in cb.train] == [1, 2, 3]

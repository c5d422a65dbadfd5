"""MetricsCB: the numbers computed by hand over the whole epoch, accumulated on the device."""

from __future__ import annotations

import gc
import io
import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchmetrics
from eventrain.callbacks import CheckpointCB, MetricsCB
from eventrain.engine import DataLoaders, TensorLoader, TrainLearner
from eventrain.engine.data.containers import map_tensors
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterLoss,
    BeforeBatch,
    CancelBatchException,
    CancelEpochException,
    CleanupEpoch,
    record_events,
)
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    functional,
)

Digits = tuple[torch.Tensor, torch.Tensor]
MakeModel = Callable[[], nn.Module]


def loaders(digits: Digits) -> DataLoaders:
    """Four training batches, the last of 14, and two for validation, of 32 and 8."""
    images, labels = digits
    train = TensorDataset(images[:110], labels[:110])
    valid = TensorDataset(images[280:], labels[280:])
    return DataLoaders(DataLoader(train, 32, shuffle=True), DataLoader(valid, 32))


def learner(
    digits: Digits, make_cnn: MakeModel, *cbs: MetricsCB, loss_func: Any = F.cross_entropy
) -> TrainLearner:
    return TrainLearner(make_cnn(), loaders(digits), loss_func, 0.1, cbs)


Seen = dict[tuple[int, str], list[tuple[torch.Tensor, torch.Tensor, float]]]


def watch(learner: TrainLearner) -> Seen:
    """Predictions, targets and loss of every batch, by epoch and phase."""
    seen: Seen = defaultdict(list)

    @learner.on(AfterBatch)
    def keep(event: AfterBatch) -> None:
        phase = "train" if event.training else "eval"
        targets = learner.batch[1]
        seen[event.epoch, phase].append((learner.preds.detach(), targets, learner.loss.item()))

    return seen


def mean_loss(batches: list[tuple[torch.Tensor, torch.Tensor, float]]) -> float:
    return sum(loss * len(y) for _, y, loss in batches) / sum(len(y) for _, y, _ in batches)


# torcheval 0.0.7 calls what torch has deprecated.
@pytest.mark.filterwarnings("ignore:The reduce argument of torch.scatter:UserWarning")
def test_every_kind_of_metric_is_what_torcheval_says_of_the_whole_epoch(
    digits: Digits, make_cnn: MakeModel, backend: dict[str, Any]
) -> None:
    metrics = MetricsCB(
        MulticlassAccuracy(),
        per_class=MulticlassAccuracy(average=None, num_classes=10),
        confusion=MulticlassConfusionMatrix(10),
        auroc=MulticlassAUROC(num_classes=10),  # keeps every prediction until it is computed
    )
    learn = learner(digits, make_cnn, metrics)
    seen = watch(learn)
    learn.run(2, **backend)

    assert [(row["epoch"], row["train"]) for row in metrics.history] == list(seen)
    for row in metrics.history:
        batches = seen[row["epoch"], row["train"]]
        preds, targets = (torch.cat(column) for column in list(zip(*batches, strict=True))[:2])
        by_hand = {
            "MulticlassAccuracy": functional.multiclass_accuracy(preds, targets),
            "per_class": functional.multiclass_accuracy(
                preds, targets, average=None, num_classes=10
            ),
            "confusion": functional.multiclass_confusion_matrix(preds, targets, 10),
            "auroc": functional.multiclass_auroc(preds, targets, num_classes=10),
        }
        assert list(row) == ["epoch", "train", *by_hand, "loss"]
        assert row["loss"] == pytest.approx(mean_loss(batches), rel=1e-9)
        for name, value in by_hand.items():
            assert type(row[name]) is (float if value.ndim == 0 else list), name
            assert torch.tensor(row[name]).shape == value.shape
            assert torch.allclose(torch.tensor(row[name]), value.float(), atol=5e-4), name


def test_the_loss_is_averaged_over_samples_not_over_batches(
    digits: Digits, make_cnn: MakeModel
) -> None:
    metrics = MetricsCB()
    learn = learner(digits, make_cnn, metrics)
    seen = watch(learn)
    learn.run(1)
    train = seen[0, "train"]
    assert [len(y) for _, y, _ in train] == [32, 32, 32, 14]
    losses = [loss for _, _, loss in train]
    assert metrics.history == [
        {"epoch": 0, "train": "train", "loss": pytest.approx(mean_loss(train), rel=1e-9)},
        {"epoch": 0, "train": "eval", "loss": pytest.approx(mean_loss(seen[0, "eval"]), rel=1e-9)},
    ]
    assert metrics.history[0]["loss"] != pytest.approx(sum(losses) / 4, rel=1e-6)


def test_losses_in_half_precision_are_summed_in_double(digits: Digits, make_cnn: MakeModel) -> None:
    metrics = MetricsCB()

    def half_loss(preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(preds, targets).mul(100).half()  # times 32 it would overflow

    learn = learner(digits, make_cnn, metrics, loss_func=lambda p, y: half_loss(p, y) * 100)
    seen = watch(learn)
    learn.run(1, train=False)
    assert metrics.history[0]["loss"] == mean_loss(seen[0, "eval"]) > 20_000


def test_a_loss_of_one_element_is_taken_for_its_number(digits: Digits, make_cnn: MakeModel) -> None:
    plain, one_element = MetricsCB(), MetricsCB()
    learner(digits, make_cnn, plain).run(1, train=False)
    learner(
        digits, make_cnn, one_element, loss_func=lambda p, y: F.cross_entropy(p, y).reshape(1)
    ).run(1, train=False)
    assert one_element.history == plain.history


class Pair:
    """A batch that is an object of the host's own: nothing in it says how many samples it has."""

    __slots__ = ("x", "y")

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y = x, y


class PairLearner(TrainLearner):
    def predict(self) -> None:
        self.preds = self.model(self.batch.x)

    def get_loss(self) -> None:
        self.loss = self.loss_func(self.preds, self.batch.y)


def test_batches_of_unknown_size_count_the_same(digits: Digits, make_cnn: MakeModel) -> None:
    images, labels = digits
    batches = [Pair(images[:32], labels[:32]), Pair(images[32:40], labels[32:40])]
    metrics, model = MetricsCB(), make_cnn()
    PairLearner(model, DataLoaders(valid=batches), F.cross_entropy, cbs=metrics).run(train=False)
    losses = [F.cross_entropy(model(batch.x), batch.y).item() for batch in batches]
    assert metrics.history[0]["loss"] == pytest.approx(sum(losses) / 2, rel=1e-6)


# ---------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("positional", "named", "taken"),
    [
        ([MulticlassAccuracy(), MulticlassAccuracy()], {}, "MulticlassAccuracy"),
        ([MulticlassAccuracy()], {"MulticlassAccuracy": MulticlassAUROC(num_classes=3)}, None),
        ([], {"loss": MulticlassAccuracy()}, "loss"),
        ([], {"epoch": MulticlassAccuracy()}, "epoch"),
        ([], {"train": MulticlassAccuracy()}, "train"),
    ],
)
def test_a_name_used_twice_is_refused(
    positional: list[Any], named: dict[str, Any], taken: str | None
) -> None:
    with pytest.raises(ValueError, match=f"{taken or 'MulticlassAccuracy'!r} is taken.*yourname="):
        MetricsCB(*positional, **named)


@pytest.mark.parametrize("thing", [MulticlassAccuracy, "accuracy", None, nn.Linear(1, 1), (1, 2)])
def test_an_object_that_is_not_a_metric_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"^accuracy=.* is not a metric: pass an instance"):
        MetricsCB(accuracy=thing)
    with pytest.raises(TypeError, match="is not a metric"):
        MetricsCB(thing)


@pytest.mark.parametrize("thing", [[MulticlassAccuracy()], {"acc": MulticlassAccuracy()}])
def test_metrics_in_a_container_say_how_they_are_passed(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"MetricsCB\(\*metrics\), MetricsCB\(\*\*metrics\)"):
        MetricsCB(thing)


@pytest.mark.parametrize(
    "thing", [MulticlassAccuracy(), (MulticlassAccuracy(), len), lambda learner: 1.0]
)
def test_the_name_of_the_loss_is_taken(thing: Any) -> None:
    with pytest.raises(ValueError, match="the name 'loss' is taken"):
        MetricsCB(loss=thing)


@pytest.mark.parametrize("make", [lambda f: f, lambda f: (MulticlassAccuracy(), f)])
def test_a_function_of_predictions_and_targets_says_how_it_becomes_one_of_the_learner(
    make: Any,
) -> None:
    """As the metrics of fastai are."""
    with pytest.raises(TypeError) as raised:
        MetricsCB(accuracy=make(functional.multiclass_accuracy))
    assert "write lambda learner: multiclass_accuracy(learner.preds, learner.batch[-1])" in str(
        raised.value
    )
    with pytest.raises(TypeError, match=r"lambda learner: function\(learner.preds"):
        MetricsCB(accuracy=make(lambda preds, y: 1.0))


# ------------------------------------------------------------------------- where it costs what


class Operations(TorchDispatchMode):
    """Counts what reads a number on the host, or copies a tensor elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.all = 0
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        if func._schema.name in ("aten::_local_scalar_dense", "aten::_to_copy", "aten::equal"):
            self.waits.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def test_nothing_is_copied_to_the_host_before_the_epoch_ends(
    digits: Digits, make_cnn: MakeModel, backend: dict[str, Any]
) -> None:
    """G14: the metrics ask for their numbers once an epoch."""
    metrics = MetricsCB(MulticlassAccuracy(), auroc=MulticlassAUROC(num_classes=10))
    learn = learner(digits, make_cnn, metrics)
    operations = {AfterBatch: Operations(), AfterEpoch: Operations()}
    for event_type, mode in operations.items():
        # On the training thread, around the one receiver in between.
        learn.subscribe(event_type, lambda _, mode=mode: mode.__enter__(), order=-0.5)
        learn.subscribe(event_type, lambda _, mode=mode: mode.__exit__(None, None, None), order=0.5)
    learn.run(2, **backend)
    assert operations[AfterBatch].all >= 12  # it did look
    assert operations[AfterBatch].waits == []
    assert operations[AfterEpoch].waits == ["aten::_local_scalar_dense"] * 4
    assert len(metrics.history) == 4


class Marked(torch.autograd.Function):
    """An identity that leaves a mark in the graph, to tell when the graph is gone."""

    marks: ClassVar[weakref.WeakSet[nn.Module]] = weakref.WeakSet()

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.mark = nn.Module()
        Marked.marks.add(ctx.mark)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_no_graph_outlives_its_batch(digits: Digits, make_cnn: MakeModel) -> None:
    """G12: what the metrics keep, the loss and stored predictions, holds no graph."""
    metrics = MetricsCB(MulticlassAccuracy(), auroc=MulticlassAUROC(num_classes=10))
    learn = learner(digits, make_cnn, metrics)
    learn.predict = lambda: setattr(learn, "preds", Marked.apply(learn.model(learn.batch[0])))
    alive = []

    @learn.on(BeforeBatch, where=lambda event: event.training)
    def let_go(event: BeforeBatch) -> None:
        learn.preds = None
        gc.collect()
        alive.append(len(Marked.marks))

    learn.run(1, valid=False)
    assert alive == [0, 0, 0, 0]
    assert len(metrics.metrics["auroc"].inputs) == 4  # these it does keep


# ------------------------------------------------------------------------------------- state


def test_the_state_of_the_middle_of_an_epoch_can_be_gone_back_to(
    digits: Digits, make_cnn: MakeModel
) -> None:
    metrics = MetricsCB(MulticlassAccuracy(), auroc=MulticlassAUROC(num_classes=10))
    learn = learner(digits, make_cnn, metrics)
    seen = watch(learn)
    states = []

    @learn.on(AfterBatch, order=1, where=lambda event: event.training)
    def forget_the_third(event: AfterBatch) -> None:
        if event.iter == 1:
            states.append(metrics.state_dict())
        if event.iter == 2:
            metrics.load_state_dict(states[0])

    learn.run(1, valid=False)
    batches = seen[0, "train"]
    del batches[2]
    preds, targets = (torch.cat(column) for column in list(zip(*batches, strict=True))[:2])
    assert metrics.history == [
        {
            "epoch": 0,
            "train": "train",
            "MulticlassAccuracy": functional.multiclass_accuracy(preds, targets).item(),
            "auroc": pytest.approx(
                functional.multiclass_auroc(preds, targets, num_classes=10).item(), abs=5e-4
            ),
            "loss": pytest.approx(mean_loss(batches), rel=1e-9),
        }
    ]
    assert states[0]["loss"]["n_samples"] == 64  # the batches after it did not change what was kept


def test_the_state_can_be_saved_and_loaded_as_plain_data(
    digits: Digits, make_cnn: MakeModel
) -> None:
    metrics = MetricsCB(MulticlassAccuracy(), confusion=MulticlassConfusionMatrix(10))
    learner(digits, make_cnn, metrics).run(1)
    file = io.BytesIO()
    torch.save(metrics.state_dict(), file)
    file.seek(0)
    other = MetricsCB(MulticlassAccuracy(), confusion=MulticlassConfusionMatrix(10))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.history == metrics.history
    assert other.history is not metrics.history
    assert other.metrics["confusion"].compute().equal(metrics.metrics["confusion"].compute())


# ----------------------------------------------------------------------- epochs, fits, learners


def test_the_history_goes_on_over_several_fits_and_the_result_has_its_own(
    digits: Digits, make_cnn: MakeModel
) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learn = learner(digits, make_cnn, metrics)
    first = learn.run(2)
    second = learn.run(1, valid=False)
    assert [(row["epoch"], row["train"]) for row in metrics.history] == [
        (0, "train"),
        (0, "eval"),
        (1, "train"),
        (1, "eval"),
        (0, "train"),
    ]
    assert list(first.history + second.history) == metrics.history


def test_the_numbers_are_in_the_events_and_the_result(
    digits: Digits, make_cnn: MakeModel, backend: dict[str, Any]
) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learn = learner(digits, make_cnn, metrics)
    with record_events(learn) as events:
        result = learn.run(2, **backend)
    ends = [event for event in events if isinstance(event, CleanupEpoch)]
    rows = [
        {"epoch": e.epoch, "train": "train" if e.training else "eval", **e.metrics} for e in ends
    ]
    assert rows == metrics.history == list(result.history)
    assert all(set(e.metrics) == {"accuracy", "loss"} for e in ends)
    with pytest.raises(TypeError):
        ends[0].metrics["accuracy"] = 1.0  # type: ignore[index]
    assert learn.metrics is metrics


async def test_validate_returns_the_numbers_of_the_metrics_that_are_attached(
    digits: Digits, make_cnn: MakeModel
) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learn = learner(digits, make_cnn, metrics)
    seen = watch(learn)
    numbers = await learn.validate()
    preds, targets = (torch.cat(part) for part in list(zip(*seen[0, "eval"], strict=True))[:2])
    assert numbers == {
        "accuracy": pytest.approx((preds.argmax(1) == targets).float().mean().item()),
        "loss": pytest.approx(mean_loss(seen[0, "eval"]), rel=1e-9),
    }
    assert metrics.history == []  # which is that of the fits


def test_a_cancelled_epoch_leaves_its_numbers_in_the_result_alone(
    digits: Digits, make_cnn: MakeModel, backend: dict[str, Any]
) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learn = learner(digits, make_cnn, metrics)
    seen = watch(learn)

    @learn.on(AfterBatch, order=1)
    def leave(event: AfterBatch) -> None:
        if (event.epoch, event.training, event.iter) == (0, True, 2):
            raise CancelEpochException

    with record_events(learn) as events:
        result = learn.run(2, **backend)
    assert [(row["epoch"], row["train"]) for row in metrics.history] == [
        (0, "eval"),
        (1, "train"),
        (1, "eval"),
    ]
    cut, *others = result.history
    assert others == metrics.history
    assert (cut["epoch"], cut["train"], cut["status"]) == (0, "train", "cancelled")
    assert cut["loss"] == pytest.approx(mean_loss(seen[0, "train"]), rel=1e-9)
    ends = [event for event in events if isinstance(event, CleanupEpoch)]
    assert [e.end.status for e in ends] == ["cancelled", "completed", "completed", "completed"]
    assert dict(ends[0].metrics) == {name: cut[name] for name in ("accuracy", "loss")}
    # Nothing of the epoch that was left is in the next one's numbers.
    assert metrics.history[0]["loss"] == pytest.approx(mean_loss(seen[0, "eval"]), rel=1e-9)


def test_a_cancelled_batch_does_not_count(digits: Digits, make_cnn: MakeModel) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learn = learner(digits, make_cnn, metrics)
    seen = watch(learn)

    @learn.on(AfterLoss)
    def leave(event: AfterLoss) -> None:
        if event.iter == 1:
            raise CancelBatchException

    learn.run(1)
    train, valid = metrics.history
    assert [len(y) for _, y, _ in seen[0, "train"]] == [32, 32, 14]
    assert train["loss"] == pytest.approx(mean_loss(seen[0, "train"]), rel=1e-9)
    assert valid["loss"] == pytest.approx(mean_loss(seen[0, "eval"]), rel=1e-9)


def test_an_epoch_whose_batches_were_all_cancelled_leaves_no_row(
    digits: Digits, make_cnn: MakeModel
) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learn = learner(digits, make_cnn, metrics)

    @learn.on(BeforeBatch, where=lambda event: event.training)
    def leave(event: BeforeBatch) -> None:
        raise CancelBatchException

    result = learn.run(1)
    assert [row["train"] for row in metrics.history] == ["eval"]
    assert (result.status, result.batches, result.valid_batches) == ("completed", 0, 2)


def test_one_learner_after_another_may_use_the_same_metrics(
    digits: Digits, make_cnn: MakeModel
) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    own = MetricsCB(accuracy=MulticlassAccuracy())
    for cb in (metrics, own):
        torch.manual_seed(3)
        learner(digits, make_cnn, cb).run(1)
    after_one = list(metrics.history)
    assert after_one == own.history
    torch.manual_seed(3)
    second = learner(digits, make_cnn, metrics)
    result = second.run(1)
    assert second.metrics is metrics
    assert metrics.history == after_one + list(result.history) == after_one * 2


# -------------------------------------------------------------------------------------- the plot


def recorded(*phases: tuple[int, str], **numbers: Any) -> MetricsCB:
    """With a row for each (epoch, phase): the loss is 10 in the first, 20 in the second, ..."""
    metrics = MetricsCB()
    for i, (epoch, phase) in enumerate(phases, start=1):
        metrics.history.append({"epoch": epoch, "train": phase, **numbers, "loss": 10.0 * i})
    return metrics


def lines(ax: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): [tuple(p) for p in line.get_xydata()] for line in ax.get_lines()}


def test_plot_has_a_panel_for_each_number(digits: Digits, make_cnn: MakeModel) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy(), confusion=MulticlassConfusionMatrix(10))
    learner(digits, make_cnn, metrics).run(2)
    first = metrics.plot()
    panels = first.figure.axes
    assert panels[0] is first
    assert [ax.get_ylabel() for ax in panels] == ["loss", "accuracy"]
    for ax in panels:
        train, train2 = (row[ax.get_ylabel()] for row in metrics.history if row["train"] == "train")
        valid, valid2 = (row[ax.get_ylabel()] for row in metrics.history if row["train"] == "eval")
        assert lines(ax) == {"train": [(1, train), (2, train2)], "valid": [(1, valid), (2, valid2)]}
        assert ax.get_xlabel() == "epoch"
        assert [text.get_text() for text in ax.get_legend().get_texts()] == ["train", "valid"]


def test_plot_has_lines_distinct_without_colors_and_whole_epochs() -> None:
    for n_epochs in (1, 2, 3, 100):
        rows = [(epoch, phase) for epoch in range(n_epochs) for phase in ("train", "eval")]
        ax = recorded(*rows).plot()
        train, valid = ax.get_lines()
        assert (train.get_linestyle(), train.get_marker()) == ("-", "o")
        assert (valid.get_linestyle(), valid.get_marker()) == ("--", "s")
        low, high = ax.get_xlim()
        ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
        assert len(ticks) >= min(n_epochs, 2)
        assert all(tick == round(tick) for tick in ticks)


def test_plot_shows_one_fit_after_the_other() -> None:
    rows = [
        *[(0, "train"), (0, "eval"), (1, "train"), (1, "eval")],  # a fit of two epochs
        *[(0, "train"), (0, "eval")],  # of one
        *[(0, "train"), (1, "train")],  # without validation
        *[(0, "eval")],  # without training
        *[(0, "eval")],  # once more
    ]
    assert lines(recorded(*rows).plot()) == {
        "train": [(1, 10), (2, 30), (3, 50), (4, 70), (5, 80)],
        "valid": [(1, 20), (2, 40), (3, 60), (6, 90), (7, 100)],
    }


def test_plot_goes_on_where_a_resumed_fit_did() -> None:
    ax = recorded((0, "train"), (1, "train"), (2, "train"), (3, "train")).plot()
    assert [x for x, _ in lines(ax)["train"]] == [1, 2, 3, 4]


def test_plot_shows_the_names_that_are_asked_for() -> None:
    metrics = recorded((0, "train"), accuracy=0.5, recall=0.25)
    assert [ax.get_ylabel() for ax in metrics.plot().figure.axes] == ["loss", "accuracy", "recall"]
    one = metrics.plot(names="recall")
    assert lines(one) == {"train": [(1, 0.25)]}
    assert one.figure.axes == [one]
    two = metrics.plot(names=["recall", "loss"]).figure.axes
    assert [ax.get_ylabel() for ax in two] == ["recall", "loss"]


def test_plot_draws_on_the_axes_that_it_is_given() -> None:
    from matplotlib.figure import Figure

    metrics = recorded((0, "train"), (0, "eval"), accuracy=0.5)
    left, right = Figure().subplots(1, 2)
    assert metrics.plot(right) is right
    assert lines(right) == {
        "train loss": [(1, 10)],
        "valid loss": [(1, 20)],
        "train accuracy": [(1, 0.5)],
        "valid accuracy": [(1, 0.5)],
    }
    assert right.get_ylabel() == "loss, accuracy"
    assert lines(metrics.plot(left, "accuracy")) == {"train": [(1, 0.5)], "valid": [(1, 0.5)]}
    assert left.get_ylabel() == "accuracy"


def test_plot_of_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="nothing to plot yet: no epoch has ended"):
        MetricsCB(accuracy=MulticlassAccuracy()).plot()
    metrics = recorded((0, "train"), accuracy=0.5, confusion=[[1, 0], [0, 1]])
    with pytest.raises(ValueError, match=r"no number 'acuracy', but loss, accuracy$"):
        metrics.plot(names="acuracy")
    with pytest.raises(ValueError, match=r"no number 'confusion', but loss, accuracy$"):
        metrics.plot(names=["loss", "confusion"])
    with pytest.raises(ValueError, match=r"choose from loss, accuracy$"):
        metrics.plot(names=[])


def test_a_plot_is_a_picture_without_pyplot_and_its_global_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # to import it is an error now
    ax = recorded((0, "train"), accuracy=0.5).plot()
    for shown in (ax, ax.figure):
        assert shown._repr_png_().startswith(b"\x89PNG")  # what a notebook asks for


def test_without_matplotlib_it_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.ticker", None)
    with pytest.raises(ImportError, match=r"pip install 'eventrain\[plot\]'"):
        recorded((0, "train")).plot()


# -------------------------------------------------------------------- what a metric is updated with


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.kind, self.size = nn.Linear(3, 4), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.kind(x), self.size(x)


def two_headed(metrics: MetricsCB) -> tuple[TrainLearner, list[Any]]:
    x = torch.linspace(-1, 1, 30).reshape(10, 3)
    kinds, sizes = torch.arange(10) % 4, torch.arange(10) % 2
    batches = list(zip(x.split(4), kinds.split(4), sizes.split(4), strict=True))

    def loss_func(preds: Any, kinds: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(preds[0], kinds) + F.cross_entropy(preds[1], sizes)

    learner = TrainLearner(TwoHeads(), DataLoaders(valid=batches), loss_func, n_inp=1, cbs=metrics)
    return learner, [x, kinds, sizes]


def test_a_metric_of_each_head_says_what_it_is_updated_with(backend: dict[str, Any]) -> None:
    metrics = MetricsCB(
        kind=(MulticlassAccuracy(), lambda learner: (learner.preds[0], learner.batch[1])),
        size=(MulticlassAccuracy(), lambda learner: (learner.preds[1], learner.batch[2])),
    )
    learn, (x, kinds, sizes) = two_headed(metrics)
    learn.run(1, train=False, **backend)
    kind, size = learn.model(x)
    assert metrics.history[0]["kind"] == (kind.argmax(1) == kinds).float().mean().item()
    assert metrics.history[0]["size"] == (size.argmax(1) == sizes).float().mean().item()


def test_a_metric_of_a_two_headed_model_says_how_to_choose() -> None:
    learn, _ = two_headed(MetricsCB(accuracy=MulticlassAccuracy()))
    with pytest.raises(TypeError, match=r"'accuracy' .*a tuple of 2: say.*MetricsCB\(accuracy=\("):
        learn.run(1, train=False)


def test_the_function_of_a_metric_returns_a_tuple() -> None:
    learn, _ = two_headed(MetricsCB(kind=(MulticlassAccuracy(), lambda learner: learner.preds[0])))
    with pytest.raises(TypeError, match=r"metric 'kind' returned a Tensor of shape .* in a tuple"):
        learn.run(1, train=False)


def test_a_metric_that_fails_is_named_with_what_it_was_given() -> None:
    """Such as accuracy on the soft targets of mixup."""
    soft = [(torch.ones(4, 3), torch.ones(4, 2) / 2)] * 2
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learn = TrainLearner(nn.Linear(3, 2), DataLoaders(soft), F.cross_entropy, cbs=metrics)
    with pytest.raises(ValueError, match="target") as raised:
        learn.run(1, valid=False)
    notes = "".join(raised.value.__notes__)
    assert "raised by the metric 'accuracy', updated with a Tensor of shape (4, 2)" in notes
    assert "MetricsCB(accuracy=(metric, lambda learner:" in notes


# ------------------------------------------------------------------------- metrics of any library

KINDS_OF_METRIC: dict[str, Callable[[], Any]] = {
    "torcheval": lambda: MulticlassAccuracy(),
    "torchmetrics": lambda: torchmetrics.classification.MulticlassAccuracy(4, average="micro"),
    "one's own": lambda: OwnAccuracy(),
    "one's own, with a state_dict": lambda: OwnAccuracyWithState(),
    "a function": lambda: accuracy,
}


class OwnAccuracy:
    def __init__(self) -> None:
        self.reset()

    def update(self, preds: torch.Tensor, targets: torch.Tensor) -> None:
        self.right = self.right + (preds.argmax(1) == targets).sum()
        self.n += len(targets)

    def compute(self) -> torch.Tensor:
        return self.right / self.n

    def reset(self) -> None:
        self.right: Any = 0
        self.n = 0


class OwnAccuracyWithState(OwnAccuracy):
    __slots__ = ()

    def state_dict(self) -> dict[str, Any]:
        return {"both": [self.right, self.n]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.right, self.n = state["both"]


def accuracy(learner: Any) -> torch.Tensor:
    return (learner.preds.argmax(1) == learner.batch[1]).float().mean()


X4 = torch.linspace(-1, 1, 42).reshape(14, 3).sin() * 3
Y4 = torch.arange(14) % 4


def four_kinds(*cbs: Any) -> TrainLearner:
    """Batches of 4, 4, 4 and 2."""
    torch.manual_seed(2)
    loader = TensorLoader(X4, Y4, batch_size=4, shuffle=True)
    dls = DataLoaders(loader, DataLoader(TensorDataset(X4, Y4), 4))
    return TrainLearner(nn.Linear(3, 4), dls, F.cross_entropy, 0.5, cbs)


def test_metrics_of_all_kinds_in_one_callback_say_the_same(backend: dict[str, Any]) -> None:
    metrics = MetricsCB(**{name: make() for name, make in KINDS_OF_METRIC.items()})
    learn = four_kinds(metrics)
    seen = watch(learn)
    learn.run(2, **backend)
    assert len(metrics.history) == 4
    for row in metrics.history:
        preds, targets, _ = zip(*seen[row["epoch"], row["train"]], strict=True)
        right = (torch.cat(preds).argmax(1) == torch.cat(targets)).double().mean().item()
        for name in KINDS_OF_METRIC:
            assert type(row[name]) is float
            assert row[name] == pytest.approx(right, rel=1e-6), name


def test_functions_are_averaged_over_samples_not_over_batches() -> None:
    metrics = MetricsCB(
        one=lambda learner: len(learner.batch[1]), first=lambda learner: learner.batch[0][:1, :1]
    )
    four_kinds(metrics).run(1, train=False)
    row = metrics.history[0]
    assert row["one"] == (4 * 4 * 3 + 2 * 2) / 14  # the mean of the batches is 3.5
    firsts = X4[[0, 4, 8, 12], 0].double()
    assert row["first"] == ((firsts * torch.tensor([4, 4, 4, 2])).sum() / 14).item()


def test_a_function_is_named_after_itself() -> None:
    metrics = MetricsCB(accuracy)
    four_kinds(metrics).run(1, train=False)
    assert 0 <= metrics.history[0]["accuracy"] <= 1
    with pytest.raises(TypeError, match="a lambda has no name: pass it as yourname=lambda"):
        MetricsCB(lambda learner: 1.0)


@pytest.mark.parametrize("value", [None, "0.5", torch.ones(4), (1, 2)])
def test_a_function_that_returns_no_number_is_told(value: Any) -> None:
    learn = four_kinds(MetricsCB(error=lambda learner: value))
    with pytest.raises(TypeError, match=r"of the metric 'error' returned .*: return the number"):
        learn.run(1)


def test_several_numbers_of_one_metric_have_names_of_their_own() -> None:
    both = torchmetrics.MetricCollection(
        {
            "f1": torchmetrics.classification.MulticlassF1Score(4),
            "kappa": torchmetrics.classification.MulticlassCohenKappa(4),
        }
    )
    metrics = MetricsCB(all=both)
    learn = four_kinds(metrics)
    learn.run(1, train=False)
    (row,) = metrics.history
    preds = learn.model(X4)
    assert list(row) == ["epoch", "train", "all.f1", "all.kappa", "loss"]
    f1 = torchmetrics.functional.classification.multiclass_f1_score(preds, Y4, 4)
    kappa = torchmetrics.functional.classification.multiclass_cohen_kappa(preds, Y4, 4)
    assert (row["all.f1"], row["all.kappa"]) == (f1.item(), kappa.item())


class Curve(OwnAccuracy):
    def compute(self) -> Any:
        return np.float32(0.5), [torch.ones(2), np.zeros(1)]


def test_numbers_are_lists_and_floats_whatever_the_metric_returns() -> None:
    metrics = MetricsCB(curve=Curve())
    four_kinds(metrics).run(1, train=False)
    assert metrics.history[0]["curve"] == [0.5, [[1.0, 1.0], [0.0]]]
    assert type(metrics.history[0]["curve"][0]) is float


# ----------------------------------------------------------------------------- errors and states


class Fails(OwnAccuracy):
    def compute(self) -> Any:
        raise ZeroDivisionError("nothing there")


def test_a_metric_that_fails_when_it_is_read_is_named() -> None:
    learn = four_kinds(MetricsCB(broken=Fails()))
    with pytest.raises(ZeroDivisionError) as raised:
        learn.run(1)
    assert "raised by the metric 'broken', in compute()" in raised.value.__notes__


def test_a_function_that_fails_is_named() -> None:
    learn = four_kinds(MetricsCB(broken=lambda learner: learner.batch[7]))
    with pytest.raises(IndexError) as raised:
        learn.run(1)
    assert "raised by the metric 'broken'" in raised.value.__notes__


@pytest.mark.parametrize(
    "metric", [MulticlassAccuracy(), torchmetrics.classification.MulticlassAUROC(5), OwnAccuracy()]
)
def test_every_kind_of_metric_that_fails_is_named_with_shapes(metric: Any) -> None:
    """On mixup's soft targets."""
    soft = [(torch.ones(4, 3), torch.ones(4, 5) / 5)] * 2
    metrics = MetricsCB(acc=metric)
    learn = TrainLearner(nn.Linear(3, 5), DataLoaders(soft), F.cross_entropy, cbs=metrics)
    with pytest.raises((ValueError, RuntimeError)) as raised:
        learn.run(1, valid=False)
    notes = "".join(raised.value.__notes__)
    assert "metric 'acc', updated with a Tensor of shape (4, 5), a Tensor of shape (4, 5)" in notes
    assert "MetricsCB(acc=(metric, lambda learner:" in notes


MORE_KINDS: dict[str, Callable[[], Any]] = {
    **KINDS_OF_METRIC,
    "stores all": lambda: torchmetrics.classification.MulticlassAUROC(4, thresholds=None),
    "collection": lambda: torchmetrics.MetricCollection(
        [
            torchmetrics.classification.MulticlassPrecision(4),
            torchmetrics.classification.MulticlassRecall(4),
        ]
    ),
    "wrapper": lambda: torchmetrics.wrappers.ClasswiseWrapper(
        torchmetrics.classification.MulticlassAccuracy(4, average=None)
    ),
    "pair": lambda: (
        torchmetrics.MeanSquaredError(),
        lambda learner: (learner.preds.amax(1), learner.batch[1].float()),
    ),
    "floats": lambda: lambda learner: accuracy(learner).item(),
}


@pytest.mark.filterwarnings("ignore:No positive samples:UserWarning")
@pytest.mark.filterwarnings("ignore:No negative samples:UserWarning")
@pytest.mark.parametrize("place", [(0, True, 1), (1, True, 3), (1, False, 1)])
@pytest.mark.parametrize("kind", MORE_KINDS)
def test_a_fit_resumed_in_the_middle_of_an_epoch_has_the_same_numbers(
    kind: str, place: Any, tmp_path: Path
) -> None:
    whole = MetricsCB(m=MORE_KINDS[kind]())
    four_kinds(whole).run(3)

    saved = four_kinds(MetricsCB(m=MORE_KINDS[kind]()), CheckpointCB(tmp_path))

    @saved.on(AfterBatch, where=lambda event: (event.epoch, event.training, event.iter) == place)
    def leave(event: AfterBatch) -> None:
        saved.stop(graceful=True)

    with capture_logs() as logs:
        assert saved.run(3).status == "cancelled"
    assert [log["event"] for log in logs] == []
    resumed = MetricsCB(m=MORE_KINDS[kind]())
    four_kinds(resumed, CheckpointCB(tmp_path)).run(3, resume="last")
    assert resumed.history == whole.history


class Unsaveable(OwnAccuracy):
    def reset(self) -> None:
        super().reset()
        self.lock = threading.Lock()


def test_a_metric_that_cannot_be_saved_is_told_once(tmp_path: Path) -> None:
    metrics = MetricsCB(own=OwnAccuracy(), other=Unsaveable())
    learn = four_kinds(metrics, CheckpointCB(tmp_path, every_batches=1))
    with capture_logs() as logs:
        learn.run(2)
    (line,) = (log for log in logs if log["event"] == "metric_is_not_saved")
    assert line["metrics"] == ["other"]
    assert "state_dict() and load_state_dict()" in line["hint"]


def test_a_metric_that_the_checkpoint_does_not_know_is_named() -> None:
    state = MetricsCB(accuracy=accuracy).state_dict()
    with pytest.raises(ValueError, match=r"a metric 'recall', .* but of 'accuracy'"):
        MetricsCB(accuracy=accuracy, recall=accuracy).load_state_dict(state)


def test_no_graph_is_kept_by_what_a_function_chooses() -> None:
    stored = []

    class Stores(OwnAccuracy):
        def update(self, *args: Any) -> None:
            stored.append(args)

        def compute(self) -> float:
            return 0.0

    metrics = MetricsCB(
        pair=(Stores(), lambda learner: ({"logits": learner.preds}, [learner.loss])),
        plain=Stores(),
    )
    four_kinds(metrics).run(1, valid=False)
    for args in stored:
        tensors: list[torch.Tensor] = []
        map_tensors(args, tensors.append)
        assert len(tensors) == 2
        assert not any(t.requires_grad for t in tensors)

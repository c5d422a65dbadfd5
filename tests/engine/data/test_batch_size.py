"""The size of a batch: samples are counted, never channels, time steps or nodes of a graph."""

from __future__ import annotations

import math
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import CleanupEpoch
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset, TensorDataset

zeros = torch.zeros


def ints(*shape: int) -> torch.Tensor:
    return zeros(*shape, dtype=torch.long)


def image(height: int = 4, width: int = 5, channels: int = 3) -> torch.Tensor:
    return zeros(channels, height, width)


def boxes(n: int) -> dict[str, torch.Tensor]:
    return {"boxes": zeros(n, 4), "labels": ints(n)}


def packed(n: int) -> PackedSequence:
    return pack_sequence([zeros(length, 2) for length in range(n, 0, -1)])


def jagged(*lengths: int) -> torch.Tensor:
    parts = [zeros(length, 2) for length in lengths]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


Row = namedtuple("Row", "x y")  # as default_collate returns it


@dataclass
class Columns:
    x: torch.Tensor
    y: torch.Tensor
    name: str = "columns"


class Graphs:
    """As torch_geometric's Batch: the nodes of all graphs in one tensor."""

    num_graphs = 5

    def __init__(self) -> None:
        self.x, self.edge_index, self.y = zeros(30, 2), ints(2, 60), zeros(5)

    def __len__(self) -> int:
        return 3  # its attributes


class Holder:
    """An object with attributes."""

    def __init__(self, **parts: Any) -> None:
        vars(self).update(parts)


class Sized:
    __slots__ = ()

    def __len__(self) -> int:
        return 7


class Opaque:
    __slots__ = ()


TEXTS = ("one", "two", "three")
CERTAIN: dict[str, tuple[Any, int]] = {
    "inputs and targets": ((zeros(8, 3), zeros(8)), 8),
    "in a list": ([zeros(8, 3), zeros(8)], 8),
    "of one shape": ((zeros(8, 1), zeros(8, 1)), 8),
    "with weights per sample": ((zeros(8, 3), zeros(8, 1), zeros(8, 1)), 8),
    "three of one shape, as triplets": ((zeros(8, 3, 4, 4),) * 3, 8),
    "tokens, mask and labels": ([ints(8, 16)] * 3, 8),
    "three images of another number": ((zeros(8, 4, 5), zeros(8, 4, 5), zeros(8, 1, 5)), 8),
    "a tensor": (zeros(8, 3), 8),
    "a scalar": (torch.tensor(3), 1),
    "a tuple of one": ((zeros(8, 3),), 8),
    "a mapping": ({"x": zeros(8, 3), "y": zeros(8)}, 8),
    "a mapping with a scalar": ({"temperature": zeros(()), "x": zeros(8, 3)}, 8),
    "a mapping with strings": ({"texts": TEXTS, "y": zeros(3)}, 3),
    "a mapping with something else": ({"epoch": 3, "x": zeros(8, 3), "name": "a"}, 8),
    "a namedtuple": (Row(zeros(8, 3), zeros(8)), 8),
    "a dataclass": (Columns(zeros(8, 3), zeros(8)), 8),
    "an object": (Holder(x=zeros(8, 3), y=zeros(8)), 8),
    "arrays": ((zeros(8, 3).numpy(), zeros(8).numpy()), 8),
    "no targets": ((zeros(8, 3), None), 8),
    "several inputs": ([[zeros(8, 3), zeros(8, 2)], zeros(8)], 8),
    "several inputs and targets": ([[zeros(8, 3), zeros(8, 2)], [zeros(8), zeros(8)]], 8),
    "padded sequences": (((zeros(8, 5, 2), ints(8)), (ints(8, 7), ints(8))), 8),
    "crops": ([[zeros(8, 3, 4, 4)] * 4, zeros(8)], 8),
    "mappings of inputs and of targets": (({"x": zeros(8, 3)}, {"y": zeros(8)}), 8),
    "strings and labels": ([TEXTS, zeros(3)], 3),
    "strings": (list(TEXTS), 3),
    "objects and labels": (([Opaque()] * 3, zeros(3)), 3),
    "images and what is in them": ((tuple([image()] * 4), tuple(map(boxes, range(4)))), 4),
    "as many boxes as images": (([image()] * 2, [boxes(2), boxes(2)]), 2),
    "images of different sizes and boxes": (([image(n) for n in (4, 7)], [boxes(2)] * 2), 2),
    "two images with unequal boxes": (((image(4, 5), image(4, 7)), (boxes(2), boxes(0))), 2),
    "two samples in mappings": ([{"image": image(), **boxes(n)} for n in (2, 0)], 2),
    "one image": (((image(),), (boxes(1),)), 1),
    "images and labels": (([image()] * 4, zeros(4)), 4),
    "images and masks": ((tuple([image()] * 4), tuple([image(channels=1)] * 4)), 4),
    "images and integers": ((tuple([image()] * 4), (5, 2, 1, 0)), 4),
    "samples of an image and a label": ([(image(), 1)] * 5, 5),
    "samples of an image and a scalar": ([[image(), torch.tensor(1)]] * 5, 5),
    "samples of an image and boxes": ([(image(), boxes(n)) for n in range(5)], 5),
    "samples in mappings": ([{"image": image(), **boxes(n)} for n in range(4)], 4),
    "samples in mappings, of one length": ([{"a": ints(5), "b": ints(5)}] * 4, 4),
    "point clouds": ([zeros(n, 3) for n in (5, 9, 2)], 3),
    "token sequences": ([ints(n) for n in (5, 9, 2)], 3),
    "a packed sequence": (packed(4), 4),
    "a packed sequence and labels": ((packed(4), zeros(4)), 4),
    "two packed sequences": ((packed(3), packed(3)), 3),
    "a nested tensor": ((jagged(3, 5), zeros(2)), 2),
    "a sparse tensor": ((torch.eye(4).to_sparse(), zeros(4)), 4),
    "graphs": (Graphs(), 5),
    "graphs and labels": ((Graphs(), zeros(5)), 5),
    "an object with a batch_size": (Holder(batch_size=6, x=zeros(30, 2)), 6),
    "nothing": ([], 0),
    "no rows": ((zeros(0, 3), zeros(0)), 0),
}

GUESSED: dict[str, tuple[Any, int, str]] = {
    "images of different sizes": ([image(n, n + 1) for n in range(1, 6)], 5, "3 or 5"),
    "many tensors of one shape": ([image()] * 8, 3, "3 or 8"),
    "pairs of images": ([(image(), image())] * 5, 5, "2 or 5"),
    "gray images and masks": (([image(channels=1)] * 4, [image(channels=1)] * 4), 4, "1 or 4"),
    "two mappings of the same keys": (({"x": zeros(8, 3)}, {"x": zeros(8)}), 2, "8 or 2"),
    "time steps first": ((zeros(9, 4, 2), ints(4)), 4, "second dimension"),
    "two with time steps first": ((ints(9, 4), ints(7, 4)), 4, "second dimension"),
    "weights of the classes": ((zeros(8, 3), zeros(8), zeros(10)), 8, "differ in length (8, 10)"),
    "the same in a mapping": ({"x": zeros(8, 3), "w": zeros(10)}, 8, "differ in length (8, 10)"),
    "an image that is not in a batch": ((image(), 3), 1, "single value"),
    "another with a scalar": ((image(), torch.tensor(3)), 1, "single value"),
    "an object with a length": (Sized(), 7, "length of a Sized"),
    "an object without": (Opaque(), 1, "nothing in a Opaque says"),
    "objects in a list": ([Opaque()] * 3, 3, "each Opaque in it may be"),
    "a mapping of scalars": ({"a": zeros(())}, 1, "nothing in a dict says"),
}


def learner_for(*batches: Any, forward: Callable[[Any], Any] | None = None) -> TrainLearner:
    """A learner whose loss is the mean of what `forward` makes of the inputs."""

    class Model(nn.Module):
        def forward(self, x: Any) -> Any:
            return zeros(()) if forward is None else forward(x)

    loader = batches[0] if len(batches) == 1 else list(batches)
    return TrainLearner(Model(), DataLoaders(valid=loader), lambda preds, _: preds.mean())


def guesses(logs: Any) -> list[Any]:
    return [log for log in logs if log["event"] == "batch_size_is_a_guess"]


@pytest.mark.parametrize("name", CERTAIN)
def test_samples_are_counted(name: str) -> None:
    batch, n = CERTAIN[name]
    learner = TrainLearner(nn.Identity())
    with capture_logs() as logs:
        assert learner.batch_size(batch) == n
    assert logs == []


@pytest.mark.parametrize("name", GUESSED)
def test_a_guess_is_logged_with_the_way_to_say_it(name: str) -> None:
    batch, n, reason = GUESSED[name]
    learner = TrainLearner(nn.Identity())
    with capture_logs() as logs:
        assert learner.batch_size(batch) == n
        assert learner.batch_size(batch) == n
    (log,) = logs
    assert log["event"] == "batch_size_is_a_guess"
    assert log["log_level"] == "warning"
    assert log["size"] == n
    assert reason in log["reason"]
    assert "batch_size(self, batch)" in log["hint"]


def test_a_guess_is_logged_once_per_fit(backend: dict[str, Any]) -> None:
    batches = [(zeros(8, 3), zeros(8), zeros(10))] * 3
    learner = learner_for(batches)
    for _ in range(2):
        with capture_logs() as logs:
            learner.run(2, train=False, cbs=MetricsCB(), **backend)
        assert len(guesses(logs)) == 1


# ------------------------------------------------------------------ what is weighed and counted


def numbers(learner: TrainLearner) -> tuple[float, int]:
    """The loss of one validating epoch, and the number of its samples."""
    metrics, counted = MetricsCB(), []
    learner.subscribe(CleanupEpoch, lambda event: counted.append(event.n_samples))
    learner.run(1, train=False, cbs=metrics)
    return metrics.history[0]["loss"], counted[0]


def test_images_that_are_not_collated_weigh_one_each() -> None:
    values = (1.0, 1.0, 1.0, 1.0, 11.0)
    data: Any = [(torch.full((3, 2, 2), value), {"labels": zeros(1)}) for value in values]
    loader = DataLoader(data, 4, collate_fn=lambda batch: tuple(zip(*batch, strict=True)))
    learner = learner_for(loader, forward=lambda x: torch.stack([i.mean() for i in x]))
    assert numbers(learner) == (3.0, 5)


def test_packed_sequences_weigh_one_each() -> None:
    short, long = [torch.ones(1, 1)] * 2, [torch.full((9, 1), 11.0)] * 2
    learner = learner_for(
        (pack_sequence(short), zeros(2)),
        (pack_sequence(long), zeros(2)),
        forward=lambda x: pad_packed_sequence(x)[0][0],
    )
    assert numbers(learner) == (6.0, 4)


def test_graphs_weigh_one_each() -> None:
    class Some(Holder):
        """As many graphs as it is said, with as many nodes as there are values."""

    batches = [
        (Some(num_graphs=3, x=torch.full((4,), 1.0)), zeros(3)),
        (Some(num_graphs=1, x=torch.full((40,), 5.0)), zeros(1)),
    ]
    learner = learner_for(batches, forward=lambda graphs: graphs.x)
    assert numbers(learner) == (2.0, 4)


def test_a_batch_of_no_samples_does_not_make_the_loss_nan() -> None:
    learner = learner_for(
        (torch.ones(2, 1), zeros(2)), (zeros(0, 1), zeros(0)), forward=lambda x: x
    )
    assert numbers(learner) == (1.0, 2)


class Tokens(TrainLearner):
    """Counts what is not padded."""

    def batch_size(self, batch: Any) -> int:
        return int((batch[0] > 0).sum())


def test_a_learner_may_count_in_its_own_way() -> None:
    batches = [
        (torch.tensor([[1.0, 1.0], [1.0, 0.0]]), zeros(2)),
        (torch.tensor([[7.0]]), zeros(1)),
    ]
    learner = Tokens(nn.Identity(), DataLoaders(valid=batches), lambda p, _: p[p > 0].mean())
    with capture_logs() as logs:
        assert numbers(learner) == ((3 * 1 + 7) / 4, 4)
    assert guesses(logs) == []


@pytest.mark.parametrize(
    ("size", "error", "message"),
    [
        (None, TypeError, "batch_size(batch) returned None for batch 0 of dls.valid: return the"),
        (1.5, TypeError, "batch_size(batch) returned 1.5 for batch 0"),
        (-1, ValueError, "batch_size(batch) returned -1 for batch 0"),
    ],
)
def test_a_size_that_is_not_a_number_of_samples_is_refused(
    size: Any, error: type[Exception], message: str
) -> None:
    class Wrong(TrainLearner):
        def batch_size(self, batch: Any) -> Any:
            return size

    learner = Wrong(nn.Identity(), DataLoaders(valid=[(zeros(2), zeros(2))]))
    with pytest.raises(error) as raised:
        learner.run(1, train=False)
    assert str(raised.value).startswith(message)


def test_a_size_may_be_an_integer_of_another_kind() -> None:
    class Counting(TrainLearner):
        def batch_size(self, batch: Any) -> Any:
            return torch.tensor(len(batch[0]))

    learner = Counting(nn.Identity(), DataLoaders(valid=[(zeros(2), zeros(2))]))
    learner.run(1, train=False)
    assert type(learner.n_samples) is int
    assert learner.n_samples == 2


# ----------------------------------------------------------------------- a loss that is a sum


class Halves(Dataset[Any]):
    def __len__(self) -> int:
        return 10

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((3,), float(i)), torch.tensor([i / 2])


def per_sample(model: nn.Module) -> torch.Tensor:
    """The squared error of each sample, in plain PyTorch."""
    x, y = next(iter(DataLoader(Halves(), 10)))
    with torch.no_grad():
        return F.mse_loss(model(x), y, reduction="none").flatten()


class Bound(nn.MSELoss):
    """A module of which a method is the loss function."""


@pytest.mark.parametrize(
    "loss_func",
    [
        nn.MSELoss(reduction="sum"),
        partial(F.mse_loss, reduction="sum"),
        partial(partial(F.mse_loss, reduction="sum"), weight=None),
        partial(nn.MSELoss(reduction="sum")),
        Bound(reduction="sum").forward,
        nn.MSELoss(),
        F.mse_loss,
        lambda preds, targets: F.mse_loss(preds, targets),
    ],
    ids=["module", "partial", "nested", "of a module", "method", "mean", "function", "lambda"],
)
async def test_the_loss_of_an_epoch_is_the_mean_over_its_samples(loss_func: Any) -> None:
    """G19: the batches are of 4, 4 and 2."""
    loader, metrics = DataLoader(Halves(), 4), MetricsCB()
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(loader, loader), loss_func)
    expected = pytest.approx(per_sample(learner.model).mean().item(), rel=1e-6)
    assert await learner.validate() == {"loss": expected}
    await learner.fit(1, train=False, cbs=metrics)
    assert metrics.history[0]["loss"] == expected


@pytest.mark.parametrize("loss_func", [nn.MSELoss(reduction="sum"), F.mse_loss])
def test_that_it_is_a_sum_is_logged(loss_func: Any) -> None:
    loader = DataLoader(Halves(), 4)
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(loader), loss_func, 1e-6)
    with capture_logs() as logs:
        learner.run(2, valid=False, cbs=MetricsCB())
    sums = [log for log in logs if log["event"] == "loss_is_a_sum"]
    assert len(sums) == (loss_func is not F.mse_loss)
    assert all("MetricsCB(loss='mean')" in log["hint"] for log in sums)


def test_what_the_loss_is_can_be_said() -> None:
    """A learner that sums, and one that divides by itself what loss_func has summed."""
    loader = DataLoader(Halves(), 4)
    model = nn.Linear(3, 1)

    class Divides(TrainLearner):
        def get_loss(self) -> None:
            super().get_loss()
            self.loss = self.loss / len(self.preds)

    learners = [
        (TrainLearner, lambda p, y: F.mse_loss(p, y) * len(p), MetricsCB(loss="sum")),
        (Divides, nn.MSELoss(reduction="sum"), MetricsCB(loss="mean")),
    ]
    for learner_class, loss_func, metrics in learners:
        learner = learner_class(model, DataLoaders(valid=loader), loss_func, cbs=metrics)
        learner.run(1, train=False)
        mean = per_sample(model).mean().item()
        assert metrics.history[0]["loss"] == pytest.approx(mean, rel=1e-6)


async def test_a_loss_that_is_not_a_number_need_not_be_recorded() -> None:
    """Such as the losses of a GAN, or one per sample."""
    torcheval = pytest.importorskip("torcheval.metrics")
    metrics = MetricsCB(loss=None, error=torcheval.MeanSquaredError())
    learner = TrainLearner(
        nn.Linear(3, 1),
        DataLoaders(valid=DataLoader(Halves(), 4)),
        partial(F.mse_loss, reduction="none"),
        cbs=metrics,
    )
    await learner.fit(1, train=False)
    (row,) = metrics.history
    assert list(row) == ["epoch", "train", "error"]
    assert row["error"] == pytest.approx(per_sample(learner.model).mean().item(), rel=1e-6)
    assert list(await learner.validate()) == ["error"]
    assert math.isfinite(row["error"])


@pytest.mark.parametrize("loss", ["max", "none", True, 0])
def test_a_kind_of_loss_that_there_is_not_is_refused(loss: Any) -> None:
    with pytest.raises(ValueError, match=r"loss=.*choose 'auto', 'mean', 'sum' or None"):
        MetricsCB(loss=loss)


def test_metrics_of_several_outputs_say_what_to_do() -> None:
    torcheval = pytest.importorskip("torcheval.metrics")

    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    learner = TrainLearner(
        Two(3, 1),
        DataLoaders(valid=DataLoader(TensorDataset(zeros(4, 3), zeros(4, 1)), 2)),
        lambda preds, y: F.mse_loss(preds[0], y),
        cbs=MetricsCB(torcheval.MeanSquaredError()),
    )
    with pytest.raises(TypeError, match=r"learner\.preds is a tuple of 2: say what"):
        learner.run(1, train=False)


@pytest.mark.parametrize("n", range(1, 6))
def test_three_columns_of_one_length_are_no_images(n: int) -> None:
    learner = TrainLearner(nn.Linear(3, 1))
    sequences, lengths, targets = torch.zeros(n, 5, 2), torch.zeros(n), torch.zeros(n)
    assert learner.batch_size([sequences, lengths, targets]) == n
    assert learner.batch_size((sequences, torch.zeros(n, 7, 3), torch.zeros(n, 7, 3))) == n

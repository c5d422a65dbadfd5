"""The length of a loader is a hint: it may be missing, wrong, or slow to ask."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB, GradientAccumulationCB
from eventrain.engine import DataLoaders, Prefetcher, TensorLoader, TrainLearner
from eventrain.engine.data.dataloaders import has_exact_length, length_of
from eventrain.events import AfterBatch, BeforeEpoch, CleanupEpoch, CleanupStep
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.support.training import line_model, weights

LR = 0.05
Batch = tuple[torch.Tensor, torch.Tensor]


def data(n: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(4, 3, generator=generator), torch.randn(4, 1, generator=generator))
        for _ in range(n)
    ]


class Told:
    """A loader that says how many batches it has; each time it is asked, that is counted."""

    def __init__(self, batches: list[Batch], length: Any) -> None:
        self.batches, self.length, self.asked = batches, length, 0

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)

    def __len__(self) -> int:
        self.asked += 1
        if isinstance(self.length, type):
            raise self.length("undefined")
        return self.length


ERRORS = [TypeError, NotImplementedError, ValueError, AttributeError, RuntimeError, KeyError]


@pytest.mark.parametrize("error", ERRORS)
def test_a_length_that_cannot_be_told_is_not_there(
    error: type[Exception], backend: dict[str, Any]
) -> None:
    """As of torch_geometric's DynamicBatchSampler, which raises a ValueError."""
    lengths: list[Any] = []
    loader = Told(data(2), error)
    learner = TrainLearner(line_model(), DataLoaders(loader, loader))
    learner.subscribe(BeforeEpoch, lambda event: lengths.append(event.n_iter))
    result = learner.run(2, **backend)
    assert (result.status, result.batches, result.valid_batches) == ("completed", 4, 4)
    assert lengths == [None] * 4


def test_one_that_is_too_large_or_negative_is_not_there_either() -> None:
    assert [length_of(Told([], n)) for n in (-1, 2**70, 1.5)] == [None] * 3


def test_the_length_is_asked_once_per_epoch(backend: dict[str, Any]) -> None:
    """It may have to read an index, or the whole of a file."""
    train, valid = Told(data(3), 3), Told(data(2), 2)
    learner = TrainLearner(line_model(), DataLoaders(train, valid))
    learner.run(1, **backend)
    assert (train.asked, valid.asked) == (1, 1)
    learner.run(3, **backend)
    assert (train.asked, valid.asked) == (1 + 3, 1 + 3)


def test_a_length_that_was_asked_is_of_that_loader() -> None:
    """A callback may replace the loaders before the first epoch."""
    learner = TrainLearner(line_model(), DataLoaders(Told(data(3), 3)))
    others = DataLoaders(Told(data(1), 1))
    lengths: list[Any] = []

    class Replace(GradientAccumulationCB):
        def before_fit(self, event: Any) -> None:
            event.learner.dls = others

    learner.subscribe(BeforeEpoch, lambda event: lengths.append(event.n_iter))
    learner.run(1, valid=False, cbs=Replace(1))
    assert lengths == [1]
    assert learner.lengths == {}


@pytest.mark.parametrize(("told", "n"), [(2, 4), (4, 4), (6, 4)])
def test_a_length_that_was_exceeded_is_not_told_any_more(told: int, n: int) -> None:
    seen: list[Any] = []
    learner = TrainLearner(line_model(), DataLoaders(Told(data(n), told)))
    learner.subscribe(AfterBatch, lambda event: seen.append(event.n_iter))
    learner.subscribe(CleanupEpoch, lambda event: seen.append(event.n_iter))
    learner.run(2, valid=False)
    assert seen == ([2, 2, None, None, None] if told == 2 else [told] * 5) * 2


# -------------------------------------------------------------------------------- accumulation


def by_hand(batches: list[Batch], n: int) -> tuple[torch.Tensor, int]:
    """Steps on groups of n batches, each as one big batch would make it, in plain PyTorch."""
    model = line_model()
    opt = torch.optim.SGD(model.parameters(), LR)
    groups = [batches[i : i + n] for i in range(0, len(batches), n)]
    for group in groups:
        opt.zero_grad()
        for x, y in group:
            (F.mse_loss(model(x), y) / len(group)).backward()
        opt.step()
    return weights(model), len(groups)


@pytest.mark.parametrize("wrap", [lambda loader: loader, Prefetcher], ids=["plain", "prefetched"])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("n_batches", range(1, 8))
def test_accumulation_makes_its_groups_whatever_the_length_says(
    n_batches: int, n: int, wrap: Any
) -> None:
    batches = data(n_batches)
    expected, steps = by_hand(batches, n)
    for told in range(1, n_batches + 3):
        learner = TrainLearner(
            line_model(),
            DataLoaders(wrap(Told(batches, told))),
            lr=LR,
            cbs=GradientAccumulationCB(n),
        )
        result = learner.run(1, valid=False)
        assert (result.batches, result.steps) == (n_batches, steps)
        if told == n_batches:
            assert torch.equal(weights(learner.model), expected)
        else:
            assert torch.allclose(weights(learner.model), expected, rtol=1e-5, atol=1e-6)


class Sharded(IterableDataset[Any]):
    """12 samples, shared out among workers that each have a last batch of their own."""

    def __len__(self) -> int:
        return 12

    def __iter__(self) -> Iterator[Any]:
        for worker in range(3):
            for i in range(worker, 12, 3):
                yield torch.full((3,), float(i)), torch.ones(1)


def test_an_iterable_dataset_may_have_more_batches_than_samples_say() -> None:
    class Uneven(DataLoader[Any]):
        """As with three workers: 4 batches by its length, 6 in fact."""

        def __iter__(self) -> Any:
            return iter([batch for pair in super().__iter__() for batch in pair.split(2)])

    loader = Uneven(Sharded(), 4, collate_fn=lambda b: torch.stack([x for x, _ in b]))
    assert (len(loader), len(list(loader))) == (3, 6)

    class Squares(TrainLearner):
        def get_loss(self) -> None:
            self.loss = self.preds.square().mean()

        def predict(self) -> None:
            self.preds = self.model(self.batch)

    learner = Squares(line_model(), DataLoaders(loader), lr=1e-4, cbs=GradientAccumulationCB(3))
    result = learner.run(1, valid=False)
    assert (result.batches, result.steps) == (6, 2)


@pytest.mark.parametrize("exact", [True, False])
def test_the_last_step_is_in_the_last_batch_where_its_end_is_certain(exact: bool) -> None:
    batches = data(4)
    steps: list[Any] = []
    learner = TrainLearner(line_model(), DataLoaders(batches if exact else Told(batches, 4)), lr=LR)
    learner.add_cbs(GradientAccumulationCB(3))
    learner.subscribe(CleanupStep, lambda event: steps.append(event.end.status))
    learner.run(1, valid=False)
    waits = ["cancelled"]
    assert steps == [*waits * 2, "completed", *waits * (not exact), "completed"]


class Own(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(4))

    def __len__(self) -> int:
        return 2


class OwnBatches(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 1], [2, 3, 4])


def test_whose_length_is_exact() -> None:
    rows = TensorDataset(torch.zeros(8, 3), torch.zeros(8))
    exact = [
        [1],
        (1,),
        DataLoader(rows, 2),
        DataLoader(rows, 2, shuffle=True, drop_last=True, num_workers=2),
        DataLoader(rows, None),
        DataLoader(rows, 2, sampler=SubsetRandomSampler(range(4))),
        DataLoader(rows, sampler=WeightedRandomSampler([1.0] * 8, 4)),
        DataLoader(rows, batch_sampler=BatchSampler(SequentialSampler(rows), 3, False)),
        DataLoader(rows, batch_sampler=[[0, 1], [2]]),  # type: ignore[arg-type]
        TensorLoader(torch.zeros(8)),
        Prefetcher(DataLoader(rows, 2)),
    ]
    hints = [
        Told([], 2),
        iter([1]),
        DataLoader(Sharded(), 3),
        DataLoader(rows, 2, sampler=Own()),
        DataLoader(rows, batch_sampler=OwnBatches()),
        DataLoader(rows, batch_sampler=BatchSampler(Own(), 2, False)),
        type("Other", (DataLoader,), {})(rows, 2),
        Prefetcher(Told([], 2)),
    ]
    assert [has_exact_length(loader) for loader in exact] == [True] * len(exact)
    assert [has_exact_length(loader) for loader in hints] == [False] * len(hints)


# -------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("told", [2, 4, 6])
async def test_a_run_resumes_after_the_batches_that_were_told(told: int, tmp_path: Any) -> None:
    batches = data(4)

    def learner() -> TrainLearner:
        cbs = [GradientAccumulationCB(3), CheckpointCB(tmp_path, every_batches=1, keep_last=20)]
        return TrainLearner(line_model(), DataLoaders(Told(batches, told)), lr=LR, cbs=cbs)

    whole = learner()
    await whole.fit(1, valid=False)
    folder = sorted(tmp_path.iterdir())
    assert folder
    for path in folder:
        again = learner()
        result = await again.fit(1, valid=False, resume=path)
        assert result.steps == 2
        assert torch.equal(weights(again.model), weights(whole.model)), path

"""Resuming in the middle of an epoch: no batch is repeated, and none is left out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from eventrain.engine import (
    AsyncLoader,
    DataLoaders,
    Position,
    Prefetcher,
    TensorLoader,
    ThreadLoader,
)
from eventrain.engine.checkpoint.loader_position import resume_strategy, skip_to
from eventrain.engine.checkpoint.random_state import random_state, set_random_state
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from tests.support.sources import Awaited

N = 11
ASYNC = (
    "an async source is asked again for the batches that were used before, which may not be the"
    " same; those that were read ahead are lost"
)


class Numbers(Dataset[int]):
    """The numbers below N; remembers which of them were read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: Any) -> Any:
        self.read += i if isinstance(i, list) else [i]
        return torch.tensor(i)


class Noisy(Numbers):
    """And draws a random number for each."""

    def __getitem__(self, i: int) -> Any:
        return super().__getitem__(i) + torch.rand(()) + random.random()


class Stream(IterableDataset[int]):
    def __init__(self, n: int = N) -> None:
        self.n = n

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(self.n).tolist())


class Eager(Sampler[int]):
    """One that draws its order when it is iterated, not with its first index."""

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(N).tolist())


class EagerBatches(Sampler[list[int]]):
    def __iter__(self) -> Iterator[list[int]]:
        return iter(torch.randperm(N)[:10].view(5, 2).tolist())


class Python(Sampler[int]):
    def __iter__(self) -> Iterator[int]:
        yield from random.sample(range(N), N)


class OneByOne:
    """A loader with nothing but `__getitem__`, as iteration had it once."""

    def __getitem__(self, i: int) -> torch.Tensor:
        if i >= 5:
            raise IndexError
        return torch.tensor(i)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


SKIPPED: dict[str, Callable[[Dataset[Any]], Any]] = {
    "in order": lambda data: DataLoader(data, 2),
    "in order, drop_last": lambda data: DataLoader(data, 2, drop_last=True),
    "shuffled": lambda data: DataLoader(data, 2, shuffle=True),
    "shuffled, own generator": lambda data: DataLoader(data, 2, True, generator=generator()),
    "one by one": lambda data: DataLoader(data, batch_size=None, shuffle=True),
    "replacement": lambda data: DataLoader(
        data, 2, sampler=RandomSampler(data, replacement=True, num_samples=40)
    ),
    "replacement, own generator": lambda data: DataLoader(
        data,
        2,
        sampler=RandomSampler(data, replacement=True, num_samples=40, generator=generator()),
    ),
    "weighted": lambda data: DataLoader(data, 2, sampler=WeightedRandomSampler([1.0] * N, N)),
    "subset": lambda data: DataLoader(data, 2, sampler=SubsetRandomSampler(range(9))),
    "eager": lambda data: DataLoader(data, 2, sampler=Eager()),
    "python": lambda data: DataLoader(data, 2, sampler=Python()),
    "batch sampler": lambda data: DataLoader(
        data, batch_sampler=BatchSampler(RandomSampler(data, generator=generator()), 2, False)
    ),
    "eager batch sampler": lambda data: DataLoader(data, batch_sampler=EagerBatches()),
    "batches by the dataset": lambda data: DataLoader(
        data, batch_size=None, sampler=BatchSampler(SequentialSampler(data), 2, False)
    ),
}
PREFETCHED: dict[str, Callable[[], Any]] = {
    "skip": lambda: Prefetcher(DataLoader(Numbers(), 2, shuffle=True)),
    "by threads": lambda: Prefetcher(ThreadLoader(Numbers(), 2, shuffle=True)),
    "replay": lambda: Prefetcher(DataLoader(Stream(), 2)),
    "state": lambda: Prefetcher(Kept()),
}

AGAIN: dict[str, Callable[[Dataset[Any]], Any]] = {
    "list": lambda _: [torch.tensor([2 * i, 2 * i + 1]) for i in range(5)],
    "tuple": lambda _: tuple(torch.tensor([i]) for i in range(5)),
    "by index": lambda _: OneByOne(),
    "iterable dataset": lambda _: DataLoader(Stream(), 2),
}


def seed(n: int) -> None:
    torch.manual_seed(n)
    random.seed(n)


def listed(batches: Any) -> list[Any]:
    return [batch.tolist() for batch in batches]


def whole_and_rest(make: Callable[[], Any], n: int) -> tuple[list[Any], list[Any], Any]:
    """An epoch, what is read on in another process from its n-th batch, and the loader there."""
    seed(1)
    loader = make()
    start = random_state(DataLoaders(loader))
    batches = iter(loader)
    whole = [next(batches).tolist() for _ in range(n)]
    there = random_state(DataLoaders(loader))
    whole += listed(batches)
    seed(2)
    loader = make()
    set_random_state(DataLoaders(loader), start)
    rest = skip_to(loader, n, None)
    set_random_state(DataLoaders(loader), there)
    return whole, listed(rest), loader


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("kind", [*SKIPPED, *AGAIN])
def test_resuming_reads_the_rest_of_the_epoch(kind: str, n: int) -> None:
    make = {**SKIPPED, **AGAIN}[kind]
    whole, rest, loader = whole_and_rest(lambda: make(Numbers()), n)
    assert rest == whole[n:]
    assert resume_strategy(loader).how == ("skip" if kind in SKIPPED else "replay")


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("kind", PREFETCHED)
def test_prefetched_batches_are_resumed_too(kind: str, n: int) -> None:
    whole, rest, _ = whole_and_rest(PREFETCHED[kind], n)
    assert rest == whole[n:]


@pytest.mark.parametrize("kind", sorted(SKIPPED.keys() - {"batches by the dataset"}))
def test_random_numbers_of_the_dataset_continue_too(kind: str) -> None:
    whole, rest, _ = whole_and_rest(lambda: SKIPPED[kind](Noisy()), 2)
    assert rest == whole[2:]
    assert rest != []


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("kind", SKIPPED)
def test_samples_of_skipped_batches_are_not_read(kind: str, n: int) -> None:
    data = Numbers()
    rest = skip_to(SKIPPED[kind](data), n, None)
    assert data.read == []
    batches = [batch.flatten().tolist() for batch in rest]
    assert data.read == [i for batch in batches for i in batch]


@pytest.mark.parametrize("kind", SKIPPED)
def test_the_loader_itself_is_left_as_it_was(kind: str) -> None:
    loader = SKIPPED[kind](Numbers())
    before = dict(vars(loader))
    list(skip_to(loader, 3, None))
    assert vars(loader) == before
    assert len(listed(loader)) == len(listed(loader)) >= 4  # whole epochs, again and again


@pytest.mark.parametrize("data", [Numbers, Noisy])
def test_worker_processes_read_again_and_draw_again(data: Callable[[], Dataset[Any]]) -> None:
    def make() -> Any:
        return DataLoader(data(), 2, shuffle=True, num_workers=2)

    whole, rest, loader = whole_and_rest(make, 3)
    assert rest == whole[3:]
    assert resume_strategy(loader) == ("replay", None)


@pytest.mark.parametrize(
    "make",
    [
        lambda n: DataLoader(range(n), 1),  # type: ignore[arg-type]
        lambda n: DataLoader(range(n), batch_size=None),  # type: ignore[arg-type]
        lambda n: DataLoader(Stream(n), 1),
        lambda n: list(range(n)),
        lambda n: (i for i in range(n)),
    ],
)
def test_a_loader_that_has_become_shorter_is_refused(make: Callable[[int], Any]) -> None:
    with pytest.raises(ValueError, match=r"4 batches of this epoch .* it has only 3"):
        skip_to(make(3), 4, None)
    assert list(skip_to(make(4), 4, None)) == []


class Kept:
    """A loader that keeps its place itself, as torchdata's does."""

    def __init__(self) -> None:
        self.place = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        place, self.place = self.place, 0
        for i in range(place, 5):
            self.place = i + 1
            yield torch.tensor(i)

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


def test_a_loader_that_keeps_its_place_is_asked_for_it() -> None:
    loader = Kept()
    batches = iter(loader)
    assert [int(next(batches)) for _ in range(3)] == [0, 1, 2]
    state = loader.state_dict()
    assert resume_strategy(Kept()) == ("state", None)
    assert listed(skip_to(Kept(), 3, state)) == [3, 4]


class Workers(Kept):
    num_workers = 2


class Half:
    """`state_dict` without `load_state_dict`: nothing to go back to."""

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def state_dict(self) -> dict[str, int]:
        return {}


@pytest.mark.parametrize(
    ("make", "how", "caveat"),
    [
        (lambda: DataLoader(Numbers()), "skip", None),
        (
            lambda: DataLoader(Numbers(), sampler=Python()),
            "skip",
            "the order of Python may depend on state that is not saved",
        ),
        (lambda: [1, 2], "replay", None),
        (lambda: DataLoader(Numbers(), num_workers=1), "replay", None),
        (
            lambda: DataLoader(Numbers(), num_workers=1, persistent_workers=True),
            "replay",
            "its persistent workers keep their random states over epochs",
        ),
        (
            lambda: DataLoader(Stream()),
            "replay",
            "its dataset is an IterableDataset, which may not yield the same samples again",
        ),
        (lambda: iter([1]), "replay", "list_iterator may not yield the same batches again"),
        (lambda: Awaited([1]), "replay", ASYNC),
        (lambda: AsyncLoader(Awaited([1])), "replay", ASYNC),
        (Half, "replay", "Half may not yield the same batches again"),
        (Workers, "state", "the random states of its workers are not in its state"),
        (lambda: TensorLoader(torch.ones(3)), "skip", None),
        (lambda: ThreadLoader(Numbers()), "skip", None),
        (lambda: Prefetcher(ThreadLoader(Numbers())), "skip", None),
        (lambda: Prefetcher([1, 2]), "replay", None),
        (lambda: Prefetcher(DataLoader(Numbers())), "skip", None),
        (
            lambda: Prefetcher(Kept()),
            "replay",
            "a Prefetcher reads its loader ahead of the training",
        ),
    ],
)
def test_it_is_known_of_which_loaders_one_cannot_know(
    make: Callable[[], Any], how: str, caveat: str | None
) -> None:
    assert resume_strategy(make()) == (how, caveat)


def test_a_class_derived_from_the_loader_may_do_anything() -> None:
    class Mine(DataLoader[int]):
        pass

    assert resume_strategy(Mine(Numbers())) == (
        "replay",
        "Mine may not yield the same batches again",
    )


def test_the_loaders_of_accelerate_read_ahead() -> None:
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.Accelerator(cpu=True).prepare(DataLoader(Numbers(), 2))
    assert resume_strategy(loader) == (
        "replay",
        "accelerate's loaders read one batch ahead of the training",
    )
    assert listed(skip_to(loader, 4, None)) == [[8, 9], [10]]


@pytest.mark.parametrize(
    ("position", "beyond", "within"),
    [
        (Position(), [], []),
        (Position(0, True, 3), [], [(0, True)]),
        (Position(0, False), [(0, True)], []),
        (Position(0, False, 2), [(0, True)], [(0, False)]),
        (Position(1, True), [(0, True), (0, False)], []),
        (Position(1, True, 1), [(0, True), (0, False)], [(1, True)]),
        (Position(1, False, 1), [(0, True), (0, False), (1, True)], [(1, False)]),
    ],
)
def test_a_position_has_what_is_done_and_what_was_begun(
    position: Position, beyond: list[Any], within: list[Any]
) -> None:
    parts = [(epoch, training) for epoch in (0, 1) for training in (True, False)]
    assert [part for part in parts if position.is_beyond(*part)] == beyond
    assert [part for part in parts if position.is_within(*part)] == within

"""The random states: all of them, and back."""

from __future__ import annotations

import io
import random
import sys
from typing import Any

import numpy
import pytest
import torch
from eventrain.engine import DataLoaders
from eventrain.engine.checkpoint.random_state import (
    generators,
    random_state,
    random_state_differs,
    set_random_state,
)
from eventrain.engine.checkpoint.snapshot import Snapshot
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

DATA = TensorDataset(torch.arange(10))


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(dls: Any) -> list[float]:
    """A number of every source there is; normal ones, which leave half of a pair behind."""
    drawn = [random.random(), random.gauss(0, 1), numpy.random.rand(), numpy.random.normal()]
    drawn += [torch.rand(()).item(), torch.randn(()).item()]
    if torch.cuda.is_available():
        drawn.append(torch.rand((), device="cuda").item())
    return drawn + [torch.rand((), generator=own).item() for own in generators(dls)]


def some_loaders() -> DataLoaders:
    train = DataLoader(DATA, 2, sampler=RandomSampler(DATA, generator=generator(1)))
    return DataLoaders(train, DataLoader(DATA, 2, generator=generator(2)))


@pytest.mark.parametrize("n", [0, 1, 2])
def test_every_source_goes_back_to_where_it_was(n: int) -> None:
    dls = some_loaders()
    for _ in range(n):  # an odd number of normal ones leaves one behind
        draw(dls)
    state = random_state(dls)
    drawn = [draw(dls) for _ in range(3)]
    for _ in range(2):
        set_random_state(dls, state)
        assert [draw(dls) for _ in range(3)] == drawn
    assert len(drawn[0]) >= 8


def test_looking_draws_nothing() -> None:
    dls = some_loaders()
    state = random_state(dls)
    drawn = draw(dls)
    set_random_state(dls, state)
    random_state(dls)
    assert random_state_differs(dls, state) is None
    assert draw(dls) == drawn


def test_it_is_written_and_read_as_plain_data() -> None:
    dls = some_loaders()
    state = random_state(dls)
    drawn = draw(dls)
    file = io.BytesIO()
    torch.save(Snapshot(state).wait(), file)
    file.seek(0)
    set_random_state(dls, torch.load(file, weights_only=True))
    assert draw(dls) == drawn


def test_other_loaders_made_in_the_same_way_go_on_with_it() -> None:
    dls, others = some_loaders(), some_loaders()
    draw(dls)
    state = random_state(dls)
    drawn = draw(dls)
    set_random_state(others, state)
    assert draw(others) == drawn


def test_a_library_that_is_not_in_use_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "numpy")
    state = random_state(DataLoaders())
    assert state.keys() - {"cuda", "xpu", "mps"} == {"python", "torch", "generators"}
    assert ("cuda" in state) == torch.cuda.is_initialized()
    monkeypatch.undo()
    torch.rand(1)
    set_random_state(DataLoaders(), state)
    assert torch.equal(torch.get_rng_state(), state["torch"])


ONE, TWO = generator(), generator()


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (None, []),
        ([1, 2], []),
        (DataLoader(DATA), []),
        (DataLoader(DATA, generator=ONE), [ONE]),
        (DataLoader(DATA, shuffle=True, generator=ONE), [ONE]),  # the sampler's, too: once
        (DataLoader(DATA, sampler=RandomSampler(DATA, generator=ONE)), [ONE]),
        (DataLoader(DATA, sampler=WeightedRandomSampler([1.0], 1, generator=ONE)), [ONE]),
        (DataLoader(DATA, sampler=RandomSampler(DATA, generator=ONE), generator=TWO), [TWO, ONE]),
        (DataLoader(DATA, None, sampler=RandomSampler(DATA, generator=ONE)), [ONE]),
        (
            DataLoader(
                DATA, batch_sampler=BatchSampler(RandomSampler(DATA, generator=ONE), 2, False)
            ),
            [ONE],
        ),
        (
            DataLoader(
                DATA, None, sampler=BatchSampler(RandomSampler(DATA, generator=ONE), 2, False)
            ),
            [ONE],
        ),
        (DataLoader(DATA, sampler=SequentialSampler(DATA)), []),
    ],
)
def test_generators_are_found_wherever_a_loader_has_them(loader: Any, expected: list[Any]) -> None:
    assert generators(DataLoaders(loader)) == expected
    assert generators(DataLoaders(None, loader)) == expected
    assert generators(DataLoaders(loader, loader)) == expected  # each of them once


def test_a_sampler_that_refers_to_itself_is_looked_at_once() -> None:
    class Circle:
        def __init__(self) -> None:
            self.sampler = self
            self.generator = ONE

    assert generators(DataLoaders(Circle())) == [ONE]


def test_a_state_of_other_loaders_is_named() -> None:
    with_two, without = random_state(some_loaders()), random_state(DataLoaders())
    assert random_state_differs(some_loaders(), with_two) is None
    assert random_state_differs(some_loaders(), without) == (
        "the loaders have 2 random generators, but the checkpoint has 0"
    )
    assert random_state_differs(DataLoaders(), with_two) == (
        "the loaders have 0 random generators, but the checkpoint has 2"
    )


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_a_state_of_more_devices_is_named(device: str) -> None:
    here = getattr(torch, device).device_count()
    state = {**random_state(DataLoaders()), device: [torch.zeros(1)] * (here + 1)}
    assert random_state_differs(DataLoaders(), state) == (
        f"there are {here} {device} devices, but the checkpoint has {here + 1}"
    )


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="there is such a device")
def test_a_state_of_another_kind_of_device_is_named() -> None:
    state = {**random_state(DataLoaders()), "mps": [torch.zeros(1)]}
    told = "there are 0 mps devices, but the checkpoint has 1"
    assert random_state_differs(DataLoaders(), state) == told

"""seed_everything: one seed for every global random state."""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from eventrain.engine import DataLoaders, TrainLearner, seed_everything
from eventrain.events import BeforeBatch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

VARIABLE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """All that it may touch belongs to the process: put it back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    variable = os.environ.get(VARIABLE)
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    torch.use_deterministic_algorithms(mode, warn_only=warn_only)
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = cudnn
    os.environ.pop(VARIABLE, None)
    if variable is not None:
        os.environ[VARIABLE] = variable


def settings() -> tuple[Any, ...]:
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        torch.backends.cudnn.deterministic,
        os.environ.get(VARIABLE),
    )


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(()).item()


def test_the_same_seed_draws_the_same_from_each_source() -> None:
    seed_everything(7)
    first = draw()
    between = draw()
    seed_everything(7)
    assert draw() == first
    assert all(a != b for a, b in zip(first, between, strict=True))
    seed_everything(8)
    assert all(a != b for a, b in zip(first, draw(), strict=True))


def test_it_seeds_as_each_source_does_by_hand() -> None:
    seed_everything(7)
    assert draw() == (
        random.Random(7).random(),
        np.random.RandomState(7).rand(),
        torch.rand((), generator=torch.Generator().manual_seed(7)).item(),
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA can use")
def test_every_device_is_seeded() -> None:
    def draw_there() -> list[float]:
        n = torch.cuda.device_count()
        return [torch.rand((), device=f"cuda:{i}").item() for i in range(n)]

    seed_everything(7)
    first = draw_there()
    assert draw_there() != first
    seed_everything(7)
    assert draw_there() == first


def test_it_returns_the_seed() -> None:
    assert seed_everything(0) == 0
    assert seed_everything(2**32 - 1) == 2**32 - 1


@pytest.mark.parametrize("seed", [True, False, -1, 2**32, 1.0, "1", None])
def test_what_is_no_seed_is_refused_before_anything_is_seeded(seed: Any) -> None:
    states = random.getstate(), torch.get_rng_state()
    with pytest.raises(ValueError, match=r"seed=.*give an integer from 0 to 2\*\*32 - 1"):
        seed_everything(seed, deterministic=True)
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    assert not torch.are_deterministic_algorithms_enabled()


def test_without_numpy_the_others_are_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seed_everything(7)
    first = draw()
    before = np.random.get_state()[1]
    monkeypatch.setitem(sys.modules, "numpy", None)  # its import is an ImportError now
    seed_everything(7)
    monkeypatch.undo()
    assert (np.random.get_state()[1] == before).all()
    again = draw()
    assert again[1] != first[1]
    assert (again[0], again[2]) == (first[0], first[2])


def test_deterministic_sets_what_torch_has_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    torch.backends.cudnn.benchmark = True
    seed_everything(7, deterministic=True)
    assert settings() == (True, False, True, ":4096:8")
    assert not torch.is_deterministic_algorithms_warn_only_enabled()
    with pytest.raises(RuntimeError, match="deterministic"):
        torch.zeros(3).put_(torch.tensor([0]), torch.tensor([1.0]))


def test_a_workspace_that_is_configured_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":16:8")
    seed_everything(7, deterministic=True)
    assert settings() == (True, False, True, ":16:8")


def test_not_deterministic_leaves_the_settings_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    before = settings()
    seed_everything(7)
    assert settings() == before
    seed_everything(7, deterministic=True)
    chosen = settings()
    seed_everything(8)
    assert settings() == chosen


class Drawn(Dataset[torch.Tensor]):
    """What a worker's own random states say."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(draw())


def test_the_workers_of_a_loader_are_seeded_by_it() -> None:
    def read() -> torch.Tensor:
        seed_everything(7)
        return torch.stack(list(DataLoader(Drawn(), batch_size=None, num_workers=2)))

    first = read()
    assert torch.equal(read(), first)
    assert len(first.unique()) == first.numel()  # and no two draw the same


def test_two_fits_after_the_same_seed_end_with_the_same_weights(backend: dict[str, Any]) -> None:
    """Model, shuffle, dropout and what a callback draws, in the training thread."""

    def fit(seed: int) -> torch.Tensor:
        seed_everything(seed)
        data = TensorDataset(torch.randn(16, 3), torch.randn(16, 1))
        model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        learner = TrainLearner(model, DataLoaders(DataLoader(data, 4, shuffle=True)))

        @learner.on(BeforeBatch)
        def augment(event: BeforeBatch) -> None:
            learner.batch[0].mul_(random.uniform(0.5, 1)).add_(float(np.random.rand()))

        learner.run(2, valid=False, **backend)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = fit(7)
    assert torch.equal(fit(7), first)
    assert not torch.equal(fit(8), first)

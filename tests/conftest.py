"""Fixtures: both backends of anyio, small real data, small models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog
import torch
from eventrain.engine import DataLoaders, TrainLearner
from hypothesis import HealthCheck, settings
from sklearn.datasets import load_digits
from torch import nn

# Of torch one thread, here and in child processes: several, where as many tests run at once as
# there are cores, only spin and wait for each other. What is about more of them asks for them.
if "OMP_NUM_THREADS" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# How long an example takes depends on the machine, and on what else it does.
settings.register_profile("any_speed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any_speed")

BACKENDS = [
    pytest.param(("asyncio", {}), id="asyncio"),
    pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    pytest.param(("trio", {}), id="trio"),
]


@pytest.fixture(params=BACKENDS)
def anyio_backend(request: pytest.FixtureRequest) -> object:
    """Every async test, and every test that asks for a backend, runs on all of them."""
    return request.param


@pytest.fixture
def backend(anyio_backend: tuple[str, dict[str, object]]) -> dict[str, object]:
    """Arguments for `Learner.run` and `anyio.run`."""
    name, options = anyio_backend
    return {"backend": name, "backend_options": options}


@pytest.fixture(autouse=True)
def _seed_and_structlog() -> Iterator[None]:
    torch.manual_seed(0)
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


Batches = list[tuple[torch.Tensor, torch.Tensor]]


@pytest.fixture
def make_batches() -> Callable[..., Batches]:
    """Batches of 4 samples with 3 features and a target that a line fits."""

    def make(n: int = 3, size: int = 4, seed: int = 0) -> Batches:
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(size, 3, generator=generator) for _ in range(n)]
        return [(x, x.sum(1, keepdim=True)) for x in inputs]

    return make


@pytest.fixture
def dls(make_batches: Callable[..., Batches]) -> DataLoaders:
    """Three training batches and two for validation, in memory."""
    return DataLoaders(make_batches(3), make_batches(2, seed=1))


@pytest.fixture
def make_model() -> Callable[[], nn.Module]:
    """A line; the same one every time."""

    def make() -> nn.Module:
        torch.manual_seed(42)
        return nn.Linear(3, 1)

    return make


@pytest.fixture
def learner(make_model: Callable[[], nn.Module], dls: DataLoaders) -> TrainLearner:
    """A line, three training batches and two for validation."""
    return TrainLearner(make_model(), dls)


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """320 of scikit-learn's real digits: images of shape (320, 1, 8, 8) in [0, 1], labels."""
    data = load_digits()
    images = torch.tensor(data.images[:320], dtype=torch.float32)[:, None] / 16
    return images, torch.tensor(data.target[:320])


@pytest.fixture
def make_cnn() -> Callable[[], nn.Module]:
    """The post's CNN; the same weights every time."""

    def make() -> nn.Module:
        torch.manual_seed(42)
        return nn.Sequential(
            nn.Conv2d(1, 8, 3),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )

    return make


@pytest.fixture(scope="session")
def data_folder() -> Path | None:
    """The folder of real Fashion-MNIST images, in torchvision's layout; None if it is nowhere."""
    for folder in (os.environ.get("EVENTRAIN_DATA", "data"), "data", "../shared/data"):
        if Path(folder, "FashionMNIST/raw/train-images-idx3-ubyte").exists():
            return Path(folder).resolve()
    return None


@pytest.fixture(scope="session")
def fashion_mnist(data_folder: Path | None) -> Path:
    """The folder of real Fashion-MNIST images; the test is skipped without it."""
    if data_folder is None:
        pytest.skip("no Fashion-MNIST in ./data; torchvision can download it there")
    return data_folder

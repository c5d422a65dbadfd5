"""G17: what cannot be saved is told of before the first save; what does not change is no state."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, BeforeFit, Callback
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.quasirandom import SobolEngine
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList

BATCHES = [(torch.ones(2, 3), torch.ones(2, 1))] * 4


def told(learner: TrainLearner, folder: Path, **kwargs: Any) -> dict[str, str | None]:
    """What a fit of two epochs says is not saved, and why."""
    with capture_logs() as logs:
        learner.run(2, valid=False, cbs=CheckpointCB(folder, **kwargs))
    lines = [line for line in logs if line["event"] == "state_not_saved"]
    assert [line for line in logs if line not in lines] == []
    return {name: line.get("reason", {}).get(name) for line in lines for name in line["found"]}


def learner_of(model: nn.Module | None = None, dls: Any = BATCHES, **kwargs: Any) -> TrainLearner:
    return TrainLearner(model or nn.Linear(3, 1), DataLoaders(dls), lr=0.1, **kwargs)


# -------------------------------------------------------------------------- where a search ends


class Thing:
    """An object of the user's."""

    def __init__(self, n: int = 0) -> None:
        self.n = n


class Deep:
    def __init__(self, depth: int) -> None:
        self.inner = Deep(depth - 1) if depth else nn.BatchNorm1d(1)


def test_what_is_many_levels_deep_is_saved(tmp_path: Path) -> None:
    learner = learner_of()
    learner.deep = Deep(30)  # type: ignore[attr-defined]
    assert told(learner, tmp_path) == {}
    state = learner_of()
    state.deep = Deep(29)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"there is no learner\.deep(\.inner){31}, which"):
        state.run(3, valid=False, resume=tmp_path)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([Thing(i) for i in range(1001)], "it has more than 1,000 items"),
        ({i: Thing(i) for i in range(1001)}, "it has more than 1,000 items"),
        (
            defaultdict(list, {i: [nn.Identity()] for i in range(1001)}),
            "it has more than 1,000 items",
        ),
        ([[Thing(i) for i in range(900)] for _ in range(9)], "there are more than 5,000 objects"),
        ({nn.Linear(1, 1), nn.Linear(1, 1)}, "a set, whose items have no order"),
        (itertools.cycle(BATCHES), "an iterator"),
        (iter(DataLoader(TensorDataset(torch.ones(4)))), "an iterator"),
        (enumerate(BATCHES), "an iterator"),
    ],
    ids=["list", "dict", "defaultdict", "objects", "set", "cycle", "loader", "enumerate"],
)
def test_where_the_search_ends_is_told(value: Any, reason: str, tmp_path: Path) -> None:
    learner = learner_of()
    learner.attribute = value  # type: ignore[attr-defined]
    learner.last = nn.Linear(1, 1)  # type: ignore[attr-defined]
    assert told(learner, tmp_path) == {"TrainLearner.attribute": reason}
    again = learner_of()
    again.attribute = value  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"there is no learner\.last, which the checkpoint has"):
        again.run(3, valid=False, resume=tmp_path)


@pytest.mark.parametrize(
    "value",
    [
        [(i, float(i), "a") for i in range(5000)],
        deque({"a": i, "b": (1, 2)} for i in range(5000)),
        {1, 2, 3},
        Counter(range(5000)),
        list(range(100_000)),
        [Path("a")] * 5000,
    ],
    ids=["tuples", "dicts", "set", "Counter", "numbers", "paths"],
)
def test_numbers_however_many_are_not_told_of(value: Any, tmp_path: Path) -> None:
    learner = learner_of()
    learner.attribute = value  # type: ignore[attr-defined]
    assert told(learner, tmp_path) == {}


# --------------------------------------------------------------------- what changes, and what not


class Detector(nn.Module):
    """Anchors are constants, which torchvision moves to the device of the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = AnchorGenerator()
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.anchors.cell_anchors = [a.clone() for a in self.anchors.cell_anchors]
        anchors = self.anchors(ImageList(x, [(8, 8)]), [torch.ones(1, 1, 2, 2)])
        return self.linear(x) + 0 * anchors[0].sum()


class Scaled(nn.Module):
    """With a tensor that is neither a parameter nor a buffer."""

    def __init__(self, changes: bool) -> None:
        super().__init__()
        self.changes = changes
        self.scale = torch.full((3,), math.nan)
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.changes:
            self.scale = self.scale.nan_to_num() + 1
        else:
            self.scale = self.scale.clone()
        return self.linear(x)


WEIGHT = torch.ones(1)


def constant_global(preds: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(preds, y) * WEIGHT


AVERAGE = torch.zeros(1)


def changing_global(preds: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    AVERAGE.add_(preds.detach().mean())
    return F.mse_loss(preds, y - AVERAGE)


def closure(changes: bool) -> Callable[..., torch.Tensor]:
    average = torch.ones(1)

    def loss_func(preds: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        nonlocal average
        if changes:
            average = 0.9 * average + 0.1 * preds.detach().mean()
        return F.mse_loss(preds, y - average)

    return loss_func


def weighted(preds: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(preds, y) * weight


class Distribution(Callback):
    """Holds a constant of torch's."""

    def before_fit(self, event: BeforeFit) -> None:
        self.prior = torch.distributions.Normal(torch.zeros(2), torch.ones(2))


class Sobol(Callback):
    """Draws from a sequence of torch's that has no `state_dict`."""

    def before_fit(self, event: BeforeFit) -> None:
        self.sobol = SobolEngine(2, scramble=True)

    def after_batch(self, event: AfterBatch) -> None:
        self.sobol.draw(1)


class Slow(SGD):
    """Keeps slow weights, which torch's `state_dict` does not have."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (
            lambda: learner_of(Detector(), [(torch.ones(1, 3, 8, 3), torch.ones(1, 3, 8, 1))] * 4),
            [],
        ),
        (lambda: learner_of(Scaled(False)), []),
        (lambda: learner_of(Scaled(True)), ["Scaled.scale"]),
        (lambda: learner_of(loss_func=constant_global), []),
        (lambda: learner_of(loss_func=changing_global), ["TrainLearner.loss_func"]),
        (lambda: learner_of(loss_func=closure(False)), []),
        (lambda: learner_of(loss_func=closure(True)), ["TrainLearner.loss_func"]),
        (lambda: learner_of(loss_func=partial(weighted, weight=torch.ones(()))), []),
        (lambda: learner_of(cbs=Distribution()), []),
        (lambda: learner_of(cbs=Sobol()), ["Sobol.sobol"]),
        (lambda: learner_of(opt_func=Slow), ["TrainLearner.opt"]),
    ],
    ids=[
        *("anchors", "constant of a module", "changing tensor of a module", "constant global"),
        *("changing global", "constant of a closure", "changing tensor of a closure"),
        *("weight of a partial", "distribution", "Sobol sequence", "slow weights"),
    ],
)
def test_a_tensor_is_told_of_if_it_changes(
    make: Callable[[], TrainLearner], names: list[str], tmp_path: Path
) -> None:
    assert list(told(make(), tmp_path)) == names


class Relabelling(Callback):
    """Changes labels and the weights of samples after each epoch, as pseudo-labelling does."""

    def __init__(self, labels: bool, weights: bool) -> None:
        self.labels, self.weights = labels, weights

    def after_batch(self, event: AfterBatch) -> None:
        loader: Any = event.learner.dls.train  # type: ignore[attr-defined]
        if self.labels:
            loader.dataset.tensors[1].mul_(0.5)
        if self.weights:
            loader.sampler.weights = loader.sampler.weights * 0.5


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("weights", [False, True])
def test_data_is_told_of_if_it_changes(labels: bool, weights: bool, tmp_path: Path) -> None:
    data = TensorDataset(torch.ones(8, 3), torch.ones(8, 1))
    loader = DataLoader(data, 2, sampler=WeightedRandomSampler([1.0] * 8, 8))
    learner = learner_of(dls=loader, cbs=Relabelling(labels, weights))
    expected = ["train.dataset.tensors"] * labels + ["train.sampler.weights"] * weights
    assert list(told(learner, tmp_path)) == expected


class Cached(nn.Module):
    """Makes a constant with its first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.cached: torch.Tensor | None = None
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.cached = torch.ones(3) if self.cached is None else self.cached
        return self.linear(x * self.cached)


def test_a_constant_made_with_the_first_batch_is_no_state_in_a_resumed_fit_either(
    tmp_path: Path,
) -> None:
    assert told(learner_of(Cached()), tmp_path) == {}
    with capture_logs() as logs:
        learner_of(Cached()).run(4, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert logs == []


def test_an_object_that_raises_when_it_is_looked_at_is_told_of(tmp_path: Path) -> None:
    class Broken:
        @property
        def __class__(self) -> Any:
            raise RuntimeError("no class")

    learner = TrainLearner(nn.Linear(3, 1), DataLoaders([(torch.ones(2, 3), torch.ones(2, 1))]))
    learner.odd = Broken()  # type: ignore[attr-defined]
    with capture_logs() as logs:
        assert learner.run(1, valid=False).status == "completed"
        assert learner.run(1, valid=False, cbs=CheckpointCB(tmp_path)).status == "completed"
    told = [line for line in logs if line["event"] == "state_not_saved"]
    assert told[0]["reason"] == {"TrainLearner.odd": "it raises RuntimeError when it is looked at"}

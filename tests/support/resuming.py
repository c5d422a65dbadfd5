"""Fits on real digits that are interrupted, resumed, and compared with one that was not.

They run in fresh learners, with other weights to begin with and other random states: whatever is
not in the checkpoint would show.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
)
from eventrain.engine import (
    AsyncLoader,
    DataLoaders,
    FitResult,
    MomentumLearner,
    Prefetcher,
    TensorLoader,
    ThreadLoader,
    TrainLearner,
    sample_generator,
)
from eventrain.engine.checkpoint.random_state import random_state
from eventrain.engine.checkpoint.reader import checkpoints_in
from eventrain.engine.checkpoint.snapshot import Snapshot
from eventrain.engine.checkpoint.state import state_of
from eventrain.events import (
    AfterBatch,
    AfterStep,
    BeforeBatch,
    BeforeFit,
    Callback,
)
from sklearn.datasets import load_digits
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torcheval.metrics import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from tests.support.sources import Awaited

EPOCHS = 2
TRAIN, VALID = 5, 2
"""Batches an epoch: 72 samples by 16, the last batch ragged; 40 by 20."""
EPOCH = TRAIN + VALID

_digits = load_digits()
X = torch.tensor(_digits.data[:112], dtype=torch.float32) / 16
Y = torch.tensor(_digits.target[:112])
TRAINING, VALIDATION = TensorDataset(X[:72], Y[:72]), TensorDataset(X[72:], Y[72:])


# --------------------------------------------------------------------------------- what is trained


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))


def restless_model() -> nn.Module:
    """One that draws random numbers, and keeps more than weights."""
    return nn.Sequential(
        nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 10)
    )


def make_dls(train: Any = None) -> DataLoaders:
    if train is None:
        train = DataLoader(TRAINING, 16, shuffle=True)
    return DataLoaders(train, DataLoader(VALIDATION, 20))


def make_learner(
    *cbs: Callback,
    model: Callable[[], nn.Module] = make_model,
    cls: type[TrainLearner] = TrainLearner,
    dls: DataLoaders | None = None,
    **kwargs: Any,
) -> TrainLearner:
    kwargs = {"lr": 0.05, **kwargs}
    return cls(model(), dls or make_dls(), F.cross_entropy, cbs=[MetricsCB(), *cbs], **kwargs)


def momentum_sgd(parameters: Any, lr: float) -> optim.Optimizer:
    return optim.SGD(parameters, lr, momentum=0.9, nesterov=True)


class OneCycle(Callback):
    """A scheduler of torch's, made anew by every fit."""

    def before_fit(self, event: BeforeFit) -> None:
        self._scheduler = optim.lr_scheduler.OneCycleLR(
            event.learner.opt, 0.02, total_steps=EPOCHS * TRAIN + 1
        )

    def after_step(self, event: AfterStep) -> None:
        self._scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        return self._scheduler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scheduler.load_state_dict(state)


class Average(Callback):
    """An exponential moving average of the weights."""

    def __init__(self) -> None:
        self.average: dict[str, torch.Tensor] = {}

    def before_fit(self, event: BeforeFit) -> None:
        self.average = {k: v.clone() for k, v in event.learner.model.state_dict().items()}

    def after_step(self, event: AfterStep) -> None:
        for name, value in event.learner.model.state_dict().items():
            if value.is_floating_point():
                self.average[name].lerp_(value, 0.1)

    def state_dict(self) -> dict[str, Any]:
        return {"average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.average = {name: value.clone() for name, value in state["average"].items()}


def many_metrics() -> MetricsCB:
    return MetricsCB(
        accuracy=MulticlassAccuracy(num_classes=10, k=2),
        f1=MulticlassF1Score(num_classes=10, average="macro"),
        auroc=MulticlassAUROC(num_classes=10),
        confusion=MulticlassConfusionMatrix(10),
    )


def scaled_by_accelerate() -> AccelerateCB:
    """accelerate refuses float16 on a CPU when it is made; what follows is the same there."""
    cb = AccelerateCB("no")
    cb.accelerator.state._mixed_precision = "fp16"
    cb.accelerator.native_amp = True
    cb.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
    return cb


Make = Callable[[], TrainLearner]

KINDS: dict[str, Make] = {
    "sgd": lambda: make_learner(opt_func=momentum_sgd),
    "adamw-scheduled": lambda: make_learner(OneCycle(), opt_func=optim.AdamW, lr=1e-3),
    "amsgrad": lambda: make_learner(
        lr=0.01, opt_func=lambda parameters, lr: optim.Adam(parameters, lr, amsgrad=True)
    ),
    "momentum-learner": lambda: make_learner(cls=MomentumLearner, lr=0.01),
    "dropout-batchnorm": lambda: make_learner(model=restless_model),
    "accumulation": lambda: make_learner(GradientAccumulationCB(3), model=restless_model),
    "clipped": lambda: make_learner(GradientClippingCB(0.1), opt_func=momentum_sgd),
    "average": lambda: make_learner(Average()),
    "metrics": lambda: TrainLearner(make_model(), make_dls(), F.cross_entropy, cbs=many_metrics()),
    "bf16": lambda: make_learner(MixedTrainingCB("bf16"), model=restless_model),
    "fp16": lambda: make_learner(MixedTrainingCB("fp16", 2.0**20), opt_func=optim.AdamW),
    "fp16-momentum-accumulated": lambda: make_learner(
        GradientAccumulationCB(2), MixedTrainingCB("fp16", 2.0**20), cls=MomentumLearner, lr=0.01
    ),
    "all-at-once": lambda: make_learner(
        GradientAccumulationCB(2),
        MixedTrainingCB("fp16", 2.0**20),
        GradientClippingCB(0.5),
        OneCycle(),
        Average(),
        model=restless_model,
        opt_func=optim.AdamW,
    ),
}


# ------------------------------------------------------------------------------------- which data


class Augmented(Dataset[Any]):
    """Digits that look different every time, by three sources of random numbers."""

    def __len__(self) -> int:
        return len(TRAINING)

    def __getitem__(self, i: int) -> Any:
        x, y = TRAINING[i]
        x = x + 0.01 * torch.randn(64) + 0.01 * random.random()
        return x * (1 + 0.01 * float(numpy.random.rand())), y


class AugmentedPerSample(Augmented):
    """The same by torch's functions and the generator of the sample, whichever thread reads it."""

    def __getitem__(self, i: int) -> Any:
        x, y = TRAINING[i]
        seed = int(torch.randint(1 << 30, (), generator=sample_generator()))
        noise = random.Random(seed).random() + numpy.random.default_rng(seed).random()
        return x + 0.01 * torch.randn(64) + 0.01 * noise, y


class Streamed(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return (TRAINING[i] for i in torch.randperm(len(TRAINING)).tolist())


def own_generator() -> torch.Generator:
    """A generator of one's own; seeded by the global one, so that a new run has another."""
    return torch.Generator().manual_seed(int(torch.randint(1 << 30, ())))


def list_of_batches() -> list[Any]:
    return [TRAINING[i : i + 16] for i in range(0, 72, 16)]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(TRAINING, 16, shuffle=True),
    "own-generator": lambda: DataLoader(TRAINING, 16, shuffle=True, generator=own_generator()),
    "augmented": lambda: DataLoader(Augmented(), 16, shuffle=True),
    "augmented-own-generator": lambda: DataLoader(
        Augmented(), 16, shuffle=True, generator=own_generator()
    ),
    "drop-last": lambda: DataLoader(TRAINING, 16, shuffle=True, drop_last=True),
    "in-order": lambda: DataLoader(Augmented(), 16),
    "batch-sampler": lambda: DataLoader(
        Augmented(), batch_sampler=BatchSampler(RandomSampler(TRAINING), 16, False)
    ),
    "batch-sampler-own-generator": lambda: DataLoader(
        TRAINING,
        batch_sampler=BatchSampler(RandomSampler(TRAINING, generator=own_generator()), 16, False),
    ),
    "batches-by-the-dataset": lambda: DataLoader(
        TRAINING,
        batch_size=None,
        sampler=BatchSampler(RandomSampler(TRAINING, generator=own_generator()), 16, False),
    ),
    "with-replacement": lambda: DataLoader(
        Augmented(), 16, sampler=RandomSampler(TRAINING, replacement=True, num_samples=72)
    ),
    "with-replacement-own-generator": lambda: DataLoader(
        TRAINING,
        16,
        sampler=RandomSampler(
            TRAINING, replacement=True, num_samples=72, generator=own_generator()
        ),
    ),
    "weighted": lambda: DataLoader(
        Augmented(), 16, sampler=WeightedRandomSampler([*range(1, 73)], 72)
    ),
    "weighted-own-generator": lambda: DataLoader(
        TRAINING,
        16,
        sampler=WeightedRandomSampler([*range(1, 73)], 72, generator=own_generator()),
    ),
    "in-memory": lambda: TensorLoader(*TRAINING.tensors, batch_size=16, shuffle=True),
    "in-memory-own-generator": lambda: TensorLoader(
        *TRAINING.tensors, batch_size=16, shuffle=True, generator=own_generator()
    ),
    "prefetched": lambda: Prefetcher(DataLoader(TRAINING, 16, shuffle=True), depth=2),
    "prefetched-own-generator": lambda: Prefetcher(
        DataLoader(TRAINING, 16, shuffle=True, generator=own_generator()), depth=2
    ),
    "threaded": lambda: ThreadLoader(TRAINING, 16, shuffle=True, num_threads=2),
    "threaded-own-generator": lambda: ThreadLoader(
        TRAINING, 16, shuffle=True, num_threads=3, read_ahead=1, generator=own_generator()
    ),
    "threaded-augmented": lambda: ThreadLoader(
        AugmentedPerSample(), 16, shuffle=True, num_threads=3
    ),
    "threaded-augmented-own-generator": lambda: ThreadLoader(
        AugmentedPerSample(), 16, shuffle=True, drop_last=True, generator=own_generator()
    ),
    "threaded-with-replacement-own-generator": lambda: ThreadLoader(
        AugmentedPerSample(),
        batch_sampler=BatchSampler(
            RandomSampler(TRAINING, replacement=True, num_samples=72, generator=own_generator()),
            16,
            False,
        ),
    ),
    "threaded-batches-by-the-dataset": lambda: ThreadLoader(
        TRAINING,
        batch_size=None,
        sampler=BatchSampler(RandomSampler(TRAINING, generator=own_generator()), 16, False),
    ),
    "threaded-prefetched": lambda: Prefetcher(
        ThreadLoader(AugmentedPerSample(), 16, shuffle=True), depth=2
    ),
    "list": list_of_batches,
    "streamed": lambda: DataLoader(Streamed(), 16),
    "async": lambda: Awaited(list_of_batches()),
    "async-ahead": lambda: AsyncLoader(Awaited(list_of_batches()), buffer=4),
}

# --------------------------------------------------------------------------------- interruptions


def disturb(seed: int) -> None:
    """Another process: the random states are other ones."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


class Fell(Exception):
    """What ends a fit that nobody meant to end."""


def interrupt(learner: TrainLearner, at: int, how: str) -> None:
    """End the fit with its `at`-th batch, counting from 1, training or validating."""
    n = 0

    @learner.on(BeforeBatch)
    def begin(event: BeforeBatch) -> None:
        nonlocal n
        n += 1
        if n == at and how == "graceful":
            learner.stop(graceful=True)
        elif n == at and how == "stop":
            learner.stop()

    @learner.on(AfterBatch)
    def end(event: AfterBatch) -> None:
        if n == at and how == "error":
            raise Fell("the power")


Pieces = list[tuple[int, str]]


def undisturbed(make: Make, n_epochs: int = EPOCHS, **kwargs: Any) -> dict[str, Any]:
    disturb(0)
    learner = make()
    return outcome(learner, learner.run(n_epochs, **kwargs))


def in_pieces(
    make: Make, pieces: Pieces, n_epochs: int = EPOCHS, *, each: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """What comes out of a fit that was interrupted so often, each time in another learner."""
    with tempfile.TemporaryDirectory() as folder:
        for i, (at, how) in enumerate([*pieces, (0, "never")]):
            disturb(100 + i if checkpoints_in(Path(folder)) else 0)
            learner = make()
            interrupt(learner, at, how)
            cb = CheckpointCB(folder, **(each or {}))
            try:
                result = learner.run(n_epochs, cbs=cb, resume="last", **kwargs)
            except Fell:
                assert how == "error"
        assert result.status == "completed"
        assert (result.resumed_from is None) == (learner.resumed_from is None)
    return outcome(learner, result)


def outcome(learner: TrainLearner, result: FitResult) -> dict[str, Any]:
    """All that is to be equal."""
    return {
        **Snapshot(state_of(learner)).wait(),
        "history of the result": result.history,
        "counts": (result.epochs, result.batches, result.valid_batches, result.steps),
        "n_epochs": result.n_epochs,
    }


def traces(learner: TrainLearner) -> dict[str, Any]:
    """What a fit that was refused is not to have touched."""
    return Snapshot(
        {
            "model": learner.model.state_dict(),
            "gradients": {name: p.grad for name, p in learner.model.named_parameters()},
            "callbacks": [cb.state_dict() for cb in learner.cbs if hasattr(cb, "state_dict")],
            "random": random_state(learner.dls),
        }
    ).wait()


def differences(a: Any, b: Any, where: str = "") -> Iterator[str]:
    """Where two of them differ; tensors to the bit."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted(a.keys() | b.keys(), key=str):
            if key in a and key in b:
                yield from differences(a[key], b[key], f"{where}[{key!r}]")
            else:
                yield f"{where}[{key!r}] is in one alone"
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from differences(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = (a.dtype, a.shape, a.layout) == (b.dtype, b.shape, b.layout)
        a, b = (a.to_dense(), b.to_dense()) if a.is_sparse and b.is_sparse else (a, b)
        if not (same and bool(((a == b) | (a != a)).all())):
            yield f"{where}: {a} is not {b}"
    elif a != b and not (a != a and b != b):
        yield f"{where}: {a!r} is not {b!r}"


def assert_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert list(differences(a, b)) == []


PLACES = [1, 3, TRAIN, TRAIN + 1, EPOCH, EPOCH + 1, 2 * EPOCH]
"""First batch, in the middle, last of training, first and last of validation, second epoch, end."""

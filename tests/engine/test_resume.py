"""A fit that was interrupted and resumed is the fit that was not: to the bit, wherever it was.

The law is tested on real digits, in fresh learners, with other weights to begin with and with the
random states disturbed: whatever is not in the checkpoint would show.
"""

from __future__ import annotations

import gc
import json
import math
import random
import tempfile
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import numpy
import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
    ProgressCB,
    StructlogCB,
)
from eventrain.engine import (
    Checkpoint,
    CheckpointError,
    CheckpointMismatchError,
    DataLoaders,
    FitResult,
    MomentumLearner,
    Position,
    Prefetcher,
    TensorLoader,
    TrainLearner,
)
from eventrain.engine.checkpoint.random_state import random_state
from eventrain.engine.checkpoint.reader import checkpoints_in
from eventrain.engine.checkpoint.snapshot import Snapshot
from eventrain.engine.checkpoint.state import state_of
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterStep,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CleanupEpoch,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from sklearn.datasets import load_digits
from structlog.testing import capture_logs
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torcheval.metrics import (
    Metric,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    WindowedClickThroughRate,
)

GUARD = 20
"""Seconds after which something has hung."""
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


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """So small a model is not trained faster by several, which wait for busy cores."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """Its state is one per process, precision included; and it collects garbage after every fit,
    which is to be ours alone."""
    state = pytest.importorskip("accelerate").state.AcceleratorState
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    state._reset_state(reset_partial_state=True)


# ------------------------------------------------------------------------------------- which data


class Augmented(Dataset[Any]):
    """Digits that look different every time, by three sources of random numbers."""

    def __len__(self) -> int:
        return len(TRAINING)

    def __getitem__(self, i: int) -> Any:
        x, y = TRAINING[i]
        x = x + 0.01 * torch.randn(64) + 0.01 * random.random()
        return x * (1 + 0.01 * float(numpy.random.rand())), y


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
    "list": list_of_batches,
    "streamed": lambda: DataLoader(Streamed(), 16),
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
        same = a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a != a)).all())
        if not same:
            yield f"{where}: {a} is not {b}"
    elif a != b and not (a != a and b != b):
        yield f"{where}: {a!r} is not {b!r}"


def assert_same(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    assert list(differences(a, b)) == []


PLACES = [1, 3, TRAIN, TRAIN + 1, EPOCH, EPOCH + 1, 2 * EPOCH]
"""First batch, in the middle, last of training, first and last of validation, second epoch, end."""


# ------------------------------------------------------------------------------------------ the law


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_trained_a_resumed_fit_is_the_undisturbed_one(kind: str) -> None:
    make = KINDS[kind]
    expected = undisturbed(make)
    for place in PLACES:
        assert_same(in_pieces(make, [(place, "graceful")]), expected)


@pytest.mark.parametrize("name", LOADERS)
def test_whatever_the_data_a_resumed_fit_is_the_undisturbed_one(name: str) -> None:
    def make() -> TrainLearner:
        return make_learner(model=restless_model, dls=make_dls(LOADERS[name]()))

    expected = undisturbed(make)
    for place in (1, 3, TRAIN, EPOCH + 2):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)


@settings(deadline=None, max_examples=25)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    data=st.sampled_from(sorted(LOADERS)),
    pieces=st.lists(
        st.tuples(st.integers(1, 2 * EPOCH), st.sampled_from(["graceful", "stop", "error"])),
        min_size=1,
        max_size=4,
    ),
    each=st.fixed_dictionaries(
        {},
        optional={
            "every_batches": st.integers(1, 4),
            "every_epochs": st.integers(1, 2),
            "every_seconds": st.sampled_from([1e-6, 1000.0]),
            "keep_last": st.sampled_from([1, 3, None]),
            "background": st.booleans(),
        },
    ),
    phases=st.sampled_from([{}, {"valid": False}]),
)
def test_however_often_and_however_it_ends_it_is_the_undisturbed_fit(
    kind: str, data: str, pieces: Pieces, each: dict[str, Any], phases: dict[str, bool]
) -> None:
    def make() -> TrainLearner:
        learner = KINDS[kind]()
        learner.dls = make_dls(LOADERS[data]())
        return learner

    assert_same(in_pieces(make, pieces, each=each, **phases), undisturbed(make, **phases))


@pytest.mark.parametrize(
    "places",
    [[(1, "graceful")], [(3, "graceful"), (4, "stop"), (2, "error")], [(TRAIN, "graceful")]],
    ids=["at the first batch", "again and again", "at the last batch"],
)
def test_loading_in_worker_processes_goes_on_with_the_same_random_numbers(places: Pieces) -> None:
    def make() -> TrainLearner:
        loader = DataLoader(Augmented(), 16, shuffle=True, num_workers=2)
        return make_learner(model=restless_model, dls=make_dls(loader))

    resumed = in_pieces(make, places, 1, each={"every_batches": 2}, valid=False)
    assert_same(resumed, undisturbed(make, 1, valid=False))


class ByEpoch(Sampler[int]):
    """As torch's DistributedSampler: another order every epoch, if it is told of it."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(
            torch.randperm(72, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        )


LOADERS_BY_ACCELERATE = {
    **{name: LOADERS[name] for name in ("shuffled", "own-generator", "augmented", "list")},
    "by-epoch": lambda: DataLoader(TRAINING, 16, sampler=ByEpoch()),
}


@pytest.mark.parametrize("data", LOADERS_BY_ACCELERATE)
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.usefixtures("_fresh_accelerate")
def test_through_accelerate_too(data: str, scaled: bool) -> None:
    from accelerate.state import AcceleratorState

    def make() -> TrainLearner:
        AcceleratorState._reset_state(reset_partial_state=True)
        cb = scaled_by_accelerate() if scaled else AccelerateCB("no")
        dls = make_dls(LOADERS_BY_ACCELERATE[data]())
        return make_learner(cb, dls=dls, opt_func=optim.AdamW, lr=1e-3)

    expected = undisturbed(make)
    for place in (3, TRAIN + 1, EPOCH + 2):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)


AS_TORCHDATA_IS = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


@AS_TORCHDATA_IS
@pytest.mark.parametrize(
    "dataset", [TRAINING, Augmented(), Streamed()], ids=lambda d: type(d).__name__
)
def test_a_loader_that_keeps_its_own_state_is_read_on_by_that(dataset: Any) -> None:
    module = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is an extra")

    def make() -> TrainLearner:
        shuffle = {} if isinstance(dataset, IterableDataset) else {"shuffle": True}
        loader = module.StatefulDataLoader(dataset, 16, **shuffle)
        return make_learner(model=restless_model, dls=make_dls(loader))

    expected = undisturbed(make)
    for place in (1, 3, TRAIN, TRAIN + 1, EPOCH + 2):
        with capture_logs() as logs:
            assert_same(in_pieces(make, [(place, "graceful")]), expected)
        assert "resume_may_not_be_exact" not in [line["event"] for line in logs]


def doubts(logs: list[Any]) -> list[str]:
    return [line["reason"] for line in logs if line["event"] == "resume_may_not_be_exact"]


class Endless:
    """Batches of a stream that nobody can wind back."""

    def __iter__(self) -> Iterator[Any]:
        return iter(list_of_batches())


@pytest.mark.parametrize(
    ("make_loader", "doubt"),
    [
        (lambda: DataLoader(Streamed(), 16), "its dataset is an IterableDataset"),
        (Endless, "Endless may not yield the same batches again"),
    ],
)
def test_data_that_may_not_repeat_itself_is_told_of_before_and_after(
    make_loader: Callable[[], Any], doubt: str, tmp_path: Path
) -> None:
    learner = make_learner(dls=make_dls(make_loader()))
    interrupt(learner, 3, "graceful")
    with capture_logs() as logs:
        learner.run(1, cbs=CheckpointCB(tmp_path, every_batches=100))
    assert [told.startswith(doubt) for told in doubts(logs)] == [True]
    with capture_logs() as logs:
        make_learner(dls=make_dls(make_loader())).run(1, valid=False, resume=tmp_path)
    assert [told.startswith(doubt) for told in doubts(logs)] == [True]


def test_of_data_that_repeats_itself_nothing_is_told(tmp_path: Path) -> None:
    learner = make_learner()
    interrupt(learner, 3, "graceful")
    with capture_logs() as logs:
        learner.run(1, cbs=CheckpointCB(tmp_path, every_batches=1))
        make_learner().run(1, resume=tmp_path)
    assert logs == []


class Hits(WindowedClickThroughRate):
    """Of the last batches, how many predictions were right; it is torcheval's attribute, and no
    state, that says where in the window the next one goes."""

    def update(self, preds: torch.Tensor, targets: torch.Tensor) -> Any:
        return super().update((preds.argmax(1) == targets).float())


class ByClass(Metric[torch.Tensor]):
    """How often each class was predicted; torcheval makes a defaultdict of such a state."""

    def __init__(self) -> None:
        super().__init__()
        self._add_state("counts", {})

    def update(self, preds: torch.Tensor, targets: torch.Tensor) -> Any:
        for i in preds.argmax(1).tolist():
            self.counts[i] += 1
        return self

    def compute(self) -> torch.Tensor:
        return torch.stack([self.counts[i] for i in range(10)])

    def merge_state(self, metrics: Any) -> Any:
        raise NotImplementedError


@pytest.mark.parametrize("make_metric", [lambda: Hits(max_num_updates=3), ByClass])
def test_a_metric_goes_on_whatever_it_keeps(make_metric: Callable[[], Any]) -> None:
    def make() -> TrainLearner:
        metrics = MetricsCB(own=make_metric())
        return TrainLearner(make_model(), make_dls(), F.cross_entropy, cbs=metrics)

    expected = undisturbed(make)
    for place in (1, 2, TRAIN, TRAIN + 1, EPOCH):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)


# ------------------------------------------------------------------------ where a fit can be left


@pytest.mark.parametrize("event", [AfterEpoch, CleanupEpoch, BeforeEpoch])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_graceful_stop_between_batches_loses_nothing(event: type[Any], n: int) -> None:
    """After the n-th time that this was emitted: between batches, phases and epochs."""
    expected = undisturbed(KINDS["dropout-batchnorm"])

    def make() -> TrainLearner:
        learner = KINDS["dropout-batchnorm"]()
        seen = 0

        @learner.on(event)
        def stop(_: Any) -> None:
            nonlocal seen
            seen += 1
            if seen == n:
                learner.stop(graceful=True)

        return learner

    with tempfile.TemporaryDirectory() as folder:
        disturb(0)
        statuses = []
        for i in range(EPOCHS * (EPOCH + 2) + 1):
            learner = make()
            result = learner.run(EPOCHS, cbs=CheckpointCB(folder), resume="last")
            statuses.append(result.status)
            if result.status == "completed":
                break
            disturb(50 + i)
    assert statuses[0] == "cancelled"
    assert statuses[-1] == "completed"
    assert_same(outcome(learner, result), expected)


@pytest.mark.parametrize("skipped", [0, 2, 4])
def test_batches_that_are_skipped_are_skipped_once(skipped: int) -> None:
    def make() -> TrainLearner:
        learner = KINDS["dropout-batchnorm"]()

        @learner.on(BeforeBatch, where=lambda event: event.iter == skipped)
        def skip(event: BeforeBatch) -> None:
            raise CancelBatchException("not this one")

        return learner

    expected = undisturbed(make)
    assert expected["counts"][1] == EPOCHS * (TRAIN - 1)
    for place in (1, 3, TRAIN, EPOCH):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)
        assert_same(in_pieces(make, [(place, "error")], each={"every_batches": 1}), expected)


def test_an_epoch_that_was_left_is_not_taken_up_again() -> None:
    def make() -> TrainLearner:
        learner = KINDS["dropout-batchnorm"]()

        @learner.on(BeforeBatch, where=lambda event: event.training and event.iter == 3)
        def leave(event: BeforeBatch) -> None:
            raise CancelEpochException("enough")

        return learner

    expected = undisturbed(make)
    for place in (2, 4, 5, 7):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)


# -------------------------------------------------------------------------- how much there is to do


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A folder with the checkpoints of a fit of one epoch that is over."""
    disturb(0)
    make_learner().run(1, cbs=CheckpointCB(tmp_path / "done"), run_id="done")
    return tmp_path / "done"


def test_where_all_is_done_nothing_is_trained(done: Path) -> None:
    expected = undisturbed(make_learner, 1)
    learner = make_learner()
    cb = CheckpointCB(done)
    with record_events(learner) as events:
        result = learner.run(1, cbs=cb, resume="last")
    assert events.names == ["BeforeFit", "AfterFit", "CleanupFit"]
    assert (result.status, result.epochs, result.batches) == ("completed", 1, TRAIN)
    assert_same(outcome(learner, result), expected)
    assert cb.last == done / "checkpoint-000001"
    assert [path.name for path in done.iterdir()] == ["checkpoint-000001"]


@pytest.mark.parametrize("batches", [EPOCH + 2, 2 * EPOCH])
def test_where_more_is_done_than_is_asked_for_it_is_said(tmp_path: Path, batches: int) -> None:
    learner = make_learner()
    interrupt(learner, batches, "graceful")
    learner.run(3, cbs=CheckpointCB(tmp_path))
    resumed = make_learner()
    before = {name: value.clone() for name, value in resumed.model.state_dict().items()}
    with pytest.raises(CheckpointMismatchError, match="n_epochs=1, which includes the epochs"):
        resumed.run(1, resume=tmp_path)
    assert_same(resumed.model.state_dict(), before)


def test_more_epochs_than_before_are_those_of_one_longer_fit(done: Path) -> None:
    disturb(77)
    learner = make_learner()
    assert_same(outcome(learner, learner.run(3, resume=done)), undisturbed(make_learner, 3))


def test_a_fit_that_was_not_validated_may_be_from_now_on(tmp_path: Path) -> None:
    learner = make_learner()
    learner.run(1, valid=False, cbs=CheckpointCB(tmp_path))
    resumed = make_learner()
    result = resumed.run(2, resume=tmp_path)
    assert [(row["epoch"], row["train"]) for row in result.history] == [
        (0, "train"),
        (1, "train"),
        (1, "eval"),
    ]
    assert (result.epochs, result.batches, result.valid_batches) == (2, 2 * TRAIN, VALID)


def test_a_fit_that_was_validated_may_go_on_without(done: Path) -> None:
    result = make_learner().run(2, valid=False, resume=done)
    assert [(row["epoch"], row["train"]) for row in result.history] == [
        (0, "train"),
        (0, "eval"),
        (1, "train"),
    ]


def test_the_same_learner_may_resume_what_it_did_itself(tmp_path: Path) -> None:
    expected = undisturbed(make_learner)
    disturb(0)
    learner = make_learner()
    interrupt(learner, 4, "graceful")
    learner.run(EPOCHS, cbs=CheckpointCB(tmp_path))
    metrics = learner.cbs[0]
    assert isinstance(metrics, MetricsCB)
    result = learner.run(EPOCHS, cbs=CheckpointCB(tmp_path), resume="last")
    assert_same(outcome(learner, result), expected)
    assert metrics.history == list(result.history)


def test_a_fit_after_a_resumed_one_begins_anew(done: Path) -> None:
    learner = make_learner()
    assert learner.run(1, resume=done).resumed_from is not None
    result = learner.run(1)
    assert (result.resumed_from, learner.resumed_from) == (None, None)
    assert (result.epochs, result.batches) == (1, TRAIN)
    assert result.run_id != "done"


# ------------------------------------------------------------------------------ what does not fit


def two_groups(parameters: Any, lr: float) -> optim.Optimizer:
    first, *others = parameters
    return optim.SGD([{"params": [first]}, {"params": others}], lr)


def lonely(*cbs: Callback) -> TrainLearner:
    """Without the metrics that the others have."""
    return TrainLearner(make_model(), make_dls(), F.cross_entropy, cbs=cbs)


MISMATCHES: dict[str, tuple[Make, str]] = {
    "another size": (
        lambda: make_learner(
            model=lambda: nn.Sequential(nn.Linear(64, 13), nn.ReLU(), nn.Linear(13, 10))
        ),
        r"0\.bias of the model is \(13,\) of float32, but \(12,\) of float32 in the checkpoint;"
        r" 0\.weight of the model is \(13, 64\) of float32, but \(12, 64\) of float32 in the",
    ),
    "a layer less": (
        lambda: make_learner(model=lambda: nn.Sequential(nn.Linear(64, 12))),
        r"the model does not have 2\.bias, which the checkpoint has; .* not have 2\.weight, which",
    ),
    "a layer more": (
        lambda: make_learner(model=lambda: make_model().append(nn.Linear(10, 10))),
        r"the model has 3\.bias, which the checkpoint does not have; the model has 3\.weight",
    ),
    "all is different": (
        lambda: make_learner(model=restless_model),
        r"does not have 2\.bias, which .* has; .* has 1\.bias, which .* not have; .*; and 5 more$",
    ),
    "another dtype": (
        lambda: make_learner(model=lambda: make_model().bfloat16()),
        r"2\.bias of the model is \(10,\) of bfloat16, but \(10,\) of float32 in the checkpoint",
    ),
    "another optimizer within": (
        lambda: make_learner(AccelerateCB("no"), opt_func=optim.AdamW),
        "the optimizer is AdamW, but SGD in the checkpoint; AccelerateCB is among the callbacks",
    ),
    "another optimizer": (
        lambda: make_learner(opt_func=optim.AdamW),
        "the optimizer is AdamW, but SGD in the checkpoint$",
    ),
    "other groups": (
        lambda: make_learner(opt_func=two_groups),
        r"the optimizer has groups of \[1, 3\] parameters, but \[4\] in the checkpoint$",
    ),
    "a callback less": (lonely, "MetricsCB is not among the callbacks, but in the checkpoint$"),
    "a callback more": (
        lambda: make_learner(Picky(1)),
        "Picky is among the callbacks, but not in the checkpoint$",
    ),
    "the same callback twice": (
        lambda: make_learner(MetricsCB()),
        "MetricsCB 2 is among the callbacks, but not in the checkpoint$",
    ),
    "a generator more": (
        lambda: make_learner(dls=make_dls(LOADERS["own-generator"]())),
        "the loaders have 1 random generators, but the checkpoint has 0$",
    ),
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


@pytest.fixture
def in_the_middle(tmp_path: Path) -> Path:
    """A folder with the checkpoint of a fit of two epochs that was left after three batches."""
    learner = make_learner()
    interrupt(learner, 3, "graceful")
    learner.run(EPOCHS, cbs=CheckpointCB(tmp_path / "middle"))
    return tmp_path / "middle"


@pytest.mark.parametrize("where", ["done", "in_the_middle"])
@pytest.mark.parametrize("what", MISMATCHES)
@pytest.mark.usefixtures("_fresh_accelerate")
def test_what_differs_is_named_before_anything_is_changed(
    what: str, where: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(where)
    make, told = MISMATCHES[what]
    learner = make()
    before = traces(learner)
    with pytest.raises(CheckpointMismatchError, match=told):
        learner.run(3, resume=folder)
    assert_same(traces(learner), before)
    assert learner.result is not None
    assert learner.result.status == "failed"
    if what != "another dtype":
        assert learner.run(1).status == "completed"  # it is as good as new


def test_a_generator_less_is_named_too(tmp_path: Path) -> None:
    learner = make_learner(dls=make_dls(LOADERS["batch-sampler-own-generator"]()))
    learner.run(1, cbs=CheckpointCB(tmp_path))
    with pytest.raises(CheckpointMismatchError, match=r"have 0 random generators, but .* has 1$"):
        make_learner().run(2, resume=tmp_path)


def test_in_the_middle_of_an_epoch_other_data_is_refused(in_the_middle: Path) -> None:
    learner = make_learner(dls=make_dls(DataLoader(TRAINING, 12, shuffle=True)))
    before = traces(learner)
    told = f"the epoch has 6 batches, but had {TRAIN} when .* only be resumed with the same data"
    with pytest.raises(CheckpointMismatchError, match=told):
        learner.run(EPOCHS, resume=in_the_middle)
    assert_same(traces(learner), before)


def test_between_two_epochs_other_data_is_taken(done: Path) -> None:
    learner = make_learner(dls=make_dls(DataLoader(TRAINING, 12, shuffle=True)))
    assert learner.run(2, resume=done).batches == TRAIN + 6


def test_data_of_unknown_length_that_has_become_shorter_is_noticed(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __init__(self, n: int) -> None:
            self.n = n

        def __iter__(self) -> Iterator[Any]:
            return iter(TRAINING[i] for i in range(self.n))

    learner = make_learner(dls=make_dls(DataLoader(Stream(72), 16)))
    interrupt(learner, 3, "graceful")
    learner.run(1, cbs=CheckpointCB(tmp_path))
    shorter = make_learner(dls=make_dls(DataLoader(Stream(32), 16)))
    weights = traces(shorter)["model"]
    with pytest.raises(
        ValueError, match="3 batches of this epoch were done, but now it has only 2"
    ):
        shorter.run(1, resume=tmp_path)
    assert_same(shorter.model.state_dict(), weights)


@pytest.mark.parametrize(
    ("place", "phases", "told"),
    [
        (TRAIN + 1, {"valid": False}, "in or before a validation epoch .* has valid=False"),
        (TRAIN + 1, {"train": False}, "in or before a validation epoch .* has train=False"),
        (3, {"train": False}, "in or before a training epoch .* has train=False"),
    ],
)
def test_a_fit_without_the_phase_that_was_interrupted_is_refused(
    place: int, phases: dict[str, bool], told: str, tmp_path: Path
) -> None:
    learner = make_learner()
    interrupt(learner, place, "graceful")
    learner.run(EPOCHS, cbs=CheckpointCB(tmp_path))
    other = make_learner()
    other.run(1)  # it has an optimizer
    before = traces(other)
    with pytest.raises(CheckpointMismatchError, match=told):
        other.run(EPOCHS, resume=tmp_path, **phases)
    assert_same(traces(other), before)


class Picky(Callback):
    """One that does not load what it has not written itself; and spoils what it holds first."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.held = torch.ones(2) * version

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.randn(3)
        self.held = state["held"].clone()
        if state["version"] != self.version:
            raise ValueError(f"version {state['version']}")


class Stubborn(Picky):
    """Not even that."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError(f"version {state['version']}")


@pytest.mark.parametrize("cls", [Picky, Stubborn])
@pytest.mark.parametrize("in_the_middle", [True, False])
def test_a_callback_that_cannot_load_leaves_everything_as_it_was(
    cls: type[Picky], in_the_middle: bool, tmp_path: Path
) -> None:
    def make(version: int) -> TrainLearner:
        return make_learner(Average(), cls(version), Average(), opt_func=momentum_sgd)

    learner = make(1)
    interrupt(learner, 3 if in_the_middle else -1, "graceful")
    learner.run(1, cbs=CheckpointCB(tmp_path))
    other = make(2)
    other.run(1)  # so that there are gradients, averages and a history
    seen: list[dict[str, Any]] = []
    begins = BeforeEpoch if in_the_middle else BeforeFit
    other.subscribe(begins, lambda _: seen.append(outcome_of_state(other)), order=math.inf)
    with pytest.raises(ValueError, match="version 1") as raised:
        other.run(EPOCHS, resume=tmp_path)
    told = f"raised by {cls.__name__}.load_state_dict on its state in the checkpoint"
    assert told in raised.value.__notes__
    assert other.result is not None
    assert (other.result.status, other.result.who) == ("failed", f"{cls.__name__}.load_state_dict")
    after = outcome_of_state(other)
    if in_the_middle:  # the data was read on before the state was loaded
        seen[0].pop("random")
        after.pop("random")
    assert_same(after, seen[0])


def outcome_of_state(learner: TrainLearner) -> dict[str, Any]:
    state: dict[str, Any] = Snapshot(state_of(learner)).wait()
    for done in state["progress"].values():
        del done["epochs"]  # one of them is not in the checkpoint, but ended before it could load
    return state


def test_other_metrics_leave_everything_as_it_was(done: Path) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learner = TrainLearner(make_model(), make_dls(), F.cross_entropy, cbs=metrics)
    before = traces(learner)
    with pytest.raises((KeyError, ValueError), match="accuracy") as raised:
        learner.run(2, resume=done)
    assert any("MetricsCB.load_state_dict" in note for note in raised.value.__notes__)
    assert_same(traces(learner), before)


# -------------------------------------------------------------------------- how it is asked for


def test_a_resumed_fit_has_the_learning_rate_that_it_had(done: Path) -> None:
    with pytest.raises(ValueError, match=r"lr=0\.5: a resumed fit keeps the learning rate"):
        make_learner().run(2, lr=0.5, resume=done)
    learner = make_learner(lr=123.0)
    rates = []
    learner.subscribe(BeforeBatch, lambda event: rates.append(event.lr))
    learner.run(2, resume=done)
    assert rates == [0.05] * EPOCH


@pytest.mark.parametrize("n", [0, 2])
def test_the_last_checkpoint_is_that_of_the_one_callback(n: int, tmp_path: Path) -> None:
    cbs = [CheckpointCB(tmp_path / str(i)) for i in range(n)]
    with pytest.raises(ValueError, match=f"and there are {n} of them: pass a path"):
        make_learner().run(1, cbs=cbs, resume="last")


@pytest.mark.parametrize("name", ["", "nowhere", "a file"])
def test_where_no_checkpoint_is_the_fit_says_so(name: str, tmp_path: Path) -> None:
    (tmp_path / "a file").write_text("no folder")
    learner = make_learner()
    with record_events(learner) as events:
        with pytest.raises(CheckpointError, match=name or str(tmp_path)):
            learner.run(1, resume=tmp_path / name)
    assert events == []  # it has not begun
    assert learner.run(1).status == "completed"


def test_of_nothing_yet_the_last_is_a_beginning_which_is_told(tmp_path: Path) -> None:
    with capture_logs() as logs:
        learner = make_learner()
        result = learner.run(1, cbs=CheckpointCB(tmp_path / "new"), resume="last")
    (line,) = logs
    assert (line["event"], line["folder"]) == ("nothing_to_resume", str(tmp_path / "new"))
    assert (result.status, result.resumed_from, result.epochs) == ("completed", None, 1)
    assert learner.resumed_from is None


@pytest.mark.parametrize("as_text", [False, True])
def test_a_path_is_one_checkpoint_or_a_folder_of_them(as_text: bool, tmp_path: Path) -> None:
    expected = undisturbed(make_learner, 3)
    disturb(0)
    make_learner().run(3, cbs=CheckpointCB(tmp_path, keep_last=None))
    for name in ("checkpoint-000001", "checkpoint-000002", "."):
        path = tmp_path / name
        learner = make_learner()
        result = learner.run(3, resume=str(path) if as_text else path)
        assert Path(result.resumed_from or "").name == name.replace(".", "checkpoint-000003")
        assert_same(outcome(learner, result), expected)


def test_the_run_keeps_its_name_unless_it_is_given_another(done: Path) -> None:
    names: list[tuple[str, Path | None]] = []
    learner = make_learner()
    learner.subscribe(
        BeforeFit, lambda event: names.append((event.run_id, event.learner.resumed_from))
    )
    assert learner.run(2, resume=done).run_id == learner.run_id == "done"
    assert learner.run(2, resume=done, run_id="again").run_id == learner.run_id == "again"
    path = done / "checkpoint-000001"
    assert names == [("done", path), ("again", path)]


# ------------------------------------------------------------------------------ what is heard of it


def test_the_events_are_those_of_what_is_still_to_do(in_the_middle: Path) -> None:
    learner = make_learner()
    with record_events(learner) as events:
        learner.run(1, resume=in_the_middle)
    heard = [
        (type(event).__name__, getattr(event, "epoch", None), getattr(event, "iter", None))
        for event in events
        if not event.hook.startswith(("after_", "before_step", "cleanup_step"))
    ]
    batches = [("BeforeBatch", 0, i) for i in (3, 4)], [("BeforeBatch", 0, i) for i in (0, 1)]
    assert heard == [
        ("BeforeFit", None, None),
        *(
            line
            for part in batches
            for line in (
                ("BeforeEpoch", 0, None),
                *((name, *place) for _, *place in part for name in ("BeforeBatch", "CleanupBatch")),
                ("CleanupEpoch", 0, None),
            )
        ),
        ("CleanupFit", None, None),
    ]
    seen = [event.n_samples for event in events if isinstance(event, AfterBatch)]
    assert seen == [64, 72, 20, 40]


def test_between_training_and_validation_only_that_is_to_come(tmp_path: Path) -> None:
    learner = make_learner()
    learner.subscribe(AfterEpoch, lambda _: learner.stop(graceful=True), once=True)
    learner.run(1, cbs=CheckpointCB(tmp_path))
    assert Checkpoint.load(tmp_path).position == Position(0, training=False)
    resumed = make_learner()
    with record_events(resumed) as events:
        resumed.run(1, resume=tmp_path)
    assert Counter(events.names)["BeforeEpoch"] == 1
    assert {event.training for event in events if isinstance(event, CleanupEpoch)} == {False}


class Loads(Callback):
    """Counts batches, by itself and over all fits; notes what it heard and when it loaded."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.n = 0

    def before_fit(self, event: BeforeFit) -> None:
        self.heard.append("before_fit")
        self.n = -100

    def before_epoch(self, event: BeforeEpoch) -> None:
        self.heard.append("before_epoch")
        self.n = -200 if event.epoch == 0 and event.training else self.n

    def before_batch(self, event: BeforeBatch) -> None:
        self.heard.append(f"batch {event.iter}")
        self.n += 1

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.heard.append(f"load {threading.current_thread().name.partition('-')[0]}")
        self.n = state["n"]


def test_what_is_loaded_has_the_last_word(tmp_path: Path) -> None:
    """In the middle of an epoch it is loaded after `before_epoch`; in the training thread."""
    learner = make_learner(Loads())
    interrupt(learner, 3, "graceful")
    learner.run(1, cbs=CheckpointCB(tmp_path))
    cb = Loads()
    make_learner(cb).run(1, resume=tmp_path)
    assert cb.heard[:4] == ["before_fit", "before_epoch", "load eventrain", "batch 3"]
    assert cb.n == -200 + EPOCH


def test_between_two_epochs_it_is_loaded_before_the_next_one_begins(tmp_path: Path) -> None:
    make_learner(Loads()).run(1, cbs=CheckpointCB(tmp_path))
    cb = Loads()
    make_learner(cb).run(2, resume=tmp_path)
    assert cb.heard[:4] == ["before_fit", "load eventrain", "before_epoch", "batch 0"]
    assert cb.n == -200 + 2 * EPOCH


def test_observers_hear_what_receivers_hear(in_the_middle: Path, backend: dict[str, Any]) -> None:
    learner = make_learner()
    observed: list[Any] = []
    learner.observe(observed.append)
    with record_events(learner) as events:
        learner.run(EPOCHS, resume=in_the_middle, **backend)
    assert observed == events
    assert {event.run_id for event in observed} == {
        Checkpoint.load(in_the_middle).manifest["run_id"]
    }


def test_those_who_show_a_fit_show_a_resumed_one(in_the_middle: Path) -> None:
    screen, log = StringIO(), StringIO()
    console = Console(file=screen, force_terminal=True, width=80)
    learner = make_learner(ProgressCB(console), StructlogCB(every=1, format="json", file=log))
    result = learner.run(EPOCHS, resume=in_the_middle)
    assert "completed" in screen.getvalue()
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert {line["run_id"] for line in lines} == {result.run_id}
    assert [line["iter"] for line in lines if line["event"] == "batch"] == [3, 4, 0, 1, 2, 3, 4]
    epochs = [(line["epoch"], line["phase"]) for line in lines if line["event"] == "epoch"]
    assert epochs == [(0, "train"), (0, "valid"), (1, "train"), (1, "valid")]
    assert lines[-1]["event"] == "fit_ended"


# ---------------------------------------------------------------------------------------- the host


async def test_on_every_backend_it_is_the_undisturbed_fit(tmp_path: Path) -> None:
    make = KINDS["all-at-once"]
    disturb(0)
    learner = make()
    expected = outcome(learner, await learner.fit(EPOCHS))
    disturb(0)
    learner = make()
    interrupt(learner, 4, "graceful")
    with anyio.fail_after(GUARD):
        await learner.fit(EPOCHS, cbs=CheckpointCB(tmp_path))
        disturb(9)
        learner = make()
        result = await learner.fit(EPOCHS, cbs=CheckpointCB(tmp_path), resume="last")
    assert_same(outcome(learner, result), expected)


class Gate:
    """`torch.load` that waits until it is told to go on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.open = threading.Event(), threading.Event()
        self._load = torch.load
        monkeypatch.setattr(torch, "load", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        assert self.open.wait(GUARD)
        return self._load(*args, **kwargs)


async def test_the_host_goes_on_while_a_checkpoint_is_read(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    learner = make_learner()

    async def host() -> None:
        while not gate.reached.is_set():
            await anyio.sleep(0.001)
        gate.open.set()

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(host)
            result = await learner.fit(2, resume=done)
    assert result.epochs == 2


async def test_cancelled_while_a_checkpoint_is_read_nothing_is_changed(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    learner = make_learner()
    before = traces(learner)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(learner.fit, 2, resume=done))
            while not gate.reached.is_set():
                await anyio.sleep(0.001)
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                while not learner.stopping:  # until the fit has heard of it
                    await anyio.sleep(0.001)
            gate.open.set()
    assert learner.result is not None
    assert (learner.result.status, learner.result.who) == ("cancelled", "host")
    assert learner.result.batches == 0
    assert_same(traces(learner), before)


# ------------------------------------------------------------------------------- what is in a state


class Counting(TrainLearner):
    """A learner class with a state of its own."""

    n = 0

    def step(self) -> None:
        self.n += 1
        self.opt.param_groups[0]["lr"] = 0.1 / self.n
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def test_a_learner_class_with_a_state_of_its_own_goes_on_with_it() -> None:
    def make() -> TrainLearner:
        return make_learner(cls=Counting)

    assert_same(in_pieces(make, [(2, "graceful"), (4, "graceful")]), undisturbed(make))


def test_an_optimizer_that_is_kept_goes_on() -> None:
    def make() -> TrainLearner:
        learner = make_learner(opt_func=None)
        learner.opt = momentum_sgd(learner.model.parameters(), 0.03)
        return learner

    assert_same(in_pieces(make, [(2, "graceful"), (4, "graceful")]), undisturbed(make))


class Forgetful(Callback):
    """Holds a scheduler, and does not say so."""

    def before_fit(self, event: BeforeFit) -> None:
        self.schedule = optim.lr_scheduler.StepLR(event.learner.opt, 1)


def test_a_callback_that_forgets_a_scheduler_is_told_of(tmp_path: Path) -> None:
    with capture_logs() as logs:
        make_learner(Forgetful(), OneCycle()).run(1, cbs=CheckpointCB(tmp_path))
    (line,) = logs
    assert (line["event"], line["found"]) == ("callback_state_not_saved", ["Forgetful.schedule"])


class Colour(Enum):
    RED = "red"


class Holds(Callback):
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize(
    ("value", "comes_back"),
    [
        (numpy.float64(0.5), 0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(3), 3),
        (numpy.bool_(True), True),
        (numpy.str_("text"), "text"),
        (numpy.arange(3), torch.arange(3)),
        ({numpy.int64(1): 2, Colour.RED: 3, (1, "a"): 4}, {1: 2, "red": 3, (1, "a"): 4}),
        (Colour.RED, "red"),
        (deque([1, 2], maxlen=2), [1, 2]),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Path("somewhere"), "somewhere"),
        (torch.float16, torch.float16),
        (torch.Size([2, 3]), torch.Size([2, 3])),
        (1j, 1j),
        (nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.zeros(0), torch.zeros(0)),
        (math.nan, math.nan),
        (2**80, 2**80),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_state_may_hold_comes_back_as_plain_data(
    value: Any, comes_back: Any, tmp_path: Path
) -> None:
    make_learner(Holds(value)).run(1, cbs=CheckpointCB(tmp_path))
    cb = Holds(None)
    make_learner(cb).run(1, resume=tmp_path)
    assert list(differences(cb.value, comes_back)) == []
    assert isinstance(cb.value, dict) or type(cb.value) is type(comes_back)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), r"state\['callbacks'\]\['Holds'\]\['value'\] is <object"),
        ([1, {"a": {1, 2}}], r"\['value'\]\[1\]\['a'\] is \{1, 2\}"),
        (torch.eye(2).to_sparse(), r"\['value'\] is tensor\(indices="),
        (lambda: None, r"\['value'\] is <function"),
        (b"bytes", r"\['value'\] is b'bytes'"),
        ({object(): 1}, r"the key state\['callbacks'\]\['Holds'\]\['value'\]\[<.*>\] is <object"),
    ],
    ids=["object", "set", "sparse", "function", "bytes", "key"],
)
def test_what_it_may_not_hold_is_named_before_any_work(
    value: Any, named: str, tmp_path: Path
) -> None:
    learner = make_learner(Holds(value))
    with pytest.raises(TypeError, match=named + r"(?s:.*)which a checkpoint cannot hold"):
        learner.run(1, cbs=CheckpointCB(tmp_path / "new"))
    assert learner.result is not None
    assert learner.result.batches == 0
    assert not (tmp_path / "new").exists()


def test_numbers_of_numpy_in_the_history_come_back(tmp_path: Path) -> None:
    def make() -> TrainLearner:
        learner = make_learner()

        @learner.on(AfterEpoch)
        def note(event: AfterEpoch) -> None:
            learner.record["f1"] = numpy.float64(0.25) * event.epoch

        return learner

    result = make().run(1, cbs=CheckpointCB(tmp_path))
    assert make().run(1, resume=tmp_path).history == result.history


def test_weights_that_are_one_stay_one(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        model[1].weight = model[0].weight
        return model

    def make() -> TrainLearner:
        return make_learner(model=tied, opt_func=momentum_sgd)

    assert_same(in_pieces(make, [(3, "graceful"), (6, "graceful")]), undisturbed(make))


def test_what_was_loaded_is_not_held_while_it_is_trained_on(in_the_middle: Path) -> None:
    """It is as large as the model and the state of the optimizer."""
    learner = make_learner()
    held = []

    @learner.on(AfterBatch)
    def look(event: AfterBatch) -> None:
        loaded = [thing for thing in gc.get_objects() if type(thing) is Checkpoint]
        held.append([one for one in loaded if one.path == learner.resumed_from])

    learner.run(1, resume=in_the_middle)
    assert held == [[]] * (TRAIN - 3 + VALID)


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_an_epoch_that_is_never_taken_up_again_is_not_saved(
    in_the_middle: Path, n_epochs: int
) -> None:
    """The checkpoint that is resumed would be lost for a state that nobody has trained."""
    learner = make_learner()
    learner.subscribe(BeforeEpoch, cancel_epoch)
    before = sorted(path.name for path in in_the_middle.iterdir())
    with pytest.raises(RuntimeError, match="before its state was loaded"):
        learner.run(n_epochs, valid=False, cbs=CheckpointCB(in_the_middle), resume="last")
    assert sorted(path.name for path in in_the_middle.iterdir()) == before
    assert learner.result.status == "failed"


def cancel_epoch(event: BeforeEpoch) -> None:
    raise CancelEpochException("not this one")


def test_an_epoch_that_is_cancelled_before_it_was_taken_up_is_no_silent_beginning(
    in_the_middle: Path,
) -> None:
    learner = make_learner()

    @learner.on(BeforeEpoch, once=True)
    def leave(event: BeforeEpoch) -> None:
        raise CancelEpochException("not this one")

    with pytest.raises(RuntimeError, match="before its state was loaded"):
        learner.run(EPOCHS, resume=in_the_middle)

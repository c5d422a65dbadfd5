"""A fit that was interrupted and resumed is the fit that was not: to the bit, wherever it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    MetricsCB,
)
from eventrain.engine import (
    ThreadLoader,
    TrainLearner,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import optim
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
)
from torcheval.metrics import (
    Metric,
    WindowedClickThroughRate,
)

from tests.support.resuming import (
    EPOCH,
    KINDS,
    LOADERS,
    PLACES,
    TRAIN,
    TRAINING,
    Augmented,
    AugmentedPerSample,
    Pieces,
    Streamed,
    assert_same,
    in_pieces,
    interrupt,
    list_of_batches,
    make_dls,
    make_learner,
    make_model,
    own_generator,
    restless_model,
    scaled_by_accelerate,
    undisturbed,
)


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_trained_a_resumed_fit_equals_the_uninterrupted_one(kind: str) -> None:
    make = KINDS[kind]
    expected = undisturbed(make)
    for place in PLACES:
        assert_same(in_pieces(make, [(place, "graceful")]), expected)


@pytest.mark.parametrize("name", LOADERS)
def test_whatever_the_data_a_resumed_fit_equals_the_uninterrupted_one(name: str) -> None:
    def make() -> TrainLearner:
        return make_learner(model=restless_model, dls=make_dls(LOADERS[name]()))

    expected = undisturbed(make)
    for place in (1, 3, TRAIN, EPOCH + 2):
        assert_same(in_pieces(make, [(place, "graceful")]), expected)


@settings(max_examples=25)
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
@example(  # its first work is the step of a batch that was accumulated before
    kind="fp16-momentum-accumulated", data="async", pieces=[(5, "graceful")], each={}, phases={}
)
def test_however_often_and_however_it_ends_it_equals_the_uninterrupted_fit(
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


def test_a_resumed_fit_may_read_by_more_threads_and_further_ahead() -> None:
    """Its sampler draws on, where it was, from a generator that was ahead by another number."""

    def make(num_threads: int, read_ahead: int) -> TrainLearner:
        sampler = RandomSampler(
            TRAINING, replacement=True, num_samples=72, generator=own_generator()
        )
        batches = BatchSampler(sampler, 16, False)
        loader = ThreadLoader(
            AugmentedPerSample(),
            batch_sampler=batches,
            num_threads=num_threads,
            read_ahead=read_ahead,
        )
        return make_learner(model=restless_model, dls=make_dls(loader))

    sizes = iter([(1, 1), (3, 4), (2, 2), (1, 3)])
    resumed = in_pieces(lambda: make(*next(sizes)), [(1, "graceful"), (2, "graceful"), (1, "stop")])
    assert_same(resumed, undisturbed(lambda: make(2, 4)))


class ByEpoch(Sampler[int]):
    """As torch's DistributedSampler: another order every epoch, if `set_epoch` is called."""

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
def test_a_loader_that_keeps_its_own_state_resumes_from_that(dataset: Any) -> None:
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
def test_data_that_may_not_repeat_is_logged_before_and_after(
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


def test_data_that_repeats_is_not_logged(tmp_path: Path) -> None:
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

"""Reading by threads: the batches of a DataLoader, and nothing left behind."""

from __future__ import annotations

import contextvars
import gc
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import numpy
import pytest
import torch
from eventrain.engine import DataLoaders, Prefetcher, ThreadLoader, TrainLearner, sample_generator
from eventrain.engine.data.dataloaders import has_exact_length
from eventrain.events import (
    AfterBatch,
    AfterLoss,
    BeforeBatch,
    CancelEpochException,
    CleanupEpoch,
    Event,
)
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
)
from torchvision.transforms import v2

from tests.support.programs import assert_prints_end_alone
from tests.support.waiting import GUARD, in_a_thread, wait_until


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("eventrain-")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """G4, G13: after every test here."""
    yield
    assert threads() == []


class Squares(Dataset[Any]):
    """Samples that nobody else holds; remembers them weakly.

    Args:
        n: how many.
        at: called with the index of a sample, in the thread that reads it, before it is made.
    """

    def __init__(self, n: int = 20, at: Callable[[int], object] = lambda index: None) -> None:
        self.n, self.at = n, at
        self.read: list[int] = []
        self.refs: list[weakref.ref[torch.Tensor]] = []

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> Any:
        self.read.append(index)
        self.at(index)
        x = torch.tensor([float(index), index**2.0, 1.0])
        self.refs.append(weakref.ref(x))
        return x, x.sum(0, keepdim=True)


def seeded(make: Callable[[], Any], seed: int = 3) -> tuple[list[Any], torch.Tensor]:
    """Two epochs of a loader, and the random state afterwards."""
    torch.manual_seed(seed)
    loader = make()
    return [batch for _ in range(2) for batch in loader], torch.get_rng_state()


def assert_same_batches(ours: list[Any], theirs: list[Any]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert type(a) is type(b)
        assert all(map(torch.equal, a, b))


# --------------------------------------------------------------------- the batches of a DataLoader


@given(
    n=st.integers(1, 40),
    batch_size=st.integers(1, 12),
    drop_last=st.booleans(),
    shuffle=st.booleans(),
    own_generator=st.booleans(),
    num_threads=st.integers(1, 4),
    read_ahead=st.one_of(st.none(), st.integers(1, 9)),
)
def test_the_batches_and_the_random_state_are_those_of_a_dataloader(
    n: int,
    batch_size: int,
    drop_last: bool,
    shuffle: bool,
    own_generator: bool,
    num_threads: int,
    read_ahead: int | None,
) -> None:
    def make(cls: Any, **kwargs: Any) -> Any:
        if own_generator:
            kwargs["generator"] = torch.Generator().manual_seed(n)
        return cls(Squares(n), batch_size, shuffle, drop_last=drop_last, **kwargs)

    by_threads = {"num_threads": num_threads, "read_ahead": read_ahead}
    ours, our_state = seeded(lambda: make(ThreadLoader, **by_threads))
    theirs, their_state = seeded(lambda: make(DataLoader))
    assert_same_batches(ours, theirs)
    assert torch.equal(our_state, their_state)
    assert threads() == []


class InBatches(Squares):
    """One that makes several samples at once."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.read.append(-len(indices))
        return [self[index] for index in indices]


class First(Subset[Any]):
    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.dataset[0] for _ in indices]


KINDS: dict[str, Callable[[Any], Any]] = {
    "sampler": lambda cls: cls(Squares(), 3, sampler=WeightedRandomSampler([*range(1, 21)], 30)),
    "batch sampler": lambda cls: cls(
        Squares(), batch_sampler=BatchSampler(RandomSampler(range(20)), 3, True)
    ),
    "batches of several sizes": lambda cls: cls(Squares(), batch_sampler=[[3, 1], [2], [5, 5, 5]]),
    "collate": lambda cls: cls(Squares(), 3, collate_fn=lambda samples: samples[0]),
    "no batches": lambda cls: cls(Squares(), None, sampler=RandomSampler(range(20))),
    "batches by the dataset": lambda cls: cls(
        TensorDataset(torch.arange(20), torch.ones(20)),
        None,
        sampler=BatchSampler(RandomSampler(range(20)), 3, False),
    ),
    "getitems": lambda cls: cls(InBatches(), 3, True),
    "subset": lambda cls: cls(Subset(Subset(Squares(), range(0, 20, 2)), [3, 1, 2]), 2, True),
    "subset with its own getitems": lambda cls: cls(First(Squares(), range(0, 20, 2)), 3, True),
    "subset with getitems": lambda cls: cls(Subset(InBatches(), range(0, 20, 2)), 3, True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_to_sample_and_to_collate_is_that_of_a_dataloader(kind: str) -> None:
    ours, our_state = seeded(lambda: KINDS[kind](ThreadLoader))
    theirs, their_state = seeded(lambda: KINDS[kind](DataLoader))
    assert_same_batches(ours, theirs)
    assert torch.equal(our_state, their_state)
    assert len(KINDS[kind](ThreadLoader)) == len(KINDS[kind](DataLoader))


def test_a_dataset_with_getitems_is_asked_for_whole_batches() -> None:
    data = InBatches(5)
    list(ThreadLoader(data, 3, num_threads=1))
    assert data.read == [-3, 0, 1, 2, -2, 3, 4]


def test_iterations_at_the_same_time_are_independent() -> None:
    loader = ThreadLoader(Squares(4), None)
    pairs = [(int(a[0][0]), int(b[0][0])) for a in loader for b in loader]
    assert pairs == [(i, j) for i in range(4) for j in range(4)]


def test_its_length_is_the_number_of_its_batches() -> None:
    assert has_exact_length(ThreadLoader(Squares(), 3))
    assert not has_exact_length(ThreadLoader(Squares(), batch_sampler=RandomBatches()))


class RandomBatches:
    """A sampler that cannot know how many batches there will be."""

    def __iter__(self) -> Iterator[list[int]]:
        yield [1]

    def __len__(self) -> int:
        return 5


def test_it_says_what_it_is() -> None:
    loader = ThreadLoader(Squares(), 3, num_threads=4)
    assert repr(loader) == "ThreadLoader(Squares, batch_size=3, num_threads=4, read_ahead=8)"


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "2"])
@pytest.mark.parametrize("name", ["num_threads", "read_ahead"])
def test_an_invalid_number_is_an_error_that_names_it(name: str, value: Any) -> None:
    arguments = {"num_threads": 2, name: value}
    with pytest.raises(ValueError, match=rf"{name}={value!r}: give an integer, 1 or more"):
        ThreadLoader(Squares(), **arguments)


@pytest.mark.parametrize(
    ("name", "value"), [("num_workers", 2), ("prefetch_factor", 4), ("persistent_workers", True)]
)
def test_an_argument_for_worker_processes_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value} is for worker processes.*num_threads"):
        ThreadLoader(Squares(), **{name: value})


def test_a_dataset_that_only_one_thread_can_read_is_refused() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(())

    with pytest.raises(TypeError, match=r"Stream is an IterableDataset.*Prefetcher\(DataLoader"):
        ThreadLoader(Stream())


# ----------------------------------------------------------------------------- how far it is ahead


@pytest.mark.parametrize(("num_threads", "read_ahead"), [(1, 1), (2, 1), (2, 3), (3, 6)])
def test_it_reads_as_many_batches_ahead_as_asked_for_and_no_more(
    num_threads: int, read_ahead: int
) -> None:
    data = Squares(40)
    batches = iter(ThreadLoader(data, 2, num_threads=num_threads, read_ahead=read_ahead))
    for taken in range(1, 21):
        next(batches)
        expected = min(2 * (taken + read_ahead), 40)
        wait_until(lambda expected=expected: len(data.read) == expected)
    assert next(batches, None) is None


def test_the_threads_read_at_the_same_time() -> None:
    together = threading.Barrier(3)
    data = Squares(12, lambda index: together.wait(GUARD))
    assert len(list(ThreadLoader(data, 2, num_threads=3))) == 6


def test_no_more_threads_are_started_than_there_are_batches() -> None:
    batches = iter(ThreadLoader(Squares(4), 2, num_threads=8))
    assert threads() == []
    next(batches)
    assert len(threads()) == 2
    batches.close()  # type: ignore[attr-defined]


def test_a_batch_that_was_handed_out_is_not_held() -> None:
    """G12: not by the readers, nor by the iterator."""
    data = Squares(6)
    gc.disable()
    try:
        batches = iter(ThreadLoader(data, 2, num_threads=2, collate_fn=lambda samples: samples))
        for _ in range(3):
            batch = next(batches)
            ref = weakref.ref(batch[0][0])
            del batch
            assert ref() is None
        batches.close()  # type: ignore[attr-defined]
        assert [ref for ref in data.refs if ref() is not None] == []
    finally:
        gc.enable()


def test_batches_read_for_nobody_are_released() -> None:
    data = Squares(20)
    gc.disable()
    try:
        for _ in ThreadLoader(data, 2, collate_fn=lambda samples: samples):
            break
        del _
        assert [ref for ref in data.refs if ref() is not None] == []
    finally:
        gc.enable()


def test_the_dataset_meets_the_contextvars_grad_mode_and_default_device_of_the_caller() -> None:
    var = contextvars.ContextVar("var", default="none")
    met: list[tuple[str, bool, str]] = []

    def meet(index: int) -> None:
        met.append((var.get(), torch.is_grad_enabled(), torch.zeros(()).device.type))

    loader = ThreadLoader(Squares(2, meet), 1, num_threads=2)
    list(loader)
    batches = iter(loader)
    token = var.set("own")
    with torch.no_grad(), torch.device("meta"):
        list(batches)
    var.reset(token)
    assert met == [("none", True, "cpu")] * 2 + [("own", False, "meta")] * 2


def test_batches_are_pinned_where_there_is_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the threads that read, also in containers."""

    class Part:
        pinned_by = ""

        def pin_memory(self) -> Part:
            self.pinned_by = threading.current_thread().name
            return self

    def pinned() -> list[str]:
        collate = {"collate_fn": lambda samples: {"parts": [Part(), len(samples)]}}
        return [
            batch["parts"][0].pinned_by
            for batch in ThreadLoader(Squares(4), 2, pin_memory=True, **collate)
        ]

    assert pinned() == ["", ""]
    monkeypatch.setattr(
        torch.accelerator, "current_accelerator", lambda **kwargs: torch.device("cuda")
    )
    monkeypatch.setattr("eventrain.engine.data.readers.has_pinned_memory", lambda name: True)
    monkeypatch.setattr("eventrain.engine.data.thread_state.initialized_accelerator", lambda: None)
    assert pinned() == [f"eventrain-reader-{threading.current_thread().name}"] * 2


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("kind", [ValueError, CancelEpochException, SystemExit])
def test_an_error_of_the_dataset_is_raised_in_its_place_and_names_the_sample(
    kind: type[BaseException], num_threads: int
) -> None:
    error = kind("no seventh")

    def fail_at_7(index: int) -> None:
        if index == 7:
            raise error

    got: list[list[float]] = []
    loader = ThreadLoader(Squares(20, fail_at_7), 3, num_threads=num_threads)
    with pytest.raises(kind) as caught:
        got.extend(x[:, 0].tolist() for x, _ in loader)
    assert got == [[0, 1, 2], [3, 4, 5]]
    assert caught.value is error
    assert error.__notes__ == ["raised while reading the sample with index 7 of the dataset"]
    assert caught.traceback[-1].name == "fail_at_7"


def test_an_error_behind_what_was_taken_is_not_heard_of() -> None:
    read = threading.Event()

    def fail_at_1(index: int) -> None:
        if index == 1:
            read.set()
            raise ValueError

    for _ in ThreadLoader(Squares(3, fail_at_1)):
        assert read.wait(GUARD)
        break


def test_an_error_in_collating_or_in_getitems_names_the_samples() -> None:
    def collate(samples: Any) -> Any:
        raise ValueError("cannot")

    with pytest.raises(ValueError, match="cannot") as caught:
        list(ThreadLoader(Squares(), 8, collate_fn=collate))
    assert caught.value.__notes__ == [
        "raised while collating the samples with indices [0, 1, 2, 3, 4, 5, ...]"
    ]
    with pytest.raises(ZeroDivisionError) as divided:
        list(ThreadLoader(InBatches(8, lambda index: 1 / (2 - index)), 4))
    assert divided.value.__notes__ == ["raised while reading the samples with indices [0, 1, 2, 3]"]


def test_an_error_of_the_sampler_comes_after_the_batches_before_it() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            yield from [4, 2]
            raise OSError("the index")

    got: list[float] = []
    with pytest.raises(OSError, match="the index"):
        got.extend(float(x[0]) for x, _ in ThreadLoader(Squares(), None, sampler=Broken()))
    assert got == [4, 2]


def test_a_stop_iteration_of_the_dataset_does_not_end_it_silently() -> None:
    def stop(index: int) -> None:
        raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(ThreadLoader(Squares(4, stop)))


def test_an_error_that_was_dealt_with_holds_nothing() -> None:
    """G12: no circle keeps the batches and the dataset that its traceback knows."""

    class BrokenError(Exception): ...

    def fail_at_1(index: int) -> None:
        if index == 1:
            raise BrokenError

    gc.disable()
    try:
        try:
            sum(1 for _ in ThreadLoader(Squares(2, fail_at_1)))
        except BrokenError as exc:
            ref = weakref.ref(exc)
        assert ref() is None
    finally:
        gc.enable()


def test_a_thread_that_cannot_read_at_all_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(enabled: bool) -> None:
        raise RuntimeError("no such device")

    monkeypatch.setattr("eventrain.engine.data.thread_state.torch.set_grad_enabled", fail)
    with pytest.raises(RuntimeError, match="no such device"):
        in_a_thread(lambda: list(ThreadLoader(Squares())))


async def test_in_a_fit_the_error_says_which_sample_and_which_batch(
    make_model: Callable[[], nn.Module],
) -> None:
    """G5."""
    data = Squares(20, lambda index: 1 / (9 - index))
    learner = TrainLearner(make_model(), DataLoaders(ThreadLoader(data, 4)), lr=0.00001)
    with pytest.raises(ZeroDivisionError) as caught:
        await learner.fit(valid=False)
    assert caught.value.__notes__[:2] == [
        "raised while reading the sample with index 9 of the dataset",
        "raised while reading batch 2 of dls.train",
    ]
    assert learner.result.batches == 2


# --------------------------------------------------------------------------------------- leaving


def test_an_iteration_that_is_left_waits_for_the_samples_that_are_being_read() -> None:
    """Not for whole batches."""
    reading, gate = threading.Event(), threading.Event()

    def wait_at_2(index: int) -> None:
        if index == 2:
            reading.set()
            assert gate.wait(GUARD)

    data = Squares(1000, wait_at_2)
    opener = threading.Timer(0.05, gate.set)
    for _ in ThreadLoader(data, batch_sampler=[[0, 1], range(2, 1000)], num_threads=1):
        assert reading.wait(GUARD)
        opener.start()
        break
    assert gate.is_set()
    assert data.read == [0, 1, 2]


def test_an_iteration_that_never_began_has_no_thread() -> None:
    batches = iter(ThreadLoader(Squares()))
    assert threads() == []
    batches.close()  # type: ignore[attr-defined]


def test_an_iterator_in_a_circle_may_be_collected_in_one_of_its_threads() -> None:
    """It cannot wait for itself."""
    dropped, collected = threading.Event(), threading.Event()
    reader: list[threading.Thread] = []

    def collect_at_1(index: int) -> None:
        if index == 1:
            reader.append(threading.current_thread())
            assert dropped.wait(GUARD)
            gc.collect()
            collected.set()

    gc.disable()
    try:
        circle: list[Any] = [iter(ThreadLoader(Squares(9, collect_at_1)))]
        circle.append(circle)
        next(circle[0])
        del circle
        dropped.set()
        assert collected.wait(GUARD)
        reader[0].join(GUARD)
    finally:
        gc.enable()


def test_an_iterator_left_open_does_not_keep_the_interpreter() -> None:
    script = """
        import structlog, torch
        from eventrain.engine import ThreadLoader
        from torch.utils.data import TensorDataset

        structlog.configure(processors=[structlog.dev.ConsoleRenderer()],
                            wrapper_class=structlog.make_filtering_bound_logger(40))

        class Circle: pass

        class Busy(TensorDataset):
            def __getitem__(self, index):
                return sum(torch.randn(300, 300).svd().S.sum() for _ in range(3))

        opened = iter(ThreadLoader(Busy(torch.zeros(9999)), 2, num_threads=4))
        next(opened)
        circle = Circle()
        circle.circle = circle
        circle.opened = iter(ThreadLoader(Busy(torch.zeros(9999)), 2))
        next(circle.opened)
        print("end")
    """
    assert_prints_end_alone(script)


def test_one_that_hangs_does_not_keep_the_interpreter_either() -> None:
    script = """
        import threading
        from eventrain.engine import ThreadLoader
        from eventrain.engine.data import thread_state

        thread_state.PATIENCE = 0.01

        class Hangs:
            def __len__(self):
                return 9

            def __getitem__(self, index):
                if index:
                    threading.Event().wait()
                return index

        opened = iter(ThreadLoader(Hangs(), num_threads=2))
        next(opened)
        print("end")
    """
    assert_prints_end_alone(script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_that_is_forked_meanwhile_can_read_itself() -> None:
    """And drop the iterator of its parent, whose threads it does not have."""
    script = """
        import os, sys, warnings
        warnings.simplefilter("ignore")
        import torch
        from eventrain.engine import ThreadLoader
        from torch.utils.data import TensorDataset

        loader = ThreadLoader(TensorDataset(torch.arange(64)), 2, num_threads=3)
        for i, _ in enumerate(loader):
            if i % 8 == 0 and os.fork() == 0:
                assert sum(len(x) for x, in loader) == 64
                break
        else:
            for _ in range(4):
                assert os.wait()[1] == 0
            print("end")
        sys.stdout.flush()
    """
    assert_prints_end_alone(script)


@pytest.mark.parametrize("event_type", [BeforeBatch, AfterLoss, AfterBatch])
async def test_a_cancelled_epoch_has_no_thread_any_more_when_it_cleans_up(
    make_model: Callable[[], nn.Module], event_type: type[Event]
) -> None:
    """G1, G4."""
    data = Squares(1_000_000)
    loader = ThreadLoader(data, 2, num_threads=3, collate_fn=small)
    learner = TrainLearner(make_model(), DataLoaders(loader), lr=0.001)
    left: list[list[str]] = []
    learner.on(CleanupEpoch)(lambda event: left.append(threads()))

    @learner.on(event_type, where=lambda event: event.iter == 2)
    def cancel(event: Event) -> None:
        raise CancelEpochException

    with anyio.fail_after(GUARD):
        result = await learner.fit(2, valid=False, run_id="run")
    assert left == [["eventrain-run"]] * 2
    assert result.status == "completed"
    assert len(data.read) <= 2 * 2 * (3 + 6)


def small(samples: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch that a line with any learning rate bears."""
    x = torch.stack([x for x, _ in samples])
    return x / (1 + x.norm()), torch.zeros(len(x), 1)


@pytest.mark.parametrize("end", ["completes", "fails", "stops"])
@pytest.mark.parametrize("lengths", [{}, {"epoch_length": 2, "valid_length": 2}])
async def test_no_fit_leaves_a_thread(
    make_model: Callable[[], nn.Module], end: str, lengths: dict[str, int]
) -> None:
    """G4, G13: however often, training and validating, also with a pass that is left open."""
    dls = DataLoaders(
        ThreadLoader(Squares(20), 4, collate_fn=small),
        ThreadLoader(Squares(9), 3, collate_fn=small),
    )
    learner = TrainLearner(make_model(), dls, lr=0.001)
    before = threading.active_count()

    @learner.on(AfterLoss, where=lambda event: event.iter == 1 and not event.training)
    def act(event: AfterLoss) -> None:
        if end == "fails":
            raise ZeroDivisionError
        if end == "stops":
            learner.stop()

    with anyio.fail_after(GUARD):
        for _ in range(5):
            try:
                await learner.fit(**lengths)
            except ZeroDivisionError:
                assert end == "fails"
            expected = {"completes": "completed", "fails": "failed", "stops": "cancelled"}[end]
            assert learner.result.status == expected
            assert threads() == []
    assert threading.active_count() == before


async def test_a_fit_cancelled_by_its_host_returns_when_the_readers_have_ended(
    make_model: Callable[[], nn.Module],
) -> None:
    """G4: the model is waiting for a sample that is being read."""
    reading, gate = threading.Event(), threading.Event()

    def wait_at_9(index: int) -> None:
        if index == 9:
            reading.set()
            assert gate.wait(GUARD)

    loader = ThreadLoader(Squares(1_000_000, wait_at_9), 2, collate_fn=small)
    learner = TrainLearner(make_model(), DataLoaders(loader), lr=0.001)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit, 1, True, False)
            while not reading.is_set():
                await anyio.sleep(0.001)
            tg.cancel_scope.cancel()
            threading.Timer(0.05, gate.set).start()
    assert gate.is_set()
    assert threads() == []
    assert learner.result.who == "host"


async def test_the_readers_are_named_after_the_run(make_model: Callable[[], nn.Module]) -> None:
    names: set[str] = set()
    data = Squares(4, lambda index: names.add(threading.current_thread().name))
    for loader in (ThreadLoader(data, 2), Prefetcher(ThreadLoader(data, 2))):
        learner = TrainLearner(make_model(), DataLoaders(loader), lr=0.001)
        await learner.fit(valid=False, run_id="abc")
    assert names == {"eventrain-reader-abc", "eventrain-reader-prefetch-abc"}


# ------------------------------------------------------------------------------------ in a fit


def trained(wrap: Any, dataset: Any, **backend: Any) -> tuple[list[Any], torch.Tensor, list[Any]]:
    torch.manual_seed(7)
    dls = DataLoaders(wrap(dataset, 64, shuffle=True), wrap(dataset, 64))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(), nn.Linear(32, 10))
    learner = TrainLearner(model, dls, F.cross_entropy, lr=0.1)
    losses: list[Any] = []
    learner.on(AfterLoss)(lambda event: losses.append(event.loss.item()))
    learner.run(2, **backend)
    return list(model.state_dict().values()), torch.get_rng_state(), losses


def assert_same_training(a: Any, b: Any) -> None:
    assert all(map(torch.equal, a[0], b[0]))
    assert torch.equal(a[1], b[1])
    assert a[2] == b[2]


def threaded(*args: Any, **kwargs: Any) -> ThreadLoader:
    return ThreadLoader(*args, num_threads=3, **kwargs)


def test_a_fit_ends_with_the_weights_and_the_random_state_it_has_with_a_dataloader(
    digits: tuple[torch.Tensor, torch.Tensor], backend: dict[str, Any]
) -> None:
    """G11: shuffled from the global random state, which dropout draws from too."""
    data = TensorDataset(*digits)
    assert_same_training(trained(threaded, data, **backend), trained(DataLoader, data))


# ------------------------------------------------------------------------------- random numbers


class Drawing(Dataset[Any]):
    """Samples that draw random numbers."""

    def __init__(self, *draws: Callable[[], Any]) -> None:
        self.draws = draws

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), *(float(draw()) for draw in self.draws)])


def numpy_by_sample() -> float:
    seed = torch.randint(2**63 - 1, (), generator=sample_generator())
    return numpy.random.default_rng(int(seed)).random()


BY_TORCH: dict[str, Callable[[], Any]] = {
    "rand": lambda: torch.rand(()),
    "rand on a named device": lambda: torch.rand(1, device="cpu"),
    "randn": lambda: torch.randn(()),
    "randint": lambda: torch.randint(0, 1000, size=(1,)),
    "randperm": lambda: torch.randperm(100)[0],
    "normal": lambda: torch.normal(0.0, 1.0, (1,)),
    "uniform_": lambda: torch.empty(1).uniform_(0, 5),
    "bernoulli": lambda: torch.bernoulli(torch.full((20,), 0.5)).sum(),
    "multinomial": lambda: torch.ones(1000).multinomial(1),
    "rand_like": lambda: torch.rand_like(torch.zeros(1)),
    "a distribution": lambda: torch.distributions.Beta(torch.ones(1), torch.ones(1)).sample(),
    "a transform": lambda: v2.RandomResizedCrop(4)(torch.arange(300.0).view(3, 10, 10)).sum(),
}


@pytest.mark.parametrize("draw", BY_TORCH.values(), ids=BY_TORCH)
def test_what_torch_draws_depends_on_the_seed_alone(draw: Callable[[], Any]) -> None:
    """Not on the threads, and it leaves the global random state to the training."""
    with capture_logs() as logs:
        one, state = seeded(lambda: ThreadLoader(Drawing(draw, draw), 4, True, num_threads=1))
        two, _ = seeded(lambda: ThreadLoader(Drawing(draw, draw), 4, True, num_threads=4))
        three, _ = seeded(lambda: ThreadLoader(Drawing(draw, draw), 4, True), seed=4)
    _, undrawn = seeded(lambda: DataLoader(Drawing(), 4, True))
    assert torch.equal(torch.cat(one), torch.cat(two))
    assert not torch.equal(torch.cat(one), torch.cat(three))
    assert torch.equal(state, undrawn)
    drawn = torch.cat(one)[:, 1:]
    assert len(set(drawn[:, 0].tolist())) > 5
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    assert not torch.equal(torch.cat(one[:8]), torch.cat(one[8:]))
    assert [log["event"] for log in logs] == ["random_numbers_per_sample"] * 3


def test_a_generator_of_ones_own_is_drawn_from_as_ever() -> None:
    def draw() -> torch.Tensor:
        return torch.rand((), generator=torch.Generator().manual_seed(1))

    with capture_logs() as logs:
        ours, _ = seeded(lambda: ThreadLoader(Drawing(draw), 4))
    theirs, _ = seeded(lambda: DataLoader(Drawing(draw), 4))
    assert torch.equal(torch.cat(ours), torch.cat(theirs))
    assert logs == []


def test_a_draw_on_another_device_is_left_to_that_device() -> None:
    def draw() -> int:
        return len(torch.rand(3, device="meta") + torch.empty(3, device="meta").uniform_())

    assert torch.cat([*ThreadLoader(Drawing(draw), 4)])[:, 1].eq(3).all()
    batches = iter(ThreadLoader(Drawing(lambda: torch.rand(3).device.type == "meta"), 10))
    with torch.device("meta"):
        assert len(list(batches)) == 3


def test_other_libraries_are_seeded_by_the_generator_of_the_sample() -> None:
    with capture_logs() as logs:
        one, _ = seeded(lambda: ThreadLoader(Drawing(numpy_by_sample), 4, True, num_threads=1))
        two, _ = seeded(lambda: ThreadLoader(Drawing(numpy_by_sample), 4, True, num_threads=4))
    assert torch.equal(torch.cat(one), torch.cat(two))
    assert len(set(torch.cat(one)[:, 1].tolist())) == 60
    assert logs == []


def test_a_sample_that_is_drawn_twice_differs_as_in_a_dataloader() -> None:
    loader = ThreadLoader(Drawing(numpy_by_sample), 2, sampler=[5, 5, 5, 5])
    assert len(set(torch.cat([*loader])[:, 1].tolist())) == 4


def test_elsewhere_the_generator_of_the_sample_is_the_global_one() -> None:
    assert sample_generator() is torch.default_generator
    ours, state = seeded(lambda: DataLoader(Drawing(numpy_by_sample), 4))
    assert torch.equal(
        torch.cat(ours), torch.cat(seeded(lambda: DataLoader(Drawing(numpy_by_sample), 4))[0])
    )
    _, undrawn = seeded(lambda: DataLoader(Drawing(), 4))
    assert not torch.equal(state, undrawn)


def test_a_sample_has_one_generator_and_a_batch_another_for_its_collation() -> None:
    met: list[Any] = []

    def collate(samples: Any) -> torch.Tensor:
        met.append(sample_generator())
        return torch.rand(len(samples)) + torch.rand(())

    data = Drawing(lambda: met.append(sample_generator()) or met[-1] is sample_generator())
    one, _ = seeded(lambda: ThreadLoader(data, 10, num_threads=1, collate_fn=collate))
    assert len({id(generator) for generator in met}) == len(met) == 2 * (30 + 3)
    two, _ = seeded(lambda: ThreadLoader(data, 10, num_threads=3, collate_fn=collate))
    assert torch.equal(torch.cat(one), torch.cat(two))


def test_a_training_with_random_transforms_is_the_same_again_with_other_threads(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """G11."""

    class Turned(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return v2.RandomAffine(20, translate=(0.1, 0.1))(x), y

    data = Turned(*digits)
    assert_same_training(
        trained(threaded, data),
        trained(lambda *args, **kwargs: ThreadLoader(*args, num_threads=1, **kwargs), data),
    )


@pytest.mark.parametrize(
    ("name", "draw"),
    [
        ("numpy", lambda: numpy.random.rand()),
        ("random", random.random),
        ("torch", lambda: F.dropout(torch.ones(100)).sum()),
    ],
)
def test_random_numbers_that_depend_on_the_threads_are_told_of_once(
    name: str, draw: Callable[[], Any]
) -> None:
    loader = ThreadLoader(Drawing(draw), 4, shuffle=True)
    with capture_logs() as logs:
        for _ in range(3):
            list(loader)
    (log,) = logs
    assert log["event"] == "random_numbers_depend_on_threads"
    assert (log["log_level"], log["generators"]) == ("warning", [name])
    assert "sample_generator()" in log["hint"]


def test_a_dataset_that_draws_nothing_is_not_told_of(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    """Though the sampler and the training draw from the global random state."""
    with capture_logs() as logs:
        trained(threaded, TensorDataset(*digits))
    assert [log["event"] for log in logs if "random" in log["event"]] == []

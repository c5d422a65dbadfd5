"""Reading ahead: the same batches in the same order, and nothing left behind."""

from __future__ import annotations

import contextvars
import gc
import signal
import threading
import weakref
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import torch
from eventrain.engine import DataLoaders, Prefetcher, TrainLearner
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
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

from tests.support.programs import assert_prints_end_alone
from tests.support.waiting import GUARD

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("eventrain-")]


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    """G4, G13: after every test here."""
    yield
    assert threads() == []


class Loader:
    """Batches that nobody else holds; remembers them weakly, and which threads asked for them.

    Args:
        n: how many.
        at: called with the number of a batch, in the thread that reads it, before it is made.
    """

    def __init__(self, n: int, at: Callable[[int], object] = lambda index: None) -> None:
        self.n, self.at = n, at
        self.refs: list[weakref.ref[torch.Tensor]] = []
        self.readers: list[threading.Thread] = []
        self.closed_by: list[threading.Thread] = []

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        try:
            for index in range(self.n):
                self.readers.append(threading.current_thread())
                self.at(index)
                yield self._make(index)
        finally:
            self.closed_by.append(threading.current_thread())

    def _make(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.full((4, 3), float(index))
        self.refs.append(weakref.ref(x))
        return x, x.sum(1, keepdim=True)

    @property
    def alive(self) -> list[int]:
        return [index for index, ref in enumerate(self.refs) if ref() is not None]


# --------------------------------------------------------------------------- what is handed out


@given(batches=st.lists(st.integers()), depth=st.integers(1, 5), taken=st.integers(0, 12))
def test_the_batches_are_a_prefix_in_order_and_no_thread_is_left(
    batches: list[int], depth: int, taken: int
) -> None:
    ahead = Prefetcher(batches, depth=depth)
    got = [batch for batch, _ in zip(ahead, range(taken), strict=False)]
    assert got == batches[:taken]
    assert threads() == []
    assert list(ahead) == batches
    assert threads() == []


def test_iterations_at_the_same_time_are_independent() -> None:
    ahead = Prefetcher(range(4))
    assert list(zip(ahead, ahead, strict=True)) == [(i, i) for i in range(4)]
    assert [(i, j) for i in ahead for j in ahead] == [(i, j) for i in range(4) for j in range(4)]


def test_it_is_as_long_as_its_loader() -> None:
    assert len(Prefetcher([1, 2, 3])) == 3
    with pytest.raises(TypeError, match="no len"):
        len(Prefetcher(iter([1, 2, 3])))


def test_an_object_with_only_getitem_can_be_read() -> None:
    class Old:
        def __getitem__(self, index: int) -> int:
            return [10, 20][index]

    assert list(Prefetcher(Old())) == [10, 20]


def test_it_says_what_it_wraps() -> None:
    ahead = Prefetcher([1], "cpu", depth=3)
    assert repr(ahead) == "Prefetcher([1], device='cpu', depth=3)"
    assert (ahead.loader, ahead.device, ahead.depth) == ([1], torch.device("cpu"), 3)
    assert repr(Prefetcher([1])) == "Prefetcher([1], depth=1)"


@pytest.mark.parametrize("depth", [0, -1, 1.0, True, None, "2"])
def test_an_invalid_depth_is_an_error_that_names_it(depth: Any) -> None:
    with pytest.raises(ValueError, match=f"depth={depth!r}: give an integer"):
        Prefetcher([], depth=depth)


def test_a_loader_that_cannot_be_iterated_is_named() -> None:
    with pytest.raises(TypeError, match=r"loader=5 cannot be iterated"):
        Prefetcher(5)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "cuda:x", "meta"])
def test_a_device_that_is_not_here_is_an_error_that_names_it(device: Any) -> None:
    with pytest.raises(ValueError, match=rf"device={device!r}: .*; give another, .* or None"):
        Prefetcher([], device)


def test_on_the_cpu_a_batch_is_what_it_was_containers_and_all() -> None:
    pair = namedtuple("pair", "x y")
    x = torch.ones(2)
    batch = {"a": [x, (x, "text")], "b": pair(x, 1)}
    (got,) = Prefetcher([batch], "cpu")
    assert got == batch
    assert got["a"][0] is got["b"].x is x
    assert type(got["b"]) is pair


# ----------------------------------------------------------------------------- how far it is ahead


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_it_reads_as_many_ahead_as_asked_for_and_no_more(depth: int) -> None:
    counted: list[int] = []
    read = [threading.Event() for _ in range(10)]

    def note(index: int) -> None:
        counted.append(len(loader.alive))  # besides the one that is to be made now
        read[index].set()

    loader = Loader(10, note)
    batches = iter(Prefetcher(loader, depth=depth))
    for index in range(10):
        batch = next(batches)
        assert read[min(index + depth, 9)].wait(GUARD)
        assert len(loader.readers) <= index + 1 + depth
        assert batch[0][0, 0] == index
        del batch
    assert next(batches, None) is None
    assert max(counted) == depth  # depth - 1 that wait, and the one that was handed out


def test_a_batch_that_was_handed_out_is_not_held() -> None:
    """G12: not by the reader, which is about the next one, nor by the iterator."""
    loader = Loader(3)
    gc.disable()
    try:
        batches = iter(Prefetcher(loader))
        for index in range(3):
            batch = next(batches)
            assert index in loader.alive
            del batch
            assert index not in loader.alive
        batches.close()  # type: ignore[attr-defined]
    finally:
        gc.enable()


def test_batches_read_for_nobody_are_released() -> None:
    loader = Loader(9)
    loader.readers = loader.closed_by = _Forgetful()  # who holds the thread holds its queues
    gc.disable()
    try:
        for _ in Prefetcher(loader, depth=3):
            break
        del _
        assert loader.alive == []
    finally:
        gc.enable()


async def test_no_batch_outlives_its_batch_in_a_fit(make_model: Callable[[], nn.Module]) -> None:
    """G12: one that is trained, and one that is ahead."""
    loader = Loader(6)
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher(loader)), lr=0.001)
    counted: list[int] = []
    learner.on(AfterLoss)(lambda event: counted.append(len(loader.alive)))
    gc.disable()
    try:
        with anyio.fail_after(GUARD):
            await learner.fit(2, valid=False)
        learner.batch = learner.preds = learner.loss = None
        assert loader.alive == []
    finally:
        gc.enable()
    assert max(counted) <= 2


# -------------------------------------------------------------------------- in which thread


def test_all_of_an_iteration_is_read_in_one_thread_that_can_be_recognised() -> None:
    loader = Loader(4)
    ahead = Prefetcher(loader)
    assert loader.readers == []
    list(ahead)
    list(ahead)
    first, second = loader.readers[0], loader.readers[-1]
    assert loader.readers == [first] * 4 + [second] * 4
    assert loader.closed_by == [first, second]
    assert first is not second
    assert first.name == f"eventrain-prefetch-{threading.current_thread().name}"
    assert first.daemon


async def test_the_reader_is_named_after_the_run(make_model: Callable[[], nn.Module]) -> None:
    loader = Loader(2)
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher(loader)))
    await learner.fit(valid=False, run_id="abc")
    assert {reader.name for reader in loader.readers} == {"eventrain-prefetch-abc"}


def test_the_loader_meets_the_contextvars_grad_mode_and_default_device_of_the_caller() -> None:
    var = contextvars.ContextVar("var", default="none")
    met: list[tuple[str, bool, str]] = []

    def meet(index: int) -> None:
        met.append((var.get(), torch.is_grad_enabled(), torch.zeros(()).device.type))

    ahead = Prefetcher(Loader(2, meet))
    list(ahead)
    token = var.set("own")
    with torch.no_grad(), torch.device("meta"):
        list(ahead)
    var.reset(token)
    assert met == [("none", True, "cpu")] * 2 + [("own", False, "meta")] * 2


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fit_ends_with_the_weights_and_the_random_state_it_has_without(
    digits: tuple[torch.Tensor, torch.Tensor], num_workers: int
) -> None:
    """G11: shuffled from the global random state, which dropout draws from too."""

    def fit(wrap: Callable[[Any], Any]) -> tuple[list[torch.Tensor], torch.Tensor, list[Any]]:
        torch.manual_seed(7)
        data = TensorDataset(*digits)
        loader = DataLoader(data, 64, shuffle=True, num_workers=num_workers)
        dls = DataLoaders(wrap(loader), wrap(DataLoader(data, 64)))
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Dropout(), nn.Linear(32, 10))
        learner = TrainLearner(model, dls, F.cross_entropy, lr=0.1)
        losses: list[Any] = []
        learner.on(AfterLoss)(lambda event: losses.append(event.loss.item()))
        learner.run(2)
        return list(model.state_dict().values()), torch.get_rng_state(), losses

    plain = fit(lambda loader: loader)
    for depth in (1, 3):
        weights, state, losses = fit(lambda loader, depth=depth: Prefetcher(loader, "cpu", depth))
        assert all(map(torch.equal, weights, plain[0]))
        assert torch.equal(state, plain[1])
        assert losses == plain[2]


# --------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("depth", [1, 4])
@pytest.mark.parametrize("kind", [ValueError, CancelEpochException, SystemExit])
def test_an_error_of_the_loader_is_raised_in_its_place(
    kind: type[BaseException], depth: int
) -> None:
    """The same object, with its traceback."""
    error = kind("no third")

    def fail_at_2(index: int) -> None:
        if index == 2:
            raise error

    got: list[float] = []
    with pytest.raises(kind) as caught:
        got.extend(x[0, 0].item() for x, _ in Prefetcher(Loader(9, fail_at_2), depth=depth))
    assert got == [0, 1]
    assert caught.value is error
    names = [entry.name for entry in caught.traceback]
    assert names[0].startswith("test_an_error_of_the_loader")
    assert names[-1] == "fail_at_2"


def test_an_error_that_was_dealt_with_holds_nothing() -> None:
    """G12: no circle keeps the batches and the loader that its traceback knows."""

    class BrokenError(Exception): ...

    def fail_at_1(index: int) -> None:
        if index == 1:
            raise BrokenError

    loader = Loader(2, fail_at_1)
    gc.disable()
    try:
        try:
            sum(1 for _ in Prefetcher(loader))
        except BrokenError as exc:
            ref = weakref.ref(exc)
        assert ref() is None
        assert loader.alive == []
    finally:
        gc.enable()


def test_an_error_behind_what_was_taken_is_not_heard_of() -> None:
    read = threading.Event()

    def fail_at_1(index: int) -> None:
        if index == 1:
            read.set()
            raise ValueError

    for _ in Prefetcher(Loader(3, fail_at_1)):
        assert read.wait(GUARD)
        break


def test_a_stop_iteration_of_a_loader_that_is_broken_does_not_end_it_silently() -> None:
    class Broken:
        def __iter__(self) -> Iterator[int]:
            raise StopIteration

    with pytest.raises(RuntimeError, match="StopIteration"):
        list(Prefetcher(Broken()))


async def test_in_a_fit_the_error_says_which_batch(make_model: Callable[[], nn.Module]) -> None:
    """G5."""
    loader = Loader(9, lambda index: 1 / (2 - index))
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher(loader)), lr=0.001)
    with pytest.raises(ZeroDivisionError) as caught:
        await learner.fit(valid=False)
    assert "raised while reading batch 2 of dls.train" in caught.value.__notes__
    assert learner.result.batches == 2


async def test_an_empty_loader_is_reported_as_without_the_callback(
    make_model: Callable[[], nn.Module],
) -> None:
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher([])))
    with pytest.raises(ValueError, match=r"dls.train is empty.*Prefetcher\(\[\], depth=1\)"):
        await learner.fit(valid=False)
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher(iter([]))))
    with pytest.raises(ValueError, match=r"dls.train is empty"):
        await learner.fit(valid=False)


# --------------------------------------------------------------------------------------- leaving


@pytest.mark.parametrize("depth", [1, 3])
def test_the_generator_behind_it_is_closed_in_the_thread_that_read_it(depth: int) -> None:
    loader = Loader(9)
    for _ in Prefetcher(loader, depth=depth):
        assert threads() != []
        break
    assert threads() == []
    assert loader.closed_by == loader.readers[:1]


def test_a_generator_that_others_hold_can_be_read_further() -> None:
    """As after a plain loop over it that is left."""
    batches = (i for i in range(9))
    ahead = Prefetcher(batches)
    assert next(iter(ahead)) == 0
    rest = list(batches)
    assert rest[-1] == 8


def test_an_iteration_that_never_began_has_no_thread() -> None:
    batches = iter(Prefetcher(Loader(3)))
    assert threads() == []
    batches.close()  # type: ignore[attr-defined]


def test_whoever_leaves_waits_for_the_batch_that_is_being_read() -> None:
    reading, gate = threading.Event(), threading.Event()
    order: list[str] = []

    def wait_at_1(index: int) -> None:
        if index == 1:
            reading.set()
            assert gate.wait(GUARD)
            order.append("read")

    opener = threading.Thread(target=lambda: order.append("opens") or gate.set())
    for _ in Prefetcher(Loader(9, wait_at_1)):
        assert reading.wait(GUARD)
        opener.start()
        break
    order.append("left")
    opener.join()
    assert order == ["opens", "read", "left"]


def test_an_iterator_in_a_circle_may_be_collected_in_its_own_thread() -> None:
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
        circle: list[Any] = [iter(Prefetcher(Loader(9, collect_at_1)))]
        circle.append(circle)
        next(circle[0])
        del circle
        dropped.set()
        assert collected.wait(GUARD)
        reader[0].join(GUARD)
    finally:
        gc.enable()


def test_ctrl_c_while_the_first_batch_is_waited_for() -> None:
    pressed: list[int] = []

    def press(index: int) -> None:
        pressed.append(index)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)  # type: ignore[arg-type]

    with pytest.raises(KeyboardInterrupt):
        for _ in Prefetcher(Loader(9, press)):
            pass
    assert pressed in ([0], [0, 1])


def test_an_iterator_left_open_does_not_keep_the_interpreter() -> None:
    """Daemon threads sleep forever then: nobody may wait for them."""
    script = """
        import torch
        from eventrain.engine import Prefetcher

        class Circle: pass

        opened = iter(Prefetcher([torch.zeros(2)] * 9))
        next(opened)
        circle = Circle()
        circle.circle, circle.opened = circle, iter(Prefetcher([torch.zeros(2)] * 9, depth=3))
        next(circle.opened)
        print("end")
    """
    assert_prints_end_alone(script)


def test_a_program_may_end_while_a_batch_is_read() -> None:
    """A daemon thread in torch's code at that moment would abort it."""
    script = """
        import torch
        from eventrain.engine import Prefetcher
        from torch.utils.data import DataLoader, TensorDataset

        class Busy(TensorDataset):
            def __getitem__(self, index):
                return sum(torch.randn(300, 300).svd().S.sum() for _ in range(3))

        opened = iter(Prefetcher(DataLoader(Busy(torch.zeros(999))), depth=99))
        next(opened)
        print("end")
    """
    assert_prints_end_alone(script)


@pytest.mark.parametrize("event_type", [BeforeBatch, AfterLoss, AfterBatch])
async def test_a_cancelled_epoch_has_no_thread_any_more_when_it_cleans_up(
    make_model: Callable[[], nn.Module], event_type: type[Event]
) -> None:
    """G1, G4."""
    loader = Loader(1_000_000)
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher(loader, depth=2)), lr=0.001)
    left: list[list[str]] = []
    learner.on(CleanupEpoch)(lambda event: left.append(threads()))

    @learner.on(event_type, where=lambda event: event.iter == 2)
    def cancel(event: Event) -> None:
        raise CancelEpochException

    with anyio.fail_after(GUARD):
        result = await learner.fit(2, valid=False, run_id="run")
    assert left == [["eventrain-run"]] * 2
    assert result.status == "completed"
    assert len(loader.readers) <= 10
    assert len(loader.closed_by) == 2


@pytest.mark.parametrize("end", ["completes", "fails", "stops"])
async def test_no_fit_leaves_a_thread(make_model: Callable[[], nn.Module], end: str) -> None:
    """G4, G13: however often, training and validating."""
    dls = DataLoaders(Prefetcher(Loader(5), depth=2), Prefetcher(Loader(3)))
    learner = TrainLearner(make_model(), dls, lr=0.001)
    before = threading.active_count()

    @learner.on(AfterLoss, where=lambda event: event.iter == 1 and not event.training)
    def act(event: AfterLoss) -> None:
        if end == "fails":
            raise ZeroDivisionError
        if end == "stops":
            learner.stop()

    ends: Counter[str] = Counter()
    with anyio.fail_after(GUARD):
        for _ in range(10):
            try:
                await learner.fit()
            except ZeroDivisionError:
                assert end == "fails"
            ends[learner.result.status] += 1
    assert ends == {{"completes": "completed", "fails": "failed", "stops": "cancelled"}[end]: 10}
    assert threading.active_count() == before


async def test_a_fit_cancelled_by_its_host_returns_when_the_reader_has_ended(
    make_model: Callable[[], nn.Module],
) -> None:
    """G4: the model is waiting for the loader, which is in the middle of a batch."""
    reading, gate = threading.Event(), threading.Event()

    def wait_at_2(index: int) -> None:
        if index == 2:
            reading.set()
            assert gate.wait(GUARD)

    loader = Loader(1_000_000, wait_at_2)
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher(loader)), lr=0.001)
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
    assert len(loader.readers) <= 4  # one may have been begun before the cancel was seen


async def test_a_fit_cancelled_by_its_host_in_an_endless_epoch(
    make_model: Callable[[], nn.Module],
) -> None:
    """G4: the loader is always ahead."""
    loader = Loader(1_000_000_000)
    loader.refs = _Forgetful()
    loader.readers = _Forgetful()
    learner = TrainLearner(make_model(), DataLoaders(Prefetcher(loader, depth=4)), lr=1e-9)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg, learner.events(AfterBatch) as stream:
            tg.start_soon(learner.fit, 1, True, False)
            async for _ in stream:
                tg.cancel_scope.cancel()
                break
    assert threads() == []
    assert learner.result.status == "cancelled"
    assert len(loader.closed_by) == 1


class _Forgetful(list[Any]):
    """A list that stays empty."""

    def append(self, item: Any) -> None: ...


# ------------------------------------------------------------------------------------------ CUDA


@cuda
def test_on_cuda_the_batches_have_the_same_values(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    data = TensorDataset(*digits)
    wide = torch.arange(4.0)[:, None].expand(4, 5)
    packed = pack_sequence([torch.ones(3), torch.zeros(2)])
    batches = [{"pair": batch, "wide": wide, "packed": packed} for batch in DataLoader(data, 32)]
    got = list(Prefetcher(batches, "cuda", depth=2))
    assert len(got) == len(batches)
    for there, here in zip(got, batches, strict=True):
        for a, b in zip(there["pair"], here["pair"], strict=True):
            assert a.device.type == "cuda"
            assert torch.equal(a.cpu(), b)
        assert torch.equal(there["wide"].cpu(), wide)
        assert there["packed"].data.device.type == "cuda"


@cuda
def test_on_cuda_the_host_never_waits_for_a_copy(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    """G14."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).cuda()
    loader = Prefetcher(DataLoader(TensorDataset(*digits), 32), "cuda")
    for _ in loader:  # what is made once may wait
        break
    learner = TrainLearner(model, DataLoaders(loader, loader), F.cross_entropy, lr=0.01)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = learner.run(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.status == "completed"


@cuda
def test_on_cuda_a_batch_is_copied_beside_what_is_computed() -> None:
    ahead = Prefetcher([torch.full((1000,), float(i)) for i in range(3)], "cuda")
    batches = iter(ahead)
    next(batches)
    torch.cuda._sleep(10**9)
    computed = torch.cuda.current_stream().record_event()
    batch = next(batches)
    ahead._transfer._stream.synchronize()  # type: ignore[attr-defined]
    assert not computed.query()
    assert batch.sum().item() == 1000
    assert computed.query()
    batches.close()  # type: ignore[attr-defined]


@cuda
def test_on_cuda_no_batch_is_written_over_while_it_is_used() -> None:
    """A batch that the host has let go is in use until the stream has come to its end."""
    sums = []
    for batch in Prefetcher([torch.full((10_000,), float(i)) for i in range(50)], "cuda", depth=2):
        torch.cuda._sleep(10**6)
        sums.append(batch.sum())
        del batch
    assert [s.item() for s in sums] == [10_000 * i for i in range(50)]

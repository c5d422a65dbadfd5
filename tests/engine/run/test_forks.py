"""Forks: a forked process fits, and a process forked during a fit inherits no lock in use."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import structlog
import torch
from eventrain.engine import DataLoaders, TrainLearner, log
from eventrain.engine.run import forks
from eventrain.events import AfterBatch, BeforeBatch, BeforeEpoch, BeforeFit, Bus
from torch.utils.data import DataLoader, Dataset

from tests.support.waiting import GUARD, in_a_thread

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks here"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]

FIT_IN_A_CHILD = """
import faulthandler, multiprocessing, os, sys, threading
import torch
import torch._dynamo  # as the first fit of a process does
from eventrain.engine import DataLoaders, TrainLearner

torch.set_num_threads(2)  # a fork copies only one of them
batches = [(torch.randn(4096, 300), torch.zeros(4096, 1))] * 2

def fit(**backend):
    learner = TrainLearner(torch.nn.Linear(300, 1), DataLoaders(batches), bus=bus)
    assert learner.run(2, valid=False, **backend).status == "completed"

def child(backend):
    faulthandler.dump_traceback_later(60, exit=True)  # with status 1
    fit(**backend)
    os._exit(7)

bus = None
if sys.argv[1] == "fit":
    from eventrain.events import Bus
    bus = Bus()
    fit()
torch.ones(1_000_000).exp().sum()
assert len(os.listdir("/proc/self/task")) > 1, "torch made no thread"
for backend in {"backend": "asyncio"}, {"backend": "trio"}:
    if (pid := os.fork()) == 0:
        child(backend)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7, backend
    process = multiprocessing.get_context("fork").Process(target=child, args=(backend,))
    process.start()
    process.join()
    assert process.exitcode == 7, backend
fit()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
@pytest.mark.parametrize("parent", ["torch", "fit"])
def test_a_forked_process_fits_though_its_parent_has_used_torch_or_has_fitted(parent: str) -> None:
    """As gunicorn with --preload, and multiprocessing with "fork"."""
    done = subprocess.run(
        [sys.executable, "-c", FIT_IN_A_CHILD, parent], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def exit_code_of_fork(work: Any) -> int:
    """Fork, have the child do the work, and return 0; 1 if it raised; or the signal if it hung."""
    pid = os.fork()
    if pid == 0:
        signal.alarm(GUARD)
        try:
            work()
        except BaseException as exc:
            sys.stderr.write(f"in the child: {exc!r}\n")
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_process_that_is_forked_during_a_fit_fits_another_learner_on_the_same_bus(
    make_model: Any, dls: DataLoaders, backend: Any
) -> None:
    """G10: only the parent goes on with the fit; the learner says so in the child."""
    bus = Bus()
    learner, codes = TrainLearner(make_model(), dls, bus=bus), []

    def in_child() -> None:
        assert forks.running == []
        with pytest.raises(RuntimeError, match=r"when this process was forked.*make another"):
            learner.run()
        assert TrainLearner(make_model(), dls, bus=bus).run(**backend).status == "completed"

    @learner.on(AfterBatch, once=True)
    def fork(event: AfterBatch) -> None:
        codes.append(exit_code_of_fork(in_child))

    result = in_a_thread(lambda: learner.run(**backend))
    assert (result.status, codes) == ("completed", [0])
    assert learner.run(**backend).status == "completed"


FORK_WHILE_TORCH_IMPORTS = """
import faulthandler, gc, os, sys, threading, time
import torch
from eventrain.engine import DataLoaders, TrainLearner

parent, forked = os.getpid(), threading.Event()

def make_optimizer(params, lr):
    opt = torch.optim.SGD(params, lr)
    assert os.getpid() != parent or forked.wait(60)  # not while torch computes
    return opt

def fit():
    batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 2
    learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), opt_func=make_optimizer)
    assert learner.run(valid=False).status == "completed"

first = threading.Thread(target=fit)
first.start()
while "torch._dynamo" not in sys.modules:
    time.sleep(0.001)
if (pid := os.fork()) == 0:
    faulthandler.dump_traceback_later(60, exit=True)  # with status 1
    fit()
    os._exit(7 if gc.isenabled() else 2)
forked.set()
first.join()
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
"""


def test_a_process_that_is_forked_while_the_first_fit_imports_fits() -> None:
    """Its own first fit waited for ever for the end of that import."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_WHILE_TORCH_IMPORTS], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_bus_is_not_locked_in_a_forked_process_though_another_thread_had_locked_it() -> None:
    bus = Bus()
    locked, forked = threading.Event(), threading.Event()

    def lock() -> None:
        with bus.lock:
            locked.set()
            forked.wait(0.1)

    thread = threading.Thread(target=lock)
    thread.start()
    locked.wait()
    code = exit_code_of_fork(lambda: bus.subscribe(BeforeFit, print).close())
    forked.set()
    thread.join()
    assert code == 0


def test_a_fork_waits_for_a_log_line_of_the_engine(learner: TrainLearner, backend: Any) -> None:
    """Another thread writes it, as that of a checkpoint does."""
    lock, writes = threading.Lock(), threading.Event()

    def processor(logger: Any, method: str, record: Any) -> Any:
        with lock:
            writes.set()
            time.sleep(0.1)
        raise structlog.DropEvent

    learner.run(**backend)
    structlog.configure(processors=[processor])
    thread = threading.Thread(target=log.warning, args=("checkpoint_damaged",))
    thread.start()
    assert writes.wait(GUARD)
    assert exit_code_of_fork(lambda: lock.acquire(timeout=GUARD) or 1 / 0) == 0
    thread.join()


class Locking(Dataset[Any]):
    """Its samples take a lock, as a log line does."""

    def __init__(self, lock: Any) -> None:
        self.lock = lock

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        with self.lock:
            return torch.ones(3), torch.zeros(1)


@pytest.mark.parametrize("listener", ["observer", "async observer", "stream", "task"])
async def test_workers_start_while_nothing_on_the_event_loop_holds_a_lock(
    make_model: Any, listener: str
) -> None:
    """A worker that is forked while an observer writes a log line waited for its lock for ever."""
    lock = threading.Lock()
    loader = DataLoader(Locking(lock), 4, num_workers=2, timeout=10, multiprocessing_context="fork")
    learner = TrainLearner(make_model(), DataLoaders(loader))

    def take(event: object) -> None:
        with lock:
            time.sleep(0.02)

    async def take_async(event: object) -> None:
        take(event)
        await anyio.lowlevel.checkpoint()
        take(event)

    async def read() -> None:
        async with learner.events(BeforeEpoch, AfterBatch) as stream:
            async for event in stream:
                take(event)

    async def work() -> None:
        while True:
            take(None)
            await anyio.lowlevel.checkpoint()

    if "observer" in listener:
        learner.observe(take_async if "async" in listener else take, BeforeEpoch, AfterBatch)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            if listener == "stream":
                tasks.start_soon(read)
            elif listener == "task":
                tasks.start_soon(work)
            result = await learner.fit(6, valid=False)
            tasks.cancel_scope.cancel()
    assert result.status == "completed"


def test_a_fork_on_the_event_loop_itself_does_not_wait_for_it(
    learner: TrainLearner, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forks, "LIMIT", 2 * GUARD)
    codes = []

    def fork(event: BeforeBatch) -> None:
        codes.append(exit_code_of_fork(lambda: None))

    async def fork_async(event: BeforeBatch) -> None:
        fork(event)

    learner.observe(fork, BeforeBatch)
    learner.observe(fork_async, BeforeBatch)
    learner.on(BeforeBatch)(fork_async)
    result = in_a_thread(lambda: learner.run(valid=False, **backend))
    assert result.status == "completed"
    assert codes == [0] * 9


def test_a_fork_goes_on_though_the_event_loop_is_blocked(
    learner: TrainLearner, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a host that waits on its loop for the thread that forks."""
    monkeypatch.setattr(forks, "LIMIT", 0.01)
    codes: list[int] = []
    forked = threading.Event()
    blocked = threading.Event()

    def block(event: BeforeFit) -> None:
        blocked.set()
        assert forked.wait(GUARD)

    learner.observe(block, BeforeFit)

    @learner.on(AfterBatch, once=True)
    def fork(event: AfterBatch) -> None:
        assert blocked.wait(GUARD)
        codes.append(exit_code_of_fork(lambda: None))
        forked.set()

    result = in_a_thread(lambda: learner.run(valid=False, **backend))
    assert (result.status, codes) == ("completed", [0])


@pytest.fixture
def fork_asks(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set when a fork asks the event loops to wait."""
    asks = threading.Event()

    class Fork(forks._Fork):
        def hold(self, loops: Any, deadline: float) -> None:
            if loops:
                asks.set()
            super().hold(loops, deadline)

    monkeypatch.setattr(forks, "_Fork", Fork)
    return asks


def test_an_event_loop_does_not_wait_for_another_one_that_is_busy_when_one_fit_forks(
    make_model: Any,
    dls: DataLoaders,
    backend: Any,
    fork_asks: threading.Event,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G6: it waited for as long, up to two seconds. Both wait at the moment of the fork."""
    monkeypatch.setattr(forks, "LIMIT", 2 * GUARD)
    forking, busy = (TrainLearner(make_model(), dls) for _ in range(2))
    lock, blocked, runs = threading.Lock(), threading.Event(), threading.Event()
    forked = threading.Event()
    codes: list[int] = []

    def block(event: BeforeFit) -> None:
        blocked.set()
        assert runs.wait(GUARD), "the other event loop waited"

    busy.observe(block, BeforeFit, on_error="raise")
    busy.on(AfterBatch, once=True)(lambda event: forked.wait(GUARD) and None)

    @forking.on(AfterBatch, once=True)
    def fork(event: AfterBatch) -> None:
        assert blocked.wait(GUARD)
        codes.append(exit_code_of_fork(lambda: lock.acquire(timeout=GUARD) or 1 / 0))
        forked.set()

    async def fit(learner: TrainLearner) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(work)
            assert (await learner.fit(valid=False)).status == "completed"
            tasks.cancel_scope.cancel()

    async def work() -> None:
        while True:
            with lock:
                time.sleep(0.002)  # noqa: ASYNC251 - it holds the loop, as a log line does
            await anyio.sleep(0.001)
            if fork_asks.is_set():
                await anyio.sleep(5 * forks.BRIEF)
                runs.set()

    other = threading.Thread(target=lambda: anyio.run(fit, busy, **backend))
    other.start()
    in_a_thread(lambda: anyio.run(fit, forking, **backend))
    other.join()
    assert codes == [0]


def test_two_fits_on_two_event_loops_fork_at_once(
    make_model: Any, dls: DataLoaders, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would hold the event loop that the other one waits for."""
    monkeypatch.setattr(forks, "LIMIT", 2 * GUARD)
    together = threading.Barrier(2)
    codes = []

    def fit() -> None:
        learner = TrainLearner(make_model(), dls)

        @learner.on(AfterBatch)
        def fork(event: AfterBatch) -> None:
            together.wait(GUARD)
            codes.append(exit_code_of_fork(lambda: None))

        assert learner.run(valid=False, **backend).status == "completed"

    other = threading.Thread(target=fit)
    other.start()
    in_a_thread(fit)
    other.join()
    assert set(codes) == {0}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_process_forked_in_a_graceful_fit_ends_by_sigterm_and_leaves_ctrl_c_to_its_parent(
    learner: TrainLearner, backend: Any, signum: signal.Signals
) -> None:
    """Its inherited handler stopped a fit that it does not run: `Process.terminate()` did nothing.

    A terminal sends SIGINT to the workers of a loader too, which the current batch still needs.
    """
    context = multiprocessing.get_context("fork")
    codes = []

    @learner.on(AfterBatch, once=True)
    def start(event: AfterBatch) -> None:
        ready, done = context.Event(), context.Event()

        def child() -> None:
            ready.set()
            os._exit(7 if done.wait(GUARD) else 1)

        process = context.Process(target=child)
        process.start()
        assert ready.wait(GUARD)
        assert process.pid is not None
        os.kill(process.pid, signum)
        if signum == signal.SIGINT:
            done.set()
        process.join(GUARD)
        codes.append(process.exitcode)

    result = learner.run(graceful=True, **backend)
    assert result.status == "completed"
    assert codes == [-signal.SIGTERM if signum == signal.SIGTERM else 7]

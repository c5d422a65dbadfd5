"""`fit(graceful=...)`: the first SIGTERM or SIGINT ends the fit after its batch.

The handlers are those of this process, the main thread of which runs the tests; where a signal
kills, or a script is to end well, it is a process of its own.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
import trio
from eventrain.callbacks import CheckpointCB
from eventrain.engine import Checkpoint, DataLoaders, FitResult, TrainLearner
from eventrain.engine.run.graceful import GracefulStop
from eventrain.events import (
    AfterEpoch,
    AfterFit,
    AfterLoss,
    BeforeBatch,
    BeforeFit,
    Callback,
    CleanupBatch,
    CleanupFit,
    Event,
    ScopeEnd,
    record_events,
)
from structlog.testing import capture_logs
from torch import nn

from tests.support.training import TRAIN_BATCH, VALID_BATCH
from tests.support.waiting import GUARD, in_a_thread, wait_until

GUARD_OF_A_PROCESS = 120
"""The same for a child process, which imports torch first, perhaps while others do."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)
both_signals = pytest.mark.parametrize("signum", SIGNALS, ids=["SIGINT", "SIGTERM"])

AFTER_THE_SECOND_BATCH = [
    *["BeforeFit", "BeforeEpoch", *TRAIN_BATCH * 2],
    *["CleanupEpoch", "CleanupFit"],
]
CUT_IN_THE_SECOND_BATCH = [
    *["BeforeFit", "BeforeEpoch", *TRAIN_BATCH, "BeforeBatch"],
    *["CleanupBatch", "CleanupEpoch", "CleanupFit"],
]


def handlers() -> list[Any]:
    return [signal.getsignal(signum) for signum in SIGNALS]


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)


class InBatch(Callback):
    """Does something in the second training batch, and goes on when the learner has heard it."""

    def __init__(self, act: Callable[[], object]) -> None:
        self._act = act

    def before_batch(self, event: BeforeBatch) -> None:
        if event.training and event.iter == 1:
            self._act()
            wait_until(lambda: event.learner.stopping)


@pytest.fixture
def heard() -> Iterator[list[int]]:
    """The signals that the host's own handlers got: plain ones, for both signals."""
    heard: list[int] = []
    own = [
        signal.signal(signum, lambda received, frame: heard.append(received)) for signum in SIGNALS
    ]
    yield heard
    for signum, handler in zip(SIGNALS, own, strict=True):
        signal.signal(signum, handler)


# ----------------------------------------------------------------------------- a script of its own

SCRIPT = """
import sys, time, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from eventrain.callbacks import CheckpointCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterLoss

def make(folder):
    torch.manual_seed(0)
    x = torch.randn(32, 3)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 1))
    return TrainLearner(model, DataLoaders(loader, loader), lr=0.01, cbs=CheckpointCB(folder))

def in_a_batch(event):
    if event.iter in (2, 5):
        print("in batch", event.iter, flush=True)
        while not event.learner.stopping:
            time.sleep(0.001)
        print("in it still", flush=True)
        while hang:
            time.sleep(0.001)

if __name__ == "__main__":
    folder, backend, hang = sys.argv[1], sys.argv[2], "hang" in sys.argv
    options = {"use_uvloop": True} if backend == "uvloop" else None
    backend = backend.replace("uvloop", "asyncio")
    for resume in (None, "last"):
        learner = make(folder)
        learner.on(AfterLoss)(in_a_batch)
        result = learner.run(
            3, resume=resume, graceful=True, backend=backend, backend_options=options
        )
        print(result.status, "by", result.who, "after", result.batches, "batches", flush=True)
"""


class Script:
    """The script, in a process of its own, which is killed when it hangs."""

    def __init__(self, *command: Any) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        self._guard = threading.Timer(GUARD_OF_A_PROCESS, self.process.kill)
        self._guard.start()

    def expect(self, line: str) -> None:
        if (found := self.process.stdout.readline()) != line + "\n":
            self.process.kill()
            pytest.fail(f"{found!r} instead of {line!r}; {self.end()}")

    def end(self) -> tuple[int, str, str]:
        out, err = self.process.communicate()
        self._guard.cancel()
        return self.process.returncode, out, err


@pytest.fixture
def script(
    tmp_path: Path, anyio_backend: tuple[str, dict[str, object]]
) -> Iterator[Callable[..., Script]]:
    """Starts the script."""
    backend = "uvloop" if anyio_backend[1] else anyio_backend[0]
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    started: list[Script] = []

    def start(*arguments: str) -> Script:
        folder = tmp_path / "checkpoints"
        started.append(Script(sys.executable, path, folder, backend, *arguments))
        return started[-1]

    yield start
    for script in started:
        script.process.kill()
        script.end()


def weights(learner: TrainLearner) -> list[torch.Tensor]:
    return [p.detach().clone() for p in learner.model.parameters()]


def test_a_script_ends_well_and_what_it_has_saved_is_resumed_to_the_bit(
    script: Callable[..., Script], tmp_path: Path
) -> None:
    """G11, G15: stopped by SIGTERM, and its next fit by SIGINT; exit code 0."""
    running = script()
    for n, signum in ((2, signal.SIGTERM), (5, signal.SIGINT)):
        running.expect(f"in batch {n}")
        running.process.send_signal(signum)
        running.expect("in it still")
        running.expect(f"cancelled by {signum.name} after {n + 1} batches")
    code, out, err = running.end()
    assert (code, out) == (0, ""), err

    exec(SCRIPT, namespace := {"__name__": "script"})
    make: Callable[[Path], TrainLearner] = namespace["make"]
    assert Checkpoint.load(tmp_path / "checkpoints").position.batches == 6
    resumed = make(tmp_path / "checkpoints")
    assert resumed.run(3, resume="last").batches == 24
    undisturbed = make(tmp_path / "others")  # which seeds anew
    undisturbed.run(3)
    for one, other in zip(weights(resumed), weights(undisturbed), strict=True):
        assert torch.equal(one, other)


def test_a_second_sigterm_kills(script: Callable[..., Script]) -> None:
    """As without us: at once, in the middle of a batch that hangs."""
    running = script("hang")
    running.expect("in batch 2")
    running.process.send_signal(signal.SIGTERM)
    running.expect("in it still")
    running.process.send_signal(signal.SIGTERM)
    assert running.end()[:2] == (-signal.SIGTERM, "")


def test_a_second_ctrl_c_is_a_keyboard_interrupt(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """As without us: the training is left at its next event, and then the script."""

    def press_twice() -> None:
        send(signal.SIGINT)
        wait_until(lambda: learner.stopping)
        send(signal.SIGINT)
        wait_until(lambda: len(learner.pending_requests) == 2)

    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with record_events(learner) as events, pytest.raises(KeyboardInterrupt):
            learner.run(graceful=True, cbs=InBatch(press_twice), **backend)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, own)
    assert events.names == CUT_IN_THE_SECOND_BATCH
    assert learner.result.who == "host"


def test_a_second_ctrl_c_is_one_also_where_our_handler_was_put_back(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    """By something that ended during the fit, which has got its signal already."""
    ours: list[Any] = []

    def first() -> None:
        ours.append(signal.getsignal(signal.SIGINT))
        send(signal.SIGINT)

    @learner.on(CleanupFit)
    async def second(event: CleanupFit) -> None:
        signal.signal(signal.SIGINT, ours[0])
        send(signal.SIGINT)

    own = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            learner.run(graceful=True, cbs=InBatch(first), **backend)
    finally:
        signal.signal(signal.SIGINT, own)


# ---------------------------------------------------------------------------------- how a fit ends


@both_signals
@pytest.mark.usefixtures("heard")
async def test_the_first_signal_ends_the_fit_with_its_batch(
    learner: TrainLearner, tmp_path: Path, signum: signal.Signals
) -> None:
    """The batch under way is completed and saved; fit returns."""
    checkpoints = CheckpointCB(tmp_path)
    with anyio.fail_after(GUARD), record_events(learner) as events:
        cbs = [checkpoints, InBatch(lambda: send(signum))]
        result = await learner.fit(2, graceful=True, cbs=cbs)
    assert events.names == AFTER_THE_SECOND_BATCH
    ends = [event.end for event in events if isinstance(event, CleanupBatch | CleanupFit)]
    stopped = ScopeEnd("cancelled", signum.name, f"received {signum.name}")
    assert ends == [ScopeEnd("completed"), ScopeEnd("completed"), stopped]
    assert (result.status, result.who) == ("cancelled", signum.name)
    assert checkpoints.last is not None
    assert Checkpoint.load(checkpoints.last).position.batches == 2


@both_signals
@pytest.mark.usefixtures("heard")
async def test_a_fit_that_only_validates_ends_with_its_batch_too(
    learner: TrainLearner, signum: signal.Signals
) -> None:
    @learner.on(BeforeBatch)
    def wait(event: BeforeBatch) -> None:
        send(signum)
        wait_until(lambda: learner.stopping)

    with anyio.fail_after(GUARD), record_events(learner) as events:
        result = await learner.fit(train=False, graceful=True)
    assert events.names == [
        *["BeforeFit", "BeforeEpoch", *VALID_BATCH],
        *["CleanupEpoch", "CleanupFit"],
    ]
    assert (result.status, result.who) == ("cancelled", signum.name)


def test_a_signal_before_the_first_batch_ends_the_fit_with_that(
    learner: TrainLearner, backend: dict[str, Any], heard: list[int]
) -> None:
    @learner.on(BeforeFit)
    def wait(event: BeforeFit) -> None:
        send(signal.SIGTERM)
        wait_until(lambda: learner.stopping)

    with record_events(learner) as events:
        result = learner.run(graceful=True, **backend)
    assert events.names.count("BeforeBatch") == events.names.count("AfterBatch") == 1
    assert (result.status, result.who, heard) == ("cancelled", "SIGTERM", [])


@pytest.mark.parametrize("event_type", [AfterFit, CleanupFit])
@both_signals
async def test_a_signal_too_late_to_end_the_fit_is_the_hosts(
    learner: TrainLearner, heard: list[int], signum: signal.Signals, event_type: type[Event]
) -> None:
    """It must not be lost: the script would go on, and never end."""
    learner.on(event_type)(lambda event: (send(signum), wait_until(lambda: learner.stopping)))
    with anyio.fail_after(GUARD):
        result = await learner.fit(graceful=True)
    assert result.status == "completed"
    assert heard == [signum]


async def test_a_signal_in_the_last_epoch_that_is_done_still_ends_the_fit(
    learner: TrainLearner, heard: list[int]
) -> None:
    """Between the last batch and CleanupEpoch there is still something to leave."""
    learner.on(AfterEpoch, where=lambda event: not event.training)(
        lambda event: (send(signal.SIGTERM), wait_until(lambda: learner.stopping))
    )
    with anyio.fail_after(GUARD):
        result = await learner.fit(graceful=True)
    assert (result.status, result.who, heard) == ("cancelled", "SIGTERM", [])


async def test_an_error_in_the_batch_under_way_is_raised_and_the_signal_not_repeated(
    learner: TrainLearner, heard: list[int]
) -> None:
    """G5: the caller learns of it."""

    @learner.on(AfterLoss)
    def fail(event: AfterLoss) -> None:
        send(signal.SIGTERM)
        wait_until(lambda: learner.stopping)
        raise ZeroDivisionError

    before = handlers()
    with anyio.fail_after(GUARD), pytest.raises(ZeroDivisionError):
        await learner.fit(graceful=True)
    assert (heard, handlers()) == ([], before)


async def test_a_handler_set_during_the_fit_that_calls_the_one_before_reaches_the_hosts_once(
    learner: TrainLearner, heard: list[int]
) -> None:
    """As some libraries chain theirs."""
    called = []

    @learner.on(BeforeFit)
    async def chain(event: BeforeFit) -> None:
        before = signal.getsignal(signal.SIGTERM)

        def handler(signum: int, frame: Any) -> None:
            called.append(signum)
            before(signum, frame)

        signal.signal(signal.SIGTERM, handler)

    with anyio.fail_after(GUARD):
        await learner.fit(graceful=True)
    assert (called, heard) == ([], [])
    signal.raise_signal(signal.SIGTERM)
    assert (called, heard) == ([signal.SIGTERM], [signal.SIGTERM])


# ------------------------------------------------------------------------------------- the deadline


@both_signals
@pytest.mark.usefixtures("heard")
async def test_when_the_deadline_is_over_the_fit_is_left_at_its_next_event(
    learner: TrainLearner, tmp_path: Path, signum: signal.Signals
) -> None:
    """A batch that hangs does not delay it: this is logged, and that nothing is saved there."""
    checkpoints = CheckpointCB(tmp_path, every_batches=1)

    def hang() -> None:
        send(signum)
        wait_until(lambda: logs)

    with anyio.fail_after(GUARD), record_events(learner) as events, capture_logs() as logs:
        result = await learner.fit(graceful=0.05, cbs=[checkpoints, InBatch(hang)])
    assert events.names == CUT_IN_THE_SECOND_BATCH
    stopped = ScopeEnd("cancelled", signum.name, f"received {signum.name}")
    assert [event.end for event in events[-3:]] == [stopped] * 3
    assert (result.status, result.who) == ("cancelled", signum.name)
    (line,) = logs
    assert any("in InBatch.before_batch" in place for place in line.pop("where"))
    assert line == {
        "event": "graceful_deadline_passed",
        "log_level": "warning",
        "run_id": result.run_id,
        "signal": signum.name,
        "deadline": 0.05,
        "hint": "the batch is not completed: the fit ends at its next event, without a checkpoint",
    }
    assert checkpoints.last is not None
    assert Checkpoint.load(checkpoints.last).position.batches == 1


@pytest.mark.parametrize("cleanup", [CleanupBatch, CleanupFit])
@pytest.mark.usefixtures("heard")
async def test_a_cleanup_that_outlasts_the_deadline_is_logged_and_not_cut(
    learner: TrainLearner, cleanup: type[Event]
) -> None:
    """G1: the batch is done, so the checkpoint is taken: nothing else is to be left."""
    learner.on(cleanup, where=lambda event: getattr(event, "iter", 1) == 1)(
        lambda event: wait_until(lambda: logs)
    )
    with anyio.fail_after(GUARD), record_events(learner) as events, capture_logs() as logs:
        cbs = InBatch(lambda: send(signal.SIGTERM))
        result = await learner.fit(graceful=2, cbs=cbs)
    assert events.names == AFTER_THE_SECOND_BATCH
    assert (result.status, result.who) == ("cancelled", "SIGTERM")
    assert [line["hint"] for line in logs] == ["the batch is completed, but the cleanup is not"]


@pytest.mark.usefixtures("heard")
async def test_before_the_deadline_nothing_is_logged(learner: TrainLearner) -> None:
    with anyio.fail_after(GUARD), capture_logs() as logs:
        await learner.fit(graceful=GUARD, cbs=InBatch(lambda: send(signal.SIGTERM)))
    assert logs == []


# ---------------------------------------------------------------------- the host's own handlers


@contextmanager
def nothing_of_its_own() -> Iterator[None]:
    """What asyncio.Runner and trio put there for SIGINT, and Python's SIGTERM."""
    yield


@contextmanager
def plain_handlers() -> Iterator[None]:
    own = [signal.signal(signum, lambda *_: None) for signum in SIGNALS]
    yield
    for signum, handler in zip(SIGNALS, own, strict=True):
        signal.signal(signum, handler)


@contextmanager
def a_receiver_of_anyio() -> Iterator[None]:
    """On asyncio and uvloop `loop.add_signal_handler`, on trio a handler of its own."""
    with anyio.open_signal_receiver(*SIGNALS):
        yield


class Fail(Callback):
    def after_loss(self, event: AfterLoss) -> None:
        raise ZeroDivisionError


async def completed(learner: TrainLearner) -> None:
    assert (await learner.fit(graceful=True)).status == "completed"


async def failed(learner: TrainLearner) -> None:
    with pytest.raises(ZeroDivisionError):
        await learner.fit(graceful=True, cbs=Fail())


async def refused(learner: TrainLearner) -> None:
    with pytest.raises(ValueError, match="lr=-1"):
        await learner.fit(graceful=True, lr=-1)


async def ended_by_a_signal(learner: TrainLearner) -> None:
    during: list[Any] = []
    own = handlers()

    class Look(Callback):
        def before_fit(self, event: BeforeFit) -> None:
            during.append(handlers())

        def after_batch(self, event: Event) -> None:
            during.append(handlers())

    result = await learner.fit(graceful=True, cbs=[InBatch(lambda: send(signal.SIGTERM)), Look()])
    assert result.who == "SIGTERM"
    ours, still_ours, back_again = during
    assert ours == still_ours
    assert all(one != other for one, other in zip(ours, own, strict=True))
    assert back_again == own


async def ended_by_the_host(learner: TrainLearner) -> None:
    with anyio.CancelScope() as scope:
        token = anyio.lowlevel.current_token()

        def cancel() -> None:
            anyio.from_thread.run_sync(scope.cancel, token=token)

        await learner.fit(graceful=True, cbs=InBatch(cancel))
    assert scope.cancelled_caught


@pytest.mark.parametrize("host", [nothing_of_its_own, plain_handlers, a_receiver_of_anyio])
@pytest.mark.parametrize("end", [completed, failed, refused, ended_by_a_signal, ended_by_the_host])
def test_the_host_has_its_handlers_back(
    learner: TrainLearner,
    backend: dict[str, Any],
    host: Callable[[], Any],
    end: Callable[[TrainLearner], Any],
) -> None:
    """G9: the very same ones, whatever ended the fit; after a signal at once."""

    async def main() -> None:
        with anyio.fail_after(GUARD), host():
            before = handlers()
            await end(learner)
            assert handlers() == before

    before = handlers()
    anyio.run(main, **backend)
    assert handlers() == before


@pytest.mark.parametrize("factory", ["asyncio", "uvloop"])
@both_signals
def test_a_callback_that_the_host_has_added_to_its_loop_stays(
    learner: TrainLearner, factory: str, signum: signal.Signals
) -> None:
    """It gets the first signal too, and those that come when the fit has ended."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        hears = asyncio.Event()
        loop.add_signal_handler(signum, hears.set)
        async with asyncio.timeout(GUARD):
            result = await learner.fit(graceful=True, cbs=InBatch(lambda: send(signum)))
            assert (result.status, result.who) == ("cancelled", signum.name)
            for _ in range(2):
                await hears.wait()
                hears.clear()
                send(signum)
            await hears.wait()
        assert loop.remove_signal_handler(signum)

    make = pytest.importorskip("uvloop").new_event_loop if factory == "uvloop" else None
    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())


def test_a_signal_receiver_of_a_trio_host_gets_the_second_signal(
    learner: TrainLearner,
) -> None:
    async def main() -> None:
        with trio.fail_after(GUARD), trio.open_signal_receiver(*SIGNALS) as signals:
            result = await learner.fit(graceful=True, cbs=InBatch(lambda: send(signal.SIGTERM)))
            assert result.who == "SIGTERM"
            send(signal.SIGINT)
            async for signum in signals:
                assert signum == signal.SIGINT
                break

    trio.run(main)


@both_signals
def test_a_signal_that_is_ignored_stays_so(
    learner: TrainLearner, backend: dict[str, Any], signum: signal.Signals
) -> None:
    """A script that was started with `&` or nohup does not get Ctrl-C."""
    own = signal.signal(signum, signal.SIG_IGN)
    try:

        @learner.on(BeforeBatch)
        def look(event: BeforeBatch) -> None:
            assert signal.getsignal(signum) is signal.SIG_IGN
            send(signum)

        assert learner.run(graceful=True, **backend).status == "completed"
        assert signal.getsignal(signum) is signal.SIG_IGN
    finally:
        signal.signal(signum, own)


@pytest.mark.parametrize("graceful", [{}, {"graceful": False}])
async def test_no_handler_is_touched_unless_it_is_asked_for(
    learner: TrainLearner, graceful: dict[str, Any]
) -> None:
    """G7."""
    before, during = handlers(), []
    learner.on(BeforeFit)(lambda event: during.extend(handlers()))
    await learner.fit(**graceful)
    assert before == during == handlers()


def test_a_host_that_takes_the_signals_in_the_middle_of_a_fit_keeps_them(
    learner: TrainLearner, backend: dict[str, Any], heard: list[int]
) -> None:
    """A server that is started during the fit. When it has ended, the host before it is back."""
    later: list[int] = []
    found: list[Any] = []

    async def main() -> None:
        @learner.on(BeforeFit)
        async def take(event: BeforeFit) -> None:
            found.extend(signal.signal(each, lambda n, frame: later.append(n)) for each in SIGNALS)

        with anyio.fail_after(GUARD):
            assert (await learner.fit(graceful=True)).status == "completed"

    anyio.run(main, **backend)
    for signum, handler in zip(SIGNALS, found, strict=True):
        send(signum)
        signal.signal(signum, handler)  # as uvicorn does when it has ended: that of the fit
        send(signum)
    assert (later, heard) == (list(SIGNALS), list(SIGNALS))


def test_a_handler_of_a_fit_of_long_ago_kills_as_python_would(tmp_path: Path) -> None:
    """Whoever puts it back: no signal is caught for ever."""
    script = (
        "import signal\n"
        "from eventrain.engine.run.graceful import _on_signal\n"
        "signal.signal(signal.SIGTERM, _on_signal)\n"
        "signal.raise_signal(signal.SIGTERM)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, timeout=GUARD_OF_A_PROCESS
    )
    assert (done.returncode, done.stderr) == (-signal.SIGTERM, b"")


def test_a_fit_that_is_thrown_away_in_another_thread_leaves_signals_to_the_host(
    learner: TrainLearner, heard: list[int]
) -> None:
    """Garbage is collected in any thread, but handlers are set in the main thread alone."""
    end = GracefulStop(learner, True)
    end.__enter__()
    thread = threading.Thread(target=end.__exit__, args=(GeneratorExit, GeneratorExit(), None))
    thread.start()
    thread.join()
    for signum in SIGNALS:
        send(signum)
    assert heard == list(SIGNALS)


# --------------------------------------------------------------------------------- several fits


@pytest.mark.parametrize("first_to_end", [0, 1])
async def test_one_signal_ends_all_fits_that_wait_for_it(
    make_model: Callable[[], nn.Module],
    dls: DataLoaders,
    heard: list[int],
    first_to_end: int,
) -> None:
    """G9, G10: the handlers are the host's again, whichever fit ends first."""
    before = handlers()
    learners = [TrainLearner(make_model(), dls) for _ in range(2)]
    other = TrainLearner(make_model(), dls)
    ready = threading.Barrier(3)

    for index, learner in enumerate([*learners, other]):

        @learner.on(BeforeBatch, once=True)
        def wait(event: BeforeBatch, index: int = index, learner: TrainLearner = learner) -> None:
            if ready.wait(GUARD) == 0:
                send(signal.SIGTERM)
            wait_until(lambda: learner is other or learner.stopping)
            if index == 1 - first_to_end:
                wait_until(lambda: not learners[first_to_end].fitting)

    async def fit(learner: TrainLearner, graceful: bool) -> None:
        await learner.fit(graceful=graceful)

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg:
            for learner in learners:
                tg.start_soon(fit, learner, True)
            tg.start_soon(fit, other, False)
    assert [learner.result.who for learner in learners] == ["SIGTERM"] * 2
    assert other.result.status == "completed"
    assert (handlers(), heard) == (before, [])


@pytest.mark.parametrize("first_to_end", [0, 1])
async def test_a_fit_that_ends_leaves_the_signals_to_the_one_that_goes_on(
    make_model: Callable[[], nn.Module],
    dls: DataLoaders,
    heard: list[int],
    first_to_end: int,
) -> None:
    before = handlers()
    learners = [TrainLearner(make_model(), dls) for _ in range(2)]
    short, long = learners[first_to_end], learners[1 - first_to_end]

    @long.on(BeforeBatch, once=True)
    def wait(event: BeforeBatch) -> None:
        wait_until(lambda: short.result is not None and not short.fitting)
        send(signal.SIGTERM)
        wait_until(lambda: long.stopping)

    results: dict[TrainLearner, FitResult] = {}

    async def fit(learner: TrainLearner) -> None:
        results[learner] = await learner.fit(graceful=True)

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg:
            for learner in learners:
                tg.start_soon(fit, learner)
    assert (results[short].status, results[long].who) == ("completed", "SIGTERM")
    assert (handlers(), heard) == (before, [])


@both_signals
async def test_the_next_fit_gets_the_next_signal(
    learner: TrainLearner, heard: list[int], signum: signal.Signals
) -> None:
    """G9."""
    for _ in range(3):
        with anyio.fail_after(GUARD):
            result = await learner.fit(graceful=True, cbs=InBatch(lambda: send(signum)))
        assert result.who == signum.name
    assert heard == []


# ------------------------------------------------------------------------------- what is refused


def test_a_fit_in_another_thread_is_refused_with_the_way_out(
    learner: TrainLearner, backend: dict[str, Any]
) -> None:
    message = (
        r"graceful=True: signals reach only the main thread, and this fit is awaited in"
        r" 'worker-7': have a handler of your own call learner\.stop\(graceful=True\)"
    )
    with record_events(learner) as events, pytest.raises(ValueError, match=message):
        in_a_thread(lambda: learner.run(graceful=True, **backend), name="worker-7")
    assert (events.names, learner.fitting) == ([], False)
    assert in_a_thread(lambda: learner.run(**backend)).status == "completed"


@pytest.mark.parametrize("graceful", [-1, -0.5, 0, 0.0, float("nan"), "30", None, [30]])
async def test_an_invalid_time_is_refused(learner: TrainLearner, graceful: Any) -> None:
    before = handlers()
    with pytest.raises(ValueError, match="give True, or seconds above 0") as caught:
        await learner.fit(graceful=graceful)
    assert str(caught.value).startswith(f"graceful={graceful!r}: ")
    assert (learner.fitting, handlers()) == (False, before)


FOREIGN = """
#include <signal.h>
static void hear(int signum) {}
__attribute__((constructor)) static void begin(void) { signal(SIGTERM, hear); }
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs LD_PRELOAD")
def test_a_handler_that_is_not_pythons_is_not_lost(tmp_path: Path) -> None:
    """It could not be given back, so it is not taken."""
    (tmp_path / "foreign.c").write_text(FOREIGN)
    library = tmp_path / "foreign.so"
    compile_it = ["cc", "-shared", "-fPIC", "-o", library, tmp_path / "foreign.c"]
    subprocess.run(compile_it, check=True)
    script = "from eventrain.engine.run.graceful import GracefulStop; GracefulStop(None, True)"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "LD_PRELOAD": str(library)},
        capture_output=True,
        text=True,
        timeout=GUARD_OF_A_PROCESS,
    )
    assert done.returncode == 1
    assert "SIGTERM has a handler that is not Python's" in done.stderr

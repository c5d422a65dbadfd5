"""A fit as a guest: what a service, a script or a notebook notices of it, which is little."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.run.thread import TrainingThread
from eventrain.events import (
    AfterBatch,
    BeforeBatch,
    BeforeFit,
    CleanupFit,
    Event,
    FitEvent,
    record_events,
)
from structlog.testing import capture_logs
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.support.waiting import GUARD, wait_until

GUARD_OF_A_PROCESS = 120
"""The same for a process of its own, which imports torch first, perhaps beside others that do."""


# ------------------------------------------------------------------------------------ the loop


async def test_the_hosts_loop_goes_round_during_a_batch(learner: TrainLearner) -> None:
    """G6: a batch that takes as long as ten ticks of 10 ms does not hold up one of them."""
    ticks: list[float] = []

    async def tick() -> None:
        while True:
            await anyio.sleep(0.01)
            ticks.append(time.monotonic())

    learner.on(BeforeBatch, where=lambda event: event.training and event.iter == 1)(
        lambda event: wait_until(lambda: len(ticks) >= 10)
    )
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg:
            tg.start_soon(tick)
            result = await learner.fit()
            tg.cancel_scope.cancel()
    assert result.status == "completed"


async def test_the_training_goes_on_while_the_host_blocks_its_loop(
    learner: TrainLearner,
) -> None:
    """G8: nor does the loop hold up the training, observed or not."""
    heard: list[Event] = []
    learner.observe(heard.append, Event)
    blocked = threading.Event()
    learner.on(BeforeFit)(lambda event: blocked.wait(GUARD) and None)

    async def block() -> None:
        while not events:
            await anyio.lowlevel.checkpoint()
        blocked.set()
        wait_until(lambda: events.names[-1:] == ["CleanupFit"])

    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tg:
            tg.start_soon(learner.fit)
            tg.start_soon(block)
    assert heard == list(events)


def test_nothing_is_done_to_the_loop_from_another_thread(learner: TrainLearner) -> None:
    """asyncio's debug mode raises on what is called on the wrong thread."""
    heard: list[Event] = []
    streamed: list[Event] = []

    async def main() -> None:
        async with learner.events(FitEvent) as stream:
            await learner.fit()
            streamed.extend([event async for event in stream])

    observer = learner.observe(heard.append, Event, overflow="block", buffer=2)
    learner.on(AfterBatch, once=True)(lambda event: observer.close())

    @learner.on(BeforeFit)
    async def receiver(event: BeforeFit) -> None:
        await anyio.lowlevel.checkpoint()

    anyio.run(main, backend_options={"debug": True})
    assert [type(event).__name__ for event in streamed] == ["BeforeFit", "AfterFit", "CleanupFit"]
    assert type(heard[-1]) is AfterBatch


async def test_a_fit_installs_no_signal_handler_and_leaves_no_thread(
    learner: TrainLearner,
) -> None:
    """G7: the host's handlers are the host's, during the fit and after it."""
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    threads = set(threading.enumerate())
    during: list[Any] = []

    @learner.on(BeforeFit)
    def look(event: BeforeFit) -> None:
        during.append({number: signal.getsignal(number) for number in signal.valid_signals()})

    await learner.fit()
    assert during == [handlers]
    assert {number: signal.getsignal(number) for number in signal.valid_signals()} == handlers
    assert set(threading.enumerate()) == threads


class Endless:
    """A loader that never ends."""

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.ones(2, 3), torch.zeros(2, 1)


async def test_a_service_starts_stops_and_watches_a_fit(
    make_model: Callable[[], nn.Module],
) -> None:
    """The embedder's life: a task that fits, a stream that tells, a stop, a result."""
    learner = TrainLearner(make_model(), DataLoaders(Endless()))
    results = []

    async def train() -> None:
        results.append(await learner.fit(valid=False))

    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg, learner.events(AfterBatch) as stream:
            tg.start_soon(train)
            async for event in stream:
                if event.iter >= 100:
                    learner.stop(reason="the service shuts down")
                    break
    assert results[0].status == "cancelled"
    assert results[0].reason == "the service shuts down"
    assert results[0].batches >= 100
    assert learner.result is results[0]


@pytest.mark.parametrize("cancelled", [True, False])
async def test_the_workers_of_a_loader_end_with_the_fit(
    make_model: Callable[[], nn.Module], cancelled: bool
) -> None:
    """G9: no process is left behind by a fit that ends in the middle of an epoch."""
    data = TensorDataset(torch.ones(64, 3), torch.zeros(64, 1))
    learner = TrainLearner(make_model(), DataLoaders(DataLoader(data, batch_size=4, num_workers=1)))
    processes: list[int] = []

    @learner.on(AfterBatch, once=True)
    async def end(event: AfterBatch) -> None:
        processes.append(len(multiprocessing.active_children()))
        if cancelled:
            scope.cancel()
            await anyio.sleep_forever()
        raise ZeroDivisionError

    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:
        try:
            await learner.fit(valid=False)
        except ZeroDivisionError:
            assert not cancelled
    gc.collect()
    assert processes == [1]
    assert multiprocessing.active_children() == []


# -------------------------------------------------------------------------------- side by side


class Noise(nn.Module):
    """Adds noise drawn from a generator of its own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(x.shape, generator=self.generator)


def make_learner(seed: int) -> TrainLearner:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, generator=generator)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    loader = DataLoader(data, batch_size=4, shuffle=True, generator=generator)
    linear = nn.Linear(3, 1)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(1, 3, generator=generator))
        linear.bias.zero_()
    return TrainLearner(nn.Sequential(Noise(seed), linear), DataLoaders(loader), lr=0.01)


def weights(learner: TrainLearner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.model.parameters()])


async def test_fits_at_the_same_time_equal_their_solo_runs() -> None:
    """G10: eight of them, each with generators of its own, to the bit."""
    solo = []
    for seed in range(8):
        learner = make_learner(seed)
        await learner.fit(2, valid=False)
        solo.append(weights(learner))
    learners = [make_learner(seed) for seed in range(8)]
    with anyio.fail_after(GUARD), capture_logs():
        async with anyio.create_task_group() as tg:
            for learner in learners:
                tg.start_soon(learner.fit, 2, True, False)
    assert all(map(torch.equal, map(weights, learners), solo))
    assert len({tuple(w.tolist()) for w in solo}) == 8


async def test_fits_at_the_same_time_share_the_global_rng_and_are_told_so_once(
    make_model: Callable[[], nn.Module],
    dls: DataLoaders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G10: a warning, at the first time that two fits overlap, and never again."""
    monkeypatch.setattr(TrainingThread, "_warned_of_shared_rng", False)
    learners = [TrainLearner(make_model(), dls) for _ in range(3)]
    together = threading.Barrier(3)
    for learner in learners:
        learner.on(BeforeFit)(lambda event: together.wait(GUARD) and None)
    with capture_logs() as logs, anyio.fail_after(GUARD):
        for _ in range(2):
            async with anyio.create_task_group() as tg:
                for learner in learners:
                    tg.start_soon(learner.fit)
    assert [(line["event"], line["log_level"]) for line in logs] == [
        ("concurrent_fits_share_rng", "warning")
    ]


async def test_fits_one_after_the_other_are_told_nothing(
    learner: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G10: they share nothing at the same time, also after one that failed."""
    monkeypatch.setattr(TrainingThread, "_warned_of_shared_rng", False)
    with capture_logs() as logs:
        await learner.fit()
        with learner.subscribe(AfterBatch, lambda event: 1 / 0), pytest.raises(ZeroDivisionError):
            await learner.fit()
        await learner.fit()
    assert logs == []


async def test_fits_at_the_same_time_have_observers_of_their_own(
    make_model: Callable[[], nn.Module], dls: DataLoaders
) -> None:
    """G10: each hears its own run, whole."""
    learners = [TrainLearner(make_model(), dls) for _ in range(4)]
    heard: list[list[Event]] = [[] for _ in learners]
    recorded = [record_events(learner) for learner in learners]
    for learner, events in zip(learners, heard, strict=True):
        learner.observe(events.append, Event)
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tg:
            for learner in learners:
                tg.start_soon(learner.fit, 2)
    assert heard == [list(events) for events in recorded]


def test_two_hosts_in_two_threads_fit_at_the_same_time(
    make_model: Callable[[], nn.Module], dls: DataLoaders
) -> None:
    """G10: an asyncio loop and a trio loop in one process."""
    learners = [TrainLearner(make_model(), dls) for _ in range(2)]
    together = threading.Barrier(2)

    def run(learner: TrainLearner, backend: str) -> None:
        @learner.on(BeforeFit)
        async def receiver(event: BeforeFit) -> None:
            together.wait(GUARD)
            await anyio.lowlevel.checkpoint()

        learner.run(backend=backend)

    threads = [
        threading.Thread(target=run, args=pair)
        for pair in zip(learners, ["asyncio", "trio"], strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
    assert [learner.result.status for learner in learners] == ["completed"] * 2
    assert torch.equal(*map(weights, learners))


# ------------------------------------------------------------------------ in a process of its own


def python(script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_importing_does_nothing_but_import() -> None:
    """G7: no thread, no handler, no logging configuration, no random number drawn, no output."""
    process = python(
        """
        import asyncio, logging, random, signal, sys, threading, warnings
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # theirs
            import blinker, numpy, structlog, torch, torcheval.metrics, torchvision

        def state():
            return {
                "threads": threading.enumerate(),
                "signals": [signal.getsignal(n) for n in sorted(signal.valid_signals())],
                "logging": (logging.root.handlers, logging.root.level, logging.root.disabled),
                "loggers": [name for name in logging.root.manager.loggerDict if "train" in name],
                "structlog": (structlog.is_configured(), structlog.get_config()),
                "random": random.getstate(),
                "numpy": [str(part) for part in numpy.random.get_state()],
                "torch": torch.get_rng_state().tolist(),
                "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
                "defaults": (torch.get_default_dtype(), torch.get_default_device()),
                "threads of torch": (torch.get_num_threads(), torch.get_num_interop_threads()),
                "deterministic": torch.are_deterministic_algorithms_enabled(),
                "switch interval": sys.getswitchinterval(),
                "excepthooks": (sys.excepthook, threading.excepthook, sys.unraisablehook),
                "policy": type(asyncio.get_event_loop_policy()),
                "cuda": torch.cuda.is_initialized(),
            }

        before, modules = state(), set(sys.modules)
        import eventrain.callbacks, eventrain.engine, eventrain.events
        after = state()
        print([name for name in before if before[name] != after[name]])
        extras = {"accelerate", "matplotlib", "rich", "sklearn", "trio", "uvloop"}
        print(sorted(extras & (set(sys.modules) - modules)))
        """
    )
    out, err = process.communicate(timeout=GUARD_OF_A_PROCESS)
    assert err == ""
    assert out.splitlines() == ["[]", "[]"]


def test_ctrl_c_reaches_the_script_when_all_is_cleaned_up() -> None:
    """G4, G7: on every backend; nothing on stderr but the KeyboardInterrupt itself."""
    process = python(
        """
        import itertools, threading, time
        import torch
        from eventrain.engine import DataLoaders, TrainLearner
        from eventrain.events import AfterBatch, CleanupFit, Event

        class Endless:
            def __iter__(self):
                for _ in itertools.count():
                    time.sleep(0.001)
                    yield torch.ones(2, 3), torch.zeros(2, 1)

        def train(backend, **options):
            learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(Endless()))
            learner.observe(lambda event: None, Event)
            learner.on(AfterBatch, where=lambda event: event.iter == 3)(
                lambda event: print("training on", backend, flush=True)
            )
            learner.on(CleanupFit)(lambda event: print("CleanupFit", event.end.status, flush=True))
            learner.run(valid=False, backend=backend, backend_options=options)

        for backend, options in [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]:
            try:
                train(backend, **options)
            except KeyboardInterrupt:
                print("KeyboardInterrupt", len(threading.enumerate()), flush=True)
        train("asyncio")
        """
    )
    lines = []
    assert process.stdout is not None
    guard = threading.Timer(GUARD_OF_A_PROCESS, process.kill)
    guard.start()
    for line in process.stdout:
        lines.append(line.strip())
        if line.startswith("training on"):
            process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    guard.cancel()
    assert lines == [
        *["training on asyncio", "CleanupFit cancelled", "KeyboardInterrupt 1"] * 2,
        *["training on trio", "CleanupFit cancelled", "KeyboardInterrupt 1"],
        *["training on asyncio", "CleanupFit cancelled"],
    ]
    assert process.returncode == -signal.SIGINT
    assert err.splitlines()[-1] == "KeyboardInterrupt"
    for noise in ("never retrieved", "never awaited", "Exception in thread", "Exception ignored"):
        assert noise not in err


def test_ctrl_c_as_the_training_begins_is_not_lost() -> None:
    """G4: it may come while the host starts the thread, before anything awaits."""
    process = python(
        """
        import os, signal, threading
        import torch
        from eventrain.engine import DataLoaders, TrainLearner
        from eventrain.events import BeforeFit, CleanupFit

        batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 3
        for backend, options in [("asyncio", {}), ("asyncio", {"use_uvloop": True}), ("trio", {})]:
            for _ in range(8):
                ended = []
                learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
                learner.on(BeforeFit)(lambda event: os.kill(os.getpid(), signal.SIGINT))
                learner.on(CleanupFit)(lambda event: ended.append(event.end.status))
                try:
                    learner.run(valid=False, backend=backend, backend_options=options)
                except KeyboardInterrupt:
                    assert len(ended) == 1, ended
                    assert len(threading.enumerate()) == 1, threading.enumerate()
                else:
                    print("no KeyboardInterrupt")
            print(backend, flush=True)
        """
    )
    with process:
        try:
            out, err = process.communicate(timeout=GUARD_OF_A_PROCESS)
        finally:
            process.kill()
    assert err == ""
    assert out.splitlines() == ["asyncio", "asyncio", "trio"]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_host_that_closes_its_loop_is_not_kept_from_it(learner: TrainLearner, loop: str) -> None:
    """G4: `asyncio.run` cancels what its main task left behind, and waits for the training."""
    tasks: list[asyncio.Task[Any]] = []
    begun = threading.Event()
    learner.on(BeforeFit)(lambda event: begun.set() or wait_until(lambda: learner.stopping))

    async def main() -> None:
        tasks.append(asyncio.create_task(learner.fit()))
        while not begun.is_set():
            await anyio.lowlevel.checkpoint()

    factory = pytest.importorskip("uvloop").new_event_loop if loop == "uvloop" else None
    with record_events(learner) as events, asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main())
    assert tasks[0].cancelled()
    assert type(events[-1]) is CleanupFit
    assert f"eventrain-{learner.run_id}" not in {t.name for t in threading.enumerate()}

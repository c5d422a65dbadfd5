"""ProgressCB: the live display, and what is left on the terminal when the fit has ended."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import anyio
import pytest
import structlog
import torch
from eventrain.callbacks import ProgressCB
from eventrain.callbacks.reporting import progress
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Callback,
    CancelEpochException,
    CancelFitException,
    CleanupEpoch,
    CleanupFit,
    ScopeEnd,
)
from rich.console import Console
from torch import nn

from tests.support.waiting import GUARD

Backend = dict[str, Any]

BAR = re.compile(r"[━╸╺]+")


@pytest.fixture(autouse=True)
def _plain_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)


class Screen:
    """What a terminal shows of a text: its lines, and whether there is a cursor."""

    def __init__(self, text: str) -> None:
        rows: list[list[str]] = [[]]
        y = x = 0
        self.cursor = True
        self.redraws = 0
        for control, char in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z])|([^\x1b])", text):
            if control == "\x1b[2K":
                rows[y] = []
                self.redraws += 1
            elif control == "\x1b[1A":
                y -= 1
            elif control in ("\x1b[?25h", "\x1b[?25l"):
                self.cursor = control.endswith("h")
            elif control:
                assert control.endswith("m"), control  # a color
            elif char == "\r":
                x = 0
            elif char == "\n":
                y, x = y + 1, 0
                rows += [[]] if y == len(rows) else []
            else:
                rows[y][x:] = [" "] * (x - len(rows[y])) + [char, *rows[y][x + 1 :]]
                x += 1
        lines = "\n".join("".join(row).rstrip() for row in rows).rstrip("\n")
        self.lines = lines.split("\n") if lines else []

    @property
    def words(self) -> list[str]:
        """The lines, without bars and the spaces of alignment."""
        return [" ".join(BAR.sub("", line).split()) for line in self.lines]

    @property
    def bars(self) -> list[int]:
        """How long the bar in each line is."""
        return [sum(map(len, BAR.findall(line))) for line in self.lines]


def terminal(file: io.StringIO | None = None, **options: Any) -> Console:
    options = {"force_terminal": True, "width": 100, "color_system": None} | options
    return Console(file=io.StringIO() if file is None else file, **options)


def screen(console: Console) -> Screen:
    assert isinstance(console.file, io.StringIO)
    return Screen(console.file.getvalue())


class Score(Callback):
    """Records what a metrics callback would."""

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.record["loss"] = 1 / (event.epoch + 1 + event.training)
        event.learner.record["confusion"] = [[1, 2], [3, 4]]
        if not event.training:
            event.learner.record["accuracy"] = 0.9876543


TABLE = [
    "epoch   train loss   valid loss   valid accuracy",
    "────────────────────────────────────────────────",
    "    1          0.5            1          0.98765",
    "    2      0.33333          0.5          0.98765",
]


def test_the_screen_shows_a_table_and_nothing_else_when_the_fit_is_done(
    dls: DataLoaders, backend: Backend
) -> None:
    console = terminal()
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=[ProgressCB(console), Score()])
    result = learner.run(2, **backend)
    shown = screen(console)
    assert shown.lines == [*TABLE, "completed 2 epochs"]
    assert shown.cursor
    assert shown.redraws > 0
    assert "epoch 1/2" in console.file.getvalue()
    assert result.dropped == {}


def test_a_second_fit_is_shown_below_the_first(dls: DataLoaders, backend: Backend) -> None:
    console = terminal()
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=[ProgressCB(console), Score()])
    learner.run(2, **backend)
    learner.run(1, train=False, **backend)
    assert screen(console).lines == [
        *TABLE,
        "completed 2 epochs",
        "epoch   valid loss   valid accuracy",
        "───────────────────────────────────",
        "    1            1          0.98765",
        "completed 1 epoch",
    ]


@pytest.mark.parametrize("n_epochs", [0, 1])
def test_without_metrics_there_is_only_a_line(
    dls: DataLoaders, backend: Backend, n_epochs: int
) -> None:
    console = terminal()
    TrainLearner(nn.Linear(3, 1), dls).run(n_epochs, cbs=ProgressCB(console), **backend)
    plural = "s" if n_epochs == 0 else ""
    assert screen(console).lines == [f"completed {n_epochs} epoch{plural}"]


@pytest.mark.parametrize("options", [{"force_terminal": None}, {"force_terminal": False}])
def test_where_there_is_no_terminal_nothing_is_printed(
    dls: DataLoaders, backend: Backend, options: dict[str, Any]
) -> None:
    console = terminal(**options)
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=[ProgressCB(console), Score()])
    learner.run(2, **backend)
    with pytest.raises(RuntimeError, match="broken"):
        learner.run(2, cbs=Breaks(RuntimeError("broken")), **backend)
    assert console.file.getvalue() == ""
    (observer,) = learner.streams
    assert observer.emitted == 0  # not even handed over


def test_a_dumb_terminal_gets_the_table_without_control_sequences(
    dls: DataLoaders, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console = terminal()
    TrainLearner(nn.Linear(3, 1), dls, cbs=[ProgressCB(console), Score()]).run(2, **backend)
    assert "\x1b" not in console.file.getvalue()
    assert screen(console).lines == [*TABLE, "completed 2 epochs"]


class Breaks(Callback):
    """Raises in the second epoch, while it trains."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def before_batch(self, event: BeforeBatch) -> None:
        if event.epoch == 1 and event.training:
            raise self.error


def test_a_cancelled_fit_says_who_and_why_and_gives_the_terminal_back(
    dls: DataLoaders, backend: Backend
) -> None:
    console = terminal()
    reason = "[red]done[/] [/nothing]\n\x1b[2Jand more"
    cbs = [ProgressCB(console), Score(), Breaks(CancelFitException(reason))]
    TrainLearner(nn.Linear(3, 1), dls, cbs=cbs).run(2, **backend)
    shown = screen(console)
    assert shown.lines == [
        *TABLE[:3],
        r"cancelled by Breaks.before_batch: [red]done[/] [/nothing]\n\x1b[2Jand more",
    ]
    assert shown.cursor
    assert "\x1b[2J" not in console.file.getvalue()


def test_a_failed_fit_says_so_and_gives_the_terminal_back(
    dls: DataLoaders, backend: Backend
) -> None:
    console = terminal()
    cbs = [ProgressCB(console), Score(), Breaks(ValueError("[b]no[/b]"))]
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=cbs)
    with pytest.raises(ValueError, match="no"):
        learner.run(2, **backend)
    shown = screen(console)
    assert shown.lines[:3] == TABLE[:3]
    assert len(shown.lines) == 4
    assert re.fullmatch(r"failed( by .*)?: ValueError: \[b\]no\[/b\]", shown.lines[3])
    assert shown.cursor


async def test_a_fit_that_the_host_cancels_gives_the_terminal_back(dls: DataLoaders) -> None:
    console = terminal()
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=ProgressCB(console))
    with anyio.fail_after(30), anyio.CancelScope() as scope:

        @learner.on(BeforeBatch, once=True)
        async def cancel(event: BeforeBatch) -> None:
            scope.cancel()

        await learner.fit(5)
    shown = screen(console)
    assert len(shown.lines) == 1
    assert shown.lines[0].startswith("cancelled")
    assert shown.cursor


def test_a_cancelled_epoch_leaves_its_cells_empty(dls: DataLoaders, backend: Backend) -> None:
    console = terminal()
    cbs = [ProgressCB(console), Score(), Breaks(CancelEpochException())]
    TrainLearner(nn.Linear(3, 1), dls, cbs=cbs).run(2, **backend)
    assert screen(console).lines == [
        *TABLE[:3],
        TABLE[3].replace("0.33333", "       "),
        "completed 2 epochs",
    ]


def test_only_numbers_are_shown_and_names_are_no_markup(dls: DataLoaders, backend: Backend) -> None:
    console = terminal()
    learner = TrainLearner(nn.Linear(3, 1), dls)

    @learner.on(AfterEpoch)
    def record(event: AfterEpoch) -> None:
        learner.record |= {
            "[red]nan[/]": float("nan"),
            "count": 7,
            "list": [1.0],
            "flag": True,
            "none": None,
            "text\n": "a",
        }

    learner.run(1, valid=False, cbs=ProgressCB(console), **backend)
    assert screen(console).words == [
        "epoch train [red]nan[/] train count",
        screen(console).lines[1],
        "1 nan 7",
        "completed 1 epoch",
    ]


class Generated:
    """A loader without a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        yield from self.batches


def test_a_loader_without_a_length_is_shown_too(
    make_batches: Callable[..., Any], backend: Backend
) -> None:
    console = terminal()
    dls = DataLoaders(Generated(make_batches(3)), Generated(make_batches(2)))
    TrainLearner(nn.Linear(3, 1), dls, cbs=[ProgressCB(console), Score()]).run(2, **backend)
    assert screen(console).lines == [*TABLE, "completed 2 epochs"]
    assert "train 0/?" in console.file.getvalue()


class Clock:
    """Time that passes when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "monotonic", clock)
    return clock


class Story:
    """Events by hand, at times of our choosing, given to a callback as the engine would."""

    def __init__(
        self,
        cb: ProgressCB,
        n_iter: int | None,
        n_epochs: int | None = 3,
        n_steps: int | None = None,
    ) -> None:
        self.cb = cb
        self.watcher: Any = None
        self.base = {"learner": None, "run_id": "r1", "purpose": "fit", "n_epochs": n_epochs}
        self.n_iter = n_iter
        self.n_steps = n_steps

    def tell(self, event: Any) -> bool:
        wanted: bool = self.watcher.wants(event)
        if wanted:
            self.watcher.observe(event)
        return wanted

    def begin(self, time: float) -> None:
        event = BeforeFit(**self.base, n_steps=self.n_steps, time=time)
        self.watcher = self.cb.watcher(event)
        assert self.tell(event)

    def epoch(self, epoch: int, training: bool, time: float) -> None:
        assert self.tell(
            BeforeEpoch(**self.base, epoch=epoch, training=training, n_iter=self.n_iter, time=time)
        )

    def batch(self, i: int, time: float, loss: torch.Tensor | None, size: int = 8) -> bool:
        return self.tell(
            AfterBatch(
                **self.base,
                epoch=0,
                training=True,
                n_iter=self.n_iter,
                iter=i,
                n_samples=size * (i + 1),
                steps=i + 1,
                lr=0.1,
                lrs=(0.1,),
                loss=loss,
                opt=None,
                time=time,
            )
        )

    def end(self, time: float) -> None:
        end = ScopeEnd("completed")
        assert self.tell(CleanupFit(**self.base, n_steps=self.n_steps, end=end, time=time))


def test_the_live_lines_tell_progress_loss_speed_and_remaining_time(clock: Clock) -> None:
    console = terminal()
    story = Story(ProgressCB(console), n_iter=20)
    story.begin(99.0)
    assert screen(console).lines == []
    story.epoch(0, True, 100.0)
    assert screen(console).words == ["epoch 1/3", "train 0/20"]
    assert screen(console).bars == [0, 0]
    assert not screen(console).cursor
    # 5 batches of 8 in 2 seconds; the 15 to come take 6.
    assert story.batch(4, 102.0, torch.tensor(0.123456))
    assert screen(console).words == [
        "epoch 1/3",
        "train 5/20 loss 0.12346 20 samples/s 0:06 left",
    ]
    assert screen(console).bars == [0, 5]
    clock.now += 1
    assert story.batch(19, 8000.0, torch.tensor(float("inf")), size=1185)
    assert screen(console).words[1] == "train 20/20 loss inf 3 samples/s 0:00 left"
    assert screen(console).bars == [0, 20]
    clock.now += 1
    story.epoch(0, False, 8000.0)
    assert screen(console).words == ["epoch 1/3", "valid 0/20"]
    clock.now += 1
    story.epoch(1, True, 8100.0)  # 8,000 seconds an epoch, two to come
    assert screen(console).words == ["epoch 2/3 4:26:40 left", "train 0/20"]
    assert screen(console).bars == [7, 0]
    clock.now += 1
    assert story.batch(0, 8160.0, None, size=0)
    assert screen(console).words == ["epoch 2/3 4:25:40 left", "train 1/20 19:00 left"]
    story.end(8200.0)
    assert screen(console).lines == ["completed 3 epochs"]
    assert screen(console).cursor


def test_without_a_length_there_is_no_remaining_time(clock: Clock) -> None:
    console = terminal()
    story = Story(ProgressCB(console), n_iter=None)
    story.begin(100.0)
    story.epoch(0, True, 100.0)
    assert story.batch(3, 104.0, torch.tensor([2.0]))
    assert screen(console).words == ["epoch 1/3", "train 4/? loss 2 8 samples/s"]
    clock.now += 1
    assert story.batch(7, 108.0, torch.ones(2))  # no one number: the last one stays
    assert screen(console).words[1] == "train 8/? loss 2 8 samples/s"
    story.end(109.0)


def test_where_steps_are_the_clock_they_are_shown(clock: Clock) -> None:
    console = terminal()
    story = Story(ProgressCB(console), n_iter=None, n_epochs=None, n_steps=200)
    story.begin(100.0)
    story.epoch(0, True, 100.0)
    assert screen(console).words == ["epoch 1, step 0/200", "train 0/?"]
    assert story.batch(9, 110.0, None)
    clock.now += 1
    assert story.batch(49, 150.0, None)  # a second per step
    assert screen(console).words[0] == "epoch 1, step 50/200 2:30 left"
    assert screen(console).bars[0] == 5
    story.end(300.0)
    assert screen(console).lines == ["completed 200 steps"]


def test_batches_are_handed_over_ten_times_a_second_and_the_rest_always(clock: Clock) -> None:
    story = Story(ProgressCB(terminal()), n_iter=1000)
    story.begin(0.0)
    story.epoch(0, True, 0.0)
    shown = []
    for i in range(1000):  # 4 seconds, in steps of 1/256 so that the sums are exact
        clock.now = 1000.0 + i / 256
        if story.batch(i, i / 256, torch.tensor(1.0)):
            shown.append(i)
        if i % 100 == 99:
            story.epoch(0, True, i / 256)
    assert shown == list(range(0, 1000, 26))  # the first after a tenth of a second each
    story.end(5.0)


def test_short_epochs_are_not_all_drawn(clock: Clock) -> None:
    console = terminal()
    story = Story(ProgressCB(console), n_iter=1)
    story.begin(0.0)
    for epoch in range(100):
        story.epoch(epoch, True, float(epoch))
        clock.now += 0.001
    drawn = re.findall(r"epoch (\d+)/3", console.file.getvalue())
    assert len(drawn) in range(4, 7)  # of 100 in a tenth of a second
    story.end(0.0)


class Tape(io.StringIO):
    """A terminal that remembers who wrote to it, and says when it was first drawn on."""

    def __init__(self) -> None:
        super().__init__()
        self.writers: set[int] = set()
        self.threads: set[str] = set()
        self.drawn = threading.Event()
        self.broken = False

    def write(self, text: str) -> int:
        if self.broken:
            raise OSError("the terminal is gone")
        self.writers.add(threading.get_ident())
        self.threads |= {type(thread).__name__ for thread in threading.enumerate()}
        written = super().write(text)
        if "epoch " in text:
            self.drawn.set()
        return written


def wait_until_drawn(learner: TrainLearner, tape: Tape) -> None:
    """Hold the training, at its first batch, until something is on the screen."""
    learner.on(AfterBatch, once=True)(lambda event: tape.drawn.wait(10))


def test_it_draws_on_the_hosts_thread_while_the_training_runs(
    dls: DataLoaders, backend: Backend
) -> None:
    tape, before = Tape(), set(threading.enumerate())
    learner = TrainLearner(nn.Linear(3, 1), dls)
    wait_until_drawn(learner, tape)
    drawn_by_then = []

    @learner.on(CleanupEpoch, once=True)
    def look(event: CleanupEpoch) -> None:
        drawn_by_then.append(tape.drawn.is_set())

    learner.run(2, cbs=ProgressCB(terminal(tape)), **backend)
    assert drawn_by_then == [True]
    assert tape.writers == {threading.get_ident()}
    assert "_RefreshThread" not in tape.threads
    assert set(threading.enumerate()) == before


def test_standard_output_is_redirected_only_while_it_is_drawn_on(
    dls: DataLoaders, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    tape = Tape()
    monkeypatch.setattr(sys, "stdout", tape)
    learner = TrainLearner(nn.Linear(3, 1), dls)
    wait_until_drawn(learner, tape)

    @learner.on(CleanupEpoch)
    def tell(event: CleanupEpoch) -> None:
        print("[said]", event.epoch, sys.stdout is tape)

    console = Console(force_terminal=True, color_system=None, width=100)
    learner.run(1, valid=False, cbs=ProgressCB(console), **backend)
    learner.run(1, valid=False, cbs=ProgressCB(terminal()), **backend)
    assert Screen(tape.getvalue()).lines == [
        "[said] 0 False",
        "completed 1 epoch",
        "[said] 0 True",  # drawn elsewhere: standard output is not touched
    ]
    assert sys.stdout is tape


def test_a_host_that_redirects_its_output_meanwhile_gets_its_own_back(
    dls: DataLoaders, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`redirect_stdout` around the start of a fit: its stream must not be what remains."""
    real, redirected = Tape(), Tape()
    monkeypatch.setattr(sys, "stdout", real)
    learner = TrainLearner(nn.Linear(3, 1), dls)
    redirect = contextlib.redirect_stdout(redirected)

    @learner.on(AfterBatch, once=True)
    def put_back(event: AfterBatch) -> None:
        redirected.drawn.wait(GUARD)
        redirect.__exit__(None, None, None)
        print("during the fit")

    redirect.__enter__()
    console = Console(force_terminal=True, color_system=None, width=100)
    learner.run(1, valid=False, cbs=ProgressCB(console), **backend)
    assert sys.stdout is real
    assert "during the fit\n" in real.getvalue()


def test_who_keeps_the_redirected_output_can_still_write_to_it(
    dls: DataLoaders, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`redirect_stdout` that begins while the display is there gives that back at its end."""
    real = Tape()
    monkeypatch.setattr(sys, "stdout", real)
    learner = TrainLearner(nn.Linear(3, 1), dls)
    other, redirect = Tape(), contextlib.ExitStack()

    @learner.on(AfterBatch, once=True)
    def redirect_it(event: AfterBatch) -> None:
        real.drawn.wait(GUARD)
        redirect.enter_context(contextlib.redirect_stdout(other))

    console = Console(force_terminal=True, color_system=None, width=100)
    learner.run(1, valid=False, cbs=ProgressCB(console), **backend)
    assert sys.stdout is other
    redirect.close()
    before = real.getvalue()
    sys.stdout.write("half a ")
    sys.stdout.flush()
    print("line of [text]")
    assert real.getvalue() == before + "half a line of [text]\n"


def test_a_terminal_that_breaks_takes_nothing_with_it(
    dls: DataLoaders, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """G8: the display is gone, cursor and output are not in its hands any more."""
    tape = Tape()
    monkeypatch.setattr(sys, "stdout", tape)
    console = Console(force_terminal=True, color_system=None, width=100)
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=ProgressCB(console))
    wait_until_drawn(learner, tape)

    @learner.on(CleanupEpoch, once=True)
    def unplug(event: CleanupEpoch) -> None:
        tape.broken = True

    with structlog.testing.capture_logs() as logs:
        result = learner.run(2, **backend)
    tape.broken = False
    assert result.status == "completed"
    failed = [log for log in logs if log["event"] == "observer_failed"]
    assert [(log["observer"], log["error"]) for log in failed] == [
        ("ProgressCB.observe", "OSError('the terminal is gone')")
    ]
    assert sys.stdout is tape
    assert console._live_stack == []
    assert console._render_hooks == []


def detach_in_the_middle(dls: DataLoaders, backend: Backend, cb: ProgressCB, tape: Tape) -> None:
    """A fit from which the callback is detached before it ends."""
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=cb)
    wait_until_drawn(learner, tape)

    @learner.on(AfterEpoch, once=True)
    async def detach(event: AfterEpoch) -> None:
        shown = Screen(tape.getvalue())
        assert not shown.cursor
        assert len(shown.lines) == 2
        learner.remove_cbs(cb)

    learner.run(1, **backend)


def test_the_display_is_removed_when_the_callback_is_detached(
    dls: DataLoaders, backend: Backend
) -> None:
    tape = Tape()
    console = terminal(tape)
    cb = ProgressCB(console)
    detach_in_the_middle(dls, backend, cb, tape)
    shown = Screen(tape.getvalue())
    assert shown.lines == []
    assert shown.cursor
    assert console._live_stack == []
    cb.close()
    assert Screen(tape.getvalue()).lines == []


def test_a_callback_that_was_detached_shows_the_next_fit(
    dls: DataLoaders, backend: Backend
) -> None:
    tape = Tape()
    cb = ProgressCB(terminal(tape))
    detach_in_the_middle(dls, backend, cb, tape)
    TrainLearner(nn.Linear(3, 1), dls, cbs=[cb, Score()]).run(2, **backend)
    assert Screen(tape.getvalue()).lines == [*TABLE, "completed 2 epochs"]
    assert Screen(tape.getvalue()).cursor


def test_it_may_be_detached_from_within_the_training(dls: DataLoaders, backend: Backend) -> None:
    console = terminal()
    cb = ProgressCB(console)
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=cb)
    wait_until_drawn(learner, tape := Tape())
    console.file = tape

    @learner.on(CleanupEpoch, once=True)
    def detach(event: CleanupEpoch) -> None:
        learner.remove_cbs(cb)
        cb.close()

    assert learner.run(1, **backend).status == "completed"
    assert Screen(tape.getvalue()).lines == []
    assert Screen(tape.getvalue()).cursor


def test_a_callback_attached_for_good_can_be_collected_with_its_learner(dls: DataLoaders) -> None:
    console = terminal()
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=ProgressCB(console))
    learner.drain_timeout = -1.0  # whatever of the end it hears
    learner.run(1)
    del learner
    gc.collect()
    assert screen(console).cursor
    assert console._live_stack == []


async def test_two_fits_on_one_terminal_each_leave_their_table(dls: DataLoaders) -> None:
    console = terminal()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            for _ in range(2):
                learner = TrainLearner(nn.Linear(3, 1), dls, cbs=[ProgressCB(console), Score()])
                tasks.start_soon(learner.fit, 2)
    out = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", console.file.getvalue()).split("\n")
    assert [line.rstrip() for line in out if line.startswith("    2")] == [TABLE[3]] * 2
    assert out.count("completed 2 epochs") == 2
    assert screen(console).cursor
    assert console._live_stack == []


def test_weights_are_the_same_shown_or_not(
    dls: DataLoaders, make_model: Callable[[], nn.Module], backend: Backend
) -> None:
    """G11: watched by a display."""

    def weights(*cbs: Callback) -> list[torch.Tensor]:
        learner = TrainLearner(make_model(), dls, cbs=cbs)
        learner.run(2, **backend)
        return list(learner.model.parameters())

    assert all(map(torch.equal, weights(), weights(ProgressCB(terminal()))))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_loss_on_a_device_is_shown_without_waiting_for_it(clock: Clock) -> None:
    """G14: it is shown when it has arrived."""
    console = terminal()
    story = Story(ProgressCB(console), n_iter=20)
    story.begin(0.0)
    story.epoch(0, True, 0.0)
    torch.cuda._sleep(10**9)
    assert story.batch(0, 0.0, torch.tensor(0.5, device="cpu").to("cuda", non_blocking=True))
    assert screen(console).words[1] == "train 1/20 0:00 left"
    torch.cuda.synchronize()
    clock.now += 1
    story.epoch(0, True, 0.0)
    assert story.batch(1, 0.0, torch.tensor(0.25, device="cuda"))
    torch.cuda.synchronize()
    story.end(1.0)


def test_without_rich_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'eventrain[progress]'")):
        ProgressCB()


SCRIPT = """
import threading, torch
from eventrain.callbacks import ProgressCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, AfterEpoch

batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 3
learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches), cbs=ProgressCB())
hang = threading.Event()

@learner.on(AfterEpoch)
def tell(event):
    learner.record["score"] = 0.25 * (event.epoch + 1)
    print("said", event.epoch, event.training)

@learner.on(AfterBatch)
def pause(event):
    hang.wait(0.02)

learner.run(2)
try:
    learner.run(10_000)
except KeyboardInterrupt:
    print("interrupted")
"""


def run_in_terminal(script: str, interrupt_at: str) -> str:
    """What a script writes to a terminal of its own, with Ctrl-C as soon as it says so."""
    pty = pytest.importorskip("pty")
    termios = pytest.importorskip("termios")
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (40, 100))
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", script],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
    )
    os.close(slave)
    guard = threading.Timer(60, process.kill)
    guard.start()
    out = ""
    interrupted = False
    try:
        while chunk := _read(master):
            out += chunk
            if not interrupted and interrupt_at in out:
                interrupted = True
                process.send_signal(signal.SIGINT)
        assert process.wait() == 0, out
    finally:
        guard.cancel()
        process.kill()
        os.close(master)
    return out


def _read(master: int) -> str:
    try:
        return os.read(master, 65536).decode()
    except OSError:  # Linux's way to say that the other end is closed
        return ""


def test_a_real_terminal_is_given_back_at_the_end_and_on_ctrl_c() -> None:
    shown = Screen(run_in_terminal(SCRIPT, interrupt_at="said 7 False"))
    assert shown.lines[:9] == [
        "said 0 True",
        "said 0 False",
        "said 1 True",
        "said 1 False",
        "epoch   train score   valid score",
        "─────────────────────────────────",
        "    1          0.25          0.25",
        "    2           0.5           0.5",
        "completed 2 epochs",
    ]
    assert shown.lines[-2].startswith("cancelled")
    assert shown.lines[-1] == "interrupted"
    assert shown.lines.count("    8             2             2") == 1
    assert shown.redraws > 0
    assert shown.cursor

"""The host's event loop keeps running: what may take long runs in the fit's own thread."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import TrainLearner
from eventrain.events import AfterFit, BeforeFit, Callback, CleanupFit, record_events
from torch import nn, optim

from tests.support.training import gradients, weights
from tests.support.waiting import GUARD, thread_has_ended, until

GUARD_OF_A_PROCESS = 120


class Calls:
    """Records which of the user's own functions are called in which thread."""

    def __init__(self) -> None:
        self.on_the_loop: list[str] = []
        self.elsewhere: list[str] = []
        self._loop = threading.get_ident()

    def note(self, name: str) -> None:
        here = threading.get_ident() == self._loop
        (self.on_the_loop if here else self.elsewhere).append(name)

    def noting(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def noted(*args: Any, **kwargs: Any) -> Any:
            self.note(name)
            return function(*args, **kwargs)

        return noted

    def subclass(self, base: type, *names: str) -> Any:
        """A class whose methods of these names are recorded."""
        methods = {name: self.noting(getattr(base, name), name) for name in names}
        return type(f"Noting{base.__name__}", (base,), methods)


class Stateful(Callback):
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def state_dict(self) -> dict[str, Any]:
        self._calls.note("callback.state_dict")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._calls.note("callback.load_state_dict")


class Batches:
    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __len__(self) -> int:
        self._calls.note("len(loader)")
        return 2

    def __iter__(self) -> Iterator[Any]:
        self._calls.note("iter(loader)")
        return iter([(torch.ones(2, 3), torch.zeros(2, 1))] * 2)


class Loaders:
    """Loaders that are made when they are asked for."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    @property
    def train(self) -> Batches:
        self._calls.note("dls.train")
        return Batches(self._calls)

    valid = train


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls()
    monkeypatch.setattr(copy, "deepcopy", calls.noting(copy.deepcopy, "deepcopy"))
    monkeypatch.setattr(torch, "cat", calls.noting(torch.cat, "cat"))
    monkeypatch.setattr(torch.Tensor, "clone", calls.noting(torch.Tensor.clone, "clone"))
    return calls


@pytest.fixture
def noting(calls: Calls) -> TrainLearner:
    """A learner all of whose parts record their calls."""
    model = calls.subclass(
        nn.Linear, "state_dict", "load_state_dict", "parameters", "modules", "train", "forward"
    )(3, 1)
    opt_class = calls.subclass(optim.Adam, "__init__", "state_dict", "load_state_dict", "step")
    cbs = Stateful(calls)
    learner = TrainLearner(model, Loaders(calls), opt_func=opt_class, cbs=cbs)
    calls.on_the_loop.clear()  # by the construction of the parts
    return learner


USES: dict[str, tuple[Callable[[TrainLearner], Any], set[str]]] = {
    "fit": (
        lambda learner: learner.fit(1),
        {"__init__", "parameters", "dls.train", "len(loader)", "iter(loader)", "train"},
    ),
    "lr_find": (
        lambda learner: learner.lr_find(max_epochs=1),
        {"deepcopy", "callback.state_dict", "callback.load_state_dict", "__init__"},
    ),
    "validate": (lambda learner: learner.validate(), {"modules", "dls.train", "len(loader)"}),
    "get_preds": (lambda learner: learner.get_preds(), {"modules", "dls.train", "forward", "cat"}),
}


@pytest.mark.parametrize("use", USES)
async def test_nothing_of_the_model_the_data_or_the_optimizer_runs_on_the_loop(
    noting: TrainLearner, calls: Calls, use: str
) -> None:
    """G6: neither while the fit is prepared nor while what it changed is restored."""
    call, expected = USES[use]
    with anyio.fail_after(GUARD):
        await call(noting)
    assert calls.on_the_loop == []
    assert expected <= set(calls.elsewhere)


async def test_nothing_of_a_checkpoint_runs_on_the_loop(
    noting: TrainLearner, calls: Calls, tmp_path: Path
) -> None:
    """G6: saved, found, read, checked and loaded."""
    with anyio.fail_after(GUARD):
        await noting.fit(1, cbs=CheckpointCB(tmp_path))
        await noting.fit(2, cbs=CheckpointCB(tmp_path), resume="last")
    assert noting.resumed_from is not None
    assert calls.on_the_loop == []
    assert {"state_dict", "load_state_dict", "callback.load_state_dict"} <= set(calls.elsewhere)


async def test_what_is_refused_is_refused_without_work_on_the_loop(
    noting: TrainLearner, calls: Calls
) -> None:
    """G6: the errors are those of before, no event has been sent, and nothing is changed."""
    opt, run_id, learner = noting.opt, noting.run_id, noting
    learner.dls.__class__.valid = None
    try:
        with record_events(learner) as events, anyio.fail_after(GUARD):
            with pytest.raises(
                ValueError, match=r"valid=True needs data, but dls\.valid is missing"
            ):
                await learner.fit()
            with pytest.raises(ValueError, match="lr=-1: give a learning rate of 0 or more"):
                await learner.fit(lr=-1, valid=False)
            with pytest.raises(TypeError, match="'nothing' is not a Callback"):
                await learner.fit(cbs="nothing")
            with pytest.raises(ValueError, match=r"this needs a loader, but dls\.valid is missing"):
                await learner.validate()
    finally:
        learner.dls.__class__.valid = Loaders.train
    assert calls.on_the_loop == []
    assert events == []
    assert (learner.opt, learner.run_id, learner.result) == (opt, run_id, None)
    assert not learner.fitting


@pytest.mark.parametrize("method", ["fit", "lr_find"])
async def test_a_fit_that_is_cancelled_while_it_is_prepared_ends_before_its_first_batch(
    learner: TrainLearner, method: str
) -> None:
    """G4, G9: the thread has ended, and model and callbacks are as before."""
    preparing, cancelled = threading.Event(), threading.Event()

    def make_optimizer(parameters: Any, lr: float) -> optim.Optimizer:
        preparing.set()
        assert cancelled.wait(GUARD)
        return optim.SGD(parameters, lr)

    learner.opt_func = make_optimizer
    before, opt = weights(learner.model), learner.opt
    with anyio.fail_after(GUARD), record_events(learner) as events:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(getattr(learner, method))
            await until(preparing.is_set)
            tasks.cancel_scope.cancel()
            await anyio.lowlevel.cancel_shielded_checkpoint()
            with anyio.CancelScope(shield=True):
                await until(lambda: learner.stopping)
            cancelled.set()
    assert events.names == ["CleanupFit"]
    assert events[0].end.who == "host"
    assert (learner.result.status, learner.result.steps) == ("cancelled", 0)
    assert torch.equal(weights(learner.model), before)
    assert learner.cbs == ()
    assert not learner.fitting
    assert thread_has_ended(learner)
    if method == "lr_find":
        assert learner.opt is opt


@pytest.mark.parametrize("graceful", [False, True])
async def test_a_stop_while_the_fit_is_prepared_is_not_lost(
    learner: TrainLearner, graceful: bool
) -> None:
    """It takes effect at the first event, or after the first batch."""
    preparing, stopped = threading.Event(), threading.Event()

    def make_optimizer(parameters: Any, lr: float) -> optim.Optimizer:
        preparing.set()
        assert stopped.wait(GUARD)
        return optim.SGD(parameters, lr)

    learner.opt_func = make_optimizer
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learner.fit)
            await until(preparing.is_set)
            assert learner.stop(reason="too early", graceful=graceful)
            stopped.set()
    assert (learner.result.status, learner.result.reason) == ("cancelled", "too early")
    assert learner.result.batches <= 1


async def test_a_learner_that_is_being_prepared_is_fitting(learner: TrainLearner) -> None:
    """A second fit is refused, and says which run it waits for."""
    preparing, go_on = threading.Event(), threading.Event()

    def make_optimizer(parameters: Any, lr: float) -> optim.Optimizer:
        preparing.set()
        assert go_on.wait(GUARD)
        return optim.SGD(parameters, lr)

    async def first() -> None:
        await learner.fit(run_id="the first")

    learner.opt_func = make_optimizer
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(first)
            await until(preparing.is_set)
            for use in (learner.fit, learner.validate, learner.lr_find):
                with pytest.raises(RuntimeError, match=r"fitting already \(run the first\)"):
                    await use()
            go_on.set()
    assert learner.result.status == "completed"


async def test_a_failure_while_lr_find_restores_is_the_error_of_the_call(
    learner: TrainLearner,
) -> None:
    """In the thread, it would be lost if nobody handed it on."""

    class Broken(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            raise ZeroDivisionError("cannot be loaded")

    broken = Broken()
    learner.add_cbs(broken)
    with anyio.fail_after(GUARD), pytest.raises(ZeroDivisionError, match="cannot be loaded"):
        await learner.lr_find(max_epochs=1)
    assert not learner.fitting
    assert learner.cbs == (broken,)


async def test_context_variables_and_devices_of_the_caller_reach_the_preparation(
    learner: TrainLearner,
) -> None:
    """As they reach every receiver."""
    devices: list[torch.device] = []

    def make_optimizer(parameters: Any, lr: float) -> optim.Optimizer:
        devices.append(torch.get_default_device())
        return optim.SGD(parameters, lr)

    learner.opt_func = make_optimizer
    with torch.device("meta"):
        learner.on(BeforeFit)(lambda event: learner.stop())
        await learner.fit()
    assert devices == [torch.device("meta")]


async def test_an_observer_of_the_fit_alone_gets_all_events_of_it(learner: TrainLearner) -> None:
    """It is attached in the thread, and detached there while its last events still wait."""

    class Watch(Callback):
        observes = (BeforeFit, AfterFit, CleanupFit)

        def __init__(self) -> None:
            self.heard: list[str] = []

        def observe(self, event: Any) -> None:
            self.heard.append(type(event).__name__)

    watch = Watch()
    for _ in range(2):
        result = await learner.fit(cbs=watch)
        assert result.dropped == {}
    assert watch.heard == ["BeforeFit", "AfterFit", "CleanupFit"] * 2
    assert learner.streams == []


def test_the_gradients_that_lr_find_restores_are_there_when_it_returns(
    learner: TrainLearner,
) -> None:
    """G9: restored in the thread, before it ends."""
    learner.model(torch.ones(2, 3)).sum().backward()
    before = weights(learner.model), gradients(learner.model)
    anyio.run(learner.lr_find)
    assert torch.equal(weights(learner.model), before[0])
    assert torch.equal(gradients(learner.model), before[1])


# ---------------------------------------------------------------------------------- first imports

IMPORTS = """
import io, sys, tempfile, threading
import anyio, torch
from eventrain.engine import DataLoaders, TrainLearner

class OnTheLoop:
    def __init__(self):
        self.names = []
        self.loop = threading.get_ident()

    def find_spec(self, name, path=None, target=None):
        if threading.get_ident() == self.loop and name != "torch.utils._device":
            self.names.append(name)  # but for the small one that torch.get_default_device needs

def reporters():
    import eventrain.callbacks as cb
    from rich.console import Console
    folder = tempfile.mkdtemp()
    return [
        cb.MetricsCB(),
        cb.CheckpointCB(folder),
        cb.StructlogCB(format="json", file=io.StringIO()),
        cb.ProgressCB(Console(file=io.StringIO(), force_terminal=True)),
        cb.TensorBoardCB(folder),
        cb.LossCurveCB(),
        cb.PrometheusCB(),
        cb.OpenTelemetryCB(),
    ]

async def main():
    batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
    learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
    cbs = {cbs}
    before = sorted({heavy} & sys.modules.keys())
    searched = OnTheLoop()
    sys.meta_path.insert(0, searched)
    await learner.fit(2, cbs=cbs)
    await learner.lr_find()
    await learner.validate()
    await learner.get_preds()
    sys.meta_path.remove(searched)
    print(before, searched.names, sorted({heavy} & sys.modules.keys()))

anyio.run(main, backend={backend!r}, backend_options={options!r})
"""


@pytest.mark.parametrize(
    ("cbs", "heavy"),
    [
        ("None", ["torch._dynamo"]),
        ("reporters()", ["matplotlib", "opentelemetry.trace", "torch.utils.tensorboard"]),
    ],
    ids=["alone", "with reporters"],
)
def test_the_first_fit_of_a_process_imports_nothing_on_the_loop(
    backend: dict[str, Any], cbs: str, heavy: list[str]
) -> None:
    """G6: the first optimizer imports 888 modules, and what reporting callbacks draw and write with
    takes half a second: in the fit's own thread, or a writer's; nor do the constructors do it."""
    script = IMPORTS.replace("{cbs}", cbs).replace("{heavy}", repr(set(heavy)))
    script = script.replace("{backend!r}", repr(backend["backend"]))
    done = subprocess.run(
        [sys.executable, "-c", script.replace("{options!r}", repr(backend["backend_options"]))],
        capture_output=True,
        text=True,
        timeout=GUARD_OF_A_PROCESS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    before, on_the_loop = [], []
    assert done.stdout.splitlines()[-1] == f"{before} {on_the_loop} {heavy}"

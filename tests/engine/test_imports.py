"""First imports of large packages: without the pauses of the garbage collector."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from eventrain.engine.imports import import_large

MODULE = "a_large_module_of_the_tests"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that is found by the name `MODULE`; it makes as many objects as a large package."""
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / f"{MODULE}.py"
    file.write_text("objects = [[i] for i in range(300_000)]\n")
    yield file
    sys.modules.pop(MODULE, None)


@pytest.fixture
def collections() -> Iterator[list[int]]:
    """The generations that are collected."""
    found: list[int] = []

    def collect(phase: str, info: dict[str, Any]) -> None:
        found.append(info["generation"])

    gc.callbacks.append(collect)
    yield found
    gc.callbacks.remove(collect)


class Cycle:
    def __init__(self) -> None:
        self.me = self


@pytest.mark.usefixtures("module")
def test_nothing_is_collected_while_a_large_package_is_imported(collections: list[int]) -> None:
    """G6: nor at once afterwards, although there are so many new objects."""
    module = import_large(MODULE)
    rest = [[i] for i in range(5_000)]
    assert 2 not in collections
    assert gc.isenabled()
    assert len(module.objects) == len(rest) * 60
    assert import_large(MODULE) is module


@pytest.mark.usefixtures("module")
def test_what_was_there_before_is_collected_later() -> None:
    dead = weakref.ref(Cycle())
    import_large(MODULE)
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert dead() is None


def test_the_collector_is_on_again_after_a_failed_import(module: Path) -> None:
    module.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        import_large(MODULE)
    assert gc.isenabled()


@pytest.mark.usefixtures("module")
def test_a_collector_that_the_host_has_turned_off_stays_off() -> None:
    gc.disable()
    try:
        import_large(MODULE)
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.usefixtures("module")
def test_what_the_host_has_frozen_stays_frozen() -> None:
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        import_large(MODULE)
        assert 0 < gc.get_freeze_count() <= frozen  # some may have died meanwhile
        assert gc.isenabled()
    finally:
        gc.unfreeze()


@pytest.mark.usefixtures("module")
def test_two_threads_that_import_at_once_get_the_same_module() -> None:
    modules: list[Any] = []
    threads = [
        threading.Thread(target=lambda: modules.append(import_large(MODULE))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert modules == [sys.modules[MODULE]] * 4
    assert gc.isenabled()


FIRST_FIT = """
import gc, sys
import torch
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import BeforeFit

assert "torch._dynamo" not in sys.modules
generations = []

def collect(phase, info):
    generations.append(info["generation"])

batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 2
learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
gc.callbacks.append(collect)
learner.on(BeforeFit)(lambda event: gc.callbacks.remove(collect))
learner.run(valid=False)
assert "torch._dynamo" in sys.modules
print(generations.count(2), gc.isenabled(), gc.get_freeze_count())
"""


def test_the_first_fit_of_a_process_is_prepared_without_a_full_collection() -> None:
    """G6: two of them stopped the event loop for 100 ms and more."""
    done = subprocess.run(
        [sys.executable, "-c", FIRST_FIT], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["0", "True", "0"]

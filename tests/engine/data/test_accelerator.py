"""What is asked of the accelerator, whichever it is; tests/accelerator/ uses a stand-in for one."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from eventrain.engine.checkpoint.random_state import (
    random_state,
    random_state_differs,
    set_random_state,
)
from eventrain.engine.data import accelerator, fast
from eventrain.engine.data.thread_state import torch_state

LOADERS = SimpleNamespace(train=None, valid=None)


class Machine:
    """Two devices of a type; a current one per thread; a random state per device."""

    def __init__(self, patch: pytest.MonkeyPatch, name: str, in_use: bool) -> None:
        self.current = threading.local()
        self.random = [torch.zeros(2), torch.ones(2)]
        self.name = name
        # The module of MPS has no is_initialized, and functions that take no device.
        module: Any = SimpleNamespace(is_available=lambda: in_use)
        module.get_rng_state, module.set_rng_state = self.get_state, self.set_state
        if name != "mps":
            module.is_initialized = lambda: in_use
        patch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(name))
        patch.setattr(torch.accelerator, "device_count", lambda: len(self.random))
        patch.setattr(torch.accelerator, "current_device_index", self.index)
        patch.setattr(torch.accelerator, "set_device_index", self.set_index)
        patch.setattr(torch, "get_device_module", lambda device: module)

    def index(self) -> int:
        return getattr(self.current, "index", 0)

    def set_index(self, index: int) -> None:
        self.current.index = index

    def get_state(self, device: str = "mps:0") -> torch.Tensor:
        assert (device == "mps:0") == (self.name == "mps")
        return self.random[torch.device(device).index].clone()

    def set_state(self, state: torch.Tensor, device: str = "mps:0") -> None:
        self.random[torch.device(device).index] = state


def in_another_thread(work: Any) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("name", ["cuda", "xpu", "mtia"])
def test_a_thread_gets_the_current_device_of_the_one_that_starts_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, name, in_use=True)
    machine.set_index(1)
    enter = torch_state()
    found: list[int] = []
    in_another_thread(lambda: found.append(machine.index()))
    in_another_thread(lambda: (enter(), found.append(machine.index())))
    assert found == [0, 1]


@pytest.mark.parametrize("name", ["cuda", "mps"])
def test_an_accelerator_that_is_not_in_use_is_left_alone(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, name, in_use=False)
    monkeypatch.delattr(torch.accelerator, "current_device_index")  # it would initialize it
    torch_state()()
    assert machine.index() == 0
    assert accelerator.initialized_accelerator() is None
    assert name not in random_state(LOADERS)


@pytest.mark.parametrize("name", ["cuda", "xpu", "mtia", "mps"])
def test_the_random_state_of_every_device_is_kept(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, name, in_use=True)
    if name == "mps":
        del machine.random[1]
    before = [state.clone() for state in machine.random]
    state = random_state(LOADERS)
    assert [saved.tolist() for saved in state[name]] == [saved.tolist() for saved in before]
    assert random_state_differs(LOADERS, state) is None
    machine.random = [torch.full((2,), 9.0) for _ in before]
    set_random_state(LOADERS, state)
    assert [state.tolist() for state in machine.random] == [state.tolist() for state in before]


def test_a_state_of_another_accelerator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, "xpu", in_use=True)
    state = {**random_state(LOADERS), "cuda": [torch.zeros(2)] * 4}
    assert random_state_differs(LOADERS, state) == (
        "there are 0 cuda devices, but the checkpoint has 4"
    )


def test_data_is_kept_on_a_device_that_tells_that_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(monkeypatch, "xpu", in_use=True)
    tensors = (torch.zeros(100),)
    for free, fits in (800, True), (799, False):
        monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda _, n=free: (n, 10**9))
        assert fast._fits(tensors, "xpu") is fits
    assert not fast._fits(tensors, "cuda")  # it is not the accelerator

    def unknown(device: object) -> None:
        raise RuntimeError("no such function for this device")

    monkeypatch.setattr(torch.accelerator, "get_memory_info", unknown)
    assert not fast._fits(tensors, "xpu")


def test_a_device_without_float64_sums_the_loss_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator.has_float64.cache_clear()
    Machine(monkeypatch, "xpu", in_use=True)
    for dtypes, has in ({torch.float32}, False), ({torch.float32, torch.float64}, True):
        capability = {"supported_dtypes": dtypes}
        monkeypatch.setattr(torch.accelerator, "get_device_capability", lambda _, c=capability: c)
        assert accelerator.has_float64(torch.device("xpu")) is has
        accelerator.has_float64.cache_clear()
    assert accelerator.has_float64(torch.device("cpu"))
    accelerator.has_float64.cache_clear()


def test_memory_is_not_pinned_where_that_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator.has_pinned_memory.cache_clear()
    for name in "cpu", "meta", "mps":
        assert not accelerator.has_pinned_memory(name)
    Machine(monkeypatch, "xpu", in_use=True)
    made = []

    def empty(*size: int, pin_memory: bool = False) -> Any:
        made.append(pin_memory)
        return SimpleNamespace(is_pinned=lambda: True)

    monkeypatch.setattr(torch, "empty", empty)
    assert accelerator.has_pinned_memory("xpu")
    assert accelerator.has_pinned_memory("xpu")
    assert made == [True]  # it is tried once
    accelerator.has_pinned_memory.cache_clear()

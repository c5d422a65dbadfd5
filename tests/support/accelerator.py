"""A stand-in for an accelerator: the device "standin", which computes with tensors of the host.

It is a backend of torch in Python. Every operator runs on the CPU, so results are equal to the
CPU's to the bit. In other respects it is like a GPU:

- Tensors of two devices do not mix, and the device draws random numbers of its own.
- A copy to the host with `non_blocking=True` has arrived when the host has waited for an event that
  was recorded after it, or has asked that event twice; until then the copy has other values.
- The host waits for the device where it reads a number: `waits` counts how often, and where.

It has no pinned memory, as not every device has it. `install` changes torch for the whole process,
so it is called in a process of its own: see `tests/accelerator/conftest.py`.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree

DEVICE = "standin"
NOT_ARRIVED = -123

waits: Counter[str] = Counter()
"""How often the host waited, by the function that made it wait; "host: ..." in the main thread.

In a test, the main thread runs the event loop: not the training, and not a writer.
"""
uploads: Counter[str] = Counter()
"""The copies to the device that the host waited for, by the function that made them."""

_libraries: list[torch.library.Library] = []  # an operator is registered while its library lives


@contextmanager
def counted(counter: Counter[str]) -> Iterator[Counter[str]]:
    """Count what happens within, alone: `waits` or `uploads`."""
    before = counter.copy()
    within: Counter[str] = Counter()
    yield within
    within.update(counter - before)


def install() -> None:
    """Give torch the device, and let `module.to(device)` keep its parameters, as on a GPU."""
    from torch.utils import backend_registration

    backend_registration._setup_privateuseone_for_python_backend(DEVICE, _Device())
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch.Event = _Event  # type: ignore[assignment, misc]
    torch.Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign]
    torch.tensor = _made_on_the_host(torch.tensor)
    torch.as_tensor = _made_on_the_host(torch.as_tensor)
    factories = torch.library.Library("_", "IMPL")
    factories.fallback(_run, "PrivateUse1")
    _libraries.append(factories)
    _install_autocast()


def _made_on_the_host(make: Any) -> Any:
    """Let a function make its tensor on the host first: torch does not ask Python to make it."""

    def made(data: Any, *, device: Any = None, **options: Any) -> Any:
        if device is None or torch.device(device).type != DEVICE:
            return make(data, device=device, **options)
        requires_grad = options.pop("requires_grad", False)
        return make(data, **options).to(device).requires_grad_(requires_grad)

    return made


class _Device:
    """What `torch.standin` is: the functions that every module of a device has."""

    def __init__(self) -> None:
        self.random = torch.Generator().get_state()

    def is_available(self) -> bool:
        return True

    is_initialized = is_available

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def manual_seed_all(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed).get_state()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return self.random.clone()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        self.random = state.clone()

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


# ------------------------------------------------------------------------ tensors and operators


class StandInTensor(torch.Tensor):
    """A tensor of the device. Its values are in `on_host`."""

    on_host: torch.Tensor

    @staticmethod
    def __new__(cls, on_host: torch.Tensor) -> StandInTensor:
        tensor: StandInTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            on_host.shape,
            strides=on_host.stride(),
            storage_offset=on_host.storage_offset(),
            dtype=on_host.dtype,
            device=torch.device(DEVICE, 0),
        )
        tensor.on_host = on_host
        return tensor

    def __repr__(self, **kwargs: Any) -> str:
        return f"<{DEVICE}: {self.on_host}>"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else repr(self), spec)

    def tolist(self) -> Any:
        return self.cpu().tolist()  # torch's does not support subclasses

    @classmethod
    def __torch_dispatch__(
        cls, op: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(op, *args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl


def is_here(x: Any) -> bool:
    """Whether `x` is a tensor of this device."""
    return isinstance(x, StandInTensor)


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator on the host's tensors."""
    if op._can_decompose():  # torch has not done so for a tensor of the inference mode
        return op.decompose(*args, **kwargs)
    name = op._schema.name.removeprefix("aten::")
    device = kwargs.get("device")
    if name == "copy_":
        return _copy(*args)
    if name == "_to_copy" and device is not None and device.type != DEVICE:
        if kwargs.get("non_blocking"):
            raise NotImplementedError(f"{DEVICE} has no pinned memory for an asynchronous copy")
        waits[_caller()] += 1
        return op(args[0].on_host, **kwargs)
    leaves = pytree.tree_leaves((args, kwargs))
    _check(name, leaves)
    returns_here = device is None or device.type == DEVICE
    if device is not None:
        kwargs["device"] = torch.device("cpu") if returns_here else device
    given = {id(x.on_host): x for x in leaves if is_here(x)}
    args, kwargs = pytree.tree_map(lambda x: x.on_host if is_here(x) else x, (args, kwargs))
    with _own_random_state(torch.Tag.nondeterministic_seeded in op.tags):
        out = op(*args, **kwargs)

    def here(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or not returns_here:
            return x
        return given[id(x)] if id(x) in given else StandInTensor(x)  # in place, or a new one

    return pytree.tree_map(here, out)


def _check(name: str, leaves: list[Any]) -> None:
    """Refuse tensors of two devices, and count the wait if the host needs to know a value."""
    tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
    elsewhere = [x for x in tensors if not is_here(x) and x.ndim]
    if elsewhere and len(elsewhere) < len(tensors) and not name.startswith("index"):
        raise RuntimeError(
            f"{name}: expected all tensors to be on the same device, but found {DEVICE} and"
            f" {elsewhere[0].device}"
        )
    by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
    if by_mask or name in _READS:
        waits[_caller()] += 1


_READS = {
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "is_nonzero",
    "masked_select",
    "nonzero",
    "repeat_interleave",
    "unique_consecutive",
    "unique_dim",
}
"""Operators of which the host needs to know the result, or its shape."""


@contextmanager
def _own_random_state(draws: bool) -> Iterator[None]:
    if not draws:
        yield
        return
    device: Any = torch.get_device_module(DEVICE)
    before = torch.get_rng_state()
    torch.set_rng_state(device.random)
    try:
        yield
    finally:
        device.random = torch.get_rng_state()
        torch.set_rng_state(before)


def _caller() -> str:
    """The innermost function of the project, or of a test, that is running in this thread."""
    name = "torch"
    frame = sys._getframe(1)
    while frame.f_back is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith(("eventrain.", "test_", "tests.")) and module != __name__:
            name = frame.f_code.co_qualname
            break
        frame = frame.f_back
    return f"host: {name}" if threading.current_thread() is threading.main_thread() else name


# -------------------------------------------------------------------------- copies to the host


class _Arrival:
    """A copy to the host that is on its way."""

    def __init__(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self._source, self._target = source.clone(), target
        target.fill_(NOT_ARRIVED)

    def arrive(self) -> None:
        self._target.copy_(self._source)


_on_their_way: list[_Arrival] = []
_lock = threading.Lock()


def _copy(target: Any, source: Any, non_blocking: bool = False) -> Any:
    """Copy to the device, from it, or within it."""
    if is_here(target):
        if not is_here(source) and not non_blocking:
            uploads[_caller()] += 1
        target.on_host.copy_(source.on_host if is_here(source) else source)
    elif non_blocking:
        with _lock:
            _on_their_way.append(_Arrival(source.on_host, target))
    else:
        waits[_caller()] += 1
        target.copy_(source.on_host)
    return target


class _Event:
    """What `torch.Event` is: it has happened when the copies before it have arrived."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        self._before: list[_Arrival] = []
        self._asked = False

    def record(self, stream: Any = None) -> None:
        with _lock:
            self._before = list(_on_their_way)

    def query(self) -> bool:
        """Whether it has happened: not the first time, and the second time yes."""
        if self._before and not self._asked:
            self._asked = True
            return False
        self._arrive()
        return True

    def synchronize(self) -> None:
        waits[_caller()] += 1
        self._arrive()

    def _arrive(self) -> None:
        with _lock:
            for arrival in self._before:
                if arrival in _on_their_way:
                    _on_their_way.remove(arrival)
                    arrival.arrive()
        self._before = []


# ---------------------------------------------------------------------------------- autocast


def _install_autocast() -> None:
    """Register the operators that the tests use, with the types of the CPU's autocast."""
    others = torch.library.Library("_", "IMPL")
    others.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    casting = torch.library.Library("aten", "IMPL")
    for name in "linear", "conv2d":
        casting.impl(name, _casting(name, None), "AutocastPrivateUse1")
    for name in "mse_loss", "cross_entropy_loss":
        casting.impl(name, _casting(name, torch.float32), "AutocastPrivateUse1")
    _libraries.extend((others, casting))


def _casting(name: str, dtype: torch.dtype | None) -> Any:
    op = getattr(torch.ops.aten, name).default
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(x: Any) -> Any:
        if not is_here(x) or not x.is_floating_point():
            return x
        return x.to(dtype or torch.get_autocast_dtype(DEVICE))

    def call(*args: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(keys):
            return op(*(cast(x) for x in args))

    return call

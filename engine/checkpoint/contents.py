"""What an object holds: the items of a container, the attributes of an object of the user's, what a
function refers to."""

from __future__ import annotations

import argparse
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import chain, islice
from pathlib import PosixPath, PurePosixPath, WindowsPath
from sys import stdlib_module_names
from types import CellType, CodeType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..loop.state import LoopState
from .generators import is_generator

TENSORS = frozenset({torch.Tensor, nn.Parameter})
PLAIN = frozenset(
    {
        *(type(None), bool, int, float, complex, str, bytes, bytearray, range, type),
        *(torch.dtype, torch.device, torch.Size, PosixPath, WindowsPath, PurePosixPath),
    }
)
"""The types of values that hold nothing; no subclasses, which may have attributes."""
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""The attributes of modules that are torch's."""


def attributes_of(owner: Any, methods: bool = False) -> dict[str, Any]:
    """The attributes of an object, by name: its own, and those of the user's classes.

    Args:
        owner: any object.
        methods: whether the functions of the classes are listed, too.

    Returns:
        Those that may hold something, in the order of their names.
    """
    found: dict[str, Any] = {}
    for cls in reversed(type(owner).__mro__):
        if is_users(cls):
            found |= {key: value for key, value in vars(cls).items() if key[:2] != "__"}
            for slot in slots_of(cls):
                found[slot] = getattr(owner, slot, None)
    if not methods:
        found = {key: value for key, value in found.items() if type(value) not in _METHODS}
    found |= getattr(owner, "__dict__", {})
    return dict(sorted(item for item in found.items() if type(item[1]) not in PLAIN))


def slots_of(cls: type) -> Iterable[str]:
    """The names in the `__slots__` of one class."""
    slots = vars(cls).get("__slots__", ())
    return (slots,) if isinstance(slots, str) else slots


def is_users(cls: type) -> bool:
    """Whether a class is the user's, so that its objects may hold anything."""
    return _is_users_module(str(cls.__module__))


@lru_cache(maxsize=1000)
def _is_users_module(name: str) -> bool:
    root = name.partition(".")[0]
    return root == "__main__" or root not in _LIBRARIES


def contents_of(value: Any, most: int) -> Iterator[tuple[str, Any]]:
    """What a value holds, by the name of the step to it: "[0]", "['net']" or ".net".

    Args:
        value: any value. Neither its length nor its items are asked for, unless it is one of
            Python's own containers. Those are copied: another thread may change them meanwhile.
        most: of how many items of a container.
    """
    if isinstance(value, dict):
        for i, (key, item) in enumerate(list(islice(dict.items(value), most))):
            if type(item) not in PLAIN:
                # The repr of another key may be long, or make the host wait for the device.
                yield f"[{key!r}]" if isinstance(key, str | int) else f"[{i}]", item
    elif isinstance(value, list | tuple | deque):
        for i, item in enumerate(list(islice(_items(value), most))):
            if type(item) not in PLAIN:
                yield f"[{i}]", item
    elif isinstance(value, _NAMESPACES):
        yield from ((f".{name}", item) for name, item in list(vars(value).items()))
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
        yield ".__func__", value.__func__
    elif isinstance(value, staticmethod | classmethod):
        yield "", value.__func__
    elif isinstance(value, partial):
        held = [value.func, *value.args, *value.keywords.values()]
        yield from ((f"[{i}]", item) for i, item in enumerate(held))
    elif isinstance(value, FunctionType):
        yield from _referred_to(value)
    if isinstance(value, LoopState):  # another learner
        yield from ((f".{name}", getattr(value, name)) for name in ("model", "opt"))
        yield from ((f".{name}", item) for name, item in list(vars(value).items()))
    elif is_users(type(value)):
        yield from ((f".{name}", item) for name, item in attributes_of(value).items())
    elif type(value).__module__.startswith("torch.") and hasattr(value, "__dict__"):
        yield from ((f".{name}", item) for name, item in list(vars(value).items()))


def beside_its_state(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds and its `state_dict` does not have, without its submodules."""
    own = vars(module)
    for name in _HOOKS:
        if hooks := own[name]:
            yield name, list(hooks.values())  # their keys are others in each process
    if is_users(type(module)):
        for name, value in own.items():
            if name not in OF_EVERY_MODULE and type(value) not in PLAIN:
                yield name, value


def _referred_to(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function holds: in its closure, its defaults and its attributes.

    Also the globals that it reads by their names, if they are tensors or have a state of their own:
    a script or a notebook has its networks there.
    """
    if not _is_users_module(str(function.__module__)):
        return
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        yield f".{name}", cell_content(cell)
    for i, item in enumerate(function.__defaults__ or ()):
        yield f".__defaults__[{i}]", item
    for held in (function.__kwdefaults__ or {}, vars(function)):
        yield from ((f".{name}", item) for name, item in list(held.items()))
    for name in _names_in(code):
        value = function.__globals__.get(name)
        if hasattr(type(value), "state_dict") or is_generator(value) or type(value) in TENSORS:
            yield f".{name}", value


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names_in(constant)


def cell_content(cell: CellType) -> Any:
    """What a cell of a closure holds; None if it is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def kinds_if_plain(value: Any) -> frozenset[type] | None:
    """The types in a container of numbers, strings and tensors, nested or not.

    It is judged by its first 10,000 items, all at once: a list of a million numbers, or a buffer of
    thousands of tuples, takes no time.

    Returns:
        None if it holds anything else, or is not one of Python's own containers.
    """
    if type(value) not in _CONTAINERS:
        return None
    found: set[type] = set()
    level: list[Any] = [value]
    for _ in range(_LEVELS):
        items = list(islice(chain.from_iterable(map(_items, level)), _SCANNED))
        kinds = set(map(type, items))
        found |= kinds
        if other := kinds - PLAIN - TENSORS:
            if not other <= _CONTAINERS:
                return None
            level = [item for item in items if type(item) in _CONTAINERS]
        else:
            return frozenset(found)
    return None


def nested_containers(value: Any, most: int) -> list[Any]:
    """A container that `kinds_if_plain` has judged, and about `most` of those in it."""
    found = [value]
    for container in found:  # those in it are appended meanwhile
        if len(found) >= most:
            break
        found += [item for item in islice(_items(container), most) if type(item) in _CONTAINERS]
    return found


def tensors_in(value: Any, most: int) -> Iterator[torch.Tensor]:
    """The tensors in a container that `kinds_if_plain` has judged."""
    for container in nested_containers(value, most):
        yield from (item for item in islice(_items(container), most) if type(item) in TENSORS)


def is_container(value: Any) -> bool:
    """Whether it is one of Python's own containers, and not of a subclass."""
    return type(value) in _CONTAINERS


def is_longer(value: Any, most: int) -> bool:
    """Whether a container of Python's own, or of a subclass, has more than `most` items."""
    for kind in _KINDS:
        if isinstance(value, kind):
            length: Callable[[Any], int] = kind.__len__  # not that of the subclass
            return length(value) > most
    return False


def _items(value: Any) -> Iterator[Any]:
    """The items of a container, as Python's own class iterates it: a subclass may do more."""
    if isinstance(value, dict):
        return iter(dict.values(value))
    kind = next(kind for kind in _KINDS if isinstance(value, kind))
    items: Iterator[Any] = kind.__iter__(value)
    return items


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")
_NAMESPACES = (SimpleNamespace, UserDict, UserList, argparse.Namespace)
_KINDS = (dict, list, tuple, deque)
_CONTAINERS = frozenset({*_KINDS, OrderedDict, defaultdict, Counter})
_METHODS = frozenset({FunctionType, staticmethod, classmethod, property})
_LIBRARIES = stdlib_module_names | {"torch", "numpy", "eventrain", "structlog", "accelerate"}
_LEVELS, _SCANNED = 4, 10_000

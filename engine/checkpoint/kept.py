"""What tensors, modules and containers held, to put it back into the same objects."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from types import CellType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import is_lazy

from .contents import cell_content, slots_of


class KeptTensors:
    """Copies of tensors, one of each, and of the gradients of parameters."""

    def __init__(self) -> None:
        self._kept: dict[int, _KeptTensor] = {}
        self._gradients: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def keep(self, tensor: torch.Tensor) -> None:
        if id(tensor) not in self._kept:
            self._kept[id(tensor)] = _KeptTensor(tensor)

    def keep_gradient(self, p: torch.Tensor) -> None:
        self._gradients.append((p, p.grad))
        if p.grad is not None:
            self.keep(p.grad)

    def put_back(self, tensor: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
        """Give a tensor the value it had; or give it to another one, which has taken its place."""
        into = tensor if into is None else into
        self._kept[id(tensor)].put_back(into)
        return into

    def put_back_gradients(self) -> None:
        for p, gradient in self._gradients:
            p.grad = None
            if gradient is not None:
                self.put_back(gradient)
                p.grad = gradient if gradient.device == p.device else gradient.to(p.device)


class _KeptTensor:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor  # so that its id is not used again
        self._class = type(tensor)
        self._is_back = False
        self._value = None if is_lazy(tensor) else tensor.detach().clone()

    def put_back(self, tensor: torch.Tensor) -> None:
        if self._is_back:
            return  # a parameter is reached from its module and from its optimizer
        self._is_back = True
        if self._value is None:  # it had no shape yet
            if not is_lazy(tensor):
                tensor.data = tensor.new_empty(0)
                tensor.__class__ = self._class
        elif (
            tensor.shape == self._value.shape
            and tensor.dtype == self._value.dtype
            and not _overlaps(tensor)
        ):
            with torch.inference_mode() if tensor.is_inference() else torch.no_grad():
                tensor.copy_(self._value)
        elif tensor.shape != self._value.shape or not torch.equal(tensor, self._value):
            tensor.data = self._value.to(tensor.device)


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether several of its elements are one in memory, as after `expand`."""
    if tensor.layout is not torch.strided:
        return False
    return any(
        size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


class KeptModule:
    """What one module held, without its submodules: parameters, buffers, its mode and its members.

    Args:
        module: the module.
        tensors: where its parameters and buffers, and their gradients, are kept.
    """

    def __init__(self, module: nn.Module, tensors: KeptTensors) -> None:
        self._module = module
        self._tensors = tensors
        self._training = module.training
        self._members = {name: dict(vars(module)[name]) for name in _MEMBERS}
        self._not_saved = set(module._non_persistent_buffers_set)
        self._others = {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
        # A lazy module becomes another class, and loses its hooks, with its first batch.
        self._trained = [(p, p.requires_grad) for p in module.parameters(recurse=False)]
        self._lazy = _LazyModule(module) if isinstance(module, LazyModuleMixin) else None
        parameters, buffers = self._members["_parameters"], self._members["_buffers"]
        for tensor in (*parameters.values(), *buffers.values(), *self._others.values()):
            if tensor is not None:
                tensors.keep(tensor)
        for p in parameters.values():
            if p is not None:
                tensors.keep_gradient(p)

    def put_back(self) -> None:
        module = self._module
        if self._lazy is not None:
            self._lazy.put_back()
        module.training = self._training
        module._non_persistent_buffers_set = set(self._not_saved)
        for name, members in self._members.items():
            here = vars(module)[name]
            before = {key: self._place(here.get(key), was) for key, was in members.items()}
            here.clear()
            here.update(before)
        for p, trained in self._trained:
            if p.requires_grad != trained:
                p.requires_grad_(trained)
        here = vars(module)
        for name in [k for k, v in here.items() if isinstance(v, torch.Tensor)]:
            if name not in self._others:
                del here[name]
        for name, was in self._others.items():
            here[name] = self._place(here.get(name), was)

    def _place(self, now: Any, was: Any) -> Any:
        """What is to be in the place of `now`: the object of before, with its value.

        If it is on another device now, the module was moved and stays there.
        """
        if not isinstance(was, torch.Tensor):
            return was
        moved = isinstance(now, torch.Tensor) and now.device != was.device
        return self._tensors.put_back(was, now if moved else was)


_MEMBERS = ("_parameters", "_buffers", "_modules")


class _LazyModule:
    """The class, attributes and hooks of a lazy module."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._class = type(module)
        self._attributes = dict(vars(module))
        self._dicts = {k: dict(v) for k, v in vars(module).items() if isinstance(v, dict)}

    def put_back(self) -> None:
        self._module.__class__ = self._class
        vars(self._module).update(self._attributes)
        for name, items in self._dicts.items():
            held = self._attributes[name]  # the same object: handles of hooks refer to it
            held.clear()
            held.update(items)


class KeptAttributes:
    """The attributes of a learner, a callback or a module."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._values = dict(vars(owner))

    def put_back_all(self) -> None:
        """Put back every attribute, and remove new ones."""
        for name in {*self._values, *vars(self._owner)}:
            self.put_back(name)

    def put_back(self, name: str) -> None:
        """Put back an attribute as the object that it was; remove it if it is a new one."""
        here = vars(self._owner)
        if name not in self._values:
            here.pop(name, None)
        elif here.get(name) is not self._values[name]:
            here[name] = self._values[name]


def keep_container(value: Any) -> Callable[[], None]:
    """Keep what an object, a container or a closure holds. Returns a function that puts it back."""
    steps: list[Callable[[], object]] = []
    if isinstance(value, dict):
        steps.append(partial(_refill, value, dict(value)))
    elif isinstance(value, list | deque):
        steps.append(partial(_refill, value, list(value)))
    elif isinstance(value, FunctionType):
        cells = [(cell, cell_content(cell)) for cell in value.__closure__ or ()]
        steps.append(partial(_refill_cells, cells))
    slots = [name for cls in type(value).__mro__ for name in slots_of(cls) if name[:2] != "__"]
    if slots:
        kept = {name: getattr(value, name) for name in slots if hasattr(value, name)}
        steps.append(partial(_set_slots, value, slots, kept))
    if hasattr(value, "__dict__"):
        steps.append(partial(_refill, vars(value), dict(vars(value))))

    def put_back() -> None:
        for step in steps:
            step()

    return put_back


def _refill_cells(cells: Iterable[tuple[CellType, Any]]) -> None:
    for cell, content in cells:
        if cell_content(cell) is not content:
            cell.cell_contents = content


def _set_slots(value: Any, slots: Iterable[str], kept: Mapping[str, Any]) -> None:
    for name in slots:
        if name not in kept and hasattr(value, name):
            delattr(value, name)
        elif name in kept and getattr(value, name, None) is not kept[name]:
            setattr(value, name, kept[name])


def keep_contents(value: Any, tensors: KeptTensors) -> Callable[[], Any]:
    """Keep what nested containers hold. Returns a function that puts it back into them."""
    if isinstance(value, torch.Tensor):
        tensors.keep(value)
        return partial(tensors.put_back, value)
    if isinstance(value, dict):
        items = {key: keep_contents(item, tensors) for key, item in value.items()}
        return lambda: _refill(value, {key: put_back() for key, put_back in items.items()})
    if isinstance(value, list | tuple | deque):
        listed = [keep_contents(item, tensors) for item in value]
        return lambda: _refill(value, [put_back() for put_back in listed])
    return lambda: value


def _refill(container: Any, items: Iterable[Any]) -> Any:
    if isinstance(container, dict):
        container.clear()
        container.update(items)
    elif isinstance(container, list):
        container[:] = items
    elif isinstance(container, deque):
        container.clear()
        container.extend(items)
    return container

"""The whole state of a fit, as plain data, and back."""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import torch

from ..events import Callback
from .position import Done
from .randomness import random_state, random_state_differs, set_random_state

if TYPE_CHECKING:
    from .loop import Loop

State = dict[str, Any]


class CheckpointMismatchError(ValueError):
    """A checkpoint is of something else than what it is to be loaded into."""


def state_of(learner: Loop) -> State:
    """Model, gradients, optimizer, callbacks, random states, history and counts of a learner.

    The tensors are the live ones: see `snapshot`.
    """
    opt = learner.opt
    return {
        "model": learner.model.state_dict(),
        "gradients": {
            name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None
        },
        "optimizer": None if opt is None else opt.state_dict(),
        "optimizer_class": _class_of(opt),
        "callbacks": {name: owner.state_dict() for name, owner in stateful(learner)},
        "random": random_state(learner.dls),
        "history": learner.history,
        "n_samples": learner.n_samples,
        "done_in": {training: asdict(done) for training, done in learner.done_in.items()},
    }


def set_state(learner: Loop, state: State) -> None:
    """Go back to a state that `check_state` has found to fit."""
    model = learner.model
    model.load_state_dict(state["model"])
    for name, p in model.named_parameters():
        gradient = state["gradients"].get(name)
        p.grad = None if gradient is None else gradient.to(p.device, copy=True)
    if state["optimizer"] is not None:
        learner.opt.load_state_dict(state["optimizer"])
    learner.history = [dict(row) for row in state["history"]]
    learner.record = learner.history[-1] if learner.history else {}
    learner.n_samples = state["n_samples"]
    learner.done_in = {training: Done(**done) for training, done in state["done_in"].items()}
    learner.done = learner.done_in[learner.training]
    try:
        for name, owner in stateful(learner):
            _load(name, owner, state["callbacks"][name])
    finally:  # last: a callback may draw random numbers for what it fills
        set_random_state(learner.dls, state["random"])


def _load(name: str, owner: Any, state: Any) -> None:
    try:
        owner.load_state_dict(state)
    except Exception as exc:
        exc.add_note(f"raised by {name}.load_state_dict on what the checkpoint has of it")
        raise


def check_state(learner: Loop, state: State) -> None:
    """Raise a CheckpointMismatchError that names what differs, before anything is changed."""
    try:
        differences = [
            *_tensors_differ("the model", learner.model.state_dict(), state["model"]),
            *_gradients_differ(dict(learner.model.named_parameters()), state["gradients"]),
            *_optimizers_differ(learner.opt, state),
            *_callbacks_differ(dict(stateful(learner)), state["callbacks"]),
        ]
        if difference := random_state_differs(learner.dls, state["random"]):
            differences.append(difference)
    except Exception as exc:
        raise CheckpointMismatchError(
            f"the checkpoint is of something else: it is not made of what ours are ({exc!r})"
        ) from exc
    if differences:
        raise CheckpointMismatchError(
            "the checkpoint is of something else: "
            + "; ".join(differences[:5])
            + (f"; and {len(differences) - 5} more" if differences[5:] else "")
        )


def stateful(learner: Loop) -> Iterator[tuple[str, Any]]:
    """What has a state of its own, by name: the callbacks that have a `state_dict`.

    A learner class of one's own that has one is among them.
    """
    owners = [learner, *learner.cbs]
    seen: Counter[str] = Counter()
    for owner in owners:
        if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
            name = type(owner).__qualname__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name} {seen[name]}", owner


def stateless(learner: Loop) -> list[str]:
    """Callbacks without a `state_dict` that hold something which has one, such as a scheduler."""
    found = []
    for cb in learner.cbs:
        if hasattr(cb, "state_dict"):
            continue
        for name, value in vars(cb).items():
            if hasattr(value, "load_state_dict") and not isinstance(value, Callback | type):
                found.append(f"{type(cb).__qualname__}.{name}")
    return found


class Snapshot:
    """A copy of a value on the host, as plain as `torch.load(weights_only=True)` wants it.

    Copies from a device go on beside the host; `wait` for them before they are read there.

    Args:
        value: nested mappings and lists of tensors and plain values.
        where: what it is, for errors.
        over: an older one, whose memory is written over: on the CPU, getting new memory from
            the system is most of what a copy costs.

    Raises:
        TypeError: something can be no part of a checkpoint, with its place.
    """

    def __init__(self, value: Any, where: str = "state", *, over: Snapshot | None = None) -> None:
        self._old = over._copies if over is not None else {}
        self._copies: dict[str, torch.Tensor] = {}
        self._tied: dict[Any, torch.Tensor] = {}  # weights that are one stay so
        self._arriving: dict[torch.device, torch.Event] = {}
        self.value = self._plain(value, where)
        self._old = {}
        for device in {key[-1] for key in self._tied} - {torch.device("cpu")}:
            self._arriving[device] = torch.Event(device)
            self._arriving[device].record(torch.accelerator.current_stream(device))

    def wait(self) -> Any:
        """The value, when all of it has arrived. The host waits for the device here."""
        for event in self._arriving.values():
            event.synchronize()
        return self.value

    def _plain(self, value: Any, where: str) -> Any:
        if torch.nn.parameter.is_lazy(value):
            return None  # it has no values yet
        is_tensor = isinstance(value, torch.Tensor)
        if (
            is_tensor
            and value.layout is torch.strided
            and not value.is_meta
            and not value.is_nested
        ):
            return self._copy(value.detach(), where)
        if isinstance(value, Enum):
            return self._plain(value.value, where)
        if isinstance(value, int) and value.bit_length() > 2039:  # all that torch reads back
            raise TypeError(f"{where} is a number of {value.bit_length()} bits: give a text")
        if value is None or type(value) in _PLAIN:
            return value
        for plain in _NUMBERS_AND_TEXTS:
            if isinstance(value, plain):  # of a class derived from it; numpy has some
                return plain(value)  # type: ignore[arg-type]
        if isinstance(value, Mapping):
            items = {}
            for key, item in value.items():
                place = f"{where}[{key!r}]"
                items[self._plain(key, f"the key {place}")] = self._plain(item, place)
            if isinstance(value, Counter):  # a MultiStepLR has one, and its methods
                return Counter(items)
            if not isinstance(value, OrderedDict):
                return items
            ordered = OrderedDict(items)
            vars(ordered).update(vars(value))  # versions of modules, for load_state_dict
            return ordered
        if isinstance(value, list | tuple | deque):
            listed = [self._plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
            return tuple(listed) if isinstance(value, tuple) else listed
        if isinstance(value, PathLike):
            return fspath(value)
        if hasattr(value, "dtype") and hasattr(value, "tolist") and not is_tensor:  # numpy's
            return torch.as_tensor(value).clone() if value.ndim else value.item()
        raise TypeError(
            f"{where} is {value!r}, which no checkpoint can hold: it is read without running code,"
            " so give tensors, numbers, texts, lists and dicts of them"
        )

    def _copy(self, tensor: torch.Tensor, where: str) -> torch.Tensor:
        key = (
            tensor.data_ptr(),
            tensor.is_conj(),
            tensor.is_neg(),
            *_layout(tensor),
            tensor.device,
        )
        if tensor.numel() and key in self._tied:
            return self._tied[key]
        old = self._old.get(where)
        if old is not None and _layout(old) == _layout(tensor):
            copy = old.copy_(tensor, non_blocking=True)
        elif tensor.device.type == "cpu":
            copy = tensor.clone()
        else:  # into pinned memory, beside the host; the next step cannot overtake it
            copy = tensor.to("cpu", non_blocking=True)
        self._copies[where] = self._tied[key] = copy
        return copy


def _layout(tensor: torch.Tensor) -> Any:
    return tensor.shape, tensor.stride(), tensor.dtype


_NUMBERS_AND_TEXTS = (int, float, complex, str)
_PLAIN = (*_NUMBERS_AND_TEXTS, bool, torch.dtype, torch.device, torch.Size)


def _tensors_differ(what: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() - here.keys()):
        yield f"{what} has no {name}, and had one"
    for name in sorted(here.keys() - there.keys()):
        yield f"{what} has {name}, and had none"
    for name in sorted(here.keys() & there.keys()):
        a, b = here[name], there[name]
        if not isinstance(a, torch.Tensor) or torch.nn.parameter.is_lazy(a):
            continue
        if not isinstance(b, torch.Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            yield f"{name} of {what} is {_shape(a)}, and was {_shape(b)}"


def _gradients_differ(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name, gradient in sorted(there.items()):
        p = here.get(name)
        if p is None:
            yield f"there is no {name}, and it had a gradient"
        elif torch.nn.parameter.is_lazy(p):
            continue
        elif not isinstance(gradient, torch.Tensor) or gradient.shape != p.shape:
            yield f"the gradient of {name} was {_shape(gradient)}, for a parameter {_shape(p)}"


def _shape(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return type(value).__name__
    return f"{tuple(value.shape)} of {str(value.dtype).removeprefix('torch.')}"


def _class_of(opt: Any) -> str:
    return type(getattr(opt, "optimizer", opt)).__name__  # accelerate's holds the one it wraps


def _optimizers_differ(opt: Any, state: State) -> Iterator[str]:
    there = state["optimizer"]
    if (name := _class_of(opt)) != state["optimizer_class"]:
        yield f"the optimizer is {name}, and was {state['optimizer_class']}"
        return
    if opt is None:
        return
    sizes = [len(group["params"]) for group in opt.param_groups]
    other_sizes = [len(group["params"]) for group in there["param_groups"]]
    if sizes != other_sizes:
        yield f"the optimizer has groups of {sizes} parameters, and had {other_sizes}"
        return
    parameters = [p for group in opt.param_groups for p in group["params"]]
    if any(map(torch.nn.parameter.is_lazy, parameters)):
        return  # of sizes not known yet
    most = max(1, sum(p.numel() for p in parameters))  # which LBFGS has in one
    for index, kept in there["state"].items():
        if index >= len(parameters):
            yield f"the optimizer has {len(parameters)} parameters, and had one of number {index}"
        for name, value in kept.items():
            if isinstance(value, torch.Tensor) and value.numel() > most:
                yield f"{name} of the optimizer is {_shape(value)}, larger than all parameters"


def _callbacks_differ(here: Mapping[str, Any], there: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(there.keys() - here.keys()):
        yield f"there is no {name} among the callbacks, and there was one"
    for name in sorted(here.keys() - there.keys()):
        yield f"there is {name} among the callbacks, and there was none"

"""One number of an epoch: a metric, with what it is updated with, or the mean of a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, Protocol

import torch

from ...engine.data.accelerator import has_float64
from ...engine.data.containers import map_tensors
from ...engine.data.inputs import targets_in
from ...engine.data.outputs import described
from ...engine.loop.loss import check_takes_learner
from ...engine.loop.state import LoopState
from ._metric_state import load_state


class AnyMetric(Protocol):
    """A metric of torcheval or torchmetrics, or an object of your own with these methods."""

    def update(self, *args: Any) -> Any: ...

    def compute(self) -> Any: ...

    def reset(self) -> Any: ...


OfLearner = Callable[[Any], Any]
"""A function of the learner: it returns the number of a batch, or the arguments of `update`."""

Entry = AnyMetric | tuple[AnyMetric, OfLearner] | OfLearner
"""What `MetricsCB` measures."""


class Measured:
    """A metric of one epoch.

    Args:
        name: the name of its number.
        entry: a metric, a pair of a metric and a function that returns its arguments, or a function
            that returns a number.

    Raises:
        TypeError: it is none of these.
    """

    def __init__(self, name: str, entry: Any) -> None:
        self.name = name
        self._function: Any = None
        if is_metric(entry):
            self.metric, self._arguments = entry, _preds_and_target
        elif isinstance(entry, tuple) and len(entry) == 2 and is_metric(entry[0]):
            self.metric, self._function = entry
            self._arguments = _chosen
        else:
            self.metric, self._function = SampleMean(), entry
            self._arguments = _number_and_size
        if not is_metric(entry):
            _check_function(name, self._function)
        self._placed = False  # whether the metric is on the device of its arguments

    def reset(self) -> None:
        self.metric.reset()
        self._placed = False

    def update(self, learner: Any) -> None:
        """Update it with the current batch.

        Raises:
            TypeError: there is not one tensor of predictions and one target, or the function does
                not return what it should.
            Exception: an error of the metric or the function, with a note that names it.
        """
        arguments: Any = None
        try:
            arguments = self._arguments(self.name, self._function, learner)
            if not self._placed:
                self._place(arguments)
            self.metric.update(*arguments)
        except Exception as exc:
            note = f"raised by the metric {self.name!r}"
            if arguments is not None:
                note += f", updated with {', '.join(map(described, arguments))}; "
                note += _say_which(self.name, learner)
            exc.add_note(note)
            raise

    def numbers(self) -> dict[str, Any]:
        """What it has measured so far; several numbers are named "name.key".

        The host waits for the device here.
        """
        try:
            value = self.metric.compute()
            if not isinstance(value, Mapping):
                return {self.name: _plain(value)}
            return {f"{self.name}.{key}": _plain(item) for key, item in value.items()}
        except Exception as exc:
            exc.add_note(f"raised by the metric {self.name!r}, in compute()")
            raise

    def load(self, state: Any) -> None:
        """Restore what `state_of` the metric was."""
        load_state(self.metric, state)
        self._placed = False

    def _place(self, arguments: tuple[Any, ...]) -> None:
        tensors: list[torch.Tensor] = []
        map_tensors(arguments, tensors.append)
        to = getattr(self.metric, "to", None)
        if callable(to) and tensors:
            to(tensors[0].device)
        self._placed = True


class SampleMean:
    """The mean of numbers over samples, each number being that of a batch.

    Scalar tensors are summed on their device, in float64 where it has that.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self._sum: Any = 0.0
        self._n = 0

    def update(self, number: Any, n: int) -> None:
        if not n:
            return
        if isinstance(number, torch.Tensor):
            if not isinstance(self._sum, torch.Tensor):
                dtype = torch.float64 if has_float64(number.device) else torch.float32
                self._sum = torch.full((), self._sum, dtype=dtype, device=number.device)
            self._sum = torch.add(self._sum, number, alpha=n)
        else:
            self._sum = self._sum + number * n
        self._n += n

    def to(self, device: torch.device) -> None:
        """After a state was loaded, which is on the CPU."""
        if isinstance(self._sum, torch.Tensor):
            self._sum = self._sum.to(device)

    def compute(self) -> Any:
        return self._sum / self._n if self._n else float("nan")

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum, "n": self._n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sum, self._n = state["sum"], state["n"]


def is_metric(entry: Any) -> bool:
    """Whether it is an object with the three methods of a metric; their class is not."""
    methods = ("update", "compute", "reset")
    return not isinstance(entry, type) and all(callable(getattr(entry, m, None)) for m in methods)


def name_of(entry: Any) -> str:
    """The name of a metric that was given none: that of its class or of the function."""
    metric = entry[0] if isinstance(entry, tuple) and entry else entry
    name = type(metric).__name__ if is_metric(metric) else getattr(metric, "__name__", None)
    if name == "<lambda>":
        raise TypeError("a lambda has no name: pass it as yourname=lambda learner: ...")
    if name is None:
        raise TypeError(
            f"MetricsCB({entry!r}): this is not a metric; pass metrics one by one, as"
            " MetricsCB(metric, yourname=metric), or those of a list or dict as"
            " MetricsCB(*metrics), MetricsCB(**metrics)"
        )
    return str(name)


def _preds_and_target(name: str, function: Any, learner: Any) -> tuple[Any, ...]:
    preds, batch = learner.preds, learner.batch
    is_usual = type(batch) is tuple and len(batch) == 2 and type(preds) is torch.Tensor
    if is_usual and learner.n_inp is None:  # which is to be quick
        return preds.detach(), batch[1]
    try:
        targets = targets_in(learner)
    except TypeError:
        targets = ()
    if isinstance(preds, torch.Tensor) and len(targets) == 1:
        return preds.detach(), targets[0]
    what = f"the batch has {len(targets)} targets"
    if not isinstance(preds, torch.Tensor):
        what = f"learner.preds is {described(preds)}"
    raise TypeError(
        f"the metric {name!r} is updated with a tensor of predictions and one target, but"
        f" {what}: {_say_which(name, learner)}"
    )


def _chosen(name: str, function: Any, learner: Any) -> tuple[Any, ...]:
    arguments = function(learner)
    if not isinstance(arguments, tuple):
        raise TypeError(
            f"the function of the metric {name!r} returned {described(arguments)}: return"
            f" the arguments of its update() in a tuple, such as {_such_as(learner)}"
        )
    return tuple(map_tensors(argument, torch.Tensor.detach) for argument in arguments)


def _number_and_size(name: str, function: Any, learner: LoopState) -> tuple[Any, int]:
    number = function(learner)
    if isinstance(number, torch.Tensor) and number.numel() == 1:
        number = number.detach().reshape(())
    elif not isinstance(number, Real):
        raise TypeError(
            f"the function of the metric {name!r} returned {described(number)}: return the"
            " number of the current batch, a mean over its samples, as a number or a scalar"
            f" tensor; or {_say_which(name, learner)}"
        )
    return number, int(learner.batch_size(learner.batch))


def _say_which(name: str, learner: Any) -> str:
    return (
        f"say what a metric is to be updated with: MetricsCB({name}=(metric, lambda learner:"
        f" {_such_as(learner)}))"
    )


def _such_as(learner: Any) -> str:
    """How the arguments of a metric may be written for the current batch."""
    preds, batch = "learner.preds", learner.batch
    if isinstance(learner.preds, Mapping):
        preds += f"[{list(learner.preds)[-1]!r}]"
    elif not isinstance(learner.preds, torch.Tensor):
        preds += "[0]"
    if isinstance(batch, Mapping):
        return f"({preds}, learner.batch[{list(batch)[-1]!r}])"
    return f"({preds}, learner.batch[-1])"


def _check_function(name: str, function: Any) -> None:
    """Raise unless it can be called with the learner alone."""
    if isinstance(function, type) or not callable(function) or hasattr(function, "forward"):
        raise TypeError(
            f"{name}={function!r} is not a metric: pass an instance with update(), compute() and"
            " reset(), such as those of torcheval and torchmetrics, a pair of it and a function of"
            " the learner, or a function of the learner that returns a number"
        )
    check_takes_learner(name, function)


def _plain(value: Any) -> Any:
    """Numbers, and lists of them, of what may be tensors or arrays."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    to_list = getattr(value, "tolist", None)
    return to_list() if callable(to_list) else value

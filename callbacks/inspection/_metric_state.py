"""What a metric has measured so far in an epoch, as data that a checkpoint can hold."""

from __future__ import annotations

import copy
import sys
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

from ._torcheval import Metric

_POSITION = "next_inserted"
"""The position in a window, which is not in torcheval's state_dict."""


def state_of(metric: Any) -> Any:
    """The state of a metric; None if it cannot be saved.

    It is that of its `state_dict`, if it has one. Otherwise it is its attributes, if all of them
    are numbers, strings, tensors, or containers of these.
    """
    if isinstance(metric, Metric):
        state = metric.state_dict()
        position = getattr(metric, _POSITION, None)
        return state if position is None else {**state, _POSITION: position}
    if modules := _of_torchmetrics(metric):
        return {
            name: {
                "states": copy.deepcopy(module.metric_state),
                "updates": module.update_count,
            }
            for name, module in modules.items()
        }
    if hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict"):
        return copy.deepcopy(metric.state_dict())
    attributes = getattr(metric, "__dict__", None)
    return copy.deepcopy(attributes) if _is_data(attributes) else None


def load_state(metric: Any, state: Any) -> None:
    """Restore what `state_of` returned."""
    if state is None:
        return
    if isinstance(metric, Metric):
        _load_torcheval(metric, dict(state))
    elif modules := _of_torchmetrics(metric):
        for name, module in modules.items():
            for attribute, value in state[name]["states"].items():
                setattr(module, attribute, copy.deepcopy(value))
            module._update_count = state[name]["updates"]
            module._computed = None
    elif hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict"):
        metric.load_state_dict(copy.deepcopy(state))
    else:
        vars(metric).update(copy.deepcopy(state))


def _load_torcheval(metric: Any, state: dict[str, Any]) -> None:
    position = state.pop(_POSITION, None)
    made_on_demand = {  # torcheval restores plain dicts, but needs defaultdicts
        key: value.default_factory
        for key, value in vars(metric).items()
        if isinstance(value, defaultdict)
    }
    metric.load_state_dict(state)
    for key, factory in made_on_demand.items():
        setattr(metric, key, defaultdict(factory, getattr(metric, key)))
    if position is not None:
        setattr(metric, _POSITION, position)


def _of_torchmetrics(metric: Any) -> dict[str, Any]:
    """The metrics of torchmetrics that it consists of, by name; empty if it is none.

    Their `state_dict` is empty by default.
    """
    torchmetrics = sys.modules.get("torchmetrics")  # whoever has made one has imported it
    kinds = () if torchmetrics is None else (torchmetrics.Metric, torchmetrics.MetricCollection)
    if not isinstance(metric, kinds):
        return {}
    if isinstance(metric, torchmetrics.MetricCollection):  # type: ignore[union-attr]
        list(metric.values())  # hands the state that several share to each
    return {
        name: module
        for name, module in metric.named_modules()
        if isinstance(module, torchmetrics.Metric)  # type: ignore[union-attr]
    }


def _is_data(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(map(_is_data, _items(value)))
    if isinstance(value, list | tuple):
        return type(value) in (list, tuple) and all(map(_is_data, value))
    return value is None or isinstance(value, bool | int | float | complex | str | torch.Tensor)


def _items(value: dict[Any, Any]) -> Iterator[Any]:
    yield from value.keys()
    yield from value.values()

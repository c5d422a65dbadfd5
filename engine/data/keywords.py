"""The keywords of a model: the parameters of its `forward`."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any, NamedTuple

from torch import nn


class Keywords(NamedTuple):
    """The keywords that a model can be called with.

    Attributes:
        names: all of them, in order.
        required: those without a default.
        takes_all: whether it takes any other, too.
    """

    names: tuple[str, ...]
    required: tuple[str, ...]
    takes_all: bool


def keywords_of(model: nn.Module) -> Keywords:
    """The keywords of a model or, of a wrapper that takes any, of the model that it wraps.

    Such wrappers are those of torch.compile and DistributedDataParallel.
    """
    while True:
        forward = model.forward
        function = getattr(forward, "__func__", None)
        is_of_class = function is not None and function is getattr(type(model), "forward", None)
        found = _of_method(function) if is_of_class else _of_function(forward)
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not found.takes_all or not isinstance(inner, nn.Module):
            return found
        model = inner


@lru_cache(maxsize=64)  # reading a signature takes as long as a small model
def _of_method(function: Any) -> Keywords:
    return _of_function(function, skip=1)


def _of_function(function: Any, skip: int = 0) -> Keywords:
    try:
        parameters = list(inspect.signature(function).parameters.values())[skip:]
    except (TypeError, ValueError):  # it is not written in Python
        return Keywords((), (), True)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return Keywords(
        tuple(p.name for p in named),
        tuple(p.name for p in named if p.default is p.empty),
        any(p.kind is p.VAR_KEYWORD for p in parameters),
    )

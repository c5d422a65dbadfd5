"""Optimizers that want a closure: which they are, and what cannot work with them."""

from __future__ import annotations

import inspect
from typing import Any

from ..loop.optimizers import Optimizers, class_of
from .fittable import Fittable


def wants_closure(opt: Any) -> bool:
    """Whether the `step` of an optimizer cannot be called without a closure, as that of LBFGS."""
    step = getattr(class_of(opt), "step", None)
    try:
        parameters = list(inspect.signature(step).parameters.values())[1:]  # type: ignore[arg-type]
    except (TypeError, ValueError):  # it is not written in Python
        return False
    first = next(iter(parameters), None)
    return first is not None and first.name == "closure" and first.default is first.empty


def check_closure(learner: Fittable) -> bool:
    """Whether the optimizer of a learner gets a closure.

    Raises:
        ValueError: it wants one, and a callback or the learner cannot work with that; or it is one
            of several optimizers.
    """
    opt = learner.opt
    if isinstance(opt, Optimizers):
        for name, inner in opt.items():
            if wants_closure(inner):
                raise ValueError(
                    f"the optimizer {name!r} is {class_of(inner).__name__}, which wants a closure,"
                    " and cannot be one of several: give it alone, as opt or by opt_func"
                )
        return False
    if not wants_closure(opt):
        return False
    for owner in (learner, *learner.cbs):
        if (why := getattr(owner, "not_with_closures", None)) is not None:
            raise ValueError(
                f"{type(owner).__name__} cannot work with {class_of(opt).__name__}, which computes"
                f" the loss and its gradients several times per step: {why}"
            )
    return True

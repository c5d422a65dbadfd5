"""The optimizer of a fit, and errors that say how to give one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn, optim

from ..loop.optimizers import Optimizers, is_optimizer
from .fittable import Fittable
from .plan import check_lr


def make_optimizer(learner: Fittable, lr: float | torch.Tensor) -> Any:
    """Call the learner's `opt_func`.

    Raises:
        ValueError: `lr` is negative.
        TypeError: `opt_func` is not a function, or what it returned is not an optimizer.
        Exception: any error of `opt_func`, with a note.
    """
    check_lr(lr)
    opt_func = check_opt_func(learner.opt_func)
    assert opt_func is not None
    try:
        opt = opt_func(learner.model.parameters(), copy_lr(lr))
    except Exception as exc:
        exc.add_note(
            f"raised by opt_func={opt_func!r}, called as opt_func(model.parameters(), {lr!r})"
            + _lr_hint(exc)
        )
        raise
    if not isinstance(opt, Mapping) and not is_optimizer(opt):
        raise TypeError(f"opt_func={opt_func!r} returned {_described(opt)}")
    return as_one(opt, learner.model)


def as_one(opt: Any, model: nn.Module) -> Any:
    """The optimizer itself, or the `Optimizers` of a mapping.

    Raises:
        TypeError, ValueError: the mapping cannot be one; see `Optimizers`.
    """
    if not isinstance(opt, Mapping) or isinstance(opt, Optimizers):
        return opt
    return Optimizers(opt, model.named_parameters())


def copy_lr(lr: Any) -> Any:
    """A copy of a learning rate that is a tensor: schedulers change the one in the optimizer."""
    return lr.clone() if isinstance(lr, torch.Tensor) else lr


@contextmanager
def temporary_lr(opt: Any, lr: Any) -> Iterator[None]:
    """Give an optimizer another learning rate; restore its own afterwards.

    The first group gets `lr`, and the others in proportion: groups keep the ratio of their rates.
    """
    own = [group["lr"] for group in opt.param_groups]
    for group, own_lr in zip(opt.param_groups, own, strict=True):
        ratio = float(own_lr) / float(own[0]) if own[0] else 1.0
        group["lr"] = copy_lr(lr) if ratio == 1 else lr * ratio
    try:
        yield
    finally:
        # Not those of before: `load_state_dict` makes new groups, and receivers may add some.
        for group, own_lr in zip(opt.param_groups, own, strict=False):
            group["lr"] = own_lr


def check_opt(opt: Any, opt_func: Any, model: nn.Module) -> tuple[Any, Any]:
    """Return the optimizer and the `opt_func` of a learner that was given these.

    Raises:
        TypeError: both are given, or `opt` is neither an optimizer nor a mapping of them.
        ValueError: the mapping cannot be one optimizer; see `Optimizers`.
    """
    if opt is None:
        return None, check_opt_func(opt_func)
    if opt_func is not None and opt_func is not optim.SGD:  # SGD is the default
        raise TypeError(
            f"opt={opt!r} and opt_func={opt_func!r}: give opt, an optimizer that is kept over all"
            " fits, or opt_func, which makes one for every fit"
        )
    if isinstance(opt, Mapping) or is_optimizer(opt):
        return as_one(opt, model), None
    if callable(opt):
        name = getattr(opt, "__name__", repr(opt))
        raise TypeError(
            f"opt={name} is not an optimizer, but makes one: write opt_func={name}, or"
            f" opt={name}(model.parameters(), ...) to keep one over all fits"
        )
    raise TypeError(f"opt is {_described(opt)}")


def check_opt_func(opt_func: Any) -> Callable[..., Any] | None:
    """Return `opt_func` if it is a function, or None.

    Raises:
        TypeError: it is an optimizer, or something else that cannot be called.
    """
    if opt_func is None or callable(opt_func):
        return opt_func  # type: ignore[no-any-return]
    name = type(opt_func).__name__
    if is_optimizer(opt_func) or isinstance(opt_func, Mapping):
        raise TypeError(
            f"opt_func is an optimizer, {name}: write opt=... to keep it over all fits, or give the"
            f" function that makes one for every fit, opt_func={name} or"
            f" opt_func=lambda params, lr: {name}(params, lr, ...)"
            if is_optimizer(opt_func)
            else f"opt_func={opt_func!r} is a mapping: write opt=... to keep its optimizers over"
            " all fits, or opt_func=lambda params, lr: {'G': ..., 'D': ...}"
        )
    known = isinstance(opt_func, str) and isinstance(getattr(torch.optim, opt_func, None), type)
    raise TypeError(
        f"opt_func={opt_func!r} cannot be called: give a function of (params, lr) that returns an"
        f" optimizer, such as torch.optim.{opt_func if known else 'SGD'}"
    )


def _described(opt: Any) -> str:
    """What was given instead of an optimizer, and what to give."""
    name = type(opt).__name__
    if isinstance(opt, tuple | list) and opt:
        parts = ", ".join(type(item).__name__ for item in opt)
        what = f"a {name} of {parts}, which is not an optimizer: "
        if all(map(is_optimizer, opt)):
            return what + "name several in a mapping, such as {'G': ..., 'D': ...}"
        if any(map(is_optimizer, opt)):
            return what + (
                "give one. A learning-rate scheduler goes into the callbacks:"
                " cbs=SchedulerCB(lambda opt: ...)"
            )
    hint = ": add a return statement" if opt is None else ""
    return f"{opt!r}, which is not an optimizer with step() and param_groups{hint}"


def _lr_hint(exc: Exception) -> str:
    """What to do if `opt_func` has a learning rate of its own, such as `partial(SGD, lr=0.1)`."""
    if isinstance(exc, TypeError) and "multiple values for argument 'lr'" in str(exc):
        return "; give the learning rate to the learner instead: lr=..."
    return ""

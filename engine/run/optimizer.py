"""The optimizer of a fit, and errors that say how to give one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

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
    if not _is_optimizer(opt):
        raise TypeError(f"opt_func={opt_func!r} returned {_described(opt)}")
    return opt


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


def check_opt_func(opt_func: Any) -> Callable[..., Any] | None:
    """Return `opt_func` if it is a function, or None.

    Raises:
        TypeError: it is an optimizer, or something else that cannot be called.
    """
    if opt_func is None or callable(opt_func):
        return opt_func  # type: ignore[no-any-return]
    name = type(opt_func).__name__
    if _is_optimizer(opt_func):
        raise TypeError(
            f"opt_func is an optimizer, {name}: give the function that makes one for every fit,"
            f" opt_func={name} or opt_func=lambda params, lr: {name}(params, lr, ...). To keep one"
            " optimizer over all fits: opt_func=lambda params, lr: opt"
        )
    known = isinstance(opt_func, str) and isinstance(getattr(torch.optim, opt_func, None), type)
    raise TypeError(
        f"opt_func={opt_func!r} cannot be called: give a function of (params, lr) that returns an"
        f" optimizer, such as torch.optim.{opt_func if known else 'SGD'}"
    )


def _is_optimizer(opt: Any) -> bool:
    return callable(getattr(opt, "step", None)) and hasattr(opt, "param_groups")


def _described(opt: Any) -> str:
    """What `opt_func` returned instead of an optimizer, and what to return."""
    name = type(opt).__name__
    if isinstance(opt, tuple | list | dict) and opt:
        items = list(opt.values() if isinstance(opt, dict) else opt)
        parts = ", ".join(type(item).__name__ for item in items)
        what = f"a {name} of {parts}, which is not an optimizer: return one. "
        if all(map(_is_optimizer, items)):
            return what + (
                "Several are joined by an object with step(), zero_grad() and param_groups that"
                " calls them all: see 'Two optimizers' in docs/guides/any-loop.md"
            )
        if any(map(_is_optimizer, items)):
            return what + (
                "A learning-rate scheduler goes into the callbacks:"
                " cbs=SchedulerCB(lambda opt: ...)"
            )
    hint = ": add a return statement" if opt is None else ""
    return f"{opt!r}, which is not an optimizer with step() and param_groups{hint}"


def _lr_hint(exc: Exception) -> str:
    """What to do if `opt_func` has a learning rate of its own, such as `partial(SGD, lr=0.1)`."""
    if isinstance(exc, TypeError) and "multiple values for argument 'lr'" in str(exc):
        return "; give the learning rate to the learner instead: lr=..."
    return ""

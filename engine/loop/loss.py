"""Checks of the loss, whose errors say what to change."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

import torch

Weight = Callable[[Any], Any]
"""A function of the learner that returns the weight of the current batch."""


def check_scalar(loss: Any) -> Any:
    """Return `loss` if it is a tensor with one element.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not a scalar.
    """
    if not isinstance(loss, torch.Tensor):
        raise TypeError(f"the loss must be a tensor: {loss!r} is a {type(loss).__qualname__}")
    if loss.ndim and loss.numel() != 1:
        raise ValueError(
            f"the loss must be a scalar: its shape is {tuple(loss.shape)}; reduce it, with"
            " .mean() or the loss function's reduction='mean'"
        )
    return loss


def check_weight(weight: Weight | None) -> Weight | None:
    """Return `weight` if it is a function that can be called with the learner alone, or None.

    Raises:
        TypeError: it is not.
    """
    if weight is None:
        return None
    if not callable(weight):
        raise TypeError(f"weight={weight!r}: give a function of the learner")
    check_takes_learner("weight", weight)
    return weight


def check_takes_learner(name: str, function: Callable[..., Any]) -> None:
    """Raise a TypeError unless a function can be called with the learner alone."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # it is not written in Python
        return
    try:
        signature.bind(None)
    except TypeError:
        call = getattr(function, "__name__", "function").replace("<lambda>", "function")
        raise TypeError(
            f"{name}={function!r} is called with the learner alone, but takes other arguments:"
            f" write lambda learner: {call}(learner.preds, learner.batch[-1])"
        ) from None


def weight_of(weight: Weight, learner: Any) -> Any:
    """The weight of the current batch: a number, or a scalar tensor without a gradient.

    Raises:
        TypeError, ValueError: it is neither, or negative.
    """
    value = weight(learner)
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().reshape(())
    if not isinstance(value, Real) or isinstance(value, bool):
        shape = f" of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
        raise TypeError(
            f"weight={weight!r} returned a {type(value).__qualname__}{shape}: return a number, or a"
            " tensor with one, such as (learner.batch[-1] != -100).sum()"
        )
    if value < 0:
        raise ValueError(f"weight={weight!r} returned {value!r}: a weight is not negative")
    return value


def loss_in(preds: Any) -> Any:
    """The loss that a model has returned: the item "loss" of a mapping, or an attribute.

    Raises:
        TypeError: there is none.
    """
    loss = preds.get("loss") if isinstance(preds, Mapping) else getattr(preds, "loss", None)
    if loss is None:
        has = f" of {', '.join(map(repr, preds))}" if isinstance(preds, Mapping) else ""
        raise TypeError(
            "with loss_func=None the loss is taken from the model's output, as preds.loss or"
            f" preds['loss'], but that is a {type(preds).__qualname__}{has} without one: give a"
            " loss_func, or have the model return its loss; those of transformers do if they get"
            " 'labels' (of a batch that is a tuple, if n_inp counts them)"
        )
    return loss


def check_loss(loss: Any) -> Any:
    """Return `loss` if `backward()` can be called on it.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not a scalar, or does not require grad.
    """
    check_scalar(loss)
    if not loss.requires_grad:
        raise ValueError(
            "the loss does not require grad: no parameter of the model took part in it, all are"
            " frozen, or it was detached or computed under torch.no_grad()"
        )
    return loss

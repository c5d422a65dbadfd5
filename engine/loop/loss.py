"""Checks of the loss, whose errors say what to change."""

from __future__ import annotations

from typing import Any

import torch


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

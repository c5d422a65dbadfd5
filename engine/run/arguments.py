"""Checks of the arguments of a learner, whose errors say what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_OPTIMIZER = "opt_func=torch.optim.AdamW, or opt_func=lambda params, lr: opt for one that exists"

_INSTEAD = {
    **dict.fromkeys(("opt", "optim", "optimizer"), _OPTIMIZER),
    "n_inp": "TrainLearner(..., n_inp=...), or cbs=TrainCB(n_inp=...)",
    **dict.fromkeys(("callback", "callbacks"), "cbs=..."),
    **dict.fromkeys(("loss", "loss_fn", "criterion"), "loss_func=..."),
    **dict.fromkeys(("learning_rate",), "lr=..."),
    **dict.fromkeys(("metric", "metrics"), "cbs=MetricsCB(accuracy=...)"),
    **dict.fromkeys(("device", "accelerator"), "cbs=DeviceCB(...)"),
    **dict.fromkeys(("scheduler", "lr_scheduler"), "cbs=SchedulerCB(lambda opt: ...)"),
    **dict.fromkeys(
        ("train", "valid", "train_dl", "valid_dl", "data", "dataloaders", "loaders"),
        "dls=DataLoaders(train, valid)",
    ),
    **dict.fromkeys(("epochs", "n_epochs", "max_epochs"), "learner.fit(n_epochs) later"),
}


def check_no_unknown(name: str, unknown: Mapping[str, object]) -> None:
    """Raise the TypeError of Python for an unknown keyword argument, with what to write instead.

    Args:
        name: the class that was called.
        unknown: its keyword arguments that it does not have.
    """
    for keyword in unknown:
        hint = f": write {_INSTEAD[keyword]}" if keyword in _INSTEAD else ""
        raise TypeError(f"{name}() got an unexpected keyword argument {keyword!r}{hint}")


def check_model(model: Any) -> Any:
    """Return `model` if it is a module.

    Raises:
        TypeError: it is not: it is a class, or a function.
    """
    if isinstance(model, nn.Module):
        return model
    hint = "is a class: pass an instance" if isinstance(model, type) else "is not a torch.nn.Module"
    raise TypeError(f"model={model!r} {hint}")


def check_loss_func(loss_func: Any) -> Any:
    """Return `loss_func` if it can be called with predictions and targets, or is None.

    Raises:
        TypeError: it cannot be called, or is the class of a loss.
    """
    if isinstance(loss_func, type) and issubclass(loss_func, nn.Module):
        name = loss_func.__name__
        raise TypeError(f"loss_func={name} is a class: pass an instance, {name}()")
    if loss_func is None or callable(loss_func):
        return loss_func
    raise TypeError(
        f"loss_func={loss_func!r} cannot be called: give a function of (preds, targets), such as"
        " torch.nn.functional.cross_entropy"
    )

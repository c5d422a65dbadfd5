"""Checks of the arguments of a learner, whose errors say what to write instead."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_OPTIMIZER = "opt=... for an optimizer that exists, or opt_func=torch.optim.AdamW to make one"

_OF_A_LEARNER = {
    **dict.fromkeys(("optim", "optimizer", "optimizers"), _OPTIMIZER),
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


OF_A_FIT = {
    **dict.fromkeys(("epochs", "max_epochs", "num_epochs", "n_epoch"), "n_epochs=..."),
    **dict.fromkeys(
        ("steps", "n_steps", "num_steps", "total_steps", "max_iters", "num_training_steps"),
        "max_steps=...",
    ),
    **dict.fromkeys(("steps_per_epoch", "limit_train_batches"), "epoch_length=..."),
    **dict.fromkeys(("validation_steps", "limit_val_batches"), "valid_length=..."),
    **dict.fromkeys(
        ("val_check_interval", "validation_freq", "eval_steps"),
        "cbs=ValidateCB(loader, every_steps=...)",
    ),
    **dict.fromkeys(("callback", "callbacks"), "cbs=..."),
    **dict.fromkeys(("learning_rate", "max_lr", "lr_max"), "lr=..."),
    **dict.fromkeys(("ckpt_path", "checkpoint", "resume_from_checkpoint"), "resume=..."),
    **dict.fromkeys(
        ("train_dl", "valid_dl", "dl", "dls", "data", "train_loader", "val_loader"),
        "dls=DataLoaders(train, valid) for the learner",
    ),
}
"""What to write for keywords of other libraries, in `fit` and `run`."""

OF_LR_FIND = {
    **dict.fromkeys(("gamma", "factor", "mult", "lr_factor"), "lr_mult=..."),
    **dict.fromkeys(("min_lr", "lr_min", "start"), "start_lr=..."),
    **dict.fromkeys(("max_lr", "lr_max", "stop", "end"), "end_lr=..."),
    **dict.fromkeys(
        ("num_it", "num_iter", "num_training", "n_steps", "max_steps"),
        "lr_mult=... and end_lr=..., which say how many steps it takes",
    ),
}
"""What to write for keywords of other libraries, in `lr_find`."""


def check_no_unknown(
    name: str, unknown: Mapping[str, object], instead: Mapping[str, str] = _OF_A_LEARNER
) -> None:
    """Raise the TypeError of Python for an unknown keyword argument, with what to write instead.

    Args:
        name: the class or method that was called.
        unknown: its keyword arguments that it does not have.
        instead: what to write, by keyword.
    """
    for keyword in unknown:
        hint = f": write {instead[keyword]}" if keyword in instead else ""
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

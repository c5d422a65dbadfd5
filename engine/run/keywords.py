"""Keyword arguments that a learner does not have, and what to write instead."""

from __future__ import annotations

from collections.abc import Mapping

_OPTIMIZER = "opt_func=torch.optim.AdamW, or opt_func=lambda params, lr: opt for one that exists"

_INSTEAD = {
    **dict.fromkeys(("opt", "optim", "optimizer"), _OPTIMIZER),
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

"""The attributes and methods that receivers of events may use on every learner."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

Purpose = Literal["fit", "validate", "predict", "lr_find"]


class ProgressLike(Protocol):
    """How much of a fit is completed, in training or in validation."""

    epochs: int
    batches: int
    steps: int


class LearnerLike(Protocol):
    """The type of `event.learner`: a learner while it fits.

    It lists what the engine provides. For an attribute that your own learner class adds, narrow
    the type first: `assert isinstance(event.learner, MyLearner)`.

    Attributes:
        model, dls, loss_func, lr, opt_func: as given to the learner; the first two may be replaced
            for the length of a fit.
        opt: the optimizer of the last fit that trained, None before the first.
        dl: the loader of the current epoch.
        n_inp: what of a batch the model takes; see `TrainLearner`.
        batch, preds, loss: those of the current batch; receivers may replace them.
        n_steps: the number of optimizer steps that the fit will take if none is skipped; None if
            that is not known.
        max_steps, epoch_length: as given to `fit`.
        epoch, n_epochs, iter, n_iter, n_samples, training: the current position; see `BatchEvent`.
        trains, validates: whether the fit has training epochs, and validation epochs.
        purpose: "fit"; or "validate", "predict" or "lr_find" in a run of `validate`, `get_preds`
            or `lr_find`.
        run_id: identifies the fit.
        record: the values recorded in the current epoch, to which receivers may add.
        history: the records of the epochs of this fit so far.
        done: the progress in the current phase.
        outer_continues: for Cleanup* receivers: whether this scope was completed, or left by its
            own cancel, so that the scope around it continues.
        graceful_stop_due: for Cleanup* receivers: whether a graceful `stop` takes effect when they
            have returned.
        wants_closure: whether the step of the optimizer is given a closure.
        in_extra_validation: whether the current epoch is that of a `ValidateCB`, within another.
        updated: whether `update` has been called in this batch.
        updating: in `update(loss, "D")`, the name of its optimizer; otherwise None.
        training_thread: the identifier of the thread that runs the fit.
        metrics: the `MetricsCB` of the fit, which sets it.
    """

    model: nn.Module
    dls: Any
    dl: Any
    loss_func: Any
    n_inp: Any
    lr: float
    opt_func: Any
    opt: Any
    batch: Any
    preds: Any
    loss: Any
    epoch: int
    n_epochs: int | None
    max_steps: int | None
    epoch_length: int | None
    n_steps: int | None
    iter: int
    n_iter: int | None
    n_samples: int
    all_read: bool
    training: bool
    trains: bool
    validates: bool
    purpose: Purpose
    run_id: str
    record: dict[str, Any]
    history: list[dict[str, Any]]
    outer_continues: bool
    graceful_stop_due: bool
    training_thread: int | None
    wants_closure: bool
    in_extra_validation: bool
    updated: bool | None
    updating: str | None
    metrics: Any

    @property
    def done(self) -> ProgressLike: ...

    @property
    def progress(self) -> Mapping[bool, ProgressLike]: ...

    @property
    def result(self) -> Any: ...

    @property
    def resumed_from(self) -> Path | None: ...

    @property
    def cleanup_timeout(self) -> float: ...

    @property
    def drain_timeout(self) -> float: ...

    @property
    def cbs(self) -> tuple[Any, ...]: ...

    @property
    def fitting(self) -> bool: ...

    @property
    def stopping(self) -> bool: ...

    def add_cbs(self, cbs: Any) -> tuple[Any, ...]: ...

    def remove_cbs(self, cbs: Any) -> None: ...

    def emit(self, event_type: type[Any], *extra: Any) -> None: ...

    def perform(self, action: type[Any], following: tuple[Any, ...] | None = None) -> None: ...

    def one_batch(self) -> None: ...

    def one_step(self) -> None: ...

    def update(self, loss: torch.Tensor, opt: str | None = None) -> None: ...

    def closure(self) -> torch.Tensor: ...

    def stepping(self, opt: str | None) -> Any: ...

    def batch_size(self, batch: Any) -> int: ...

    def scope(self, cancel: type[Any], cleanup: type[Any]) -> Any: ...

    def stop(
        self,
        scope: Literal["fit", "epoch", "batch"] = "fit",
        reason: str | None = None,
        *,
        graceful: bool = False,
        who: str = "Learner.stop",
    ) -> bool: ...

    @property
    def on(self) -> Callable[..., Any]: ...

    @property
    def subscribe(self) -> Callable[..., Any]: ...

    @property
    def events(self) -> Callable[..., Any]: ...

    @property
    def observe(self) -> Callable[..., Any]: ...

    @property
    def explain(self) -> Callable[..., str]: ...

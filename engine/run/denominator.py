"""Whether the loss of a batch is the mean over its samples, or over something else.

The loss of an epoch is the mean of the losses of its batches, each with the weight of its samples.
That is the loss of all samples only if the loss of a batch is a mean over its samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from ...events.learner import LearnerLike
from .. import log
from ..data.inputs import targets_in
from ..loop.state import LoopState

_UNKNOWN = object()
_ALL, _EVERY = 64, 16
"""How many batches of an epoch are looked at, and how often after them: each costs a kernel."""


def setting_of(loss_func: Any, name: str) -> Any:
    """A setting of a loss function, `_UNKNOWN` if it has none of that name.

    That of a module is its attribute, that of a function the default of its parameter, which a
    `partial` may set.
    """
    with suppress(Exception):  # not every callable has a signature, and few such a parameter
        return inspect.signature(loss_func).parameters[name].default
    while isinstance(loss_func, partial):
        loss_func = loss_func.func
    return getattr(getattr(loss_func, "__self__", loss_func), name, _UNKNOWN)


def returns_sum(loss_func: Any) -> bool:
    """Whether a loss function returns the sum over the samples of a batch, by its `reduction`.

    All others are taken to return the mean.
    """
    reduction = setting_of(loss_func, "reduction")
    return isinstance(reduction, str) and reduction == "sum"


class DenominatorCheck:
    """Finds out in one fit whether losses are means over something other than samples.

    This is so where a cross entropy has weights of classes or ignores targets, and where the number
    of targets of a sample differs between batches. A learner that counts its batches in its own
    way (`batch_size`) is not checked. It looks at the first batches of an epoch, and at some of the
    others.

    Attributes:
        lowest: the lowest class among the targets of the epoch so far, where one that is ignored
            would be it; a scalar, which is read with the loss.
    """

    def __init__(self, learner: LearnerLike) -> None:
        loss_func = learner.loss_func
        self._run_id = learner.run_id
        counts = getattr(type(learner), "batch_size", None) is LoopState.batch_size
        self._active = counts and not returns_sum(loss_func)
        ignored = setting_of(loss_func, "ignore_index")
        if ignored is _UNKNOWN:  # other losses of torch ignore nothing
            ignored = -100 if setting_of(loss_func, "reduction") is _UNKNOWN else None
            self._weighs_classes = False
        else:
            self._weighs_classes = setting_of(loss_func, "weight") not in (_UNKNOWN, None)
        self._ignored = ignored if type(ignored) is int else None
        self._any_shape = isinstance(loss_func, nn.CTCLoss)
        self._reason: str | None = None
        self.begin_epoch()

    def begin_epoch(self) -> None:
        self.lowest: torch.Tensor | None = None
        self._n_batches = 0
        self._shape: Any = None

    def looks_at_next(self) -> bool:
        """Count a batch; return whether to look at it."""
        self._n_batches = n = self._n_batches + 1
        return self._active and self._reason is None and (n <= _ALL or not n % _EVERY)

    def look(self, learner: LearnerLike) -> None:
        """Look at the targets of the current batch. It does not cause a device sync."""
        targets = _first_target(learner)
        if targets is None:
            self._active = False
            return
        shape = targets.shape[1:]
        if shape != self._shape:
            if self._shape is not None and not self._any_shape:
                self._reason = (
                    "the number of targets per sample differs between batches"
                    f" ({tuple(self._shape)} and {tuple(shape)}), and a mean over targets is not"
                    " one over samples"
                )
            self._shape = shape
        if targets.dtype.is_floating_point or not targets.numel():
            return
        if self._weighs_classes:
            self._reason = "loss_func has weights of classes, by whose sum it divides"
        elif self._ignored is not None:
            if self._ignored >= 0:
                targets = torch.where(targets == self._ignored, self._ignored, self._ignored + 1)
            low = targets.min()
            self.lowest = low if self.lowest is None else torch.minimum(self.lowest, low)

    def end_epoch(self, lowest: float | None) -> None:
        """Log, once per fit, that the loss of the epoch is a guess, if it is one.

        Args:
            lowest: the number that `lowest` is.
        """
        if lowest is not None and lowest == self._ignored:
            self._reason = f"targets of {self._ignored} are ignored, and not counted, by the loss"
        if self._reason is None or self._n_batches < 2 or not self._active:
            return
        self._active = False
        log.warning(
            "loss_is_a_guess",
            run_id=self._run_id,
            reason=self._reason,
            hint="the loss of an epoch is the mean over its samples; MetricsCB(weight=lambda"
            " learner: ...) weighs each batch with what its loss was divided by, such as the number"
            " of its targets: (learner.batch[-1] != -100).sum(); with accumulation, also give"
            " GradientAccumulationCB(n, weight=...)",
        )


def _first_target(learner: LearnerLike) -> torch.Tensor | None:
    batch = learner.batch
    if learner.loss_func is None:  # models of transformers ignore labels of -100
        has_labels = isinstance(batch, Mapping)
        found = batch.get("labels") if has_labels else getattr(batch, "labels", None)
    elif type(batch) is tuple and len(batch) == 2 and learner.n_inp is None:
        found = batch[1]
    else:
        try:
            found = targets_in(learner)[0]
        except (TypeError, ValueError):  # `get_loss` finds them in its own way
            return None
    return found if isinstance(found, torch.Tensor) and not found.is_nested else None

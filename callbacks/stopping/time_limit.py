"""Ends a fit after a time limit."""

from __future__ import annotations

import math
import time
from datetime import timedelta

from ...events import AfterBatch, BeforeFit, Callback, CleanupBatch


class TimeLimitCB(Callback):
    """Ends a training fit after the batch, training or validating, in which the time limit expires.

    That batch is completed, so that `CheckpointCB` can save after it. The time is wall time from
    BeforeFit; for a resumed fit it starts again.

    Args:
        limit: seconds, or a `datetime.timedelta`.

    Attributes:
        limit: in seconds; may be changed while the fit runs.

    Raises:
        TypeError: `limit` is neither of the two.
        ValueError: it is not positive or not finite.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import TimeLimitCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
        >>> result = learner.run(10, cbs=TimeLimitCB(1e-6))
        >>> result.status, result.who, result.reason, result.steps
        ('cancelled', 'TimeLimitCB', 'the time limit of 1e-06 s is over', 1)

    Source: Lightning's `Timer`.
    """

    order: float = 1  # after metrics

    def __init__(self, limit: float | timedelta) -> None:
        seconds = limit.total_seconds() if isinstance(limit, timedelta) else limit
        if not isinstance(seconds, int | float):
            raise TypeError(f"limit={limit!r}: give seconds or a datetime.timedelta")
        if isinstance(seconds, bool) or not 0 < seconds < math.inf:
            raise ValueError(f"limit={limit!r}: give seconds, more than 0")
        self.limit = float(seconds)
        self._began = math.inf

    def before_fit(self, event: BeforeFit) -> None:
        # validate() and get_preds() return complete results only.
        self._began = time.monotonic() if event.learner.trains else math.inf

    def after_batch(self, event: AfterBatch) -> None:
        self._stop_if_over(event)

    def cleanup_batch(self, event: CleanupBatch) -> None:
        if event.end.status == "cancelled":  # there was no AfterBatch
            self._stop_if_over(event)

    def _stop_if_over(self, event: AfterBatch | CleanupBatch) -> None:
        if time.monotonic() - self._began >= self.limit:
            self._began = math.inf  # stop only once
            reason = f"the time limit of {self.limit:g} s is over"
            event.learner.stop("fit", reason, graceful=True, who="TimeLimitCB")

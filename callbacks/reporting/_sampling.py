"""The choice of training batches to report: every n-th of a fit, and not too often."""

from __future__ import annotations

import math
from time import monotonic
from typing import Any

from ...events import BatchEvent
from .._checks import check_float, check_int
from ._pending_scalar import PendingScalar


def check_sampling(every: Any, every_seconds: Any) -> None:
    """Raise a ValueError unless they are a number of batches and a number of seconds."""
    check_int("every", every, "a number of batches, 0 for none of them", least=0)
    check_float("every_seconds", every_seconds, "seconds, 0 for no such limit")


class Sampler:
    """Chooses among the training batches of one fit.

    Args:
        every: choose every n-th batch; 0 for none.
        every_seconds: leave out batches within this many seconds of the last one chosen.
    """

    def __init__(self, every: int, every_seconds: float) -> None:
        self.every = every
        self.every_seconds = every_seconds
        self._count = 0
        self._due = -math.inf

    def takes_next(self) -> bool:
        """Whether the next training batch is chosen; to be called once for each."""
        self._count += 1
        if not self.every or self._count % self.every:
            return False
        if self.every_seconds:
            now = monotonic()
            if now < self._due:
                return False
            self._due = now + self.every_seconds
        return True


def pending_loss(event: BatchEvent) -> PendingScalar | None:
    """The mean loss of a batch; its copy to the host starts here, in the training thread."""
    return None if event.loss is None else PendingScalar(event.loss.float().mean())

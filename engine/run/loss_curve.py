"""The losses of a learning-rate search: smoothed, and what noise cannot explain in them."""

from __future__ import annotations

import math
from collections.abc import Iterable

BETA = 0.8
"""The weight of the past in the smoothed losses: a mean over about the last nine losses."""

CONFIDENCE = 4.0
"""The number of standard errors by which noise may move a smoothed loss."""


ENOUGH = 30
"""The number of losses before which the noise is not known well enough to see an explosion."""


class LossCurve:
    """The exponentially weighted means of losses, bias-corrected, and how uncertain they are.

    The noise of single losses is taken from the differences of neighbours in the first half, which
    an explosion at the end does not affect. All is relative: it is the same for losses that are
    scaled.

    Args:
        losses: finite losses, in the order of the steps.

    Attributes:
        smoothed: one number for each loss.

    Source: the smoothed loss of fastai's `Recorder`, whose weight of the past is 0.98.
    """

    def __init__(self, losses: Iterable[float] = ()) -> None:
        self.smoothed: list[float] = []
        self._errors: list[float] = []  # the standard error of each, if that of a loss is 1
        self._squares = [0.0]  # sums of the squared differences of neighbours
        self._lowest = math.inf
        self._last = 0.0
        for loss in losses:
            self.add(loss)

    def add(self, loss: float) -> None:
        """Add the loss of the next step."""
        n = len(self.smoothed) + 1
        if n == 1:
            self.smoothed.append(loss)
        else:
            difference = loss - self._last
            self._squares.append(self._squares[-1] + difference * difference)
            mean = self.smoothed[-1]
            self.smoothed.append(mean + (loss - mean) * (1 - BETA) / (1 - BETA**n))
        self._errors.append(math.sqrt((1 - BETA) / (1 + BETA) * (1 + BETA**n) / (1 - BETA**n)))
        self._lowest = min(self._lowest, self.smoothed[-1])
        self._last = loss

    def best(self) -> float:
        """The lowest smoothed loss, plus what noise may have taken from it."""
        pairs = max(len(self.smoothed) // 2 - 1, 1)
        noise = math.sqrt(self._squares[min(pairs, len(self._squares) - 1)] / (2 * pairs))
        margins = (CONFIDENCE * noise * error for error in self._errors)
        return min(map(sum, zip(self.smoothed, margins, strict=True)))

    def exploded(self) -> bool:
        """Whether the last smoothed loss is more than four times the best one."""
        last = self.smoothed[-1]
        if len(self.smoothed) < ENOUGH:
            return False
        if last <= self._lowest + 3 * abs(self._lowest):  # `best` is higher, and takes longer
            return False
        best = self.best()
        return last > best + 3 * abs(best)

    def last_low(self) -> int:
        """The index of the last smoothed loss that is not above the best one."""
        best = self.best()
        return max(i for i, loss in enumerate(self.smoothed) if loss <= best)

"""What `fit` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a fit ended and what it did.

    Attributes:
        run_id: the id that its events carried.
        status: "completed", "cancelled" (by a receiver, `stop` or the host), or "failed".
        who: the receiver that cancelled it or failed, where it is known.
        reason: why it was cancelled or what it failed with, None if it was completed.
        n_epochs: epochs it was asked for.
        epochs: training epochs completed; validating ones for a fit that only validates.
        batches: training batches completed.
        valid_batches: validation batches completed.
        steps: optimizer steps taken; skipped and accumulated ones do not count.
        seconds: wall time, from before the first event to after the last.
        history: one dict an epoch and phase: "epoch", "train" ("train" or "eval") and the
            numbers that callbacks recorded, such as "loss" by `MetricsCB`.
        dropped: events that each observer with losses did not get, by its name.
        resumed_from: the checkpoint that it went on from; all else but `seconds` and `dropped` is
            then of the whole run.
    """

    run_id: str
    status: Literal["completed", "cancelled", "failed"]
    who: str | None
    reason: str | None
    n_epochs: int
    epochs: int
    batches: int
    valid_batches: int
    steps: int
    seconds: float
    history: tuple[dict[str, Any], ...]
    dropped: Mapping[str, int]
    resumed_from: str | None = None

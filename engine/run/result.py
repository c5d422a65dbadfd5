"""The result of a fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class FitResult:
    """How a fit ended and what it completed.

    Attributes:
        run_id: the id of the fit, as in its events.
        status: "completed", "cancelled" (by a receiver, `stop` or the host), or "failed".
        who: the receiver that cancelled it or failed, if it is known.
        reason: the reason of the cancel, or the error; None if the fit was completed.
        n_epochs: the number of epochs that were requested; None if `max_steps` alone ended the fit.
        epochs: training epochs completed; validation epochs for a fit that only validates.
        batches: training batches completed.
        valid_batches: validation batches completed.
        steps: optimizer steps taken; skipped and accumulated steps do not count.
        seconds: wall time, from before the first event to after the last.
        history: one dict per epoch and phase: "epoch", "train" ("train" or "eval") and the values
            that callbacks recorded, such as "loss" by `MetricsCB`. The row of an epoch that was
            cut short has what was measured until then, and "status": "cancelled" or "failed".
        dropped: the number of events that an observer did not get, by its name; observers that
            got all of them are left out.
        resumed_from: the checkpoint from which the fit resumed; all other fields except `seconds`
            and `dropped` then cover the whole run.
    """

    run_id: str
    status: Literal["completed", "cancelled", "failed"]
    who: str | None
    reason: str | None
    n_epochs: int | None
    epochs: int
    batches: int
    valid_batches: int
    steps: int
    seconds: float
    history: tuple[dict[str, Any], ...]
    dropped: Mapping[str, int]
    resumed_from: str | None = None

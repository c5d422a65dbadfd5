"""Control flow: a receiver raises one of these to leave the scope it names.

    BaseException
    └── CancelException            abstract: catch it to mean "any cancel"
        ├── CancelFitException     ends the fit
        ├── CancelEpochException   ends the epoch, training or validating
        ├── CancelBatchException   ends the batch
        └── CancelStepException    ends the optimizer step; AfterBatch still fires

The scope that is named catches it, subclasses included; scopes inside it are left through
their Cleanup* events. Like `KeyboardInterrupt` they derive from `BaseException`, so that a
receiver's own `except Exception` cannot swallow them. One that reaches no scope of its kind
(a CancelStepException outside a step) becomes a `RuntimeError` naming the receiver.

Example:
    >>> try:
    ...     raise CancelFitException("loss is good enough")
    ... except CancelException as cancel:
    ...     cancel.reason
    'loss is good enough'

Source: fastai's miniai, where they are plain exceptions without a reason.
"""

from __future__ import annotations

from typing import ClassVar


class CancelException(BaseException):
    """Base of the cancels.

    Args:
        reason: why, for the Cleanup* event, the logs and `FitResult`.
    """

    width: ClassVar[int] = 0
    """Rank of the scope it ends, narrowest first."""

    who: str | None = None
    """The receiver that raised it; set by the bus."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(*([] if reason is None else [reason]))
        self.reason = None if reason is None else str(reason)


class CancelFitException(CancelException):
    """Ends the fit: CleanupBatch and CleanupEpoch where open, then CleanupFit."""

    width = 4


class CancelEpochException(CancelException):
    """Ends the epoch; the fit goes on with the next one."""

    width = 3


class CancelBatchException(CancelException):
    """Ends the batch; the epoch goes on with the next one."""

    width = 2


class CancelStepException(CancelException):
    """Ends the optimizer step (no `Step`, no `ZeroGrad`); the batch goes on to AfterBatch."""

    width = 1

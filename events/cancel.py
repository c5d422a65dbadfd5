"""Control flow: a receiver raises one of these to leave the scope it names.

    BaseException
    └── CancelException            abstract: catch it to mean "any cancel"
        ├── CancelFitException     ends the fit
        ├── CancelEpochException   ends the epoch, in training or validation
        ├── CancelBatchException   ends the batch
        └── CancelStepException    ends the optimizer step; AfterBatch is still emitted

The named scope catches the exception and its subclasses; the scopes inside it are left through
their Cleanup* events. Like `KeyboardInterrupt` they derive from `BaseException`, so that a
receiver's own `except Exception` cannot swallow them. If no scope of its kind is open (a
CancelStepException outside a step), it becomes a `RuntimeError` that names the receiver.

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
        reason: the reason to report in the Cleanup* event, the logs and `FitResult`.
    """

    width: ClassVar[int] = 0
    """The rank of the scope that it ends: 1 is the narrowest."""

    who: str | None = None
    """The receiver that raised it; set by the bus."""

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(*([] if reason is None else [reason]))
        self.reason: str | None = None if reason is None else str(reason)


class CancelFitException(CancelException):
    """Ends the fit: CleanupBatch and CleanupEpoch if those are open, then CleanupFit."""

    width = 4


class CancelEpochException(CancelException):
    """Ends the epoch; the fit continues with the next one."""

    width = 3


class CancelBatchException(CancelException):
    """Ends the batch; the epoch continues with the next one."""

    width = 2


class CancelStepException(CancelException):
    """Ends the optimizer step (no `Step`, no `ZeroGrad`); the batch continues at AfterBatch."""

    width = 1

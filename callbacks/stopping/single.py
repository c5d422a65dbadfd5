"""Callbacks that end a fit after its first batch or epoch, to see whether everything works."""

from __future__ import annotations

from ...events import AfterBatch, AfterEpoch, Callback, CancelFitException


class SingleBatchCB(Callback):
    """Ends the fit after its first batch.

    Source: the post's `SingleBatchCB`.
    """

    order: float = 1  # after metrics
    shareable = True
    in_extra_validation = False

    def after_batch(self, event: AfterBatch) -> None:
        raise CancelFitException("one batch was asked for")


class SingleEpochCB(Callback):
    """Ends the fit after its first epoch: training and, if the fit validates, validation.

    Source: the post's `SingleEpochCB`, which never ends a fit without validation.
    """

    order: float = 1  # after metrics
    shareable = True
    in_extra_validation = False

    def after_epoch(self, event: AfterEpoch) -> None:
        if not event.training or not event.learner.validates:
            raise CancelFitException("one epoch was asked for")

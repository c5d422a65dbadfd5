"""What a type checker finds in a user's code: mypy --strict reports an ignore without an error."""

from __future__ import annotations

from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, AfterEpoch, Callback, LearnerLike
from torch import nn


class Misspelt(Callback):
    def after_batch(self, event: AfterBatch) -> None:
        event.learner.modle.eval()  # type: ignore[attr-defined]
        event.learner.model.eval()
        event.los  # type: ignore[attr-defined]  # noqa: B018


learner = TrainLearner(nn.Linear(3, 1), DataLoaders(), cbs=Misspelt())
as_receivers_see_it: LearnerLike = learner


@learner.on(AfterEpoch)
def report(event: AfterEpoch) -> None:
    print(event.epoch, event.iter)  # type: ignore[attr-defined]

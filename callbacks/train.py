"""The five actions as a callback, for a plain `Learner`."""

from __future__ import annotations

from ..engine.learners import TrainLearner
from ..events import Backward, Callback, GetLoss, Predict, Step, ZeroGrad


class TrainCB(Callback):
    """Performs what `TrainLearner` has as methods.

    It is the last in order: any other callback that performs one of the actions takes that one
    over.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import TrainCB
        >>> from eventrain.engine import DataLoaders, Learner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> learner = Learner(torch.nn.Linear(3, 1), DataLoaders(batches, batches), cbs=TrainCB())
        >>> learner.run(1).steps
        4

    Source: the post's `TrainCB`.
    """

    order = 1000

    def predict(self, event: Predict) -> None:
        TrainLearner.predict(event.learner)

    def get_loss(self, event: GetLoss) -> None:
        TrainLearner.get_loss(event.learner)

    def backward(self, event: Backward) -> None:
        TrainLearner.backward(event.learner)

    def step(self, event: Step) -> None:
        TrainLearner.step(event.learner)

    def zero_grad(self, event: ZeroGrad) -> None:
        TrainLearner.zero_grad(event.learner)

"""The five actions as a callback, for a plain `Learner`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...engine import TrainLearner
from ...events import ActionEvent, Backward, Callback, Event, GetLoss, Predict, Step, ZeroGrad

_METHODS: Any = TrainLearner  # Any, because they work on every learner


class TrainCB(Callback):
    """Performs the actions as the methods of `TrainLearner` do.

    It performs those for which the learner has no method of its own. It is the last in order: any
    other callback that performs an action takes precedence.

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

    order: float = 1000

    def receivers(self, learner: Any) -> Iterator[tuple[type[Event], Callable[[Any], Any]]]:
        """As for any callback, but without the actions that the learner has a method for."""
        for event_type, method in super().receivers(learner):
            if not (issubclass(event_type, ActionEvent) and hasattr(learner, event_type.hook)):
                yield event_type, method

    def predict(self, event: Predict) -> None:
        _METHODS.predict(event.learner)

    def get_loss(self, event: GetLoss) -> None:
        _METHODS.get_loss(event.learner)

    def backward(self, event: Backward) -> None:
        _METHODS.backward(event.learner)

    def step(self, event: Step) -> None:
        _METHODS.step(event.learner)

    def zero_grad(self, event: ZeroGrad) -> None:
        _METHODS.zero_grad(event.learner)

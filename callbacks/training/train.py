"""The five actions as a callback, for a plain `Learner`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ...engine import TrainLearner
from ...engine.loop.actions import may_replace
from ...events import Backward, Callback, Event, GetLoss, Predict, Step, ZeroGrad

_METHODS: Any = TrainLearner  # Any, because they work on every learner


class TrainCB(Callback):
    """Performs the actions as the methods of `TrainLearner` do.

    It leaves to a learner class of your own the actions for which that has a method. It is the last
    in order: any other callback that performs an action takes precedence.

    Args:
        n_inp: the number of inputs in a batch; only 1 is supported.

    Raises:
        ValueError: `n_inp` is not 1.

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
    shareable = True

    def __init__(self, n_inp: int = 1) -> None:
        if n_inp != 1:
            raise ValueError(
                f"n_inp={n_inp!r}: only batches of (inputs, targets) are supported. For several"
                " inputs, derive a class from TrainCB with a method of your own: def predict(self,"
                " event): learner = event.learner; learner.preds = learner.model(*learner.batch[:"
                f"{n_inp}]), and likewise get_loss"
            )

    def receivers(self, learner: Any) -> Iterator[tuple[type[Event], Callable[[Any], Any]]]:
        """As for any callback, but without the actions for which the learner has its own method."""
        for event_type, method in super().receivers(learner):
            if may_replace(getattr(learner, event_type.hook, None)):
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

"""The five actions as a callback, for a plain `Learner`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

from ...engine import TrainLearner
from ...engine.data.inputs import Inputs, check_n_inp
from ...engine.loop.actions import may_replace
from ...events import (
    Backward,
    BeforeFit,
    Callback,
    CleanupFit,
    Event,
    GetLoss,
    Predict,
    Step,
    ZeroGrad,
)

_METHODS: Any = TrainLearner  # Any, because they work on every learner


class TrainCB(Callback):
    """Performs the actions as the methods of `TrainLearner` do.

    It leaves to a learner class of your own the actions for which that has a method. It is the last
    in order: any other callback that performs an action takes precedence.

    Args:
        n_inp: which parts of a batch the model takes, as of a `TrainLearner`; by default, what the
            learner's `n_inp` says. During the fit, it is the learner's.

    Raises:
        TypeError, ValueError: `n_inp` is not valid.

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

    n_inp: Inputs = None  # where a subclass does not call __init__

    def __init__(self, n_inp: Inputs = None) -> None:
        self.n_inp = check_n_inp(n_inp)
        self._n_inp_before: WeakKeyDictionary[Any, Inputs] = WeakKeyDictionary()

    def receivers(self, learner: Any) -> Iterator[tuple[type[Event], Callable[[Any], Any]]]:
        """As for any callback, but without the actions for which the learner has its own method."""
        for event_type, method in super().receivers(learner):
            if may_replace(getattr(learner, event_type.hook, None)):
                yield event_type, method
        if self.n_inp is not None:
            yield BeforeFit, self._set_n_inp
            yield CleanupFit, self._restore_n_inp

    def _set_n_inp(self, event: BeforeFit) -> None:
        """For whatever else asks for the targets of a batch."""
        self._n_inp_before[event.learner] = event.learner.n_inp
        event.learner.n_inp = self.n_inp

    def _restore_n_inp(self, event: CleanupFit) -> None:
        if event.learner in self._n_inp_before:
            event.learner.n_inp = self._n_inp_before.pop(event.learner)

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

"""Parts of a model that are frozen at first, and trained later."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...engine.loop.parameters import all_optimizer_parameters
from ...events import BeforeEpoch, BeforeFit, Callback, CleanupFit
from ...events.checks import is_int

Schedule = Mapping[int, str | Iterable[str]]


class UnfreezeCB(Callback):
    """Freezes parts of the model, and unfreezes them at the beginning of later epochs.

    What the schedule names is frozen from the beginning of a fit (`requires_grad=False`, and no
    gradient) until its epoch; other parameters are left as they are. The optimizer has to have the
    frozen parameters from the start: it leaves those without a gradient alone, weight decay
    included, and makes their state with their first step. So the state of the others is kept.

    In training mode, frozen BatchNorm layers still use the statistics of each batch, and update
    their running ones. With `eval_norms=True` they use the running ones, and do not change them.

    After the fit, the parameters stay as the last epoch had them. Checkpoints hold which are
    frozen; `lr_find` applies the schedule and puts everything back.

    Args:
        unfreeze: by the epoch, from 0: the names of modules or parameters of the model, one or
            several. The first epoch that names a parameter counts for it.
        freeze: what is to be frozen from an epoch on, in the same way.
        eval_norms: keep normalization layers that have running statistics in eval mode while they
            are frozen.

    Raises:
        ValueError: an epoch is not an integer of 0 or more; in the fit, the model has nothing of a
            name, or no optimizer has a parameter that is to be unfrozen.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import UnfreezeCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> from eventrain.events import BeforeEpoch
        >>> model = torch.nn.Sequential()
        >>> model.add_module("backbone", torch.nn.Linear(3, 3))
        >>> model.add_module("head", torch.nn.Linear(3, 1))
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> learner = TrainLearner(model, DataLoaders(batches), cbs=UnfreezeCB({1: "backbone"}))
        >>> @learner.on(BeforeEpoch, order=100)
        ... def show(event):
        ...     print(event.epoch, model.backbone.weight.requires_grad)
        >>> _ = learner.run(2, valid=False)
        0 False
        1 True

    Source: gradual unfreezing (ULMFiT), fastai's `freeze_to`; Lightning's `BaseFinetuning`.
    """

    order: float = 5  # before AccelerateCB (60) wraps the model, which looks at what is frozen

    def __init__(
        self,
        unfreeze: Schedule,
        *,
        freeze: Schedule | None = None,
        eval_norms: bool = False,
    ) -> None:
        self.unfreeze = _checked("unfreeze", unfreeze)
        self.freeze = _checked("freeze", freeze or {})
        self.eval_norms = eval_norms
        self._parameters: list[tuple[str, nn.Parameter]] = []
        self._norms: list[tuple[str, nn.Module]] = []

    def before_fit(self, event: BeforeFit) -> None:
        learner = event.learner
        if not learner.trains:
            return
        named = list(learner.model.named_parameters())
        self._check_names(learner.model)
        self._parameters = [(name, p) for name, p in named if self._is_scheduled(name)]
        stepped = {id(p) for p in all_optimizer_parameters(learner)}
        for name, p in self._parameters:
            if _first(self.unfreeze, name) is not None and id(p) not in stepped:
                raise ValueError(
                    f"{name} is to be unfrozen, but the optimizer does not have it: give it all"
                    " parameters, also those that are frozen, such as model.parameters()"
                )
        if self.eval_norms:
            self._norms = [
                (name, module)
                for name, module in learner.model.named_modules()
                if self._is_scheduled(name) and getattr(module, "running_mean", None) is not None
            ]
        self._apply(0)

    def before_epoch(self, event: BeforeEpoch) -> None:
        if event.training:
            self._apply(event.epoch)

    def cleanup_fit(self, event: CleanupFit) -> None:
        self._parameters, self._norms = [], []

    def _apply(self, epoch: int) -> None:
        for name, p in self._parameters:
            trains = self._trains(name, epoch)
            if trains is not None and trains != p.requires_grad:
                p.requires_grad_(trains)
            if trains is False:
                p.grad = None  # an optimizer would step with it
        for name, module in self._norms:
            if self._trains(name, epoch) is False:
                module.eval()  # the loop has put it into training mode

    def _is_scheduled(self, name: str) -> bool:
        return any(_first(schedule, name) is not None for schedule in (self.unfreeze, self.freeze))

    def _trains(self, name: str, epoch: int) -> bool | None:
        """Whether a part trains in an epoch; None if it is to be left as it is."""
        begins, ends = _first(self.unfreeze, name), _first(self.freeze, name)
        trains = None if begins is None else epoch >= begins
        if ends is None or epoch < ends:
            return trains
        return trains is True and begins is not None and begins > ends

    def _check_names(self, model: nn.Module) -> None:
        there = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for argument, schedule in (("unfreeze", self.unfreeze), ("freeze", self.freeze)):
            for key in (key for keys in schedule.values() for key in keys):
                if not any(_is_within(name, key) for name in there):
                    parts = ", ".join(repr(part) for part, _ in model.named_children())
                    raise ValueError(
                        f"{argument}: the model has no parameter or module {key!r} with parameters;"
                        f" its modules are {parts or 'none'}"
                    )


def _checked(argument: str, schedule: Any) -> dict[int, list[str]]:
    if not isinstance(schedule, Mapping):
        raise TypeError(f"{argument}={schedule!r}: give names by epoch, such as {{1: 'backbone'}}")
    for epoch in schedule:
        if not is_int(epoch, 0):
            raise ValueError(f"{argument}: {epoch!r} is not an epoch: give an integer, 0 or more")
    return {
        epoch: [names] if isinstance(names, str) else list(names)
        for epoch, names in schedule.items()
    }


def _first(schedule: Mapping[int, list[str]], name: str) -> int | None:
    """The first epoch that names a part, or something around it."""
    epochs = (e for e, keys in schedule.items() if any(_is_within(name, key) for key in keys))
    return min(epochs, default=None)


def _is_within(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")

"""A learning-rate scheduler of torch, stepped after optimizer steps or epochs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from ...engine.loop.optimizers import Optimizers, optimizer_named
from ...events import AfterStep, BeforeEpoch, BeforeFit, Callback, CleanupEpoch, CleanupFit
from .._monitor import check_monitor, monitored
from .._purpose import is_training


class SchedulerCB(Callback):
    """Steps a learning-rate scheduler after every optimizer step, or after every training epoch.

    Every fit creates its own scheduler, for its own optimizer. An optimizer that is kept over fits
    (`opt=...`) has its learning rate and other options restored afterwards. Steps that
    accumulation leaves out, or that overflowed, do not count, nor do epochs without a step.
    `validate()` and the learning-rate finder do not use it.

    Args:
        make: called as `make(opt)`, or as `make(opt, n_steps=...)` if it has a parameter of that
            name, which is the number of optimizer steps of the whole fit (`learner.n_steps`). It
            returns a scheduler of `torch.optim.lr_scheduler`, or anything with `step`,
            `state_dict` and `load_state_dict`.
        every: "step" or "epoch".
        opt: the name of the optimizer, where the learner has several: the scheduler is stepped
            after the steps of this one.
        monitor: for `ReduceLROnPlateau`: the name of the number that it is stepped with, from
            every validating epoch, or from every training epoch if the fit does not validate.

    Attributes:
        scheduler: the scheduler of this fit, or of the last one; None before the first.

    Raises:
        TypeError: `make` is not a function; in the fit, it does not return a scheduler.
        ValueError: `every` is neither of the two, or `monitor` is missing or not applicable; in
            the fit, there is no number of that name, or `n_steps` is not known.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import SchedulerCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> from eventrain.events import BeforeStep
        >>> from torch.optim.lr_scheduler import StepLR
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 2
        >>> schedule = SchedulerCB(lambda opt: StepLR(opt, 1, gamma=0.5), every="epoch")
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches), cbs=schedule)
        >>> _ = learner.subscribe(BeforeStep, lambda event: print(event.lr))
        >>> result = learner.run(2, valid=False)
        0.1
        0.1
        0.05
        0.05

    Source: fastai's miniai, `BaseSchedCB`.
    """

    order: float = 10  # after metrics; before AccelerateCB (60) wraps the optimizer
    in_extra_validation = False

    def __init__(
        self,
        make: Callable[..., Any],
        every: Literal["step", "epoch"] = "step",
        monitor: str | None = None,
        *,
        opt: str | None = None,
    ) -> None:
        if not callable(make):
            name = type(make).__name__
            is_one = isinstance(make, LRScheduler)
            what = f"make is a scheduler, {name}" if is_one else f"make={make!r}"
            raise TypeError(
                f"{what}: give a function of the optimizer, such as SchedulerCB(lambda opt:"
                f" {name if is_one else 'StepLR'}(opt, {'...' if is_one else '10'})), because every"
                " fit makes its own scheduler"
            )
        if every not in ("step", "epoch"):
            raise ValueError(f"every={every!r}: choose 'step' or 'epoch'")
        if monitor is not None and check_monitor(monitor) and every == "step":
            raise ValueError(f"monitor={monitor!r}: it is known once per epoch: add every='epoch'")
        self.make = make
        self.every = every
        self.monitor = monitor
        self.opt = opt
        self.scheduler: Any = None
        self._n_steps: int | None = None  # for which the scheduler was made
        self._runs = False
        self._stepped = False  # whether the optimizer was, since the last epoch that counted
        self._left = False  # whether a cancelled epoch is to be counted if the fit goes on
        self._kept: list[dict[str, Any]] | None = None

    def before_fit(self, event: BeforeFit) -> None:
        learner = event.learner
        self._runs = is_training(learner)
        if not self._runs:
            return
        self._stepped = self._left = False
        others = [cb for cb in learner.cbs if isinstance(cb, SchedulerCB)]
        if learner.opt_func is None and not any(cb._kept for cb in others):
            self._kept = [_options(group) for group in learner.opt.param_groups]
            for group in learner.opt.param_groups:  # schedulers change tensors in place
                group.update(copy.deepcopy(_options(group)))
        self.scheduler = self._make(self._optimizer(learner.opt), learner.n_steps)

    def _optimizer(self, opt: Any) -> Any:
        if self.opt is not None:
            return optimizer_named(opt, self.opt)
        if isinstance(opt, Optimizers):
            raise ValueError(
                f"learner.opt has several optimizers, {opt.names}: name the one whose rate is to"
                f" be scheduled: SchedulerCB(make, opt={opt.first!r})"
            )
        return opt

    def _make(self, opt: Any, n_steps: int | None) -> Any:
        size = {}
        self._n_steps = None
        if _takes_n_steps(self.make):
            if n_steps is None:
                raise ValueError(
                    f"make={self.make!r} wants n_steps, which is not known, because dls.train has"
                    " no length: give fit(max_steps=...), or fit(n_epochs, epoch_length=...)"
                )
            size["n_steps"] = self._n_steps = n_steps
        try:
            scheduler = self.make(opt, **size)
        except Exception as exc:
            called = ", ".join(["opt", *size])
            hint = "" if size else "; a parameter n_steps would get the number of optimizer steps"
            exc.add_note(f"raised by make={self.make!r}, called as make({called}){hint}")
            raise
        for method in ("step", "state_dict", "load_state_dict"):
            if not callable(getattr(scheduler, method, None)):
                raise TypeError(
                    f"make={self.make!r} returned {scheduler!r}, which has no {method}()"
                )
        if getattr(scheduler, "optimizer", opt) is not opt:
            raise ValueError(
                f"make={self.make!r} returned the scheduler of another optimizer: create it for"
                " the optimizer that is passed"
            )
        name = type(scheduler).__qualname__
        if isinstance(scheduler, ReduceLROnPlateau):
            if self.monitor is None:
                raise ValueError(
                    f"{name} is stepped with a number: add every='epoch', monitor='loss'"
                )
        elif isinstance(scheduler, LRScheduler) and self.monitor is not None:
            raise ValueError(f"monitor={self.monitor!r}: {name} is stepped without a number")
        if not isinstance(scheduler, LRScheduler):
            self._check_step(scheduler)
        return scheduler

    def _check_step(self, scheduler: Any) -> None:
        """Refuse a scheduler whose `step` takes other arguments, as those of timm do."""
        try:
            signature = inspect.signature(scheduler.step)
        except (TypeError, ValueError):  # it is not written in Python
            return
        given = () if self.monitor is None else (0.0,)
        is_count = next(iter(signature.parameters), None) == "epoch"
        try:
            signature.bind(*given)
        except TypeError:
            fits = False
        else:
            fits = not (given and is_count)
        if not fits:
            raise TypeError(
                f"{type(scheduler).__qualname__}.step({', '.join(signature.parameters)}) does not"
                " fit: SchedulerCB calls"
                f" step({'number' if given else ''}). Wrap it in a class whose step() counts its"
                " calls and passes the count on: see 'A scheduler that wants the epoch' in"
                " docs/guides/any-loop.md"
            )

    def after_step(self, event: AfterStep) -> None:
        if event.opt not in (None, self.opt):
            return  # an update of another optimizer
        self._stepped = True
        if self._runs and self.every == "step":
            if self._n_steps is not None and self._taken(event) > self._n_steps:
                raise RuntimeError(
                    f"the schedule was made for n_steps={self._n_steps}, and this is a further"
                    " step: the optimizer takes more than one per batch, by update(). Give the"
                    " scheduler the number of its steps yourself, or fit(max_steps=...)"
                )
            self.scheduler.step()

    def _taken(self, event: AfterStep) -> int:
        """The steps of the optimizer so far, this one included."""
        if isinstance(self.scheduler, LRScheduler):
            return int(self.scheduler.last_epoch) + 1
        return event.steps

    def before_epoch(self, event: BeforeEpoch) -> None:
        if self._runs and self._left:
            self._end_epoch()

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        if not self._runs or self.every == "step":
            return
        if self.monitor is not None:
            number = monitored(event, self.monitor)
            if number is not None:
                self.scheduler.step(number)
        elif event.training and self._stepped:  # torch warns where the optimizer never stepped
            # A cancelled epoch may be continued, if the fit ends with it and is resumed.
            self._left = event.end.status != "completed"
            if not self._left:
                self._end_epoch()

    def _end_epoch(self) -> None:
        self._stepped = self._left = False
        self.scheduler.step()

    def cleanup_fit(self, event: CleanupFit) -> None:
        self._runs = False
        if self._kept is not None:
            for group, options in zip(event.learner.opt.param_groups, self._kept, strict=False):
                for added in _options(group).keys() - options.keys():
                    del group[added]
                group.update(options)
            self._kept = None

    def state_dict(self) -> dict[str, Any]:
        """The scheduler's state, and whether its next step is due at the end of this epoch."""
        scheduler = None if self.scheduler is None else self.scheduler.state_dict()
        return copy.deepcopy({"scheduler": scheduler, "stepped": self._stepped, "left": self._left})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._stepped, self._left = state["stepped"], state["left"]
        if self.scheduler is None or state["scheduler"] is None:
            return
        self.scheduler.load_state_dict(copy.deepcopy(state["scheduler"]))
        if self._stepped and isinstance(self.scheduler, LRScheduler):
            # Torch warns if the scheduler is stepped first, and does not know of earlier steps.
            opt: Any = self.scheduler.optimizer
            opt._opt_called = True


def _takes_n_steps(make: Callable[..., Any]) -> bool:
    """Whether a function has a parameter `n_steps` without a value, such as one of a partial."""
    try:
        parameter = inspect.signature(make).parameters.get("n_steps")
    except (TypeError, ValueError):  # it is not written in Python
        return False
    return parameter is not None and parameter.default is parameter.empty


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}

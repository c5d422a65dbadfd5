"""Hugging Face Accelerate: its device placement, mixed precision and scaling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from ...engine import DataLoaders, Optimizers
from ...engine.data.inputs import Inputs
from ...events import (
    ActionEvent,
    Backward,
    BeforeEpoch,
    BeforeFit,
    BeforeStep,
    CancelStepException,
    CleanupFit,
    CleanupStep,
    Event,
    Step,
)
from .._checks import optional_import
from ._gradient_scaling import GradientScaling
from .train import TrainCB


class AccelerateCB(TrainCB):
    """Trains through an `accelerate.Accelerator`.

    The accelerator prepares model, optimizer and loaders for the duration of the fit; afterwards
    the learner has its own again. The callback wraps Backward and Step, so that methods of the
    learner's own are called, and performs the actions that a plain `Learner` has no methods for. A
    step skipped because of overflow cancels the step scope, as with `MixedTrainingCB`.

    Args:
        mixed_precision: "no", "fp16" or "bf16"; by default "fp16" with a GPU, as in the post, and
            "no" on the CPU.
        n_inp: as of a `TrainCB`.
        kwargs: further arguments of `Accelerator`, but not those that change what the loop does,
            such as `gradient_accumulation_steps`: use `GradientAccumulationCB`.

    Attributes:
        accelerator: the `accelerate.Accelerator`.

    Raises:
        ImportError: accelerate is not installed.
        TypeError, ValueError: an argument is not valid, or it or accelerate's environment would
            change what the loop does.

    Source: the post's `AccelerateCB`.
    """

    order: float = 60  # as MixedTrainingCB: only one of the two scales

    def __init__(
        self, mixed_precision: str | None = None, *, n_inp: Inputs = None, **kwargs: Any
    ) -> None:
        super().__init__(n_inp)
        with optional_import("AccelerateCB", "accelerate", "accelerate"):
            from accelerate import Accelerator
        if mixed_precision is None:
            mixed_precision = "fp16" if torch.accelerator.is_available() else "no"
        self.accelerator = Accelerator(mixed_precision=mixed_precision, **kwargs)
        _check_loop_is_ours(self.accelerator)
        self._own: tuple[Any, Any, Any] | None = None
        self._marks: dict[str, Any] = {}
        self._scaling: GradientScaling | None = None  # of the scaler, if there is one

    @property
    def not_with_closures(self) -> str | None:  # type: ignore[override]
        """Why it cannot work with an optimizer that wants a closure; None if it can."""
        return "its scaler scales the first gradients alone" if self.scales_gradients else None

    @property
    def scales_gradients(self) -> bool:
        """Whether a scaler skips the steps whose gradients are not finite."""
        return self.accelerator.scaler is not None

    def receivers(self, learner: Any) -> Iterator[tuple[type[Event], Callable[[Any], Any]]]:
        """Those of a TrainCB that the learner has no method for, and around them the wrappers."""
        yield Backward, self.backward
        yield Step, self.step
        inside: dict[type[Event], Any] = {Backward: super().backward, Step: super().step}
        for event_type, method in super().receivers(learner):
            if not (issubclass(event_type, ActionEvent) and hasattr(learner, event_type.hook)):
                yield event_type, inside.get(event_type, method)

    def before_fit(self, event: BeforeFit) -> None:
        learner = event.learner
        self._own = learner.model, learner.opt, learner.dls
        self._marks = {
            key: vars(learner.model)[key] for key in _MARKS if key in vars(learner.model)
        }
        learner.model = self._prepare(learner.model)
        learner.opt = self._prepare(learner.opt)
        learner.dls = DataLoaders(
            *(self._prepare(getattr(learner.dls, name, None)) for name in ("train", "valid"))
        )
        if self.accelerator.scaler is not None and learner.trains:
            self._scaling = GradientScaling(self.accelerator.scaler, learner)

    def _prepare(self, x: Any) -> Any:
        return None if x is None else self.accelerator.prepare(x)

    def before_epoch(self, event: BeforeEpoch) -> None:
        if hasattr(event.learner.dl, "iteration"):
            # Accelerate's loaders seed their samplers with the number of times that they were read
            # to the end. In a resumed fit, or after a cancelled epoch, that is not the epoch.
            event.learner.dl.iteration = event.epoch

    def backward(self, event: Backward) -> None:
        # As `Accelerator.backward` does, but with the learner's own method inside.
        with nullcontext() if self._scaling is None else self._scaling.scaled_loss(event.learner):
            event.proceed()

    def before_step(self, event: BeforeStep) -> None:
        if self._scaling is None:
            return
        if isinstance(event.learner.opt, Optimizers):
            self._scaling.unscale(event.learner)
        else:
            self.accelerator.unscale_gradients(event.learner.opt)
            self._scaling.unscale_others(event.learner)
            self._scaling.unscaled = True

    def step(self, event: Step) -> None:
        if self._scaling is not None and isinstance(event.learner.opt, Optimizers):
            if self._scaling.step(event.learner, event.proceed):
                raise CancelStepException(_SKIPPED)
            return
        event.proceed()  # `learner.opt` is accelerate's, which skips a step that overflowed
        if self._scaling is not None:
            self._scaling.updated = True
        if self.accelerator.optimizer_step_was_skipped:
            event.learner.opt.zero_grad()
            raise CancelStepException(_SKIPPED)

    def cleanup_step(self, event: CleanupStep) -> None:
        if self._scaling is not None:
            self._scaling.end_step(event.learner)

    def cleanup_fit(self, event: CleanupFit) -> None:
        if self._own is None:
            return
        learner = event.learner
        if self._scaling is not None:
            self._scaling.end_fit(learner)
            self._scaling = None
        self.accelerator.unwrap_model(learner.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()  # it keeps references to all that it has prepared
        learner.model, learner.opt, learner.dls = self._own
        self._own = None
        for key in _MARKS:
            vars(learner.model).pop(key, None)
        vars(learner.model).update(self._marks)

    def state_dict(self) -> dict[str, Any]:
        """The scaler's state, if there is one."""
        scaler = self.accelerator.scaler
        return {} if scaler is None else {"scaler": scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        if self.accelerator.scaler is not None and "scaler" in state:
            self.accelerator.scaler.load_state_dict(state["scaler"])


_SKIPPED = "gradients overflowed: step skipped by accelerate"

_MARKS = ("forward", "_original_forward", "_is_accelerate_prepared")
"""Attributes that `prepare` leaves in a model. With the last one, it is not prepared again."""


def _check_loop_is_ours(accelerator: Any) -> None:
    """Raise a ValueError for settings that would have accelerate change what the loop does."""
    if (n := accelerator.gradient_accumulation_steps) != 1:
        raise ValueError(
            f"AccelerateCB(gradient_accumulation_steps={n}): the loop decides when to step, and"
            f" accelerate would only divide the loss: add GradientAccumulationCB({n}) instead"
            " (ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment has the same effect)"
        )
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind in ("DEEPSPEED", "MEGATRON_LM"):
        raise ValueError(
            f"AccelerateCB with {kind}: its engine has a backward pass and a step of its own,"
            " which the loop would bypass; give AccelerateCB no plugin for it"
        )

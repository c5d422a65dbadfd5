"""Mixed precision: autocast, and gradient scaling where float16 needs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...events import (
    AfterLoss,
    Backward,
    BeforeBatch,
    BeforeFit,
    BeforeStep,
    Callback,
    CancelStepException,
    CleanupBatch,
    CleanupFit,
    CleanupStep,
    Event,
    Step,
)
from ._gradient_scaling import GradientScaling
from .device import def_device

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MixedTrainingCB(Callback):
    """Runs prediction and loss under autocast; with float16 it also scales the loss.

    With float16 it wraps Backward and Step: the loss is scaled for the backward pass, and the
    gradients are unscaled before the step, so that clipping, logging (`before_step`) and momentum
    see the true values. A `backward` or `step` of the learner's own is called inside.
    A step with infinite or NaN gradients is skipped: its step scope is cancelled, so
    `CleanupStep.end` reports it, with the scale, and no `AfterStep` is emitted. With bfloat16 no
    scaler is needed, and this callback does not wrap Backward and Step.

    Args:
        dtype: "fp16" or "bf16", or torch's dtypes; by default the one of torch's autocast for
            `def_device`: "fp16" with a GPU, as in the post, and "bf16" on the CPU.
        init_scale: the initial factor of the scaler. It is halved by every skipped step, and
            doubled after 2,000 steps in a row without a skipped one.

    Attributes:
        scaler: the `torch.amp.GradScaler` of this fit; None with bfloat16.
        skipped_steps: the number of skipped steps of this fit.

    Raises:
        ValueError: `dtype` is another one.

    Source: the post's `MixedTrainingCB`; torch's recipe for automatic mixed precision.
    """

    not_with_closures = "its precision and its scale are for the first time alone"
    order: float = 60  # after accumulation (50), before clipping (70)

    def __init__(self, dtype: torch.dtype | str | None = None, init_scale: float = 65536.0) -> None:
        if dtype is None:
            dtype = torch.get_autocast_dtype(def_device)
        if dtype not in {*_DTYPES, *_DTYPES.values()}:
            raise ValueError(f"dtype={dtype!r}: choose 'fp16' or 'bf16'")
        self.dtype = _DTYPES[dtype] if isinstance(dtype, str) else dtype
        self.init_scale = init_scale
        self.scaler: torch.amp.GradScaler | None = None
        self.skipped_steps = 0
        self._device = "cpu"
        # The one that is entered, in a batch of the fit (False) and of a validation within it.
        self._autocasts: dict[bool, torch.autocast] = {}
        self._scaling: GradientScaling | None = None  # of the scaler, if there is one
        self._reopen = False  # whether more is computed after the step

    @property
    def scales_gradients(self) -> bool:
        """Whether a scaler skips the steps whose gradients are not finite."""
        return self.scaler is not None

    def receivers(self, learner: Any) -> Iterator[tuple[type[Event], Callable[[Any], Any]]]:
        """As for any callback, but it wraps the actions only where there is a scaler."""
        for event_type, method in super().receivers(learner):
            if self.dtype == torch.float16 or event_type not in (Backward, Step):
                yield event_type, method

    def before_fit(self, event: BeforeFit) -> None:
        model = event.learner.model
        self._device = next((p.device.type for p in model.parameters()), "cpu")
        self.skipped_steps = 0
        if self.dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(self._device, init_scale=self.init_scale)
            if event.learner.trains:
                self._scaling = GradientScaling(self.scaler, event.learner)

    def before_batch(self, event: BeforeBatch) -> None:
        self._open(event)

    def _open(self, event: BeforeBatch | CleanupStep) -> None:
        autocast = torch.autocast(self._device, dtype=self.dtype)
        self._autocasts[event.learner.in_extra_validation] = autocast
        autocast.__enter__()

    def after_loss(self, event: AfterLoss) -> None:
        if event.training:
            self._reopen = bool(event.learner.updated)
        elif event.learner.updated:
            return  # what comes after an update is in the same precision
        self._close(event)

    def cleanup_batch(self, event: CleanupBatch) -> None:
        self._close(event)  # if the batch was cancelled before its loss
        if event.training:  # not in an extra validation, within the batch
            self._reopen = False

    def _close(self, event: AfterLoss | CleanupBatch) -> None:
        autocast = self._autocasts.pop(event.learner.in_extra_validation, None)
        if autocast is not None:
            autocast.__exit__(None, None, None)

    def backward(self, event: Backward) -> None:
        if self._scaling is None:
            raise RuntimeError(
                "MixedTrainingCB was attached in the middle of a fit, but makes its scaler at the"
                " beginning: pass it to the learner, or to fit(cbs=...)"
            )
        with self._scaling.scaled_loss(event.learner):
            event.proceed()

    def before_step(self, event: BeforeStep) -> None:
        if self._scaling is not None:
            self._scaling.unscale(event.learner)

    def step(self, event: Step) -> None:
        assert self._scaling is not None
        # The host waits for the device here.
        if skipped := self._scaling.step(event.learner, event.proceed):
            self.skipped_steps += 1
            before, after = skipped
            raise CancelStepException(
                f"gradients overflowed: step skipped, scale {before:g} -> {after:g}"
            )

    def cleanup_step(self, event: CleanupStep) -> None:
        if self._reopen:
            self._reopen = False
            self._open(event)
        if self._scaling is not None:
            self._scaling.end_step(event.learner)

    def cleanup_fit(self, event: CleanupFit) -> None:
        if self._scaling is not None:
            self._scaling.end_fit(event.learner)
            self._scaling = None

    def state_dict(self) -> dict[str, Any]:
        """The number of skipped steps and, if there is a scaler, its state."""
        scaler = {} if self.scaler is None else {"scaler": self.scaler.state_dict()}
        return {"skipped_steps": self.skipped_steps, **scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.skipped_steps = state.get("skipped_steps", 0)
        if self.scaler is not None and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

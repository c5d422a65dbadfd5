"""The Learner: the loop with its model, data and callbacks, awaited by an async host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn, optim
from torch.nn import functional as F

from ..events import Bus, Callback, Predict
from .data import DataLoaders
from .fitting import Fitting
from .predictions import CollectPredictions, concatenate
from .preserve import preserved

if TYPE_CHECKING:
    from ..callbacks import LRFinderCB


class Learner(Fitting):
    """Trains a model, emitting events; what a batch does is up to a subclass or to callbacks.

    The loop, in full (`engine/loop.py`):

        BeforeFit
        for epoch in epochs, training and then validating:
            BeforeEpoch
            for batch in loader:
                BeforeBatch
                Predict, AfterPredict
                GetLoss, AfterLoss
                if training:
                    Backward, AfterBackward
                    BeforeStep, Step, ZeroGrad, AfterStep, CleanupStep
                AfterBatch, CleanupBatch
            AfterEpoch, CleanupEpoch
        AfterFit, CleanupFit

    Args:
        model: the module to train.
        dls: an object with `train` and `valid`, such as `DataLoaders`.
        loss_func: called as `loss_func(preds, targets)`, returns a scalar tensor.
        lr: the learning rate for `opt_func`.
        cbs: one callback, or several.
        opt_func: called as `opt_func(model.parameters(), lr)` for every fit that trains; None
            keeps `learner.opt`.
        bus: one to share with other learners; a new one by default.

    Attributes:
        model, dls, loss_func, lr, opt_func, bus: as given.
        opt: the optimizer of the last fit.
        batch, preds, loss: those of the current batch; receivers may replace them.
        epoch, n_epochs, iter, n_iter, training: where the loop is.
        done: what is completed, in this fit's training (in validation, while that runs):
            `done.epochs`, `done.batches`, `done.steps`.
        record: the numbers of the current epoch, which receivers may add to.
        result: the FitResult of the last fit, failed and cancelled ones too.
        cleanup_timeout: seconds that an async Cleanup* receiver gets once the host has
            cancelled.
        drain_timeout: seconds that observers get for what is left when the fit has ended.

    Source: the post's `Learner`, after fastai's miniai.
    """

    def __init__(
        self,
        model: nn.Module,
        dls: Any = None,
        loss_func: Callable[..., Any] = F.mse_loss,
        lr: float = 0.1,
        cbs: Callback | Iterable[Callback] | None = None,
        opt_func: Callable[..., Any] | None = optim.SGD,
        *,
        bus: Bus | None = None,
    ) -> None:
        super().__init__(bus)
        self.model = model
        self.dls = dls
        self.loss_func = loss_func
        self.lr = lr
        self.opt_func = opt_func
        self.add_cbs(cbs)

    async def validate(self, dl: Any = None) -> dict[str, Any]:
        """Run one validating epoch; return its numbers, such as "loss" and the metrics.

        Args:
            dl: the loader to use, `dls.valid` by default.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.
        """
        from ..callbacks import MetricsCB  # at call time: callbacks are built on the engine

        measured = any(isinstance(cb, MetricsCB) for cb in self.cbs)
        with self._validating(dl):
            result = await self.fit(1, train=False, cbs=None if measured else MetricsCB())
        numbers = dict(result.history[-1]) if result.history else {}
        return {key: value for key, value in numbers.items() if key not in ("epoch", "train")}

    async def get_preds(self, dl: Any = None, with_targets: bool = False) -> Any:
        """Predict for every sample of a loader, without a loss.

        Args:
            dl: the loader to use, `dls.valid` by default.
            with_targets: whether to return the targets, too.

        Returns:
            The predictions on the CPU, concatenated along their first dimension; with targets,
            a tuple of both.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.
        """
        collected = CollectPredictions(with_targets)
        with self._validating(dl):
            result = await self._fit(1, False, True, collected, None, actions=(Predict,))
        if not collected.preds:
            raise RuntimeError(
                f"no predictions: {result.who or 'nobody'} ended the run before the first"
                f" ({result.reason or 'every batch was skipped'})"
            )
        preds = concatenate(collected.preds)
        return (preds, concatenate(collected.targets)) if with_targets else preds

    async def lr_find(
        self, lr_mult: float = 1.3, start_lr: float = 1e-5, max_epochs: int = 10
    ) -> LRFinderCB:
        """Try rising learning rates; leave model, optimizer and random states as they were.

        Args:
            lr_mult: the factor from one step to the next.
            start_lr: the first learning rate.
            max_epochs: end after these, if the loss has not exploded before.

        Returns:
            The finder: its `suggestion("valley")`, `suggestions`, `lrs`, `losses`, `plot()`.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.

        Source: the post's `lr_find`, after fastai's.
        """
        from ..callbacks import LRFinderCB  # at call time: callbacks are built on the engine

        self._check_idle()
        finder = LRFinderCB(lr_mult)
        with preserved(self):
            await self.fit(max_epochs, valid=False, cbs=finder, lr=start_lr)
        return finder

    @contextmanager
    def _validating(self, dl: Any) -> Iterator[None]:
        """Use `dl`, if given, and leave the model in the mode that it was in."""
        self._check_idle()
        dls = self.dls
        modes = [(module, module.training) for module in self.model.modules()]
        if dl is not None:
            self.dls = DataLoaders(valid=dl)
        elif getattr(dls, "valid", None) is None:
            raise ValueError(
                "there is no data for this: dls.valid is missing. Give DataLoaders a valid loader,"
                " or pass one here: dl=..."
            )
        try:
            yield
        finally:
            self.dls = dls
            for module, training in modes:
                module.training = training

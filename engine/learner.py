"""The Learner: a model, its data and its callbacks, with a fit that an async host awaits."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, Never

from torch import nn, optim
from torch.nn import functional as F

from ..events import Bus, Callback
from ..events.types import numbers_of
from .checkpoint.preserve import preserved
from .run.arguments import (
    OF_A_FIT,
    OF_LR_FIND,
    check_loss_func,
    check_model,
    check_no_unknown,
)
from .run.fit import Fit
from .run.lr_finder import LRFinderCB
from .run.mean_loss import RecordMeanLoss
from .run.optimizer import check_opt
from .run.plan import FitPlan
from .run.prediction_stream import PredictionRun, PredictionStream
from .run.predictions import CollectPredictions, Keep, PredictionForm
from .run.result import FitResult
from .run.script import ScriptForms, has_script_form
from .run.validation import validating_on


class Learner(ScriptForms):
    """Trains a model and emits events. A subclass or callbacks define what is done in a batch.

    The loop, in full (`engine/loop/loop.py`):

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
        loss_func: called as `loss_func(preds, targets)`, returns a scalar tensor; None where the
            model returns the loss.
        lr: the learning rate for `opt_func`.
        cbs: one callback, or several.
        opt_func: called as `opt_func(model.parameters(), lr)` for every fit that trains; returns
            an optimizer, or a mapping of several by name. None keeps `learner.opt`.
        opt: instead of `opt_func`: an optimizer that is kept over all fits, with its state, or a
            mapping of several by name, which `learner.opt` then has as one (`Optimizers`).
        bus: a bus to share with other learners; by default a new one.

    Attributes:
        model, dls, loss_func, lr, opt_func, bus: as given.
        opt: the optimizer of the last fit.
        batch, preds, loss: those of the current batch; receivers may replace them.
        epoch, n_epochs, iter, n_iter, training: the current position.
        trains, validates: whether the fit has training epochs, and validation epochs.
        purpose: the purpose of the running fit, or of the last one: "fit", "validate", "predict"
            or "lr_find".
        n_steps: the number of optimizer steps that the fit will take if none is skipped; None if
            that is not known, because the training loader has no length.
        done: the progress in the current phase of the fit: `done.epochs`, `done.batches`,
            `done.steps`.
        record: the values recorded in the current epoch, to which receivers may add.
        result: the FitResult of the last fit, including failed and cancelled ones.
        cleanup_timeout: seconds that an async Cleanup* receiver gets after the host has cancelled.
        drain_timeout: seconds that observers get for their buffers after the fit has ended.

    Source: the post's `Learner`, after fastai's miniai.
    """

    def __init__(
        self,
        model: nn.Module,
        dls: Any = None,
        loss_func: Callable[..., Any] | None = F.mse_loss,
        lr: float = 0.1,
        cbs: Callback | Iterable[Callback] | None = None,
        opt_func: Callable[..., Any] | None = optim.SGD,
        *,
        opt: Any = None,
        bus: Bus | None = None,
        **unknown: Never,
    ) -> None:
        check_no_unknown(type(self).__name__, unknown)
        super().__init__(bus)
        self.model = check_model(model)
        self.dls = dls
        self.loss_func = check_loss_func(loss_func)
        self.lr = lr
        self.opt, self.opt_func = check_opt(opt, opt_func, self.model)
        if opt is not None and lr != 0.1:
            raise ValueError(
                f"lr={lr!r} has no effect with opt=..., which has rates of its own: set them there,"
                " or give fit(lr=...)"
            )
        self.add_cbs(cbs)

    n_inp: Any = None
    """What of a batch the model takes: see `TrainLearner`."""

    @has_script_form("run", OF_A_FIT)
    async def fit(
        self,
        n_epochs: int | None = None,
        train: bool = True,
        valid: bool = True,
        cbs: Callback | Iterable[Callback] | None = None,
        lr: float | None = None,
        *,
        max_steps: int | None = None,
        epoch_length: int | None = None,
        valid_length: int | None = None,
        run_id: str | None = None,
        resume: str | os.PathLike[str] | None = None,
        graceful: bool | float = False,
    ) -> FitResult:
        """Train and validate, for `n_epochs` or `max_steps`, in a separate thread.

        Returns, or raises, only when that thread has ended, however often the caller's task is
        cancelled meanwhile; a cancellation takes effect at the next event.

        Args:
            n_epochs: the number of epochs; each trains and then validates. By default 1 or, with
                `max_steps`, as many as that takes.
            train: whether to train.
            valid: whether to validate.
            cbs: callbacks for this fit only.
            lr: the learning rate for this fit only. An optimizer that is kept over fits
                (`opt=...`) gets it in its first group, and in the others in proportion.
            max_steps: end the fit after this many optimizer steps: the epoch in which the last one
                is taken is completed there, and validates. Steps that are skipped or accumulated
                do not count; those before a checkpoint do.
            epoch_length: the number of batches in a training epoch. Each continues where the last
                one has left the loader, which is begun again when it is exhausted. By default, an
                epoch is one pass over the loader.
            valid_length: validate on no more than the first `valid_length` batches of the loader.
            run_id: identifies the fit in its events, logs and result; by default a new random one,
                or the one of the run that is resumed.
            resume: a checkpoint to resume from as if the run had not been interrupted: its path,
                the path of a folder of checkpoints, or "last", which is the last undamaged
                checkpoint of the `CheckpointCB` among the callbacks; if there is none yet, the fit
                begins at the beginning. `n_epochs` includes the epochs before the checkpoint.
            graceful: let the first SIGTERM or SIGINT end the fit after the current batch, and let
                `CheckpointCB` save there; a second signal has its usual effect. A number is the
                seconds after which the fit is stopped at its next event instead; True means 25.
                For scripts; a host with its own signal handlers calls `stop(graceful=True)`.

        Raises:
            RuntimeError: this learner is fitting already, or another learner is fitting with one
                of the callbacks, which is not `shareable`.
            TypeError, ValueError: an argument, callback or loader is missing or wrong; raised
                before any work.
            CheckpointError: there is no checkpoint to resume from, or it is damaged.
            CheckpointMismatchError: the checkpoint does not fit; nothing has been changed.
            Exception: an error of a receiver, the model or the data, with a note that says where.
        """
        return await self._fit(
            FitPlan(
                n_epochs=n_epochs,
                max_steps=max_steps,
                epoch_length=epoch_length,
                valid_length=valid_length,
                train=train,
                valid=valid,
                cbs=cbs,
                lr=lr,
                run_id=run_id,
                resume=resume,
                graceful=graceful,
            )
        )

    async def _fit(self, plan: FitPlan) -> FitResult:
        return await Fit(self, plan).run()

    @has_script_form("run_validate")
    async def validate(self, dl: Any = None) -> dict[str, Any]:
        """Run one validation epoch; return its "loss" and other metrics.

        If a receiver cuts the epoch short, there are none: they would not be those of the loader.

        Args:
            dl: the loader to use, by default `dls.valid`.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.
        """
        cbs = () if any(cb.records_loss for cb in self.cbs) else RecordMeanLoss()
        result = await self._fit(
            FitPlan(train=False, cbs=cbs, purpose="validate", within=validating_on(self, dl))
        )
        row = result.history[-1] if result.history else {}
        return {} if "status" in row else numbers_of(row)

    @has_script_form("run_get_preds")
    async def get_preds(
        self, dl: Any = None, with_targets: bool = False, *, keep: Keep = None
    ) -> Any:
        """Predict for every sample of a loader, without a loss.

        Outputs in containers (tuples, mappings, dataclasses, a model's output class) are collected
        part by part. A list with as many items as the batch has samples is a list of samples, such
        as the dicts of a detector: the result is a list, too. What cannot be collected, such as a
        loss among the outputs, is an error at the first batch.

        Args:
            dl: the loader to use, by default `dls.valid`.
            with_targets: whether to return the targets as well.
            keep: what to collect of the predictions: a key, the name of an attribute, or the index
                of an item; several of these, for a tuple of as many; or a function of the
                predictions of a batch. By default all.

        Returns:
            The predictions on the CPU, concatenated along their first dimension, with floats of
            less than 32 bits as float32; with targets, a tuple of both. Where rows differ in shape
            between batches, such as sequences padded to the longest of their batch, a list with
            one tensor per sample.

        Raises:
            RuntimeError: a receiver has ended the run before the last batch; or as `fit`.
            ValueError, TypeError: the predictions cannot be collected; or as `fit`.

        Example:
            >>> import anyio, torch
            >>> from eventrain.engine import DataLoaders, TrainLearner
            >>> class Model(torch.nn.Linear):
            ...     def forward(self, x):
            ...         logits = super().forward(x)
            ...         return {"logits": logits, "norm": logits.norm()}
            >>> learner = TrainLearner(Model(3, 2), DataLoaders(valid=[torch.ones(4, 3)] * 2))
            >>> anyio.run(lambda: learner.get_preds(keep="logits")).shape
            torch.Size([8, 2])
        """
        collected = CollectPredictions(with_targets, keep)
        result = await self._fit(
            FitPlan(train=False, cbs=collected, purpose="predict", within=validating_on(self, dl))
        )
        return collected.result(result)

    def iter_preds(
        self,
        dl: Any = None,
        with_targets: bool = False,
        *,
        keep: Keep = None,
        buffer: int = 2,
    ) -> PredictionStream:
        """Predict batch by batch: `async for preds in learner.iter_preds(loader)`.

        `get_preds` keeps the predictions of all batches; this one keeps those of `buffer` batches.
        The fit waits while as many are waiting for their reader.

        Args:
            dl: the loader to use, by default `dls.valid`; it may be an async iterable of batches.
            with_targets, keep: as in `get_preds`. As nothing is joined, a batch may have any form,
                and a part such as a loss is allowed.
            buffer: the most batches to predict ahead of the one in use, 1 or more.

        Returns:
            An async iterator of the predictions of each batch, on the CPU, in the order of the
            loader; with targets, of tuples of both. Its errors are raised by the `async for`: those
            of `fit`, and a RuntimeError if a receiver has ended the run before the last batch. To
            leave the loop before its end, use `async with`, which stops the fit:

                async with learner.iter_preds(loader) as stream:
                    async for preds in stream:
                        break

        Raises:
            ValueError, TypeError: `keep` or `buffer` is not valid.

        Example:
            >>> import anyio, torch
            >>> from eventrain.engine import TrainLearner
            >>> learner = TrainLearner(torch.nn.Linear(3, 2))
            >>> async def main():
            ...     async for preds in learner.iter_preds([torch.ones(4, 3), torch.ones(1, 3)]):
            ...         print(preds.shape)
            >>> anyio.run(main)
            torch.Size([4, 2])
            torch.Size([1, 2])
        """

        async def fit(cbs: Callback) -> FitResult:
            within = validating_on(self, dl)
            return await self._fit(FitPlan(train=False, cbs=cbs, purpose="predict", within=within))

        return PredictionStream(PredictionRun(fit, PredictionForm(with_targets, keep), buffer))

    @has_script_form("run_lr_find", OF_LR_FIND)
    async def lr_find(
        self,
        lr_mult: float = 1.3,
        start_lr: float = 1e-5,
        max_epochs: int = 10,
        end_lr: float = 10.0,
    ) -> LRFinderCB:
        """Try increasing learning rates; restore model, optimizer and random states afterwards.

        Args:
            lr_mult: the factor from one step to the next.
            start_lr: the first learning rate.
            max_epochs: the most epochs. If they end first, higher learning rates are not tried:
                by default, the search takes 53 steps.
            end_lr: the highest learning rate. The search ends earlier when the loss explodes.

        Returns:
            The finder: its `suggestion("valley")`, `suggestions`, `lrs`, `losses`, `plot()`.

        Raises:
            RuntimeError, ValueError, TypeError: as `fit`.

        Source: the post's `lr_find`, after fastai's.
        """
        finder = LRFinderCB(lr_mult, end_lr)
        await self._fit(
            FitPlan(
                n_epochs=max_epochs,
                valid=False,
                cbs=finder,
                lr=start_lr,
                purpose="lr_find",
                within=preserved(self),
            )
        )
        return finder

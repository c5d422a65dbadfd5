"""The same training with other libraries, each as lean as its documentation allows.

Every peer receives the same batches unchanged, and uses plain SGD and the CPU. Anything that it
would do in addition to the training (progress bars, logs, checkpoints, validation) is off. Each
returns how long its loop took: its clock starts as late and stops as early as its hooks allow, so
that its preparations do not count.

With `measured`, it also computes the mean of the loss and one metric over all batches, with its own
metrics; accelerate has none, and uses torcheval as the loop by hand does.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from .by_hand import LR, Batches, Outcome, Task, torcheval


class Clock:
    """A clock whose two methods can be handlers of any event."""

    def start(self, *_: object) -> None:
        self._started = time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._started


class Stream:
    """The batches as a loader: some peers would take a list for several loaders."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, and all log lines except errors."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def ignite(task: Task, measured: bool) -> Outcome:
    """pytorch-ignite's Engine, from EPOCH_STARTED to EPOCH_COMPLETED."""
    from ignite.engine import Engine, Events
    from ignite.metrics import Accuracy, Average, MeanSquaredError

    def process(engine: Engine, batch: Any) -> Any:
        x, y = batch
        preds = task.model(x)
        loss = task.loss_func(preds, y)
        loss.backward()
        task.opt.step()
        task.opt.zero_grad()
        return loss, preds, y

    trainer, clock = Engine(process), Clock()
    if measured:
        Average(lambda output: output[0]).attach(trainer, "loss")
        metric = Accuracy if task.classes else MeanSquaredError
        metric(lambda output: output[1:]).attach(trainer, "metric")
    trainer.add_event_handler(Events.EPOCH_STARTED, clock.start)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, clock.stop)
    task.model.train()
    trainer.run(task.batches, max_epochs=1)
    numbers = dict(trainer.state.metrics)
    if measured and not task.classes:  # it divides by samples, not by elements
        numbers["metric"] /= task.batches[0][1][0].numel()
    return Outcome(clock.seconds, numbers)


def fastai(task: Task, measured: bool) -> Outcome:
    """fastai's Learner with torch's SGD, from before_train to after_train, after other callbacks.

    Without its Recorder, unless something is measured; the Recorder's loss is a moving average.
    """
    from fastai.callback.core import Callback, TrainEvalCallback
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, Recorder
    from fastai.metrics import accuracy, mse
    from fastai.optimizer import OptimWrapper
    from fastai.torch_core import default_device

    clock = Clock()

    class Timed(Callback):  # type: ignore[misc, unused-ignore]
        order = Recorder.order + 1
        before_train = staticmethod(clock.start)
        after_train = staticmethod(clock.stop)

    default_device(use=False)  # use the CPU even if there is a GPU
    learner = Learner(
        DataLoaders(Stream(task.batches), Stream([])),
        task.model,
        task.loss_func,
        OptimWrapper(opt=task.opt),
        lr=LR,
        cbs=[TrainEvalCallback, Timed],
        default_cbs=False,
    )
    if measured:
        learner.metrics = accuracy if task.classes else mse
        learner.add_cb(Recorder(add_time=False, train_metrics=True, valid_metrics=False))
    with learner.no_logging():
        learner.fit(1)
    return Outcome(clock.seconds, {"metric": learner.final_record[1]} if measured else {})


def lightning_trainer(task: Task, measured: bool) -> Outcome:
    """Lightning's Trainer in its barebones mode, from on_train_epoch_start to ..._end."""
    from lightning.pytorch import LightningModule, Trainer

    clock = Clock()
    numbers: dict[str, Any] = {}

    class Training(LightningModule):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model
            if measured:
                self.mean, self.metric = torchmetrics(task)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.opt

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            preds = self.model(x)
            loss = task.loss_func(preds, y)
            if measured:
                self.mean.update(loss.detach(), len(x))
                self.metric.update(preds.detach(), y)
            return loss

        def on_train_epoch_start(self) -> None:
            clock.start()

        def on_train_epoch_end(self) -> None:
            if measured:
                numbers.update(loss=self.mean.compute(), metric=self.metric.compute())
            clock.stop()

    trainer = Trainer(accelerator="cpu", devices=1, max_epochs=1, barebones=True)
    trainer.fit(Training(), Stream(task.batches))
    return Outcome(clock.seconds, numbers)


def lightning_fabric(task: Task, measured: bool) -> Outcome:
    """Lightning's Fabric: a loop by hand with its model, optimizer and backward."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, opt = fabric.setup(task.model, task.opt)
    if measured:
        mean, metric = torchmetrics(task)
    start = time.perf_counter()
    model.train()
    for x, y in task.batches:
        preds = model(x)
        loss = task.loss_func(preds, y)
        fabric.backward(loss)
        opt.step()
        opt.zero_grad()
        if measured:
            mean.update(loss.detach(), len(x))
            metric.update(preds.detach(), y)
    numbers = {"loss": mean.compute(), "metric": metric.compute()} if measured else {}
    return Outcome(time.perf_counter() - start, numbers)


def accelerate(task: Task, measured: bool) -> Outcome:
    """Hugging Face's accelerate: a loop by hand with its model, optimizer and backward."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, opt = accelerator.prepare(task.model, task.opt)
    if measured:
        mean, metric = torcheval(task)
    start = time.perf_counter()
    model.train()
    for x, y in task.batches:
        preds = model(x)
        loss = task.loss_func(preds, y)
        accelerator.backward(loss)
        opt.step()
        opt.zero_grad()
        if measured:
            mean.update(loss.detach(), weight=len(x))
            metric.update(preds.detach(), y)
    numbers = {"loss": mean.compute(), "metric": metric.compute()} if measured else {}
    return Outcome(time.perf_counter() - start, numbers)


PEERS: dict[str, Callable[[Task, bool], Outcome]] = {
    "pytorch-ignite": ignite,
    "fastai": fastai,
    "Lightning Trainer": lightning_trainer,
    "Lightning Fabric": lightning_fabric,
    "accelerate": accelerate,
}


def torchmetrics(task: Task) -> tuple[Any, Any]:
    """Return torchmetrics' mean of the loss, and its metric; they are installed with Lightning."""
    from torchmetrics import MeanMetric, MeanSquaredError
    from torchmetrics.classification import MulticlassAccuracy

    if task.classes:
        return MeanMetric(), MulticlassAccuracy(task.classes, average="micro")
    return MeanMetric(), MeanSquaredError()

"""The post, section by section, with eventrain: python -m examples.ultimate_training_loop.

Every section trains the post's CNN and prints the loss and accuracy of every epoch, as the post
does. `--section NAME` runs only one of them, and `--dataset fashion-mnist` uses the post's data.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from eventrain.callbacks import (
    AccelerateCB,
    ChannelLastCB,
    DeviceCB,
    GradientAccumulationCB,
    GradientClippingCB,
    LRFinderCB,
    MetricsCB,
    MixedTrainingCB,
    SingleBatchCB,
    SingleEpochCB,
    SummaryCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, FitResult, Learner, MomentumLearner, TrainLearner
from eventrain.events import CleanupEpoch
from torch import nn
from torcheval.metrics import MulticlassAccuracy

from .datasets import add_arguments, get_model, load

loss_func = nn.CrossEntropyLoss()


def new_metrics() -> MetricsCB:
    """Return metrics for the accuracy and the loss."""
    return MetricsCB(accuracy=MulticlassAccuracy())


def show(learner: Learner, n_epochs: int = 2) -> FitResult:
    """Fit, and print one line per epoch and phase as the post does, and why it ended early."""

    def line(event: CleanupEpoch) -> None:
        if event.metrics:
            numbers = {name: f"{value:.3f}" for name, value in event.metrics.items()}
            print({**numbers, "epoch": event.epoch, "train": "train" if event.training else "eval"})

    with learner.subscribe(CleanupEpoch, line):
        result = learner.run(n_epochs)
    if result.status != "completed":
        print(f"[{result.who}] {result.reason}")
    return result


def train_learner(dls: DataLoaders) -> None:
    """A subclass of Learner: the five actions as methods."""
    show(TrainLearner(get_model(), dls, cbs=new_metrics(), loss_func=loss_func))


def momentum(dls: DataLoaders) -> None:
    """A subclass of Learner: momentum, by another zero_grad."""
    show(MomentumLearner(get_model(), dls, cbs=new_metrics(), loss_func=loss_func))


def single_batch(dls: DataLoaders) -> None:
    """A callback that ends the fit after one batch."""
    cbs = [new_metrics(), SingleBatchCB()]
    show(MomentumLearner(get_model(), dls, cbs=cbs, loss_func=loss_func))


def single_epoch(dls: DataLoaders) -> None:
    """A callback that ends the fit after one epoch."""
    cbs = [new_metrics(), SingleEpochCB()]
    show(MomentumLearner(get_model(), dls, cbs=cbs, loss_func=loss_func))


def device(dls: DataLoaders) -> None:
    """Model and batches on this machine's device."""
    cbs = [new_metrics(), DeviceCB()]
    show(MomentumLearner(get_model(), dls, cbs=cbs, loss_func=loss_func))


def channels_last(dls: DataLoaders) -> None:
    """The channels-last memory format."""
    cbs = [new_metrics(), ChannelLastCB(), DeviceCB()]
    show(MomentumLearner(get_model(), dls, cbs=cbs, loss_func=loss_func))


def train_cb(dls: DataLoaders) -> None:
    """The five actions as a callback, on a plain Learner."""
    cbs = [TrainCB(), new_metrics(), DeviceCB()]
    show(Learner(get_model(), dls, loss_func=loss_func, cbs=cbs))


def accumulation(dls: DataLoaders) -> None:
    """Gradient accumulation and clipping."""
    cbs = [
        new_metrics(),
        ChannelLastCB(),
        DeviceCB(),
        GradientClippingCB(),
        GradientAccumulationCB(2),
    ]
    show(MomentumLearner(get_model(), dls, cbs=cbs, loss_func=loss_func))


def mixed_precision(dls: DataLoaders) -> None:
    """Mixed precision: fp16 with scaling on a GPU, bf16 on the CPU."""
    cbs = [new_metrics(), DeviceCB(), MixedTrainingCB()]
    show(MomentumLearner(get_model(), dls, cbs=cbs, loss_func=loss_func))


def accelerate(dls: DataLoaders) -> None:
    """Hugging Face Accelerate."""
    cbs = [new_metrics(), DeviceCB(), AccelerateCB()]
    show(Learner(get_model(), dls, cbs=cbs, loss_func=loss_func))


def lr_finder(dls: DataLoaders) -> None:
    """The learning-rate finder, as a callback for one fit."""
    finder = LRFinderCB()
    learner = MomentumLearner(
        get_model(), dls, lr=1e-4, cbs=[DeviceCB(), finder], loss_func=loss_func
    )
    show(learner, n_epochs=10)
    print({name: f"{lr:.2e}" for name, lr in finder.suggestions.items()})


def lr_find(dls: DataLoaders) -> None:
    """The learning-rate finder, as a method that restores everything afterwards."""
    learner = MomentumLearner(get_model(), dls, loss_func, cbs=DeviceCB())
    finder = learner.run_lr_find()
    for lr, loss in zip(finder.lrs[::6], finder.losses[::6], strict=True):
        print(f"{lr:.1e}  {loss:.3f}")
    print(f"suggestion: {finder.suggestion('valley'):.2e}; finder.plot() draws it")


def order(dls: DataLoaders) -> None:
    """The order of callbacks: their own, not that of the list; explain() prints it."""
    cbs = [SingleEpochCB(), new_metrics(), DeviceCB()]
    learner = MomentumLearner(get_model(), dls, loss_func=loss_func, cbs=cbs)
    learner.explain()
    show(learner, n_epochs=3)


def summary(dls: DataLoaders) -> None:
    """The table of layers that the post promises."""
    cbs = [SummaryCB(), SingleBatchCB()]
    show(TrainLearner(get_model(), dls, loss_func=loss_func, cbs=cbs))


SECTIONS: dict[str, Callable[[DataLoaders], None]] = {
    section.__name__.replace("_", "-"): section
    for section in (
        train_learner,
        momentum,
        single_batch,
        single_epoch,
        device,
        channels_last,
        train_cb,
        accumulation,
        mixed_precision,
        accelerate,
        lr_finder,
        lr_find,
        order,
        summary,
    )
}


def main() -> None:
    """Run the selected sections."""
    parser = argparse.ArgumentParser(prog="examples.ultimate_training_loop", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--section", choices=SECTIONS, help="default: all of them")
    args = parser.parse_args()
    dls = load(args)
    for name, section in SECTIONS.items():
        if args.section in (None, name):
            print(f"\n# {name}: {section.__doc__}")
            torch.manual_seed(0)
            section(dls)


if __name__ == "__main__":
    main()

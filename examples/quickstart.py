"""The post's CNN trained on real images: python -m examples.quickstart [--dataset ...].

On a terminal it shows its progress and writes its log to a file; otherwise it prints the log.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import ExitStack

import torch
from eventrain.callbacks import DeviceCB, MetricsCB, ProgressCB, StructlogCB
from eventrain.engine import MomentumLearner
from torch.nn import functional as F
from torcheval.metrics import MulticlassAccuracy

from .datasets import add_arguments, get_model, load


def main() -> None:
    """Train, and print a summary."""
    parser = argparse.ArgumentParser(prog="examples.quickstart", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--epochs", type=int, help="default: 10 for digits, 2 for fashion-mnist")
    parser.add_argument("--log", default="quickstart.jsonl", help="the log file, if on a terminal")
    args = parser.parse_args()
    epochs = args.epochs or {"digits": 10, "fashion-mnist": 2}[args.dataset]

    torch.manual_seed(0)
    dls = load(args)
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    with ExitStack() as stack:
        on_terminal = sys.stdout.isatty()
        log = stack.enter_context(open(args.log, "w")) if on_terminal else sys.stdout
        cbs = [DeviceCB(), metrics, ProgressCB(), StructlogCB(format="json", file=log)]
        learner = MomentumLearner(get_model(), dls, F.cross_entropy, lr=0.1, cbs=cbs)
        result = learner.run(epochs)

    last = metrics.history[-1]
    print(
        f"{result.status}: {result.epochs} epochs, {result.steps} steps in {result.seconds:.1f} s;"
        f" validation accuracy {last['accuracy']:.3f}, loss {last['loss']:.3f}"
        + (f"; the log is in {args.log}" if on_terminal else "")
    )


if __name__ == "__main__":
    main()

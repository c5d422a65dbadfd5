"""A training that can be stopped or killed, and started again: python -m examples.resumable.

It resumes where it was, and ends with the weights of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

from eventrain.callbacks import CheckpointCB, MetricsCB
from eventrain.engine import MomentumLearner, seed_everything
from eventrain.events import CleanupEpoch
from torch.nn import functional as F
from torcheval.metrics import MulticlassAccuracy

from .datasets import digits, get_model


def main() -> None:
    """Train, or resume the training."""
    parser = argparse.ArgumentParser(prog="examples.resumable", description=__doc__)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoints", type=Path, default=Path("checkpoints"))
    args = parser.parse_args()

    seed_everything(0)
    cbs = [
        MetricsCB(accuracy=MulticlassAccuracy()),
        CheckpointCB(args.checkpoints, every_epochs=1, every_batches=10),
    ]
    learner = MomentumLearner(get_model(), digits(), F.cross_entropy, lr=0.1, cbs=cbs)

    @learner.on(CleanupEpoch, where=lambda event: not event.training)
    def print_accuracy(event: CleanupEpoch) -> None:
        print(f"epoch {event.epoch}: accuracy {event.metrics.get('accuracy')}", flush=True)

    result = learner.run(args.epochs, resume="last", graceful=True)
    weights = hashlib.sha256()
    for tensor in learner.model.state_dict().values():
        weights.update(tensor.numpy().tobytes())
    print(f"{result.status}, {result.steps} steps, weights {weights.hexdigest()[:16]}")
    if result.status == "cancelled":
        print(f"{result.reason}; start it again to resume")


if __name__ == "__main__":
    main()

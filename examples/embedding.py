"""A fit inside an async application: python -m examples.embedding.

The application keeps running during the fit. It streams the epochs, and stops the fit when the
accuracy is good enough.
"""

from __future__ import annotations

import anyio
import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import EventStream, Learner, MomentumLearner
from eventrain.events import CleanupEpoch
from torch.nn import functional as F
from torcheval.metrics import MulticlassAccuracy

from .datasets import digits, get_model


async def heartbeat() -> None:
    """Simulate other work of the application."""
    ticks = 0
    try:
        while True:
            await anyio.sleep(0.01)
            ticks += 1
    finally:
        print(f"the application ticked {ticks} times during the fit")


async def watch(learner: Learner, stream: EventStream[CleanupEpoch]) -> None:
    """Print the accuracy of each validation, and stop the fit when it is good enough."""
    async for event in stream:
        print(f"epoch {event.epoch}: accuracy {event.metrics['accuracy']:.3f}")
        if event.metrics["accuracy"] > 0.9:
            learner.stop(reason="good enough")


async def main() -> None:
    """Train concurrently with a heartbeat and a watcher."""
    torch.manual_seed(0)
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learner = MomentumLearner(get_model(), digits(), F.cross_entropy, lr=0.1, cbs=metrics)
    async with (
        anyio.create_task_group() as tasks,
        learner.events(CleanupEpoch, where=lambda event: not event.training) as stream,
    ):
        tasks.start_soon(heartbeat)
        tasks.start_soon(watch, learner, stream)
        result = await learner.fit(50)
        tasks.cancel_scope.cancel()
    print(f"{result.status} by {result.who}: {result.reason}, after {result.epochs} epochs")


if __name__ == "__main__":
    anyio.run(main)

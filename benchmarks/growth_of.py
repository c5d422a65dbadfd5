"""One contender of `benchmarks.memory` that trains for long, in a process of its own.

Prints as JSON the memory of the process after a tenth of the batches, and at the end.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch, Event

from .by_hand import LR, Task, linear
from .memory_of import resident

Look = Callable[[], None]


def by_hand(task: Task, tenth: int, look: Look) -> None:
    """Plain PyTorch with a mean of the loss."""
    total = torch.zeros((), dtype=torch.float64)
    for i, (x, y) in enumerate(task.batches, 1):
        loss = task.loss_func(task.model(x), y)
        loss.backward()
        task.opt.step()
        task.opt.zero_grad()
        total.add_(loss.detach(), alpha=len(x))
        if i % tenth == 0:
            look()


def eventrain(task: Task, tenth: int, look: Look) -> None:
    """With MetricsCB, an observer of every event, and a stream of all events that nobody reads."""
    learner = TrainLearner(task.model, DataLoaders(task.batches), task.loss_func, LR, MetricsCB())
    learner.observe(lambda event: None, Event)
    learner.events(Event).open()
    learner.subscribe(AfterBatch, lambda event: look(), every=tenth)
    learner.run(1, valid=False)


CONTENDERS = {"by hand": by_hand, "eventrain, MetricsCB and observers": eventrain}


def growth(name: str, batches: int) -> dict[str, Any]:
    """Return MB in memory, allocated blocks, and objects tracked by the garbage collector."""
    torch.manual_seed(0)
    task = linear(batches)
    seen: list[tuple[float, int, int]] = []

    def look() -> None:
        gc.collect()
        seen.append((resident(), sys.getallocatedblocks(), len(gc.get_objects())))

    CONTENDERS[name](task, batches // 10, look)
    assert len(seen) == 10
    weights = [parameter.tolist() for parameter in task.model.parameters()]
    return {"first": seen[0], "last": seen[-1], "weights": weights}


def main() -> None:
    """Print the memory of one contender."""
    name, batches = sys.argv[1:]
    print(json.dumps(growth(name, int(batches))))


if __name__ == "__main__":
    main()

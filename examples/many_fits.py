"""Twenty fits at once in one event loop: python -m examples.many_fits [--backend trio].

A watcher stops one fit, and another one fails. The other eighteen end with the same weights, to the
bit, as when each runs alone afterwards; so does the failing one, up to its failure. The stopped one
is not compared: where it stops depends on when its watcher receives an event.

Each fit has a generator of its own, because torch's global one is shared by the whole process. The
engine cannot know that no fit uses the global one, so it logs `concurrent_fits_share_rng` once, on
standard error. The warning is left on: add a Dropout to the model, and the table shows why.
"""

from __future__ import annotations

import argparse
import sys
import threading
from hashlib import sha256
from typing import Any

import anyio
import structlog
import torch
from eventrain.engine import DataLoaders, EventStream, Learner, TrainLearner
from eventrain.events import BeforeBatch, CleanupEpoch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, skip_init
from torch.utils.data import DataLoader, Dataset

from .datasets import BATCH_SIZE, digits_in_memory

N_FITS, N_EPOCHS, STOPPED, FAILING = 20, 3, 6, 13


def make(number: int, data: Dataset[Any]) -> Learner:
    """Return a learner of a small network whose randomness all comes from its own generator."""
    generator = torch.Generator().manual_seed(number)
    # By default, a Linear draws its weights from the global generator.
    layers = skip_init(nn.Linear, 64, 32), nn.ReLU(), skip_init(nn.Linear, 32, 10)
    model = nn.Sequential(nn.Flatten(), *layers)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1, generator=generator)
    loader = DataLoader(data, BATCH_SIZE, shuffle=True, generator=generator)
    learner = TrainLearner(model, DataLoaders(loader), F.cross_entropy)
    if number == FAILING:
        learner.subscribe(BeforeBatch, spoil, where=lambda e: (e.epoch, e.iter) == (1, 5))
    return learner


def spoil(event: BeforeBatch) -> None:
    """Raise an error, as a receiver with a bug does."""
    raise ValueError("a spoilt batch")


async def fit(learner: Learner, n_epochs: int = N_EPOCHS) -> None:
    """Fit, and contain its errors, so that they do not cancel the other fits."""
    try:
        await learner.fit(n_epochs, valid=False)
    except Exception as exc:  # not BaseException: the host's cancellations must pass
        structlog.get_logger().error("fit_failed", error=repr(exc))  # also in learner.result


async def watch(learner: Learner, stream: EventStream[CleanupEpoch]) -> None:
    """Stop a fit from another task when its third epoch has ended."""
    async for event in stream:
        if event.epoch == 2:
            learner.stop(reason="seen enough")


async def compare() -> bool:
    """Run all fits together, then each alone; print a table, and return whether they agree."""
    (data, _), before = digits_in_memory(), threading.active_count()
    together = [make(number, data) for number in range(N_FITS)]
    watched = together[STOPPED]
    async with watched.events(CleanupEpoch) as stream, anyio.create_task_group() as tasks:
        tasks.start_soon(watch, watched, stream)
        for learner in together:
            tasks.start_soon(fit, learner, 100_000 if learner is watched else N_EPOCHS)
    print(f"threads: {before} before the fits, {threading.active_count()} after them\n")

    print("run  status     epochs  weights   as alone  who: reason")
    agree = True
    for number, learner in enumerate(together):
        same = "-"
        if learner is not watched:
            await fit(alone := make(number, data))
            same = "yes" if digest(learner) == digest(alone) else "no"
        agree &= same != "no"
        end = learner.result
        assert end is not None
        why = f"{end.who}: {end.reason}" if end.who else ""
        print(f"{number:3}  {end.status:9}  {end.epochs:6}  {digest(learner)}  {same:8}  {why}")
    return agree


def digest(learner: Learner) -> str:
    """Return a hash of the weights, of eight hexadecimal digits."""
    weights = parameters_to_vector(learner.model.parameters()).detach()
    return sha256(weights.numpy().tobytes()).hexdigest()[:8]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="examples.many_fits", description=__doc__)
    parser.add_argument("--backend", choices=["asyncio", "trio"], default="asyncio")
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    torch.set_num_threads(1)  # for each fit: more would only wait for each other
    sys.exit(not anyio.run(compare, backend=parser.parse_args().backend))

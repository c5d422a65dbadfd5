"""One contender of `benchmarks.memory`, in a process of its own; prints its results as JSON.

Batches are created on request, and nothing else holds them: only the loop keeps them alive.
"""

from __future__ import annotations

import gc
import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from eventrain.callbacks import MetricsCB, ProgressCB, StructlogCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterLoss, BeforeBatch, CancelBatchException, Event
from rich.console import Console
from torch import nn
from torch.nn import functional as F

WIDTH = 2**18
HIDDEN = 16
LR = 1e-6
MB = 2**20


@dataclass
class Loader:
    """The same random batches every time."""

    n: int
    rows: int
    device: str
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        random = torch.Generator(self.device).manual_seed(0)
        make = partial(torch.rand, generator=random, device=self.device, dtype=self.dtype)
        for _ in range(self.n):
            yield make(self.rows, WIDTH), make(self.rows, 2 * WIDTH)


def wide_model(device: str) -> nn.Module:
    """Return a model that is wide at its ends, so that tensors are large, but quick to train."""
    torch.manual_seed(0)
    layers = nn.PReLU(), nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, 2 * WIDTH)
    return nn.Sequential(*layers).to(device)


def sizes(rows: int) -> dict[str, float]:
    """Return the sizes of objects that a loop could keep, in MB."""
    row = WIDTH * 4 / MB
    return {
        "parameters": 3 * HIDDEN * row,
        "a batch": 3 * rows * row,
        "predictions": 2 * rows * row,
        "the graph of a batch": 3 * rows * row,
        "a batch of half precision": 1.5 * rows * row,
    }


# ------------------------------------------------------------------------------------- by hand


def by_hand(model: nn.Module, loader: Loader) -> None:
    """Plain PyTorch, with a variable for the predictions, as metrics need.

    It converts each batch, which does nothing to one that needs no conversion.
    """
    opt = torch.optim.SGD(model.parameters(), LR)
    device = next(model.parameters()).device
    model.train()
    for x, y in loader:
        x, y = x.to(device, torch.float32), y.to(device, torch.float32)
        preds = model(x)
        loss = F.mse_loss(preds, y)
        loss.backward()
        opt.step()
        opt.zero_grad()


def by_hand_nameless(model: nn.Module, loader: Loader) -> None:
    """Plain PyTorch without a variable for the predictions, which are freed with their graph."""
    opt = torch.optim.SGD(model.parameters(), LR)
    model.train()
    for x, y in loader:
        loss = F.mse_loss(model(x), y)
        loss.backward()
        opt.step()
        opt.zero_grad()


def by_hand_skipping(model: nn.Module, loader: Loader) -> None:
    """Plain PyTorch that skips the rest of every second batch, from the first, after its loss."""
    opt = torch.optim.SGD(model.parameters(), LR)
    model.train()
    skip = False
    for x, y in loader:
        preds = model(x)
        loss = F.mse_loss(preds, y)
        skip = not skip
        if skip:
            continue
        loss.backward()
        opt.step()
        opt.zero_grad()


def by_hand_validating(model: nn.Module, loader: Loader) -> None:
    """Plain PyTorch that does not train."""
    model.eval()
    with torch.no_grad():
        for x, y in loader:
            preds = model(x)
            F.mse_loss(preds, y)


# ----------------------------------------------------------------------------------- eventrain


def eventrain(
    prepare: Callable[[TrainLearner], object], training: bool = True
) -> Callable[[nn.Module, Loader], None]:
    """Return the training of a TrainLearner to which `prepare` attaches something."""

    def run(model: nn.Module, loader: Loader) -> None:
        learner = TrainLearner(model, DataLoaders(loader, loader), lr=LR)
        prepare(learner)
        learner.run(1, train=training, valid=not training)

    return run


def nothing(learner: TrainLearner) -> None:
    """No subscriber."""


def metrics(learner: TrainLearner) -> None:
    """The mean of the loss."""
    learner.add_cbs(MetricsCB())


def unread_streams(learner: TrainLearner) -> None:
    """Two streams that nobody reads: one is soon full, and the other holds all events."""
    learner.events(Event, buffer=16).open()
    learner.events(Event).open()


def shown(learner: TrainLearner) -> None:
    """One log line per batch, and progress bars."""
    console = Console(file=io.StringIO(), force_terminal=True)
    learner.add_cbs([StructlogCB(1, format="json", file=io.StringIO()), ProgressCB(console)])


def converting(learner: TrainLearner) -> None:
    """Move batches as DeviceCB does, and convert them to full precision."""

    def convert(event: BeforeBatch) -> None:
        device = next(learner.model.parameters()).device
        learner.batch = tuple(part.to(device, torch.float32) for part in learner.batch)

    learner.subscribe(BeforeBatch, convert)


def skipping(learner: TrainLearner) -> None:
    """Cancel every second batch after its loss."""

    def skip(event: AfterLoss) -> None:
        if event.iter % 2 == 0:
            raise CancelBatchException

    learner.subscribe(AfterLoss, skip)


class Contender(NamedTuple):
    """A loop, the one that it is compared with, and whether its batches need a conversion."""

    train: Callable[[nn.Module, Loader], None]
    base: str
    converting: bool = False


PLAIN, CONVERTING = "by hand, preds = model(x)", "by hand, converting batches"
SKIPPING, VALIDATING = "by hand, skipping batches", "by hand, validating"
CONTENDERS = {
    PLAIN: Contender(by_hand, PLAIN),
    "by hand, preds = model(x), again": Contender(by_hand, PLAIN),
    "by hand, F(model(x), y)": Contender(by_hand_nameless, PLAIN),
    "eventrain": Contender(eventrain(nothing), PLAIN),
    "eventrain, MetricsCB": Contender(eventrain(metrics), PLAIN),
    "eventrain, streams of all events, full": Contender(eventrain(unread_streams), PLAIN),
    "eventrain, StructlogCB and ProgressCB": Contender(eventrain(shown), PLAIN),
    CONVERTING: Contender(by_hand, CONVERTING, True),
    "eventrain, converting batches": Contender(eventrain(converting), CONVERTING, True),
    SKIPPING: Contender(by_hand_skipping, SKIPPING),
    "eventrain, skipping batches": Contender(eventrain(skipping), SKIPPING),
    VALIDATING: Contender(by_hand_validating, VALIDATING),
    "eventrain, validating": Contender(eventrain(nothing, training=False), VALIDATING),
}


def peak(name: str, rows: int, batches: int, device: str) -> tuple[float, str]:
    """Return a contender's peak memory in MB, including its parameters, and a hash of its weights.

    On the CPU, it is the memory of the process over that before; on a GPU, that allocated by torch.
    """
    train, _, converting = CONTENDERS[name]
    dtype = torch.float16 if converting else torch.float32
    loader = Loader(batches, rows, "cpu" if converting else device, dtype)
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident()
    model = wide_model(device)
    train(model, loader)
    most = resident("VmHWM") - before
    if device != "cpu":
        most = torch.accelerator.max_memory_allocated(device) / MB
    digest = hashlib.sha256()
    for value in model.state_dict().values():
        digest.update(value.cpu().numpy())
    return most, digest.hexdigest()


def resident(key: str = "VmRSS") -> float:
    """Return the resident memory of this process in MB: now, or its peak with "VmHWM"."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return int(found[1]) / 1024


def main() -> None:
    """Print the peak of one contender."""
    name, rows, batches, device = sys.argv[1:]
    print(json.dumps(peak(name, int(rows), int(batches), device)))


if __name__ == "__main__":
    main()

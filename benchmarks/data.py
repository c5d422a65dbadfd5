"""Images per second that the loaders yield, alone and while the post's CNN trains on them.

One pass over Fashion-MNIST in shuffled batches of 64: the post's own DataLoader, which makes one
image at a time, against loaders that make whole batches. Before anything is timed, the batches of
loaders listed with the same batches "to the bit" are compared with those of the post's DataLoader,
in order, through the whole pass; trainings with them must end with its weights. Loaders are created
before the clock starts. If there is a GPU, everything is measured again with the batches copied to
it, or kept there.

A dataset that is not in memory, JPEG files that the benchmark writes, is read by torch's DataLoader
without and with worker processes, by the threads of a ThreadLoader, and by SPDL if it is installed.

If other work keeps the cores busy, threads that share one operation wait for each other, for
milliseconds in operations of microseconds. OMP_NUM_THREADS=1 in the environment avoids that.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from eventrain.callbacks import to_device
from eventrain.engine import DataLoaders, Prefetcher, TensorLoader
from structlog.testing import capture_logs
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import transforms as T
from torchvision.datasets import FashionMNIST
from torchvision.transforms import v2

from examples.datasets import BATCH_SIZE, get_model

from .by_hand import Task, by_hand
from .jpegs import add_table
from .report import Report, Table, interleaved, over

SEED = 0
BITS, ROUNDED, REORDERED = "to the bit", "to 1e-6", "in another order"
Loader = Iterable[Any]


class Copied:
    """A loader whose batches are copied to a device as by the post's DeviceCB."""

    def __init__(self, loader: Loader, device: str) -> None:
        self.loader, self.device = loader, device

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield to_device(batch, self.device)


class ByHand:
    """The least possible work: index whole tensors, ready for the model, for each batch."""

    def __init__(self, data: FashionMNIST, device: str) -> None:
        self.images = data.data[:, None].float().div(255).sub(0.5).div(0.5).to(device)
        self.labels = data.targets.to(device)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        for where in torch.randperm(len(self.labels), device=self.labels.device).split(BATCH_SIZE):
            yield [self.images[where], self.labels[where]]


def of_the_post(data: FashionMNIST, device: str, num_workers: int = 0) -> Loader:
    """Return the post's DataLoader."""
    loader = DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, num_workers=num_workers)
    return loader if device == "cpu" else Copied(loader, device)


def ahead(data: FashionMNIST, device: str) -> Loader:
    """Return the same, read ahead in a thread, which also copies the batches."""
    return Prefetcher(of_the_post(data, "cpu"), None if device == "cpu" else device)


def from_dataset(data: FashionMNIST, device: str) -> Loader:
    """Return the engine's loader for the post's dataset."""
    with capture_logs():  # about the way that it chose
        loader = DataLoaders.from_dataset(data, None, BATCH_SIZE, device=device).train
    return cast(Loader, loader)


def tensors(data: FashionMNIST, device: str) -> Loader:
    """Return a TensorLoader of bytes in memory, with a transform of whole batches."""
    both = data.data[:, None], data.targets
    made = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize((0.5,), (0.5,))])
    return TensorLoader(*both, batch_size=BATCH_SIZE, shuffle=True, transform=made, device=device)


POST, FROM_DATASET = "the post's DataLoader", "DataLoaders.from_dataset"
# The second value says how far the batches equal those of the post's DataLoader.
CONTENDERS: dict[str, tuple[Callable[[FashionMNIST, str], Loader], str]] = {
    POST: (of_the_post, BITS),
    f"{POST}, again": (of_the_post, BITS),
    f"{POST}, num_workers=2": (partial(of_the_post, num_workers=2), BITS),
    f"Prefetcher({POST})": (ahead, BITS),
    FROM_DATASET: (from_dataset, BITS),
    "TensorLoader, v2 transform of a batch": (tensors, ROUNDED),
    "by hand, whole tensors": (ByHand, REORDERED),
}
TRAINED = [name for name, (_, same) in CONTENDERS.items() if same == BITS]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add_data_arguments(parser)
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument(
        "--jpegs", type=int, default=1200, metavar="N", help="JPEG files to write and read, or 0"
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the images."""
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with Fashion-MNIST")
    parser.add_argument("--images", type=int, metavar="N", help="use at most N images of each part")


def fashion_mnist(args: argparse.Namespace, train: bool) -> FashionMNIST:
    """Return the post's dataset: its part for training, or the other one.

    Raises:
        SystemExit: if it is not there.
    """
    transform = T.Compose([T.ToTensor(), T.Normalize((0.5,), (0.5,))])
    try:
        data = FashionMNIST(args.data, train=train, transform=transform)
    except RuntimeError as exc:
        raise SystemExit(
            f"Fashion-MNIST is not in {args.data}/FashionMNIST/raw: put its four files there, or"
            " point --data to where they are. `python -m examples.quickstart --dataset"
            f" fashion-mnist --data {args.data}` downloads them."
        ) from exc
    data.data, data.targets = data.data[: args.images], data.targets[: args.images]
    return data


def run(args: argparse.Namespace) -> Report:
    """Compare the batches, then time the loaders, on every device."""
    data, report = fashion_mnist(args, train=True), Report("data")
    about = f"{len(data)} images in batches of {BATCH_SIZE}, {args.repeats} repeats in turn"
    devices = ["cpu"]
    if (accelerator := torch.accelerator.current_accelerator(check_available=True)) is not None:
        devices.append(accelerator.type)
    else:
        report.notes.append("Left out: batches copied to a GPU or kept there, for lack of one.")
    for device in devices:
        loaders = {name: make(data, device) for name, (make, _) in CONTENDERS.items()}
        torch.manual_seed(SEED)
        right = list(loaders[POST])
        for name, loader in loaders.items():
            _check(name, loader, right)
        weights: dict[str, torch.Tensor] = {}
        reading = {name: partial(_read, loader) for name, loader in loaders.items()}
        training = {name: partial(_train, name, loaders[name], device, weights) for name in TRAINED}
        for title, works in {"One pass": reading, "An epoch of the post's CNN": training}.items():
            turns = {name: partial(_rate, work, len(data)) for name, work in works.items()}
            rates = interleaved(turns, args.repeats)
            columns = ("loader", "images a second, best", f"times {POST}, median", "same batches")
            table = Table(f"{title}, {device}: {about}", columns)
            for name, measured in rates.items():
                ratio = over(measured, rates[POST])[2]
                table.rows.append((name, max(measured), ratio, CONTENDERS[name][1]))
            report.tables.append(table)
    add_table(report, args.jpegs, args.repeats, _rate)
    return report


def _check(name: str, loader: Loader, right: list[Any]) -> None:
    """Check that a loader yields the batches that it should, from the same random state."""
    same = CONTENDERS[name][1]
    if same == REORDERED:
        return
    atol = 0 if same == BITS else 1e-6
    torch.manual_seed(SEED)
    for i, (batch, expected) in enumerate(zip(loader, right, strict=True)):
        message = f"{name}: batch {i} does not match that of {POST} {same}"
        torch.testing.assert_close([*batch], [*expected], rtol=0, atol=atol, msg=message)


def _rate(work: Callable[[], None], n: int) -> float:
    """Return images per second; every turn draws the same order."""
    gc.collect()  # garbage of the previous turn
    torch.manual_seed(SEED)
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return n / (time.perf_counter() - start)


def _read(loader: Loader) -> None:
    for _ in loader:
        pass


def _train(name: str, loader: Any, device: str, weights: dict[str, torch.Tensor]) -> None:
    """Train, and keep the weights of the first contender, which the others must end with."""
    model = get_model().to(device)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        by_hand(Task(model, loader, F.cross_entropy, classes=10))
    weights.update({} if weights else model.state_dict())
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), f"{name}: the CNN ends with other weights"

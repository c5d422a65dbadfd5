"""Images per second that loaders make of JPEG files: read, decoded, resized, normalised.

The benchmark writes the files. Before anything is timed, the batches of each loader are compared
with those of torch's DataLoader, to the bit and in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from eventrain.engine import ThreadLoader
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import transforms as T

from .report import Report, Table, interleaved, over

BATCH_SIZE, SIZE, CROP = 64, 320, 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN, SPDL = "DataLoader", "SPDL, num_threads=2"
Loader = Iterable[Any]


class Jpegs(Dataset[torch.Tensor]):
    """Files as images of shape (3, 224, 224), float32, in the way of trainings on ImageNet."""

    transform = T.Compose([T.Resize(CROP), T.ToTensor(), T.Normalize(MEAN, STD)])

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self.paths[index]) as image:
            pixels: torch.Tensor = self.transform(image.convert("RGB"))
            return pixels


def write_jpegs(folder: Path, n: int) -> list[str]:
    """Write images of 320x320 pixels: colours at several scales, which compress as photos do."""
    generator = torch.Generator().manual_seed(0)
    paths = [str(folder / f"{i}.jpg") for i in range(n)]
    for path in paths:
        image = torch.zeros(1, 3, SIZE, SIZE)
        for scale in (5, 20, 80, SIZE):
            layer = torch.rand(1, 3, scale, scale, generator=generator)
            image += F.interpolate(layer, SIZE, mode="bilinear") * scale**-0.5
        image -= image.amin()
        pixels = (image[0] / image.amax() * 255).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(path, quality=85)
    return paths


class Spdl:
    """SPDL's loader with the same samples, batches and order."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        from spdl.dataloader import DataLoader as SpdlLoader

        self.make, self.dataset = SpdlLoader, dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(
            self.make(
                range(len(self.dataset)),  # type: ignore[arg-type]
                preprocessor=self.dataset.__getitem__,
                batch_size=BATCH_SIZE,
                aggregator=default_collate,
                num_threads=2,
                output_order="input",
            )
        )


CONTENDERS: dict[str, Callable[[Dataset[Any]], Loader]] = {
    PLAIN: partial(DataLoader, batch_size=BATCH_SIZE),
    f"{PLAIN}, again": partial(DataLoader, batch_size=BATCH_SIZE),
    f"{PLAIN}, num_workers=2": partial(DataLoader, batch_size=BATCH_SIZE, num_workers=2),
    "ThreadLoader, num_threads=1": partial(ThreadLoader, batch_size=BATCH_SIZE, num_threads=1),
    "ThreadLoader, num_threads=2": partial(ThreadLoader, batch_size=BATCH_SIZE, num_threads=2),
    SPDL: Spdl,
}


def add_table(
    report: Report, n: int, repeats: int, rate: Callable[[Callable[[], None], int], float]
) -> None:
    """Compare the batches, then time the loaders.

    Args:
        report: gets the table, and a note on what was left out.
        n: the number of files; nothing is measured with 0.
        repeats: how often each loader reads all of them.
        rate: returns the images per second of something that reads that many.
    """
    if not n:
        return
    contenders = dict(CONTENDERS)
    try:
        Spdl(Jpegs([]))
    except ImportError as exc:
        del contenders[SPDL]
        report.notes.append(f"Left out: {SPDL}, as {exc}; pip install spdl-core.")
    with TemporaryDirectory() as folder:
        dataset = Jpegs(write_jpegs(Path(folder), n))
        loaders = {name: make(dataset) for name, make in contenders.items()}
        right = list(loaders[PLAIN])
        for name, loader in loaders.items():
            _check(name, loader, right)
        del right
        turns = {name: partial(rate, partial(_read, loaders[name]), n) for name in loaders}
        rates = interleaved(turns, repeats)
    columns = ("loader", "images a second, best", f"times {PLAIN}, median")
    title = (
        f"One pass over {n} JPEG files of {SIZE}x{SIZE}, in batches of {BATCH_SIZE},"
        f" {repeats} repeats in turn"
    )
    rows = [(name, max(m), over(m, rates[PLAIN])[2]) for name, m in rates.items()]
    report.tables.append(Table(title, columns, [*rows]))


def _check(name: str, loader: Loader, right: list[torch.Tensor]) -> None:
    for i, (batch, expected) in enumerate(zip(loader, right, strict=True)):
        assert torch.equal(batch, expected), f"{name}: batch {i} is not that of {PLAIN}"


def _read(loader: Loader) -> None:
    for _ in loader:
        pass

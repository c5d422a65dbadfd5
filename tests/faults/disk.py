"""A disk between the checkpoints and the system: it records, fails, waits or dies on demand."""

from __future__ import annotations

import builtins
import json
import os
import resource
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import Checkpoint, DataLoaders, MomentumLearner
from eventrain.engine.checkpoint import writer
from eventrain.engine.checkpoint.reader import checkpoints_in
from eventrain.events import AfterBatch
from torch import nn

OPERATIONS = ("mkdir", "open", "fsync", "rename", "unlink", "rmdir")


class Disk:
    """Sees every operation on files in a folder that could fail or be the last one.

    Those are the functions of `os` above, and opening, writing, flushing and closing a file that
    is written. Reading is left alone.

    Args:
        folder: what is elsewhere is left alone, too.
        before: called before each operation with its number, from 1 on, its name and its path.

    Attributes:
        done: name and path of what was done, in order; the path from `folder` on.
    """

    def __init__(self, folder: Path, before: Callable[[int, str, str], None] | None = None) -> None:
        self.folder = os.path.realpath(folder)
        self.before = before
        self.done: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}  # of what is open

    def insert(self, monkeypatch: pytest.MonkeyPatch) -> Disk:
        """Stand between, until `monkeypatch` undoes it."""
        for name in OPERATIONS:
            monkeypatch.setattr(os, name, self._seen(name, getattr(os, name)))
        monkeypatch.setattr(writer, "open", self._open, raising=False)
        return self

    def operate(self, name: str, path: str) -> None:
        if self.before is not None:
            self.before(len(self.done) + 1, name, path)
        self.done.append((name, path))

    def _seen(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, dir_fd: int | None = None, **options: Any) -> Any:
            is_open = isinstance(path, int)  # fsync(descriptor)
            place = self._paths.get(path) if is_open else self._place(path, dir_fd)
            if dir_fd is not None:
                options["dir_fd"] = dir_fd
            if place is None:
                return function(path, *args, **options)
            self.operate(name, place)
            result = function(path, *args, **options)
            if name == "open":
                self._paths[result] = place
            return result

        return call

    def _place(self, path: Any, dir_fd: int | None = None) -> str | None:
        """The path from our folder on; None if it is elsewhere."""
        name = os.fspath(path)
        if dir_fd is not None:
            parent = self._paths.get(dir_fd)
            return None if parent is None else os.path.normpath(os.path.join(parent, name))
        name = os.path.relpath(os.path.realpath(os.path.dirname(name)), self.folder)
        if name == ".." or name.startswith("../"):
            return "." if os.path.realpath(path) == self.folder else None
        return os.path.normpath(os.path.join(name, os.path.basename(path)))

    def _open(self, path: Any, mode: str = "r", *args: Any) -> Any:
        place = self._place(path)
        if place is None or "r" in mode:
            return builtins.open(path, mode, *args)
        self.operate("create", place)
        file = builtins.open(path, mode, *args)  # noqa: SIM115
        self._paths[file.fileno()] = place
        return _File(file, place, self)


class _File:
    def __init__(self, file: Any, place: str, disk: Disk) -> None:
        self._file, self._place, self._disk = file, place, disk

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            self._disk.operate("close", self._place)
        finally:
            self._file.close()

    def fileno(self) -> int:
        return self._file.fileno()  # type: ignore[no-any-return]

    def write(self, data: Any) -> int:
        self._disk.operate("write", self._place)
        return self._file.write(data)  # type: ignore[no-any-return]

    def flush(self) -> None:
        self._disk.operate("flush", self._place)
        self._file.flush()


# ---------------------------------------------------- a training, and what of it is in a process


def batches(n: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(4, 3, generator=generator) for _ in range(n)]
    return [(x, x.sum(1, keepdim=True)) for x in inputs]


def make_learner(width: int = 1) -> MomentumLearner:
    """A small one, that can be resumed; the same one every time."""
    torch.manual_seed(42)
    model = (
        nn.Linear(3, 1) if width == 1 else nn.Sequential(nn.Linear(3, width), nn.Linear(width, 1))
    )
    opt = partial(torch.optim.SGD, momentum=0.5)
    return MomentumLearner(model, DataLoaders(batches()), lr=0.01, opt_func=opt)


def tensors_of(learner: MomentumLearner) -> list[torch.Tensor]:
    """What the training changes: weights, and of each the gradient that is kept, and momentum."""
    parameters = list(learner.model.parameters())
    kept = [p.grad for p in parameters] + [
        learner.opt.state[p]["momentum_buffer"] for p in parameters
    ]
    return [tensor.detach().clone() for tensor in (*parameters, *kept)]


def die_at(n: int, folder: Path) -> None:
    """Go on training in `folder`; the n-th operation on its files is where this process ends."""

    def die(number: int, name: str, path: str) -> None:
        if number == n:
            os._exit(DIED)

    torch.set_num_threads(1)
    Disk(folder, die).insert(pytest.MonkeyPatch())
    make_learner().run(3, valid=False, cbs=CheckpointCB(folder, keep_last=2), resume="last")


DIED = 86


def run_out_of_space(folder: Path, limit: int | None = None) -> dict[str, Any]:
    """Train for ever, with checkpoints that are all kept; say how that ended.

    Args:
        folder: for the checkpoints.
        limit: of this process' files, in bytes; None where the disk has one.
    """
    torch.set_num_threads(1)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    learner = make_learner(width=100)
    alone = make_learner(width=100)
    try:
        learner.run(1000, valid=False, cbs=CheckpointCB(folder, keep_last=None))
    except OSError as exc:
        assert learner.result is not None
        every = learner.result.batches
        alone.subscribe(AfterBatch, lambda event: alone.stop(graceful=True), every=every)
        alone.run(1000, valid=False)
        same = all(map(torch.equal, tensors_of(learner), tensors_of(alone)))
        whole = [Checkpoint.load(path).position.epoch for path in checkpoints_in(folder)]
        return {
            "errno": exc.errno,
            "epochs": learner.epoch + 1,
            "whole": whole,
            "others": [p.name for p in folder.iterdir() if not p.name.startswith("checkpoint-")],
            "as without": same,
        }
    return {"errno": None}


if __name__ == "__main__":
    print(json.dumps(run_out_of_space(Path(sys.argv[1]))))

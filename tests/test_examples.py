"""The examples run as a newcomer runs them, in a process of their own."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torchvision.datasets import FashionMNIST

from examples import datasets
from examples.ultimate_training_loop import SECTIONS

ROOT = Path(__file__).parent.parent


def run(module: str, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"examples.{module}", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_quickstart_logs_every_epoch_as_json() -> None:
    done = run("quickstart", "--epochs", 2)
    assert done.returncode == 0, done.stderr
    *lines, summary = done.stdout.splitlines()
    records = [json.loads(line) for line in lines]
    epochs = [record for record in records if record["event"] == "epoch"]
    assert [(r["epoch"], r["phase"]) for r in epochs] == [
        (0, "train"),
        (0, "valid"),
        (1, "train"),
        (1, "valid"),
    ]
    measured = [record["metrics"] for record in epochs]
    assert all(m["loss"] > 0 and 0 <= m["accuracy"] <= 1 for m in measured)
    assert summary.startswith("completed: 2 epochs, 46 steps")
    assert done.stderr == ""


def test_quickstart_draws_on_a_terminal(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-m", "examples.quickstart", "--epochs", "1", "--log", str(log)]
    shown = b""
    main, terminal = pty.openpty()
    process = subprocess.Popen(command, cwd=ROOT, stdout=terminal, stderr=terminal)
    os.close(terminal)
    while chunk := _read(main):
        shown += chunk
    os.close(main)
    assert process.wait(60) == 0, shown.decode()
    assert "train accuracy" in shown.decode()
    assert json.loads(log.read_text().splitlines()[-1])["event"] == "fit_ended"


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 4096)
    except OSError:  # how Linux says that the other end is closed
        return b""


def test_quickstart_trains_on_fashion_mnist_found_in_a_folder(fashion_mnist: Path) -> None:
    done = run(
        "quickstart", "--dataset", "fashion-mnist", "--data", fashion_mnist.resolve(), "--epochs", 1
    )
    assert done.returncode == 0, done.stderr
    assert "completed: 1 epochs" in done.stdout


def test_every_section_of_the_post_runs() -> None:
    done = run("ultimate_training_loop")
    assert done.returncode == 0, done.stderr
    titles = [line for line in done.stdout.splitlines() if line.startswith("# ")]
    assert [title.split(":")[0] for title in titles] == [f"# {name}" for name in SECTIONS]
    assert "[SingleBatchCB.after_batch]" in done.stdout


def test_one_section_of_the_post_runs_on_its_own_data(fashion_mnist: Path) -> None:
    data = fashion_mnist.resolve()
    done = run(
        "ultimate_training_loop",
        *("--section", "order", "--dataset", "fashion-mnist", "--data", data),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("'train': ") == 2


def test_embedding_goes_on_ticking_and_stops_the_training() -> None:
    done = run("embedding")
    assert done.returncode == 0, done.stderr
    assert "cancelled by Learner.stop: good enough" in done.stdout


class _QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Nothing: the tests' output is theirs."""


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A mirror of Fashion-MNIST on loopback, with five images of ours."""
    folder = tmp_path / "mirror"
    folder.mkdir()
    images = struct.pack(">IIII", 0x803, 5, 28, 28) + bytes(range(196)) * 4 * 5
    labels = struct.pack(">II", 0x801, 5) + bytes([0, 1, 2, 3, 4])
    resources = []
    for name, _ in FashionMNIST.resources:
        content = gzip.compress(images if "images" in name else labels)
        (folder / name).write_bytes(content)
        resources.append((name, hashlib.md5(content).hexdigest()))
    handler = partial(_QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}/"
        monkeypatch.setattr(FashionMNIST, "mirrors", [url])
        monkeypatch.setattr(FashionMNIST, "resources", resources)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield folder
        server.shutdown()
        thread.join()


def test_a_training_that_is_stopped_and_killed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    alone = run("resumable", "--epochs", 12, "--checkpoints", tmp_path / "alone")
    assert alone.stdout.splitlines()[-1].startswith("completed, 276 steps")

    again = ["--epochs", "12", "--checkpoints", str(tmp_path / "disturbed")]
    command = [sys.executable, "-m", "examples.resumable", *again]
    for epoch, how, code in (0, signal.SIGTERM, 0), (1, signal.SIGKILL, -signal.SIGKILL):
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while not process.stdout.readline().startswith(f"epoch {epoch}"):
                assert process.poll() is None
            process.send_signal(how)
            *_, last = process.stdout.readlines() or [""]
        assert process.returncode == code
        assert last == ("received SIGTERM; start it again to resume\n" if code == 0 else last)
    resumed = run("resumable", *again)
    assert resumed.stdout.splitlines()[-1] == alone.stdout.splitlines()[-1]


def test_fashion_mnist_is_downloaded_where_it_is_missing(tmp_path: Path, mirror: Path) -> None:
    dls = datasets.fashion_mnist(tmp_path / "data")
    x, y = next(iter(dls.valid))
    assert x.shape == (5, 1, 28, 28)
    assert y.tolist() == [0, 1, 2, 3, 4]
    assert torch.allclose(x[0, 0, 0, :3], torch.tensor([0.0, 1.0, 2.0]) / 255 * 2 - 1)


def test_missing_data_says_both_ways_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])  # nobody listens
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    args = argparse.Namespace(dataset="fashion-mnist", data=tmp_path / "data")
    with pytest.raises(SystemExit, match=r"(?s)could not be downloaded.*--data.*--dataset digits"):
        datasets.load(args)

"""The trainings of examples/gallery are those of the loops by hand, also when they are resumed."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import FitResult, TrainLearner
from eventrain.events import BeforeBatch
from torch import nn

ROOT = Path(__file__).parents[2]
NAMES = sorted(p.stem for p in (ROOT / "examples" / "gallery").glob("*.py") if p.stem[0] != "_")
PAGE = ROOT / "docs" / "gallery.md"

SMALL: dict[str, dict[str, Any]] = {
    "diffusion": {"max_steps": 40, "epoch_length": 15},
    "gcn": {"n_epochs": 10},
    "reinforce": {"n_epochs": 2, "valid": False},
    "word_language_model": {"n_epochs": 12},  # after which the rate has fallen
    "dcgan": {"n_epochs": 2, "valid": False},
    "time_sequence_prediction": {"n_epochs": 4},  # LBFGS remembers the last steps
    "actor_critic": {"n_epochs": 2, "valid": False},
    "nanogpt": {"max_steps": 250, "valid": False},
}
"""The arguments of a shorter fit, for those that have other arguments than `n_epochs`."""

each_training = pytest.mark.parametrize("name", NAMES)


def example(name: str) -> Any:
    return importlib.import_module(f"examples.gallery.{name}")


def by_hand(name: str) -> Any:
    return importlib.import_module(f"tests.gallery.by_hand.{name}")


def small(name: str) -> dict[str, Any]:
    return SMALL.get(name, {"n_epochs": 2})


def learner_of(name: str, seed: int = 0) -> TrainLearner:
    torch.manual_seed(seed)
    return example(name).make_learner()


def state(*modules: nn.Module) -> list[torch.Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def state_of(learner: TrainLearner) -> list[torch.Tensor]:
    """The state of the model, and of the modules that callbacks have, such as averages."""
    held = [value for cb in learner.cbs for value in vars(cb).values()]
    modules = [learner.model, *(value for value in held if isinstance(value, nn.Module))]
    return state(*dict.fromkeys(modules))


@cache
def whole(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor], FitResult]:
    """The state before and after a short fit, and its result."""
    learner = learner_of(name)
    before = state_of(learner)
    result = learner.run(**small(name))
    return before, state_of(learner), result


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert len(one) == len(other) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@each_training
def test_it_is_the_training_by_hand_to_the_bit(name: str) -> None:
    torch.manual_seed(0)
    trained = by_hand(name).train(**small(name))
    right = state(*trained) if isinstance(trained, tuple) else state(trained)
    before, after, result = whole(name)
    assert result.status == "completed"
    assert_equal(after, right)
    assert any(not torch.equal(a, b) for a, b in zip(before, right, strict=True))


@each_training
def test_it_is_resumed_in_the_middle_to_the_bit(name: str, tmp_path: Path) -> None:
    _, after, result = whole(name)
    middle = (result.batches + result.valid_batches) // 3
    first = learner_of(name)
    batches = iter(range(middle))

    @first.on(BeforeBatch)
    def stop(event: BeforeBatch) -> None:
        if next(batches, None) is None:
            first.stop(graceful=True)

    stopped = first.run(**small(name), cbs=CheckpointCB(tmp_path))
    assert stopped.status == "cancelled"
    second = learner_of(name, seed=1)
    resumed = second.run(**small(name), cbs=CheckpointCB(tmp_path), resume="last")
    assert resumed.status == "completed"
    assert_equal(state_of(second), after)
    assert resumed.history == result.history


@each_training
def test_it_prints_a_number(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = example(name)
    shorter = {key: value for key, value in small(name).items() if key in module.FIT}
    monkeypatch.setattr(module, "FIT", module.FIT | shorter)
    monkeypatch.setattr(sys, "argv", [name])
    module.main()
    assert re.search(r"\d", capsys.readouterr().out)


def test_one_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "examples.gallery.mnist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"accuracy 0\.\d+\n", done.stdout)


# ---------------------------------------------------------------------------------- the page


def definitions(module: Any) -> dict[str, Any]:
    """The functions and classes of a file, without `main`."""
    nodes = ast.parse(inspect.getsource(module)).body
    defined = [n for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    return {node.name: node for node in defined if node.name != "main"}


def names_in(node: Any) -> set[str]:
    return {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}


def n_lines(module: Any, node: Any) -> int:
    """The lines of a function or class that are neither empty nor a docstring."""
    text = inspect.getsource(module).splitlines()
    lines = {i for i in range(node.lineno, node.end_lineno + 1) if text[i - 1].strip()}
    for inner in ast.walk(node):
        if isinstance(inner, ast.Expr) and is_string(inner.value):
            lines -= set(range(inner.lineno, inner.end_lineno + 1))
    return len(lines)


def is_string(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def lines_here(name: str) -> int:
    """The lines of an example that the loop by hand does not use: those that replace it."""
    defined = definitions(example(name))
    used, shared = set(), set(vars(by_hand(name))) & set(defined)
    while shared - used:
        found = (shared - used).pop()
        used.add(found)
        shared |= names_in(defined[found]) & set(defined)
    return sum(n_lines(example(name), defined[key]) for key in set(defined) - shared)


def lines_by_hand(name: str) -> int:
    module = by_hand(name)
    return sum(n_lines(module, node) for node in definitions(module).values())


def rows() -> Iterator[list[str]]:
    for line in PAGE.read_text().splitlines():
        if line.startswith("| ["):
            yield [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_has_a_row_for_each_training_with_its_lines() -> None:
    counts = {name: [str(lines_here(name)), str(lines_by_hand(name))] for name in NAMES}
    shown = {re.findall(r"\((?:.*/)?(\w+)\.py\)", first)[0]: cells for first, *cells in rows()}
    assert {name: cells[:2] for name, cells in shown.items()} == counts


@each_training
def test_a_file_is_short(name: str) -> None:
    source = Path(example(name).__file__).read_text()
    assert len([line for line in source.splitlines() if line.strip()]) <= 60

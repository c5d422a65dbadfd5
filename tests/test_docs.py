"""Every example in the docstrings and in the README runs, and prints what it says it prints."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import eventrain.callbacks
import eventrain.engine
import eventrain.events
import pytest
from eventrain.engine.loop.loop import Loop

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PACKAGES = (eventrain.engine, eventrain.events, eventrain.callbacks)
MODULES = [
    f"{package.__name__}.{module.name}"
    for package in PACKAGES
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert failed == 0


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_names_every_public_thing(package: object) -> None:
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert sorted(public) == sorted(package.__all__)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_class_says_what_it_is(package: object) -> None:
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name} has no docstring"
            assert not value.__doc__.startswith(f"{name}("), f"{name} has a generated docstring"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def numbers_masked(text: str) -> str:
    return re.sub(r"\d+\.\d+", "#", text).strip()


def test_readme_code_runs_and_prints_what_it_says(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    printed = []
    for code in blocks("python"):
        if code.startswith(("@scope", "async with", '"""Fits in a FastAPI app')):
            continue  # parts of files: held to their sources below
        exec(compile(code, "README.md", "exec"), namespace)
        printed.append(numbers_masked(capsys.readouterr().out))
    first, *others = blocks("text")
    assert printed[0] == numbers_masked(first)
    for other in others:
        assert any(numbers_masked(other) in text for text in printed), other


def test_readme_shows_the_loop_as_it_is() -> None:
    (shown,) = (code for code in blocks("python") if code.startswith("@scope"))
    source = textwrap.dedent(
        "\n".join(
            inspect.getsource(method)
            for method in (Loop.one_fit, Loop.one_epoch, Loop.one_batch, Loop.one_step)
        )
    )
    assert shown.strip() == source.strip()


def test_readme_shows_the_embedding_example_as_it_is() -> None:
    (shown,) = (code for code in blocks("python") if code.startswith("async with"))
    example = (ROOT / "examples" / "embedding.py").read_text()
    assert textwrap.indent(shown, "    ").strip() in example


def test_readme_shows_the_fastapi_example_as_it_is() -> None:
    (shown,) = (code for code in blocks("python") if code.startswith('"""Fits in a FastAPI app'))
    assert shown == (ROOT / "examples" / "embed_fastapi.py").read_text()
    assert len(shown.splitlines()) < 60


def test_every_promise_to_the_host_is_held_by_a_test_that_exists() -> None:
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    rows = re.findall(r"^\| .* \| (`test_.*`) \|$", README, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(test_\w+)`", row)]
    assert len(rows) == 18
    assert set(named) <= tests


def test_files_that_the_docs_point_to_are_there() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "records.md"):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_fault_is_tried_by_a_test_that_exists() -> None:
    named = re.findall(r"`(\w+\.py)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 20
    assert set(named) <= {path.name for path in (ROOT / "tests").rglob("*.py")}


def test_readme_loop_is_under_twenty_lines() -> None:
    code = blocks("python")[0]
    assert sum(bool(line.strip()) for line in code.splitlines()) < 20

"""The code in docstrings, the README and the docs runs, and prints what they say it prints."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import anyio
import eventrain.callbacks
import eventrain.engine
import eventrain.events
import pytest
from eventrain.engine import TrainLearner
from eventrain.events import Callback

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
PACKAGES = (eventrain.engine, eventrain.events, eventrain.callbacks)
MODULES = sorted(
    module.name
    for package in PACKAGES
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
)


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


# -------------------------------------------------------------------------------- docstrings


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    failed, _ = doctest.testmod(
        importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    )
    assert failed == 0


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_all_names_every_public_thing(package: ModuleType) -> None:
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert sorted(public) == sorted(package.__all__)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_class_says_what_it_is(package: ModuleType) -> None:
    for name in package.__all__:
        value = getattr(package, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"{name} has no docstring"
            assert not value.__doc__.startswith(f"{name}("), f"{name} has a generated docstring"


# ------------------------------------------------------------------------------ code on pages


@dataclass
class Block:
    """A fenced block: its language, the rest of its first line, and what is in it."""

    language: str
    info: str
    text: str
    line: int

    @property
    def title(self) -> str | None:
        """The file that it is a part of."""
        found = re.search(r'title="([^"]+)"', self.info)
        return found and found[1]

    @property
    def is_loop(self) -> bool:
        return self.text.startswith("@scope")

    @property
    def runs(self) -> bool:
        return self.language == "python" and not self.title and not self.is_loop


def blocks(page: Path, language: str | None = None) -> list[Block]:
    source = page.read_text()
    fences = re.finditer(r"^( *)```(\w+)(.*)\n((?s:.*?))^\1```$", source, re.MULTILINE)
    found = [
        Block(
            fence[2],
            fence[3],
            textwrap.dedent(fence[4]),
            source.count("\n", 0, fence.start()) + 2,
        )
        for fence in fences
    ]
    return [block for block in found if language in (None, block.language)]


MASKED = re.compile(
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?(\+00:00|Z)?"  # times
    r"|\b[0-9a-f]{12}\b"  # run ids
    r"|\d+\.\d+(e[-+]?\d+)?"  # decimal numbers
)


def masked(text: str) -> str:
    lines = (line.rstrip() for line in MASKED.sub("#", text).splitlines())
    return "\n".join(lines).strip()


def execute(code: CodeType, namespace: dict[str, Any]) -> None:
    """As a notebook does: `await` may stand outside of functions."""
    if code.co_flags & inspect.CO_COROUTINE:
        anyio.run(FunctionType(code, namespace))
    else:
        exec(code, namespace)


@pytest.mark.parametrize(
    "page",
    [
        page
        for page in PAGES
        # What records.md prints is checked by tests/callbacks/test_records.py.
        if page.name != "records.md" and any(block.runs for block in blocks(page))
    ],
    ids=page_id,
)
def test_the_code_on_a_page_runs_and_prints_what_the_page_shows(
    page: Path,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From top to bottom, in one namespace. A text or json block right after code is its output."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    found = blocks(page)
    for block, after in zip(found, [*found[1:], None], strict=True):
        if not block.runs:
            continue
        code = compile(
            "\n" * (block.line - 1) + block.text,
            str(page),
            "exec",
            flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT,
        )
        execute(code, namespace)
        shown = after.text if after and after.language in ("text", "json") else ""
        printed = capsys.readouterr().out
        assert masked(printed) == masked(shown), f"{page.name}, line {block.line}"


def test_the_loop_is_shown_as_it_is() -> None:
    names = ("one_fit", "one_epoch", "one_batch", "one_step")
    (loop,) = (cls for cls in TrainLearner.__mro__ if set(names) <= vars(cls).keys())
    source = "\n".join(inspect.getsource(vars(loop)[name]) for name in names)
    for page in (README, DOCS / "explanation" / "loop.md"):
        (shown,) = (block.text for block in blocks(page, "python") if block.is_loop)
        assert shown.strip() == textwrap.dedent(source).strip(), page.name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_parts_of_files_are_shown_as_they_are(page: Path) -> None:
    for block in blocks(page):
        for path in re.findall(r'^--8<-- "(.+)"$', block.text, re.MULTILINE):
            assert (ROOT / path).is_file(), path
        if block.title and "--8<--" not in block.text:
            file = (ROOT / block.title).read_text()
            parts = (textwrap.indent(block.text, " " * depth) for depth in range(0, 20, 4))
            assert any(part in file for part in parts), f"{page.name}, line {block.line}"


def test_the_guide_on_embedding_shows_both_examples() -> None:
    titles = [block.title for block in blocks(DOCS / "guides" / "embedding.md", "python")]
    assert {"examples/embedding.py", "examples/embed_fastapi.py"} <= set(titles)
    assert len((ROOT / "examples" / "embed_fastapi.py").read_text().splitlines()) < 60


# --------------------------------------------------------------------------------- the README


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 160  # its two commands are a line each


def test_the_readmes_two_commands_are_those_of_the_home_page() -> None:
    commands = [block.text for block in blocks(README, "sh")]
    assert len(commands) == 2
    assert [block.text for block in blocks(DOCS / "index.md", "sh")] == commands


def test_the_readmes_example_is_under_twenty_lines() -> None:
    code = blocks(README, "python")[0].text
    assert sum(bool(line.strip()) for line in code.splitlines()) < 20


def test_the_readmes_cost_table_repeats_figures_of_the_page_on_costs() -> None:
    costs = (DOCS / "explanation" / "costs.md").read_text()
    section = README.read_text().split("\n## What it costs\n")[1].split("\n## ")[0]
    figures = [
        figure
        for row in re.findall(r"^\| (?!\||---).*\|$", section, re.MULTILINE)
        for figure in re.findall(r"(?<!\w)[-+]?\d+(?:[.,]\d+)*", row.rsplit("|", 2)[1])
    ]
    assert len(figures) >= 5
    assert [figure for figure in figures if figure not in costs] == []


# -------------------------------------------------------------------------------------- tables


def test_every_promise_is_held_by_a_test_that_exists() -> None:
    tests = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^(?:async )?def (test_\w+)", file.read_text(), re.MULTILINE)
    }
    page = (DOCS / "explanation" / "guarantees.md").read_text()
    rows = re.findall(r"^\| .* \| (`test_.*`) \|$", page, re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(test_\w+)`", row)]
    assert len(rows) == 20
    assert set(named) <= tests


def test_every_fault_is_tried_by_a_test_that_exists() -> None:
    page = (DOCS / "explanation" / "faults.md").read_text()
    named = re.findall(r"`(\w+\.py)`", page)
    assert len(named) > 20
    assert set(named) <= {path.name for path in (ROOT / "tests").rglob("*.py")}


def test_the_table_of_orders_has_every_callback_with_its_order() -> None:
    page = (DOCS / "guides" / "callbacks.md").read_text()
    rows = re.findall(r"^\| (-?(?:\d+|inf)) \| (.*) \|$", page, re.MULTILINE)
    listed = {name: float(order) for order, cell in rows for name in re.findall(r"`(\w+)`", cell)}
    public = (getattr(eventrain.callbacks, name) for name in eventrain.callbacks.__all__)
    orders = {
        value.__name__: float(value.order)
        for value in public
        if inspect.isclass(value) and issubclass(value, Callback) and value is not Callback
    }
    assert {**dict.fromkeys(orders, 0.0), **listed} == orders


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_that_a_page_points_to_are_there(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", text):
        assert (page.parent / target).exists(), target


# ----------------------------------------------------------------------------------- reference


def test_the_reference_has_every_public_name_once() -> None:
    identifiers = [
        identifier
        for page in (DOCS / "reference").glob("*.md")
        for identifier in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
    ]
    for identifier in identifiers:
        package, _, name = identifier.rpartition(".")
        assert name in importlib.import_module(package).__all__, identifier
    names = Counter(identifier.rpartition(".")[2] for identifier in identifiers)
    assert names == dict.fromkeys({name for package in PACKAGES for name in package.__all__}, 1)


def test_every_page_is_in_the_sites_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"[\w/-]+\.md", navigation)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page != README)

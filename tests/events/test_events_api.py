"""What `eventrain.events` exports, and what it may import."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path
from types import ModuleType

import eventrain.events
import pytest
from eventrain.events import CancelException, Event

MODULES = [
    importlib.import_module(f"eventrain.events.{module.name}")
    for module in pkgutil.iter_modules(eventrain.events.__path__)
]


def test_all_lists_the_public_names_and_nothing_else() -> None:
    shown = {
        name
        for name, value in vars(eventrain.events).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert shown == set(eventrain.events.__all__)
    assert len(eventrain.events.__all__) == len(shown)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_event_and_cancel_of_a_module_is_exported(module: ModuleType) -> None:
    public = {
        name
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, Event | CancelException)
        and not name.startswith("_")
    }
    assert public - set(eventrain.events.__all__) == set()


@pytest.mark.parametrize("name", eventrain.events.__all__)
def test_every_exported_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(eventrain.events, name))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_events_know_no_engine(module: ModuleType) -> None:
    tree = ast.parse(Path(module.__file__ or "").read_text())
    above = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and (node.level > 1 or (node.module or "").startswith("eventrain"))
    ]
    assert above == []

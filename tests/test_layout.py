"""No room of the packages uses what another room keeps to itself.

The directions of the imports are a contract of import-linter, in pyproject.toml.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import eventrain.callbacks
import eventrain.engine
import eventrain.events

ROOT = Path(__file__).parent.parent
FILES = [path for room in ("engine", "events", "callbacks") for path in (ROOT / room).rglob("*.py")]


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def imported(path: Path) -> Iterator[tuple[Path, str]]:
    """The names that a file imports from within the packages, with their folder or file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1]
            source = base.joinpath(*(node.module or "").split("."))
            for name in node.names:
                yield source, name.name


def test_no_private_name_or_module_is_imported_from_another_room() -> None:
    wrong = []
    for path in FILES:
        for source, name in imported(path):
            private = is_private(name) or is_private(source.name)
            # A room may use the private modules of the rooms around it.
            if private and source.parent not in (path.parent, *path.parent.parents):
                wrong.append(f"{path.relative_to(ROOT)}: {source.name}.{name}")
    assert wrong == []


def private_attributes(tree: ast.AST) -> Iterator[tuple[str, bool]]:
    """The private attributes that are used, and whether on `self` or `cls`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "super")
            yield node.attr, own


def defined(tree: ast.AST) -> set[str]:
    """The private names that are defined: functions, assigned names, attributes of self, slots."""
    names = {attr for attr, own in private_attributes(tree) if own}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


OF_OTHERS = {
    "_call_impl",  # nn.Module's
    "_compiled_call_impl",
    "_computed",  # of torchmetrics
    "_current_frames",  # sys's
    "_fields",  # a namedtuple's
    "_load_from_state_dict",  # nn.Module's
    "_load_state_dict_pre_hooks",
    "_modules",
    "_non_persistent_buffers_set",
    "_opt_called",  # of torch's schedulers
    "_replace",  # a namedtuple's
    "_update_count",  # of torchmetrics
}


def test_no_private_attribute_of_another_room_is_used() -> None:
    of_room: dict[Path, set[str]] = {}
    trees = {path: ast.parse(path.read_text()) for path in FILES}
    for path, tree in trees.items():
        of_room.setdefault(path.parent, set()).update(defined(tree))
    wrong = [
        f"{path.relative_to(ROOT)}: {attr}"
        for path, tree in trees.items()
        for attr, own in private_attributes(tree)
        if not own and attr not in of_room[path.parent] | OF_OTHERS
    ]
    assert wrong == []


def test_each_public_name_has_one_home() -> None:
    packages = (eventrain.events, eventrain.engine, eventrain.callbacks)
    homes = Counter(name for package in packages for name in package.__all__)
    assert {name for name, n in homes.items() if n > 1} == set()


def test_the_engine_writes_its_log_lines_in_one_place() -> None:
    """G20: `engine/log.py`. StructlogCB's lines are those of its user's logger."""
    users = {
        str(path.relative_to(ROOT))
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute | ast.Name)
        and (node.attr if isinstance(node, ast.Attribute) else node.id)
        in ("get_logger", "getLogger", "getlogger")
    }
    assert users == {"engine/log.py", "callbacks/reporting/logs.py"}

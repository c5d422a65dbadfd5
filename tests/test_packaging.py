"""What is installed: nothing below the three packages is left out of the wheel."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = [
    path.relative_to(ROOT)
    for package in ("callbacks", "engine", "events")
    for path in (ROOT / package).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
]


def test_every_folder_with_modules_is_a_package() -> None:
    """setup.py finds packages by their `__init__.py`."""
    folders = {path.parent for path in FILES if path.suffix == ".py"}
    assert len(folders) >= 3
    assert [str(folder) for folder in folders if folder / "__init__.py" not in FILES] == []


def test_every_other_file_is_declared_as_package_data() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = pyproject["tool"]["setuptools"]["package-data"]["*"]
    others = [path for path in FILES if path.suffix != ".py"]
    assert len(others) >= 3  # the `py.typed` of each
    assert [str(path) for path in others if not any(map(path.match, patterns))] == []

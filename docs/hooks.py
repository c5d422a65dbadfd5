"""Hooks of the site's build: where the reference reads its docstrings, and that it is offline."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

PACKAGES = ("events", "engine", "callbacks")
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?(?:https?:)?//[^\s"'>]+"""
    r"""|<link\b[^>]*\brel=["']?(?:stylesheet|preload|preconnect|icon)[^>]*(?:https?:)?//[^\s"'>]+"""
)

_packages = tempfile.TemporaryDirectory(prefix="eventrain-docs-")


def on_startup(**_: Any) -> None:
    """Lay the three folders out as the packages that users import.

    The docstrings are read from the files, without importing them, so the site can be built where
    neither torch nor this project is installed.
    """
    package = Path(_packages.name, "eventrain")
    package.mkdir(exist_ok=True)
    for name in PACKAGES:
        link = package / name
        if not link.exists():
            link.symlink_to(Path(__file__).parents[1] / name, target_is_directory=True)


@event_priority(100)  # before mkdocstrings reads it
def on_config(config: Any) -> Any:
    """Have mkdocstrings look there, and not in what happens to be installed."""
    python = config.plugins["mkdocstrings"].config.handlers["python"]
    python["paths"] = [_packages.name]
    return config


def on_post_build(config: Any) -> None:
    """Fail if a page would load a script, a style sheet, a font or an image from elsewhere.

    Raises:
        RuntimeError: naming the page and what it would load.
    """
    for page in Path(config.site_dir).rglob("*.html"):
        if found := LOADED.search(page.read_text()):
            raise RuntimeError(f"{page.name} loads something from the network: {found[0]}")

"""Output in a notebook that is updated in place."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class CellOutput:
    """One output of the cell that is running, shown again and again in the same place.

    It needs no widgets, and stays as it was shown last when the notebook is saved.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, thing: object) -> None:
        """Show `thing`, by its rich representation, in place of what was shown before."""
        if self._handle is None:
            self._handle = import_module("IPython.display").display(thing, display_id=True)
        else:
            self._handle.update(thing)

    def clear(self) -> None:
        """Show nothing, where something was shown."""
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)

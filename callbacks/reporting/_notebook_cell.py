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
    """One output of the running cell, which is updated in place.

    It needs no widgets, and a saved notebook has its last state.
    """

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, thing: object) -> None:
        """Show `thing`, by its rich representation, instead of the thing shown before."""
        if self._handle is None:
            self._handle = import_module("IPython.display").display(thing, display_id=True)
        else:
            self._handle.update(thing)

    def clear(self) -> None:
        """Remove the thing that is shown, if any."""
        if self._handle is not None:
            self._handle.update({"text/plain": ""}, raw=True)

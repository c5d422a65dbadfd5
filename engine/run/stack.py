"""The stack of a thread, for log lines that say what a fit is waiting for."""

from __future__ import annotations

import sys
import traceback


def thread_stack(thread: int | None) -> list[str]:
    """The most informative frames of a thread, the innermost first.

    These are the three innermost ones, the first of the user's code, and the first of eventrain.
    """
    frame = sys._current_frames().get(thread or 0)
    stack = [] if frame is None else list(traceback.walk_stack(frame))
    roots = [f.f_globals.get("__name__", "").partition(".")[0] for f, _ in stack]
    users = [i for i, root in enumerate(roots) if root not in _LIBRARIES]
    eventrain = [i for i, root in enumerate(roots) if root == "eventrain"]
    shown = {0, 1, 2, *users[:1], *eventrain[:1]}
    return [
        f"{f.f_code.co_filename}:{line} in {f.f_code.co_qualname}"
        for i, (f, line) in enumerate(stack)
        if i in shown
    ]


_LIBRARIES = sys.stdlib_module_names | {"torch", "eventrain"}

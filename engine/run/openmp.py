"""Ends idle OpenMP threads of the host, which would slow the training thread down.

Every thread that calls torch gets its own OpenMP worker threads. If all of them together, including
idle ones, are more than the cores, libgomp no longer lets a waiting thread spin but puts it to
sleep. If the host has used torch, the workers of the training thread then sleep and wake at every
operation. On two cores, the post's CNN took 16.8 ms per batch instead of 12.9, with 77 context
switches per batch instead of none.

So a fit begins by ending the idle workers of the thread that awaits it. They are created again
when that thread needs them; nothing else changes.

Source: `omp_pause_resource_all`, OpenMP 5.0, section 3.2.44.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft: keep settings such as the number of threads


def end_idle_threads() -> None:
    """End this thread's idle OpenMP worker threads, where torch comes with libgomp."""
    pause = _omp_pause()
    if pause is not None:
        pause(_SOFT)


@cache
def _omp_pause() -> Callable[[int], int] | None:
    """The function of the libgomp that torch has loaded; None if torch uses another library."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        function = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return None

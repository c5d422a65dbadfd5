"""Idle OpenMP threads of the host, which would slow the training thread down.

Every thread that calls torch gets OpenMP worker threads of its own. Where all of them together
are more than the cores, libgomp no longer lets a waiting one spin but puts it to sleep, idle
ones counted in: a thread of ours beside a host that has used torch then sleeps and wakes at
every operation. On two cores the post's CNN took 16.8 ms a batch instead of 12.9 for it, with
77 context switches a batch instead of none.

So a fit begins by ending the idle ones of the thread that awaits it. They are made again when
that thread needs them; nothing else is changed.

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
    """The function of the libgomp that torch has loaded; None where it uses another."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        function = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return None

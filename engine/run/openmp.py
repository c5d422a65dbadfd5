"""Ends idle OpenMP threads of the host, which would slow the training thread down.

Every thread that calls torch gets its own OpenMP worker threads. If all of them together, including
idle ones, are more than the cores, libgomp no longer lets a waiting thread spin but puts it to
sleep. If the host has used torch, the workers of the training thread then sleep and wake at every
operation. On two cores, the post's CNN took 16.8 ms per batch instead of 12.9, with 77 context
switches per batch instead of none.

So a fit begins by ending the idle workers of the thread that awaits it. They are created again
when that thread needs them; nothing else changes.

In a forked process it does not: if the parent has used torch, libgomp would wait for ever for
workers that the fork did not copy. The training thread itself has workers of its own.

Source: `omp_pause_resource_all`, OpenMP 5.0, section 3.2.44.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

_SOFT = 1  # omp_pause_soft: keep settings such as the number of threads
_FORKED = 0x40  # PF_FORKNOEXEC: the process has not replaced the program since it was forked
_IMPORTED_IN = os.getpid()


def end_idle_threads() -> None:
    """End this thread's idle OpenMP worker threads, where torch comes with libgomp."""
    pause = _omp_pause()
    if pause is not None and not _is_forked():
        pause(_SOFT)


@cache
def _omp_pause() -> Callable[[int], int] | None:
    """The function of the libgomp that torch has loaded; None if torch uses another library."""
    for path in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        function = getattr(ctypes.CDLL(str(path)), "omp_pause_resource_all", None)
        if function is not None:
            return function  # type: ignore[no-any-return]
    return None


def _is_forked() -> bool:
    """Whether this process is a fork of another one, or may be.

    The system knows it also of a parent that has used torch, but not eventrain.

    Source: `/proc/pid/stat`, field 9, proc_pid_stat(5); `PF_FORKNOEXEC` in Linux's sched.h.
    """
    if os.getpid() != _IMPORTED_IN:
        return True
    try:
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        return bool(int(fields[6]) & _FORKED)
    except (OSError, IndexError, ValueError):
        return True

"""Which callbacks the running fits of this process use, so that no two fits mix their numbers."""

from __future__ import annotations

import os
from collections.abc import Iterable

from ...events import Callback
from ..loop.state import LoopState

_users: dict[int, tuple[int, LoopState]] = {}
"""The process and the learner that fits with a callback, by the callback's id."""


def reserve(callbacks: Iterable[Callback], learner: LoopState) -> None:
    """Reserve callbacks for the running fit of a learner, all of them or none.

    Callbacks that are `shareable` are left out. There is no lock, which a child process could
    inherit while it is held: `setdefault` is atomic.

    Raises:
        RuntimeError: another learner is fitting with one of them.
    """
    entry = os.getpid(), learner
    reserved: list[Callback] = []
    for callback in callbacks:
        if vars(type(callback)).get("shareable"):  # not inherited: a subclass may keep something
            continue
        pid, user = _users.setdefault(id(callback), entry)
        if pid != entry[0]:  # inherited by a fork from a process in which a fit was running
            user = learner
            _users[id(callback)] = entry
        if user is not learner:
            release(reserved, learner)
            name = type(callback).__qualname__
            raise RuntimeError(
                f"run {learner.run_id} cannot use this {name}, because run {user.run_id} is"
                f" using it: their numbers would be mixed. Make a {name} for each fit; or set"
                " `shareable = True` in its class if it keeps no state of a fit"
            )
        reserved.append(callback)


def release(callbacks: Iterable[Callback], learner: LoopState) -> None:
    """Release those callbacks that are reserved for a learner."""
    for callback in callbacks:
        if _users.get(id(callback), (0, None))[1] is learner:
            del _users[id(callback)]

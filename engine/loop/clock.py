"""How far a fit goes: its epochs, the batches of an epoch, and its optimizer steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from .state import LoopState

EPOCHS_WITHOUT_STEP = 100
"""After this many epochs in a row without an optimizer step, `max_steps` is not waited for."""


def epochs_of(loop: LoopState) -> Iterator[int]:
    """The indices of a fit's epochs: up to `n_epochs`, and none after `max_steps`.

    Raises:
        RuntimeError: `max_steps` alone ends the fit, and for many epochs no step has been taken.
    """
    first = loop.batch_reader.first_epoch
    done, waited = loop.progress[True].steps, 0
    for epoch in count(first) if loop.n_epochs is None else range(first, loop.n_epochs):
        if has_taken_its_steps(loop):
            return
        yield epoch
        steps = loop.progress[True].steps
        done, waited = steps, 0 if steps != done else waited + 1
        if waited == EPOCHS_WITHOUT_STEP and loop.n_epochs is None:
            raise RuntimeError(
                f"max_steps={loop.max_steps} is never reached: no optimizer step was taken in"
                f" {waited} epochs, although each was begun. Look at `end` of CleanupStep and"
                " CleanupEpoch for who cancels them, or give n_epochs"
            )


def epoch_length(loop: LoopState, length: int | None) -> int | None:
    """The number of batches in the current epoch, None if it is not known.

    Args:
        loop: the loop, at the beginning of the epoch.
        length: the length of the epoch's loader, None if that is not known.
    """
    if loop.training:
        return length if loop.epoch_length is None else loop.epoch_length
    bounds = [n for n in (length, loop.valid_length) if n is not None]
    return min(bounds, default=None)


def has_taken_its_steps(loop: LoopState) -> bool:
    """Whether a fit with `max_steps` has taken them."""
    return loop.max_steps is not None and loop.progress[True].steps >= loop.max_steps


def is_last_epoch(loop: LoopState) -> bool:
    """Whether no epoch follows the current one, unless this one is cancelled."""
    return loop.epoch + 1 == loop.n_epochs or has_taken_its_steps(loop)


def until_last_step(loop: LoopState, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches of an epoch until `max_steps` are taken; no further one is read."""
    iterator = iter(batches)
    while not has_taken_its_steps(loop):
        try:
            yield next(iterator)  # without a name: it would keep the batch alive
        except StopIteration:
            return


def expected_steps(loop: LoopState, length: int | None, cbs: Iterable[Any]) -> int | None:
    """The number of optimizer steps that a fit will take if none is skipped or cancelled.

    Args:
        loop: the loop, at the beginning of a fit.
        length: the length of its training loader, None if that is not known.
        cbs: its callbacks, which may take fewer steps than there are batches.
    """
    if not loop.trains:
        return 0
    if loop.n_epochs is None:
        return loop.max_steps
    n = length if loop.epoch_length is None else loop.epoch_length
    if n is None:
        return None
    for cb in cbs:
        n = cb.steps_in(n)
    total: int = n * loop.n_epochs
    return total if loop.max_steps is None else min(total, loop.max_steps)

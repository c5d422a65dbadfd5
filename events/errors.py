"""Errors of receivers: which receiver raised one, and which of several errors is raised.

Source: the notes of PEP 678.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .base import ActionEvent, Event
from .cancel import CancelException


def annotate_error(exc: BaseException, who: str, event: Event) -> BaseException:
    """Unwrap an error, and note which receiver raised it and on which event; return it.

    For a receiver that caused its own event until Python's limit, return an error that says so.
    """
    exc = unwrap(exc)
    if isinstance(exc, CancelException) and exc.who is None:
        exc.who = who
    where = "".join(
        f", {name} {getattr(event, name)}" for name in ("epoch", "iter") if hasattr(event, name)
    )
    note = f"raised by {who} on {type(event).__name__}{where}"
    if note in getattr(exc, "__notes__", ()):
        if not isinstance(exc, RecursionError):
            return exc
        exc = RecursionError(_calls_itself(who, type(event)))
    exc.add_note(note)
    return exc


def _calls_itself(who: str, event_type: type[Event]) -> str:
    name = event_type.__name__
    if issubclass(event_type, ActionEvent):
        instead = f"in a callback, call event.proceed(); in a learner, super().{event_type.hook}()"
        return f"{who} performs {name}, which calls it again, without end: {instead}"
    return f"{who} emits {name}, which calls it again, without end: emit another event there"


def who_raised(exc: BaseException) -> str | None:
    """The receiver named by the first note of `annotate_error`, None without such a note."""
    for note in getattr(exc, "__notes__", ()):
        if found := re.match(r"raised by (.+) on \w+", note):
            return found[1]
    return None


def most_severe(errors: Iterable[BaseException]) -> BaseException:
    """Choose which of several exceptions to raise: an error, or else the widest cancel.

    If several are equally severe, it is the first of them.

    Example:
        >>> from eventrain.events import CancelBatchException
        >>> most_severe([CancelBatchException(), KeyError("x"), ValueError()])
        KeyError('x')
    """
    return max(
        errors, key=lambda exc: exc.width if isinstance(exc, CancelException) else float("inf")
    )


def text_of(exc: BaseException, as_text: Callable[[Any], str] = repr) -> str:
    """The text of an exception; the name of its class if the user's `__repr__` or `__str__` fails.

    Example:
        >>> text_of(ValueError("x")), text_of(ValueError("x"), str)
        ("ValueError('x')", 'x')
    """
    try:
        return as_text(exc)
    except Exception:
        return type(exc).__qualname__


def unwrap(exc: BaseException) -> BaseException:
    """Extract an exception from the exception groups in which task groups wrapped it.

    A group of one is replaced by its member. In a group of several, errors take precedence over
    cancels: the group without its cancels is returned, or the widest cancel if there are no errors.

    Example:
        >>> unwrap(ExceptionGroup("", [ExceptionGroup("", [KeyError("x")])]))
        KeyError('x')
    """
    if not isinstance(exc, BaseExceptionGroup):
        return exc
    _, errors = exc.split(CancelException)
    leaves = list(_leaves(errors or exc))
    return most_severe(leaves) if errors is None or len(leaves) == 1 else errors


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for exc in group.exceptions:
        if isinstance(exc, BaseExceptionGroup):
            yield from _leaves(exc)
        else:
            yield exc

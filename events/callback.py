"""A callback: one idea of training, as a group of receivers.

Its methods named after events (`before_batch`, `after_loss`, ...) receive them while it is
attached to a learner; a method named after an action (`predict`, `get_loss`, `backward`,
`step`, `zero_grad`) performs it. Either may be an `async def`.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

from .types import HOOKS, ActionEvent, Event

Overflow = Literal["drop_oldest", "latest", "block"]


class Callback:
    """Base class of all callbacks.

    Attributes:
        order: lower ones run earlier; equal ones in the order they were attached in.
        run_after: callback classes, or their names, that run before this one if present,
            whatever their `order`.
        run_before: the same, for those that run after it.
        observes: events given to its method `observe(event)`, plain or async, beside the
            training on the host's event loop instead of inside it.
        buffer, overflow: for those; see `Learner.observe`.

    Raises:
        TypeError: when the class is made, for a method that looks like an event's and is none.

    Example:
        >>> from eventrain.events import AfterBatch, Callback, CancelFitException
        >>> class StopWhenGood(Callback):
        ...     def __init__(self, loss):
        ...         self.loss = loss
        ...
        ...     def after_batch(self, event: AfterBatch):
        ...         if event.training and event.loss.item() < self.loss:
        ...             raise CancelFitException(f"loss below {self.loss}")
        >>> class Typo(Callback):
        ...     def after_bach(self, event): ...
        Traceback (most recent call last):
            ...
        TypeError: Typo.after_bach receives no event: did you mean 'after_batch'? ...

    Source: fastai's miniai; `run_after` and `run_before` are fastai's.
    """

    order: float = 0
    run_after: Sequence[str | type[Callback]] = ()
    run_before: Sequence[str | type[Callback]] = ()
    observes: tuple[type[Event], ...] = ()
    buffer: int = 1024
    overflow: Overflow = "drop_oldest"

    _PREFIXES: ClassVar = ("before_", "after_", "cleanup_")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, value in vars(cls).items():
            if HOOKS.get(name) is ActionEvent:
                raise TypeError(
                    f"{cls.__qualname__}.{name} would never be called: exactly one receiver"
                    " performs each action, by a method of the action's own name"
                )
            if name.startswith("_") or name in HOOKS:
                continue
            if isinstance(value, type) or name in vars(Callback):
                continue
            if not callable(getattr(cls, name)):  # of a classmethod, say, only the bound one is
                continue
            near = difflib.get_close_matches(name, HOOKS, n=1, cutoff=0.85)
            if near or name.startswith(cls._PREFIXES):
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(HOOKS)}."
                raise TypeError(
                    f"{cls.__qualname__}.{name} receives no event: {hint} A method of your own"
                    f" needs another name, or an underscore in front: _{name}"
                )
        if cls.observes and not callable(getattr(cls, "observe", None)):
            raise TypeError(f"{cls.__qualname__} has `observes`, but no method `observe`")

    def receivers(self, learner: Any) -> Iterator[tuple[type[Event], Callable[[Any], Any]]]:
        """Yield (event class, method) for each event it receives from `learner`."""
        for hook, event_type in HOOKS.items():
            method = getattr(self, hook, None)
            if callable(method) and event_type is not ActionEvent:
                yield event_type, method

    def wants(self, event: Event) -> bool:
        """Whether an event of `observes` is worth handing to `observe`; asked in the training
        thread, so it must be quick."""
        return True

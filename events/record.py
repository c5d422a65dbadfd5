"""A helper for tests: the emitted events as a list.

Source: structlog's `capture_logs`.
"""

from __future__ import annotations

import math
from typing import Protocol

from .base import Event
from .closing import Closing
from .subscription import Subscription


class _Source(Protocol):
    def subscribe(
        self, event_type: type[Event], receiver: object, /, *, order: float
    ) -> Subscription: ...


class record_events(list[Event], Closing):  # noqa: N801 - it is used like a function
    """A list to which every event of a bus or a learner is appended, until it is closed.

    Events are recorded before any other receiver can cancel. Actions are not recorded.

    Args:
        source: a `Bus`, or a `Learner` (on a shared bus: only its events).

    Example:
        >>> from eventrain.events import BeforeFit, Bus, record_events
        >>> bus = Bus()
        >>> with record_events(bus) as events:
        ...     bus.send(BeforeFit(None, "r1", time=0.0, purpose="fit", n_epochs=1, n_steps=4))
        >>> events.names
        ['BeforeFit']
    """

    def __init__(self, source: _Source) -> None:
        super().__init__()
        self._subscription = source.subscribe(Event, self.append, order=-math.inf)

    @property
    def names(self) -> list[str]:
        """The class names of the events."""
        return [type(event).__name__ for event in self]

    def close(self) -> None:
        """Stop recording; closing again is harmless."""
        self._subscription.close()

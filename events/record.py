"""A testing helper, ours and the user's: what was emitted, as a list.

Source: the idea is structlog's `capture_logs`.
"""

from __future__ import annotations

import math
from typing import Protocol

from .bus import Subscription
from .closing import Closing
from .types import Event


class _Source(Protocol):
    def subscribe(
        self, event_type: type[Event], receiver: object, /, *, order: float
    ) -> Subscription: ...


class record_events(list[Event], Closing):  # noqa: N801 - reads as the function it replaces
    """A list that grows by every event a bus or a learner emits, until it is closed.

    It is recorded first, before any other receiver can cancel. The actions are not recorded.

    Args:
        source: a `Bus`, or a `Learner` (on a shared bus: its events alone).

    Example:
        >>> from eventrain.events import BeforeFit, Bus, record_events
        >>> bus = Bus()
        >>> with record_events(bus) as events:
        ...     bus.send(BeforeFit(learner=None, run_id="r1", time=0.0, n_epochs=1))
        >>> events.names
        ['BeforeFit']
    """

    def __init__(self, source: _Source) -> None:
        super().__init__()
        self._subscription = source.subscribe(Event, self.append, order=-math.inf)

    @property
    def names(self) -> list[str]:
        """The names of the events' classes."""
        return [type(event).__name__ for event in self]

    def close(self) -> None:
        """Stop recording; again is harmless."""
        self._subscription.close()

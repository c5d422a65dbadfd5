"""The part of a learner for subscriptions: callbacks, receivers, streams and observers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn, Self, TextIO, TypeVar

from ...events import Bus, Callback, Event, Subscription
from ...events.callback import Overflow
from ...events.subscription import check_event_type
from ..loop.state import AnyBatchReader, LoopState
from .attachments import Attachments
from .copying import deep_copy
from .explain import explain
from .observers import CallbackObserver, Observer
from .streams import EventStream

E = TypeVar("E", bound=Event)
R = TypeVar("R", bound=Callable[..., Any])


class EventSource(LoopState):
    """The part of a learner for subscriptions: callbacks, receivers, streams and observers.

    There are two lanes. Ordered receivers (callbacks, `on`, `subscribe`) run in the training
    thread, and may change the learner and cancel; `events` and `observe` run on the host's event
    loop, concurrently with the training.
    """

    def __init__(self, bus: Bus | None, reader: AnyBatchReader) -> None:
        super().__init__(bus, reader)
        self.streams: list[EventStream[Any]] = []
        """The open streams and observers."""
        self.fit_streams: list[EventStream[Any]] = []
        """The streams and observers of the running fit, including those closed meanwhile."""
        self._attachments = Attachments(self, self.bus, self._observe_for)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return deep_copy(self, memo)  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(
            f"a {type(self).__name__} can neither be pickled nor copied by copy.copy(), which would"
            " share its bus and callbacks: use copy.deepcopy(learner) for a second one; for"
            " another process, build it there, and save its state with CheckpointCB, or its"
            " weights with torch.save(learner.model.state_dict(), path)"
        )

    def _observe_for(self, callback: Callback) -> Observer[Any]:
        return CallbackObserver(self, callback).open()

    @property
    def cbs(self) -> tuple[Callback, ...]:
        """The callbacks, in the order of attachment. See `add_cbs`, `remove_cbs`."""
        return self._attachments.callbacks

    def add_cbs(self, cbs: Callback | Iterable[Callback] | None) -> tuple[Callback, ...]:
        """Attach one callback or several, either all of them or none; return them.

        Raises:
            TypeError: one is not a Callback.
            ValueError: one is attached already, or `run_after`/`run_before` form a cycle.
        """
        if cbs is None:
            cbs = ()
        elif isinstance(cbs, Callback | type | str) or not isinstance(cbs, Iterable):
            cbs = (cbs,)
        cbs = tuple(cbs)
        self._attachments.attach(cbs)
        return cbs

    def remove_cbs(self, cbs: Callback | Iterable[Callback]) -> None:
        """Detach one callback or several. Raises ValueError if one is not attached."""
        for callback in (cbs,) if isinstance(cbs, Callback) else tuple(cbs):
            self._attachments.detach(callback)

    def begin_use_of_cbs(self) -> None:
        """Reserve the callbacks for the fit that begins.

        Raises:
            RuntimeError: a fit of another learner is using one that is not `shareable`.
        """
        self._attachments.begin_use()

    def end_use_of_cbs(self) -> None:
        """Release the callbacks at the end of the fit."""
        self._attachments.end_use()

    def explain(self, file: TextIO | None = None) -> str:
        """Print and return what runs on every event, in order, and who performs each action.

        Args:
            file: where to print to, standard output by default.
        """
        text = explain(self, self.streams)
        print(text, file=file)
        return text

    # ------------------------------------------------------------------------- subscriptions

    def on(
        self,
        event_type: type[E],
        *,
        order: float = 0,
        every: int = 1,
        once: bool = False,
        where: Callable[[E], bool] | None = None,
    ) -> Callable[[R], R]:
        """Subscribe the decorated function; the arguments are those of `Bus.subscribe`.

        Example:
            >>> import torch
            >>> from eventrain.engine import DataLoaders, TrainLearner
            >>> from eventrain.events import AfterBatch
            >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
            >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches))
            >>> @learner.on(AfterBatch, every=2)
            ... def report(event):
            ...     print("batch", event.iter + 1, "of", event.n_iter)
            >>> result = learner.run(valid=False)
            batch 2 of 4
            batch 4 of 4
        """

        check_event_type(event_type)  # now: `@learner.on` without arguments passes a function

        def decorate(receiver: R) -> R:
            self.subscribe(event_type, receiver, order=order, every=every, once=once, where=where)
            return receiver

        return decorate

    def subscribe(
        self,
        event_type: type[E],
        receiver: Callable[[E], Any],
        *,
        order: float = 0,
        every: int = 1,
        once: bool = False,
        where: Callable[[E], bool] | None = None,
    ) -> Subscription:
        """Call `receiver` with this learner's events, in order, in the training thread.

        It may change the learner and may raise a cancel; an `async def` is awaited on the
        caller's event loop while the training waits. The arguments are those of
        `Bus.subscribe`. Close the subscription to end it.
        """
        return self.bus.subscribe(
            event_type, receiver, order=order, every=every, once=once, where=where, learner=self
        )

    def events(
        self,
        *event_types: type[E],
        buffer: int = 1024,
        overflow: Overflow = "drop_oldest",
        where: Callable[[E], bool] | None = None,
    ) -> EventStream[E]:
        """This learner's events as an async stream, until the end of the fit.

        Args:
            event_types: event classes; by default all events.
            buffer: how many events are held for a slow reader.
            overflow: what happens when it is full: "drop_oldest"; "latest", which keeps only
                the newest; or "block", which loses nothing and slows the training down.
            where: deliver only events for which this returns true; called in the training thread.

        Raises:
            TypeError, ValueError: not an event class, a buffer below 1, or an unknown policy.

        Example:
            >>> import anyio, torch
            >>> from eventrain.engine import DataLoaders, TrainLearner
            >>> from eventrain.events import CleanupEpoch
            >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
            >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
            >>> async def main():
            ...     async with anyio.create_task_group() as tasks:
            ...         async with learner.events(CleanupEpoch) as stream:
            ...             tasks.start_soon(learner.fit, 2)
            ...             async for event in stream:
            ...                 print(event.epoch, "train" if event.training else "valid")
            >>> anyio.run(main)
            0 train
            0 valid
            1 train
            1 valid
        """
        return EventStream(self, event_types, buffer, overflow, where)

    def observe(
        self,
        receiver: Callable[[E], Any],
        *event_types: type[E],
        buffer: int = 1024,
        overflow: Overflow = "drop_oldest",
        where: Callable[[E], bool] | None = None,
        on_error: Literal["log", "raise"] = "log",
    ) -> Observer[E]:
        """Call `receiver`, plain or async, with events on the event loop, while the training runs.

        It cannot cancel or change the run. The other arguments are those of `events`.

        Args:
            receiver: called with each event.
            event_types: event classes; by default all events.
            on_error: if the receiver raises, its error is logged and it is detached; with "raise",
                the error also ends the fit.
        """
        observer = Observer(self, event_types, buffer, overflow, where, receiver, on_error)
        return observer.open()

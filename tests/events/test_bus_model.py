"""G2: whatever is subscribed, closed and sent, and when: the bus does what a plain list does.

Random sequences run against the bus and against a model of it that holds its subscriptions in a
list and sorts them anew for every event. Both call the same receivers, in the same order, and
raise the same. Receivers close, subscribe, send and raise themselves.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

from eventrain.events import (
    ActionEvent,
    AfterFit,
    BeforeEpoch,
    BeforeFit,
    Bus,
    CancelBatchException,
    CancelException,
    CancelFitException,
    CleanupFit,
    EpochEvent,
    Event,
    FitEvent,
    Predict,
    ScopeEnd,
    Subscription,
)
from eventrain.events.base import HOOKS
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

LEARNERS = ("first learner", "second learner")


class RoundBegins(FitEvent):
    """An event class of a user's own."""


del HOOKS[RoundBegins.hook]

SENT = [BeforeFit, AfterFit, CleanupFit, BeforeEpoch, Predict, RoundBegins]
SUBSCRIBED = [Event, FitEvent, EpochEvent, *SENT]


@dataclass(frozen=True)
class Spec:
    """What to subscribe, and what its receiver does the first time it is called."""

    event_type: type[Event]
    order: float
    every: int
    once: bool
    where: Callable[[Event], bool] | None
    learner: str | None
    deed: tuple[str, Any] | None


@dataclass(frozen=True)
class Send:
    """Which event to send."""

    event_type: type[Event]
    learner: str


def odd(event: Event) -> bool:
    return event.time % 2 == 1


sends = st.builds(Send, st.sampled_from(SENT), st.sampled_from(LEARNERS))
numbers = st.integers(0, 20)
errors = st.sampled_from([ValueError, KeyError, CancelBatchException, CancelFitException])


def specs(deeds: st.SearchStrategy[tuple[str, Any] | None]) -> st.SearchStrategy[Spec]:
    def allowed(spec: Spec) -> Spec:
        if issubclass(spec.event_type, ActionEvent):  # performed each time, or not at all
            return replace(spec, every=1, where=None)
        return spec

    return st.builds(
        Spec,
        st.sampled_from(SUBSCRIBED),
        st.sampled_from([0, 0, 1, -1, 0.5, -2.5, math.inf, -math.inf]),
        st.sampled_from([1, 1, 1, 2, 3]),
        st.booleans(),
        st.sampled_from([None, None, odd]),
        st.sampled_from([None, None, *LEARNERS]),
        deeds,
    ).map(allowed)


quiet = specs(st.none())
deeds = (
    st.tuples(st.just("close"), numbers)
    | st.tuples(st.just("subscribe"), quiet)
    | st.tuples(st.just("send"), sends)
    | st.tuples(st.just("raise"), errors)
)


class World(ABC):
    """A bus, real or model, and what was called on it."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.specs: list[Spec] = []
        self.undone: dict[int, tuple[str, Any]] = {}
        self.n_sent = 0

    def subscribe(self, spec: Spec) -> None:
        number = len(self.specs)
        self.specs.append(spec)
        if spec.deed is not None:
            self.undone[number] = spec.deed
        self.connect(number, spec)

    def close(self, number: int) -> None:
        if self.specs:
            number %= len(self.specs)
            self.log.append(("closed", number, self.disconnect(number)))

    def send(self, send: Send) -> None:
        self.n_sent += 1
        values = {
            "learner": send.learner,
            "run_id": "r1",
            "time": self.n_sent,
            "n_epochs": 1,
            "n_steps": 4,
            "epoch": 0,
            "training": True,
            "n_iter": None,
            "iter": 0,
            "end": ScopeEnd("completed"),
        }
        self.deliver(send.event_type(**{f.name: values[f.name] for f in fields(send.event_type)}))

    def try_to_send(self, send: Send) -> None:
        try:
            self.send(send)
        except (Exception, CancelException) as exc:
            self.log.append(("raised", type(exc), exc.args))

    def call(self, number: int, event: Event) -> None:
        """What the receiver of that number does."""
        self.log.append(("called", number, type(event), event.learner, event.time))
        match self.undone.pop(number, None):
            case "close", other:
                self.close(other)
            case "subscribe", spec:
                self.subscribe(spec)
            case "send", send:
                self.send(send)
            case "raise", error:
                raise error(f"raised by {number}")

    @abstractmethod
    def connect(self, number: int, spec: Spec) -> None: ...

    @abstractmethod
    def disconnect(self, number: int) -> bool: ...

    @abstractmethod
    def deliver(self, event: Event) -> None: ...

    @abstractmethod
    def open(self) -> list[int]: ...

    @abstractmethod
    def listened_to(self, event_type: type[Event]) -> bool: ...


class Real(World):
    def __init__(self) -> None:
        super().__init__()
        self.bus = Bus()
        self.subscriptions: list[Subscription] = []

    def connect(self, number: int, spec: Spec) -> None:
        subscription = self.bus.subscribe(
            spec.event_type,
            lambda event: self.call(number, event),
            order=spec.order,
            every=spec.every,
            once=spec.once,
            where=spec.where,
            learner=spec.learner,
        )
        self.subscriptions.append(subscription)

    def disconnect(self, number: int) -> bool:
        return self.subscriptions[number].close()

    def deliver(self, event: Event) -> None:
        self.bus.send(event)

    def open(self) -> list[int]:
        return [self.subscriptions.index(s) for s in self.bus.subscriptions()]

    def listened_to(self, event_type: type[Event]) -> bool:
        return bool(self.bus.signal(event_type).receivers)


@dataclass
class Listed:
    number: int
    spec: Spec
    open: bool = True
    passed: int = field(default=0)

    def reached_by(self, event_type: type[Event]) -> bool:
        if issubclass(event_type, ActionEvent):
            return self.spec.event_type is event_type
        return issubclass(event_type, self.spec.event_type)

    def wants(self, event: Event) -> bool:
        if not self.open or self.spec.learner not in (None, event.learner):
            return False
        if self.spec.where is not None and not self.spec.where(event):
            return False
        self.passed += 1
        return self.passed % self.spec.every == 0


class Model(World):
    def __init__(self) -> None:
        super().__init__()
        self.listed: list[Listed] = []

    def connect(self, number: int, spec: Spec) -> None:
        self.listed.append(Listed(number, spec))

    def disconnect(self, number: int) -> bool:
        was_open, self.listed[number].open = self.listed[number].open, False
        return was_open

    def deliver(self, event: Event) -> None:
        reached = [entry for entry in self.listed if entry.open and entry.reached_by(type(event))]
        raised: list[BaseException] = []
        for entry in sorted(reached, key=lambda entry: entry.spec.order):
            if not entry.wants(event):
                continue
            entry.open = not entry.spec.once
            try:
                self.call(entry.number, event)
            except (Exception, CancelException) as exc:
                if not isinstance(event, CleanupFit):
                    raise
                raised.append(exc)
        for kinds in (Exception, CancelFitException, CancelBatchException):
            for exc in raised:
                if isinstance(exc, kinds):
                    raise exc

    def open(self) -> list[int]:
        return [entry.number for entry in self.listed if entry.open]

    def listened_to(self, event_type: type[Event]) -> bool:
        return any(entry.open and entry.reached_by(event_type) for entry in self.listed)


class BusAgainstList(RuleBasedStateMachine):
    @initialize(asked=st.sets(st.sampled_from(SUBSCRIBED)))
    def begin(self, asked: set[type[Event]]) -> None:
        """Some signals are there before the first subscription, the others come later."""
        self.real, self.model = Real(), Model()
        for event_type in asked:
            self.real.bus.signal(event_type)

    def both(self, act: Callable[[World], None]) -> None:
        act(self.real)
        act(self.model)

    @rule(spec=quiet)
    def subscribe(self, spec: Spec) -> None:
        self.both(lambda world: world.subscribe(spec))

    @rule(spec=specs(deeds))
    def subscribe_one_that_acts(self, spec: Spec) -> None:
        self.both(lambda world: world.subscribe(spec))

    @rule(number=numbers)
    def close(self, number: int) -> None:
        self.both(lambda world: world.close(number))

    @rule(send=sends)
    def send(self, send: Send) -> None:
        self.both(lambda world: world.try_to_send(send))

    @rule(send=sends, times=st.integers(2, 4))
    def send_some(self, send: Send, times: int) -> None:
        for _ in range(times):
            self.both(lambda world: world.try_to_send(send))

    @invariant()
    def the_same_was_called_and_raised(self) -> None:
        assert self.real.log == self.model.log

    @invariant()
    def the_same_subscriptions_are_open(self) -> None:
        assert self.real.open() == self.model.open()
        assert [s.closed for s in self.real.subscriptions] == [
            not entry.open for entry in self.model.listed
        ]

    @invariant()
    def the_same_classes_are_listened_to(self) -> None:
        for event_type in SENT:
            assert self.real.listened_to(event_type) == self.model.listened_to(event_type)

    @invariant()
    def classes_without_receivers_are_the_other_ones(self) -> None:
        bus = self.real.bus
        assert bus.without_receivers == {
            cls for cls in bus.signals if not self.model.listened_to(cls)
        }


TestBusAgainstList = BusAgainstList.TestCase
TestBusAgainstList.settings = settings(
    max_examples=150,
    stateful_step_count=25,
)

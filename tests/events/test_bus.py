"""Subscriptions on a bus: in which order, to what, how often, and until when."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from eventrain.events import (
    ActionEvent,
    AfterBatch,
    AfterEpoch,
    AfterFit,
    AfterLoss,
    AfterStep,
    Backward,
    BatchEvent,
    BeforeBatch,
    BeforeEpoch,
    BeforeFit,
    Bus,
    CleanupBatch,
    CleanupFit,
    EpochEvent,
    Event,
    FitEvent,
    GetLoss,
    Predict,
    Step,
    StepEvent,
    Subscription,
    ZeroGrad,
)
from hypothesis import given
from hypothesis import strategies as st

MakeEvent = Callable[..., Any]


def fit_event(number: float = 0.0) -> BeforeFit:
    return BeforeFit(None, "r1", time=number, purpose="fit", n_epochs=1, n_steps=4)


# --------------------------------------------------------------------------------------- order


@given(st.lists(st.integers(-3, 3) | st.floats(allow_nan=False), max_size=12))
def test_receivers_run_by_order_and_then_in_the_order_they_were_connected_in(
    orders: list[float],
) -> None:
    """G2: any numbers will do: negative ones, fractions, infinities."""
    bus, called = Bus(), []
    for place, order in enumerate(orders):
        bus.subscribe(BeforeFit, lambda _, place=place: called.append(place), order=order)
    bus.send(fit_event())
    assert called == sorted(range(len(orders)), key=lambda place: orders[place])


def test_the_order_holds_every_time_and_across_base_classes() -> None:
    """G2: subscribers of a class and of its bases are in one order."""
    bus, called = Bus(), []
    for name, event_type, order in [
        ("last", FitEvent, math.inf),
        ("third", BeforeFit, 0),
        ("fourth", Event, 0.5),
        ("first", Event, -math.inf),
        ("second", FitEvent, -0.5),
    ]:
        bus.subscribe(event_type, lambda _, name=name: called.append(name), order=order)
    for _ in range(3):
        bus.send(fit_event())
    assert called == ["first", "second", "third", "fourth", "last"] * 3


def test_one_that_comes_later_takes_its_place_in_the_order() -> None:
    bus, called = Bus(), []
    bus.subscribe(BeforeFit, lambda _: called.append("b"))
    bus.send(fit_event())
    bus.subscribe(BeforeFit, lambda _: called.append("a"), order=-1)
    bus.subscribe(BeforeFit, lambda _: called.append("c"))
    bus.send(fit_event())
    assert called == ["b", "a", "b", "c"]


def test_one_that_is_subscribed_anew_goes_behind_its_equals() -> None:
    bus, called = Bus(), []

    def a(event: BeforeFit) -> None:
        called.append("a")

    first = bus.subscribe(BeforeFit, a)
    bus.subscribe(BeforeFit, lambda _: called.append("b"))
    first.close()
    bus.subscribe(BeforeFit, a)
    bus.send(fit_event())
    assert called == ["b", "a"]


def test_the_same_receiver_may_be_subscribed_twice() -> None:
    bus, heard = Bus(), []
    one = bus.subscribe(BeforeFit, heard.append)
    bus.subscribe(BeforeFit, heard.append, order=-1)
    bus.send(event := fit_event())
    assert heard == [event, event]
    one.close()
    bus.send(other := fit_event())
    assert heard == [event, event, other]


# -------------------------------------------------------------------------------- base classes


def test_a_base_class_means_all_below_it(make_event: MakeEvent) -> None:
    bus = Bus()
    heard: dict[type[Event], list[str]] = {}
    for event_type in (Event, FitEvent, EpochEvent, BatchEvent, StepEvent, AfterBatch):
        names = heard[event_type] = []
        bus.subscribe(event_type, lambda e, names=names: names.append(type(e).__name__))
    for event_type in (BeforeFit, BeforeEpoch, AfterBatch, CleanupBatch, AfterStep, AfterFit):
        bus.send(make_event(event_type))
    assert heard == {
        Event: ["BeforeFit", "BeforeEpoch", "AfterBatch", "CleanupBatch", "AfterStep", "AfterFit"],
        FitEvent: ["BeforeFit", "AfterFit"],
        EpochEvent: ["BeforeEpoch"],
        BatchEvent: ["AfterBatch", "CleanupBatch"],
        StepEvent: ["AfterStep"],
        AfterBatch: ["AfterBatch"],
    }


def test_a_base_class_means_classes_defined_later_as_well(make_event: MakeEvent) -> None:
    bus, heard = Bus(), []
    bus.subscribe(FitEvent, lambda e: heard.append(("FitEvent", type(e).__name__)))
    bus.subscribe(Event, lambda e: heard.append(("Event", type(e).__name__)), order=-1)
    bus.send(make_event(BeforeFit))

    @dataclass(frozen=True, slots=True, eq=False)
    class RoundBegins(FitEvent):
        """Defined when both were subscribed already."""

    @dataclass(frozen=True, slots=True, eq=False)
    class FirstRoundBegins(RoundBegins):
        """And one below it."""

    bus.send(make_event(RoundBegins))
    bus.send(make_event(FirstRoundBegins))
    assert heard == [
        (base, name)
        for name in ("BeforeFit", "RoundBegins", "FirstRoundBegins")
        for base in ("Event", "FitEvent")
    ]


@pytest.mark.parametrize("action", [Predict, GetLoss, Backward, Step, ZeroGrad])
def test_an_action_is_not_delivered_to_subscribers_of_a_base_class(
    action: type[ActionEvent], make_event: MakeEvent
) -> None:
    bus, heard = Bus(), []
    bus.subscribe(Event, lambda e: heard.append("Event"))
    assert not bus.signal(action).receivers
    bus.send(make_event(action))
    assert heard == []
    bus.subscribe(action, lambda e: heard.append(action))
    bus.send(make_event(action))
    assert heard == [action]


def test_the_base_of_the_actions_cannot_be_subscribed_to() -> None:
    bus = Bus()
    with pytest.raises(TypeError, match=r"exactly one receiver performs each action.*Predict"):
        bus.subscribe(ActionEvent, print)
    assert bus.subscriptions() == ()


# ------------------------------------------------------------------------- every, once, where


@pytest.mark.parametrize(
    ("options", "heard"),
    [
        ({}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"every": 1}, [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        ({"every": 4}, [4, 8]),
        ({"every": 10}, []),
        ({"once": True}, [1]),
        ({"where": lambda e: e.time % 2 == 0}, [2, 4, 6, 8]),
        ({"where": lambda e: False}, []),
        ({"every": 4, "once": True}, [4]),
        ({"every": 2, "where": lambda e: e.time % 2 == 0}, [4, 8]),
        ({"once": True, "where": lambda e: e.time > 4}, [5]),
        ({"every": 2, "once": True, "where": lambda e: e.time > 4}, [6]),
    ],
    ids=lambda x: ",".join(x) if isinstance(x, dict) else "",
)
def test_every_once_and_where_in_all_combinations(
    options: dict[str, Any], heard: list[int]
) -> None:
    """`where` is asked first, then `every` counts, then `once` ends it."""
    bus, by_subscribe, by_on = Bus(), [], []
    subscription = bus.subscribe(BeforeFit, lambda e: by_subscribe.append(e.time), **options)

    @bus.on(BeforeFit, **options)
    def receiver(event: BeforeFit) -> None:
        by_on.append(event.time)

    for number in range(1, 10):
        bus.send(fit_event(number))
    assert by_subscribe == by_on == heard
    assert subscription.closed == (options.get("once", False) and bool(heard))


@given(
    st.lists(st.booleans(), max_size=30),
    st.integers(1, 5),
    st.booleans(),
)
def test_every_counts_the_events_that_where_lets_through(
    wanted: list[bool], every: int, once: bool
) -> None:
    bus, heard = Bus(), []
    bus.subscribe(
        BeforeFit,
        lambda e: heard.append(int(e.time)),
        every=every,
        once=once,
        where=lambda e: wanted[int(e.time)],
    )
    for number in range(len(wanted)):
        bus.send(fit_event(number))
    passed = [number for number, want in enumerate(wanted) if want]
    assert heard == passed[every - 1 :: every][: 1 if once else None]


def test_every_counts_over_all_classes_below_the_one_subscribed_to(make_event: MakeEvent) -> None:
    bus, heard = Bus(), []
    bus.subscribe(FitEvent, lambda e: heard.append(type(e).__name__), every=2)
    for event_type in (BeforeFit, CleanupFit, AfterFit, AfterFit, BeforeFit):
        bus.send(make_event(event_type))
    assert heard == ["CleanupFit", "AfterFit"]


def test_once_is_over_before_the_receiver_is_called() -> None:
    bus, heard = Bus(), []

    @bus.on(BeforeFit, once=True)
    def sends_again(event: BeforeFit) -> None:
        heard.append(event.time)
        bus.send(fit_event(event.time + 1))

    bus.send(fit_event())
    assert heard == [0.0]
    assert bus.subscriptions() == ()


def test_once_is_over_even_if_the_receiver_raises() -> None:
    bus = Bus()
    bus.subscribe(BeforeFit, lambda _: 1 / 0, once=True)
    with pytest.raises(ZeroDivisionError):
        bus.send(fit_event())
    bus.send(fit_event())


def test_a_filter_that_raises_is_an_error_of_its_receiver() -> None:
    bus, heard = Bus(), []
    bus.subscribe(BeforeFit, heard.append, where=lambda e: e.epoch == 1)
    with pytest.raises(AttributeError) as caught:
        bus.send(fit_event())
    assert caught.value.__notes__ == ["raised by list.append on BeforeFit"]
    assert heard == []


# ------------------------------------------------------------------- how long a subscription lives


class Holder:
    def __init__(self, heard: list[Any]) -> None:
        self.heard = heard

    def method(self, event: Event) -> None:
        self.heard.append(event)

    def __call__(self, event: Event) -> None:
        self.heard.append(event)


@pytest.mark.parametrize(
    "make",
    [
        lambda heard: lambda e: heard.append(e),
        lambda heard: partial(heard.append),
        lambda heard: Holder(heard).method,
        Holder,
    ],
    ids=["closure", "partial", "method of an object", "callable object"],
)
def test_the_bus_holds_receivers_that_nobody_else_holds(
    make: Callable[[list[Any]], Callable[[Event], None]],
) -> None:
    bus: Bus = Bus()
    heard: list[Any] = []
    bus.subscribe(BeforeFit, make(heard))
    gc.collect()
    bus.send(event := fit_event())
    assert heard == [event]


def test_a_decorated_function_that_nobody_else_holds_is_held_too() -> None:
    bus, heard = Bus(), []

    def setup() -> None:
        @bus.on(BeforeFit)
        def receiver(event: BeforeFit) -> None:
            heard.append(event)

    setup()
    gc.collect()
    bus.send(event := fit_event())
    assert heard == [event]


def test_the_bus_lets_go_of_a_receiver_when_it_is_closed() -> None:
    bus = Bus()
    holder = Holder([])
    subscription = bus.subscribe(Event, holder.method)
    bus.send(fit_event())
    gone = weakref.ref(holder)
    subscription.close()
    del holder, subscription
    gc.collect()
    assert gone() is None


def test_ten_thousand_subscriptions_that_were_closed_leave_nothing_behind(
    make_event: MakeEvent,
) -> None:
    """G13: what comes and goes is not kept in any table of the bus or of its signals."""
    bus = Bus()
    for event_type in (BeforeFit, AfterBatch, Predict):
        bus.signal(event_type)

    def size() -> int:
        tables = [bus.subscriptions()]
        for signal in bus.signals.values():
            tables += [t for t in vars(signal).values() if isinstance(t, dict | list | tuple)]
            tables += signal._by_sender.values()
        return sum(map(len, tables))

    bus.subscribe(Event, Holder([])).close()
    before = size()
    for _ in range(10_000):
        bus.subscribe(Event, Holder([])).close()
    assert size() == before


def test_a_subscription_ends_with_its_with_block() -> None:
    bus, heard = Bus(), []
    with bus.subscribe(BeforeFit, lambda e: heard.append(e.time)) as subscription:
        assert isinstance(subscription, Subscription)
        bus.send(fit_event(1))
        assert not subscription.closed
    bus.send(fit_event(2))
    assert heard == [1]
    assert subscription.closed


def test_a_subscription_ends_with_a_with_block_that_fails() -> None:
    bus = Bus()
    with pytest.raises(KeyError), bus.subscribe(BeforeFit, print) as subscription:
        raise KeyError
    assert subscription.closed
    assert bus.subscriptions() == ()


def test_closing_twice_is_harmless_and_says_which_one_ended_it() -> None:
    bus, heard = Bus(), []
    other = bus.subscribe(BeforeFit, heard.append)
    with bus.subscribe(BeforeFit, heard.append) as subscription:
        assert [subscription.close(), subscription.close()] == [True, False]
        assert bus.unsubscribe(subscription) is False
    assert bus.subscriptions() == (other,)
    bus.send(event := fit_event())
    assert heard == [event]


def test_on_hands_back_the_function_it_decorates() -> None:
    bus = Bus()

    def receiver(event: BeforeFit) -> str:
        return "heard"

    assert bus.on(BeforeFit)(receiver) is receiver
    assert [s.receiver for s in bus.subscriptions()] == [receiver]


def test_a_subscription_shows_what_it_is() -> None:
    bus = Bus()

    def module_level(event: Event) -> None: ...

    for receiver, name in [
        (len, "len"),
        ([].append, "list.append"),
        (Holder([]), "Holder"),
        (Holder([]).method, "Holder.method"),
        (partial(partial(Holder.method, Holder([]))), "Holder.method"),
        (dict.fromkeys, "dict.fromkeys"),
        (module_level, f"{module_level.__qualname__}"),
    ]:
        subscription = bus.subscribe(AfterLoss, receiver, order=-1.5)
        assert subscription.name == name
        assert repr(subscription) == f"<Subscription of {name} to AfterLoss, order=-1.5>"
        subscription.close()
        assert repr(subscription) == f"<Subscription of {name} to AfterLoss, closed>"


def test_the_open_subscriptions_are_listed_in_the_order_they_were_made_in() -> None:
    bus = Bus()
    made = [bus.subscribe(BeforeFit, print, order=order) for order in (3, 1, 2)]
    assert bus.subscriptions() == tuple(made)
    assert [s.time for s in made] == sorted(s.time for s in made)
    made[1].close()
    assert bus.subscriptions() == (made[0], made[2])


# ------------------------------------------------------------------------- changes while sending


def test_one_closed_by_an_earlier_receiver_is_not_called_any_more() -> None:
    bus, called = Bus(), []
    bus.subscribe(BeforeFit, lambda _: called.append("a") or late.close())
    late = bus.subscribe(BeforeFit, lambda _: called.append("late"), order=1)
    bus.subscribe(BeforeFit, lambda _: called.append("c"), order=2)
    bus.send(fit_event())
    assert called == ["a", "c"]


def test_one_that_closes_itself_was_called_and_is_not_called_again() -> None:
    bus, called = Bus(), []

    @bus.on(BeforeFit, order=1)
    def after(event: Event) -> None:
        called.append("after")

    subscription = bus.subscribe(BeforeFit, lambda _: called.append(subscription.close()))
    bus.send(fit_event())
    bus.send(fit_event())
    assert called == [True, "after", "after"]


def test_a_receiver_added_by_another_gets_the_next_event() -> None:
    bus, called = Bus(), []

    @bus.on(BeforeFit, once=True)
    def adds(event: BeforeFit) -> None:
        called.append("adds")
        for order in (-1, 0, 1):
            bus.subscribe(BeforeFit, lambda _, order=order: called.append(order), order=order)

    bus.send(fit_event())
    assert called == ["adds"]
    bus.send(fit_event())
    assert called == ["adds", -1, 0, 1]


def test_a_receiver_added_by_another_gets_an_event_sent_from_within() -> None:
    bus, called = Bus(), []

    @bus.on(BeforeFit, once=True)
    def nests(event: BeforeFit) -> None:
        bus.subscribe(BeforeFit, lambda e: called.append(("new", e.time)), order=-1)
        bus.send(fit_event(2))

    bus.subscribe(BeforeFit, lambda e: called.append(("old", e.time)), order=1)
    bus.send(fit_event(1))
    assert called == [("new", 2), ("old", 2), ("old", 1)]


# ----------------------------------------------------------------------- what is refused, and how


@pytest.mark.parametrize(
    "event_type", ["AfterBatch", "after_batch", int, object, None, 3, Exception, [AfterBatch]]
)
def test_a_class_that_is_not_an_event_is_refused(event_type: Any) -> None:
    bus = Bus()
    for call in (bus.subscribe, lambda t, _: bus.on(t)(print), lambda t, _: bus.signal(t)):
        with pytest.raises(TypeError, match=r"is not an event class.*such as AfterBatch"):
            call(event_type, print)
    assert bus.subscriptions() == ()


def test_an_event_in_place_of_its_class_is_refused() -> None:
    with pytest.raises(TypeError, match="is not an event class"):
        Bus().subscribe(fit_event(), print)  # type: ignore[type-var]


@pytest.mark.parametrize("nothing", ["AfterBatch", BeforeFit, None])
def test_sending_something_other_than_an_event_is_refused(nothing: Any) -> None:
    """Or it would be lost without a word."""
    bus = Bus()
    with pytest.raises(TypeError):
        bus.send(nothing)
    assert dict(bus.signals) == {}


@pytest.mark.parametrize("receiver", [None, "receiver", 3, Event.__doc__])
def test_a_receiver_that_cannot_be_called_is_refused(receiver: Any) -> None:
    with pytest.raises(TypeError, match="a receiver of AfterBatch must be callable"):
        Bus().subscribe(AfterBatch, receiver)


class Keyword:
    def __call__(self, *, event: Event) -> None: ...


@pytest.mark.parametrize(
    ("receiver", "says"),
    [
        (lambda: None, r"<lambda>\(\) cannot receive AfterBatch: .* one argument, the event"),
        (lambda event, learner: None, r"<lambda>\(event, learner\) cannot receive"),
        (Keyword(), r"Keyword\(\*, event: .*\).* cannot receive .*too many positional"),
        (partial(lambda event, *, model: None), "missing a required .*'model'"),
        (Holder.method, r"Holder\.method\(self, event.*\).* cannot receive .*'event'"),
    ],
    ids=["none", "two", "keyword", "partial", "method of the class"],
)
def test_a_receiver_that_takes_no_single_argument_is_refused(receiver: Any, says: str) -> None:
    bus = Bus()
    with pytest.raises(TypeError, match=says):
        bus.subscribe(AfterBatch, receiver)
    with pytest.raises(TypeError, match=says):
        bus.on(AfterBatch)(receiver)
    assert bus.subscriptions() == ()


@pytest.mark.parametrize(
    "receiver",
    [
        lambda event: None,
        lambda *events: None,
        lambda event, more=1: None,
        partial(lambda model, event: None, "model"),
        [].append,
        dict,
        print,
    ],
)
def test_a_receiver_that_can_take_one_argument_is_taken(receiver: Any) -> None:
    bus = Bus()
    bus.subscribe(AfterBatch, receiver)
    assert [s.receiver for s in bus.subscriptions()] == [receiver]


@pytest.mark.parametrize("every", [0, -1, True, False, 1.5, 2.0, None, "2"])
def test_every_must_be_a_positive_integer(every: Any) -> None:
    bus = Bus()
    with pytest.raises(ValueError, match=r"every=.*: give a positive integer, 1 for all events"):
        bus.subscribe(AfterBatch, print, every=every)
    assert bus.subscriptions() == ()


@pytest.mark.parametrize("order", [math.nan, None, "first", 1j])
def test_order_must_be_a_number(order: Any) -> None:
    bus = Bus()
    with pytest.raises(ValueError, match=r"order=.*: give a number; lower is called earlier"):
        bus.subscribe(AfterBatch, print, order=order)
    assert bus.subscriptions() == ()


def test_a_where_that_cannot_be_called_is_refused() -> None:
    bus = Bus()
    with pytest.raises(TypeError, match="where="):
        bus.subscribe(AfterBatch, print, where="training")  # type: ignore[arg-type]
    assert bus.subscriptions() == ()


def test_a_refused_receiver_is_not_connected_to_any_class(make_event: MakeEvent) -> None:
    bus = Bus()
    bus.signal(BeforeBatch)
    bus.signal(AfterEpoch)
    for options in ({"every": 0}, {"order": math.nan}):
        with pytest.raises(ValueError, match="give a"):
            bus.subscribe(Event, print, **options)
    assert [bool(signal.receivers) for signal in bus.signals.values()] == [False, False]


def test_receivers_and_filters_that_would_never_run_are_refused() -> None:
    def generator(event: Event) -> Iterator[None]:
        yield

    async def async_generator(event: Event) -> AsyncIterator[None]:
        yield

    async def where(event: Event) -> bool:
        return False

    bus = Bus()
    for receiver in (generator, async_generator):
        with pytest.raises(TypeError, match="is a generator"):
            bus.subscribe(BeforeFit, receiver)
    with pytest.raises(TypeError, match="plain function"):
        bus.subscribe(BeforeFit, print, where=where)
    assert not bus.subscriptions()


def test_acronyms_in_event_names_are_one_word() -> None:
    class LRChanged(BeforeFit):
        """A custom event."""

    assert LRChanged.hook == "lr_changed"

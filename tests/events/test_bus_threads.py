"""A bus is safe to use from any thread."""

from __future__ import annotations

import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterFit,
    BeforeBatch,
    BeforeFit,
    Bus,
    EpochEvent,
    Event,
    EventSignal,
    FitEvent,
    Subscription,
)

from tests.support.waiting import GUARD

N_THREADS = 6


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def fit_event(number: float = 0.0) -> BeforeFit:
    return BeforeFit(None, "r1", time=number, purpose="fit", n_epochs=1, n_steps=4)


def in_threads(*works: Callable[[], None]) -> None:
    """Run all at the same time, to their end; raise what one of them raised."""
    start = threading.Barrier(len(works))
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            start.wait(GUARD)
            work()
        except BaseException as exc:
            errors.append(exc)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(GUARD)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


def test_receivers_that_stay_get_every_event_in_order_while_others_come_and_go() -> None:
    """G2."""
    bus, called, passing = Bus(), [], []
    stay = [
        bus.subscribe(event_type, lambda e, o=order: called.append((e.time, o)), order=order)
        for event_type, order in [(BeforeFit, 2), (Event, -1), (FitEvent, 0), (FitEvent, 0)]
    ]
    done = threading.Event()

    def send() -> None:
        for number in range(300):
            bus.send(fit_event(number))
        done.set()

    def come_and_go(seed: int) -> Callable[[], None]:
        def work() -> None:
            rng = random.Random(seed)
            while not done.is_set():
                base = rng.choice([BeforeFit, FitEvent, Event, AfterBatch])
                with bus.subscribe(base, passing.append, order=rng.uniform(-3, 3)):
                    bus.signal(rng.choice([AfterFit, AfterEpoch, BeforeBatch]))

        return work

    in_threads(send, *(come_and_go(seed) for seed in range(N_THREADS)))
    assert called == [(n, order) for n in range(300) for order in (-1, 0, 0, 2)]
    assert bus.subscriptions() == tuple(stay)
    for signal in bus.signals.values():
        reached = [s for s in stay if issubclass(signal.event_type, s.event_type)]
        assert signal.ordered == tuple(sorted(reached, key=lambda s: s.order))
        assert len(signal.receivers) == len(reached)


def test_one_that_was_closed_from_another_thread_is_not_called_by_a_later_sending() -> None:
    bus = Bus()
    heard: list[int] = []
    for number in range(100):
        subscription = bus.subscribe(BeforeFit, lambda _, number=number: heard.append(number))
        thread = threading.Thread(target=subscription.close)
        thread.start()
        thread.join()
        bus.send(fit_event())
    assert heard == []


def test_once_is_once_though_many_threads_send() -> None:
    bus = Bus()
    calls: Counter[int] = Counter()
    for number in range(50):
        bus.subscribe(BeforeFit, lambda _, number=number: calls.update([number]), once=True)
    in_threads(*[lambda: [bus.send(fit_event()) for _ in range(3)] and None] * N_THREADS)
    assert calls == dict.fromkeys(range(50), 1)
    assert bus.subscriptions() == ()


def test_every_counts_the_events_of_all_threads() -> None:
    bus, calls = Bus(), []
    bus.subscribe(BeforeFit, calls.append, every=7)
    in_threads(*[lambda: [bus.send(fit_event()) for _ in range(100)] and None] * N_THREADS)
    assert len(calls) == 100 * N_THREADS // 7


def test_one_close_of_many_ends_it() -> None:
    bus = Bus()
    for _ in range(50):
        subscription = bus.subscribe(Event, print)
        ended: list[bool] = []
        in_threads(*[lambda s=subscription, e=ended: e.append(s.close())] * N_THREADS)
        assert sorted(ended) == [False] * (N_THREADS - 1) + [True]
    assert bus.subscriptions() == ()


def test_all_threads_get_the_same_signal_with_all_its_receivers() -> None:
    for _ in range(50):
        bus, got = Bus(), []
        bus.subscribe(Event, print)

        def ask(bus: Bus = bus, got: list[EventSignal] = got) -> None:
            got.append(bus.signal(AfterEpoch))

        def join(bus: Bus = bus) -> None:
            bus.subscribe(EpochEvent, print)

        in_threads(*[ask, join] * (N_THREADS // 2))
        assert len(set(got)) == 1
        assert len(got[0].ordered) == 1 + N_THREADS // 2
        assert got[0] is bus.signal(AfterEpoch)


def test_a_receiver_may_wait_for_a_thread_that_subscribes_and_closes() -> None:
    """No lock is held while receivers are called."""
    bus, heard = Bus(), []

    @bus.on(BeforeFit, order=-1)
    def waits(event: Event) -> None:
        def work() -> None:
            other.close()
            bus.subscribe(BeforeFit, lambda _: heard.append("new"))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        thread.join(GUARD)
        assert not thread.is_alive()

    other = bus.subscribe(BeforeFit, lambda _: heard.append("closed"))
    bus.send(fit_event())
    assert heard == []
    bus.send(fit_event())
    assert heard == ["new"]


@pytest.mark.parametrize(
    "work",
    [
        lambda bus, subscription: subscription.close(),
        lambda bus, subscription: bus.subscribe(Event, print),
        lambda bus, subscription: bus.signal(AfterEpoch),
        lambda bus, subscription: bus.signal(BeforeFit).ordered,
        lambda bus, subscription: bus.subscriptions(),
        lambda bus, subscription: bus.reorder(),
    ],
    ids=["close", "subscribe", "a new signal", "the order", "subscriptions", "reorder"],
)
def test_nothing_changes_while_the_lock_of_the_bus_is_held(
    work: Callable[[Bus, Subscription], object],
) -> None:
    bus = Bus()
    subscription = bus.subscribe(BeforeFit, print)
    bus.signal(BeforeFit)
    thread = threading.Thread(target=work, args=(bus, subscription), daemon=True)
    with bus.lock:
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
        assert not subscription.closed
        assert len(bus.subscriptions()) == 1
        assert list(bus.signals) == [BeforeFit]
    thread.join(GUARD)
    assert not thread.is_alive()


def test_an_event_is_sent_without_waiting_for_the_lock_of_the_bus() -> None:
    """Once the order is known, so that the training is not held up by whoever subscribes."""
    bus, heard = Bus(), []
    bus.subscribe(BeforeFit, heard.append)
    bus.send(fit_event())
    thread = threading.Thread(target=bus.send, args=(fit_event(),), daemon=True)
    with bus.lock:
        thread.start()
        thread.join(GUARD)
        assert not thread.is_alive()
    assert len(heard) == 2

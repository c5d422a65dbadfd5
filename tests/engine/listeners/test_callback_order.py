"""The order in which callbacks and subscribers run, and how `explain` shows it."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain import events
from eventrain.callbacks import (
    ChannelLastCB,
    DeviceCB,
    GradientAccumulationCB,
    GradientClippingCB,
    MetricsCB,
    MixedTrainingCB,
    SingleBatchCB,
    SingleEpochCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BatchEvent,
    BeforeBatch,
    BeforeFit,
    Bus,
    Callback,
    CleanupFit,
    Event,
    Predict,
)
from eventrain.events.types import ACTIONS
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.waiting import GUARD

MakeModel = Callable[[], nn.Module]


def named(
    name: str,
    order: float = 0,
    after: Any = (),
    before: Any = (),
    bases: tuple[type[Callback], ...] = (Callback,),
) -> Callback:
    """A callback that notes its name in `learner.heard` before the fit and after each batch."""

    class Named(*bases):  # type: ignore[misc]
        def before_fit(self, event: Event) -> None:
            event.learner.heard.append(name)

        def after_batch(self, event: Event) -> None:
            event.learner.heard.append(name)

    Named.__name__ = Named.__qualname__ = name
    Named.order, Named.run_after, Named.run_before = order, after, before
    return Named()


def make_learner(*cbs: Callback) -> Any:
    torch.manual_seed(0)
    batches = [(torch.ones(2, 3), torch.ones(2, 1))] * 2
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(batches, batches))
    learner.heard = []
    learner.add_cbs(cbs)
    return learner


def heard_by(learner: Any, event_type: type[Event] = BeforeFit) -> list[str]:
    """The receivers of one event, in order, without a fit."""
    learner.heard.clear()
    learner.bus.send(BeforeFit(learner, "r1", 0.0, "fit", 1, None))
    return list(learner.heard)


# --------------------------------------------------------------------------------------- order


def test_callbacks_run_by_order_and_ties_by_the_time_they_were_attached() -> None:
    """G2: on every event, every time."""
    learner = make_learner(
        named("E", 2), named("C"), named("A", -1.5), named("D"), named("B", -1), named("F", 1000)
    )
    learner.run(1, valid=False)
    assert learner.heard == ["A", "B", "C", "D", "E", "F"] * 3


async def test_callbacks_and_subscribers_are_in_one_order() -> None:
    """G2: plain, async, on a class and on its base; all in the places that order gives them."""
    learner = make_learner(named("callback 0"), named("callback 1", 1))

    def note(name: str) -> Callable[[Any], None]:
        return lambda event: learner.heard.append(name)

    learner.subscribe(AfterBatch, note("sub -1"), order=-1)
    learner.subscribe(BatchEvent, note("base 0.5"), order=0.5, where=is_after_batch)
    learner.subscribe(Event, note("event 1"), order=1, where=is_after_batch)

    async def slow(event: AfterBatch) -> None:
        for _ in range(3):
            await anyio.lowlevel.checkpoint()
        learner.heard.append("async 0")

    learner.subscribe(AfterBatch, slow)
    learner.add_cbs(named("late callback 0"))
    with anyio.fail_after(GUARD):
        await learner.fit(1, valid=False)
    assert (
        learner.heard[3:]
        == [
            *["sub -1", "callback 0", "async 0", "late callback 0", "base 0.5"],
            *["callback 1", "event 1"],
        ]
        * 2
    )


def is_after_batch(event: Event) -> bool:
    return isinstance(event, AfterBatch)


def test_the_order_of_an_instance_outweighs_that_of_its_class() -> None:
    late = named("late", order=-5)
    late.order = 5
    assert heard_by(make_learner(late, named("other"))) == ["other", "late"]


def test_a_callback_detached_and_attached_again_is_the_last_of_its_order() -> None:
    a, b = named("A"), named("B")
    learner = make_learner(a, b)
    learner.remove_cbs(a)
    assert heard_by(learner) == ["B"]
    learner.add_cbs(a)
    assert heard_by(learner) == ["B", "A"]
    assert learner.cbs == (b, a)


# ---------------------------------------------------------------------- run_after, run_before


class Base(Callback):
    """To be named by those that follow it."""


@pytest.mark.parametrize(
    ("cbs", "expected"),
    [
        ([named("A", 5), named("B", 0, after=["A"])], "AB"),
        ([named("B", 0, after=["A"]), named("A", 5)], "AB"),
        ([named("A"), named("B", 9, before=["A"])], "BA"),
        ([named("A", after="B"), named("B")], "BA"),
        ([named("A", after=Base), named("B", bases=(Base,))], "BA"),
        ([named("A", after=["B", "C"]), named("B", 2), named("C", 1)], "CBA"),
        ([named("A", after=["C"]), named("B", 2), named("C", 3)], "BCA"),
        ([named("A", after=["B"]), named("B", after=["C"]), named("C", 7)], "CBA"),
        ([named("A", before=["B"]), named("B", -1), named("C", -2)], "CAB"),
        ([named("A", after=["Nobody"]), named("B")], "AB"),
        ([named("A", before=["Nobody", MetricsCB]), named("B")], "AB"),
        ([named("A", after=[Base]), named("B", 3, bases=(Base,))], "BA"),
        ([named("A", after=["Base"]), named("B", 3, bases=(Base,))], "BA"),
        ([named("A", 4), named("B", before=[Base]), named("C", -1, bases=(Base,))], "BCA"),
        ([named("A", after=["A"]), named("B", 1)], "AB"),
    ],
    ids=[
        "after a later one",
        "whichever is attached first",
        "before an earlier one",
        "a single name",
        "a single class",
        "after two",
        "who waits for nobody keeps its place",
        "a chain",
        "before, ahead of the rest",
        "after one that is absent",
        "before some that are absent",
        "after a base class",
        "after the name of a base class",
        "before a base class",
        "after its own class",
    ],
)
def test_run_after_and_run_before_are_kept(cbs: list[Callback], expected: str) -> None:
    """G2."""
    learner = make_learner(*cbs)
    assert "".join(heard_by(learner)) == expected
    learner.run(1)
    assert "".join(learner.heard) == expected + expected * 5


def test_every_instance_of_a_class_is_waited_for() -> None:
    learner = make_learner(
        named("first", after=["other"]), named("other", 1), named("other", 2), named("last", 3)
    )
    assert heard_by(learner) == ["other", "other", "first", "last"]


def test_a_class_named_itself_is_one_of_its_own_kind() -> None:
    """Callbacks of one class that follow others of it are in no circle with themselves."""
    chain = [named("Link", order, bases=(Base,)) for order in (2, 1)]
    learner = make_learner(*chain, named("end", after=[Base]))
    assert heard_by(learner) == ["Link", "Link", "end"]


def test_who_had_to_wait_is_placed_among_subscribers_by_whom_it_waited_for() -> None:
    """G2: a subscriber is between two callbacks by its order, not by theirs alone."""
    learner = make_learner(named("A", 0, after=["B"]), named("B", 5))
    for order in (-1, 1, 6):
        learner.on(BeforeFit, order=order)(
            lambda event, order=order: event.learner.heard.append(order)
        )
    assert heard_by(learner) == [-1, 1, "B", "A", 6]


def test_who_is_waited_for_comes_and_goes() -> None:
    """G9: and then everything is as it was."""
    waits, waited = named("waits", after=["waited"]), named("waited", 3)
    learner = make_learner(waits, named("other", 1))
    assert heard_by(learner) == ["waits", "other"]
    learner.add_cbs(waited)
    assert heard_by(learner) == ["other", "waited", "waits"]
    learner.remove_cbs(waited)
    assert heard_by(learner) == ["waits", "other"]
    learner.run(1, cbs=waited, valid=False)
    assert learner.heard[2:] == ["other", "waited", "waits"] * 3
    assert heard_by(learner) == ["waits", "other"]


def test_who_is_waited_for_may_receive_other_events() -> None:
    """G2: a callback has one place, on every event, however long that was known in another."""

    class Waited(Callback):
        order = 3

        def before_epoch(self, event: Event) -> None: ...

    learner = make_learner(named("waits", after=["Waited"]), named("other", 1))
    learner.run(1, valid=False)
    assert learner.heard == ["waits", "other"] * 3
    learner.heard.clear()
    learner.run(1, valid=False, cbs=Waited())
    assert learner.heard == ["other", "waits"] * 3


def test_callbacks_of_two_learners_on_one_bus_are_ordered_apart() -> None:
    """G10."""
    bus = Bus()
    heard: list[list[str]] = []
    for cbs in ([named("A", 1), named("B", after=["A"])], [named("A", after=["B"]), named("B", 1)]):
        learner: Any = TrainLearner(nn.Linear(3, 1), bus=bus)
        learner.heard = []
        learner.add_cbs(cbs)
        heard.append(learner.heard)
        bus.send(BeforeFit(learner, "r1", 0.0, "fit", 1, None))
    assert heard == [["A", "B"], ["B", "A"]]


@pytest.mark.parametrize(
    "cbs",
    [
        [named("A", after=["B"]), named("B", after=["A"])],
        [named("A", after=["B"]), named("B", before=["C"]), named("C", before=["B"])],
        [named("A", before=["B"]), named("B", before=["C"]), named("C", before=["A"])],
        [named("A", after=["B"], before=["B"]), named("B")],
    ],
    ids=["two", "some", "three", "both ways"],
)
def test_a_circle_is_refused_and_nothing_is_attached(cbs: list[Callback]) -> None:
    """G9: for each permutation, and what was attached before keeps its order."""
    for permutation in itertools.permutations(cbs):
        learner = make_learner(named("Z", after=["Y"]), named("Y", 1))
        before = learner.cbs, learner.bus.subscriptions()
        with pytest.raises(ValueError, match=r"run_after and run_before of .* form a cycle") as e:
            learner.add_cbs([named("fine"), *permutation])
        circle = re.search("of (.*) form", str(e.value))
        assert circle is not None
        assert {"B"} <= set(circle[1].split(", "))
        assert not {"Y", "Z", "fine"} & set(circle[1].split(", "))
        assert (learner.cbs, learner.bus.subscriptions()) == before
        assert heard_by(learner) == ["Y", "Z"]


def test_a_circle_closed_by_a_temporary_callback_is_refused_before_the_fit() -> None:
    """G9."""
    learner = make_learner(named("A", after=["B"]), named("C"))
    with pytest.raises(ValueError, match=r"A, B form a cycle|B, A form a cycle"):
        learner.run(1, cbs=named("B", after=["A"]))
    assert learner.heard == []
    assert heard_by(learner) == ["A", "C"]


def test_callbacks_that_only_perform_or_observe_do_not_affect_the_others() -> None:
    class Watches(Callback):
        observes = (AfterBatch,)
        run_after = ("A",)

        def observe(self, event: AfterBatch) -> None: ...

    learner = make_learner(named("A", after=["Watches"]), Watches(), named("B"))
    assert heard_by(learner) == ["A", "B"]


ORDERS = st.lists(st.integers(-9, 9), min_size=2, max_size=6, unique=True)


@settings(max_examples=80)
@given(st.data())
def test_any_list_of_callbacks_runs_in_one_order_that_keeps_all_constraints(
    data: st.DataObject,
) -> None:
    """G2: with distinct orders and no cycle, the order of the list does not matter."""
    orders = data.draw(ORDERS, "orders")
    n = len(orders)
    # What is drawn points one way along a hidden line, so that it makes no circle.
    line = data.draw(st.permutations(range(n)), "line")
    pairs = [(line[i], line[j]) for i in range(n) for j in range(i + 1, n)]
    chosen = data.draw(st.lists(st.sampled_from(pairs), max_size=5, unique=True), "first, second")
    by_after = data.draw(st.lists(st.booleans(), min_size=5, max_size=5), "run_after or run_before")

    def make() -> list[Callback]:
        after: dict[int, list[str]] = {i: [] for i in range(n)}
        before: dict[int, list[str]] = {i: [] for i in range(n)}
        for (first, second), is_after in zip(chosen, by_after, strict=False):
            if is_after:
                after[second].append(f"C{first}")
            else:
                before[first].append(f"C{second}")
        return [named(f"C{i}", orders[i], after[i], before[i]) for i in range(n)]

    results = set()
    for permutation in data.draw(
        st.lists(st.permutations(range(n)), min_size=1, max_size=8), "permutations"
    ):
        cbs = make()
        learner = make_learner(*(cbs[i] for i in permutation))
        results.add(tuple(heard_by(learner)))
    assert len(results) == 1
    (heard,) = results
    assert sorted(heard) == sorted(f"C{i}" for i in range(n))
    for first, second in chosen:
        assert heard.index(f"C{first}") < heard.index(f"C{second}")
    if not chosen:
        assert list(heard) == [f"C{i}" for i in sorted(range(n), key=orders.__getitem__)]


@settings(max_examples=50)
@given(
    st.lists(st.integers(-3, 3), min_size=3, max_size=5, unique=True),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), max_size=3),
)
def test_attaching_one_by_one_or_all_at_once_is_the_same(
    orders: list[int], waits: list[tuple[int, int]]
) -> None:
    """G2: also where somebody is waited for who comes later."""

    def make() -> list[Callback]:
        return [
            named(f"C{i}", order, after=[f"C{b}" for a, b in waits if a == i and b < i])
            for i, order in enumerate(orders)
        ]

    at_once = make_learner(*make())
    one_by_one = make_learner()
    for cb in reversed(make()):
        one_by_one.add_cbs(cb)
    assert heard_by(at_once) == heard_by(one_by_one)


# ------------------------------------------------------------------------------------- explain


def lines_of(text: str) -> dict[str, list[str]]:
    """The receivers of each event, and the performer of each action, out of `explain`.

    Without the event classes of other tests, which a subscriber to a base class hears too.
    """
    found: dict[str, list[str]] = {}
    event = ""
    for line in text.splitlines():
        if ": performed by " in line:
            action, _, who = line.partition(": performed by ")
            called = who.partition(", instead of ")[0].split(", around ")
            found[action] = [name.partition(" (order")[0] for name in called]
        elif line.startswith("  "):
            found[event].append(line.split(maxsplit=1)[1])
        else:
            event = line
            found[event] = []
    return {name: who for name, who in found.items() if hasattr(events, name)}


def recorded_order(learner: Learner, fit: Callable[[], Any]) -> dict[str, list[str]]:
    """Who ran on each event in a real fit, by what the bus calls, the first time for each."""
    ran: dict[str, dict[str, None]] = {}
    for subscription in learner.bus.subscriptions():

        def call(
            event: Event, inner: Any = subscription.call, name: str = subscription.name
        ) -> Any:
            ran.setdefault(type(event).__name__, {})[name] = None
            return inner(event)

        subscription.call = call
    fit()
    return {event: list(names) for event, names in ran.items()}


def test_explain_lists_the_order_in_which_receivers_really_run(
    make_model: MakeModel, dls: DataLoaders
) -> None:
    """G2: explained before the run, and then compared with it."""
    learner = MomentumLearner(
        make_model(),
        dls,
        cbs=[
            GradientClippingCB(1.0),
            TrainCB(),
            MixedTrainingCB("fp16", init_scale=8.0),
            MetricsCB(),
            GradientAccumulationCB(2),
            ChannelLastCB(),
            DeviceCB("cpu"),
        ],
    )

    @learner.on(BatchEvent, order=55)
    def looks(event: BatchEvent) -> None: ...

    @learner.on(AfterEpoch)
    async def waits(event: AfterEpoch) -> None: ...

    explained = lines_of(learner.explain(file=io.StringIO()))
    ran = recorded_order(learner, lambda: learner.run(2))
    actions = {action.__name__ for action in ACTIONS}
    assert {e: names for e, names in explained.items() if e not in actions} == {
        e: names for e, names in ran.items() if e not in actions
    }
    assert {action: explained[action] for action in actions} == {
        "Predict": ["TrainCB.predict"],
        "GetLoss": ["TrainCB.get_loss"],
        "Backward": ["MixedTrainingCB.backward", "TrainCB.backward"],
        "Step": ["MixedTrainingCB.step", "TrainCB.step"],
        "ZeroGrad": ["MomentumLearner.zero_grad"],
    }
    assert {a: ran[a] for a in actions - {"ZeroGrad"}} == {
        a: explained[a] for a in actions - {"ZeroGrad"}
    }


def test_explain_prints_what_it_returns(capsys: pytest.CaptureFixture[str]) -> None:
    learner = make_learner(named("A", 2.5), named("B", -1))
    text = learner.explain()
    assert capsys.readouterr().out == text + "\n"
    assert text.splitlines() == [
        "BeforeFit",
        "      -1  B.before_fit",
        "     2.5  A.before_fit",
        "Predict: performed by TrainLearner.predict",
        "GetLoss: performed by TrainLearner.get_loss",
        "Backward: performed by TrainLearner.backward",
        "Step: performed by TrainLearner.step",
        "ZeroGrad: performed by TrainLearner.zero_grad",
        "AfterBatch",
        "      -1  B.after_batch",
        "     2.5  A.after_batch",
    ]
    file = io.StringIO()
    assert learner.explain(file) == text
    assert file.getvalue() == text + "\n"
    assert capsys.readouterr().out == ""


def test_explain_says_who_is_passed_over_and_who_is_missing() -> None:
    learner = Learner(nn.Linear(3, 1))
    assert learner.explain(io.StringIO()).splitlines() == [
        f"{action.__name__}: nobody" for action in ACTIONS
    ]

    class Own(Callback):
        order = -3

        def predict(self, event: Predict) -> None: ...

    own = TrainLearner(nn.Linear(3, 1), cbs=[TrainCB(), Own()])
    first, *others = own.explain(io.StringIO()).splitlines()
    assert first.startswith("Predict: performed by ")
    assert first.endswith(
        "Own.predict (order -3), instead of TrainCB.predict (order 1000), TrainLearner.predict"
    )
    assert others == [
        f"{action.__name__}: performed by TrainCB.{action.hook} (order 1000), instead of"
        f" TrainLearner.{action.hook}"
        for action in ACTIONS[1:]
    ]


def test_explain_is_silent_about_other_learners_and_tells_of_observers() -> None:
    """G10."""
    bus = Bus()
    one, other = (TrainLearner(nn.Linear(3, 1), bus=bus) for _ in range(2))

    def mine(event: AfterBatch) -> None: ...

    def beside(event: Event) -> None: ...

    one.subscribe(AfterBatch, mine)
    with one.observe(beside, CleanupFit, AfterBatch):
        told = one.explain(io.StringIO())
        assert mine.__qualname__ in told
        assert told.endswith(f"{beside.__qualname__}, on the event loop: CleanupFit, AfterBatch")
        assert all(": performed by" in line for line in other.explain(io.StringIO()).splitlines())
    assert "beside" not in one.explain(io.StringIO()).replace(mine.__qualname__, "")


def test_explain_lists_events_in_the_order_in_which_they_happen() -> None:
    learner = make_learner()
    happened: dict[str, None] = {}
    learner.on(Event)(lambda event: happened.setdefault(type(event).__name__))
    for action in ACTIONS:

        @learner.on(action)
        def perform(event: Event) -> None:
            happened[type(event).__name__] = None
            getattr(event.learner, event.hook)()

    explained = list(lines_of(learner.explain(io.StringIO())))
    learner.run(1, valid=False)
    assert explained == [*happened, "AfterValidation"]  # no ValidateCB was attached


# ------------------------------------------------------------------------ the post's example


@pytest.mark.parametrize("first", [SingleEpochCB, MetricsCB])
async def test_single_epoch_ends_the_fit_after_the_metrics_in_any_list_order(
    first: type[Callback], make_model: MakeModel, dls: DataLoaders
) -> None:
    """In the post, in one of the two orders, the metrics of the last epoch are lost."""
    metrics = MetricsCB()
    cbs = sorted([metrics, SingleEpochCB()], key=lambda cb: not isinstance(cb, first))
    with anyio.fail_after(GUARD):
        result = await TrainLearner(make_model(), dls, cbs=cbs).fit(3)
    assert [(row["epoch"], row["train"]) for row in metrics.history] == [(0, "train"), (0, "eval")]
    assert list(result.history) == metrics.history
    assert (result.status, result.who) == ("cancelled", "SingleEpochCB.after_epoch")


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_single_batch_ends_the_fit_after_the_metrics_have_seen_the_batch(
    order: tuple[int, ...], make_model: MakeModel, dls: DataLoaders
) -> None:
    seen: list[float] = []

    class Sees(Callback):
        def after_batch(self, event: BeforeBatch) -> None:
            seen.append(event.loss.item())

    cbs = [Sees(), SingleBatchCB(), MetricsCB()]
    result = TrainLearner(make_model(), dls, cbs=[cbs[i] for i in order]).run(2)
    assert len(seen) == 1
    assert (result.status, result.steps) == ("cancelled", 1)

"""What follows when a receiver raises, at every event: against a model of the documented rules.

The model is a script and a finger: all that an undisturbed fit emits, in a flat list, and a rule
of where to go on reading. What is raised moves the finger to the Cleanup* of the innermost open
scope, and on to the next one outwards, until the scope that catches it is closed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import anyio
import anyio.lowlevel
import pytest
import torch
from eventrain import events
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    ActionEvent,
    AfterBatch,
    AfterLoss,
    AfterPredict,
    BatchEvent,
    BeforeBatch,
    BeforeStep,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
    CleanupBatch,
    CleanupEpoch,
    CleanupFit,
    CleanupStep,
    Event,
    FitEvent,
    ScopeEnd,
    record_events,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tests.support.waiting import GUARD

N_EPOCHS, N_TRAIN, N_VALID = 2, 3, 2


@dataclass(frozen=True, slots=True, eq=False)
class Halfway(BatchEvent):
    """An event of a user's own."""


class EnoughSeen(CancelBatchException):
    """A user's own cancel: the scope of its base catches it."""


CANCELS: dict[str, type[CancelException]] = {
    "fit": CancelFitException,
    "epoch": CancelEpochException,
    "batch": CancelBatchException,
    "step": CancelStepException,
    "own": EnoughSeen,
}
KINDS = (*CANCELS, "error")
ACTIONS = ("Predict", "GetLoss", "Backward", "Step", "ZeroGrad")
BY = ("first", "second")
"""The names of the receivers."""


class Place(NamedTuple):
    """The nth time that an event is emitted, or an action performed, in a phase."""

    name: str
    phase: str
    nth: int


Injections = dict[Place, tuple[str, ...]]
"""What the first receiver raises at a place, and what the second one does."""


# ----------------------------------------------------------------------------------- the model


def script() -> Iterator[tuple[int, str, str]]:
    """All that an undisturbed fit emits and performs: epoch, name, phase."""
    yield 0, "BeforeFit", ""
    for epoch in range(N_EPOCHS):
        for phase, n_batches in (("train", N_TRAIN), ("valid", N_VALID)):
            batch = ["BeforeBatch", "Predict", "AfterPredict", "GetLoss", "AfterLoss"]
            if phase == "train":
                batch += ["Backward", "AfterBackward"]
                batch += ["BeforeStep", "Step", "ZeroGrad", "AfterStep", "CleanupStep"]
            batch += ["AfterBatch", "CleanupBatch"]
            for name in ["BeforeEpoch", *batch * n_batches, "AfterEpoch", "CleanupEpoch"]:
                yield epoch, name, phase
    yield N_EPOCHS - 1, "AfterFit", ""
    yield N_EPOCHS - 1, "CleanupFit", ""


OPENS = {"BeforeFit": "fit", "BeforeEpoch": "epoch", "BeforeBatch": "batch", "BeforeStep": "step"}
CLOSES = {name.replace("Before", "Cleanup"): scope for name, scope in OPENS.items()}
WEIGHT = {"step": 1, "batch": 2, "epoch": 3, "fit": 4, "nothing": 5}


@dataclass
class Raised:
    """Something on its way out, and which scope catches it; nothing does an error."""

    kind: str
    by: str
    on: str
    is_stray: bool = False

    @property
    def caught_by(self) -> str:
        if self.kind == "error" or self.is_stray:
            return "nothing"
        return "batch" if self.kind == "own" else self.kind

    @property
    def end(self) -> ScopeEnd:
        if self.is_stray:
            return ScopeEnd("failed", None, f"RuntimeError: {self.by} {self.kind}")
        said = message(self.kind, self.by)
        if self.kind == "error":
            return ScopeEnd("failed", None, f"ValueError: {said}")
        return ScopeEnd("cancelled", self.by, said)


@dataclass
class Run:
    """What a fit should do."""

    names: list[str] = field(default_factory=list)
    ends: list[tuple[str, ScopeEnd]] = field(default_factory=list)
    completed: Counter[tuple[str, str]] = field(default_factory=Counter)
    batches: Counter[tuple[int, str]] = field(default_factory=Counter)
    cut: dict[tuple[int, str], str] = field(default_factory=dict)
    """The status of the epochs that were not completed."""
    error: Raised | None = None


def heavier(a: Raised | None, b: Raised | None) -> Raised | None:
    """Errors outweigh cancels, wider cancels narrower ones; of equals the first one stands."""
    if a is None or b is None:
        return a or b
    return b if WEIGHT[b.caught_by] > WEIGHT[a.caught_by] else a


def model_of(injections: Injections) -> Run:
    """What the documented rules say that a fit with these injections does."""
    run = Run()
    pending: Raised | None = None
    open_scopes: list[str] = []
    times: Counter[tuple[str, str]] = Counter()
    previous = ""
    for epoch, name, phase in script():
        closes = CLOSES.get(name)
        if pending is not None and closes != open_scopes[-1]:
            continue
        if name in OPENS:
            open_scopes.append(OPENS[name])
        if closes:
            run.ends.append((name, pending.end if pending else ScopeEnd("completed")))
            run.completed[name, phase] += pending is None
            if name == "CleanupEpoch" and previous != "AfterEpoch" and pending is not None:
                run.cut[epoch, phase] = pending.end.status
        if name not in ACTIONS:
            run.names.append(name)
        run.completed[name, phase] += name == "ZeroGrad"  # the optimizer has stepped
        run.batches[epoch, phase] += name == "AfterBatch"
        times[name, phase] += 1
        previous = name
        kinds = injections.get(Place(name, phase, times[name, phase]), ())
        raised: Raised | None = None
        for by, kind in zip(BY, kinds if closes else kinds[:1], strict=False):
            raised = heavier(raised, Raised(kind, by, name))
        if raised is not None:
            raised.is_stray = raised.caught_by not in (*open_scopes, "nothing")
        pending = heavier(pending, raised)
        if closes:
            open_scopes.pop()
            if pending is not None and pending.caught_by == closes:
                pending = None
    run.error = pending
    return run


# ------------------------------------------------------------------------------- the real thing


def message(kind: str, by: str) -> str:
    return f"{kind}, said {by}"


def raise_it(kind: str, by: str) -> None:
    """As a careless receiver does: an `except Exception` around it must not eat a cancel."""
    if kind == "error":
        raise ValueError(message(kind, by))
    try:
        raise CANCELS[kind](message(kind, by))
    except Exception:
        pytest.fail("a cancel was swallowed")


def phase_of(event: Any) -> str:
    return {True: "train", False: "valid", None: ""}[getattr(event, "training", None)]


Receiver = Callable[[Any], Any]
Connect = Callable[[TrainLearner, str, type[Event], Receiver], None]


def subscribe(learner: TrainLearner, by: str, event_type: type[Event], receive: Receiver) -> None:
    receive.__qualname__ = by
    learner.subscribe(event_type, receive)


def add_callback(
    learner: TrainLearner, by: str, event_type: type[Event], receive: Receiver
) -> None:
    def method(self: Callback, event: Any) -> None:
        receive(event)

    method.__name__ = event_type.hook
    learner.add_cbs(type(by, (Callback,), {event_type.hook: method})())


def subscribe_async(
    learner: TrainLearner, by: str, event_type: type[Event], receive: Receiver
) -> None:
    async def wait(event: Any) -> None:
        await anyio.lowlevel.checkpoint()
        receive(event)

    subscribe(learner, by, event_type, wait)


def subscribe_task_group(
    learner: TrainLearner, by: str, event_type: type[Event], receive: Receiver
) -> None:
    """What is raised leaves it in an ExceptionGroup."""

    async def wait(event: Any) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            receive(event)
            tasks.cancel_scope.cancel()

    subscribe(learner, by, event_type, wait)


CARRIERS: dict[str, Connect] = {
    "subscriber": subscribe,
    "callback": add_callback,
    "async": subscribe_async,
    "task group": subscribe_task_group,
}


def connect(learner: TrainLearner, injections: Injections, carrier: str) -> None:
    """Have the injections raised. Places are counted by what is emitted, heard or not."""
    seen: Counter[tuple[str, str]] = Counter()

    def count(event: Event) -> None:
        seen[type(event).__name__, phase_of(event)] += 1

    learner.subscribe(Event, count, order=-1000)
    for name in dict.fromkeys(place.name for place in injections):
        event_type = getattr(events, name)
        is_action = issubclass(event_type, ActionEvent)
        for which, by in enumerate(BY[:1] if is_action else BY):

            def receive(event: Any, which: int = which, by: str = by) -> None:
                if isinstance(event, ActionEvent):
                    count(event)
                name, phase = type(event).__name__, phase_of(event)
                kinds = injections.get(Place(name, phase, seen[name, phase]), ())
                if which < len(kinds):
                    raise_it(kinds[which], by)
                if isinstance(event, ActionEvent):
                    getattr(event.learner, event.hook)()

            CARRIERS[carrier](learner, by, event_type, receive)


def make_learner() -> TrainLearner:
    torch.manual_seed(0)
    batches = [(torch.randn(4, 3), torch.randn(4, 1)) for _ in range(N_TRAIN)]
    learner = TrainLearner(nn.Linear(3, 1), DataLoaders(batches, batches[:N_VALID]))

    @learner.on(AfterBatch, order=-1000)
    def number(event: AfterBatch) -> None:
        record = event.learner.record
        record["batches"] = record.get("batches", 0) + 1

    return learner


def plain(end: ScopeEnd) -> ScopeEnd:
    """`end` as the model writes it: `first.after_loss` is `first`, strays without their prose.

    Who failed has a test of its own.
    """
    who, reason = end.who, end.reason
    if end.status == "failed":
        who = None
    if reason and reason.startswith("RuntimeError: "):
        by, _, rest = reason.removeprefix("RuntimeError: ").partition(" raised ")
        kind = next(k for k, cancel in CANCELS.items() if cancel.__name__ == rest.split()[0])
        reason = f"RuntimeError: {by.partition('.')[0]} {kind}"
    return ScopeEnd(end.status, who and who.partition(".")[0], reason)


async def fit_and_compare(learner: TrainLearner, injections: Injections, carrier: str) -> None:
    """Fit once with these injections, and hold all that can be seen to the model."""
    own = learner.bus.subscriptions()
    connect(learner, injections, carrier)
    error: BaseException | None = None
    returned = None
    with record_events(learner) as recorded, anyio.fail_after(GUARD):
        try:
            returned = await learner.fit(N_EPOCHS)
        except (ValueError, RuntimeError) as exc:
            error = exc
    learner.remove_cbs(learner.cbs)
    for subscription in learner.bus.subscriptions():
        if subscription not in own:
            subscription.close()

    expected = model_of(injections)
    assert recorded.names == expected.names
    cleanups = (CleanupFit, CleanupEpoch, CleanupBatch, CleanupStep)
    ends = [(type(e).__name__, plain(e.end)) for e in recorded if isinstance(e, cleanups)]
    assert ends == expected.ends

    result = learner.result
    assert result is not None
    assert [result.n_epochs, result.epochs, result.batches, result.valid_batches, result.steps] == [
        N_EPOCHS,
        expected.completed["CleanupEpoch", "train"],
        expected.completed["CleanupBatch", "train"],
        expected.completed["CleanupBatch", "valid"],
        expected.completed["ZeroGrad", "train"],
    ]
    assert list(result.history) == [
        {"epoch": epoch, "train": {"train": "train", "valid": "eval"}[phase], "batches": n}
        | ({"status": expected.cut[epoch, phase]} if (epoch, phase) in expected.cut else {})
        for (epoch, phase), n in expected.batches.items()
        if n
    ]
    end = plain(ScopeEnd(result.status, result.who, result.reason))
    if expected.error is None:
        assert error is None
        assert returned is result
        assert end == expected.ends[-1][1]
        return
    assert returned is None
    assert error is not None
    assert plain(ScopeEnd("failed", None, f"{type(error).__name__}: {error}")) == expected.error.end
    cause = error.__cause__ if expected.error.is_stray else error
    assert cause is not None
    note = cause.__notes__[0]
    assert note.startswith(f"raised by {expected.error.by}")
    assert f" on {expected.error.on}" in note
    assert end == expected.error.end


# ------------------------------------------------------------------------------------ the tests

PLACES = [
    Place(name, phase, 2 if phase else 1)
    for name, phase in dict.fromkeys((name, phase) for _, name, phase in script())
]
IDS = ["-".join(filter(None, place[:2])) for place in PLACES]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("place", PLACES, ids=IDS)
@pytest.mark.parametrize("carrier", ["subscriber", "callback", "async"])
def test_the_rules_hold_when_a_receiver_raises(carrier: str, place: Place, kind: str) -> None:
    """G1, G3, G5: each event and action, each cancel and an error, each kind of receiver."""
    anyio.run(fit_and_compare, make_learner(), {place: (kind,)}, carrier)


@pytest.mark.parametrize("kind", ["epoch", "own", "error"])
@pytest.mark.parametrize("carrier", ["async", "task group"])
@pytest.mark.parametrize(
    "place",
    [
        Place("BeforeFit", "", 1),
        Place("BeforeEpoch", "train", 2),
        Place("BeforeBatch", "valid", 3),
        Place("Predict", "train", 2),
        Place("AfterLoss", "train", 6),
        Place("BeforeStep", "train", 1),
        Place("AfterBatch", "valid", 1),
        Place("CleanupBatch", "train", 2),
        Place("AfterEpoch", "train", 1),
        Place("AfterFit", "", 1),
    ],
    ids=lambda place: "-".join(filter(None, place[:2])),
)
async def test_the_rules_hold_when_an_async_receiver_raises(
    place: Place, carrier: str, kind: str
) -> None:
    """G1, G3, G5: on every backend."""
    await fit_and_compare(make_learner(), {place: (kind,)}, carrier)


ALL_PLACES = [
    Place(name, phase, nth)
    for name, phase in dict.fromkeys((name, phase) for _, name, phase in script())
    for nth in range(1, 1 + sum((name, phase) == token[1:] for token in script()))
]
INJECTIONS = st.dictionaries(
    st.sampled_from(ALL_PLACES),
    st.lists(st.sampled_from(KINDS), min_size=1, max_size=2).map(tuple),
    max_size=6,
)


@settings(max_examples=100)
@given(INJECTIONS, st.sampled_from(["subscriber", "callback"]))
def test_any_number_of_receivers_raising_follow_the_same_rules(
    injections: Injections, carrier: str
) -> None:
    """G1, G3, G5: also in the cleanup after another, and two on one event."""
    anyio.run(fit_and_compare, make_learner(), injections, carrier)


async def test_one_learner_goes_through_every_ending_and_fits_again() -> None:
    """G9: nothing of one fit is left in the next."""
    learner = make_learner()
    for place in PLACES[::3]:
        for kind in ("fit", "step", "error"):
            await fit_and_compare(learner, {place: (kind,)}, "subscriber")
    await fit_and_compare(learner, {}, "subscriber")


# ----------------------------------------------------------------- what the model does not tell


def test_a_cancel_passes_the_receiver_that_emitted_the_event_it_was_raised_on() -> None:
    """G3: no `except Exception` eats it, and it is who raised it that is named."""
    learner = make_learner()

    @learner.on(AfterPredict, where=lambda event: event.training and event.iter == 1)
    def emits(event: AfterPredict) -> None:
        try:
            event.learner.emit(Halfway)
        except Exception:
            pytest.fail("a cancel was swallowed")

    def cancels(event: Halfway) -> None:
        raise CancelEpochException("halfway is enough")

    cancels.__qualname__ = "cancels"
    learner.subscribe(Halfway, cancels)
    with record_events(learner) as recorded:
        result = learner.run(1, valid=False)
    by_cancels = ScopeEnd("cancelled", "cancels", "halfway is enough")
    assert (
        recorded.names[-6:]
        == [
            *["BeforeBatch", "AfterPredict", "Halfway", "CleanupBatch", "CleanupEpoch"],
            *["AfterFit", "CleanupFit"],
        ][-6:]
    )
    assert [e.end for e in recorded if isinstance(e, CleanupBatch | CleanupEpoch)] == [
        ScopeEnd("completed"),
        by_cancels,
        by_cancels,
    ]
    assert result.status == "completed"
    assert (result.epochs, result.batches) == (0, 1)


class Meter(nn.Module):
    """Cancels from inside the model, far from any receiver."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise CancelBatchException("the model has seen enough")


def test_a_cancel_may_come_from_the_model_and_from_the_data() -> None:
    """G3: whoever raises it, its scope catches it."""
    learner = make_learner()
    learner.model = nn.Sequential(nn.Linear(3, 1), Meter())

    def cut_short() -> Iterator[Any]:
        yield torch.ones(4, 3), torch.ones(4, 1)
        raise CancelEpochException("the data is enough")

    learner.dls = DataLoaders(cut_short())
    with record_events(learner) as recorded:
        learner.run(1, valid=False)
    assert recorded.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch", "CleanupBatch", "CleanupEpoch"],
        *["AfterFit", "CleanupFit"],
    ]
    assert [event.end for event in recorded if hasattr(event, "end")] == [
        ScopeEnd("cancelled", "TrainLearner.predict", "the model has seen enough"),
        ScopeEnd("cancelled", None, "the data is enough"),
        ScopeEnd("completed"),
    ]


@pytest.mark.parametrize(
    ("event_type", "called"),
    [(AfterBatch, ["one"]), (CleanupBatch, ["one", "two", "three"])],
    ids=["AfterBatch", "CleanupBatch"],
)
def test_who_raises_keeps_others_from_an_event_but_not_from_a_cleanup(
    event_type: type[Event], called: list[str]
) -> None:
    """G1: one broken cleanup does not cost another callback its own."""
    learner = make_learner()
    heard: list[str] = []
    for name in ("one", "two", "three"):

        @learner.on(event_type)
        def receive(event: Event, name: str = name) -> None:
            heard.append(name)
            raise ValueError(name)

    with pytest.raises(ValueError, match="one") as raised:
        learner.run(1)
    assert heard == called
    others = [note for note in raised.value.__notes__ if note.startswith("then also")]
    assert [note[len("then also: ") :][:17] for note in others] == [
        f"ValueError({name!r})"[:17] for name in called[1:]
    ]


def test_a_failure_in_a_cleanup_is_a_note_on_the_error_that_came_first() -> None:
    """G5: of three errors the first is raised, and the others are in its notes."""
    learner = make_learner()

    def fail(event: Event) -> None:
        raise KeyError(type(event).__name__)

    for event_type in (AfterPredict, CleanupBatch, CleanupEpoch):
        learner.subscribe(event_type, fail)
    with pytest.raises(KeyError, match="AfterPredict") as raised:
        learner.run(1)
    assert raised.value.__notes__ == [
        f"raised by {fail.__qualname__} on AfterPredict, epoch 0, iter 0",
        "then, in cleanup: KeyError('CleanupBatch')",
        "then, in cleanup: KeyError('CleanupEpoch')",
    ]
    assert learner.result is not None
    assert learner.result.reason == "KeyError: 'AfterPredict'"


class Fatal(BaseException):
    """No Exception, and no cancel of ours."""


async def test_a_base_exception_fails_the_fit_through_every_cleanup() -> None:
    """G1, G5."""
    learner = make_learner()

    def fatal(event: BeforeBatch) -> None:
        raise Fatal("enough")

    learner.subscribe(BeforeBatch, fatal)
    with record_events(learner) as recorded, anyio.fail_after(GUARD):
        with pytest.raises(Fatal, match="enough"):
            await learner.fit(2)
    assert recorded.names == [
        *["BeforeFit", "BeforeEpoch", "BeforeBatch"],
        *["CleanupBatch", "CleanupEpoch", "CleanupFit"],
    ]
    assert {(e.end.status, e.end.reason) for e in recorded if hasattr(e, "end")} == {
        ("failed", "Fatal: enough")
    }


def test_a_scope_that_failed_says_by_whom() -> None:
    """G5: as `ScopeEnd.who` promises for cancels and failures alike."""
    learner = make_learner()

    def fails(event: AfterLoss) -> None:
        raise ValueError("no")

    fails.__qualname__ = "fails"
    learner.subscribe(AfterLoss, fails)
    with record_events(learner) as recorded, pytest.raises(ValueError, match="no"):
        learner.run(1)
    assert [event.end for event in recorded if hasattr(event, "end")] == [
        ScopeEnd("failed", "fails", "ValueError: no")
    ] * 3


def test_a_callback_may_open_a_scope_of_its_own() -> None:
    """G1: `learner.scope` takes a cancel and a Cleanup* of a user's."""
    learner = make_learner()
    left: list[ScopeEnd] = []

    @learner.on(AfterBatch, where=lambda event: event.training)
    def inspects(event: AfterBatch) -> None:
        with event.learner.scope(CancelInspection, CleanupInspection):
            raise CancelInspection(f"batch {event.iter}")

    learner.on(CleanupInspection)(lambda event: left.append(event.end))
    result = learner.run(1)
    assert [end.reason for end in left] == ["batch 0", "batch 1", "batch 2"]
    assert (result.status, result.batches) == ("completed", 3)


@pytest.mark.parametrize(
    "cancel", [CancelStepException, CancelBatchException, CancelEpochException]
)
def test_a_fit_in_which_something_was_cancelled_is_completed(cancel: type[CancelException]) -> None:
    learner = make_learner()

    @learner.on(BeforeStep)
    def cancels(event: BeforeStep) -> None:
        raise cancel("enough")

    assert [learner.run(1).status for _ in range(3)] == ["completed"] * 3


@pytest.mark.parametrize("cancelled", [False, True])
def test_a_scope_of_its_own_in_cleanup_fit_does_not_change_how_the_fit_ended(
    cancelled: bool,
) -> None:
    learner = make_learner()
    left: list[str] = []

    @learner.on(AfterBatch)
    def cancels(event: AfterBatch) -> None:
        raise CancelFitException("enough")

    @learner.on(CleanupFit)
    def inspects(event: CleanupFit) -> None:
        with event.learner.scope(CancelInspection, CleanupInspection):
            if cancelled:
                raise CancelInspection("not now")

    learner.on(CleanupInspection)(lambda event: left.append(event.end.status))
    result = learner.run(1)
    assert (result.status, result.reason) == ("cancelled", "enough")
    assert left == ["cancelled" if cancelled else "completed"]


class CancelInspection(CancelException):
    """Ends an inspection, a scope that this test adds."""

    width = 1


@dataclass(frozen=True, slots=True, eq=False)
class CleanupInspection(FitEvent):
    """The inspection is over."""

    end: ScopeEnd

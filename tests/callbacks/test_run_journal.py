"""JournalCB and compare_runs: two runs of the same thing have the same journal; else, where not."""

from __future__ import annotations

import json
import math
import random
import shutil
import struct
import tempfile
import tracemalloc
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from eventrain.callbacks import (
    Difference,
    GradientAccumulationCB,
    JournalCB,
    LRFinderCB,
    MetricsCB,
    SingleBatchCB,
    compare_runs,
)
from eventrain.callbacks.inspection.journal._digest import digest
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeBatch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    Event,
    FitEvent,
)
from eventrain.events.base import HOOKS
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy

GUARD = 30
DATA = load_digits()
IMAGES = torch.tensor(DATA.images[:64], dtype=torch.float32).flatten(1) / 16
LABELS = torch.tensor(DATA.target[:64])
TRAIN, VALID = 4, 2  # batches of an epoch


def seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def learner(
    *cbs: Callback,
    seed: int = 0,
    lr: float = 0.1,
    images: torch.Tensor = IMAGES,
    kind: type[TrainLearner] = TrainLearner,
) -> TrainLearner:
    """Real digits, shuffled by a generator, and dropout by the global random state."""
    seeded(42)
    model = nn.Sequential(nn.Linear(64, 12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 10))
    shuffle = torch.Generator().manual_seed(seed)
    train = DataLoader(TensorDataset(images[:48], LABELS[:48]), 12, True, generator=shuffle)
    valid = DataLoader(TensorDataset(images[48:], LABELS[48:]), 8)
    learn = kind(model, DataLoaders(train, valid), F.cross_entropy, lr, cbs)
    seeded(seed)
    return learn


def journal_of(path: Path, *cbs: Callback, every: int = 1, n_epochs: int = 2, **given: Any) -> Path:
    learner(JournalCB(path, every), *cbs, **given).run(n_epochs)
    return path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def places(path: Path) -> list[tuple[Any, ...]]:
    return [tuple(map(line.get, ("event", "epoch", "phase", "iter"))) for line in lines(path)]


def first(a: Path, b: Path) -> Difference:
    """The difference, which is the same the other way round."""
    there, back = compare_runs(a, b), compare_runs(b, a)
    assert there is not None
    assert back is not None
    assert (there.line, there.fields, there.equal) == (back.line, back.fields, back.equal)
    assert (there.a, there.b) == (back.b, back.a)
    return there


def place(difference: Difference) -> tuple[Any, ...]:
    return difference.event, difference.epoch, difference.phase, difference.iter


class Do(Callback):
    """Does something before some batches, counted over training and validation."""

    def __init__(self, what: dict[int, Callable[[Any], object]]) -> None:
        self.what = what
        self.n = -1

    def before_batch(self, event: BeforeBatch) -> None:
        self.n += 1
        if self.n in self.what:
            self.what[self.n](event.learner)


def leave(cancel: type[CancelException], reason: str) -> Callable[[Any], None]:
    def what(learner: Any) -> None:
        raise cancel(reason)

    return what


# ------------------------------------------------------------------------------- what is equal


def full(path: Path, seed: int = 0) -> TrainLearner:
    cbs = [GradientAccumulationCB(3), MetricsCB(MulticlassAccuracy()), JournalCB(path, 2)]
    return learner(*cbs, seed=seed, kind=MomentumLearner)


def test_the_same_seed_writes_the_same_journal_to_the_byte(
    tmp_path: Path, backend: dict[str, Any]
) -> None:
    """With dropout, shuffling, momentum, accumulation and metrics; and whatever the backend."""
    a, b, c = (tmp_path / name for name in "abc")
    full(a).run(2)
    full(b).run(2, **backend)
    full(c, seed=1).run(2, **backend)
    assert compare_runs(a, b) is None
    assert a.read_bytes() == b.read_bytes()
    assert compare_runs(a, c) is not None


def test_every_event_is_a_line_in_its_place(tmp_path: Path) -> None:
    """If it got through all others; where one of them cancels, the scope's end tells of it."""
    path, why = tmp_path / "journal", "enough of it"
    cancels = (CancelBatchException, CancelEpochException, CancelFitException)
    cancel = Do({n: leave(cancel, why) for n, cancel in zip((1, 6, 9), cancels, strict=True)})
    learn = learner(JournalCB(path), GradientAccumulationCB(2), cancel)
    seen = []

    @learn.on(Event, order=math.inf)
    def see(event: Any) -> None:
        phase = {True: "train", False: "valid", None: None}[getattr(event, "training", None)]
        name = type(event).__name__
        seen.append((name, getattr(event, "epoch", None), phase, getattr(event, "iter", None)))

    learn.run(3)
    assert places(path) == seen
    left = [line for line in lines(path) if line.get("status") == "cancelled"]
    assert {line["reason"] for line in left if line["event"] == "CleanupStep"} == {
        "accumulating, 1 of 2"
    }
    left = [line for line in left if line["event"] != "CleanupStep"]
    batch, epoch, fit = "CleanupBatch", "CleanupEpoch", "CleanupFit"
    assert [line["event"] for line in left] == [batch, batch, epoch, batch, epoch, fit]
    for line in left:
        assert (line["who"], line["reason"]) == ("Do.before_batch", why)
    ends = [line for line in lines(path) if line["event"].startswith("Cleanup")]
    assert all("status" in line for line in ends)
    completed = [line for line in ends if line["status"] == "completed"]
    assert completed
    assert all((line["who"], line["reason"]) == (None, None) for line in completed)


def test_digests_stand_where_they_are_promised(tmp_path: Path) -> None:
    """Of every n-th batch, training and validating counted together, and at the ends of epochs."""
    path = journal_of(tmp_path / "journal", every=5, n_epochs=2)
    state, batch = ["random", "weights", "optimizer"], ["batch", "loss"]
    found = [
        (*(line.get(key) for key in ("event", "phase", "iter")), set(line) & {*state, *batch})
        for line in lines(path)
        if "weights" in line or "batch" in line
    ]
    assert found == [
        ("BeforeFit", None, None, set(state)),
        ("AfterEpoch", "train", None, set(state)),
        ("AfterBatch", "valid", 0, {*state, *batch}),
        ("AfterEpoch", "valid", None, set(state)),
        ("AfterBatch", "train", 3, {*state, *batch}),
        ("AfterEpoch", "train", None, set(state)),
        ("AfterEpoch", "valid", None, set(state)),
    ]


def test_there_is_no_time_and_no_run_id_in_it(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    cbs = [JournalCB(path, 1), MetricsCB(), GradientAccumulationCB(2)]
    learner(*cbs).run(1, run_id="the-run-id")
    keys = {key for line in lines(path) for key in line}
    assert keys == {
        *("event", "epoch", "phase", "iter", "status", "who", "reason", "metrics"),
        *("random", "batch", "loss", "weights", "optimizer"),
    }
    assert "the-run-id" not in path.read_text()


def test_a_run_is_the_same_with_and_without_a_journal(tmp_path: Path) -> None:
    """G11: not a weight differs, nor a random state."""

    def fit(*cbs: Callback) -> list[torch.Tensor]:
        learn = learner(*cbs)
        learn.run(2)
        return [torch.get_rng_state(), *(p.detach() for p in learn.model.parameters())]

    with_it = fit(JournalCB(tmp_path / "journal", 1))
    assert all(torch.equal(a, b) for a, b in zip(with_it, fit(), strict=True))


def test_it_sees_what_every_other_callback_has_done(tmp_path: Path) -> None:
    class Late(Callback):
        order = 1e300

        def __init__(self, amount: float) -> None:
            self.amount = amount

        def after_batch(self, event: AfterBatch) -> None:
            if event.iter == 2:
                with torch.no_grad():
                    event.learner.model[0].bias += self.amount

    a, b = (journal_of(tmp_path / f"{x}", Late(x)) for x in (0.0, 0.5))
    difference = first(a, b)
    assert place(difference) == ("AfterBatch", 0, "train", 2)
    assert difference.fields == ("weights",)


def test_events_of_ones_own_are_in_it(tmp_path: Path) -> None:
    class RoundIsOver(FitEvent):
        pass

    try:
        path = tmp_path / "journal"
        learn = learner(JournalCB(path))
        learn.on(AfterEpoch)(lambda event: learn.emit(RoundIsOver))
        learn.run(1)
    finally:
        del HOOKS[RoundIsOver.hook]
    assert [line["event"] for line in lines(path)].count("RoundIsOver") == 2


# --------------------------------------------------------------------- the first difference named


def test_another_seed_is_named_as_other_random_states(tmp_path: Path) -> None:
    a, b = (journal_of(tmp_path / f"{seed}", seed=seed) for seed in (0, 1))
    difference = first(a, b)
    assert (difference.line, *place(difference)) == (1, "BeforeFit", None, None, None)
    assert difference.fields == ("random",)
    assert difference.equal == ("weights", "optimizer")
    one, two = lines(a)[0]["random"], lines(b)[0]["random"]
    assert str(difference) == (
        f"at line 1, BeforeFit, these differ: the random states ({one} and {two}); these are"
        " equal: the weights, the optimizer's state"
    )


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(1)])
def test_one_number_drawn_more_is_named(tmp_path: Path, draw: Callable[[], object]) -> None:
    a = journal_of(tmp_path / "a")
    b = journal_of(tmp_path / "b", Do({5: lambda learner: draw()}))
    difference = first(a, b)
    assert place(difference) == ("AfterBatch", 0, "valid", 1)
    assert difference.fields == ("random",)


def test_a_generator_of_a_loader_is_among_the_random_states(tmp_path: Path) -> None:
    def draw(learner: Any) -> None:
        torch.rand(1, generator=learner.dls.train.generator)

    a, b = journal_of(tmp_path / "a"), journal_of(tmp_path / "b", Do({1: draw}))
    difference = first(a, b)
    assert place(difference) == ("AfterBatch", 0, "train", 1)
    assert difference.fields == ("random",)


def test_one_sample_that_changed_is_named_as_another_batch(tmp_path: Path) -> None:
    """In the batch that the shuffling has put it into."""
    images = IMAGES.clone()
    images[20] = 1 - images[20]
    a = journal_of(tmp_path / "a")
    found = []
    learn = learner(JournalCB(tmp_path / "b", 1), images=images)

    @learn.on(AfterBatch, where=lambda event: event.training and event.epoch == 0)
    def find(event: AfterBatch) -> None:
        if any(torch.equal(image, images[20]) for image in learn.batch[0]):
            found.append(event.iter)

    learn.run(2)
    difference = first(a, tmp_path / "b")
    assert place(difference) == ("AfterBatch", 0, "train", *found)
    assert "batch" in difference.fields
    assert difference.equal == ("random", "optimizer")


def test_one_weight_that_was_another_is_named(tmp_path: Path) -> None:
    a = journal_of(tmp_path / "a")
    learn = learner(JournalCB(tmp_path / "b", 1))
    with torch.no_grad():
        learn.model[3].bias[7] += 2**-20
    learn.run(2)
    difference = first(a, tmp_path / "b")
    assert (difference.line, difference.fields) == (1, ("weights",))
    assert difference.equal == ("random", "optimizer")


def test_another_learning_rate_is_named_as_the_optimizers(tmp_path: Path) -> None:
    a, b = (journal_of(tmp_path / f"{lr}", lr=lr) for lr in (0.1, 0.2))
    difference = first(a, b)
    assert (difference.line, difference.fields) == (1, ("optimizer",))


def test_a_learning_rate_changed_on_the_way_is_named_with_the_weights(tmp_path: Path) -> None:
    def double(learner: Any) -> None:
        learner.opt.param_groups[0]["lr"] *= 2

    a, b = journal_of(tmp_path / "a", every=3), journal_of(tmp_path / "b", Do({1: double}), every=3)
    difference = first(a, b)
    assert place(difference) == ("AfterBatch", 0, "train", 2)
    assert set(difference.fields) == {"loss", "weights", "optimizer"}
    assert difference.equal == ("random", "batch")
    digests = [lines(path)[difference.line - 1] for path in (a, b)]
    assert [difference.a, difference.b] == [
        {key: line[key] for key in difference.fields} for line in digests
    ]


def weight(learner: Any) -> None:
    with torch.no_grad():
        learner.model[0].weight[3, 5] += 0.25


def faster(learner: Any) -> None:
    learner.opt.param_groups[0]["lr"] *= 3


def pixel(learner: Any) -> None:
    learner.batch[0][0] = 1 - learner.batch[0][0]


CHANGES: dict[str, tuple[Callable[[Any], object], str]] = {
    "weight": (weight, "weights"),
    "lr": (faster, "optimizer"),
    "random": (lambda learner: torch.rand(1), "random"),
    "data": (pixel, "weights"),
}
BATCHES = 2 * (TRAIN + VALID)
EPOCHS_END = (TRAIN, TRAIN + VALID, 2 * TRAIN + VALID, BATCHES)


@settings(max_examples=20)
@given(k=st.integers(1, BATCHES), every=st.integers(1, 7), change=st.sampled_from(sorted(CHANGES)))
def test_what_happens_at_a_batch_is_named_at_the_first_digest_after_it(
    k: int, every: int, change: str
) -> None:
    what, field = CHANGES[change]
    epoch, n = divmod(k - 1, TRAIN + VALID)
    if change == "data" and n >= TRAIN:
        return  # in validation it leaves no trace
    with tempfile.TemporaryDirectory() as folder:
        a = journal_of(Path(folder, "a"), every=every)
        b = journal_of(Path(folder, "b"), Do({k - 1: what}), every=every)
        difference = first(a, b)
    of_batch = -(-k // every) * every
    of_epoch = min(end for end in EPOCHS_END if end >= k)
    epoch, n = divmod(min(of_batch, of_epoch) - 1, TRAIN + VALID)
    phase, n = ("train", n) if n < TRAIN else ("valid", n - TRAIN)
    event, iter_ = ("AfterBatch", n) if of_batch <= of_epoch else ("AfterEpoch", None)
    assert place(difference) == (event, epoch, phase, iter_)
    assert field in difference.fields
    assert difference.fields == tuple(key for key in difference.a if key not in difference.equal)


# ----------------------------------------------------------------------- runs of different ways


def test_an_event_that_only_one_run_had_is_named(tmp_path: Path) -> None:
    stop = Do({2: leave(CancelBatchException, "a bad batch")})
    a, b = journal_of(tmp_path / "a"), journal_of(tmp_path / "b", stop)
    difference = first(a, b)
    assert place(difference) == ("BeforeBatch", 0, "train", 2)
    assert difference.fields == ("event", "status", "who", "reason")
    assert difference.equal == ()
    assert str(difference) == (
        f"line {difference.line} is BeforeBatch of training epoch 0, batch 2 in the first"
        " run, CleanupBatch of training epoch 0, batch 2 (cancelled by Do.before_batch: a bad"
        " batch) in the second"
    )


def test_the_same_scope_that_ended_otherwise_is_named(tmp_path: Path) -> None:
    a, b = (
        journal_of(tmp_path / why, Do({4: leave(CancelBatchException, f"too {why}")}))
        for why in ("large", "small")
    )
    difference = first(a, b)
    assert place(difference) == ("CleanupBatch", 0, "valid", 0)
    assert str(difference) == (
        f"at line {difference.line}, CleanupBatch of validating epoch 0, batch 0, these differ:"
        " reason (too large and too small)"
    )


def test_a_longer_run_is_named_by_what_it_did_more(tmp_path: Path) -> None:
    a, b = (journal_of(tmp_path / f"{n}", n_epochs=n) for n in (1, 2))
    difference = first(a, b)
    assert place(difference) == ("AfterFit", None, None, None)
    assert difference.b == {"event": "BeforeEpoch", "epoch": 1, "phase": "train"}
    assert str(difference).endswith(
        "AfterFit in the first run, BeforeEpoch of training epoch 1 in the second"
    )


def test_a_journal_that_ends_earlier_differs_where_it_ends(tmp_path: Path) -> None:
    """As that of a run that was killed does."""
    whole, cut = journal_of(tmp_path / "whole"), tmp_path / "cut"
    cut.write_bytes(b"".join(whole.read_bytes().splitlines(keepends=True)[:4]))
    difference = first(whole, cut)
    assert difference.line == 5
    assert place(difference) == ("AfterLoss", 0, "train", 0)
    assert place(difference) == place(compare_runs(cut, whole))  # type: ignore[arg-type]
    assert str(difference) == (
        "line 5 is AfterLoss of training epoch 0, batch 0 in the first run, missing in the second"
    )


def test_two_journals_of_another_every_differ_in_what_they_have(tmp_path: Path) -> None:
    a, b = (journal_of(tmp_path / f"{every}", every=every) for every in (1, 100))
    difference = first(a, b)
    assert place(difference) == ("AfterBatch", 0, "train", 0)
    assert set(difference.b.values()) == {None}
    assert difference.equal == ()


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-1],
        lambda text: text[: len(text) // 2],
        lambda text: b"\xff\x00" + text,
        lambda text: b"[1]\n",
        lambda text: b"7\n",
        lambda text: b'{"epoch":1}\n',
        lambda text: b'{"event":"CleanupEpoch","metrics":7}\n',
        lambda text: b"\n",
    ],
)
def test_a_damaged_line_is_refused_with_its_number(
    tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    """In either journal, and if both are damaged in the same way."""
    whole, damaged = journal_of(tmp_path / "whole"), tmp_path / "damaged"
    texts = whole.read_bytes().splitlines(keepends=True)
    damaged.write_bytes(b"".join([*texts[:11], damage(texts[11])]))
    for a, b in ((whole, damaged), (damaged, whole), (damaged, damaged)):
        with pytest.raises(ValueError, match=f"{damaged}: line 12 is damaged: b'"):
            compare_runs(a, b)


def test_a_journal_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        compare_runs(tmp_path / "nowhere", tmp_path / "nowhere")


def test_long_journals_are_not_held_in_memory(tmp_path: Path) -> None:
    text = b'{"event":"AfterLoss","epoch":0,"phase":"train","iter":%d}\n'
    for name, last in (("a", 1), ("b", 2)):
        (tmp_path / name).write_bytes(b"".join([text % i for i in [*range(30_000), last]]))
    tracemalloc.start()
    try:
        difference = compare_runs(tmp_path / "a", tmp_path / "b")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert difference is not None
    assert difference.line == 30_001
    assert peak < 300_000 < (tmp_path / "a").stat().st_size / 5


# ------------------------------------------------------------------------------------- metrics


class Records(Callback):
    def __init__(self, **numbers: Any) -> None:
        self.numbers = numbers

    def after_epoch(self, event: AfterEpoch) -> None:
        event.learner.record.update(self.numbers)


def strict(text: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_metrics_are_exact_and_valid_json_whatever_they_are(tmp_path: Path) -> None:
    class Thing:
        pass

    numbers = {
        "tenth": 0.1 + 2**-55,
        "nan": math.nan,
        "least": -math.inf,
        "zero": -0.0,
        "one": np.float32(0.1),
        "each": torch.tensor([0.1, math.nan]),
        "nested": {1: [True, None, 2]},
        "text": "\udc80\n",
        "thing": Thing(),
    }
    path = tmp_path / "journal"
    learner(JournalCB(path), Records(**numbers)).run(1, valid=False)
    (text,) = (text for text in path.read_text().splitlines() if "CleanupEpoch" in text)
    metrics = strict(text)["metrics"]
    assert metrics.pop("thing").endswith("Thing object>")
    assert struct.pack("d", metrics.pop("zero")) == struct.pack("d", -0.0)
    assert metrics == {
        "tenth": 0.1 + 2**-55,
        "nan": "nan",
        "least": "-inf",
        "one": float(np.float32(0.1)),
        "each": [float(np.float32(0.1)), "nan"],
        "nested": {"1": [True, None, 2]},
        "text": "\udc80\n",
    }


@pytest.mark.parametrize(
    ("one", "two"),
    [(0.1, math.nextafter(0.1, 1)), (0.0, -0.0), (1, 1.0), (1, True), (0.5, math.nan)],
)
def test_a_metric_that_differs_in_its_last_bit_is_named(
    tmp_path: Path, one: float, two: float
) -> None:
    a = journal_of(tmp_path / "a", Records(accuracy=one, other=1), every=100)
    b = journal_of(tmp_path / "b", Records(accuracy=two, other=1), every=100)
    difference = first(a, b)
    assert place(difference) == ("CleanupEpoch", 0, "train", None)
    assert difference.fields == ("metrics.accuracy",)
    assert f"metrics.accuracy ({one} and {two})" in str(difference)


def test_where_an_object_lies_in_memory_is_no_part_of_the_run(tmp_path: Path) -> None:
    paths, kept = [], []
    for name in "ab":
        kept.append(object())

        def fail(learner: Any) -> None:
            raise KeyError(kept[-1])

        paths.append(tmp_path / name)
        with pytest.raises(KeyError):
            journal_of(paths[-1], Do({1: fail}))
    assert lines(paths[0])[-1]["reason"] == "KeyError: <object object>"
    assert compare_runs(*paths) is None


# ------------------------------------------------------------------------------------- digests

Pair = namedtuple("Pair", "x y")


@dataclass
class Plain:
    x: Any


@dataclass(slots=True)
class Slotted:
    x: Any


class Custom:
    def __init__(self, x: Any) -> None:
        self.x = x
        self.me = self


ONES = torch.ones(2, 3)
DIFFERENT: list[Any] = [
    ONES,
    torch.zeros(2, 3),
    torch.ones(3, 2),
    torch.ones(6),
    torch.ones(2, 3, dtype=torch.float64),
    torch.ones(2, 3, dtype=torch.int32),
    torch.ones(2, 3, dtype=torch.bfloat16),
    torch.ones(2, 3, dtype=torch.float16),
    torch.ones(2, 3, dtype=torch.bfloat16) + 2**-7,
    torch.ones(2, 3).to(torch.float8_e4m3fn),
    torch.ones(2, 3, dtype=torch.bool),
    torch.ones(2, 3, dtype=torch.complex64),
    torch.zeros(0, 3),
    torch.zeros(3, 0),
    torch.zeros(()),
    torch.tensor(-0.0),
    torch.eye(3).to_sparse(),
    torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged),
    None,
    True,
    1,
    1.0,
    "1",
    b"1",
    1j,
    "",
    [],
    {},
    [[]],
    [[], []],
    [[[]]],
    [1, 2],
    [12],
    ["1", "2"],
    ["1 0:", ""],
    {"a": 1},
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},
    ["a", 1],
    {"x": ONES},
    {"x": [ONES]},
    {"x": torch.zeros(2, 3)},
    Plain(1),
    Plain(ONES),
    Plain([ONES]),
    Slotted(1),
    Slotted(ONES),
    Custom(1),
    Custom(ONES),
]


def test_what_differs_has_another_digest() -> None:
    digests = [digest(value) for value in DIFFERENT]
    assert len(set(digests)) == len(digests)
    assert digests == [digest(value) for value in DIFFERENT]
    assert {len(digest) for digest in digests} == {16}


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (ONES, nn.Parameter(torch.ones(2, 3))),
        (torch.arange(6).view(2, 3), torch.tensor([[0, 3], [1, 4], [2, 5]]).t()),
        (torch.ones(1).expand(4), torch.ones(4)),
        (torch.tensor([1 + 2j]).conj(), torch.tensor([1 - 2j])),
        (torch.tensor([1 + 2j]).conj().imag, torch.tensor([-2.0])),
        (torch.eye(3).to_sparse(), torch.eye(3)),
        ((1, ONES), [1, ONES]),
        (Pair(1, ONES), (1, ONES)),
        (OrderedDict(a=1), {"a": 1}),
        (UserDict(a=ONES), {"a": ONES}),
        (np.float64(0.1), 0.1),
        (np.array([[1, 2]]), [[1, 2]]),
        (Custom(ONES), Custom(ONES)),
    ],
)
def test_what_has_equal_values_has_the_same_digest(one: Any, two: Any) -> None:
    assert digest(one) == digest(two)


def test_a_lazy_module_can_be_trained_with_a_journal(tmp_path: Path) -> None:
    def fit(path: Path) -> Path:
        seeded(0)
        batches = [(IMAGES[:8], LABELS[:8])] * 2
        model = nn.Sequential(nn.LazyLinear(10), nn.LazyBatchNorm1d())
        cbs = JournalCB(path, 1)
        TrainLearner(model, DataLoaders(batches), F.cross_entropy, 0.1, cbs).run(1, valid=False)
        return path

    a, b = fit(tmp_path / "a"), fit(tmp_path / "b")
    assert compare_runs(a, b) is None
    weights = [line["weights"] for line in lines(a) if "weights" in line]
    assert len(set(weights)) == 3  # lazy, after a batch, after both


def test_the_state_of_an_optimizer_is_digested(tmp_path: Path) -> None:
    """Adam's moments, where the weights are the same: they could not be resumed without."""

    def forget(learner: Any) -> None:
        learner.opt.state.clear()

    paths = []
    for name, what in (("a", lambda learner: None), ("b", forget)):
        learn = learner(JournalCB(tmp_path / name), Do({4: what}))
        learn.opt_func = torch.optim.Adam
        learn.run(1)
        paths.append(tmp_path / name)
    difference = first(*paths)
    assert place(difference) == ("AfterEpoch", 0, "valid", None)
    assert difference.fields == ("optimizer",)


# ------------------------------------------------------------------------- the file, fit by fit


def test_a_fit_begins_the_file_anew(tmp_path: Path) -> None:
    path, alone = tmp_path / "journal", journal_of(tmp_path / "alone", n_epochs=1)
    learn = learner(JournalCB(path, 1))
    learn.run(2)
    two = path.read_bytes()
    fresh = learner()
    learn.model.load_state_dict(fresh.model.state_dict())
    learn.dls = fresh.dls
    learn.run(1)
    assert compare_runs(path, alone) is None
    assert len(path.read_bytes()) < len(two)


@pytest.mark.parametrize("what", ["validate", "get_preds", "lr_find"])
async def test_what_is_no_training_leaves_the_journal_alone(tmp_path: Path, what: str) -> None:
    """Before a fit and after it."""
    with anyio.fail_after(GUARD):
        path, alone = tmp_path / "journal", tmp_path / "alone"
        await learner(JournalCB(alone, 2)).fit(2)
        learn = learner(JournalCB(path, 2))
        seeded(7)
        await getattr(learn, what)()
        assert not path.exists()
        fresh = learner()
        learn.model.load_state_dict(fresh.model.state_dict())
        learn.dls = fresh.dls
        await learn.fit(2)
        assert path.read_bytes() == alone.read_bytes()
        await getattr(learn, what)()
        assert path.read_bytes() == alone.read_bytes()


def test_a_finder_given_to_a_fit_leaves_it_alone_too(tmp_path: Path) -> None:
    learner(JournalCB(tmp_path / "journal"), LRFinderCB()).run(1)
    assert not (tmp_path / "journal").exists()


def test_the_journal_is_on_the_disk_at_every_digest(tmp_path: Path) -> None:
    """For whoever follows it, and for whoever is killed."""
    path = tmp_path / "journal"
    learn = learner(JournalCB(path, 3))
    seen = []

    @learn.on(AfterBatch, order=math.inf)
    def look(event: AfterBatch) -> None:
        last = path.read_bytes().splitlines(keepends=True)[-1]
        if last.endswith(b"}\n") and json.loads(last).get("iter") == event.iter:
            seen.append((event.training, event.iter))

    learn.run(1)
    assert (True, 2) in seen
    assert (False, 1) in seen


def test_a_fit_that_fails_leaves_a_whole_journal(tmp_path: Path) -> None:
    def fail(learner: Any) -> None:
        raise ZeroDivisionError("by hand")

    path = tmp_path / "journal"
    with pytest.raises(ZeroDivisionError):
        journal_of(path, Do({2: fail}))
    assert [
        (line["event"], line["status"], line["who"], line["reason"]) for line in lines(path)[-3:]
    ] == [
        (name, "failed", "Do.before_batch", "ZeroDivisionError: by hand")
        for name in ("CleanupBatch", "CleanupEpoch", "CleanupFit")
    ]


async def test_a_fit_that_the_host_cancels_leaves_a_whole_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    learn = learner(JournalCB(path))
    with anyio.fail_after(GUARD), anyio.CancelScope() as scope:

        @learn.on(AfterBatch, where=lambda event: event.iter == 2)
        async def cancel(event: AfterBatch) -> None:
            scope.cancel()

        await learn.fit(5)
    assert scope.cancelled_caught
    last = lines(path)[-1]
    assert (last["event"], last["status"], last["who"]) == ("CleanupFit", "cancelled", "host")


def test_a_fit_that_is_left_before_it_begins_has_a_journal_of_its_own(tmp_path: Path) -> None:
    """Not that of the fit before."""
    path = tmp_path / "journal"
    learn = learner(JournalCB(path))
    learn.run(1)

    @learn.on(BeforeFit)
    def leave(event: BeforeFit) -> None:
        raise CancelFitException("not today")

    learn.run(1)
    (line,) = lines(path)
    assert (line["event"], line["reason"]) == ("CleanupFit", "not today")


def test_a_callback_that_ends_the_fit_in_after_batch_is_in_the_journal(tmp_path: Path) -> None:
    path = journal_of(tmp_path / "journal", SingleBatchCB())
    assert [line["event"] for line in lines(path)[-4:]] == [
        "CleanupStep",
        "CleanupBatch",
        "CleanupEpoch",
        "CleanupFit",
    ]
    assert lines(path)[-1]["who"] == "SingleBatchCB.after_batch"


def test_a_folder_that_is_missing_is_told_before_any_batch(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "journal"
    learn = learner(JournalCB(path))
    with pytest.raises(FileNotFoundError, match=f"journal {path}.*create the folder") as info:
        learn.run(1)
    assert not any("then" in note for note in info.value.__notes__)  # once
    path.parent.mkdir()
    learn.run(1)
    assert lines(path)[-1]["status"] == "completed"


@pytest.mark.parametrize("every", [0, -1, True, 1.5, "3", None])
def test_what_is_no_number_of_batches_is_refused(tmp_path: Path, every: Any) -> None:
    with pytest.raises(ValueError, match=r"every=.*give a number of batches"):
        JournalCB(tmp_path / "journal", every)


async def test_two_learners_cannot_write_one_journal_at_once(tmp_path: Path) -> None:
    """The second is refused; the first one's stays whole."""
    alone, path = tmp_path / "alone", tmp_path / "journal"
    one_for_both = JournalCB(path)
    other = TrainLearner(nn.Linear(1, 1), DataLoaders([(torch.ones(1, 1), torch.ones(1, 1))]))
    other.add_cbs(one_for_both)
    learn = learner(one_for_both)
    refused = []

    @learn.on(AfterBatch, once=True)
    async def meanwhile(event: AfterBatch) -> None:
        with pytest.raises(RuntimeError, match="cannot use this JournalCB, because run") as info:
            await other.fit(1, valid=False)
        refused.append(info.value)

    with anyio.fail_after(GUARD):
        await learner(JournalCB(alone)).fit(1)
        seeded(0)
        await learn.fit(1)
        assert len(refused) == 1
        assert path.read_bytes() == alone.read_bytes()
        await other.fit(1, valid=False)  # one after the other they may
    assert len(places(path)) < 20


# -------------------------------------------------------------------------------------- resumed


@pytest.fixture(scope="module")
def events() -> list[Event]:
    """All events of a run, to be told to a journal once more."""
    learn = learner()
    found: list[Event] = []
    with learn.subscribe(Event, found.append):
        learn.run(2)
    return found


def tell(journal: JournalCB, events: list[Event]) -> JournalCB:
    for event in events:
        journal.event(event)
    return journal


def resumed(path: Path, state: dict[str, Any], begin: list[Event], every: int = 1) -> JournalCB:
    """The journal of a fit that tells of its begin, and then loads a checkpoint."""
    journal = JournalCB(path, every)
    learn = begin[0].learner
    learn.batch_reader.resumed_from = Path("checkpoint")
    try:
        tell(journal, begin)
    finally:
        learn.batch_reader.resumed_from = None
    journal.load_state_dict(state)
    return journal


@settings(max_examples=60)
@given(data=st.data(), every=st.integers(1, 7), rest=st.binary(max_size=20))
def test_the_journal_of_a_run_killed_and_resumed_is_that_of_an_undisturbed_one(
    events: list[Event], data: Any, every: int, rest: bytes
) -> None:
    """Saved anywhere, killed anywhere after that, perhaps in the middle of a line; and again."""
    last = len(events) - 1
    with tempfile.TemporaryDirectory() as folder:
        whole, path, left = (Path(folder, name) for name in ("whole", "journal", "left"))
        tell(JournalCB(whole, every), events)
        journal, done = JournalCB(path, every), 0
        cuts = data.draw(st.lists(st.integers(1, last - 1), min_size=1, max_size=3, unique=True))
        for saved in sorted(cuts):
            killed = data.draw(st.integers(saved, last))
            state = tell(journal, events[done:saved]).state_dict()
            tell(journal, events[saved:killed])
            shutil.copy(path, left)  # without what was not flushed
            journal.event(events[last])
            path.write_bytes(left.read_bytes() + rest)
            told_before = data.draw(st.integers(1, 2))
            journal, done = resumed(path, state, events[:told_before], every), saved
        tell(journal, events[done:])
        assert path.read_bytes() == whole.read_bytes()


def half(events: list[Event], path: Path) -> tuple[dict[str, Any], bytes]:
    """What a checkpoint in the middle holds, and the journal of the whole run."""
    n = len(events) // 2
    journal = JournalCB(path)
    state = tell(journal, events[:n]).state_dict()
    tell(journal, events[n:])
    return state, path.read_bytes()


def test_until_its_state_is_loaded_a_resumed_fit_writes_nothing(
    events: list[Event], tmp_path: Path
) -> None:
    """Nor if that fails: what is there may be resumed another time."""
    path = tmp_path / "journal"
    state, whole = half(events, path)
    learn = events[0].learner
    learn.batch_reader.resumed_from = Path("checkpoint")
    try:
        journal = tell(JournalCB(path), events[:2])
        before = journal.state_dict()
        journal.load_state_dict(state)
        journal.load_state_dict(before)  # another callback could not be loaded
        tell(journal, events[-3:])
    finally:
        learn.batch_reader.resumed_from = None
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("size", "has"), [(None, "missing or empty"), (0, "missing or empty"), (1000, "has 1000 bytes")]
)
def test_a_journal_that_has_gone_meanwhile_is_told(
    events: list[Event], tmp_path: Path, size: int | None, has: str
) -> None:
    path = tmp_path / "journal"
    state, whole = half(events, path)
    path.unlink()
    if size is not None:
        path.write_bytes(whole[:size])
    with pytest.raises(ValueError, match=f"journal {path}.*{has}.* had {state['size']} when"):
        resumed(path, state, events[:1])
    assert path.exists() is (size is not None)
    assert size is None or path.read_bytes() == whole[:size]


def test_outside_of_a_fit_its_state_is_only_noted(events: list[Event], tmp_path: Path) -> None:
    path = tmp_path / "journal"
    state, whole = half(events, path)
    journal = JournalCB(path)
    journal.load_state_dict(state)
    assert journal.state_dict() == state
    assert path.read_bytes() == whole

"""A checkpoint that does not fit is refused, by name, before anything is changed."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CheckpointCB,
    MetricsCB,
)
from eventrain.engine import (
    Checkpoint,
    CheckpointMismatchError,
    TrainLearner,
)
from eventrain.engine.checkpoint.snapshot import Snapshot
from eventrain.engine.checkpoint.state import state_of
from eventrain.events import (
    BeforeEpoch,
    BeforeFit,
    Callback,
)
from torch import nn, optim
from torch.nn import functional as F
from torch.utils.data import (
    DataLoader,
    IterableDataset,
)
from torcheval.metrics import (
    MulticlassAccuracy,
)

from tests.support.resuming import (
    EPOCHS,
    LOADERS,
    TRAIN,
    TRAINING,
    Average,
    Make,
    assert_same,
    interrupt,
    make_dls,
    make_learner,
    make_model,
    momentum_sgd,
    restless_model,
    traces,
)


def two_groups(parameters: Any, lr: float) -> optim.Optimizer:
    first, *others = parameters
    return optim.SGD([{"params": [first]}, {"params": others}], lr)


def lonely(*cbs: Callback) -> TrainLearner:
    """Without the metrics that the others have."""
    return TrainLearner(make_model(), make_dls(), F.cross_entropy, cbs=cbs)


MISMATCHES: dict[str, tuple[Make, str]] = {
    "another size": (
        lambda: make_learner(
            model=lambda: nn.Sequential(nn.Linear(64, 13), nn.ReLU(), nn.Linear(13, 10))
        ),
        r"0\.bias of the model is \(13,\) of float32, but \(12,\) of float32 in the checkpoint;"
        r" 0\.weight of the model is \(13, 64\) of float32, but \(12, 64\) of float32 in the",
    ),
    "a layer less": (
        lambda: make_learner(model=lambda: nn.Sequential(nn.Linear(64, 12))),
        r"the model does not have 2\.bias, which the checkpoint has; .* not have 2\.weight, which",
    ),
    "a layer more": (
        lambda: make_learner(model=lambda: make_model().append(nn.Linear(10, 10))),
        r"the model has 3\.bias, which the checkpoint does not have; the model has 3\.weight",
    ),
    "all is different": (
        lambda: make_learner(model=restless_model),
        r"does not have 2\.bias, which .* has; .* has 1\.bias, which .* not have; .*; and 5 more$",
    ),
    "another dtype": (
        lambda: make_learner(model=lambda: make_model().bfloat16()),
        r"2\.bias of the model is \(10,\) of bfloat16, but \(10,\) of float32 in the checkpoint",
    ),
    "another optimizer within": (
        lambda: make_learner(AccelerateCB("no"), opt_func=optim.AdamW),
        "the optimizer is AdamW, but SGD in the checkpoint; AccelerateCB is among the callbacks",
    ),
    "another optimizer": (
        lambda: make_learner(opt_func=optim.AdamW),
        "the optimizer is AdamW, but SGD in the checkpoint$",
    ),
    "other groups": (
        lambda: make_learner(opt_func=two_groups),
        r"the optimizer has groups of \[1, 3\] parameters, but \[4\] in the checkpoint$",
    ),
    "a callback less": (lonely, "MetricsCB is not among the callbacks, but in the checkpoint$"),
    "a callback more": (
        lambda: make_learner(Picky(1)),
        "Picky is among the callbacks, but not in the checkpoint$",
    ),
    "the same callback twice": (
        lambda: make_learner(MetricsCB()),
        "MetricsCB 2 is among the callbacks, but not in the checkpoint$",
    ),
    "a generator more": (
        lambda: make_learner(dls=make_dls(LOADERS["own-generator"]())),
        "the loaders have 1 random generators, but the checkpoint has 0$",
    ),
}


@pytest.mark.parametrize("where", ["done", "in_the_middle"])
@pytest.mark.parametrize("what", MISMATCHES)
@pytest.mark.usefixtures("_fresh_accelerate")
def test_differences_are_named_before_anything_is_changed(
    what: str, where: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(where)
    make, told = MISMATCHES[what]
    learner = make()
    before = traces(learner)
    with pytest.raises(CheckpointMismatchError, match=told):
        learner.run(3, resume=folder)
    assert_same(traces(learner), before)
    assert learner.result is not None
    assert learner.result.status == "failed"
    if what != "another dtype":
        assert learner.run(1).status == "completed"  # it is as good as new


def test_a_missing_generator_is_named_too(tmp_path: Path) -> None:
    learner = make_learner(dls=make_dls(LOADERS["batch-sampler-own-generator"]()))
    learner.run(1, cbs=CheckpointCB(tmp_path))
    with pytest.raises(CheckpointMismatchError, match=r"have 0 random generators, but .* has 1$"):
        make_learner().run(2, resume=tmp_path)


def test_in_the_middle_of_an_epoch_other_data_is_refused(in_the_middle: Path) -> None:
    learner = make_learner(dls=make_dls(DataLoader(TRAINING, 12, shuffle=True)))
    before = traces(learner)
    told = f"the epoch has 6 batches, but had {TRAIN} when .* only be resumed with the same data"
    with pytest.raises(CheckpointMismatchError, match=told):
        learner.run(EPOCHS, resume=in_the_middle)
    assert_same(traces(learner), before)


def test_a_refused_checkpoint_is_not_kept_in_memory(
    in_the_middle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    load = Checkpoint.load

    def spy(path: Path) -> Checkpoint:
        checkpoint = load(path)
        loaded.append(weakref.ref(checkpoint.state["model"]["0.weight"]))
        return checkpoint

    monkeypatch.setattr(Checkpoint, "load", spy)
    learner = make_learner(dls=make_dls([(torch.ones(4, 64), torch.zeros(4).long())] * 6))
    with pytest.raises(CheckpointMismatchError):
        learner.run(EPOCHS, resume=in_the_middle)
    gc.collect()  # the traceback of the error has referred to it
    assert [reference() for reference in loaded] == [None]


def test_between_two_epochs_other_data_is_taken(done: Path) -> None:
    learner = make_learner(dls=make_dls(DataLoader(TRAINING, 12, shuffle=True)))
    assert learner.run(2, resume=done).batches == TRAIN + 6


def test_data_of_unknown_length_that_has_become_shorter_is_noticed(tmp_path: Path) -> None:
    class Stream(IterableDataset[Any]):
        def __init__(self, n: int) -> None:
            self.n = n

        def __iter__(self) -> Iterator[Any]:
            return iter(TRAINING[i] for i in range(self.n))

    learner = make_learner(dls=make_dls(DataLoader(Stream(72), 16)))
    interrupt(learner, 3, "graceful")
    learner.run(1, cbs=CheckpointCB(tmp_path))
    shorter = make_learner(dls=make_dls(DataLoader(Stream(32), 16)))
    weights = traces(shorter)["model"]
    with pytest.raises(
        ValueError, match="3 batches of this epoch were done, but now it has only 2"
    ):
        shorter.run(1, resume=tmp_path)
    assert_same(shorter.model.state_dict(), weights)


@pytest.mark.parametrize(
    ("place", "phases", "told"),
    [
        (TRAIN + 1, {"valid": False}, "in or before a validation epoch .* has valid=False"),
        (TRAIN + 1, {"train": False}, "in or before a validation epoch .* has train=False"),
        (3, {"train": False}, "in or before a training epoch .* has train=False"),
    ],
)
def test_a_fit_without_the_phase_that_was_interrupted_is_refused(
    place: int, phases: dict[str, bool], told: str, tmp_path: Path
) -> None:
    learner = make_learner()
    interrupt(learner, place, "graceful")
    learner.run(EPOCHS, cbs=CheckpointCB(tmp_path))
    other = make_learner()
    other.run(1)  # it has an optimizer
    before = traces(other)
    with pytest.raises(CheckpointMismatchError, match=told):
        other.run(EPOCHS, resume=tmp_path, **phases)
    assert_same(traces(other), before)


class Picky(Callback):
    """One that does not load what it has not written itself; and spoils what it holds first."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.held = torch.ones(2) * version

    def state_dict(self) -> dict[str, Any]:
        return {"version": self.version, "held": self.held}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch.randn(3)
        self.held = state["held"].clone()
        if state["version"] != self.version:
            raise ValueError(f"version {state['version']}")


class Stubborn(Picky):
    """Not even that."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError(f"version {state['version']}")


@pytest.mark.parametrize("cls", [Picky, Stubborn])
@pytest.mark.parametrize("in_the_middle", [True, False])
def test_a_callback_that_cannot_load_leaves_everything_as_it_was(
    cls: type[Picky], in_the_middle: bool, tmp_path: Path
) -> None:
    def make(version: int) -> TrainLearner:
        return make_learner(Average(), cls(version), Average(), opt_func=momentum_sgd)

    learner = make(1)
    interrupt(learner, 3 if in_the_middle else -1, "graceful")
    learner.run(1, cbs=CheckpointCB(tmp_path))
    other = make(2)
    other.run(1)  # so that there are gradients, averages and a history
    seen: list[dict[str, Any]] = []
    begins = BeforeEpoch if in_the_middle else BeforeFit
    other.subscribe(begins, lambda _: seen.append(outcome_of_state(other)), order=math.inf)
    with pytest.raises(ValueError, match="version 1") as raised:
        other.run(EPOCHS, resume=tmp_path)
    told = f"raised by {cls.__name__}.load_state_dict on its state in the checkpoint"
    assert told in raised.value.__notes__
    assert other.result is not None
    assert (other.result.status, other.result.who) == ("failed", f"{cls.__name__}.load_state_dict")
    after = outcome_of_state(other)
    if in_the_middle:  # the data was read on before the state was loaded
        seen[0].pop("random")
        after.pop("random")
    assert_same(after, seen[0])


def outcome_of_state(learner: TrainLearner) -> dict[str, Any]:
    state: dict[str, Any] = Snapshot(state_of(learner)).wait()
    for done in state["progress"].values():
        del done["epochs"]  # one of them is not in the checkpoint, but ended before it could load
    for row in state["history"]:
        row.pop("status", None)  # how the epoch that could not load has ended
    return state


def test_other_metrics_leave_everything_as_it_was(done: Path) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learner = TrainLearner(make_model(), make_dls(), F.cross_entropy, cbs=metrics)
    before = traces(learner)
    with pytest.raises((KeyError, ValueError), match="accuracy") as raised:
        learner.run(2, resume=done)
    assert any("MetricsCB.load_state_dict" in note for note in raised.value.__notes__)
    assert_same(traces(learner), before)

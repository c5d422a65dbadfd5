"""What a checkpoint may hold of learners, optimizers and callbacks, and how it comes back."""

from __future__ import annotations

import gc
import math
from collections import defaultdict, deque
from enum import Enum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from eventrain.callbacks import (
    CheckpointCB,
)
from eventrain.engine import (
    Checkpoint,
    TrainLearner,
)
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    BeforeEpoch,
    Callback,
    CancelEpochException,
)
from torch import nn

from tests.support.resuming import (
    EPOCHS,
    TRAIN,
    VALID,
    assert_same,
    differences,
    in_pieces,
    make_learner,
    momentum_sgd,
    undisturbed,
)


class Counting(TrainLearner):
    """A learner class with a state of its own."""

    n = 0

    def step(self) -> None:
        self.n += 1
        self.opt.param_groups[0]["lr"] = 0.1 / self.n
        super().step()

    def state_dict(self) -> dict[str, Any]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.n = state["n"]


def test_a_learner_class_with_a_state_of_its_own_goes_on_with_it() -> None:
    def make() -> TrainLearner:
        return make_learner(cls=Counting)

    assert_same(in_pieces(make, [(2, "graceful"), (4, "graceful")]), undisturbed(make))


def test_an_optimizer_that_is_kept_goes_on() -> None:
    def make() -> TrainLearner:
        learner = make_learner(opt_func=None)
        learner.opt = momentum_sgd(learner.model.parameters(), 0.03)
        return learner

    assert_same(in_pieces(make, [(2, "graceful"), (4, "graceful")]), undisturbed(make))


class Colour(Enum):
    RED = "red"


class Holds(Callback):
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize(
    ("value", "comes_back"),
    [
        (numpy.float64(0.5), 0.5),
        (numpy.float32(0.5), 0.5),
        (numpy.int64(3), 3),
        (numpy.bool_(True), True),
        (numpy.str_("text"), "text"),
        (numpy.arange(3), torch.arange(3)),
        ({numpy.int64(1): 2, Colour.RED: 3, (1, "a"): 4}, {1: 2, "red": 3, (1, "a"): 4}),
        (Colour.RED, "red"),
        (deque([1, 2], maxlen=2), [1, 2]),
        (defaultdict(list, a=[1]), {"a": [1]}),
        (Path("somewhere"), "somewhere"),
        (torch.float16, torch.float16),
        (torch.Size([2, 3]), torch.Size([2, 3])),
        (1j, 1j),
        (nn.Parameter(torch.ones(2)), torch.ones(2)),
        (torch.zeros(0), torch.zeros(0)),
        (torch.eye(2).to_sparse(), torch.eye(2).to_sparse()),
        (math.nan, math.nan),
        (2**80, 2**80),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_in_a_state_come_back_as_plain_data(
    value: Any, comes_back: Any, tmp_path: Path
) -> None:
    make_learner(Holds(value)).run(1, cbs=CheckpointCB(tmp_path))
    cb = Holds(None)
    make_learner(cb).run(1, resume=tmp_path)
    assert list(differences(cb.value, comes_back)) == []
    assert isinstance(cb.value, dict) or type(cb.value) is type(comes_back)


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (object(), r"state\['callbacks'\]\['Holds'\]\['value'\] is <object"),
        ([1, {"a": {1, 2}}], r"\['value'\]\[1\]\['a'\] is \{1, 2\}"),
        (torch.ones(2, device="meta"), r"\['value'\] is tensor\(\.\.\., device='meta'"),
        (lambda: None, r"\['value'\] is <function"),
        (b"bytes", r"\['value'\] is b'bytes'"),
        ({object(): 1}, r"the key state\['callbacks'\]\['Holds'\]\['value'\]\[<.*>\] is <object"),
    ],
    ids=["object", "set", "meta", "function", "bytes", "key"],
)
def test_values_that_a_state_cannot_hold_are_named_before_any_work(
    value: Any, named: str, tmp_path: Path
) -> None:
    learner = make_learner(Holds(value))
    with pytest.raises(TypeError, match=named + r"(?s:.*)which a checkpoint cannot hold"):
        learner.run(1, cbs=CheckpointCB(tmp_path / "new"))
    assert learner.result is not None
    assert learner.result.batches == 0
    assert not (tmp_path / "new").exists()


def test_numbers_of_numpy_in_the_history_come_back(tmp_path: Path) -> None:
    def make() -> TrainLearner:
        learner = make_learner()

        @learner.on(AfterEpoch)
        def note(event: AfterEpoch) -> None:
            learner.record["f1"] = numpy.float64(0.25) * event.epoch

        return learner

    result = make().run(1, cbs=CheckpointCB(tmp_path))
    assert make().run(1, resume=tmp_path).history == result.history


def test_weights_that_are_one_stay_one(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 10))
        model[1].weight = model[0].weight
        return model

    def make() -> TrainLearner:
        return make_learner(model=tied, opt_func=momentum_sgd)

    assert_same(in_pieces(make, [(3, "graceful"), (6, "graceful")]), undisturbed(make))


def test_a_loaded_checkpoint_is_not_held_while_the_training_runs(in_the_middle: Path) -> None:
    """It is as large as the model and the state of the optimizer."""
    learner = make_learner()
    held = []

    @learner.on(AfterBatch)
    def look(event: AfterBatch) -> None:
        loaded = [thing for thing in gc.get_objects() if type(thing) is Checkpoint]
        held.append([one for one in loaded if one.path == learner.resumed_from])

    learner.run(1, resume=in_the_middle)
    assert held == [[]] * (TRAIN - 3 + VALID)


@pytest.mark.parametrize("n_epochs", [1, 2])
def test_an_epoch_that_never_continues_is_not_saved(in_the_middle: Path, n_epochs: int) -> None:
    """The checkpoint that is resumed would be lost for a state that nobody has trained."""
    learner = make_learner()
    learner.subscribe(BeforeEpoch, cancel_epoch)
    before = sorted(path.name for path in in_the_middle.iterdir())
    with pytest.raises(RuntimeError, match="before its state was loaded"):
        learner.run(n_epochs, valid=False, cbs=CheckpointCB(in_the_middle), resume="last")
    assert sorted(path.name for path in in_the_middle.iterdir()) == before
    assert learner.result.status == "failed"


def cancel_epoch(event: BeforeEpoch) -> None:
    raise CancelEpochException("not this one")


def test_an_epoch_cancelled_before_its_state_is_loaded_is_an_error(
    in_the_middle: Path,
) -> None:
    learner = make_learner()

    @learner.on(BeforeEpoch, once=True)
    def leave(event: BeforeEpoch) -> None:
        raise CancelEpochException("not this one")

    with pytest.raises(RuntimeError, match="before its state was loaded"):
        learner.run(EPOCHS, resume=in_the_middle)

"""Resuming where epochs are a number of batches: the pass over the loader goes on, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
from eventrain.callbacks import CheckpointCB
from eventrain.engine import TrainLearner
from eventrain.engine.checkpoint.compatibility import CheckpointMismatchError
from eventrain.events import AfterBatch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.resuming import (
    KINDS,
    LOADERS,
    VALID,
    Make,
    assert_same,
    in_pieces,
    make_dls,
    make_learner,
    restless_model,
    undisturbed,
)

LENGTH = 3
"""Batches per epoch; a pass has five or, with drop_last, four."""
EPOCH = LENGTH + VALID
PLACES = [1, 2, LENGTH, LENGTH + 1, EPOCH, EPOCH + 1, EPOCH + LENGTH, 2 * EPOCH + 2, 3 * EPOCH]
"""First batch, in the middle, last of training, in validation, its end, and where a pass ends."""


def loading(name: str) -> Make:
    return lambda: make_learner(model=restless_model, dls=make_dls(LOADERS[name]()))


def assert_same_run(name: str, a: dict[str, Any], b: dict[str, Any]) -> None:
    if name == "prefetched-own-generator":  # its thread may begin to draw for the next pass
        a, b = ({**run, "random": {**run["random"], "generators": None}} for run in (a, b))
    assert_same(a, b)


@pytest.mark.parametrize("name", LOADERS)
@pytest.mark.parametrize("how", ["graceful", "error"])
def test_every_loader_goes_on_where_its_pass_was_left(name: str, how: str) -> None:
    whole = undisturbed(loading(name), 3, epoch_length=LENGTH)
    each = {"every_batches": 1} if how == "error" else None
    for at in PLACES:
        parts = in_pieces(loading(name), [(at, how)], 3, each=each, epoch_length=LENGTH)
        assert_same_run(name, whole, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_training_is_the_same_in_pieces(kind: str) -> None:
    sizes = {"max_steps": 8, "epoch_length": LENGTH, "valid_length": 1}
    whole = undisturbed(KINDS[kind], None, **sizes)
    assert whole["counts"][3] == 8
    pieces = [(2, "graceful"), (3, "graceful"), (4, "graceful")]
    assert_same(whole, in_pieces(KINDS[kind], pieces, None, **sizes))


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_the_sizes_and_the_stops_the_run_is_the_same(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(LOADERS)))
    optional = st.one_of(st.none(), st.integers(1, 7))
    sizes = {
        "max_steps": data.draw(st.one_of(st.none(), st.integers(1, 12))),
        "epoch_length": data.draw(optional),
        "valid_length": data.draw(st.one_of(st.none(), st.integers(1, 3))),
    }
    n_epochs = data.draw(st.integers(1, 3)) if sizes["max_steps"] is None else None
    pieces = data.draw(
        st.lists(st.tuples(st.integers(1, 12), st.just("graceful")), min_size=1, max_size=3)
    )
    whole = undisturbed(loading(name), n_epochs, **sizes)
    assert_same_run(name, whole, in_pieces(loading(name), pieces, n_epochs, **sizes))


@pytest.mark.parametrize(("first", "second"), [(3, None), (None, 5)])
def test_a_pass_that_is_left_open_is_not_resumed_as_another(
    tmp_path: Any, first: int | None, second: int | None
) -> None:
    learner = make_learner()
    stop_after(learner, 2)
    learner.run(2, cbs=CheckpointCB(tmp_path), epoch_length=first)
    with pytest.raises(CheckpointMismatchError, match="epoch_length, in the middle of a pass"):
        make_learner().run(2, cbs=CheckpointCB(tmp_path), epoch_length=second, resume="last")


def stop_after(learner: TrainLearner, n: int) -> None:
    @learner.on(AfterBatch)
    def stop(event: AfterBatch) -> None:
        if event.iter + 1 == n:
            learner.stop(graceful=True)

"""Fixtures: checkpoints to resume from, and a process as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from eventrain.callbacks import (
    CheckpointCB,
)

from tests.support.resuming import EPOCHS, disturb, interrupt, make_learner


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """So small a model is not trained faster by several, which wait for busy cores."""
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    """Its state is one per process, precision included; and it collects garbage after every fit,
    which is to be ours alone."""
    state = pytest.importorskip("accelerate").state.AcceleratorState
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    state._reset_state(reset_partial_state=True)


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A folder with the checkpoints of a fit of one epoch that is over."""
    disturb(0)
    make_learner().run(1, cbs=CheckpointCB(tmp_path / "done"), run_id="done")
    return tmp_path / "done"


@pytest.fixture
def in_the_middle(tmp_path: Path) -> Path:
    """A folder with the checkpoint of a fit of two epochs that was left after three batches."""
    learner = make_learner()
    interrupt(learner, 3, "graceful")
    learner.run(EPOCHS, cbs=CheckpointCB(tmp_path / "middle"))
    return tmp_path / "middle"

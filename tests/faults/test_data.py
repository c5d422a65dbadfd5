"""What data can do wrong: the user's own error, with the batch named, and no work lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB, MetricsCB, TerminateOnNaNCB
from eventrain.engine import Checkpoint, DataLoaders, Learner, TrainLearner
from eventrain.events import record_events
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

Batch = tuple[torch.Tensor, torch.Tensor]
Digits = tuple[torch.Tensor, torch.Tensor]

BAD = 3
"""The batch that is wrong."""


@pytest.fixture
def make_learner(
    digits: Digits, make_cnn: Callable[[], nn.Module]
) -> Callable[[Callable[[torch.Tensor, torch.Tensor], Any]], Learner]:
    """The post's CNN on digits, one batch of which is changed."""

    def make(spoil: Callable[[torch.Tensor, torch.Tensor], Any]) -> Learner:
        images, labels = digits
        batches: list[Any] = list(zip(images.split(32), labels.split(32), strict=True))[:6]
        batches[BAD] = spoil(*batches[BAD])
        return TrainLearner(make_cnn(), DataLoaders(batches), nn.functional.cross_entropy, 0.1)

    return make


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


FAULTS = {
    "an empty batch": (lambda x, y: (x[:0], y[:0]), None),
    "no batch": (lambda x, y: None, TypeError),
    "a number": (lambda x, y: 7, TypeError),
    "inputs alone": (lambda x, y: (x,), TypeError),
    "another dtype": (lambda x, y: (x.double(), y), RuntimeError),
    "another size of images": (lambda x, y: (x[..., :2, :2], y), RuntimeError),
    "labels out of range": (lambda x, y: (x, y + 10), IndexError),
    "fewer labels than images": (lambda x, y: (x, y[:5]), ValueError),
    "labels of another dtype": (lambda x, y: (x, y.float()), RuntimeError),
}


@pytest.mark.parametrize("fault", [name for name, (_, error) in FAULTS.items() if error])
def test_a_bad_batch_is_the_users_own_error_and_the_last_checkpoint_is_whole(
    make_learner: Callable[..., Learner], tmp_path: Path, fault: str
) -> None:
    spoil, error = FAULTS[fault]
    assert error is not None
    learner = make_learner(spoil)
    saving = CheckpointCB(tmp_path, every_batches=1)
    with record_events(learner) as events, pytest.raises(error) as raised:
        learner.run(1, valid=False, cbs=saving)
    notes = " ".join(raised.value.__notes__)
    assert f"iter {BAD}" in notes or f"batch {BAD} of dls.train" in notes
    assert learner.result is not None
    assert (learner.result.status, learner.result.batches) == ("failed", BAD)
    assert events.names[-2:] == ["CleanupEpoch", "CleanupFit"]
    checkpoint = Checkpoint.load(tmp_path)
    assert checkpoint.position.batches == BAD
    for name, value in weights(learner.model).items():
        assert torch.equal(value, checkpoint.model[name])


def test_after_the_data_is_mended_the_run_goes_on_where_it_failed(
    make_learner: Callable[..., Learner], tmp_path: Path
) -> None:
    undisturbed = make_learner(lambda x, y: (x, y))
    undisturbed.run(2, valid=False)
    with pytest.raises(IndexError):
        make_learner(lambda x, y: (x, y + 10)).run(
            2, valid=False, cbs=CheckpointCB(tmp_path, every_batches=1)
        )
    mended = make_learner(lambda x, y: (x, y))
    result = mended.run(2, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert result.batches == 12
    for name, value in weights(undisturbed.model).items():
        assert torch.equal(value, weights(mended.model)[name])


def test_an_empty_batch_makes_a_loss_that_is_nan_and_the_guard_names_it(
    make_learner: Callable[..., Learner],
) -> None:
    learner = make_learner(FAULTS["an empty batch"][0])
    result = learner.run(1, valid=False, cbs=TerminateOnNaNCB())
    assert result.status == "cancelled"
    assert result.reason is not None
    assert f"batch {BAD} of epoch 0" in result.reason
    assert result.steps == BAD


def test_a_ragged_last_batch_counts_by_its_samples(
    digits: Digits, make_cnn: Callable[[], nn.Module]
) -> None:
    images, labels = digits
    loader = DataLoader(TensorDataset(images[:70], labels[:70]), 32)
    metrics = MetricsCB()
    learner = TrainLearner(
        make_cnn(), DataLoaders(loader, loader), nn.functional.cross_entropy, 0.0, metrics
    )
    result = learner.run(1)
    whole = nn.functional.cross_entropy(learner.model(images[:70]), labels[:70])
    assert result.batches == 3
    assert metrics.history[0]["loss"] == pytest.approx(whole.item(), rel=1e-5)
    assert metrics.history[1]["loss"] == pytest.approx(whole.item(), rel=1e-5)


class Failing:
    """A loader that fails in the middle of an epoch."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        yield from self.batches[:BAD]
        raise ConnectionResetError("the storage is gone")


def test_a_loader_that_raises_in_the_middle_is_the_users_own_error(
    make_batches: Callable[..., list[Batch]], make_model: Callable[[], nn.Module], tmp_path: Path
) -> None:
    learner = TrainLearner(make_model(), DataLoaders(Failing(make_batches(6))))
    with record_events(learner) as events, pytest.raises(ConnectionResetError) as raised:
        learner.run(1, valid=False, cbs=CheckpointCB(tmp_path, every_batches=1))
    assert raised.value.__notes__ == [f"raised while reading batch {BAD} of dls.train"]
    assert events.names[-2:] == ["CleanupEpoch", "CleanupFit"]
    assert Checkpoint.load(tmp_path).position.batches == BAD


class Poisoned(TensorDataset):
    """Data of which one sample cannot be read."""

    def __getitem__(self, index: int) -> Any:
        if index == 20:
            raise OSError(f"sample {index} is damaged")
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_sample_that_cannot_be_read_is_named_from_a_worker_too(
    digits: Digits, make_cnn: Callable[[], nn.Module], num_workers: int
) -> None:
    loader = DataLoader(Poisoned(*digits), 8, num_workers=num_workers)
    learner = TrainLearner(make_cnn(), DataLoaders(loader), nn.functional.cross_entropy)
    with pytest.raises(OSError, match="sample 20 is damaged") as raised:
        learner.run(1, valid=False)
    assert "raised while reading batch 2 of dls.train" in raised.value.__notes__

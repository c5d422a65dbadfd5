"""TensorLoader: whole batches by index, and in all else a DataLoader."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from eventrain.engine import DataLoaders, TensorLoader, TrainLearner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset, WeightedRandomSampler
from torchvision.transforms import v2

Digits = tuple[torch.Tensor, torch.Tensor]


def read(loader: Any, seed: int = 0, epochs: int = 2) -> list[list[torch.Tensor]]:
    """Its batches, and one more number of the global random state when they were drawn."""
    torch.manual_seed(seed)
    batches = [batch for _ in range(epochs) for batch in loader]
    return [*batches, [torch.rand(1)]]


def assert_same(a: list[list[torch.Tensor]], b: list[list[torch.Tensor]]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert type(one) is type(other)
        assert [t.dtype for t in one] == [t.dtype for t in other]
        assert all(map(torch.equal, one, other))


@settings(max_examples=40)
@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 12),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    own_generator=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_its_batches_their_order_and_its_draws_are_those_of_a_dataloader(
    n: int, batch_size: int, shuffle: bool, drop_last: bool, own_generator: bool, seed: int
) -> None:
    tensors = torch.arange(n * 3.0).view(n, 3), torch.arange(n)

    def arguments() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed) if own_generator else None
        return {
            "batch_size": batch_size,
            "shuffle": shuffle,
            "drop_last": drop_last,
            "generator": generator,
        }

    ours = TensorLoader(*tensors, **arguments())
    theirs = DataLoader(TensorDataset(*tensors), **arguments())
    assert len(ours) == len(theirs)
    assert_same(read(ours, seed), read(theirs, seed))


def test_it_takes_any_sampler_of_torchs(digits: Digits) -> None:
    def sampler() -> WeightedRandomSampler:
        generator = torch.Generator().manual_seed(7)
        return WeightedRandomSampler(digits[1].float() + 1, 100, generator=generator)

    ours = TensorLoader(*digits, batch_size=16, sampler=sampler())
    theirs = DataLoader(TensorDataset(*digits), 16, sampler=sampler())
    assert_same(read(ours), read(theirs))


def test_it_takes_a_batch_sampler(digits: Digits) -> None:
    batches = [[3, 1], [0], [2, 2, 5]]
    ours = TensorLoader(*digits, batch_sampler=batches)
    assert_same(read(ours), read(DataLoader(TensorDataset(*digits), batch_sampler=batches)))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_change_nothing(digits: Digits, num_workers: int) -> None:
    loader = TensorLoader(*digits, batch_size=64, shuffle=True, num_workers=num_workers)
    assert_same(read(loader), read(TensorLoader(*digits, batch_size=64, shuffle=True)))


def test_without_a_batch_size_it_yields_samples(digits: Digits) -> None:
    ours = next(iter(TensorLoader(*digits, batch_size=None)))
    assert torch.equal(ours[0], digits[0][0])
    assert ours[1].shape == ()


def test_the_transform_is_given_the_inputs_of_a_whole_batch(digits: Digits) -> None:
    shapes = []

    def double(images: torch.Tensor) -> torch.Tensor:
        shapes.append(images.shape)
        return images * 2

    (images, labels), *_ = TensorLoader(*digits, batch_size=256, transform=double)
    assert torch.equal(images, digits[0][:256] * 2)
    assert torch.equal(labels, digits[1][:256])
    assert shapes == [(256, 1, 8, 8), (64, 1, 8, 8)]


def test_transforms_v2_work_on_whole_batches(digits: Digits) -> None:
    transform = v2.Compose([v2.RandomHorizontalFlip(1.0), v2.Normalize([0.5], [0.25])])
    images, _ = next(iter(TensorLoader(*digits, batch_size=8, transform=transform)))
    assert torch.equal(images, (digits[0][:8].flip(-1) - 0.5) / 0.25)


def test_collate_fn_is_given_a_whole_batch_as_mixup_wants_it(digits: Digits) -> None:
    mixup = v2.MixUp(num_classes=10)
    loader = TensorLoader(*digits, batch_size=8, collate_fn=lambda batch: mixup(*batch))
    images, labels = next(iter(loader))
    assert images.shape == (8, 1, 8, 8)
    assert labels.shape == (8, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_changing_a_batch_in_place_does_not_change_the_data(digits: Digits) -> None:
    before = digits[0].clone()
    for images, labels in TensorLoader(*digits, batch_size=64):
        images.zero_()
        labels.zero_()
    assert torch.equal(digits[0], before)


def test_tensors_of_any_dtype_and_number() -> None:
    tensors = torch.arange(6, dtype=torch.uint8), torch.ones(6, 2).half(), torch.ones(6) > 0
    (batch,) = TensorLoader(*tensors, batch_size=6)
    assert all(map(torch.equal, batch, tensors))
    (alone,) = TensorLoader(torch.arange(3), batch_size=3)
    assert [t.tolist() for t in alone] == [[0, 1, 2]]


def test_a_copy_and_a_pickled_one_yield_the_same(digits: Digits) -> None:
    loader = TensorLoader(*digits, batch_size=64, shuffle=True)
    assert_same(read(copy.copy(loader)), read(loader))
    assert_same(read(pickle.loads(pickle.dumps(loader))), read(loader))


def test_on_a_device_the_tensors_are_copied_there_once() -> None:
    loader = TensorLoader(torch.arange(4.0), batch_size=2, device="cpu", transform=nn.Identity())
    assert repr(loader) == "TensorLoader(4 samples on cpu, batch_size=2)"
    loader = TensorLoader(torch.arange(4.0), batch_size=2, device="meta")
    assert loader.dataset.device.type == "meta"


async def test_a_fit_has_the_weights_it_has_with_a_dataloader(
    digits: Digits, make_cnn: Callable[[], nn.Module]
) -> None:
    def fitted(loader: Any) -> TrainLearner:
        model = nn.Sequential(make_cnn(), nn.Dropout(0.2))  # which draws from the same state
        torch.manual_seed(3)
        return TrainLearner(model, DataLoaders(loader, loader), nn.functional.cross_entropy)

    ours = fitted(TensorLoader(*digits, batch_size=64, shuffle=True))
    theirs = fitted(DataLoader(TensorDataset(*digits), 64, shuffle=True))
    for learner in (ours, theirs):
        torch.manual_seed(3)
        await learner.fit(2)
    for a, b in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("tensors", "arguments", "error", "words"),
    [
        ((), {}, ValueError, r"there are no tensors: give one, or \(inputs, targets\)"),
        (([1, 2],), {}, TypeError, r"tensor 0 is a list: convert it with torch.as_tensor\(\)"),
        ((torch.tensor(1.0),), {}, ValueError, r"tensor 0 is a scalar"),
        ((torch.ones(3), torch.ones(4)), {}, ValueError, "different numbers of samples: 3, 4"),
        ((torch.ones(3),), {"transform": 3}, TypeError, "transform=3 cannot be called"),
        ((torch.ones(3),), {"device": "meta", "num_workers": 1}, ValueError, "num_workers=1 is"),
        ((torch.ones(3),), {"device": "meta", "pin_memory": True}, ValueError, "pin_memory=True"),
        ((torch.ones(3),), {"batch_size": 0}, ValueError, "batch_size"),
        ((torch.ones(3),), {"sampler": RandomSampler([1]), "shuffle": True}, ValueError, "sampler"),
    ],
)
def test_arguments_that_make_no_loader_are_an_error_that_says_so(
    tensors: tuple[Any, ...], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        TensorLoader(*tensors, **arguments)

"""DataLoaders.from_dataset: the fastest loader with the same batches, and why it is that one."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eventrain.engine import DataLoaders, TensorLoader, ThreadLoader
from structlog.testing import capture_logs
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset
from torchvision import transforms as v1
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST
from torchvision.transforms import v2

POSTS = v1.Compose([v1.ToTensor(), v1.Normalize((0.5,), (0.5,))])
"""The transforms of the post."""


ZEROS = torch.zeros(4)


def batches(loader: Any) -> list[Any]:
    torch.manual_seed(5)
    return [batch for _ in range(2) for batch in loader]


def assert_as_a_dataloader(dataset: Any, path: str, reason: str) -> DataLoaders:
    """The loaders of a dataset yield what a plain one does, on the way that they tell."""
    with capture_logs() as logs:
        dls = DataLoaders.from_dataset(dataset, dataset, 7)
    for log, phase in zip(logs, ["train", "valid"], strict=True):
        assert {**log, "loader": None, "reason": None} == {
            "event": "data_path",
            "log_level": "info",
            "phase": phase,
            "path": path,
            "loader": None,
            "reason": None,
        }
        assert reason in log["reason"]
    for loader, shuffle in [(dls.train, True), (dls.valid, False)]:
        ours, theirs = batches(loader), batches(DataLoader(dataset, 7, shuffle=shuffle))
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert [t.dtype for t in a] == [t.dtype for t in b]
            assert all(map(torch.equal, a, b))
    return dls


@pytest.mark.parametrize(
    "transform",
    [
        POSTS,
        v1.ToTensor(),
        v1.Compose([v1.PILToTensor(), v1.ConvertImageDtype(torch.float64)]),
        v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.3], [2])]),
        v2.PILToTensor(),
    ],
    ids=["post", "to tensor", "convert", "v2", "bytes"],
)
def test_images_in_memory_come_in_whole_batches_bit_for_bit(
    fashion_mnist: Path, transform: Any
) -> None:
    dataset = FashionMNIST(fashion_mnist, train=False, transform=transform)
    dls = assert_as_a_dataloader(dataset, "tensors", "its samples are in memory")
    assert isinstance(dls.train, TensorLoader)


def test_half_of_them_too(fashion_mnist: Path) -> None:
    dataset = FashionMNIST(fashion_mnist, train=False, transform=POSTS)
    subset = Subset(Subset(dataset, range(0, 700, 3)), [5, 1, 200, 3])
    assert_as_a_dataloader(subset, "tensors", "in memory")


def write_cifar(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one in CIFAR-10's own format."""
    rng = np.random.default_rng(0)
    batch = {"data": rng.integers(0, 256, (20, 3072), np.uint8), "labels": [*range(10)] * 2}
    (folder / "cifar").mkdir()
    (folder / "cifar/batch").write_bytes(pickle.dumps(batch))
    (folder / "cifar/meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(CIFAR10, "base_folder", "cifar")
    monkeypatch.setattr(CIFAR10, "train_list", [["batch", None]])
    monkeypatch.setattr(CIFAR10, "test_list", [])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "meta", "key": "label_names", "md5": None})


def test_images_in_colour_are_normalised_by_channel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_cifar(tmp_path, monkeypatch)
    means, stds = (0.4914, 0.4822, 0.4465), (0.247, 0.243, 0.261)
    transform = v1.Compose([v1.ToTensor(), v1.Normalize(means, stds)])
    dataset = CIFAR10(str(tmp_path), transform=transform)
    assert len(dataset) == 20
    assert_as_a_dataloader(dataset, "tensors", "in memory")


def test_a_tensor_dataset_and_its_random_split(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    dataset = TensorDataset(*digits)
    assert_as_a_dataloader(dataset, "tensors", "in memory")
    split, _ = torch.utils.data.random_split(dataset, [0.3, 0.7])
    assert_as_a_dataloader(split, "tensors", "in memory")


class Squares(Dataset[Any]):
    """Samples that are made one by one."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([index, index**2.0]), index


class InLists(Squares):
    """And one that makes several at once, as a list of samples, in the way of Hugging Face."""

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, int]]:
        self.asked = indices
        return [self[index] for index in indices]


class InBatches(InLists):
    """And one that returns the batch."""

    def __getitems__(self, indices: list[int]) -> Any:
        self.asked = indices
        i = torch.tensor(indices)
        return torch.stack([i, i**2.0], 1), i


def test_a_custom_dataset_is_read_sample_by_sample() -> None:
    assert_as_a_dataloader(Squares(), "samples", "not known where a Squares has its samples")


def test_a_dataset_with_getitems_is_asked_for_a_list_of_samples() -> None:
    dls = assert_as_a_dataloader(InLists(), "batches", "it has a __getitems__ of its own")
    assert dls.valid.dataset.asked == [14, 15, 16, 17, 18, 19]


def test_or_for_a_whole_batch() -> None:
    dls = DataLoaders.from_dataset(InBatches(), InBatches(), 7)
    assert isinstance(next(iter(dls.train)), tuple)
    for loader, shuffle in [(dls.train, True), (dls.valid, False)]:
        for a, b in zip(
            batches(loader), batches(DataLoader(Squares(), 7, shuffle=shuffle)), strict=True
        ):
            assert all(map(torch.equal, a, b))
    inner = Subset(InBatches(), [3, 4, 5])
    ((inputs, _),) = DataLoaders.from_dataset(inner, shuffle=False).train
    assert inputs.tolist() == [[3, 9], [4, 16], [5, 25]]


class Darker(FashionMNIST):
    """A subclass whose samples are not those of its tensors."""

    @property
    def raw_folder(self) -> str:
        return str(Path(self.root, "FashionMNIST/raw"))

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image, label = super().__getitem__(index)
        return image / 2, label


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f: Darker(f, train=False, transform=POSTS), "a Darker has its samples"),
        (
            lambda f: FashionMNIST(f, train=False, transform=v1.Compose([v1.Resize(8), POSTS])),
            "its transform has Resize(size=8",
        ),
        (
            lambda f: FashionMNIST(
                f, train=False, transform=POSTS, target_transform=lambda label: label + 1
            ),
            "it has a target_transform",
        ),
        (
            lambda f: FashionMNIST(f, train=False, transform=lambda image: POSTS(image)),
            "its transform has <function",
        ),
    ],
    ids=["subclass", "resize", "target", "function"],
)
def test_a_transform_that_is_not_pointwise_is_read_sample_by_sample(
    fashion_mnist: Path, make: Callable[[Path], Any], reason: str
) -> None:
    dataset = Subset(make(fashion_mnist), range(20))
    assert_as_a_dataloader(dataset, "samples", reason)


def test_samples_that_are_not_what_was_expected_are_found_out(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    class Changing(MNIST):
        def __init__(self) -> None:
            self.data, self.targets = (digits[0][:, 0] * 255).byte(), digits[1]
            self.target_transform = None
            self.looked_at = 0

        @property
        def transform(self) -> Any:
            self.looked_at += 1
            return v1.ToTensor() if self.looked_at == 1 else v1.PILToTensor()

    with capture_logs() as logs:
        dls = DataLoaders.from_dataset(Changing())
    assert logs[0]["reason"] == "its samples are not what its tensors and transform give"
    assert type(dls.train) is DataLoader


def test_random_transforms_draw_what_they_drew(fashion_mnist: Path) -> None:
    transform = v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor()])
    dataset = Subset(FashionMNIST(fashion_mnist, train=False, transform=transform), range(30))
    assert_as_a_dataloader(dataset, "samples", "its transform has RandomHorizontalFlip(p=0.5)")


def test_a_collate_fn_takes_samples(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    def collate(samples: list[Any]) -> list[Any]:
        return samples

    with capture_logs() as logs:
        dls = DataLoaders.from_dataset(TensorDataset(*digits), batch_size=4, collate_fn=collate)
    assert logs[0]["path"] == "samples"
    assert "collate_fn" in logs[0]["reason"]
    assert isinstance(next(iter(dls.train))[0], tuple)


def test_an_iterable_dataset_is_not_shuffled_by_us() -> None:
    class Counting(IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(torch.arange(5))

    dls = DataLoaders.from_dataset(Counting(), batch_size=2, shuffle=False)
    assert [batch.tolist() for batch in dls.train] == [[0, 1], [2, 3], [4]]
    with pytest.raises(ValueError, match="shuffle"):
        DataLoaders.from_dataset(Counting())


def test_the_other_arguments_reach_both_loaders(
    digits: tuple[torch.Tensor, torch.Tensor],
) -> None:
    generator = torch.Generator()
    data = TensorDataset(*digits)
    dls = DataLoaders.from_dataset(data, data, 100, drop_last=True, generator=generator)
    assert (len(dls.train), len(dls.valid)) == (3, 4)
    assert dls.train.generator is dls.valid.generator is generator


def test_workers_are_for_samples_only(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    data = TensorDataset(*digits)
    fast = DataLoaders.from_dataset(data, num_workers=1, persistent_workers=True).train
    assert (fast.num_workers, fast.persistent_workers) == (0, False)
    assert DataLoaders.from_dataset(Squares(), num_workers=1).train.num_workers == 1


@pytest.mark.parametrize("dataset", [Squares(), InLists(), InBatches(), Subset(InLists(), [3, 1])])
def test_threads_read_what_is_not_in_memory_and_give_the_same_batches(dataset: Any) -> None:
    with capture_logs() as logs:
        dls = DataLoaders.from_dataset(dataset, dataset, 7, num_threads=3)
    plain = DataLoaders.from_dataset(dataset, dataset, 7)
    for loader, expected in [(dls.train, plain.train), (dls.valid, plain.valid)]:
        assert type(loader) is ThreadLoader
        assert loader.num_threads == 3
        for ours, theirs in zip(batches(loader), batches(expected), strict=True):
            assert all(map(torch.equal, ours, theirs))
    assert "num_threads=3" in logs[0]["loader"]


def test_nor_do_samples_in_memory_need_threads(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert type(DataLoaders.from_dataset(TensorDataset(*digits), num_threads=2).train) is (
        TensorLoader
    )


@pytest.mark.parametrize("value", [-1, 1.0, True, "2", None])
def test_an_invalid_number_of_threads_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"num_threads={value!r}: give an integer, 0 or more"):
        DataLoaders.from_dataset(TensorDataset(ZEROS), num_threads=value)


def test_threads_and_worker_processes_exclude_each_other() -> None:
    with pytest.raises(ValueError, match=r"num_threads=2 and num_workers=1: .* give one of them"):
        DataLoaders.from_dataset(Squares(), num_threads=2, num_workers=1)


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(Subset(d, [3, 1, 0]), [2, -2])])
def test_labels_that_are_changed_in_place_are_seen(wrap: Callable[[Any], Any]) -> None:
    """As in a DataLoader: relabelling on the way, noise that changes from epoch to epoch."""
    data = TensorDataset(torch.arange(4.0)[:, None], torch.zeros(4))
    dataset = wrap(data)
    dls = DataLoaders.from_dataset(dataset, dataset, 2, shuffle=False)
    assert isinstance(dls.train, TensorLoader)
    data.tensors[1].copy_(torch.tensor([5.0, 6.0, 7.0, 8.0]))
    for loader in (dls.train, dls.valid):
        for ours, theirs in zip(loader, DataLoader(dataset, 2), strict=True):
            assert [t.tolist() for t in ours] == [t.tolist() for t in theirs]


def test_labels_of_images_too(fashion_mnist: Path) -> None:
    data = FashionMNIST(fashion_mnist, train=False, transform=POSTS)
    half = Subset(data, range(20))
    dls = DataLoaders.from_dataset(half, batch_size=20, shuffle=False)
    assert isinstance(dls.train, TensorLoader)
    data.targets[:20] = 3
    data.data[0] = 255
    (ours,), (theirs,) = list(dls.train), list(DataLoader(half, 20))
    assert all(map(torch.equal, ours, theirs))


def test_a_part_of_a_dataset_is_not_copied() -> None:
    data = TensorDataset(torch.zeros(4, 1), torch.zeros(4))
    loader = DataLoaders.from_dataset(Subset(data, [1, 2])).train
    assert loader.dataset.tensors[0].data_ptr() == data.tensors[0].data_ptr()
    assert len(loader.dataset) == 2


class Fewer(TensorDataset):
    """A shorter epoch."""

    def __len__(self) -> int:
        return 5


class Redirected(Subset[Any]):
    """One that makes several samples in a way of its own."""

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.dataset[0] for _ in indices]


@pytest.mark.parametrize(
    ("make", "path", "reason"),
    [
        (lambda data: Fewer(*data.tensors), "samples", "another length than its tensors"),
        (lambda data: Redirected(data, [1, 2, 3]), "samples", "a __getitems__ of its own"),
        (lambda data: Subset(data, np.array([5, 1, 7], np.uint8)), "tensors", "in memory"),
        (lambda data: Subset(data, [-1, 0, -20]), "tensors", "in memory"),
    ],
    ids=["length", "getitems", "uint8", "negative"],
)
def test_what_a_dataloader_would_yield_is_what_counts(make: Any, path: str, reason: str) -> None:
    dataset = make(TensorDataset(torch.arange(20.0)[:, None], torch.arange(20)))
    assert_as_a_dataloader(dataset, path, reason)


@pytest.mark.parametrize("dataset", [Squares(), InLists(), TensorDataset(torch.arange(4.0), ZEROS)])
def test_samples_that_are_not_batched(dataset: Any) -> None:
    ours = batches(DataLoaders.from_dataset(dataset, batch_size=None).train)
    theirs = batches(DataLoader(dataset, None, shuffle=True))
    assert [repr(a) for a in ours] == [repr(b) for b in theirs]


@pytest.mark.parametrize("name", ["transform", "indices", "colate_fn"])
def test_an_argument_that_a_dataloader_does_not_have_is_named(name: str) -> None:
    data = TensorDataset(torch.zeros(4, 1), torch.zeros(4))
    for dataset in (data, Squares()):
        with pytest.raises(TypeError, match=f"a DataLoader has no argument '{name}'"):
            DataLoaders.from_dataset(dataset, **{name: None})


@pytest.mark.parametrize("name", ["sampler", "batch_sampler"])
def test_a_sampler_belongs_to_one_dataset(name: str) -> None:
    with pytest.raises(TypeError, match=rf"from_dataset\({name}=...\).*make that loader yourself"):
        DataLoaders.from_dataset(Squares(), **{name: [1]})


def test_an_empty_dataset_is_torchs_error() -> None:
    with pytest.raises(ValueError, match="num_samples"):
        DataLoaders.from_dataset(TensorDataset(torch.ones(0, 2)))


def test_images_without_a_transform_fail_as_they_do_in_a_dataloader(fashion_mnist: Path) -> None:
    dls = DataLoaders.from_dataset(FashionMNIST(fashion_mnist, train=False))
    with pytest.raises(TypeError, match="default_collate: batch must contain tensors"):
        next(iter(dls.train))


def test_nothing_of_the_random_state_is_drawn_by_choosing(fashion_mnist: Path) -> None:
    transform = v1.Compose([v1.RandomHorizontalFlip(), v1.ToTensor()])
    before = torch.get_rng_state()
    for dataset in (FashionMNIST(fashion_mnist, transform=transform), InBatches()):
        DataLoaders.from_dataset(dataset)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_it_says_can_be_logged_as_json(digits: tuple[torch.Tensor, torch.Tensor]) -> None:
    with capture_logs() as logs:
        DataLoaders.from_dataset(TensorDataset(*digits))
    assert json.loads(json.dumps(logs[0])) == {
        "event": "data_path",
        "log_level": "info",
        "loader": "TensorLoader(320 samples on cpu, batch_size=64)",
        "path": "tensors",
        "phase": "train",
        "reason": "its samples are in memory",
    }


async def test_a_fit_has_the_weights_it_has_with_the_posts_loaders(
    fashion_mnist: Path, make_cnn: Callable[[], nn.Module]
) -> None:
    from eventrain.callbacks import MetricsCB
    from eventrain.engine import MomentumLearner
    from torcheval.metrics import MulticlassAccuracy

    data = Subset(FashionMNIST(fashion_mnist, train=False, transform=POSTS), range(300))
    ends = []
    for dls in (
        DataLoaders.from_dataset(data, data, 64),
        DataLoaders(DataLoader(data, 64, shuffle=True), DataLoader(data, 64)),
    ):
        metrics = MetricsCB(accuracy=MulticlassAccuracy())
        learner = MomentumLearner(make_cnn(), dls, nn.functional.cross_entropy, cbs=metrics)
        torch.manual_seed(1)
        await learner.fit(2)
        ends.append((metrics.history, [p.detach() for p in learner.model.parameters()]))
    (ours, weights), (theirs, expected) = ends
    assert ours == theirs
    assert all(map(torch.equal, weights, expected))

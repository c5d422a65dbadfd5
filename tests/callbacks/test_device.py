"""DeviceCB and ChannelLastCB: batches of any shape, on the device and in the format asked for."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from eventrain.callbacks import ChannelLastCB, DeviceCB, MetricsCB, def_device, to_cpu, to_device
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.data.containers import map_tensors
from eventrain.events import AfterLoss, BeforeBatch, Callback
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_sequence

Digits = tuple[torch.Tensor, torch.Tensor]
CHANNELS_LAST = torch.channels_last


class Sample(NamedTuple):
    image: torch.Tensor
    label: Any


class Moved:
    """A host's own kind of batch, which knows how to move itself."""

    def __init__(self, device: Any = "cpu") -> None:
        self.device = torch.device(device)

    def to(self, device: Any) -> Moved:
        return Moved(device)


# --------------------------------------------------------------------------- to_device, to_cpu

# "meta" is a device other than the CPU that exists everywhere.


def test_tensors_are_moved_in_every_kind_of_container() -> None:
    x = torch.ones(2)
    batch = {
        "list": [x, (x, x)],
        "named": Sample(x, {"deep": [x]}),
        "ordered": OrderedDict(b=x, a=x),
        "pair": torch.ones(2, 2).max(0),  # a type of torch's own, with names
    }
    moved = to_device(batch, "meta")
    devices: list[str] = []
    map_tensors(moved, lambda t: devices.append(t.device.type))
    assert devices == ["meta"] * 9
    assert list(moved) == list(batch)
    assert [type(part) for part in moved.values()] == [type(part) for part in batch.values()]
    assert list(moved["ordered"]) == ["b", "a"]
    assert type(moved["list"][1]) is tuple
    assert moved["named"].label["deep"][0].device.type == "meta"
    map_tensors(batch, lambda t: devices.append(t.device.type))
    assert devices[9:] == ["cpu"] * 9  # what was given is as it was


def test_a_mapping_keeps_what_makes_it_one_of_its_kind() -> None:
    x = torch.ones(2)
    with_default = to_device(defaultdict(list, x=x, words=["a"]), "meta")
    assert type(with_default) is defaultdict
    assert with_default["x"].device.type == "meta"
    assert with_default["more"] == []
    assert to_device(Counter(a=2), "meta") == Counter(a=2)
    frozen = to_device(MappingProxyType({"x": x}), "meta")
    assert frozen["x"].device.type == "meta"


def test_values_that_are_not_tensors_are_left_alone() -> None:
    things = [None, "text", b"bytes", 3, 2.5, True, object(), {1, 2}, deque([1]), range(3)]
    for same, thing in zip(to_device(things, "meta"), things, strict=True):
        assert same is thing
    assert to_device(torch.Size([1, 2]), "meta") == torch.Size([1, 2])
    assert type(to_device(torch.Size([1, 2]), "meta")) is torch.Size
    assert to_device((), "meta") == ()


def test_objects_that_can_move_themselves_do_wherever_they_are() -> None:
    packed = pack_sequence([torch.ones(3, 2), torch.ones(1, 2)])
    alone = to_device(packed, "meta")
    in_batch = to_device({"inputs": (packed, Moved()), "n": 2}, "meta")
    for moved in (alone, in_batch["inputs"][0]):
        assert type(moved) is PackedSequence
        assert moved.data.device.type == "meta"
        assert moved.batch_sizes.device.type == "cpu"  # where it has to stay
    assert in_batch["inputs"][1].device.type == "meta"
    assert in_batch["n"] == 2
    assert to_device(Moved(), "meta").device.type == "meta"


class Told(torch.Tensor):
    """A tensor that notes how it was asked to move."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return super().to(*args, **kwargs)


asked: list[tuple[Any, Any]] = []


@pytest.mark.parametrize("non_blocking", [False, True])
def test_non_blocking_is_passed_on(non_blocking: bool) -> None:
    asked.clear()
    x = torch.ones(2).as_subclass(Told)
    to_device({"x": [x]}, "meta", non_blocking)
    learner = TrainLearner(nn.Linear(2, 2), DataLoaders(valid=[(x, x)]))
    learner.run(train=False, cbs=DeviceCB("cpu", non_blocking))
    assert asked == [
        (("meta",), {"non_blocking": non_blocking}),
        *[((torch.device("cpu"),), {"non_blocking": non_blocking})] * 2,
    ]


def test_to_cpu_detaches_and_keeps_the_containers() -> None:
    x = torch.ones(2, requires_grad=True)
    there = to_cpu({"preds": (x * 2, [x]), "n": 3})
    assert type(there["preds"]) is tuple
    assert there["preds"][0].tolist() == [2.0, 2.0]
    assert not there["preds"][0].requires_grad
    assert not there["preds"][1][0].requires_grad
    assert there["n"] == 3
    assert x.requires_grad


def test_the_default_device_is_one_that_works() -> None:
    assert def_device in ("cpu", "cuda", "mps")
    assert to_device(torch.ones(2)).device.type == def_device
    assert DeviceCB().device.type == def_device
    with pytest.raises(RuntimeError, match="nonsense"):
        DeviceCB("nonsense")


nested = st.recursive(
    st.integers(0, 9).map(torch.tensor) | st.text(max_size=2) | st.none(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=2), inner, max_size=3)
        | st.tuples(inner, inner).map(lambda pair: Sample(*pair))
    ),
    max_leaves=8,
)


@settings(max_examples=40)
@given(nested)
def test_mapping_adds_one_to_every_tensor_and_changes_nothing_else(batch: Any) -> None:
    there_and_back = map_tensors(map_tensors(batch, lambda t: t + 1), lambda t: t - 1)
    assert repr(there_and_back) == repr(batch)
    tensors: list[torch.Tensor] = []
    map_tensors(batch, tensors.append)
    assert repr(batch).count("tensor(") == len(tensors)


# ----------------------------------------------------------------------------- in a fit


class DictLearner(TrainLearner):
    def predict(self) -> None:
        self.preds = self.model(self.batch["image"])

    def get_loss(self) -> None:
        self.loss = self.loss_func(self.preds, self.batch["label"])


@pytest.fixture
def _moving_keeps_parameters() -> Iterator[None]:
    """Let a model keep its parameters when it is moved to "meta", as when it is moved to a GPU."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("_moving_keeps_parameters")
def test_device_cb_moves_model_and_dict_batches(
    digits: Digits, make_cnn: Callable[[], nn.Module], backend: dict[str, Any]
) -> None:
    images, labels = digits
    batches = [{"image": images[:8], "label": labels[:8], "names": ["a"] * 8}] * 2
    model = make_cnn()
    learner = DictLearner(model, DataLoaders(batches, batches), F.cross_entropy)
    seen = []

    @learner.on(AfterLoss)
    def look(event: AfterLoss) -> None:
        batch = learner.batch
        seen.append((batch["image"].device.type, batch["label"].device.type, batch["names"]))
        assert learner.loss.device.type == "meta"

    result = learner.run(1, cbs=DeviceCB("meta"), **backend)
    assert (result.status, result.steps, result.valid_batches) == ("completed", 2, 2)
    assert seen == [("meta", "meta", ["a"] * 8)] * 4
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {batch["image"].device.type for batch in batches} == {"cpu"}  # the loader keeps its own


@pytest.mark.parametrize("seed", range(6))
def test_batches_are_moved_before_they_are_formatted_in_any_order_of_the_list(
    seed: int, digits: Digits, make_cnn: Callable[[], nn.Module]
) -> None:
    cbs: list[Callback] = [ChannelLastCB(), DeviceCB("cpu"), MetricsCB()]
    random.Random(seed).shuffle(cbs)
    images, labels = digits
    learner = TrainLearner(
        make_cnn(), DataLoaders([(images[:8], labels[:8])]), F.cross_entropy, cbs=cbs
    )

    @learner.on(BeforeBatch)
    def look(event: BeforeBatch) -> None:
        assert learner.batch[0].is_contiguous(memory_format=CHANNELS_LAST)

    lines = learner.explain().splitlines()
    start = lines.index("BeforeBatch")
    assert [line.split()[1] for line in lines[start + 1 : start + 3]] == [
        "DeviceCB.before_batch",
        "ChannelLastCB.before_batch",
    ]
    assert learner.run(1, valid=False).status == "completed"


# ------------------------------------------------------------------------------ channels last


def formats(batch: Any) -> list[bool]:
    found: list[bool] = []
    map_tensors(
        batch,
        lambda t: found.append(t.ndim == 4 and t.is_contiguous(memory_format=CHANNELS_LAST)),
    )
    return found


@pytest.mark.parametrize(
    "pack",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        Sample,
        lambda x, y: ({"image": x, "extra": [x]}, y),
        lambda x, y: OrderedDict(image=x, label=y),
    ],
    ids=["tuple", "list", "namedtuple", "dict in tuple", "dict"],
)
def test_channels_last_converts_images_in_any_container(
    pack: Callable[..., Any], digits: Digits
) -> None:
    images = digits[0][:4].repeat(1, 3, 1, 1)  # with one channel both formats are the same
    labels = digits[1][:4]
    batch = pack(images, labels)
    assert not any(formats(batch))
    learner = TrainLearner(nn.Conv2d(3, 4, 3), DataLoaders(valid=[batch]))
    seen = []
    learner.predict = lambda: seen.append(learner.batch)  # type: ignore[method-assign]
    learner.get_loss = lambda: None  # type: ignore[method-assign]
    learner.run(train=False, cbs=ChannelLastCB())
    assert type(seen[0]) is type(batch)
    n_images = 2 if isinstance(batch, tuple) and isinstance(batch[0], dict) else 1
    assert formats(seen[0]) == [True] * n_images + [False]
    assert learner.model.weight.is_contiguous(memory_format=CHANNELS_LAST)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 3, 5), (4, 3, 2, 5, 5)])
def test_channels_last_leaves_other_shapes_as_they_are(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    learner = TrainLearner(nn.Identity(), DataLoaders(valid=[(x, x)]), lambda p, y: (p - y).mean())
    seen = []
    learner.subscribe(AfterLoss, lambda _: seen.append(learner.batch))
    learner.run(train=False, cbs=ChannelLastCB())
    assert seen[0][0] is x
    assert seen[0][1] is x

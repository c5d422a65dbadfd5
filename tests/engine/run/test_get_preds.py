"""`get_preds` of outputs in any form: every sample once, in order, or an error that says why."""

from __future__ import annotations

import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import SingleEpochCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterPredict,
    BeforeBatch,
    BeforeFit,
    CancelBatchException,
    CancelEpochException,
)
from structlog.testing import capture_logs
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from tests.support.waiting import GUARD

N, SIZE = 7, 4
X = torch.arange(N * 3.0).reshape(N, 3)


class Model(nn.Module):
    """Returns what `forward` makes of the inputs."""

    def __init__(self, forward: Callable[[Any], Any]) -> None:
        super().__init__()
        self.make = forward

    def forward(self, x: Any) -> Any:
        return self.make(x)


def batches(size: int = SIZE) -> list[Any]:
    return [(x, x.sum(1)) for x in X.split(size)]


async def preds_of(forward: Callable[[Any], Any], loader: Any = None, **options: Any) -> Any:
    learner = TrainLearner(Model(forward), DataLoaders(valid=loader or batches()))
    with anyio.fail_after(GUARD):
        return await learner.get_preds(**options)


# ----------------------------------------------------------------------------- lists of samples


def images(n: int, size: int = SIZE) -> list[Any]:
    """Batches of images and their boxes as torchvision's references collate them."""
    samples = [
        (torch.full((3, 2, 2), float(k)), {"labels": torch.ones(k)}) for k in range(1, n + 1)
    ]
    return [tuple(zip(*samples[i : i + size], strict=True)) for i in range(0, n, size)]


def detect(images: Any) -> list[dict[str, torch.Tensor]]:
    """As many boxes in an image as its number, filled with it."""
    return [{"boxes": torch.full((int(i.max()), 4), float(i.max()))} for i in images]


@pytest.mark.parametrize("size", [4, 1, 3, 8])
@pytest.mark.parametrize("n", [8, 7])
async def test_a_detector_has_a_dict_for_every_image(n: int, size: int) -> None:
    preds, targets = await preds_of(detect, images(n, size), with_targets=True)
    assert [p["boxes"][:, 0].tolist() for p in preds] == [[float(k)] * k for k in range(1, n + 1)]
    assert [len(t["labels"]) for t in targets] == list(range(1, n + 1))


async def test_images_with_as_many_boxes_as_there_are_images() -> None:
    """Of every image of four, four boxes: rows of columns, by their number."""
    same = [{"boxes": torch.full((4, 4), float(k))} for k in range(8)]
    loader = [(x, x) for x in torch.arange(8.0).split(4)]
    preds = await preds_of(lambda x: [same[int(k)] for k in x], loader)
    assert [p["boxes"][0, 0].item() for p in preds] == list(range(8))


async def test_strings_and_numbers_may_be_samples() -> None:
    texts = await preds_of(lambda x: [str(int(row[0])) for row in x])
    assert texts == [str(3 * k) for k in range(N)]
    assert await preds_of(lambda x: tuple(int(row[0]) for row in x)) == [3 * k for k in range(N)]


async def test_two_outputs_of_two_samples_are_told_apart_by_the_next_batch() -> None:
    """Two tensors of two rows for two samples; the last batch has one sample."""
    columns = await preds_of(lambda x: [x, -x], batches(2))
    assert [torch.equal(c, t) for c, t in zip(columns, (X, -X), strict=True)] == [True, True]
    loader = [(x, x) for x in X[:5].split(2)]
    samples = await preds_of(lambda x: [row.expand(2, 3) for row in x], loader)
    assert len(samples) == 5
    assert all(torch.equal(s, x.expand(2, 3)) for s, x in zip(samples, X, strict=False))


async def test_that_it_cannot_be_told_is_logged() -> None:
    with capture_logs() as logs:
        preds = await preds_of(lambda x: [x, -x], [(x, x) for x in X[:4].split(2)])
    assert torch.equal(preds[0], X[:4])
    (log,) = [log for log in logs if log["event"] == "predictions_are_a_guess"]
    assert "keep=" in log["hint"]
    with capture_logs() as logs:
        await preds_of(lambda x: {"a": x, "b": -x}, [(x, x) for x in X[:4].split(2)])
        await preds_of(lambda x: [x, -x], batches(2))
    assert logs == []


# ----------------------------------------------------------------------------------- containers


class ModelOutput(OrderedDict[str, Any]):
    """Like that of transformers: a dict whose items are attributes too."""

    def __init__(self, **items: Any) -> None:
        super().__init__()
        for name, value in items.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        return _model_output, (dict(self),)


def _model_output(items: dict[str, Any]) -> ModelOutput:
    return ModelOutput(**items)


@dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...]
    loss: torch.Tensor | None = None


Pair = namedtuple("Pair", "logits hidden")


@pytest.mark.parametrize("size", [4, 2, 1])
async def test_containers_keep_their_class(size: int) -> None:
    loader = batches(size)
    output = await preds_of(lambda x: ModelOutput(logits=x, hidden=(x, -x)), loader)
    assert type(output) is ModelOutput
    assert torch.equal(output.logits, X)
    assert torch.equal(output["hidden"][1], -X)
    data = await preds_of(lambda x: Output(x, (x, -x)), loader)
    assert type(data) is Output
    assert torch.equal(data.logits, X)
    assert torch.equal(data.hidden[1], -X)
    assert data.loss is None
    pair = await preds_of(lambda x: Pair(x, -x), loader)
    assert type(pair) is Pair
    assert torch.equal(pair.hidden, -X)


async def test_none_among_the_outputs_stays_none() -> None:
    logits, nothing = await preds_of(lambda x: (x, None))
    assert torch.equal(logits, X)
    assert nothing is None


async def test_padded_sequences_become_a_list_with_one_per_sample() -> None:
    """Each as long as in its batch: to pad them to one length would invent values."""
    loader = [(torch.ones(4, 3, 2), torch.zeros(4, 3)), (torch.ones(2, 5, 2), torch.zeros(2, 5))]
    preds, targets = await preds_of(lambda x: x, loader, with_targets=True)
    assert [tuple(p.shape) for p in preds] == [(3, 2)] * 4 + [(5, 2)] * 2
    assert [len(t) for t in targets] == [3] * 4 + [5] * 2
    same = await preds_of(lambda x: x, loader[:1] * 2)
    assert same.shape == (8, 3, 2)


async def test_floats_of_less_than_32_bits_are_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        preds = await preds_of(lambda x, dtype=dtype: [(row / 20).to(dtype) for row in x])
        assert {p.dtype for p in preds} == {torch.float32}
        preds = await preds_of(lambda x, dtype=dtype: (x / 20).to(dtype))
        assert preds.numpy().dtype == "float32"
        assert torch.equal(preds, (X / 20).to(dtype).float())
    for dtype in (torch.float64, torch.int8, torch.bool, torch.complex64):
        assert (await preds_of(lambda x, dtype=dtype: x.to(dtype))).dtype == dtype


async def test_what_a_model_writes_again_is_not_collected_twice() -> None:
    """It may return the same memory for every batch, and a loader may fill it again."""
    memory = torch.empty(SIZE, 3)

    def loader() -> Iterator[Any]:
        for x in X.split(SIZE):
            memory[: len(x)] = x
            yield memory[: len(x)], memory[: len(x)]

    class Loader:
        def __iter__(self) -> Iterator[Any]:
            return loader()

    preds, targets = await preds_of(lambda x: x, Loader(), with_targets=True)
    assert torch.equal(preds, X)
    assert torch.equal(targets, X)


# ---------------------------------------------------------------------------------------- keep


def several(x: torch.Tensor) -> dict[str, Any]:
    return {"loss": x.mean(), "logits": x, "hidden": (-x, 2 * x)}


async def test_what_to_keep_can_be_said() -> None:
    assert torch.equal(await preds_of(several, keep="logits"), X)
    logits, (minus, _) = await preds_of(several, batches(2), keep=("logits", "hidden"))
    assert torch.equal(logits, X)
    assert torch.equal(minus, -X)
    assert torch.equal(await preds_of(several, keep=lambda p: p["hidden"][1]), 2 * X)
    assert torch.equal(await preds_of(lambda x: (x.mean(), x), keep=1), X)
    assert torch.equal(await preds_of(lambda x: (x.mean(), x), keep=-1), X)
    output = await preds_of(lambda x: Output(x, (), x.mean()), keep=["logits"])
    assert torch.equal(output[0], X)
    assert torch.equal(await preds_of(lambda x: ModelOutput(a=x, b=x.mean()), keep="a"), X)
    preds, targets = await preds_of(several, keep="logits", with_targets=True)
    assert torch.equal(targets, preds.sum(1))


@pytest.mark.parametrize(
    ("keep", "forward", "message"),
    [
        ("logit", several, r"keep='logit': there is no such part.* 'loss', 'logits', 'hidden'"),
        (2, lambda x: (x, x), r"keep=2: there is no such part.* a tuple of 2"),
        ("logits", lambda x: (x, x), r"keep='logits'.* a tuple of 2"),
        ("logits", lambda x: x, r"keep='logits'.* a Tensor of shape \(4, 3\)"),
    ],
)
async def test_a_part_that_there_is_not_is_named(
    keep: Any, forward: Callable[[Any], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        await preds_of(forward, keep=keep)


@pytest.mark.parametrize("keep", [1.5, True, ("a", None), {"a": 1}, (), []])
async def test_a_choice_that_is_not_one_is_refused_before_the_pass(keep: Any) -> None:
    def never(x: Any) -> Any:
        pytest.fail("the model was called")

    with pytest.raises((TypeError, ValueError), match="choose what to collect: keep='logits'"):
        await preds_of(never, keep=keep)


# ----------------------------------------------------------------------- what cannot be collected


def nested(rows: torch.Tensor) -> torch.Tensor:
    return torch.nested.nested_tensor(list(rows), layout=torch.jagged)


class Cache:
    """As the caches of keys and values that language models return."""


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (several, r"preds\['loss'\] is a scalar"),
        (lambda x: (x, x.mean()), r"preds\[1\] is a scalar, and preds has 2 items"),
        (lambda x: x.mean(), "preds is a scalar"),
        (lambda x: Output(x, (x,), x.mean()), r"preds\.loss is a scalar"),
        (lambda x: {"a": x, "b": 1.5}, r"preds\['b'\] is a float"),
        (lambda x: {"a": x, "b": Cache()}, r"preds\['b'\] is a Cache"),
        (lambda x: "text", "preds is a str"),
        (lambda x: x.T, "preds has 3 rows for 4 samples"),
        (lambda x: (x, {"deep": x.T}), r"preds\[1\]\['deep'\] has 3 rows for 4 samples"),
        (lambda x: [x[0]] * 3, r"preds\[0\] has 3 rows for 4 samples, and preds has 3 items"),
        (lambda x: pack_sequence(list(x)), r"preds is a PackedSequence, which .*unpack_sequence"),
        (
            nested,
            r"preds is a nested tensor, which .*unbind",
        ),
    ],
)
async def test_what_cannot_be_collected_is_said_at_the_first_batch(
    forward: Callable[[Any], Any], message: str
) -> None:
    calls = []

    def counting(x: Any) -> Any:
        calls.append(x)
        return forward(x)

    with pytest.raises(TypeError, match=f"get_preds cannot collect this: {message}.*keep='logits'"):
        await preds_of(counting)
    assert len(calls) == 1


async def test_the_ways_out_that_the_errors_name_work() -> None:
    sequences = await preds_of(lambda x: pack_sequence(list(x)), keep=unpack_sequence)
    assert torch.equal(torch.stack(sequences), X)
    assert torch.equal(torch.stack(await preds_of(nested, keep=lambda p: list(p.unbind()))), X)
    assert torch.equal(await preds_of(lambda x: x.T, keep=lambda p: p.T), X)

    class Nodes(TrainLearner):
        def batch_size(self, batch: Any) -> int:
            return 2 * len(batch[0])

    learner = Nodes(Model(lambda x: x.repeat(2, 1)), DataLoaders(valid=batches()))
    assert len(await learner.get_preds()) == 2 * N


async def test_targets_that_cannot_be_collected_are_named() -> None:
    loader = [(x, {"y": x, "weight": torch.ones(())}) for x in X.split(SIZE)]
    with pytest.raises(TypeError, match=r"targets\['weight'\] is a scalar; leave with_targets out"):
        await preds_of(lambda x: x, loader, with_targets=True)


async def test_outputs_of_another_form_than_those_before_are_named() -> None:
    forms = iter([lambda x: (x, x), lambda x: {"a": x}])
    with pytest.raises(TypeError, match=r"preds of batch 1 .*a dict of 'a', and were a tuple of 2"):
        await preds_of(lambda x: next(forms)(x))


async def test_rows_of_batches_of_unknown_size_are_concatenated() -> None:
    """Nothing says how many samples an object holds: the rows are taken as they are."""

    class Opaque:
        __slots__ = ("x",)

        def __init__(self, x: torch.Tensor) -> None:
            self.x = x

    loader = [(Opaque(x),) for x in X.split(SIZE)]
    assert torch.equal(await preds_of(lambda batch: batch.x, loader), X)
    preds = await preds_of(lambda batch: [{"a": row} for row in batch.x], loader)
    assert len(preds) == N


# ------------------------------------------------------------------------------- how it is run


async def test_a_pass_that_is_cut_short_is_an_error() -> None:
    learner = TrainLearner(Model(lambda x: x), DataLoaders(valid=batches()))

    @learner.on(BeforeBatch, where=lambda event: event.iter == 1)
    def enough(event: BeforeBatch) -> None:
        raise CancelEpochException("enough")

    with pytest.raises(RuntimeError, match=r"get_preds\(\) did not see all batches"):
        await learner.get_preds()

    learner = TrainLearner(Model(lambda x: x), DataLoaders(valid=batches()))
    learner.subscribe(AfterPredict, lambda event: learner.stop(reason="enough"))
    with pytest.raises(RuntimeError, match=r"did not see all batches: .*\(enough\)"):
        await learner.get_preds()


async def test_a_pass_whose_epoch_is_over_is_not() -> None:
    learner = TrainLearner(Model(lambda x: x), DataLoaders(valid=batches()), cbs=SingleEpochCB())
    assert torch.equal(await learner.get_preds(), X)


async def test_a_pass_in_which_every_batch_is_skipped_has_no_predictions() -> None:
    learner = TrainLearner(Model(lambda x: x), DataLoaders(valid=batches()))

    @learner.on(BeforeBatch)
    def skip(event: BeforeBatch) -> None:
        raise CancelBatchException

    with pytest.raises(RuntimeError, match="no predictions: every batch was skipped"):
        await learner.get_preds()


async def test_predictions_are_joined_in_the_thread_of_the_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """G6: to concatenate the predictions of a large data set takes long."""
    threads = []
    cat = torch.cat

    def watched(*args: Any, **kwargs: Any) -> Any:
        threads.append(threading.current_thread())
        return cat(*args, **kwargs)

    monkeypatch.setattr(torch, "cat", watched)
    learner = TrainLearner(Model(lambda x: x), DataLoaders(valid=batches()))
    fits: list[threading.Thread] = []
    learner.subscribe(BeforeFit, lambda event: fits.append(threading.current_thread()))
    await learner.get_preds()
    assert threads == fits
    assert threads != [threading.current_thread()]

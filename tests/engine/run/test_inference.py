"""`validate` and `get_preds`: the numbers are those computed by hand, and nothing is changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    DeviceCB,
    GradientAccumulationCB,
    MetricsCB,
    MixedTrainingCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, Learner, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterEpoch,
    AfterPredict,
    BeforeBatch,
    BeforeFit,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    Predict,
    record_events,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from tests.support.waiting import GUARD

Digits = tuple[torch.Tensor, torch.Tensor]


def loaders(digits: Digits) -> DataLoaders:
    """Batches of 32 of the real digits; the last of the validation set has 6."""
    images, labels = digits
    train = TensorDataset(images[:64], labels[:64])
    valid = TensorDataset(images[250:], labels[250:])
    return DataLoaders(DataLoader(train, 32), DataLoader(valid, 32))


class Dropping(nn.Module):
    """Answers in another way when it trains, so that its mode can be seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(42)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.body(x))


@pytest.fixture
def learner(digits: Digits) -> TrainLearner:
    return TrainLearner(Dropping(), loaders(digits), F.cross_entropy)


def by_hand(model: nn.Module, loader: Any) -> tuple[dict[str, float], torch.Tensor, torch.Tensor]:
    """Loss and accuracy over all samples, predictions and targets, in plain PyTorch."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        preds = torch.cat([model(x) for x, _ in loader])
    targets = torch.cat([y for _, y in loader])
    loss = F.cross_entropy(preds.double(), targets)
    accuracy = (preds.argmax(1) == targets).float().mean()
    return {"loss": loss.item(), "accuracy": accuracy.item()}, preds, targets


@contextmanager
def unchanged(learner: Learner) -> Iterator[None]:
    """Weights and buffers, gradients, optimizer, data, callbacks and mode are as before."""

    def state() -> list[Any]:
        modes = [module.training for module in learner.model.modules()]
        return [learner.opt, learner.dls, learner.cbs, learner.bus.subscriptions(), modes]

    before = state()
    weights = copy.deepcopy(learner.model.state_dict())
    gradients = [p.grad for p in learner.model.parameters()]
    opt_state = copy.deepcopy(learner.opt.state_dict()) if learner.opt is not None else None
    with anyio.fail_after(GUARD):
        yield
    assert state() == before
    assert learner.model.state_dict().keys() == weights.keys()
    assert all(torch.equal(t, weights[k]) for k, t in learner.model.state_dict().items())
    for p, gradient in zip(learner.model.parameters(), gradients, strict=True):
        assert p.grad is gradient
    if opt_state is not None:
        assert repr(learner.opt.state_dict()) == repr(opt_state)
    assert not learner.fitting


# ------------------------------------------------------------------------------------ validate


async def test_validate_returns_the_loss_over_all_samples(learner: TrainLearner) -> None:
    """The batches differ in size: a mean of their losses would be another number."""
    with unchanged(learner):
        numbers = await learner.validate()
    expected, _, _ = by_hand(learner.model, learner.dls.valid)
    assert numbers == {"loss": pytest.approx(expected["loss"], rel=1e-6)}


async def test_validate_uses_the_metrics_that_are_attached(learner: TrainLearner) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learner.add_cbs(metrics)
    await learner.fit(1)
    with unchanged(learner):
        numbers = await learner.validate()
    expected, _, _ = by_hand(learner.model, learner.dls.valid)
    assert list(numbers) == ["accuracy", "loss"]
    assert numbers == {k: pytest.approx(v, rel=1e-6) for k, v in expected.items()}
    assert [(row["epoch"], row["train"]) for row in metrics.history] == [(0, "train"), (0, "eval")]


async def test_validate_adds_no_loss_to_what_a_metrics_callback_of_ones_own_records(
    learner: TrainLearner,
) -> None:
    class OnlyTheSize(MetricsCB):
        def after_batch(self, event: AfterBatch) -> None: ...

        def after_epoch(self, event: AfterEpoch) -> None:
            event.learner.record["samples"] = event.learner.n_samples

    learner.add_cbs(OnlyTheSize())
    samples = sum(len(x) for x, _ in learner.dls.valid)
    assert await learner.validate() == {"samples": samples}


async def test_validate_without_a_completed_batch_has_no_numbers(learner: TrainLearner) -> None:
    @learner.on(BeforeBatch)
    def skip(event: BeforeBatch) -> None:
        raise CancelBatchException("skipped")

    assert await learner.validate() == {}


async def test_validate_on_another_loader(learner: TrainLearner, digits: Digits) -> None:
    images, labels = digits
    another = [(images[:7], labels[:7]), (images[7:9], labels[7:9])]
    learner.dls.valid = None
    with unchanged(learner):
        numbers = await learner.validate(another)
    expected, _, _ = by_hand(learner.model, another)
    assert numbers["loss"] == pytest.approx(expected["loss"], rel=1e-6)


async def test_validate_needs_no_data_loaders_if_it_is_given_a_loader(digits: Digits) -> None:
    learner = TrainLearner(Dropping(), None, F.cross_entropy)
    another = [(digits[0][:9], digits[1][:9])]
    with unchanged(learner):
        numbers = await learner.validate(another)
    assert numbers["loss"] == pytest.approx(by_hand(learner.model, another)[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("training", [True, False], ids=["train mode", "eval mode"])
async def test_validate_restores_the_mode_of_the_model(
    training: bool, learner: TrainLearner
) -> None:
    learner.model.train(training)
    with unchanged(learner), record_events(learner) as recorded:
        await learner.validate()
    assert {event.training for event in recorded if hasattr(event, "training")} == {False}


@pytest.mark.parametrize("call", ["validate", "get_preds"])
async def test_a_module_that_was_set_to_its_own_mode_keeps_it(
    call: str, learner: TrainLearner
) -> None:
    """A frozen batch norm, say, in a model that trains."""
    learner.model.train()
    learner.model.body[2].eval()
    with unchanged(learner):
        await getattr(learner, call)()


async def test_validate_keeps_the_optimizer_of_the_last_fit(learner: TrainLearner) -> None:
    """With its state: momentum buffers are not those of a new one."""
    learner.opt_func = lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9)
    await learner.fit(1)
    assert learner.opt.state_dict()["state"] != {}
    with unchanged(learner):
        await learner.validate()
        await learner.get_preds()


async def test_validate_before_any_fit_makes_no_optimizer(learner: TrainLearner) -> None:
    learner.opt_func = None
    with unchanged(learner):
        await learner.validate()
    assert learner.opt is None


async def test_validate_between_two_fits_does_not_change_what_they_compute(
    digits: Digits,
) -> None:
    """G11."""
    weights = []
    for validates in (True, False):
        learner = TrainLearner(Dropping(), loaders(digits), F.cross_entropy)
        torch.manual_seed(3)
        for _ in range(2):
            await learner.fit(1, valid=False)
            state = torch.get_rng_state()
            if validates:
                await learner.validate()
            torch.set_rng_state(state)  # a DataLoader draws a seed from it, as any does
        weights.append(learner.model.state_dict())
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


async def test_validate_runs_the_callbacks_and_emits_one_validating_epoch(
    learner: TrainLearner,
) -> None:
    batch = ["BeforeBatch", "AfterPredict", "AfterLoss", "AfterBatch", "CleanupBatch"]
    with record_events(learner) as recorded:
        await learner.validate()
    assert recorded.names == [
        *["BeforeFit", "BeforeEpoch", *batch * 3, "AfterEpoch", "CleanupEpoch"],
        *["AfterFit", "CleanupFit"],
    ]
    assert learner.result is not None
    assert (learner.result.valid_batches, learner.result.batches) == (3, 0)


async def test_validate_without_gradients(learner: TrainLearner) -> None:
    seen: list[tuple[bool, bool]] = []

    @learner.on(AfterPredict)
    def look(event: AfterPredict) -> None:
        seen.append((event.learner.preds.requires_grad, torch.is_grad_enabled()))

    await learner.validate()
    assert seen == [(False, False)] * 3


async def test_numbers_that_other_callbacks_record_are_returned(learner: TrainLearner) -> None:
    class Counter(Callback):
        def after_epoch(self, event: Any) -> None:
            event.learner.record["samples"] = event.learner.n_samples

    learner.add_cbs(Counter())
    numbers = await learner.validate()
    assert numbers["samples"] == 70
    assert set(numbers) == {"samples", "loss"}


async def test_a_cancelled_validation_returns_no_numbers(learner: TrainLearner) -> None:
    @learner.on(BeforeBatch, where=lambda event: event.iter == 1)
    def enough(event: BeforeBatch) -> None:
        raise CancelEpochException("enough")

    with unchanged(learner):
        assert await learner.validate() == {}


@pytest.mark.parametrize("call", ["validate", "get_preds"])
async def test_a_failing_model_leaves_everything_as_it_was(
    call: str, learner: TrainLearner
) -> None:
    """G9."""
    bad = [(torch.ones(2, 5), torch.tensor([0, 1]))]
    learner.model.train()
    with unchanged(learner):
        with pytest.raises(RuntimeError, match="shapes"):
            await getattr(learner, call)(bad)
    assert (await learner.fit(1)).status == "completed"


# ----------------------------------------------------------------------------------- get_preds


async def test_get_preds_returns_those_of_the_model(learner: TrainLearner) -> None:
    _, expected, _ = by_hand(learner.model, learner.dls.valid)
    with unchanged(learner):
        preds = await learner.get_preds()
    assert torch.equal(preds, expected)
    assert not preds.requires_grad


async def test_get_preds_with_targets(learner: TrainLearner) -> None:
    _, expected, labels = by_hand(learner.model, learner.dls.valid)
    with unchanged(learner):
        preds, targets = await learner.get_preds(with_targets=True)
    assert torch.equal(preds, expected)
    assert torch.equal(targets, labels)


async def test_get_preds_of_another_loader(learner: TrainLearner) -> None:
    preds, targets = await learner.get_preds(learner.dls.train, with_targets=True)
    _, expected, labels = by_hand(learner.model, learner.dls.train)
    assert torch.equal(preds, expected)
    assert torch.equal(targets, labels)


@pytest.mark.parametrize(
    "wrap", [lambda x: x, lambda x: (x,), lambda x: [x]], ids=["x", "()", "[]"]
)
async def test_get_preds_of_a_loader_without_targets(
    wrap: Callable[[torch.Tensor], Any], learner: TrainLearner, digits: Digits
) -> None:
    images = digits[0]
    with unchanged(learner):
        preds = await learner.get_preds([wrap(images[:5]), wrap(images[5:8])])
    assert torch.equal(preds, by_hand(learner.model, [(images[:8], digits[1][:8])])[1])


async def test_asking_for_targets_that_are_not_there_says_so(
    learner: TrainLearner, digits: Digits
) -> None:
    with unchanged(learner), pytest.raises(TypeError, match="inputs, targets"):
        await learner.get_preds([digits[0][:5]], with_targets=True)


class Several(nn.Module):
    """Returns its predictions in a container."""

    def __init__(self, pack: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.linear = nn.Linear(3, 2)
        self.pack = pack

    def forward(self, x: torch.Tensor) -> Any:
        y = self.linear(x)
        return self.pack(y, y.argmax(1))


@pytest.mark.parametrize(
    ("pack", "container"),
    [
        (lambda y, label: (y, label), tuple),
        (lambda y, label: [y, label], tuple),
        (lambda y, label: {"y": y, "label": label}, dict),
        (lambda y, label: {"deep": (y, {"label": label})}, dict),
    ],
    ids=["tuple", "list", "dict", "nested"],
)
async def test_get_preds_joins_containers_part_by_part(
    pack: Callable[..., Any], container: type, make_batches: Callable[..., Any]
) -> None:
    batches = make_batches(3, size=4) + make_batches(1, size=1, seed=9)
    learner = TrainLearner(Several(pack))
    preds = await learner.get_preds(batches)
    y = torch.cat([learner.model.linear(x) for x, _ in batches]).detach()
    assert isinstance(preds, container)
    flat = torch.utils._pytree.tree_leaves(preds)
    assert [t.shape for t in flat] == [(13, 2), (13,)]
    assert torch.equal(flat[0], y)
    assert torch.equal(flat[1], y.argmax(1))
    if container is dict:
        assert list(preds) == list(pack(y, y.argmax(1)))


async def test_get_preds_needs_no_loss(learner: TrainLearner) -> None:
    def no_loss(preds: Any, targets: Any) -> Any:
        pytest.fail("a loss was computed")

    learner.loss_func = no_loss
    assert (await learner.get_preds()).shape == (70, 10)


async def test_get_preds_of_a_learner_that_can_only_predict(learner: TrainLearner) -> None:
    """Nobody computes a loss, so nobody is needed to."""
    predictor = Learner(learner.model, learner.dls)
    predictor.on(Predict)(TrainCB().predict)
    preds = await predictor.get_preds()
    assert torch.equal(preds, by_hand(learner.model, learner.dls.valid)[1])


async def test_get_preds_counts_no_metrics(learner: TrainLearner) -> None:
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    learner.add_cbs(metrics)
    await learner.get_preds()
    assert metrics.history == []
    numbers = await learner.validate()
    expected, _, _ = by_hand(learner.model, learner.dls.valid)
    assert numbers == {k: pytest.approx(v, rel=1e-6) for k, v in expected.items()}


async def test_get_preds_sees_what_callbacks_make_of_them(learner: TrainLearner) -> None:
    """G2: it looks last."""
    learner.on(AfterPredict, order=10**9)(
        lambda event: setattr(event.learner, "preds", event.learner.preds.softmax(1))
    )
    preds = await learner.get_preds()
    assert torch.equal(preds, by_hand(learner.model, learner.dls.valid)[1].softmax(1))


async def test_preds_of_a_fit_that_was_cancelled_before_the_first_are_an_error(
    learner: TrainLearner,
) -> None:
    @learner.on(BeforeFit)
    def no(event: BeforeFit) -> None:
        raise CancelFitException("not now")

    with unchanged(learner), pytest.raises(RuntimeError, match=r"no predictions.*not now"):
        await learner.get_preds()


async def test_a_batch_that_a_callback_skips_is_not_predicted(learner: TrainLearner) -> None:
    @learner.on(BeforeBatch, where=lambda event: event.iter == 1)
    def skip(event: BeforeBatch) -> None:
        raise CancelBatchException("skipped")

    preds, targets = await learner.get_preds(with_targets=True)
    assert len(preds) == len(targets) == 70 - 32


# ----------------------------------------------------------------------- with other callbacks


async def test_get_preds_with_device_cb_are_on_the_cpu(learner: TrainLearner) -> None:
    learner.add_cbs(DeviceCB("cpu"))
    with unchanged(learner):
        preds = await learner.get_preds()
    assert preds.device.type == "cpu"
    assert torch.equal(preds, by_hand(learner.model, learner.dls.valid)[1])


async def test_get_preds_under_bf16_are_those_of_autocast(learner: TrainLearner) -> None:
    learner.add_cbs(MixedTrainingCB("bf16"))
    with unchanged(learner):
        preds = await learner.get_preds()
    model = copy.deepcopy(learner.model).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = torch.cat([model(x) for x, _ in learner.dls.valid])
    assert expected.dtype == torch.bfloat16
    assert preds.dtype == torch.float32  # numpy has no bfloat16
    assert torch.equal(preds, expected.float())
    assert preds.numpy().shape == (70, 10)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(
    "cbs",
    [
        lambda: DeviceCB("cpu"),
        lambda: MixedTrainingCB("bf16"),
        lambda: MixedTrainingCB("fp16"),
        lambda: GradientAccumulationCB(2),
        lambda: AccelerateCB("no"),
    ],
    ids=["device", "bf16", "fp16", "accumulation", "accelerate"],
)
async def test_validate_and_get_preds_go_with_callbacks_that_train(
    cbs: Callable[[], Callback], learner: TrainLearner
) -> None:
    """G9: and training goes on as if nobody had looked."""
    learner.add_cbs(cbs())
    await learner.fit(1)
    with unchanged(learner):
        numbers = await learner.validate()
        preds = await learner.get_preds()
    expected, by_model, _ = by_hand(learner.model, learner.dls.valid)
    assert numbers["loss"] == pytest.approx(expected["loss"], rel=2e-2)  # half precision
    assert torch.allclose(preds.float(), by_model, rtol=0.1, atol=0.1)
    assert (await learner.fit(1)).status == "completed"

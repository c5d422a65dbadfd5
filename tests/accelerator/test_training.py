"""Training on a device: the CPU's weights to the bit, and the host waits only for numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import anyio
import pytest
import structlog
import torch
from eventrain.callbacks import (
    ChannelLastCB,
    CheckpointCB,
    DeviceCB,
    EarlyStoppingCB,
    GradientAccumulationCB,
    GradientClippingCB,
    JournalCB,
    LossCurveCB,
    MetricsCB,
    MixedTrainingCB,
    OpenTelemetryCB,
    ProgressCB,
    PrometheusCB,
    RecordCB,
    SchedulerCB,
    StructlogCB,
    SummaryCB,
    TensorBoardCB,
    TerminateOnNaNCB,
    def_device,
)
from eventrain.engine import (
    DataLoaders,
    Learner,
    MomentumLearner,
    Prefetcher,
    TensorLoader,
    TrainLearner,
)
from eventrain.events import AfterBatch, BeforeBatch, BeforeStep, Callback
from matplotlib.figure import Figure
from prometheus_client import CollectorRegistry
from rich.console import Console
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from tests.support.accelerator import DEVICE, counted, is_here, uploads, waits
from tests.support.training import weights

Digits = tuple[torch.Tensor, torch.Tensor]
MakeModel = Callable[[], nn.Module]
MakeCbs = Callable[[], list[Callback]]

N_EPOCHS, N_TRAIN, N_VALID = 2, 6, 2
"""Epochs, and batches in each of them."""


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(StringIO()))
    yield
    structlog.reset_defaults()


def loaders(digits: Digits, wrap: Callable[[Any], Any] = lambda loader: loader) -> DataLoaders:
    """Six shuffled batches to train on, and two to validate on, of 16."""
    images, labels = digits
    train, valid = (TensorDataset(images[s], labels[s]) for s in (slice(96), slice(96, 128)))
    shuffled = DataLoader(train, 16, shuffle=True, generator=torch.Generator().manual_seed(1))
    return DataLoaders(wrap(shuffled), wrap(DataLoader(valid, 16)))


def to_standin(loader: Any) -> Prefetcher:
    return Prefetcher(loader, DEVICE)


def plain(model: nn.Module, digits: Digits) -> torch.Tensor:
    """The weights after a plain PyTorch loop on the CPU."""
    opt = torch.optim.SGD(model.parameters(), 0.1)
    loader = loaders(digits).train
    for _ in range(N_EPOCHS):
        for x, y in loader:
            F.cross_entropy(model(x), y).backward()
            opt.step()
            opt.zero_grad()
    return weights(model)


WAYS: dict[str, tuple[MakeCbs, dict[str, int]]] = {
    "nothing": (list, {}),
    "metrics": (
        lambda: [MetricsCB(accuracy=MulticlassAccuracy())],
        {"MeanLoss.item": 2 * N_EPOCHS, "_plain": 2 * N_EPOCHS},
    ),
    "accumulation": (lambda: [GradientAccumulationCB(4)], {}),
    "clipping": (lambda: [GradientClippingCB(0.1)], {}),
    "schedule": (lambda: [SchedulerCB(lambda opt: StepLR(opt, 4))], {}),
    "bf16": (lambda: [MixedTrainingCB("bf16")], {}),
    "fp16": (
        lambda: [MixedTrainingCB("fp16")],
        {"GradientScaling.step": 2 * N_EPOCHS * N_TRAIN},
    ),
    "fp16, accumulation and clipping": (
        lambda: [MixedTrainingCB("fp16"), GradientAccumulationCB(3), GradientClippingCB(0.1)],
        {"GradientScaling.step": 2 * N_EPOCHS * N_TRAIN // 3},
    ),
    "channels last": (lambda: [ChannelLastCB()], {}),
    "guards": (
        lambda: [TerminateOnNaNCB(), MetricsCB(), EarlyStoppingCB("loss")],
        {
            "MeanLoss.item": 2 * N_EPOCHS,
            "TerminateOnNaNCB.after_loss": N_EPOCHS * N_TRAIN,
            "_not_finite": N_EPOCHS * N_TRAIN,
        },
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_the_cpu_and_the_host_waits_as_often_as_documented(
    way: str, digits: Digits, make_cnn: MakeModel
) -> None:
    make_cbs, expected = WAYS[way]
    on_cpu = TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=make_cbs())
    on_cpu.run(N_EPOCHS)
    there = TrainLearner(make_cnn(), loaders(digits, to_standin), F.cross_entropy, cbs=make_cbs())
    there.model.to(DEVICE)
    with counted(waits) as found:
        result = there.run(N_EPOCHS)
    assert {p.device.type for p in there.model.parameters()} == {DEVICE}
    assert torch.equal(weights(there.model), weights(on_cpu.model))
    assert result.history == on_cpu.result.history
    assert found == expected


def test_weights_are_those_of_plain_pytorch(digits: Digits, make_cnn: MakeModel) -> None:
    learner = TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=DeviceCB())
    assert def_device == DEVICE
    assert MixedTrainingCB().dtype == torch.float16
    with counted(waits) as found, counted(uploads) as copied:
        learner.run(N_EPOCHS)
    assert torch.equal(weights(learner.model), plain(make_cnn(), digits))
    assert found == {}
    # DeviceCB copies two tensors per batch and waits; a Prefetcher, or non_blocking, would not.
    assert copied["to_device.<locals>.move"] == 2 * N_EPOCHS * (N_TRAIN + N_VALID)


def test_momentum_learner(digits: Digits, make_cnn: MakeModel) -> None:
    def run(*cbs: Callback) -> torch.Tensor:
        learner = MomentumLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=cbs)
        learner.run(N_EPOCHS)
        return weights(learner.model)

    with counted(waits) as found:
        there = run(DeviceCB(DEVICE))
        assert found.total() == 0
    assert torch.equal(there, run())


# ------------------------------------------------------------------------------------ loaders


def tensor_loaders(digits: Digits, device: str) -> DataLoaders:
    images, labels = digits
    options: dict[str, Any] = {"batch_size": 16, "device": device}
    generator = torch.Generator().manual_seed(1)
    train = TensorLoader(images[:96], labels[:96], shuffle=True, generator=generator, **options)
    return DataLoaders(train, TensorLoader(images[96:128], labels[96:128], **options))


def from_dataset(digits: Digits, device: str) -> DataLoaders:
    images, labels = digits
    return DataLoaders.from_dataset(
        TensorDataset(images[:96], labels[:96]),
        TensorDataset(images[96:128], labels[96:128]),
        16,
        generator=torch.Generator().manual_seed(1),
        device=device,
    )


@pytest.mark.parametrize("make", [tensor_loaders, from_dataset])
def test_loaders_that_put_batches_on_the_device(
    make: Callable[[Digits, str], DataLoaders], digits: Digits, make_cnn: MakeModel
) -> None:
    on_cpu = TrainLearner(make_cnn(), make(digits, "cpu"), F.cross_entropy)
    on_cpu.run(N_EPOCHS)
    there = TrainLearner(make_cnn(), make(digits, DEVICE), F.cross_entropy)
    there.model.to(DEVICE)
    seen: list[bool] = []
    there.subscribe(AfterBatch, lambda _: seen.extend(map(is_here, there.batch)))
    with counted(waits) as found:
        there.run(N_EPOCHS)
    assert set(seen) == {True}
    assert found == {}
    assert torch.equal(weights(there.model), weights(on_cpu.model))


@pytest.mark.parametrize("depth", [1, 2])
def test_a_prefetcher_on_two_iterations_at_once(depth: int) -> None:
    batches = [{"x": (torch.full((3,), float(i)), "text")} for i in range(5)]
    ahead = Prefetcher(batches, DEVICE, depth)
    for one, other in zip(ahead, ahead, strict=True):
        assert is_here(one["x"][0])
        assert torch.equal(one["x"][0].cpu(), other["x"][0].cpu())


# ---------------------------------------------------------------------------------- reporters


class Records(RecordCB):
    def __init__(self) -> None:
        super().__init__(every=1)
        self.records: list[dict[str, Any]] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)


def losses(records: list[dict[str, Any]]) -> list[float]:
    return [record["loss"] for record in records if record["event"] == "batch"]


def test_reporters_get_the_true_losses_and_the_training_does_not_wait(
    digits: Digits, make_cnn: MakeModel, tmp_path: Path
) -> None:
    def run(folder: Path, *cbs: Callback) -> tuple[Learner, Records, LossCurveCB]:
        records = Records()
        curve = LossCurveCB(Figure().subplots())
        console = Console(file=StringIO(), force_terminal=True)
        reporters = [
            records,
            curve,
            ProgressCB(console),
            StructlogCB(every=1),
            TensorBoardCB(folder, every=1),
            PrometheusCB(CollectorRegistry(), every_seconds=0),
            SummaryCB(),
            OpenTelemetryCB(),
        ]
        learner = TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=[*reporters, *cbs])
        learner.run(N_EPOCHS)
        return learner, records, curve

    on_cpu, expected, expected_curve = run(tmp_path / "cpu")
    with counted(waits) as found:
        there, records, curve = run(tmp_path / "there", DeviceCB(DEVICE))
    assert torch.equal(weights(there.model), weights(on_cpu.model))
    assert losses(records.records) == losses(expected.records)
    assert len(losses(records.records)) == N_EPOCHS * N_TRAIN
    assert curve.train == expected_curve.train
    assert curve.valid == expected_curve.valid
    assert set(found) <= {"host: PendingScalar.get"}, found  # not in the training thread


def test_a_journal_is_that_of_the_cpu(digits: Digits, make_cnn: MakeModel, tmp_path: Path) -> None:
    def run(name: str, *cbs: Callback) -> str:
        journal = JournalCB(tmp_path / name)
        TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=[journal, *cbs]).run(
            1, run_id="same"
        )
        return (tmp_path / name).read_text()

    assert run("there", DeviceCB(DEVICE)) == run("cpu")


# -------------------------------------------------------------------- checkpoints, and restoring


def with_dropout(make_cnn: MakeModel) -> nn.Module:
    return nn.Sequential(make_cnn(), nn.Dropout(0.2))


@pytest.mark.parametrize("every", [{"every_epochs": 1}, {"every_batches": 4}])
def test_a_resumed_run_is_the_same_run(
    every: dict[str, int], digits: Digits, make_cnn: MakeModel, tmp_path: Path
) -> None:
    def learner(*cbs: Callback) -> TrainLearner:
        torch.manual_seed(5)  # also of the device, from which the dropout draws
        return TrainLearner(
            with_dropout(make_cnn), loaders(digits), F.cross_entropy, cbs=[DeviceCB(DEVICE), *cbs]
        )

    whole = learner()
    whole.run(3)
    interrupted = learner(CheckpointCB(tmp_path, **every))
    interrupted.on(BeforeStep)(
        lambda event: interrupted.stop() if (event.epoch, event.iter) == (1, 5) else None
    )
    with counted(waits) as found:
        interrupted.run(3)
    assert set(found) == {"Snapshot.wait"}  # in the writer's thread
    torch.manual_seed(99)
    resumed = learner(CheckpointCB(tmp_path, **every))
    torch.rand(3, device=DEVICE)
    result = resumed.run(3, resume="last")
    assert result.resumed_from is not None
    assert torch.equal(weights(resumed.model), weights(whole.model))


def adamw(params: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr / 10)


@pytest.mark.parametrize(
    ("learner_class", "opt_func", "make_cbs", "in_training"),
    [
        (MomentumLearner, torch.optim.SGD, list, set()),
        (TrainLearner, adamw, lambda: [GradientAccumulationCB(3), GradientClippingCB(0.1)], set()),
        (
            TrainLearner,
            torch.optim.SGD,
            lambda: [MetricsCB(accuracy=MulticlassAccuracy()), EarlyStoppingCB("loss")],
            {"MeanLoss.item", "_plain"},
        ),
        (
            TrainLearner,
            torch.optim.SGD,
            lambda: [MixedTrainingCB("fp16")],
            {"GradientScaling.step", "MixedTrainingCB.state_dict"},
        ),
    ],
    ids=["momentum", "adamw, accumulation", "metrics", "fp16"],
)
def test_state_of_every_kind_is_resumed_in_the_middle_of_an_epoch(
    learner_class: type[TrainLearner],
    opt_func: Any,
    make_cbs: MakeCbs,
    in_training: set[str],
    digits: Digits,
    make_cnn: MakeModel,
    tmp_path: Path,
) -> None:
    def learner(*cbs: Callback) -> TrainLearner:
        cbs = (*make_cbs(), DeviceCB(DEVICE), *cbs)
        return learner_class(
            make_cnn(), loaders(digits), F.cross_entropy, cbs=cbs, opt_func=opt_func
        )

    whole = learner()
    whole.run(3)
    interrupted = learner(CheckpointCB(tmp_path, every_batches=4))
    interrupted.subscribe(
        BeforeBatch, lambda event: interrupted.stop() if event.epoch == 1 and event.iter else None
    )
    with counted(waits) as found:
        interrupted.run(3)
    assert found.keys() <= in_training | {"Snapshot.wait"}
    resumed = learner(CheckpointCB(tmp_path, every_batches=4))
    result = resumed.run(3, resume="last")
    assert result.resumed_from is not None
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.result is not None
    assert whole.result is not None
    assert resumed.result.history == whole.result.history


def test_tied_weights_of_a_device_stay_tied(digits: Digits, tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x.flatten(1)).relu())

    def run(n_epochs: int, resume: str | None) -> TrainLearner:
        torch.manual_seed(3)
        cbs = [CheckpointCB(tmp_path), DeviceCB(DEVICE)]
        learner = TrainLearner(Tied(), loaders(digits), F.cross_entropy, cbs=cbs)
        learner.run(n_epochs, resume=resume)
        return learner

    torch.manual_seed(3)
    expected = plain(Tied(), digits)
    run(1, None)
    resumed = run(N_EPOCHS, "last")
    assert resumed.model.first.weight is resumed.model.second.weight
    assert torch.equal(weights(resumed.model), expected)


def test_a_checkpoint_of_a_device_is_resumed_on_the_cpu_and_the_other_way_round(
    digits: Digits, make_cnn: MakeModel, tmp_path: Path
) -> None:
    def run(n_epochs: int, name: str, device: str, resume: str | None) -> torch.Tensor:
        cbs = [CheckpointCB(tmp_path / name), DeviceCB(device)]
        learner = TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=cbs)
        learner.run(n_epochs, resume=resume)
        return weights(learner.model)

    for name, first, then in ("a", DEVICE, "cpu"), ("b", "cpu", DEVICE):
        run(1, name, first, None)
        assert torch.equal(run(N_EPOCHS, name, then, "last"), plain(make_cnn(), digits))


def test_lr_find_is_that_of_the_cpu_and_restores_everything(
    digits: Digits, make_cnn: MakeModel
) -> None:
    async def find(learner: TrainLearner) -> Any:
        return await learner.lr_find(lr_mult=2.0)

    on_cpu = TrainLearner(make_cnn(), loaders(digits), F.cross_entropy)
    expected = anyio.run(find, on_cpu)
    there = TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=DeviceCB(DEVICE))
    drawn = torch.standin.get_rng_state()  # type: ignore[attr-defined]
    finder = anyio.run(find, there)
    assert (finder.lrs, finder.losses) == (expected.lrs, expected.losses)
    assert torch.equal(weights(there.model), weights(make_cnn()))
    assert torch.equal(torch.standin.get_rng_state(), drawn)  # type: ignore[attr-defined]


def test_validating_waits_once(digits: Digits, make_cnn: MakeModel) -> None:
    expected = anyio.run(TrainLearner(make_cnn(), loaders(digits), F.cross_entropy).validate)
    there = TrainLearner(make_cnn(), loaders(digits, to_standin), F.cross_entropy)
    there.model.to(DEVICE)
    with counted(waits) as found:
        assert anyio.run(there.validate) == expected
    assert found == {"MeanLoss.item": 1}


def test_the_best_checkpoint_is_kept_by_a_number_that_is_there_already(
    digits: Digits, make_cnn: MakeModel, tmp_path: Path
) -> None:
    checkpoints = CheckpointCB(tmp_path, keep_best=("loss", "min"))
    cbs = [MetricsCB(), checkpoints, DeviceCB(DEVICE)]
    with counted(waits) as found:
        TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=cbs).run(N_EPOCHS)
    assert checkpoints.best is not None
    assert found == {"MeanLoss.item": 2 * N_EPOCHS, "Snapshot.wait": N_EPOCHS}


def test_predictions_are_those_of_the_cpu_with_one_wait_per_batch(
    digits: Digits, make_cnn: MakeModel
) -> None:
    async def predict(learner: TrainLearner) -> Any:
        return await learner.get_preds(with_targets=True)

    expected = anyio.run(predict, TrainLearner(make_cnn(), loaders(digits)))
    there = TrainLearner(make_cnn(), loaders(digits, to_standin))
    there.model.to(DEVICE)
    with counted(waits) as found:
        preds, targets = anyio.run(predict, there)
    assert torch.equal(preds, expected[0])
    assert torch.equal(targets, expected[1])
    assert found.total() == 2 * N_VALID  # the predictions, and the targets
    assert not any(name.startswith("host") for name in found)


def test_a_device_for_which_moving_a_model_makes_new_parameters(
    digits: Digits, make_cnn: MakeModel
) -> None:
    torch.__future__.set_swap_module_params_on_conversion(False)  # torch's default
    try:
        learner = TrainLearner(make_cnn(), loaders(digits), F.cross_entropy, cbs=DeviceCB(DEVICE))
        with pytest.raises(RuntimeError, match=r"has replaced 8 parameters .*move the model"):
            learner.run(N_EPOCHS)
        moved = TrainLearner(make_cnn().to(DEVICE), loaders(digits), F.cross_entropy)
        moved.add_cbs(DeviceCB(DEVICE))  # nothing is left for it to move
        moved.run(N_EPOCHS)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(True)
    assert torch.equal(weights(moved.model), plain(make_cnn(), digits))

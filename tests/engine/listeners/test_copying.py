"""copy.deepcopy(learner): a second learner that shares nothing with the first."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import pytest
import torch
from eventrain.callbacks import (
    CheckpointCB,
    EarlyStoppingCB,
    GradientAccumulationCB,
    GradientClippingCB,
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
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from eventrain.events import AfterBatch, BeforeBatch, BeforeFit, Bus, Callback, CleanupEpoch
from torch import nn, optim
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MeanSquaredError

Backend = dict[str, Any]


def shuffled() -> DataLoaders:
    """Of data that is shuffled and dropped out of by one generator, its own."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 3, generator=generator)
    data = TensorDataset(x, x.sum(1, keepdim=True))
    return DataLoaders(DataLoader(data, 4, shuffle=True, generator=generator), DataLoader(data, 8))


def make(cls: type[TrainLearner] = TrainLearner, *cbs: Callback, **kwargs: Any) -> TrainLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    return cls(model, shuffled(), cbs=cbs, **{"lr": 0.05, **kwargs})


def state(learner: TrainLearner) -> list[torch.Tensor]:
    return [value.clone() for value in learner.model.state_dict().values()]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def momentum(parameters: Any, lr: float) -> optim.Optimizer:
    return optim.SGD(parameters, lr, momentum=0.9)


@pytest.mark.parametrize("cls", [TrainLearner, MomentumLearner])
@pytest.mark.parametrize("opt_func", [momentum, optim.AdamW, None])
def test_a_copy_trains_on_as_the_original_would_have(
    cls: type[TrainLearner], opt_func: Any, backend: Backend
) -> None:
    """To the bit: weights, buffers, moments of a kept optimizer, gradients, order of the data."""

    def begun() -> TrainLearner:
        learner = make(cls, MetricsCB(mse=MeanSquaredError()), GradientClippingCB(0.5))
        learner.opt = optim.Adam(learner.model.parameters(), 0.05)
        learner.opt_func = opt_func
        learner.run(2, **backend)
        return learner

    alone = begun()
    alone.run(2, **backend)
    original = begun()
    clone = copy.deepcopy(original)
    before = state(original)
    result = clone.run(2, **backend)
    assert same(state(clone), state(alone))
    assert same(state(original), before)
    assert clone.metrics.history == alone.metrics.history != original.metrics.history
    assert result.history == alone.result.history  # type: ignore[union-attr]
    original.run(2, **backend)
    assert same(state(original), state(alone))
    assert original.metrics.history == alone.metrics.history


def test_nothing_that_can_be_changed_is_shared() -> None:
    learner = make(
        TrainLearner, MetricsCB(), SchedulerCB(lambda opt: optim.lr_scheduler.StepLR(opt, 1))
    )
    learner.run(1)
    clone = copy.deepcopy(learner)
    assert clone.bus is not learner.bus
    assert [type(cb) for cb in clone.cbs] == [type(cb) for cb in learner.cbs]
    assert not any(a is b for a, b in zip(clone.cbs, learner.cbs, strict=True))
    assert clone.metrics is clone.cbs[0]
    parameters = {id(p) for group in clone.opt.param_groups for p in group["params"]}
    assert parameters == {id(p) for p in clone.model.parameters()}
    assert (clone.batch, clone.preds, clone.loss) == (None, None, None)
    assert clone.result == learner.result
    assert clone.dls.train is not learner.dls.train


def test_data_can_be_shared_by_the_memo() -> None:
    learner = make()
    clone = copy.deepcopy(learner, {id(learner.dls): learner.dls})
    assert clone.dls is learner.dls
    assert clone.model is not learner.model


class Own(TrainLearner):
    """A learner of the user's, with a second network and a receiver of its own."""

    __slots__ = ("teacher",)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.teacher = self.model[0]
        self.counts: list[int] = []
        self.subscribe(AfterBatch, self.count)

    def count(self, event: AfterBatch) -> None:
        self.counts.append(event.iter)


def test_the_receivers_of_a_learners_own_come_along_and_are_its_own() -> None:
    learner = make(Own)
    clone = copy.deepcopy(learner)
    assert isinstance(clone, Own)
    assert clone.teacher is clone.model[0] is not learner.teacher
    clone.run(1, valid=False)
    assert (clone.counts, learner.counts) == ([0, 1, 2, 3, 4, 5], [])


def test_receivers_keep_their_order_among_the_callbacks_and_their_filters() -> None:
    said: list[str] = []

    class Says(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def before_batch(self, event: BeforeBatch) -> None:
            said.append(self.name)

    learner = make(TrainLearner, Says("first"))
    learner.on(BeforeBatch)(lambda event: said.append("second"))
    learner.add_cbs(Says("third"))
    learner.on(BeforeBatch, order=-1)(lambda event: said.append("zeroth"))
    learner.on(BeforeBatch, every=3)(lambda event: said.append("every third"))
    learner.on(BeforeBatch, once=True)(lambda event: said.append("once"))
    learner.on(BeforeBatch, where=lambda event: event.iter == 5)(lambda event: said.append("last"))
    clone = copy.deepcopy(learner)
    learner.run(1, valid=False)
    expected, said[:] = list(said), []
    clone.run(1, valid=False)
    assert said == expected
    assert said[:5] == ["zeroth", "first", "second", "third", "once"]
    assert said.count("every third") == 2


def test_observers_come_along_and_streams_do_not() -> None:
    learner = make()
    seen: list[Any] = []
    learner.observe(lambda event: seen.append(event.learner), CleanupEpoch)
    stream = learner.events(BeforeBatch).open()
    clone = copy.deepcopy(learner)
    assert len(clone.streams) == 1
    clone.run(1, valid=False)
    assert seen == [clone]
    assert stream.emitted == 0


def test_learners_copied_together_share_a_bus_as_before() -> None:
    bus = Bus()
    one, two = copy.deepcopy([make(bus=bus), make(bus=bus)])
    assert one.bus is two.bus is not bus


def test_copies_are_not_kept_alive() -> None:
    learner = make(TrainLearner, MetricsCB())
    alive = weakref.ref(copy.deepcopy(learner))
    gc.collect()
    assert alive() is None


class KeepCB(RecordCB):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[Any] = []

    def write(self, record: dict[str, Any]) -> None:
        self.records.append(record)


OURS: dict[str, Callable[[Any], Callback]] = {
    "metrics": lambda folder: MetricsCB(mse=MeanSquaredError()),
    "summary": lambda folder: SummaryCB(io.StringIO()),
    "early stopping": lambda folder: EarlyStoppingCB("loss"),
    "accumulation": lambda folder: GradientAccumulationCB(2),
    "mixed": lambda folder: MixedTrainingCB("bf16"),
    "scheduler": lambda folder: SchedulerCB(lambda opt: optim.lr_scheduler.StepLR(opt, 1)),
    "records": lambda folder: KeepCB(),
    "log": lambda folder: StructlogCB(),
    "log of a file": lambda folder: StructlogCB(format="json", file=opened(folder)),
    "log of a console": lambda folder: StructlogCB(format="console"),
    "progress": lambda folder: ProgressCB(),
    "curve": lambda folder: LossCurveCB(),
    "prometheus": lambda folder: PrometheusCB(registry()),
    "telemetry": lambda folder: OpenTelemetryCB(tracer_provider=provider()),
    "tensorboard": lambda folder: TensorBoardCB(folder / "tb"),
}


def opened(folder: Path) -> TextIO:
    folder.mkdir(exist_ok=True)
    return (folder / "log").open("w")


def registry() -> Any:
    from prometheus_client import CollectorRegistry

    return CollectorRegistry()


def provider() -> Any:
    from opentelemetry.sdk.trace import TracerProvider

    return TracerProvider()


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.parametrize("name", OURS)
def test_every_callback_can_be_copied_before_and_after_a_fit(name: str, tmp_path: Any) -> None:
    learner = make(TrainLearner, MetricsCB(), OURS[name](tmp_path))
    alone = make(TrainLearner, MetricsCB(), OURS[name](tmp_path / "alone"))
    alone.run(1)
    first = copy.deepcopy(learner)
    first.run(1)
    assert same(state(first), state(alone))
    second = copy.deepcopy(first)
    for each in (second, first):
        result = each.run(1)
        assert (result.status, dict(result.dropped)) == ("completed", {})
    assert same(state(first), state(second))


# ------------------------------------------------------------------------------ what is refused


def test_a_learner_is_not_copied_while_it_fits() -> None:
    learner = make()
    learner.on(BeforeFit)(lambda event: copy.deepcopy(event.learner) and None)
    with pytest.raises(RuntimeError, match=r"is fitting .*: copy it before its fit or after it"):
        learner.run(1)


@pytest.mark.parametrize("how", [pickle.dumps, copy.copy])
def test_pickle_and_shallow_copies_are_refused_with_what_to_do_instead(how: Any) -> None:
    with pytest.raises(TypeError, match=r"use copy.deepcopy.*save its state with CheckpointCB"):
        how(make())
    with pytest.raises(TypeError, match=r"make a new one, or copy.deepcopy\(learner\)"):
        how(Bus())


def test_what_cannot_be_copied_is_named_with_the_way_out() -> None:
    class Held(Callback):
        def __init__(self) -> None:
            self.generator = (i for i in range(3))

    with pytest.raises(TypeError, match="cannot pickle") as raised:
        copy.deepcopy(make(TrainLearner, Held()))
    assert "Held was copied with its learner: give it a __deepcopy__" in raised.value.__notes__[0]
    learner = make()
    learner.dls = DataLoaders(batch for batch in [1])
    with pytest.raises(TypeError, match="cannot pickle") as raised:
        copy.deepcopy(learner)
    assert "{id(learner.dls): learner.dls}" in raised.value.__notes__[0]


def test_two_learners_do_not_save_into_one_folder(tmp_path: Path) -> None:
    learner = make(TrainLearner, CheckpointCB(tmp_path))
    with pytest.raises(TypeError, match="two learners cannot save into the same folder"):
        copy.deepcopy(learner)


def test_a_plain_learner_can_be_copied() -> None:
    assert isinstance(copy.deepcopy(Learner(nn.Linear(3, 1))), Learner)

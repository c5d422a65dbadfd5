"""`lr_find` puts everything back as the object that it was, each part on its own."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.engine.checkpoint.preserve import preserved
from eventrain.events import AfterBatch, AfterStep, BeforeFit, Callback, CleanupFit
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset

SEQUENCES = [(torch.randn(4, 3, 1), torch.randn(4, 3, 1)) for _ in range(3)]


class Causal(nn.Module):
    """Keeps a mask for the longest sequence so far, as attention layers do."""

    def __init__(self, at_first: bool, persistent: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.persistent = persistent
        if at_first:
            self.register_buffer("mask", torch.ones(1, 1), persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        if not hasattr(self, "mask") or n > len(self.mask):
            self.register_buffer("mask", torch.ones(n, n).tril(), self.persistent)
        return self.mask[:n, :n] @ self.linear(x)


@pytest.mark.parametrize("persistent", [True, False])
async def test_a_buffer_that_grew_is_the_small_one_again(persistent: bool) -> None:
    model = Causal(True, persistent)
    mask = model.mask
    await TrainLearner(model, DataLoaders(list(SEQUENCES))).lr_find()
    assert model.mask is mask
    assert mask.tolist() == [[1.0]]
    assert ("mask" in model.state_dict()) == persistent


@pytest.mark.parametrize("persistent", [True, False])
async def test_a_new_buffer_is_gone(persistent: bool) -> None:
    model = Causal(False, persistent)
    learner = TrainLearner(model, DataLoaders(list(SEQUENCES)), cbs=MetricsCB())
    await learner.lr_find()
    assert list(model._buffers) == []
    assert list(model.state_dict()) == ["linear.weight", "linear.bias"]
    assert learner.cbs[0].history == []
    assert learner.opt is None


async def test_a_lazy_module_is_lazy_again_and_trains_as_if_new() -> None:
    def make() -> TrainLearner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d(), nn.Flatten(), nn.Linear(6, 3))
        return TrainLearner(model, DataLoaders([(x, x[..., 0]) for x, _ in SEQUENCES]))

    learner, plain = make(), make()
    weight = learner.model[0].weight
    await learner.lr_find()
    assert type(learner.model[0]) is nn.LazyLinear
    assert learner.model[0].weight is weight
    assert torch.nn.parameter.is_lazy(weight)
    torch.manual_seed(1)
    await learner.fit(2, valid=False)
    torch.manual_seed(1)
    await plain.fit(2, valid=False)
    assert learner.model[0].weight is weight
    for a, b in zip(learner.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Replacing(Callback):
    """Replaces a parameter, a submodule, a buffer, and the groups of the optimizer."""

    def after_batch(self, event: AfterBatch) -> None:
        model: Any = event.learner.model
        model[0].weight = nn.Parameter(torch.zeros(5, 5))
        model[0].bias.data = torch.zeros(7)
        model[1].running_mean = torch.zeros(9)
        model[1].running_var.resize_(11)
        model[2] = nn.Linear(1, 1)
        model.append(nn.Linear(1, 1))
        model[0].requires_grad_(True)
        event.learner.stop()


async def test_what_was_replaced_is_the_object_that_it_was() -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1), nn.Flatten(0))
    opt = torch.optim.Adam(model.parameters(), torch.tensor(0.1))
    learner = TrainLearner(model, DataLoaders([(torch.ones(4, 1), torch.ones(4))]), opt_func=None)
    learner.opt = opt
    await learner.fit(1, valid=False)
    objects = [*model.modules(), *model.parameters(), *model.buffers()]
    values = [value.detach().clone() for value in (*model.parameters(), *model.buffers())]
    gradients = [(p, p.grad) for p in model.parameters()]
    groups, state = opt.param_groups, opt.state
    group, rate, numbers = groups[0], groups[0]["lr"], copy.deepcopy(opt.state_dict())

    @learner.on(AfterStep)
    def change(event: AfterStep) -> None:
        rate.fill_(9.0)
        groups[0]["betas"] = (0.0, 0.0)

    await learner_with(learner, Replacing()).lr_find()
    assert all(
        a is b
        for a, b in zip(
            [*model.modules(), *model.parameters(), *model.buffers()], objects, strict=True
        )
    )
    now = [*model.parameters(), *model.buffers()]
    assert all(torch.equal(a, b) for a, b in zip(now, values, strict=True))
    assert [p.grad for p, _ in gradients] == [gradient for _, gradient in gradients]
    assert learner.opt is opt
    assert opt.state is state
    assert opt.param_groups is groups
    assert groups[0] is group
    assert group["lr"] is rate
    assert str(opt.state_dict()) == str(numbers)


def learner_with(learner: TrainLearner, cb: Callback) -> TrainLearner:
    learner.add_cbs(cb)
    return learner


class Broken(Callback):
    """Cannot load what it has saved."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise ValueError("not again")


@pytest.mark.parametrize("fails", [True, False])
async def test_a_part_that_cannot_be_put_back_does_not_keep_the_others_from_it(
    fails: bool,
) -> None:
    metrics = MetricsCB()
    model = nn.Linear(1, 1)
    before = [p.detach().clone() for p in model.parameters()]
    learner = TrainLearner(model, DataLoaders(list(SEQUENCES)), cbs=[Broken(), metrics])
    if fails:
        learner.subscribe(CleanupFit, lambda event: 1 / 0)
    random = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError if fails else ValueError) as raised:
        await learner.lr_find()
    told = "raised when Broken was put back as it was before"
    assert any(told in note for note in raised.value.__notes__)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert metrics.history == []
    assert learner.opt is None
    assert torch.equal(torch.get_rng_state(), random)


class Scheduled(Callback):
    """Has a state only when its first fit has begun."""

    def before_fit(self, event: BeforeFit) -> None:
        self.schedule = torch.optim.lr_scheduler.StepLR(event.learner.opt, 1)

    def state_dict(self) -> dict[str, Any]:
        return self.schedule.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.schedule.load_state_dict(state)


async def test_a_callback_without_a_state_before_its_first_fit_is_as_it_was() -> None:
    learner = TrainLearner(nn.Linear(1, 1), DataLoaders(list(SEQUENCES)), cbs=Scheduled())
    await learner.lr_find(max_epochs=1)
    assert vars(learner.cbs[0]) == {}


class LateEma(Callback):
    """Makes its average with the first step."""

    average: AveragedModel | None = None

    def after_step(self, event: AfterStep) -> None:
        self.average = self.average or AveragedModel(event.learner.model)


class Recurrent(TrainLearner):
    """Keeps hidden states, which there are none of before the first batch."""

    hidden: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: list[torch.Tensor] = []
        self.scale = torch.ones(2)

    def predict(self) -> None:
        super().predict()
        self.scale *= 2
        self.hidden = self.preds.detach()
        self.kept.append(self.hidden)


async def test_hidden_states_and_late_averages_do_not_stay() -> None:
    ema = LateEma()
    learner = Recurrent(nn.Linear(1, 1), DataLoaders(list(SEQUENCES)), cbs=ema)
    kept, scale = learner.kept, learner.scale
    await learner.lr_find(max_epochs=1)
    assert ema.average is None
    assert learner.hidden is None
    assert learner.kept is kept
    assert kept == []
    assert learner.scale is scale
    assert scale.tolist() == [1.0, 1.0]


def test_a_model_that_was_moved_stays_there() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    with preserved(TrainLearner(model, DataLoaders(list(SEQUENCES)))):
        model.to("meta")
        model[1].register_buffer("another", torch.ones(1))
    devices = {t.device.type for t in (*model.parameters(), *model.buffers())}
    assert devices == {"meta"}


async def test_tensors_that_cannot_be_written_to_as_usual_do_not_stop_it() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("expanded", torch.ones(1).expand(5))
    model.register_buffer("changed", torch.ones(1).expand(5), persistent=False)
    with torch.inference_mode():
        model.register_buffer("inference", torch.ones(3))

    class Changing(Callback):
        def after_step(self, event: AfterStep) -> None:
            model.changed[:1] = 3.0

    learner = TrainLearner(model, DataLoaders(list(SEQUENCES)), cbs=Changing())
    await learner.lr_find(max_epochs=1)
    assert model.changed.tolist() == model.expanded.tolist() == [1.0] * 5


class Box:
    """An object of the user's."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Slotted:
    __slots__ = ("later", "value")

    def __init__(self, value: Any) -> None:
        self.value = value


class Rebinding(TrainLearner):
    """Binds new tensors where it holds others."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.last = deque([torch.zeros(1)], maxlen=1)
        self.box, self.slotted = Box(torch.zeros(1)), Slotted(torch.zeros(1))
        self.outer = {"boxes": [Box({"a": [torch.zeros(1)]})]}
        self.pair = ([torch.zeros(1)], 1)
        closed = torch.zeros(1)

        def count() -> torch.Tensor:
            nonlocal closed
            closed = closed + 1
            return closed

        self.count = count

    def held(self) -> list[torch.Tensor]:
        inner = self.outer["boxes"][0].value["a"]
        return [self.last[0], self.box.value, self.slotted.value, inner[0], self.pair[0][0]]

    def predict(self) -> None:
        super().predict()
        one = torch.ones(1)
        self.last.append(self.last[0] + 1)
        self.box.value = self.slotted.value = self.slotted.later = one
        self.outer["boxes"][0].value["a"][:] = [one, one]
        self.outer["boxes"].append(Box(one))
        self.pair[0][0] = one
        self.count()


async def test_tensors_bound_anew_in_what_the_learner_holds_do_not_stay() -> None:
    learner = Rebinding(nn.Linear(1, 1), DataLoaders(list(SEQUENCES)))
    objects = [learner.last, learner.box, learner.slotted, learner.outer, learner.pair]
    tensors = learner.held()
    await learner.lr_find(max_epochs=1)
    now = [learner.last, learner.box, learner.slotted, learner.outer, learner.pair]
    assert all(a is b for a, b in zip(now, objects, strict=True))
    assert all(a is b for a, b in zip(learner.held(), tensors, strict=True))
    assert [tensor.tolist() for tensor in tensors] == [[0.0]] * 5
    assert not hasattr(learner.slotted, "later")
    assert len(learner.outer["boxes"]) == len(learner.outer["boxes"][0].value["a"]) == 1
    assert learner.count().tolist() == [1.0]


class Drawing(Dataset[Any]):
    """Draws from a generator of its own."""

    def __init__(self) -> None:
        self.rng = torch.Generator().manual_seed(0)

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Any:
        return torch.randn(1, generator=self.rng), torch.zeros(1)


async def test_the_generator_of_a_dataset_is_put_back() -> None:
    data = Drawing()
    before = data.rng.get_state()
    await TrainLearner(nn.Linear(1, 1), DataLoaders(DataLoader(data))).lr_find(max_epochs=1)
    assert torch.equal(data.rng.get_state(), before)

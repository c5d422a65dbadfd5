"""G17: whatever trains or draws is saved, resumed, and put back by `lr_find`."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from eventrain.callbacks import CheckpointCB, GradientAccumulationCB, MetricsCB
from eventrain.engine import Checkpoint, DataLoaders, MomentumLearner, TrainLearner
from eventrain.engine.checkpoint.search import parts_of
from eventrain.events import AfterBatch, AfterStep, BeforeBatch, BeforeFit, Callback
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

DATA = torch.Generator().manual_seed(0)
BATCHES = [(torch.randn(4, 3, generator=DATA), torch.randn(4, 1, generator=DATA)) for _ in range(5)]


def dls() -> DataLoaders:
    return DataLoaders(list(BATCHES))


class Weighted(nn.Module):
    """A loss that learns its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.zeros(()))

    def forward(self, preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(preds, targets) * torch.exp(-self.s) + self.s


class Gan(TrainLearner):
    """A second network, with an optimizer and a schedule; it draws noise of its own."""

    def __init__(self, cbs: Any = None) -> None:
        super().__init__(nn.Linear(3, 2), dls(), lr=0.05, cbs=cbs)
        self.critic = nn.Linear(2, 1)
        self.opt_d = torch.optim.Adam(self.critic.parameters(), 0.05)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.opt_d, 2)
        self.noise = torch.Generator().manual_seed(int(torch.randint(1000, ())))

    def get_loss(self) -> None:
        self.loss = self.critic(self.preds + torch.randn(4, 2, generator=self.noise)).mean()

    def step(self) -> None:
        super().step()
        self.opt_d.zero_grad()
        loss = -self.critic(self.preds.detach()).mean() + self.critic.weight.pow(2).sum()
        loss.backward()
        self.opt_d.step()
        self.schedule.step()


class Shared(TrainLearner):
    """The optimizer of the learner has what hangs elsewhere, and on nothing at all."""

    def __init__(self, cbs: Any = None) -> None:
        weighted, self.temperature = Weighted(), torch.zeros((), requires_grad=True)
        hidden = nn.Parameter(torch.ones(()))

        def loss(preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return weighted(preds, targets * hidden) + (self.temperature - 1) ** 2

        def opt(parameters: Any, lr: float) -> torch.optim.Optimizer:
            others = [*weighted.parameters(), self.temperature, hidden]
            return torch.optim.SGD([*parameters, *others], lr, momentum=0.9)

        super().__init__(nn.Linear(3, 1), dls(), loss, 0.05, cbs, opt)
        self.hidden_parts = lambda: [weighted.s, self.temperature, hidden]


class Ema(Callback):
    """Averages the weights, without a `state_dict` of its own; in a list, and by an object."""

    def before_fit(self, event: BeforeFit) -> None:
        self.averages = [AveragedModel(event.learner.model)]
        seeded = numpy.random.default_rng(random.getrandbits(32))
        self.rngs = {"python": random.Random(random.getrandbits(32)), "numpy": seeded}

    def after_step(self, event: AfterStep) -> None:
        for average in self.averages:
            average.update_parameters(event.learner.model)
        with torch.no_grad():
            event.learner.model.bias.add_(self.rngs["python"].random() * 1e-3)
            event.learner.model.bias.add_(self.rngs["numpy"].random() * 1e-3)


def with_loss(cbs: Any = None) -> TrainLearner:
    loss = Weighted()
    return MomentumLearner(
        nn.Linear(3, 1), dls(), loss, 0.1, cbs, lambda p, lr: torch.optim.SGD([*p, loss.s], lr)
    )


def with_method(cbs: Any = None) -> TrainLearner:
    loss = Weighted()
    return TrainLearner(
        nn.Linear(3, 1), dls(), loss.forward, 0.1, cbs, lambda p, lr: torch.optim.SGD([loss.s], lr)
    )


def with_ema(cbs: Any = None) -> TrainLearner:
    learner = TrainLearner(nn.Linear(3, 1), dls(), lr=0.1)
    learner.add_cbs([Ema(), *([] if cbs is None else [cbs])])
    return learner


class AveragingMetrics(MetricsCB):
    """Adds an average to a callback that has a state of its own."""

    def before_fit(self, event: BeforeFit) -> None:
        super().before_fit(event)
        self.averages = [AveragedModel(event.learner.model)]

    def after_step(self, event: AfterStep) -> None:
        self.averages[0].update_parameters(event.learner.model)


def with_subclass(cbs: Any = None) -> TrainLearner:
    learner = TrainLearner(nn.Linear(3, 1), dls(), lr=0.1, cbs=AveragingMetrics())
    learner.add_cbs(cbs)
    return learner


class Holder:
    """An object of the user's."""

    def __init__(self) -> None:
        self.net = nn.Linear(1, 1)
        self.opt = torch.optim.SGD(self.net.parameters(), 0.1, momentum=0.9)


class Held(TrainLearner):
    def __init__(self, cbs: Any = None) -> None:
        super().__init__(nn.Linear(3, 1), dls(), lr=0.1, cbs=cbs)
        self.agents = {"a": Holder()}

    def step(self) -> None:
        agent = self.agents["a"]
        super().step()
        agent.opt.zero_grad()
        agent.net(self.preds.detach()).pow(2).mean().backward()
        agent.opt.step()


class Together:
    """Several optimizers in one, without a state of its own."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for opt in self.optimizers for group in opt.param_groups]

    def step(self) -> None:
        for opt in self.optimizers:
            opt.step()

    def zero_grad(self) -> None:
        for opt in self.optimizers:
            opt.zero_grad()


def with_two_optimizers(cbs: Any = None) -> TrainLearner:
    def make(parameters: Any, lr: float) -> Together:
        weight, *others = parameters
        return Together(torch.optim.Adam([weight], lr), torch.optim.SGD(others, lr, momentum=0.9))

    return TrainLearner(nn.Linear(3, 1), dls(), lr=0.1, cbs=cbs, opt_func=make)


MAKERS: dict[str, Callable[..., TrainLearner]] = {
    "loss": with_loss,
    "method of a loss": with_method,
    "GAN": Gan,
    "parameters of the optimizer alone": Shared,
    "average and generators of a callback": with_ema,
    "average added to a callback of eventrain": with_subclass,
    "object of the user": Held,
    "two optimizers in one": with_two_optimizers,
}


def state_of(learner: TrainLearner) -> list[Any]:
    """Everything that trains, by hand."""
    tensors = [*learner.model.parameters()]
    for name in ("critic", "loss_func"):
        module = getattr(learner, name, None)
        module = getattr(module, "__self__", module)
        tensors += module.parameters() if isinstance(module, nn.Module) else []
    tensors += learner.hidden_parts() if hasattr(learner, "hidden_parts") else []
    tensors += learner.agents["a"].net.parameters() if hasattr(learner, "agents") else []
    for cb in learner.cbs:
        for average in getattr(cb, "averages", []):
            tensors += [*average.parameters(), average.n_averaged]
    numbers = [[t.detach().tolist(), None if t.grad is None else t.grad.tolist()] for t in tensors]
    if isinstance(learner, Gan):
        numbers += [learner.schedule.state_dict(), learner.noise.get_state().tolist()]
        numbers += [[group["lr"] for group in learner.opt_d.param_groups]]
    return numbers


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("at", [2, 7])
def test_a_resumed_run_is_the_run_without_an_interruption(
    name: str, at: int, tmp_path: Path
) -> None:
    make = MAKERS[name]
    seed(0)
    whole = make()
    whole.run(3, valid=False)

    seed(0)
    first = make(CheckpointCB(tmp_path, every_batches=1))
    first.subscribe(AfterStep, lambda e: e.learner.stop() if e.learner.done.steps == at else None)
    first.run(3, valid=False)
    seed(1)  # other weights, other generators
    resumed = make(CheckpointCB(tmp_path))
    assert state_of(resumed) != state_of(whole)
    resumed.run(3, valid=False, resume="last")
    assert resumed.result.resumed_from is not None
    assert state_of(resumed) == state_of(whole)


def seed(n: int) -> None:
    torch.manual_seed(n)
    random.seed(n)
    numpy.random.seed(n)


@pytest.mark.parametrize("name", [name for name in MAKERS if "callback" not in name])
async def test_lr_find_puts_everything_back(name: str) -> None:
    learner = MAKERS[name]()
    await learner.fit(1, valid=False)
    before = copy.deepcopy(state_of(learner))
    parts = {part.path: part.value for part in parts_of(learner)}
    await learner.lr_find(max_epochs=3)
    assert state_of(learner) == before
    assert {part.path: part.value for part in parts_of(learner)} == parts


# --------------------------------------------------------------------------------- saved once


class Penalized(nn.Module):
    """A loss that contains the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(preds, targets) + self.weight * self.model.weight.pow(2).sum()


def test_an_object_of_two_names_is_saved_once(tmp_path: Path) -> None:
    def make(cbs: Any = None) -> TrainLearner:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
        learner = TrainLearner(model, dls(), Penalized(model[0]), 0.1, cbs)
        learner.net, learner.head, learner.nets = model, model[1], [model]
        return learner

    make(CheckpointCB(tmp_path)).run(1, valid=False)
    state = Checkpoint.load(tmp_path).state
    assert list(state["attributes"]) == ["learner"]
    assert list(state["attributes"]["learner"]) == ["loss_func"]
    assert list(state["attributes"]["learner"]["loss_func"]["state"]) == ["weight"]
    assert list(state["model"]) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert make().run(2, valid=False, resume=tmp_path).status == "completed"


class Watching(Callback):
    """Holds what others have; and what only looks like something with a state."""

    def before_fit(self, event: BeforeFit) -> None:
        learner: Any = event.learner
        self.model, self.opt, self.learner = learner.model, learner.opt, learner
        self.metrics, self.logger = learner.metrics, Mock()
        self.spec = Mock(spec=nn.Linear(1, 1))


def test_what_others_save_and_what_only_looks_like_it_is_not_saved(tmp_path: Path) -> None:
    cbs = [MetricsCB(), Watching(), CheckpointCB(tmp_path)]
    with capture_logs() as logs:
        TrainLearner(nn.Linear(3, 1), dls(), cbs=cbs).run(1, valid=False)
    assert Checkpoint.load(tmp_path).state["attributes"] == {}
    assert logs == []


def test_a_learner_without_more_has_a_state_of_the_model_alone() -> None:
    learner = TrainLearner(nn.Linear(3, 1), dls(), cbs=[MetricsCB(), GradientAccumulationCB(2)])
    learner.run(1, valid=False)
    assert [str(part) for part in parts_of(learner)] == ["the model", "the optimizer"]


# --------------------------------------------------------------- what is not saved is said


class Stateful(nn.Module):
    """Keeps a hidden state that is not a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last = self.cell(x).detach()
        return self.cell(x)


class Hidden(TrainLearner):
    """Carries a hidden state from batch to batch, with a frozen teacher, and constants."""

    def __init__(self, model: nn.Module, **kwargs: Any) -> None:
        super().__init__(model, dls(), **kwargs)
        self.hidden: list[torch.Tensor] = []
        self.teacher = nn.Linear(3, 1).requires_grad_(False)
        self.flat = [p.data for p in model.parameters()]

    def predict(self) -> None:
        super().predict()
        self.inputs = self.batch[0]
        self.hidden = [self.preds.detach().mean()]
        self.graph = self.preds * 2


class HandMade(Callback):
    """Hand-made averages, from the beginning."""

    def before_fit(self, event: BeforeFit) -> None:
        self.averages = {
            name: p.detach().clone() for name, p in event.learner.model.named_parameters()
        }


class Speaking(HandMade):
    """The same with a state of its own."""

    def state_dict(self) -> dict[str, Any]:
        return self.averages

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.averages = state


def test_tensors_outside_of_modules_are_told_of_before_the_first_save(tmp_path: Path) -> None:
    lines = []
    with capture_logs() as logs:
        learner = Hidden(Stateful(), cbs=[HandMade(), Speaking()])
        cb = CheckpointCB(tmp_path, every_batches=1)
        learner.subscribe(AfterStep, lambda event: lines.append((len(logs), cb.last)))
        learner.run(2, valid=False, cbs=cb)
    told = [line for line in logs if line["event"] == "state_not_saved"]
    assert [line["found"] for line in told] == [
        ["HandMade.averages"],
        ["Hidden.hidden", "Stateful.last"],
    ]
    assert lines[0] == (1, None)  # the first before any work
    assert "register" in told[0]["hint"]
    assert "state_dict" in told[0]["hint"]


def test_an_optimizer_that_cannot_be_saved_is_an_error_before_any_work(tmp_path: Path) -> None:
    class Bare:
        def __init__(self, parameters: Any, lr: float) -> None:
            self.param_groups = [{"params": list(parameters), "lr": lr}]

        def step(self) -> None: ...

        def zero_grad(self) -> None: ...

    learner = TrainLearner(nn.Linear(3, 1), dls(), opt_func=Bare)
    with pytest.raises(TypeError, match=r"the optimizer is .*Bare.* give its class state_dict\(\)"):
        learner.run(1, valid=False, cbs=CheckpointCB(tmp_path))
    assert learner.result.batches == 0


def test_whether_gradients_are_pending_is_restored(tmp_path: Path) -> None:
    """In the middle of a group, they are of a step that is still to come."""

    def make() -> TrainLearner:
        cbs = [GradientAccumulationCB(4), CheckpointCB(tmp_path, every_batches=2)]
        return TrainLearner(nn.Linear(3, 1), dls(), lr=0.1, cbs=cbs)

    first = make()
    first.subscribe(AfterBatch, lambda event: event.learner.stop(graceful=True), once=True)
    first.run(1, valid=False)
    assert Checkpoint.load(tmp_path).state["gradients_pending"] is True
    second, pending = make(), []
    second.subscribe(BeforeBatch, lambda event: pending.append(event.learner.gradients_pending))
    second.run(1, valid=False, resume="last")
    assert pending == [True, True, True, False]

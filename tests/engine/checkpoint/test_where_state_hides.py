"""G17: a state is saved or told of wherever it is held; beside each, plain PyTorch by hand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from eventrain.callbacks import CheckpointCB
from eventrain.engine import DataLoaders, Prefetcher, TensorLoader, ThreadLoader, TrainLearner
from eventrain.events import AfterStep, BeforeFit, Callback
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

DATA = torch.Generator().manual_seed(0)
X, Y = torch.randn(8, 3, generator=DATA), torch.randn(8, 1, generator=DATA)
BATCHES = [(X[i : i + 2], Y[i : i + 2]) for i in range(0, 8, 2)]


class Program(NamedTuple):
    """A program as its user writes it, and the same by hand.

    Attributes:
        learner: not trained yet.
        by_hand: trains the same objects for three epochs, without the learner.
        tensors: what is trained.
    """

    learner: TrainLearner
    by_hand: Callable[[], None]
    tensors: list[torch.Tensor]


def train(
    model: nn.Module,
    batches: Iterable[Any] = BATCHES,
    loss_func: Callable[..., torch.Tensor] = F.mse_loss,
    after_step: Callable[[], object] = lambda: None,
    opt: torch.optim.Optimizer | None = None,
) -> None:
    opt = SGD(model.parameters(), 0.1) if opt is None else opt
    for _ in range(3):
        for x, y in batches:
            loss_func(model(x), y).backward()
            opt.step()
            opt.zero_grad()
            after_step()


def learner_of(model: nn.Module, batches: Any = BATCHES, *args: Any, **kwargs: Any) -> TrainLearner:
    return TrainLearner(model, DataLoaders(batches), *args, lr=0.1, **kwargs)


def number() -> int:
    """A seed that is another one in each run of a program."""
    return int(torch.randint(10_000, ()))


# ------------------------------------------------------------------------ what the loaders read


class Noisy(Dataset[Any]):
    """Draws from a generator of its own."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        return X[i] + self.draw(), Y[i]


class Shifted(nn.Module):
    """A transform with a generator of its own, as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = random.Random(number())

    def forward(self) -> float:
        return self.rng.random()


class Shuffled(Sampler[int]):
    """Shuffles with numpy."""

    def __init__(self) -> None:
        self.rng = numpy.random.default_rng(number())

    def __iter__(self) -> Any:
        return iter(self.rng.permutation(len(X)).tolist())

    def __len__(self) -> int:
        return len(X)


def of_loader(loader: Any) -> Program:
    model = nn.Linear(3, 1)
    return Program(learner_of(model, loader), lambda: train(model, loader), [*model.parameters()])


def dataset_with_torch() -> Program:
    rng = torch.Generator().manual_seed(number())
    return of_loader(DataLoader(Noisy(lambda: torch.randn((), generator=rng)), 2))  # type: ignore


def dataset_with_numpy() -> Program:
    return of_loader(DataLoader(Noisy(numpy.random.default_rng(number()).standard_normal), 2))


def dataset_with_workers() -> Program:
    rng = torch.Generator().manual_seed(number())
    data = Noisy(lambda: torch.randn((), generator=rng))  # type: ignore[arg-type, return-value]
    return of_loader(DataLoader(data, 2, num_workers=1, multiprocessing_context="fork"))


def transform_as_module() -> Program:
    return of_loader(DataLoader(Noisy(Shifted()), 2))


def sampler_with_numpy() -> Program:
    return of_loader(DataLoader(TensorDataset(X, Y), 2, sampler=Shuffled()))


def collate_with_closure() -> Program:
    rng = torch.Generator().manual_seed(number())

    def collate(samples: list[Any]) -> Any:
        x, y = map(torch.stack, zip(*samples, strict=True))
        return x + torch.randn(x.shape, generator=rng), y

    return of_loader(DataLoader(TensorDataset(X, Y), 2, collate_fn=collate))


def tensor_loader() -> Program:
    return of_loader(TensorLoader(X, Y, batch_size=2, sampler=Shuffled()))


def transform_of_a_tensor_loader() -> Program:
    rng = numpy.random.default_rng(number())
    return of_loader(TensorLoader(X, Y, batch_size=2, transform=lambda x: x + rng.random()))


def prefetcher() -> Program:
    return of_loader(Prefetcher(DataLoader(Noisy(Shifted()), 2)))


def threads() -> Program:
    return of_loader(ThreadLoader(TensorDataset(X, Y), 2, sampler=Shuffled(), read_ahead=1))


class Environment:
    """Yields no batches: the learner asks it for them; it learns a baseline."""

    def __init__(self) -> None:
        self.rng = numpy.random.default_rng(number())
        self.baseline = nn.Linear(3, 1)

    def step(self) -> Any:
        x = torch.from_numpy(self.rng.standard_normal((2, 3))).float()
        with torch.no_grad():
            self.baseline.bias += 0.1
        return x, self.baseline(x).detach()


class Playing(TrainLearner):
    def __init__(self, model: nn.Module, environment: Environment) -> None:
        super().__init__(model, DataLoaders([environment] * 4), lr=0.1)
        self.environment = environment

    def one_batch(self) -> None:
        self.batch = self.batch.step()
        super().one_batch()


class PlayingInPredict(Playing):
    """The batch stays the environment."""

    def one_batch(self) -> None:
        TrainLearner.one_batch(self)

    def predict(self) -> None:
        x, self.y = self.batch.step()
        self.preds = self.model(x)

    def get_loss(self) -> None:
        self.loss = F.mse_loss(self.preds, self.y)


def environments_as_batches() -> Program:
    return environments(PlayingInPredict)


def environments(cls: type[Playing] = Playing) -> Program:
    model, environment = nn.Linear(3, 1), Environment()

    def by_hand() -> None:
        for _ in range(3):
            train_once(model, environment)

    def train_once(model: nn.Module, environment: Environment) -> None:
        opt = SGD(model.parameters(), 0.1)
        for _ in range(4):
            x, y = environment.step()
            F.mse_loss(model(x), y).backward()
            opt.step()
            opt.zero_grad()

    tensors = [*model.parameters(), *environment.baseline.parameters()]
    return Program(cls(model, environment), by_hand, tensors)


# ------------------------------------------------------------- functions, objects and modules


def loss_with_closure() -> Program:
    model, scale = nn.Linear(3, 1), nn.Linear(1, 1)
    opt = SGD(scale.parameters(), 0.1, momentum=0.9)

    def loss_func(preds: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        opt.zero_grad()
        F.mse_loss(scale(preds.detach()), y).backward()
        opt.step()
        return F.mse_loss(scale(preds), y)

    learner = learner_of(model, BATCHES, loss_func)
    tensors = [*model.parameters(), *scale.parameters()]
    return Program(learner, lambda: train(model, BATCHES, loss_func), tensors)


def noise_of_a_lambda() -> Program:
    model, rng = nn.Linear(3, 1), numpy.random.default_rng(number())
    noisy = lambda preds, y: F.mse_loss(preds, y + rng.random())  # noqa: E731
    learner = learner_of(model, BATCHES, noisy)
    return Program(learner, lambda: train(model, BATCHES, noisy), [*model.parameters()])


CRITIC = nn.Linear(1, 1)


def critics_loss(preds: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        CRITIC.weight += 0.1
    return F.mse_loss(CRITIC(preds), y)


def global_of_a_function() -> Program:
    model = nn.Linear(3, 1)
    CRITIC.load_state_dict(nn.Linear(1, 1).state_dict())
    learner = learner_of(model, BATCHES, critics_loss)
    tensors = [*model.parameters(), *CRITIC.parameters()]
    return Program(learner, lambda: train(model, BATCHES, critics_loss), tensors)


class Ema:
    """Not a callback: its method is subscribed."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.average = model, AveragedModel(model)

    def update(self, event: Any = None) -> None:
        self.average.update_parameters(self.model)


def subscribed_method() -> Program:
    model = nn.Linear(3, 1)
    ema = Ema(model)
    learner = learner_of(model)
    learner.subscribe(AfterStep, ema.update)
    tensors = [*model.parameters(), *ema.average.parameters()]
    return Program(learner, lambda: train(model, after_step=ema.update), tensors)


def hook_with_closure() -> Program:
    model = nn.Linear(3, 1)
    average = nn.BatchNorm1d(3)
    model.register_forward_pre_hook(lambda module, inputs: (average(inputs[0]),))
    tensors = [*model.parameters(), *average.buffers()]
    return Program(learner_of(model), lambda: train(model), tensors)


class Dropout(nn.Module):
    """With a generator of its own, and a network that it hides in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.rng = torch.Generator().manual_seed(number())
        self.hidden = [nn.BatchNorm1d(3)]
        self.linear = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.hidden[0](x)
        return self.linear(x * torch.bernoulli(torch.full(x.shape, 0.5), generator=self.rng))


def generator_of_a_module() -> Program:
    model = Dropout()
    tensors = [*model.parameters(), *model.hidden[0].buffers()]
    return Program(learner_of(model), lambda: train(model), tensors)


class NoisySGD(SGD):
    """Adds what its `state_dict` does not know."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.rng = torch.Generator().manual_seed(number())

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(0.01 * torch.randn(p.shape, generator=self.rng))
        return super().step(closure)


def generator_of_an_optimizer() -> Program:
    model = nn.Linear(3, 1)
    learner = learner_of(model, BATCHES, opt_func=NoisySGD)

    def by_hand() -> None:
        train(model, opt=NoisySGD(model.parameters(), 0.1))

    return Program(learner, by_hand, [*model.parameters()])


class Second(Callback):
    """Trains a second learner's model beside."""

    def __init__(self) -> None:
        self.other = learner_of(nn.Linear(3, 1))

    def before_fit(self, event: BeforeFit) -> None:
        self.other.opt = SGD(self.other.model.parameters(), 0.1, momentum=0.9)

    def after_step(self, event: AfterStep) -> None:
        self.teach(event.learner.model)  # type: ignore[attr-defined]

    def teach(self, teacher: nn.Module) -> None:
        assert self.other.opt is not None
        F.mse_loss(self.other.model(X), teacher(X).detach()).backward()
        self.other.opt.step()
        self.other.opt.zero_grad()


def another_learner() -> Program:
    model, second = nn.Linear(3, 1), Second()

    def by_hand() -> None:
        second.other.opt = SGD(second.other.model.parameters(), 0.1, momentum=0.9)
        train(model, after_step=partial(second.teach, model))

    tensors = [*model.parameters(), *second.other.model.parameters()]
    return Program(learner_of(model, cbs=second), by_hand, tensors)


PROGRAMS = [
    *(dataset_with_torch, dataset_with_numpy, dataset_with_workers, transform_as_module),
    *(sampler_with_numpy, collate_with_closure, tensor_loader, transform_of_a_tensor_loader),
    *(threads, prefetcher, environments, environments_as_batches),
    *(loss_with_closure, noise_of_a_lambda, global_of_a_function, subscribed_method),
    *(hook_with_closure, generator_of_a_module, generator_of_an_optimizer, another_learner),
]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("at", [4, 6], ids=["after an epoch", "within an epoch"])
def test_a_resumed_run_is_the_run_by_hand(
    program: Callable[[], Program], at: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    _, by_hand, expected = program()
    by_hand()
    expected = [tensor.tolist() for tensor in expected]

    torch.manual_seed(0)
    first = program().learner
    cb = CheckpointCB(tmp_path, every_batches=1)
    stop = first.subscribe(
        AfterStep, lambda e: e.learner.stop(graceful=True) if e.steps == at else None
    )
    first.run(3, valid=False, cbs=cb)
    stop.close()
    torch.manual_seed(1)  # other weights, other generators
    resumed, _, tensors = program()
    assert [tensor.tolist() for tensor in tensors] != expected
    resumed.run(3, valid=False, cbs=CheckpointCB(tmp_path), resume="last")
    assert [tensor.tolist() for tensor in tensors] == expected


@pytest.mark.parametrize("program", [dataset_with_numpy, sampler_with_numpy, prefetcher])
@pytest.mark.parametrize("at", [3, 5, 6])
def test_an_epoch_of_some_batches_continues_a_pass_that_draws_from_its_own(
    program: Callable[[], Program], at: int, tmp_path: Path
) -> None:
    """Three passes of four batches by hand are four epochs of three batches."""
    torch.manual_seed(0)
    _, by_hand, expected = program()
    by_hand()
    torch.manual_seed(0)
    first = program().learner
    first.subscribe(AfterStep, lambda e: e.learner.stop(graceful=True) if e.steps == at else None)
    first.run(4, valid=False, epoch_length=3, cbs=CheckpointCB(tmp_path, every_batches=1))
    torch.manual_seed(1)
    resumed, _, tensors = program()
    resumed.run(4, valid=False, epoch_length=3, resume=tmp_path)
    assert [t.tolist() for t in tensors] == [t.tolist() for t in expected]


class Late(Dataset[Any]):
    """Makes its generator with the first sample."""

    rng: Any = None

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        if self.rng is None:
            self.rng = numpy.random.default_rng(0)
        return X[i] + self.rng.random(), Y[i]


@pytest.mark.parametrize("late", [True, False])
def test_a_generator_that_is_made_too_late_to_resume_is_told_of(late: bool, tmp_path: Path) -> None:
    def loader() -> Any:
        data = Late() if late else Noisy(numpy.random.default_rng(0).random)
        return DataLoader(data, 2)

    learner_of(nn.Linear(3, 1), loader()).run(1, valid=False, cbs=CheckpointCB(tmp_path))
    with capture_logs() as logs:
        learner_of(nn.Linear(3, 1), loader()).run(2, valid=False, resume=tmp_path)
    reasons = [line["reason"] for line in logs if line["event"] == "resume_may_not_be_exact"]
    assert len(reasons) == late
    assert all(reason.startswith("train.dataset.rng: a random generator") for reason in reasons)


def test_threads_that_draw_from_a_generator_of_the_dataset_are_told_of(tmp_path: Path) -> None:
    data = Noisy(numpy.random.default_rng(0).random)
    with capture_logs() as logs:
        learner_of(nn.Linear(3, 1), ThreadLoader(data, 2)).run(
            1, valid=False, cbs=CheckpointCB(tmp_path, every_batches=2)
        )
    reasons = [line["reason"] for line in logs if line["event"] == "resume_may_not_be_exact"]
    assert reasons == ["its threads draw from the dataset's generators in any order"]

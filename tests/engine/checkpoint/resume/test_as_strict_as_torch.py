"""What torch loads, and is of the same program, is resumed: nothing is judged more strictly."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import CheckpointCB, GradientAccumulationCB
from eventrain.engine import (
    CheckpointMismatchError,
    DataLoaders,
    MomentumLearner,
    TrainLearner,
)
from eventrain.engine.checkpoint.sparse import decode_sparse
from eventrain.events import BeforeBatch, Callback
from torch import nn

DATA = torch.Generator().manual_seed(0)
BATCHES = [
    (torch.randn(4, 40, generator=DATA), torch.randn(4, 1, generator=DATA)) for _ in range(3)
]


class Observed(nn.Linear):
    """Sizes its buffer with its data, and loads one of any size, as observers do."""

    def __init__(self) -> None:
        super().__init__(40, 1)
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.largest.resize_(x.shape[1]).copy_(x.amax(0))
        return super().forward(x)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        self.largest.resize_(state[prefix + "largest"].shape)
        super()._load_from_state_dict(state, prefix, *args)


class Factors(torch.optim.SGD):
    """A matrix for each row of a parameter, which is larger than the parameter."""

    def step(self, closure: Any = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["factor"] = state.get("factor", 0) + torch.eye(p.shape[-1])
        super().step()


class Named(torch.optim.SGD):
    """A state under a name."""

    def step(self, closure: Any = None) -> None:
        self.state["all"]["n"] = self.state["all"].get("n", 0) + 1
        super().step()


class Adapter(nn.Linear):
    """Its state is what it trains, by a hook."""

    def __init__(self) -> None:
        super().__init__(40, 1)
        torch.nn.init.zeros_(self.bias)
        self.bias.requires_grad_(False)
        self._register_state_dict_hook(without_bias)


def without_bias(module: nn.Module, state: Any, *_: Any) -> None:
    del state["bias"]


class Overriding(Adapter):
    """The same by a method; and `load_state_dict` without `strict`."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"only": self.weight}

    def load_state_dict(self, state: Any) -> None:
        with torch.no_grad():
            self.weight.copy_(state["only"])


class Counting(nn.Linear):
    """A state that is not a tensor."""

    def __init__(self) -> None:
        super().__init__(40, 1)
        self.n = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.n += 1
        return super().forward(x)

    def get_extra_state(self) -> Any:
        return {"n": self.n}

    def set_extra_state(self, state: Any) -> None:
        self.n = state["n"]


class TrainedOutside(Adapter):
    """Its state leaves out what is trained: the optimizer's part of the checkpoint has it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias.requires_grad_(True)


def linear() -> nn.Module:
    return nn.Linear(40, 1)


def by_name(opt: type[torch.optim.Optimizer]) -> Any:
    """An optimizer of named parameters, which its groups then have."""
    return lambda parameters, lr: opt([(str(i), p) for i, p in enumerate(parameters)], lr)


CASES: dict[str, tuple[Any, Any]] = {
    "observer": (Observed, torch.optim.SGD),
    "factors": (linear, Factors),
    "named state": (linear, Named),
    "named parameters": (linear, by_name(torch.optim.SGD)),
    "partial state, by a hook": (Adapter, torch.optim.SGD),
    "partial state, by a method": (Overriding, torch.optim.SGD),
    "partial state, of what is trained": (TrainedOutside, torch.optim.SGD),
    "extra state": (Counting, torch.optim.Adam),
    "LBFGS-like: lists in a state": (linear, torch.optim.Rprop),
}


def make(name: str, **kwargs: Any) -> TrainLearner:
    model, opt = CASES[name]
    return TrainLearner(model(), DataLoaders(list(BATCHES)), lr=0.01, opt_func=opt, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_the_same_program_resumes(name: str, tmp_path: Path) -> None:
    def seeded(seed: int, **kwargs: Any) -> TrainLearner:
        torch.manual_seed(seed)
        return make(name, **kwargs)

    whole = seeded(0)
    whole.run(2, valid=False)
    seeded(0, cbs=CheckpointCB(tmp_path)).run(1, valid=False)
    resumed = seeded(1)
    resumed.run(2, valid=False, resume=tmp_path)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(whole.model.buffers(), resumed.model.buffers(), strict=True):
        assert torch.equal(a, b)
    assert getattr(whole.model, "n", None) == getattr(resumed.model, "n", None)
    assert str(whole.opt.state_dict()) == str(resumed.opt.state_dict())


@pytest.mark.parametrize("name", CASES)
async def test_lr_find_puts_it_back(name: str) -> None:
    learner = make(name)
    parameters = [(p, p.detach().clone()) for p in learner.model.parameters()]
    buffers = [(b, b.clone()) for b in learner.model.buffers()]
    await learner.lr_find(max_epochs=3)
    assert [id(p) for p, _ in parameters] == [id(p) for p in learner.model.parameters()]
    assert all(torch.equal(p, before) for p, before in [*parameters, *buffers])
    assert getattr(learner.model, "n", 0) == 0


def test_quantization_aware_training_resumes(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's quantization is deprecated
        from torch.ao import quantization

        def make_model() -> nn.Module:
            quantized = quantization.QuantStub(), nn.Linear(40, 1), quantization.DeQuantStub()
            model = nn.Sequential(*quantized).train()
            model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
            return quantization.prepare_qat(model)

        def learner(**kwargs: Any) -> TrainLearner:
            return TrainLearner(make_model(), DataLoaders(list(BATCHES)), lr=0.01, **kwargs)

        learner(cbs=CheckpointCB(tmp_path)).run(1, valid=False)
        assert learner().run(2, valid=False, resume=tmp_path).status == "completed"


def test_a_loader_that_refuses_leaves_everything_as_it_was(tmp_path: Path) -> None:
    make("observer", cbs=CheckpointCB(tmp_path)).run(1, valid=False)

    class Refusing(Observed):
        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)
            raise ValueError("another version")

    learner = TrainLearner(Refusing(), DataLoaders(list(BATCHES)), lr=0.01)
    weight, value = learner.model.weight, learner.model.weight.detach().clone()
    with pytest.raises(ValueError, match="another version"):
        learner.run(2, valid=False, resume=tmp_path)
    assert learner.model.weight is weight
    assert torch.equal(weight, value)
    assert learner.model.largest.shape == (0,)


def test_a_buffer_that_torch_cannot_load_is_named(tmp_path: Path) -> None:
    class Growing(nn.Linear):
        def __init__(self, n: int) -> None:
            super().__init__(40, 1)
            self.register_buffer("mask", torch.ones(n))

    def learner(n: int, **kwargs: Any) -> TrainLearner:
        return TrainLearner(Growing(n), DataLoaders(list(BATCHES)), lr=0.01, **kwargs)

    learner(3, cbs=CheckpointCB(tmp_path)).run(1, valid=False)
    with pytest.raises(CheckpointMismatchError, match=r"mask of the model is \(1,\) of float32"):
        learner(1).run(2, valid=False, resume=tmp_path)


# ---------------------------------------------------------------------------- sparse gradients


@pytest.mark.parametrize("kind", ["momentum", "accumulation"])
def test_sparse_gradients_that_are_kept_are_saved(kind: str, tmp_path: Path) -> None:
    batches = [(torch.randint(0, 50, (4, 2), generator=DATA), BATCHES[0][1]) for _ in range(10)]

    def learner(folder: Path | None) -> TrainLearner:
        torch.manual_seed(0 if folder is None or not folder.exists() else 1)
        embed = nn.Embedding(50, 4, sparse=True)
        model = nn.Sequential(embed, nn.Flatten(), nn.Linear(8, 1))
        cbs: list[Any] = [GradientAccumulationCB(4)] if kind == "accumulation" else []
        cbs += [] if folder is None else [CheckpointCB(folder, every_batches=3)]
        cls = MomentumLearner if kind == "momentum" else TrainLearner
        return cls(model, DataLoaders(batches), lr=0.05, cbs=cbs)

    whole = learner(None)
    whole.run(1, valid=False)
    folder = tmp_path / "new"
    first = learner(folder)
    with pytest.raises(RuntimeError, match="stop here"):
        first.run(1, valid=False, cbs=Failing(at=7))
    resumed = learner(folder)
    resumed.run(1, valid=False, resume="last")
    assert resumed.resumed_from is not None
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


class Failing(Callback):
    """Fails before a batch."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before_batch(self, event: BeforeBatch) -> None:
        if event.iter == self.at:
            raise RuntimeError("stop here")


@pytest.mark.parametrize(
    "claim",
    [
        [torch.tensor([[9]]), torch.ones(1, 2), [5, 2], False],
        [torch.tensor([[-1]]), torch.ones(1, 2), [5, 2], True],
        [torch.tensor([[0]]), torch.ones(3, 2), [5, 2], True],
        [torch.tensor([[0]]), torch.ones(1), [10**30], False],
        ["a", 1, 2, 3],
        [],
        5,
    ],
    ids=["beyond", "negative", "other number", "too large", "other types", "empty", "number"],
)
def test_a_sparse_tensor_that_is_none_is_refused(claim: Any) -> None:
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        decode_sparse({"a": [{"sparse_coo_tensor": claim}]})

"""Groups of parameters: each parameter is in one of them, with its decay and its rate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from eventrain.engine import DataLoaders, TrainLearner, lr_groups, no_decay_groups
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tests.support.training import weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((2, 4))  # a weight of two dimensions
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv1d(2, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.linear(self.norm(x)))


class Tiny(nn.Module):
    """A transformer's parts: a token, embeddings, blocks, a norm, and a head tied to them."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.token = nn.Parameter(torch.zeros(1, 2, 4))
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(4, 7)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.token
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def named(model: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """What a group has, by the name of the parameter; every parameter has to be there once."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = [(names[id(p)], group[key]) for group in groups for p in group["params"]]
    assert len(found) == len(dict(found)) == len(names)
    return dict(found)


def test_norms_biases_and_vectors_do_not_decay() -> None:
    model = Tiny()
    assert named(model, no_decay_groups(model, 0.1), "weight_decay") == {
        "token": 0.1,
        "embed.weight": 0.1,
        **{
            f"blocks.{i}.{name}": decay
            for i in (0, 1)
            for name, decay in {
                "norm.weight": 0.0,
                "norm.bias": 0.0,
                "linear.weight": 0.1,
                "linear.bias": 0.0,
                "conv.weight": 0.1,
            }.items()
        },
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.bias": 0.0,
    }


def test_what_is_named_does_not_decay() -> None:
    class Named(Tiny):
        def no_weight_decay(self) -> set[str]:
            return {"token"}

    model = Named()
    decays = named(model, no_decay_groups(model, 0.1, ["embed"]), "weight_decay")
    assert {name for name, decay in decays.items() if decay} == {
        f"blocks.{i}.{name}.weight" for i in (0, 1) for name in ("linear", "conv")
    }
    assert named(model, no_decay_groups(model, 0.1, "embed"), "weight_decay") == decays


def test_only_biases_are_one_group() -> None:
    assert [g["weight_decay"] for g in no_decay_groups(nn.LayerNorm(3), 0.1)] == [0.0]


def test_frozen_parameters_are_in_a_group() -> None:
    model = Tiny().requires_grad_(False)
    assert len(named(model, no_decay_groups(model, 0.1), "weight_decay")) == 15


def test_the_rate_falls_from_the_output_to_the_input() -> None:
    model = Tiny()
    rates = named(model, groups := lr_groups(model, 1.0, decay=0.5), "lr")
    assert [group["lr"] for group in groups] == [1.0, 0.5, 0.25, 0.125, 0.0625]
    assert {name: rates[name] for name in rates if "." not in name or "bias" in name} == {
        "token": 0.0625,
        "blocks.0.norm.bias": 0.125,
        "blocks.0.linear.bias": 0.125,
        "blocks.1.norm.bias": 0.25,
        "blocks.1.linear.bias": 0.25,
        "norm.bias": 0.5,
        "head.bias": 1.0,
    }
    assert rates["embed.weight"] == 0.0625  # tied to the head: where the model has it first


def test_layers_may_be_given() -> None:
    model = Tiny(tied=False)
    layers = [["token", "embed", "blocks.0"], "blocks.1", ("norm", "head")]
    rates = named(model, lr_groups(model, 1.0, decay=0.1, layers=layers), "lr")
    assert sorted(set(rates.values()), reverse=True) == pytest.approx([1.0, 0.1, 0.01])
    assert (rates["token"], rates["head.weight"]) == (pytest.approx(0.01), 1.0)
    with pytest.raises(ValueError, match=r"layers: norm.weight is in none: add it"):
        lr_groups(model, 1.0, decay=0.1, layers=[*layers[:2], "head"])


def test_factors_are_those_of_the_longest_name() -> None:
    model = Tiny(tied=False)
    rates = named(model, lr_groups(model, 0.1, {"blocks": 0.5, "blocks.1": 0.0}), "lr")
    assert rates["blocks.0.conv.weight"] == 0.05
    assert rates["blocks.1.conv.weight"] == 0.0
    assert rates["head.bias"] == 0.1


@settings(max_examples=30, deadline=None)
@given(
    factors=st.dictionaries(
        st.sampled_from(["token", "embed", "blocks", "blocks.0", "blocks.1.linear", "head"]),
        st.floats(0, 1),
    ),
    weight_decay=st.none() | st.floats(0.01, 1),
    tied=st.booleans(),
)
def test_every_parameter_is_in_one_group(
    factors: dict[str, float], weight_decay: float | None, tied: bool
) -> None:
    model = Tiny(tied)
    groups = lr_groups(model, 0.1, factors, weight_decay=weight_decay)
    rates = named(model, groups, "lr")
    for name, rate in rates.items():
        keys = [key for key in factors if name == key or name.startswith(key + ".")]
        assert rate == 0.1 * (factors[max(keys, key=len)] if keys else 1.0)
    if weight_decay is not None:
        alone = named(model, no_decay_groups(model, weight_decay), "weight_decay")
        assert named(model, groups, "weight_decay") == alone
    assert [g["lr"] for g in groups] == sorted((g["lr"] for g in groups), reverse=True)


def test_a_fit_with_them_is_that_of_groups_by_hand() -> None:
    g = torch.Generator().manual_seed(0)
    batches = [
        (torch.randint(0, 7, (4, 2), generator=g), torch.randint(0, 7, (4, 2), generator=g))
        for _ in range(4)
    ]

    def loss(preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(preds.transpose(1, 2), targets)

    model, hand = Tiny(tied=False), Tiny(tied=False)
    learner = TrainLearner(
        model,
        DataLoaders(batches),
        loss,
        lr=0.01,
        opt_func=lambda params, lr: torch.optim.AdamW(
            lr_groups(model, lr, {"embed": 0.1}, weight_decay=0.5), lr
        ),
    )
    learner.run(2, valid=False)
    by_hand: dict[Any, list[Any]] = {}
    for name, p in hand.named_parameters():
        decay = 0.5 if p.ndim > 1 and "norm" not in name else 0.0
        by_hand.setdefault((0.001 if name == "embed.weight" else 0.01, decay), []).append(p)
    opt = torch.optim.AdamW(
        [{"params": ps, "lr": lr, "weight_decay": wd} for (lr, wd), ps in by_hand.items()]
    )
    for x, y in batches * 2:
        opt.zero_grad()
        loss(hand(x), y).backward()
        opt.step()
    assert torch.equal(weights(model), weights(hand))


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda m: no_decay_groups(m, -1), ValueError, "weight_decay=-1: give a number of 0"),
        (
            lambda m: no_decay_groups(m, 0.1, ["pos"]),
            ValueError,
            "no_decay: no parameter of the model is named 'pos', .* its modules are 'embed',",
        ),
        (lambda m: lr_groups(m, 0.1), TypeError, "give one of factors=.* and decay=0.75"),
        (lambda m: lr_groups(m, 0.1, {"embed": 1}, decay=0.5), TypeError, "give one of"),
        (lambda m: lr_groups(m, 0.1, {}, layers=["a"]), TypeError, "layers are for decay=..."),
        (lambda m: lr_groups(m, 0.1, decay=2), ValueError, "decay=2: give a number above 0"),
        (lambda m: lr_groups(m, 0.1, {"embed": -1}), ValueError, "that of 'embed' is -1: give 0"),
        (lambda m: lr_groups(m, 0.1, {"body": 1}), ValueError, "factors: no parameter .* 'body'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(call: Any, error: Any, says: str) -> None:
    with pytest.raises(error, match=says):
        call(Tiny())

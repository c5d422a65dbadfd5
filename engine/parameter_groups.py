"""Groups of a model's parameters, for an optimizer: without weight decay, by learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

Group = dict[str, Any]


def no_decay_groups(
    model: nn.Module, weight_decay: float, no_decay: Iterable[str] = ()
) -> list[Group]:
    """Two groups of a model's parameters: with weight decay, and without.

    Without it are biases, all parameters of normalization layers, and whatever else has fewer than
    two dimensions; those that `no_decay` names; and those that the model names itself, in a method
    `no_weight_decay()` as the models of timm have. The weights of embeddings decay, as in GPT-2, if
    they are not named. Every parameter is in one group, once if it is tied, and if it is frozen.

    Args:
        model: the model.
        weight_decay: that of the first group.
        no_decay: names of parameters, or of modules for all of their parameters, such as
            "pos_embed".

    Returns:
        Groups for an optimizer, with "params" and "weight_decay"; without empty ones.

    Raises:
        ValueError: `weight_decay` is negative, or nothing has a name of `no_decay`.

    Example:
        >>> import torch
        >>> from eventrain.engine import no_decay_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8))
        >>> opt_func = lambda params, lr: torch.optim.AdamW(no_decay_groups(model, 0.1), lr)
        >>> [(len(g["params"]), g["weight_decay"]) for g in no_decay_groups(model, 0.1)]
        [(1, 0.1), (3, 0.0)]

    Source: timm's `param_groups_weight_decay`; torchvision's `set_weight_decay`; nanoGPT.
    """
    return [
        {"params": [p for _, p in named], "weight_decay": decay}
        for decay, named in _by_decay(model, weight_decay, no_decay)
    ]


def lr_groups(
    model: nn.Module,
    lr: float,
    factors: Mapping[str, float] | None = None,
    *,
    decay: float | None = None,
    layers: Iterable[str | Iterable[str]] | None = None,
    weight_decay: float | None = None,
    no_decay: Iterable[str] = (),
) -> list[Group]:
    """Groups of a model's parameters with learning rates of their own.

    Either by `factors`, as for a pretrained backbone and a new head (discriminative rates), or by
    `decay`, as for the fine-tuning of a transformer (layer-wise decay): the last layer has the rate
    `lr`, and each one before it `decay` times that of the next.

    Every parameter is in one group, once if it is tied, and if it is frozen. The groups are sorted
    by their rates, so that the first one, whose rate events tell and `fit(lr=...)` sets, has the
    highest.

    Args:
        model: the model.
        lr: the rate of what has the factor 1.
        factors: the factor for `lr` of modules or parameters, by their names; of several that fit,
            the longest name counts. Those that are not named have the factor 1.
        decay: the factor from one layer to the one before it, above 0, at most 1.
        layers: the layers, from the input to the output: each the name of a module or parameter, or
            several. By default, the children of the model in their order, where those of a
            `ModuleList` or a `Sequential` are layers of their own; the model's own parameters,
            such as a class token, are in the first.
        weight_decay: if it is given, each group is divided as by `no_decay_groups`.
        no_decay: as for `no_decay_groups`.

    Returns:
        Groups for an optimizer, with "params", "lr" and maybe "weight_decay".

    Raises:
        TypeError: not one of `factors` and `decay` is given, or `layers` without `decay`.
        ValueError: nothing has a name that is given, parameters are in no layer, or a number is
            not in its range.

    Example:
        >>> import torch
        >>> from eventrain.engine import lr_groups
        >>> model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(3)])
        >>> [group["lr"] for group in lr_groups(model, 0.1, decay=0.5)]
        [0.1, 0.05, 0.025]
        >>> [group["lr"] for group in lr_groups(model, 0.1, {"0": 0.5, "1": 0.5})]
        [0.1, 0.05]

    Source: fastai's discriminative rates (ULMFiT); BEiT's and timm's layer-wise decay.
    """
    if (factors is None) == (decay is None):
        raise TypeError("lr_groups: give one of factors={'backbone': 0.1} and decay=0.75")
    if layers is not None and decay is None:
        raise TypeError("lr_groups: layers are for decay=..., which is not given")
    if decay is not None:
        if not 0 < decay <= 1:
            raise ValueError(f"decay={decay!r}: give a number above 0, at most 1")
        names = _layers(model) if layers is None else _as_lists(layers)
        last = len(names) - 1
        by_name = {name: decay ** (last - i) for i, inner in enumerate(names) for name in inner}
    else:
        assert factors is not None
        by_name = dict(factors)
    for name, factor in by_name.items():
        if not factor >= 0:
            raise ValueError(f"factors: that of {name!r} is {factor!r}: give 0 or more")
    _check_names(model, by_name, "layers" if decay is not None else "factors")
    sorted_by_rate: dict[tuple[float, float | None], list[nn.Parameter]] = {}
    for group_decay, named in _by_decay(model, weight_decay, no_decay):
        for name, p in named:
            fits = [key for key in by_name if _is_within(name, key)]
            if not fits and decay is not None:
                raise ValueError(f"layers: {name} is in none: add it, or a module around it")
            factor = by_name[max(fits, key=len)] if fits else 1.0
            sorted_by_rate.setdefault((factor, group_decay), []).append(p)
    groups: list[Group] = []
    for (factor, group_decay), held in sorted(sorted_by_rate.items(), key=lambda kv: -kv[0][0]):
        more = {} if group_decay is None else {"weight_decay": group_decay}
        groups.append({"params": held, "lr": lr * factor, **more})
    return groups


Named = list[tuple[str, nn.Parameter]]


def _by_decay(
    model: nn.Module, weight_decay: float | None, no_decay: Iterable[str]
) -> Iterator[tuple[float | None, Named]]:
    """The parameters by their weight decay; with None, all together."""
    named = list(model.named_parameters())
    if weight_decay is None:
        yield None, named
        return
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay={weight_decay!r}: give a number of 0 or more")
    left_out = _as_list(no_decay)
    _check_names(model, left_out, "no_decay")
    if callable(own := getattr(model, "no_weight_decay", None)):
        left_out += own()
    norms = {
        id(p)
        for module in model.modules()
        if _NORM.search(type(module).__name__)
        for p in module.parameters(recurse=False)
    }

    def decays(name: str, p: nn.Parameter) -> bool:
        if p.ndim < 2 or id(p) in norms or name.rpartition(".")[2] == "bias":
            return False
        return not any(_is_within(name, key) for key in left_out)

    kept = [(name, p) for name, p in named if decays(name, p)]
    others = [(name, p) for name, p in named if not decays(name, p)]
    yield from ((d, found) for d, found in ((weight_decay, kept), (0.0, others)) if found)


_NORM = re.compile(r"Norm(\dd)?$")
"""The class names of normalization layers, of torch and of others: BatchNorm2d, LlamaRMSNorm."""


def _layers(model: nn.Module) -> list[list[str]]:
    """The names of the parts of a model, from its input to its output."""
    found: list[list[str]] = []
    for name, child in model.named_children():
        inside = list(child.named_children()) if type(child) in _LISTS else []
        parts = [(f"{name}.{inner}", module) for inner, module in inside] or [(name, child)]
        found += [[part] for part, module in parts if any(True for _ in module.parameters())]
    own = [name for name, _ in model.named_parameters(recurse=False)]
    return [[*own, *found[0]], *found[1:]] if found else [own]


_LISTS = (nn.ModuleList, nn.Sequential)


def _as_list(names: Iterable[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _as_lists(layers: Iterable[str | Iterable[str]]) -> list[list[str]]:
    return [_as_list(names) for names in layers]


def _is_within(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _check_names(model: nn.Module, names: Iterable[str], argument: str) -> None:
    # A tied parameter, too, has all of its names.
    there = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for key in names:
        if not any(_is_within(name, key) for name in there):
            parts = ", ".join(repr(part) for part, _ in model.named_children())
            raise ValueError(
                f"{argument}: no parameter of the model is named {key!r}, or is in a module of that"
                f" name; its modules are {parts or 'none'}"
            )

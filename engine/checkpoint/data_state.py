"""What the loaders read from has a state, too: datasets, samplers, transforms, environments.

Their random generators are saved with the random states. Those of a loader with workers are copied
into the workers when an epoch begins: the state from before that is what its epochs are made of.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from ..data.prefetch import Prefetcher
from ..data.tensor_loader import TensorBatches, TensorLoader
from ..loop.state import LoopState
from .contents import (
    OF_EVERY_MODULE,
    PLAIN,
    TENSORS,
    attributes_of,
    contents_of,
    is_container,
    is_users,
    kinds_if_plain,
    tensors_in,
)
from .generators import is_generator


def data_generators(dls: Any) -> dict[str, Any]:
    """The generators that the loaders hold, by name, such as "train.dataset.rng".

    The data itself is not walked through: of a container, the first hundred items are looked at,
    and nothing at all if they are numbers, strings and tensors. `len()` and the items of a dataset
    are never asked for.
    """
    return {name: value for name, value in _walk(dls) if is_generator(value)}


def draws_while_it_reads(loader: Any) -> bool:
    """Whether a loader's dataset or `collate_fn` draws from generators of its own."""
    read = [getattr(loader, name, None) for name in ("dataset", "collate_fn")]
    return bool(data_generators(SimpleNamespace(train=read)))


def data_tensors(dls: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of datasets and samplers, by name, such as "train.dataset.targets"."""
    for name, value in _walk(dls):
        if "." not in name:
            continue  # a list of batches
        if type(value) in TENSORS:
            yield name, value
        elif is_container(value):
            yield from ((name, tensor) for tensor in tensors_in(value, _LONGEST))


def _walk(dls: Any) -> Iterator[tuple[str, Any]]:
    """What the loaders hold, by name."""
    queue = deque((name, getattr(dls, name, None)) for name in ("train", "valid"))
    seen: dict[int, Any] = {}  # the objects, so that none of these ids is used again
    while queue and len(seen) < _MOST_VISITED:
        name, value = queue.popleft()
        if id(value) in seen or issubclass(type(value), LoopState):
            continue
        seen[id(value)] = value
        yield name, value
        if type(value) not in TENSORS and not is_generator(value) and kinds_if_plain(value) is None:
            for step, item in contents_of_data(value):
                if type(item) not in PLAIN:
                    queue.append((name + step, item))


def contents_of_data(value: Any) -> Iterator[tuple[str, Any]]:
    """What a loader, sampler, dataset or transform holds, by the name of the step to it."""
    if isinstance(value, nn.Module):  # a transform
        for name, item in {**vars(value), **value._modules}.items():
            if name not in OF_EVERY_MODULE:
                yield f".{name}", item
    elif isinstance(value, DataLoader | Prefetcher | TensorLoader):
        for name in _OF_LOADERS:
            yield f".{name}", vars(value).get(name)
        if is_users(type(value)):
            yield from ((f".{name}", item) for name, item in attributes_of(value).items())
    elif isinstance(value, TensorBatches):
        yield ".transform", value.transform
    else:
        yield from contents_of(value, _LONGEST)


_OF_LOADERS = ("dataset", "sampler", "batch_sampler", "loader", "collate_fn", "generator")
_LONGEST, _MOST_VISITED = 100, 2000

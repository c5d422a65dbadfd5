"""Random generators of torch, numpy and Python, and their states."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def is_generator(value: Any) -> bool:
    """Whether it is a random generator of torch, numpy or Python, whose state can be saved."""
    kinds: tuple[type, ...] = (torch.Generator, random.Random)
    if numpy := sys.modules.get("numpy"):
        kinds = (*kinds, numpy.random.Generator, numpy.random.RandomState)
    return issubclass(type(value), kinds) and not isinstance(value, random.SystemRandom)


def generator_state(generator: Any) -> Any:
    """The state of one random generator."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if hasattr(generator, "bit_generator"):
        return generator.bit_generator.state
    return generator.get_state(legacy=False)


def set_generator_state(generator: Any, state: Any) -> None:
    """Restore what `generator_state` returned, or its copy in a checkpoint."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif hasattr(generator, "bit_generator"):
        generator.bit_generator.state = _to_numpy(state)
    else:
        generator.set_state(_to_numpy(state))


def _to_numpy(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _to_numpy(value) for key, value in state.items()}
    return state.numpy() if isinstance(state, torch.Tensor) else state

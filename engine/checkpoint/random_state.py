"""The random states that a training depends on, as plain values and tensors."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

RandomState = dict[str, Any]
"""Plain values and tensors by source: "python", "numpy", "torch", "cuda" etc., "generators"."""


def random_state(dls: Any) -> RandomState:
    """The states of Python, numpy, torch, its devices, and the generators of both loaders.

    A source that is not in use (numpy not imported, a device not initialized) is left out.
    """
    state: RandomState = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy := sys.modules.get("numpy"):
        name, key, *rest = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(key.copy()), *rest]
    for name in _devices_in_use():
        state[name] = getattr(torch, name).get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    state["generators"] = [generator.get_state() for generator in generators(dls)]
    return state


def set_random_state(dls: Any, state: RandomState) -> None:
    """Restore the states that `random_state` returned; the loaders must be made the same way."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        name, key, *rest = state["numpy"]
        numpy.random.set_state((name, key.numpy(), *rest))
    for name in _DEVICES:
        if name in state:
            getattr(torch, name).set_rng_state_all(state[name])
    if "mps" in state:
        torch.mps.set_rng_state(state["mps"])
    for generator, saved in zip(generators(dls), state["generators"], strict=True):
        generator.set_state(saved)


def random_state_differs(dls: Any, state: RandomState) -> str | None:
    """Why `state` cannot be restored on this machine or with these loaders; None if it can."""
    here, there = len(generators(dls)), len(state["generators"])
    if here != there:
        return f"the loaders have {here} random generators, but the checkpoint has {there}"
    for name in _DEVICES:
        module = getattr(torch, name)
        here, there = module.device_count(), len(state.get(name, ()))
        if there and here != there:
            return f"there are {here} {name} devices, but the checkpoint has {there}"
    if "mps" in state and not torch.backends.mps.is_available():
        return "there is no mps device, but the checkpoint has a state for one"
    return None


def generators(dls: Any) -> list[torch.Generator]:
    """The random generators of both loaders, including those of nested samplers and loaders."""
    found: dict[int, torch.Generator] = {}
    owners = [getattr(dls, "train", None), getattr(dls, "valid", None)]
    for owner in owners:  # nested ones are appended meanwhile
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        for name in ("sampler", "batch_sampler", "loader"):
            inner = getattr(owner, name, None)
            if inner is not None and all(inner is not known for known in owners):
                owners.append(inner)
    return list(found.values())


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


_DEVICES = ("cuda", "xpu")


def _devices_in_use() -> list[str]:
    return [name for name in _DEVICES if getattr(torch, name).is_initialized()]

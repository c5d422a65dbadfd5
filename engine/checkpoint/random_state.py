"""The random states that a training depends on, as plain data."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

RandomState = dict[str, Any]
"""By source: "python", "numpy", "torch", "cuda" or such, "generators". Plain values, tensors."""


def random_state(dls: Any) -> RandomState:
    """The states of Python, numpy, torch, its devices, and the generators of both loaders.

    What is not in use (numpy never imported, a device never used) has none.
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
    """Go back to what `random_state` returned, for loaders made in the same way."""
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
    for generator, own in zip(generators(dls), state["generators"], strict=True):
        generator.set_state(own)


def random_state_differs(dls: Any, state: RandomState) -> str | None:
    """Why `state` cannot be gone back to here, or with these loaders; None if it can."""
    here, there = len(generators(dls)), len(state["generators"])
    if here != there:
        return f"the loaders have {here} random generators of their own, and had {there}"
    for name in _DEVICES:
        module = getattr(torch, name)
        here, there = module.device_count(), len(state.get(name, ()))
        if there and here != there:
            return f"there are {here} {name} devices, and there were {there}"
    if "mps" in state and not torch.backends.mps.is_available():
        return "there is no mps device, and there was one"
    return None


def generators(dls: Any) -> list[torch.Generator]:
    """The random generators of both loaders: their own, their samplers', and those of the
    samplers and loaders that these draw from."""
    found: dict[int, torch.Generator] = {}
    owners = [getattr(dls, "train", None), getattr(dls, "valid", None)]
    for owner in owners:  # it grows
        generator = getattr(owner, "generator", None)
        if isinstance(generator, torch.Generator):
            found[id(generator)] = generator
        for name in ("sampler", "batch_sampler", "loader"):
            inner = getattr(owner, name, None)
            if inner is not None and all(inner is not known for known in owners):
                owners.append(inner)
    return list(found.values())


_DEVICES = ("cuda", "xpu")


def _devices_in_use() -> list[str]:
    return [name for name in _DEVICES if getattr(torch, name).is_initialized()]

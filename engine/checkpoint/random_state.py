"""The random states that a training depends on, as plain values and tensors."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch

from ..data.accelerator import initialized_accelerator
from .data_state import data_generators
from .generators import generator_state, set_generator_state

RandomState = dict[str, Any]
"""Plain values and tensors by source: "python", "numpy", "torch", "generators" (of the loaders),
"data" (of what they read, by name), and the type of the accelerator, such as "cuda", with one state
per device."""


def random_state(dls: Any) -> RandomState:
    """The states of Python, numpy, torch, the accelerator, and the generators of both loaders
    and of the data that they read.

    A source that is not in use (numpy not imported, an accelerator not initialized) is left out.
    """
    state: RandomState = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if numpy := sys.modules.get("numpy"):
        name, key, *rest = numpy.random.get_state()
        state["numpy"] = [name, torch.from_numpy(key.copy()), *rest]
    if accelerator := initialized_accelerator():
        states = [_module(accelerator).get_rng_state(*device) for device in _devices(accelerator)]
        state[accelerator.type] = states
    state["generators"] = [generator.get_state() for generator in generators(dls)]
    if data := {name: generator_state(own) for name, own in _of_data(dls).items()}:
        state["data"] = data
    return state


def set_random_state(dls: Any, state: RandomState) -> None:
    """Restore the states that `random_state` returned; the loaders must be made the same way."""
    random.setstate(state["python"])
    torch.set_rng_state(state["torch"])
    if "numpy" in state:
        import numpy

        name, key, *rest = state["numpy"]
        numpy.random.set_state((name, key.numpy(), *rest))
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is not None and accelerator.type in state:
        for device, saved in zip(_devices(accelerator), state[accelerator.type], strict=True):
            _module(accelerator).set_rng_state(saved, *device)
    for generator, saved in zip(generators(dls), state["generators"], strict=True):
        generator.set_state(saved)
    for name, own in _of_data(dls).items():
        if name in state.get("data", ()):
            set_generator_state(own, state["data"][name])


def all_generators(dls: Any) -> list[Any]:
    """The random generators of both loaders, and those of the data that they read."""
    return [*generators(dls), *_of_data(dls).values()]


def _of_data(dls: Any) -> dict[str, Any]:
    known = {id(generator) for generator in generators(dls)}
    return {name: own for name, own in data_generators(dls).items() if id(own) not in known}


def unrestored_generators(dls: Any, state: RandomState) -> str | None:
    """Why the data may draw other random numbers than in the run before; None if it does not."""
    if names := _of_data(dls).keys() ^ state.get("data", {}).keys():
        return (
            f"{', '.join(sorted(names))}: a random generator that is not both in the checkpoint and"
            " in the loaders; make it before the fit begins"
        )
    return None


def random_state_differs(dls: Any, state: RandomState) -> str | None:
    """Why `state` cannot be restored on this machine or with these loaders; None if it can."""
    here, there = len(generators(dls)), len(state["generators"])
    if here != there:
        return f"the loaders have {here} random generators, but the checkpoint has {there}"
    accelerator = torch.accelerator.current_accelerator()
    for name in state.keys() - {"python", "torch", "numpy", "generators", "data"}:
        is_here = accelerator is not None and accelerator.type == name
        here, there = torch.accelerator.device_count() if is_here else 0, len(state[name])
        if there != here:
            return f"there are {here} {name} devices, but the checkpoint has {there}"
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


def _module(accelerator: torch.device) -> Any:
    return torch.get_device_module(accelerator)


def _devices(accelerator: torch.device) -> list[tuple[str, ...]]:
    """The arguments that name each device to `get_rng_state` and `set_rng_state`."""
    if accelerator.type == "mps":
        return [()]  # there is one, which those functions do not expect to be named
    return [(f"{accelerator.type}:{i}",) for i in range(torch.accelerator.device_count())]

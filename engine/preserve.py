"""Leave everything as it was: for runs that only try something."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .learner import Learner


@contextmanager
def preserved(learner: Learner) -> Iterator[None]:
    """Afterwards model, gradients, optimizer, callbacks and random states are as before.

    The random states are those of Python, numpy, torch, all CUDA devices, and the generators
    of the learner's loaders. A model that was moved to a device stays there.
    """
    model = learner.model
    weights = copy.deepcopy(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    opt = learner.opt
    opt_state = copy.deepcopy(opt.state_dict()) if opt is not None else None
    stateful: list[Any] = [cb for cb in learner.cbs if hasattr(cb, "load_state_dict")]
    states = [copy.deepcopy(cb.state_dict()) for cb in stateful]
    generators = [(g, g.get_state()) for g in _generators(learner.dls)]
    position = {name: getattr(learner, name) for name in _POSITION}
    restore_global = _global_random_state()
    try:
        yield
    finally:
        model.load_state_dict(weights)
        for name, buffer in model.named_buffers():  # those that no state_dict has, too
            buffer.copy_(buffers[name])
        for p, gradient in gradients:
            p.grad = None if gradient is None else gradient.to(p.device)
        for module, training in modes:
            module.training = training
        learner.opt = opt
        if opt is not None:
            opt.load_state_dict(opt_state)
        for callback, state in zip(stateful, states, strict=True):
            callback.load_state_dict(state)
        for generator, state in generators:
            generator.set_state(state)
        for name, value in position.items():
            setattr(learner, name, value)
        restore_global()


_POSITION = ("batch", "preds", "loss", "epoch", "iter", "n_epochs", "epochs", "n_iter", "training")


def _generators(dls: Any) -> list[torch.Generator]:
    """The random generators of both loaders: their own and their samplers'."""
    found: dict[int, torch.Generator] = {}
    for loader in (getattr(dls, "train", None), getattr(dls, "valid", None)):
        sampler = getattr(loader, "sampler", None)
        for owner in (loader, sampler, getattr(loader, "batch_sampler", None)):
            generator = getattr(owner, "generator", None)
            if isinstance(generator, torch.Generator):
                found[id(generator)] = generator
    return list(found.values())


def _global_random_state() -> Any:
    python = random.getstate()
    numpy = sys.modules.get("numpy")  # if nobody imported it, nobody draws from it
    numpy_state = numpy.random.get_state() if numpy else None
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore() -> None:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(numpy_state)
        torch.set_rng_state(cpu)
        if cuda:
            torch.cuda.set_rng_state_all(cuda)

    return restore

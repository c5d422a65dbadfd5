"""A context manager that restores the learner after a trial run, such as `lr_find`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .random_state import random_state, set_random_state
from .state import SavedLearner, stateful


@contextmanager
def preserved(learner: SavedLearner) -> Iterator[None]:
    """Restore model, gradients, optimizer, callbacks, position and random states afterwards.

    The random states are those of Python, numpy, torch, all devices of the accelerator, and
    the generators of the learner's loaders. A model that was moved to another device stays there.
    """
    model = learner.model
    weights = copy.deepcopy(model.state_dict())
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [(p, None if p.grad is None else p.grad.clone()) for p in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    opt = learner.opt
    opt_state = copy.deepcopy(opt.state_dict()) if opt is not None else None
    states = [(owner, copy.deepcopy(owner.state_dict())) for _, owner in stateful(learner)]
    position = {name: getattr(learner, name) for name in _POSITION}
    if torch.accelerator.is_available():
        # This initializes it; before, there is no random state to save.
        torch.accelerator.current_device_index()
    randomness = random_state(learner.dls)
    try:
        yield
    finally:
        model.load_state_dict(weights)
        for name, buffer in model.named_buffers():  # including non-persistent ones
            buffer.copy_(buffers[name])
        for p, gradient in gradients:
            p.grad = None if gradient is None else gradient.to(p.device)
        for module, training in modes:
            module.training = training
        learner.opt = opt
        if opt is not None:
            opt.load_state_dict(opt_state)
        for owner, state in states:
            owner.load_state_dict(state)
        for name, value in position.items():
            setattr(learner, name, value)
        set_random_state(learner.dls, randomness)


_POSITION = ("batch", "preds", "loss", "epoch", "iter", "n_epochs", "epochs", "n_iter", "training")

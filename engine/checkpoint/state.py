"""The whole state of a fit: collecting it for a checkpoint, and restoring it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, Protocol

from torch import nn

from ...events import Callback
from ..loop.state import Progress
from .random_state import random_state, set_random_state

State = dict[str, Any]


class SavedLearner(Protocol):
    """The attributes of a learner that are saved and restored."""

    model: nn.Module
    opt: Any
    dls: Any
    training: bool
    n_samples: int
    record: dict[str, Any]
    history: list[dict[str, Any]]
    progress: dict[bool, Progress]
    done: Progress

    @property
    def cbs(self) -> tuple[Callback, ...]: ...


def state_of(learner: SavedLearner) -> State:
    """Model, gradients, optimizer, callbacks, random states, history and counts of a learner.

    The tensors are the live ones; `Snapshot` copies them.
    """
    opt = learner.opt
    return {
        "model": learner.model.state_dict(),
        "gradients": {
            name: p.grad for name, p in learner.model.named_parameters() if p.grad is not None
        },
        "optimizer": None if opt is None else opt.state_dict(),
        "optimizer_class": optimizer_class(opt),
        "callbacks": {name: owner.state_dict() for name, owner in stateful(learner)},
        "random": random_state(learner.dls),
        "history": learner.history,
        "n_samples": learner.n_samples,
        "progress": {training: asdict(done) for training, done in learner.progress.items()},
    }


def set_state(learner: SavedLearner, state: State) -> None:
    """Restore a state that `check_state` has accepted."""
    model = learner.model
    model.load_state_dict(state["model"])
    for name, p in model.named_parameters():
        gradient = state["gradients"].get(name)
        p.grad = None if gradient is None else gradient.to(p.device, copy=True)
    if state["optimizer"] is not None:
        learner.opt.load_state_dict(state["optimizer"])
    learner.history = [dict(row) for row in state["history"]]
    learner.record = learner.history[-1] if learner.history else {}
    learner.n_samples = state["n_samples"]
    learner.progress = {training: Progress(**done) for training, done in state["progress"].items()}
    learner.done = learner.progress[learner.training]
    try:
        for name, owner in stateful(learner):
            _load(name, owner, state["callbacks"][name])
    finally:  # last, because a callback may draw random numbers while it loads
        set_random_state(learner.dls, state["random"])


def _load(name: str, owner: Any, state: Any) -> None:
    try:
        owner.load_state_dict(state)
    except Exception as exc:
        exc.add_note(f"raised by {name}.load_state_dict on its state in the checkpoint")
        raise


def stateful(learner: SavedLearner) -> Iterator[tuple[str, Any]]:
    """The callbacks with a `state_dict`, and the learner if its class has one, by name."""
    owners = [learner, *learner.cbs]
    seen: Counter[str] = Counter()
    for owner in owners:
        if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict"):
            name = type(owner).__qualname__
            seen[name] += 1
            yield name if seen[name] == 1 else f"{name} {seen[name]}", owner


def stateless(learner: SavedLearner) -> list[str]:
    """The attributes with a state, such as a scheduler, of callbacks without a `state_dict`."""
    found = []
    for cb in learner.cbs:
        if hasattr(cb, "state_dict"):
            continue
        for name, value in vars(cb).items():
            if hasattr(value, "load_state_dict") and not isinstance(value, Callback | type):
                found.append(f"{type(cb).__qualname__}.{name}")
    return found


def optimizer_class(opt: Any) -> str:
    """The class name of an optimizer, as checkpoints hold it."""
    return type(getattr(opt, "optimizer", opt)).__name__  # accelerate wraps the optimizer

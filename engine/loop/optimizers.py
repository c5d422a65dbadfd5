"""Several optimizers that a learner has as one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch


class Optimizers(Mapping[str, Any]):
    """Several optimizers by name, as one: stepped, zeroed, saved and restored together.

    A learner makes it of the mapping that it is given as `opt`, or that its `opt_func` returns.
    `learner.opt["G"]` is one of them. The first one counts: `learner.done.steps`, `max_steps` and
    the `lr` of events are those of the first optimizer. In `learner.update(loss, "G")`, `step`,
    `zero_grad` and `param_groups` are those of "G" alone.

    Args:
        optimizers: the optimizers, by name.
        named_parameters: names for the errors, such as `model.named_parameters()`.

    Raises:
        ValueError: there is none; a name is empty; two have the same parameter.
        TypeError: it is not a mapping of names to optimizers.

    Example:
        >>> import torch
        >>> from eventrain.engine import Optimizers
        >>> g, d = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)
        >>> opt = Optimizers(
        ...     {
        ...         "G": torch.optim.Adam(g.parameters(), lr=0.001),
        ...         "D": torch.optim.SGD(d.parameters(), lr=0.01),
        ...     }
        ... )
        >>> opt
        Optimizers(G=Adam, D=SGD)
        >>> [group["lr"] for group in opt.param_groups]
        [0.001, 0.01]
    """

    def __init__(
        self,
        optimizers: Mapping[str, Any],
        named_parameters: Iterable[tuple[str, torch.Tensor]] = (),
    ) -> None:
        self._optimizers = _checked(optimizers)
        self._chosen: str | None = None
        self._check_disjoint({id(p): name for name, p in named_parameters})

    def _check_disjoint(self, names: Mapping[int, str]) -> None:
        owners: dict[int, str] = {}
        for owner, opt in self.items():
            for i, p in enumerate(p for group in opt.param_groups for p in group["params"]):
                other = owners.setdefault(id(p), owner)
                if other != owner:
                    which = names.get(id(p), f"parameter {i} of {owner!r}, {tuple(p.shape)},")
                    raise ValueError(
                        f"{which} is in two optimizers, {other!r} and {owner!r}: each would step"
                        " it; give it to one of them"
                    )

    def __getitem__(self, name: str) -> Any:
        if name in self._optimizers:
            return self._optimizers[name]
        raise KeyError(f"there is no optimizer {name!r}, but {self.names}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._optimizers)

    def __len__(self) -> int:
        return len(self._optimizers)

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        inner = (f"{name}={class_of(opt).__name__}" for name, opt in self.items())
        return f"{type(self).__name__}({', '.join(inner)})"

    @property
    def names(self) -> str:
        """The names for an error, such as "'G', 'D'"."""
        return ", ".join(map(repr, self))

    @property
    def first(self) -> str:
        """The name of the first optimizer, whose steps count."""
        return next(iter(self))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups of all; in an update, those of its optimizer."""
        return self.all_param_groups if self._chosen is None else self[self._chosen].param_groups

    @property
    def all_param_groups(self) -> list[dict[str, Any]]:
        """The groups of all, in an update too."""
        return [group for opt in self.values() for group in opt.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        """What all have kept for their parameters, in a new dict."""
        return {p: kept for opt in self.values() for p, kept in opt.state.items()}

    @contextmanager
    def only(self, name: str | None) -> Iterator[Self]:
        """While this context is entered, only this one is stepped and zeroed; None for all."""
        before, self._chosen = self._chosen, name
        try:
            yield self
        finally:
            self._chosen = before

    def _stepped(self) -> Iterable[Any]:
        return self.values() if self._chosen is None else (self[self._chosen],)

    def step(self) -> None:
        """Step all, in their order; in an update, its optimizer."""
        for opt in self._stepped():
            opt.step()

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Zero the gradients of all; in an update, those of its optimizer."""
        for opt in self._stepped():
            opt.zero_grad(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """The state of each, by name."""
        return {name: opt.state_dict() for name, opt in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: it is that of optimizers with other names.
        """
        if state.keys() != self.keys():
            raise ValueError(
                f"the optimizers are {self.names}, but the state is that of"
                f" {', '.join(map(repr, state))}"
            )
        for name, opt in self.items():
            opt.load_state_dict(state[name])


def is_optimizer(opt: Any) -> bool:
    """Whether it can step, and has groups of parameters."""
    is_class = isinstance(opt, type)
    return not is_class and callable(getattr(opt, "step", None)) and hasattr(opt, "param_groups")


def class_of(opt: Any) -> type:
    """The class of an optimizer, of the one inside it if accelerate has wrapped it."""
    return type(getattr(opt, "optimizer", opt))


def optimizer_named(opt: Any, name: str) -> Any:
    """The optimizer of that name.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(opt, Optimizers):
        raise ValueError(
            f"opt={name!r}: learner.opt is one {type(opt).__name__}, without a name: leave opt out,"
            f" or give the learner a mapping, opt={{{name!r}: ...}}"
        )
    if name not in opt:
        raise ValueError(f"opt={name!r}: there is no optimizer {name!r}, but {opt.names}")
    return opt[name]


def each_of(opt: Any) -> dict[str | None, Any]:
    """The optimizers by name; one alone has the name None."""
    return dict(opt.items()) if isinstance(opt, Optimizers) else {None: opt}


def _checked(optimizers: Any) -> dict[str, Any]:
    if not isinstance(optimizers, Mapping):
        raise TypeError(f"Optimizers({optimizers!r}): give a mapping of names to optimizers")
    if not optimizers:
        raise ValueError("the mapping of optimizers is empty: give at least one")
    for name, opt in optimizers.items():
        if not isinstance(name, str):
            raise TypeError(f"the name of an optimizer is text, but {name!r} is not")
        if not name:
            raise ValueError("the name of an optimizer is empty")
        if isinstance(opt, Optimizers) or not is_optimizer(opt):
            raise TypeError(f"the optimizer {name!r} is {opt!r}, which is not one" + _instead(opt))
    return dict(optimizers)


def _instead(opt: Any) -> str:
    if isinstance(opt, type):
        return f": it is a class; write {opt.__name__}(parameters, ...)"
    return " with step() and param_groups"

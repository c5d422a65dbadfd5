"""What of a batch is given to the model, and what to the loss function."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .batch_size import parts_of
from .keywords import keywords_of
from .outputs import described

_SEQUENCES = (tuple, list)
_WHOLE = ("batch", "data")
"""The only parameter of a model that takes a whole batch may have one of these names."""

Inputs = int | Sequence[str] | None
"""How many parts of a batch the model takes, or which; None for the default: see `call_model`."""


class HasBatch(Protocol):
    """What the inputs and the targets of the current batch depend on."""

    model: nn.Module
    loss_func: Any
    batch: Any
    preds: Any
    n_inp: Any


def check_n_inp(n_inp: Any) -> Inputs:
    """Return `n_inp` if it is a number of parts, names of parts, or None.

    Raises:
        TypeError, ValueError: it is not.
    """
    if n_inp is None or (type(n_inp) is int and n_inp > 0):
        return n_inp
    is_list = isinstance(n_inp, _SEQUENCES)
    if is_list and n_inp and all(isinstance(name, str) for name in n_inp):
        return tuple(n_inp)
    error = ValueError if type(n_inp) is int or is_list else TypeError
    raise error(
        f"n_inp={n_inp!r}: give the number of parts of a batch that the model takes, 1 or more, or,"
        " where batches are mappings or objects, a tuple with the names of those parts"
    )


def call_model(learner: HasBatch) -> Any:
    """Call the model with the inputs of the current batch, and return what it returns.

    By default, the input is the first part of a tuple or list. A mapping is passed as keywords: all
    of its parts if there is no loss function, or else those that `forward` has a parameter for. An
    object that has all the parameters that `forward` needs is passed likewise. Anything else is
    passed as it is.

    Raises:
        TypeError, ValueError: the batch does not have these inputs.
        Exception: an error of the model. If it was called with anything but the first part of a
            batch, or a tensor, a note says with what.
    """
    model, batch, n_inp = learner.model, learner.batch, learner.n_inp
    if n_inp is None and isinstance(batch, _SEQUENCES):
        try:
            return model(batch[0])
        except TypeError as exc:
            if 1 < (needs := len(keywords_of(model).required)) < len(batch):
                exc.add_note(
                    f"the model needs {needs} inputs, and was called with the first of the"
                    f" {len(batch)} parts of the batch: n_inp={needs} gives it the first {needs}"
                )
            raise
    args: Sequence[Any] = (batch,)
    kwargs: dict[str, Any] = {}
    if isinstance(batch, _SEQUENCES):
        args = batch[: _number(batch, n_inp)]
    elif (names := _input_names(learner)) is not None:
        is_mapping = isinstance(batch, Mapping)
        kwargs = {name: batch[name] if is_mapping else getattr(batch, name) for name in names}
        args = ()
    elif isinstance(batch, torch.Tensor):
        return model(batch)
    try:
        return model(*args, **kwargs)
    except Exception as exc:
        exc.add_note(_called(model, args, kwargs, n_inp))
        raise


def call_loss(learner: HasBatch) -> Any:
    """Call the loss function with the predictions and the targets of the current batch.

    Raises:
        TypeError, ValueError: there are no targets.
        Exception: an error of the loss function. If it was not called with one tensor and one
            target, a note says with what.
    """
    preds, batch = learner.preds, learner.batch
    is_usual = type(batch) is tuple and len(batch) == 2 and type(preds) is torch.Tensor
    if is_usual and learner.n_inp is None:  # which is to be quick
        return learner.loss_func(preds, batch[1])
    targets = targets_in(learner)
    try:
        return learner.loss_func(preds, *targets)
    except Exception as exc:
        if not isinstance(preds, torch.Tensor) or len(targets) != 1:
            given = ", ".join(map(described, (preds, *targets)))
            exc.add_note(
                f"loss_func was called with the predictions and all targets: {given}; where it"
                " takes something else, give a function of your own, such as loss_func=lambda"
                " preds, *targets: mse_loss(preds[0], targets[0])"
            )
        raise


def targets_in(learner: HasBatch) -> tuple[Any, ...]:
    """The targets of the current batch, in order.

    By default, the target is the second part of a tuple or list; with `n_inp`, the targets are all
    parts that the model does not take. Of a mapping or an object, they are that in any case.

    Raises:
        TypeError, ValueError: there are none.
    """
    batch, n_inp = learner.batch, learner.n_inp
    if isinstance(batch, _SEQUENCES):
        if n_inp is None and len(batch) > 1:
            return (batch[1],)
        targets = () if n_inp is None else batch[_number(batch, n_inp) :]
        if targets:
            return tuple(targets)
        given = "" if n_inp is None else f", and n_inp={n_inp} gives them all to the model"
        raise _no_targets(learner, f"it has {len(batch)} part(s){given}")
    names = _input_names(learner)
    if names is None:
        raise _no_targets(learner, f"it is a {type(batch).__qualname__}")
    found = tuple(part for name, part in (parts_of(batch) or {}).items() if name not in names)
    if not found:
        kind = type(learner.model).__qualname__
        raise _no_targets(
            learner,
            f"{kind} takes all of its parts ({', '.join(names)}); say which it is to take with"
            f" n_inp=({', '.join(map(repr, names[:1]))}, ...)",
        )
    return found


def targets_of(learner: HasBatch) -> Any:
    """The target of the current batch or, if there are several, a tuple of them."""
    targets = targets_in(learner)
    return targets[0] if len(targets) == 1 else targets


def _input_names(learner: HasBatch) -> Sequence[str] | None:
    """The parts of a batch that the model takes as keywords; None if it takes the whole batch."""
    batch, n_inp = learner.batch, learner.n_inp
    if isinstance(batch, torch.Tensor):
        if n_inp not in (None, 1):
            raise _other_form(batch, n_inp)
        return None
    is_mapping = isinstance(batch, Mapping)
    if n_inp is not None:
        if type(n_inp) is int:
            raise _other_form(batch, n_inp)
        for name in n_inp:
            if not (name in batch if is_mapping else hasattr(batch, name)):
                raise ValueError(f"n_inp={n_inp!r}: the batch has no {name!r}, {_but(batch)}")
        return tuple(n_inp)
    names, required, takes_all = keywords_of(learner.model)
    takes_whole = len(required) == 1 and required[0] in _WHOLE
    if not is_mapping:
        fits = required and not takes_whole and all(hasattr(batch, name) for name in required)
        return tuple(name for name in names if hasattr(batch, name)) if fits else None
    if takes_whole and required[0] not in batch:
        return None
    if takes_all:
        return tuple(batch)
    unknown = [name for name in batch if name not in names] if learner.loss_func is None else []
    missing = [name for name in required if name not in batch]
    if unknown or missing:
        raise _other_keywords(learner.model, batch, names, missing, unknown)
    return tuple(name for name in names if name in batch)


def _number(batch: Any, n_inp: Any) -> int:
    """`n_inp`, if it is a number, and the batch has as many parts."""
    if type(n_inp) is not int:
        raise _other_form(batch, n_inp)
    if n_inp > len(batch):
        raise ValueError(
            f"n_inp={n_inp}, but the batch is a {type(batch).__qualname__} of {len(batch)} part(s):"
            " give the number of those that the model takes; the others are the targets"
        )
    return n_inp


def _but(batch: Any) -> str:
    return f"but {', '.join(map(repr, parts_of(batch) or {})) or 'no parts'}"


def _called(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], n_inp: Any) -> str:
    """With what a model was called, for an error."""
    given = [*map(described, args), *(f"{name}={described(x)}" for name, x in kwargs.items())]
    names = ", ".join(keywords_of(model).names)
    return (
        f"{type(model).__qualname__}.forward({names}) was called with {', '.join(given)}, by"
        f" n_inp={n_inp!r}: that says how many parts of a tuple the model takes, or which of a"
        " mapping or an object, by the names of its parameters; or override predict()"
    )


def _no_targets(learner: HasBatch, why: str) -> TypeError:
    has_loss_func = learner.loss_func is not None
    way = ". Where the model returns the loss, give loss_func=None" if has_loss_func else ""
    return TypeError(
        f"this batch has no targets: {why}{way}. Make batches of (inputs, targets), or perform"
        " Predict and GetLoss yourself, in a Learner subclass or a callback"
    )


def _other_form(batch: Any, n_inp: Any) -> TypeError:
    kind = type(batch).__qualname__
    if type(n_inp) is int:
        return TypeError(
            f"n_inp={n_inp} counts the parts of a tuple or list, but the batch is a {kind}: leave"
            " n_inp out or, if it has names, say which the model takes: n_inp=('name', ...)"
        )
    return TypeError(
        f"n_inp={n_inp!r} names the parts of a mapping or an object, but the batch is a {kind}:"
        " give the number of parts that the model takes"
    )


def _other_keywords(
    model: nn.Module, batch: Any, names: Sequence[str], missing: list[str], unknown: list[str]
) -> TypeError:
    kind = type(model).__qualname__
    what, way = f"does not take {', '.join(map(repr, unknown))}", "say which it takes with n_inp="
    way += repr(tuple(name for name in names if name in batch))
    if missing:
        what = f"needs {', '.join(map(repr, missing))}"
        way = "give the parts of the batch the names of the model's parameters"
    return TypeError(
        f"a mapping is passed to the model as keywords, but {kind}.forward({', '.join(names)})"
        f" {what}, and the batch has {', '.join(map(repr, batch))}: {way}; or override predict()"
        f" and get_loss() in a TrainLearner subclass: self.preds = self.model(self.batch['name'])"
    )

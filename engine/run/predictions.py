"""The callback that collects predictions for `Learner.get_preds`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from ...events import AfterPredict, Callback, CancelBatchException, CleanupEpoch
from .. import log
from ..data.containers import map_tensors
from ..data.inputs import targets_of
from ..data.outputs import (
    Layouts,
    described,
    in_common,
    is_ambiguous,
    join,
    layouts_of,
    why_not_collected,
)
from ..loop.state import LoopState
from .result import FitResult

Keep = str | int | Sequence[str | int] | Callable[[Any], Any] | None

_CHOOSE = (
    "choose what to collect: keep='logits' (a key, an attribute, or the index of an item), several"
    " of these in a tuple, or a function of the predictions that returns tensors with one row per"
    " sample, or lists with one item per sample"
)
_NO_TARGETS = "leave with_targets out, and read them from the loader"


class PredictionForm:
    """What to keep of the predictions of a batch, on the CPU.

    Raises:
        TypeError, ValueError: `keep` is not valid.
    """

    def __init__(self, with_targets: bool, keep: Keep) -> None:
        self._keep = keep
        self._several = _check_keep(keep)
        self._with_targets = with_targets

    def of(self, learner: Any) -> Any:
        """The predictions, or (predictions, targets). The host waits for the device here."""
        kept = map_tensors(_kept(learner.preds, self._keep), _to_cpu)
        kept = tuple(kept.values()) if self._several else kept
        return (kept, map_tensors(targets_of(learner), _to_cpu)) if self._with_targets else kept


class CollectPredictions(Callback):
    """Collects predictions (and targets) on the CPU, and ends each batch after its prediction.

    Raises:
        TypeError, ValueError: `keep` is not valid.
    """

    order: float = math.inf

    def __init__(self, with_targets: bool, keep: Keep = None) -> None:
        self._keep = keep
        self._several = _check_keep(keep)
        self._columns = {"preds": _Collected("preds", _CHOOSE)}
        if with_targets:
            self._columns["targets"] = _Collected("targets", _NO_TARGETS)
        self._joined: tuple[Any, ...] | None = None

    def after_predict(self, event: AfterPredict) -> None:
        learner = cast(LoopState, event.learner)
        n = learner.batch_size(learner.batch)
        guessed = learner.batch_reader.guess is not None
        for name, column in self._columns.items():
            is_preds = name == "preds"
            output = _kept(learner.preds, self._keep) if is_preds else targets_of(event.learner)
            column.add(output, n, guessed)
        raise CancelBatchException("only predictions were requested")

    def cleanup_epoch(self, event: CleanupEpoch) -> None:
        """Join the outputs of all batches: in the fit's thread, because it takes long."""
        if cast(LoopState, event.learner).all_read:
            columns = self._columns.values()
            self._joined = tuple(column.join() for column in columns if column.outputs)

    def result(self, fit: FitResult) -> Any:
        """The predictions, or (predictions, targets).

        Raises:
            RuntimeError: there are none, or a receiver has ended the run before the last batch.
        """
        cause = f"{fit.who} ended the run ({fit.reason})" if fit.who else None
        if not self._columns["preds"].outputs:
            raise RuntimeError(f"no predictions: {cause or 'every batch was skipped'}")
        if self._joined is None:
            raise RuntimeError(
                f"get_preds() did not see all batches: {cause or 'its epoch was cancelled'}"
            )
        preds = tuple(self._joined[0].values()) if self._several else self._joined[0]
        return (preds, *self._joined[1:]) if len(self._joined) > 1 else preds


class _Collected:
    """The outputs of all batches so far, and the layouts that are possible for all of them."""

    def __init__(self, name: str, way_out: str) -> None:
        self.outputs: list[Any] = []
        self._name = name
        self._way_out = way_out
        self._layouts: Layouts | None = None

    def add(self, output: Any, n: int, guessed: bool) -> None:
        """Add the output of a batch of n samples.

        Raises:
            TypeError: it cannot be collected.
        """
        found = layouts_of(output, n) or (layouts_of(output, None) if guessed else ())
        if not found:
            why = why_not_collected(output, None if guessed else n, self._name)
            raise TypeError(f"get_preds cannot collect this: {why}; {self._way_out}")
        layouts = found if self._layouts is None else in_common(self._layouts, found)
        if not layouts:
            raise TypeError(
                f"get_preds cannot join {self._name} of batch {len(self.outputs)} with those"
                f" before: they are {described(output)}, and were {described(self.outputs[-1])};"
                f" {self._way_out}"
            )
        self._layouts = layouts
        # The host waits for the device here, once per batch: the predictions of a whole dataset
        # may not fit on it.
        self.outputs.append(map_tensors(output, _to_cpu))

    def join(self) -> Any:
        assert self._layouts is not None
        if is_ambiguous(self._layouts):
            log.warning(
                "predictions_are_a_guess",
                reason=f"{self._name} may be a container of columns, or one item per sample",
                hint="say which with keep=, a function of the predictions",
            )
        return join(self.outputs, self._layouts)


def _to_cpu(x: torch.Tensor) -> torch.Tensor:
    """A copy, which does not keep the memory of which `x` is a part; numpy has no bfloat16."""
    is_reduced = x.is_floating_point() and x.itemsize < 4
    return x.detach().to("cpu", torch.float32 if is_reduced else x.dtype, copy=True)


def _check_keep(keep: Keep) -> bool:
    """Raise unless it is a valid choice; return whether it is a choice of several parts."""
    if keep is None or _is_name(keep) or callable(keep):
        return False
    if not isinstance(keep, Sequence) or not all(map(_is_name, keep)):
        raise TypeError(f"keep={keep!r}: {_CHOOSE}")
    if not keep:
        raise ValueError(f"keep={keep!r} is empty: {_CHOOSE}")
    return True


def _is_name(keep: Any) -> bool:
    return isinstance(keep, str | int) and not isinstance(keep, bool)


def _kept(preds: Any, keep: Any) -> Any:
    """The part of the predictions that was asked for; several of them in a dict."""
    if keep is None:
        return preds
    if callable(keep):
        return keep(preds)
    if _is_name(keep):
        return _part(preds, keep)
    return {i: _part(preds, name) for i, name in enumerate(keep)}


def _part(preds: Any, name: str | int) -> Any:
    try:
        if isinstance(preds, Mapping) or isinstance(name, int):
            return preds[name]
        return getattr(preds, name)
    except (LookupError, TypeError, AttributeError):
        raise ValueError(
            f"keep={name!r}: there is no such part, because the predictions are {described(preds)}"
        ) from None

"""A context manager that restores the learner after a run on a validation loader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..data.dataloaders import DataLoaders
from .fittable import Fittable


@contextmanager
def validating_on(learner: Fittable, dl: Any) -> Iterator[None]:
    """Validate on `dl` if it is given; restore the loaders and the modes of the modules afterwards.

    Raises:
        ValueError: there is no loader to validate on.
    """
    dls = learner.dls
    modes = [(module, module.training) for module in learner.model.modules()]
    if dl is not None:
        learner.dls = DataLoaders(valid=dl)
    elif getattr(dls, "valid", None) is None:
        raise ValueError(
            "this needs a loader, but dls.valid is missing. Give DataLoaders a valid loader, or"
            " pass one here: dl=..."
        )
    try:
        yield
    finally:
        learner.dls = dls
        for module, training in modes:
            module.training = training

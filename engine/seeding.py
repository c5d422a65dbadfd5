"""Seeding of all global random states with one value."""

from __future__ import annotations

import os
import random
from contextlib import suppress

import torch

from ..events.checks import is_int


def seed_everything(seed: int, deterministic: bool = False) -> int:
    """Seed Python's `random`, numpy and torch with all of its devices.

    Call it first in a script, before the model is made. It does not seed separate generators
    (`torch.Generator`, `numpy.random.default_rng`, `random.Random`): seed those where they are
    made. The workers of a `DataLoader` do not need more: torch seeds them, including their numpy,
    from the loader's generator or else from the global one.

    Args:
        seed: the seed for all of them.
        deterministic: also make torch use only deterministic algorithms, which may be slower; an
            operation without one raises a RuntimeError. cuDNN no longer benchmarks algorithms to
            find the fastest. The environment variable `CUBLAS_WORKSPACE_CONFIG` is set to ":4096:8"
            unless it is set, which has an effect only before the process first uses CUDA. False
            leaves all of these as they are.

    Returns:
        The seed.

    Raises:
        ValueError: `seed` is not an integer from 0 to 2**32 - 1, the range that numpy accepts.

    Example:
        >>> import torch
        >>> from eventrain.engine import seed_everything
        >>> seed_everything(42)
        42
        >>> first = torch.rand(3)
        >>> _ = seed_everything(42)
        >>> torch.equal(torch.rand(3), first)
        True

    Source: Lightning's `seed_everything`; torch's page on reproducibility.
    """
    if not is_int(seed, 0) or seed >= 2**32:
        raise ValueError(f"seed={seed!r}: give an integer from 0 to 2**32 - 1")
    random.seed(seed)
    torch.manual_seed(seed)
    with suppress(ImportError):
        import numpy

        numpy.random.seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
    return seed

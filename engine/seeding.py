"""One seed for all global random states."""

from __future__ import annotations

import os
import random
from contextlib import suppress

import torch


def seed_everything(seed: int, deterministic: bool = False) -> int:
    """Seed Python's `random`, numpy and torch with all of its devices.

    Call it first in a script, before the model is made. It does not reach generators of one's
    own (`torch.Generator`, `numpy.random.default_rng`, `random.Random`): seed those where they
    are made. The workers of a `DataLoader` need nothing more: torch seeds them, numpy in them
    included, from the loader's generator or else from the global one.

    Args:
        seed: for all of them.
        deterministic: also have torch take deterministic algorithms only, which may be slower;
            an operation that has none raises a RuntimeError. cuDNN no longer tries out which
            algorithm is the fastest. And the environment's `CUBLAS_WORKSPACE_CONFIG` becomes
            ":4096:8" if it is not set, which counts only before the process first uses CUDA.
            False leaves all of these as they are.

    Returns:
        The seed.

    Raises:
        ValueError: `seed` is no whole number from 0 to 2**32 - 1, which is what numpy takes.

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
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed!r}: give a whole number from 0 to 2**32 - 1")
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

"""Random numbers of a dataset that is read by threads: one generator per sample."""

from __future__ import annotations

import random
import sys
from collections.abc import Hashable
from contextvars import ContextVar, Token
from hashlib import blake2b
from typing import Any, Self

import torch
from torch.overrides import TorchFunctionMode

_METHODS = (
    "bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_"
    " bernoulli multinomial"
)
_FUNCTIONS = (
    "bernoulli binomial multinomial normal poisson rand randint randn randperm"
    " rand_like randint_like randn_like _sample_dirichlet _standard_gamma"
)
_DRAWS = frozenset(
    [getattr(torch.Tensor, name) for name in _METHODS.split()]
    + [getattr(torch, name) for name in _FUNCTIONS.split()]
)
"""The functions of torch that draw random numbers, and can draw them from a given generator."""

_current: ContextVar[SampleRandom | None] = ContextVar("eventrain_sample_random", default=None)


def sample_generator() -> torch.Generator:
    """The random generator of the sample that is being read.

    A dataset that draws from it yields the same samples whatever the threads of a `ThreadLoader`
    do, in a resumed fit too. In a `ThreadLoader`, every sample has a generator of its own, on the
    CPU. Its seed depends on the place of the sample in the pass and on the seed of the pass, which
    is drawn as a DataLoader draws that of its workers: from the loader's `generator` or, without
    one, from torch's global generator. Functions of torch that are called without a generator draw
    from it, too. Elsewhere, this is torch's global generator.

    Other libraries need a seed: `torch.randint(2**63 - 1, (), generator=sample_generator())`.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from eventrain.engine import ThreadLoader
        >>> from torch.utils.data import Dataset
        >>> class Noisy(Dataset):
        ...     def __len__(self):
        ...         return 4
        ...     def __getitem__(self, index):
        ...         seed = torch.randint(2**63 - 1, (), generator=sample_generator())
        ...         return index + np.random.default_rng(int(seed)).normal()
        >>> _ = torch.manual_seed(0); two = torch.cat([*ThreadLoader(Noisy(), 2, num_threads=2)])
        >>> _ = torch.manual_seed(0); one = torch.cat([*ThreadLoader(Noisy(), 2, num_threads=1)])
        >>> torch.equal(one, two)
        True
    """
    current = _current.get()
    return torch.default_generator if current is None else current.generator


class SampleRandom(TorchFunctionMode):
    """While entered, torch's functions draw from the generator of a sample, in this thread.

    Args:
        seed: that of the pass over the dataset.

    Attributes:
        drawn: whether one of them has drawn without a generator of its own.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.drawn = False
        self._seed = seed
        self._place: tuple[Hashable, ...] = ()
        self._generator: torch.Generator | None = None

    def begin(self, *place: Hashable) -> None:
        """Begin a sample, at a place of the pass; its generator is made when it is needed."""
        self._place, self._generator = place, None

    @property
    def generator(self) -> torch.Generator:
        """The generator of the sample."""
        if self._generator is None:
            digest = blake2b(repr((self._seed, *self._place)).encode(), digest_size=8).digest()
            self._generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
        return self._generator

    def __enter__(self) -> Self:
        self._token: Token[SampleRandom | None] = _current.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: Any) -> None:
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        _current.reset(self._token)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DRAWS and kwargs.get("generator") is None and _is_on_cpu(args, kwargs):
            self.drawn = True
            kwargs = {**kwargs, "generator": self.generator}
        return func(*args, **kwargs)


def _is_on_cpu(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws on the CPU; each kind of device has generators of its own."""
    device = kwargs.get("device")
    if device is None:
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        device = tensors[0].device if tensors else torch.get_default_device()
    return torch.device(device).type == "cpu"


def global_states() -> dict[str, Any]:
    """The states of the global generators of torch, numpy and Python, which can be compared."""
    states: dict[str, Any] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "random": random.getstate(),
    }
    if numpy := sys.modules.get("numpy"):
        name, key, *rest = numpy.random.get_state()
        states["numpy"] = (name, key.tobytes(), *rest)
    return states

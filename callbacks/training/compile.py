"""torch.compile, for the length of a fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import count
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ...events import BeforeFit, Callback, CleanupFit


class CompileCB(Callback):
    """Compiles the model in place for the length of a fit, and gives it back as it was.

    Whoever calls `learner.model(...)` meanwhile runs compiled code, and need not know: it is the
    same object, with the same names in its `state_dict`, so that a checkpoint of a compiled run
    is resumed by one that is not, and the other way round. Methods of the model called by hand,
    `forward` too, are not compiled.

    What is met is compiled when it is met: training and validation make a graph each, and another
    shape, such as that of a last smaller batch, makes one for any size. The batch that meets it
    waits for that, seconds to minutes, and so does a `stop` or a cancellation. A further fit, of
    this model or of one that is like it, uses what is there; but AccelerateCB in mixed precision
    wraps the model anew in every fit, which is compiled anew. TorchScript runs as it is.

    Compiled code rounds differently, and its dropout draws other random numbers: a fit is close to
    one without it, and the same to the bit only with `backend="eager"`, which traces the model and
    runs it as it is. It need not be faster, so measure: on two CPU cores the post's CNN is slower.

    Args:
        backend: one of `torch.compiler.list_backends(exclude_tags=())`, or a function of a graph
            and example inputs. "inductor" needs a C++ compiler on the CPU, and triton and a C
            compiler on CUDA, and the headers of Python on both (g++ and python3-dev, say).
            "aot_eager" needs nothing, and is no faster: it tells whether a model can be compiled.
        mode: one of inductor's, such as "reduce-overhead" or "max-autotune". These two use CUDA
            graphs, which write the predictions of every batch to the same memory: clone what
            you keep.
        fullgraph: whether a model that makes several graphs is an error.
        dynamic: whether to make graphs for any size from the first batch on; False for never.
        options: of the backend, instead of a mode.

    Raises:
        ValueError: from the fit, where it has two of them.
        RuntimeError: of torch. Before the first batch where there is no such backend, mode or
            option; from the first batch where it lacks a compiler, or a graph cannot be made.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import CompileCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> batches = [(torch.ones(2, 3), torch.zeros(2, 1))] * 4
        >>> learner = TrainLearner(torch.nn.Linear(3, 1), DataLoaders(batches, batches))
        >>> learner.run(2, cbs=CompileCB("aot_eager")).steps
        8

    Source: `torch.compile` and `nn.Module.compile`.
    """

    order = 65  # after DeviceCB (-20) and AccelerateCB (60): compiled is what they have made

    def __init__(
        self,
        backend: str | Callable[..., Any] = "inductor",
        *,
        mode: str | None = None,
        fullgraph: bool = False,
        dynamic: bool | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.mode = mode
        self.fullgraph = fullgraph
        self.dynamic = dynamic
        self.options = options
        self._give_back: Callable[[], None] | None = None

    def before_fit(self, event: BeforeFit) -> None:
        if sum(isinstance(cb, CompileCB) for cb in event.learner.cbs) > 1:
            raise ValueError(
                "this fit has two CompileCBs, and a model is compiled once: remove one"
            )
        model = event.learner.model
        if isinstance(model, DistributedDataParallel):
            model = model.module  # torch knows that it runs inside the other
        settings: dict[str, Any] = {
            "backend": self.backend,
            "mode": self.mode,
            "fullgraph": self.fullgraph,
            "dynamic": self.dynamic,
            "options": None if self.options is None else dict(self.options),  # it takes some out
        }
        call = torch.compile(_caller_of(model, settings), **settings)
        self._give_back = partial(setattr, model, _CALL, getattr(model, _CALL))
        setattr(model, _CALL, call)

    def cleanup_fit(self, event: CleanupFit) -> None:
        if self._give_back is not None:
            self._give_back()
            self._give_back = None


_CALL = "_compiled_call_impl"
"""Where `nn.Module.compile` puts what `model(...)` runs; copies and pickles go without it."""


def _caller_of(model: nn.Module, settings: dict[str, Any]) -> Callable[..., Any]:
    """A function that calls the model, with a code object for models of its kind.

    torch keeps what it has compiled with the code object: eight graphs, and then it goes on
    without compiling; and a size that has varied is variable from then on. With `model.compile()`
    all models of a process have the same one, and the fourth kind is not compiled any more.
    """
    call: Callable[..., Any] = model._call_impl

    def call_model(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    parameters = [(p.shape, p.dtype, p.requires_grad) for p in model.parameters() if not is_lazy(p)]
    # What stands in place of the class's `forward`, as accelerate's wrapper does, is new in each
    # fit: no graph of the last one is right for it, and each counts.
    once = next(_numbers) if "forward" in vars(model) else None
    kind = (repr(settings), repr(model), *map(type, model.modules()), *parameters, once)
    call_model.__code__ = _code_of(call_model.__code__, kind)
    return call_model


_numbers = count()


@lru_cache
def _code_of(code: CodeType, kind: tuple[Any, ...]) -> CodeType:
    """With a name of its own: by that torch knows which sizes have varied."""
    return code.replace(co_name=f"{code.co_name}_{next(_numbers)}")

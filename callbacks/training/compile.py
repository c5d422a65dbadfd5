"""torch.compile, for the duration of a fit."""

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
    """Compiles the model in place for the duration of a fit, and restores it afterwards.

    During the fit, `learner.model(...)` runs compiled code. The model is the same object, with the
    same names in its `state_dict`, so a run without CompileCB can resume from a checkpoint of a
    run with it, and the other way round. Methods of the model that are called directly, such as
    `forward`, are not compiled.

    Compilation is lazy: training and validation compile one graph each, and the first other shape,
    such as that of a smaller last batch, compiles one for any size. The batch that needs a graph
    waits for it, seconds to minutes, and so does a `stop` or a cancellation. A further fit of this
    model, or of one like it, reuses the graphs; but AccelerateCB in mixed precision wraps the model
    in every fit, which is then compiled again. TorchScript modules run as they are.

    Compiled code rounds differently, and its dropout draws other random numbers: a fit is close to
    one without it, and bit-identical only with `backend="eager"`, which traces the model and runs
    it unchanged. It is not always faster, so measure: on two CPU cores the post's CNN is slower.

    Args:
        backend: one of `torch.compiler.list_backends(exclude_tags=())`, or a function of a graph
            and example inputs. "inductor" needs a C++ compiler on the CPU, triton and a C compiler
            on CUDA, and the headers of Python on both (for example, g++ and python3-dev).
            "aot_eager" needs none of these and is not faster: use it to find out whether a model
            can be compiled.
        mode: a mode of inductor, such as "reduce-overhead" or "max-autotune". These two use CUDA
            graphs, which write the predictions of every batch to the same memory: clone those
            that you keep.
        fullgraph: whether a model that needs several graphs is an error.
        dynamic: True compiles graphs for any size from the first batch on, False never does.
        options: options of the backend, instead of a mode.

    Raises:
        ValueError: in the fit, if it has two CompileCBs.
        RuntimeError: raised by torch: before the first batch if the backend, mode or option is
            unknown; in the first batch if a compiler is missing or a graph cannot be compiled.

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

    order: float = 65  # after DeviceCB (-20) and AccelerateCB (60), which move and wrap the model

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
        self._restore: Callable[[], None] | None = None

    def before_fit(self, event: BeforeFit) -> None:
        if sum(isinstance(cb, CompileCB) for cb in event.learner.cbs) > 1:
            raise ValueError(
                "this fit has two CompileCBs, and a model is compiled once: remove one"
            )
        model = event.learner.model
        if isinstance(model, DistributedDataParallel):
            model = model.module  # torch detects that it runs inside the wrapper
        settings: dict[str, Any] = {
            "backend": self.backend,
            "mode": self.mode,
            "fullgraph": self.fullgraph,
            "dynamic": self.dynamic,
            "options": None if self.options is None else dict(self.options),  # torch removes some
        }
        call = torch.compile(_caller_of(model, settings), **settings)
        self._restore = partial(setattr, model, _CALL, getattr(model, _CALL))
        setattr(model, _CALL, call)

    def cleanup_fit(self, event: CleanupFit) -> None:
        if self._restore is not None:
            self._restore()
            self._restore = None


_CALL = "_compiled_call_impl"
"""Where `nn.Module.compile` puts what `model(...)` runs; copies and pickles leave it out."""


def _caller_of(model: nn.Module, settings: dict[str, Any]) -> Callable[..., Any]:
    """A function that calls the model, with a code object for models of its kind.

    torch keeps its graphs per code object: after eight of them it runs without compiling, and a
    size that has varied once is variable from then on. With `model.compile()`, all models of a
    process share one code object, and the fourth kind of model is no longer compiled.
    """
    call: Callable[..., Any] = model._call_impl

    def call_model(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    parameters = [(p.shape, p.dtype, p.requires_grad) for p in model.parameters() if not is_lazy(p)]
    # A `forward` of the instance, such as accelerate's wrapper, is new in each fit: no graph of
    # the fit before is valid for it, and each would count.
    once = next(_numbers) if "forward" in vars(model) else None
    kind = (repr(settings), repr(model), *map(type, model.modules()), *parameters, once)
    call_model.__code__ = _code_of(call_model.__code__, kind)
    return call_model


_numbers = count()


@lru_cache
def _code_of(code: CodeType, kind: tuple[Any, ...]) -> CodeType:
    """A copy of `code` with a name of its own: torch stores by name which sizes have varied."""
    return code.replace(co_name=f"{code.co_name}_{next(_numbers)}")

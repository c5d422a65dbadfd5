"""A table of the model's layers, as called in one batch of the fit."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode
from torch.utils.flop_counter import flop_registry

from ...events import AfterPredict, BeforeBatch, BeforeFit, Callback, CleanupBatch, CleanupFit


@dataclass(frozen=True, slots=True)
class LayerSummary:
    """One row: a module without children, or one with parameters or multiply-adds of its own.

    Attributes:
        name: its name in the model, "" for the model itself.
        type: its class.
        output_shape: the shape of its last output: a tuple of ints for a tensor, a tuple or dict
            of these for several tensors; None if it was not called.
        params: the number of elements of its parameters, without those of its children. A
            parameter that several modules share is counted for the first of them.
        trainable_params: the number of those that require grad.
        multiply_adds: the sum over all its calls, without those of its children.
        calls: the number of its calls.
    """

    name: str
    type: str
    output_shape: Any
    params: int
    trainable_params: int
    multiply_adds: int
    calls: int


class SummaryCB(Callback):
    """Prints the model's layers: output shapes, parameters and multiply-adds, once per fit.

    Not in runs of `validate`, `get_preds` and `lr_find`.

    It records the first batch of the fit, training or validating, that has predictions; it makes
    no forward pass of its own. A layer called several times is listed once, as "Linear x2", with
    the multiply-adds of all its calls. Matrix products, convolutions and attention are counted, as
    `torch.utils.flop_counter` does, without the bias. It has no formula for fused recurrent layers
    (`nn.LSTM`), which count as 0, nor for code under `torch.inference_mode`. Layers inside a module
    compiled by `torch.compile` are listed with their parameters only. An
    `nn.TransformerEncoderLayer` does not take its fast path in the recorded batch, which may
    change the last bits of that batch in a fit that only validates.

    Args:
        file: the file to print to; by default the standard output at that time.

    Attributes:
        rows: a LayerSummary for each layer, in the order of `model.named_modules()`; empty
            before the first batch.
        total_params, trainable_params, multiply_adds: their sums.

    Example:
        >>> import torch
        >>> from eventrain.callbacks import SummaryCB
        >>> from eventrain.engine import DataLoaders, TrainLearner
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Linear(8, 1))
        >>> learner = TrainLearner(model, DataLoaders([(torch.ones(2, 3), torch.zeros(2, 1))]))
        >>> result = learner.run(valid=False, cbs=SummaryCB())
        layer  type    output  parameters  trainable  multiply-adds
        0      Linear  (2, 8)          32         32             48
        1      Linear  (2, 1)           9          9             16
        total                          41         41             64

    Source: fastai's `Learner.summary`; the counts are those of PyTorch's `FlopCounterMode`.
    """

    order: float = 90  # after callbacks that change the model or the batch
    in_extra_validation = False

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self.rows: tuple[LayerSummary, ...] = ()
        self._done = False
        self._watch: _Watch | None = None

    @property
    def total_params(self) -> int:
        """The number of elements of all parameters."""
        return sum(row.params for row in self.rows)

    @property
    def trainable_params(self) -> int:
        """The number of elements of the parameters that require grad."""
        return sum(row.trainable_params for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward pass of the batch."""
        return sum(row.multiply_adds for row in self.rows)

    def before_fit(self, event: BeforeFit) -> None:
        self._done = event.purpose != "fit"

    def before_batch(self, event: BeforeBatch) -> None:
        if not self._done:
            self._watch = _Watch(event.learner.model)

    def after_predict(self, event: AfterPredict) -> None:
        if self._watch is None:
            return
        watch = self._watch
        self._release()
        self.rows = tuple(watch.rows())
        self._done = True
        print(self, file=self.file)

    def cleanup_batch(self, event: CleanupBatch) -> None:
        self._release()

    def cleanup_fit(self, event: CleanupFit) -> None:
        self._release()

    def _release(self) -> None:
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def __str__(self) -> str:
        if not self.rows:
            return "no batch seen yet"
        header = ("layer", "type", "output", "parameters", "trainable", "multiply-adds")
        table: list[tuple[str, ...]] = [header]
        for row in self.rows:
            times = f" x{row.calls}" if row.calls > 1 else ""
            shape = "-" if row.output_shape is None else str(row.output_shape)
            numbers = _numbers(row.params, row.trainable_params, row.multiply_adds)
            table.append((row.name or "(model)", row.type + times, shape, *numbers))
        totals = _numbers(self.total_params, self.trainable_params, self.multiply_adds)
        table.append(("total", "", "", *totals))
        return "\n".join(_aligned(table))


class _Watch(TorchDispatchMode):
    """Records the calls of the modules of one model in one thread, until it is closed.

    It is not `FlopCounterMode`, which sets hooks on all modules of the process, also those of other
    fits, decomposes composite operations (a dropout in inference mode then has other random
    numbers), and runs compiled code eagerly. This one changes nothing, and is active only while a
    module of the model runs.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise compiled code would run eagerly in the recorded batch

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._thread = threading.get_ident()
        self._running: list[nn.Module] = []
        self._calls: Counter[nn.Module] = Counter()
        self._flops: Counter[nn.Module] = Counter()
        self._shapes: dict[nn.Module, Any] = {}
        # With hooks, compiled modules would be compiled again, and once more without them.
        compiled = {p for module in model.modules() if _compiled(module) for p in module.modules()}
        self._hooks = [
            hook
            for module in model.modules()
            if module not in compiled
            for hook in (
                module.register_forward_pre_hook(self._enter_module),
                module.register_forward_hook(self._leave_module),
            )
        ]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self._running:  # an exception came through the model
            self._running.clear()
            _pop_mode()

    def rows(self) -> Iterator[LayerSummary]:
        counted: set[nn.Parameter] = set()
        for name, module in self._model.named_modules():
            own = set(module.parameters(recurse=False))
            if not own and not self._flops[module] and any(True for _ in module.children()):
                continue
            new = [p for p in own - counted if not is_lazy(p)]
            counted |= own
            yield LayerSummary(
                name,
                type(module).__name__,
                self._shapes.get(module),
                sum(p.numel() for p in new),
                sum(p.numel() for p in new if p.requires_grad),
                self._flops[module] // 2,
                self._calls[module],
            )

    def _is_ours(self) -> bool:
        """Whether to record. Not while tracing, as the compiled code would keep the hook for good,
        and not in another thread that shares the model."""
        return not torch.compiler.is_compiling() and threading.get_ident() == self._thread

    def _enter_module(self, module: nn.Module, inputs: object) -> None:
        if self._is_ours():
            if not self._running:
                # Not `with self`: that saves and restores flags of the whole process, which
                # concurrent fits would restore wrongly. The stack of modes is per thread.
                _push_mode(self)
            self._running.append(module)

    def _leave_module(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self._is_ours() or not self._running:
            return
        while self._running.pop() is not module:
            pass  # it raised, and its parent caught that
        self._calls[module] += 1
        self._shapes[module] = _shape(output)
        if not self._running:
            _pop_mode()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        formula = flop_registry.get(getattr(func, "overloadpacket", func))
        if formula is not None:
            with suppress(Exception):  # a formula may not know such operands
                self._flops[self._running[-1]] += formula(*args, **kwargs, out_val=out)
        return out


def _compiled(module: nn.Module) -> bool:
    """Whether it is compiled, by `module.compile()` or by `torch.compile(module)`."""
    return module._compiled_call_impl is not None or "_orig_mod" in module._modules


def _shape(output: object) -> Any:
    if isinstance(output, torch.Tensor):
        try:
            return tuple(output.shape)
        except RuntimeError:  # a nested tensor has none
            return None
    if isinstance(output, Mapping):
        return {key: _shape(value) for key, value in output.items()}
    if isinstance(output, tuple | list):
        return tuple(_shape(value) for value in output)
    return None


def _numbers(*numbers: int) -> tuple[str, ...]:
    return tuple(f"{number:,}" for number in numbers)


def _aligned(table: list[tuple[str, ...]]) -> Iterable[str]:
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        texts = [cell.ljust(w) for cell, w in zip(cells[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(w) for cell, w in zip(cells[3:], widths[3:], strict=True)]
        yield "  ".join(texts + numbers)

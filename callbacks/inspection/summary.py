"""A table of the model's layers, seen in one real batch."""

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
    """One row: a module without children, or one that has parameters or work of its own.

    Attributes:
        name: its name in the model, "" for the model itself.
        type: its class.
        output_shape: of its last call: a tuple of ints for a tensor, a tuple or dict of such
            where it returns several; None if it was not called.
        params: numbers in its parameters, without those of its children. One that several
            modules share is counted at the first.
        trainable_params: those of them that require grad.
        multiply_adds: of all its calls together, without those of its children.
        calls: how often it was called.
    """

    name: str
    type: str
    output_shape: Any
    params: int
    trainable_params: int
    multiply_adds: int
    calls: int


class SummaryCB(Callback):
    """Prints the model's layers: output shapes, parameters and multiply-adds, once a fit.

    It watches the first batch of the fit, training or validating, that gets as far as its
    predictions; there is no forward pass of its own. A layer called several times is listed
    once, as "Linear x2", with the multiply-adds of all its calls. Counted are matrix products,
    convolutions and attention, in the way of `torch.utils.flop_counter`, without the bias; it
    has no formula for fused recurrent layers (`nn.LSTM`), which count as 0, nor for what runs
    under `torch.inference_mode`. The layers in what `torch.compile` has compiled are listed
    with their parameters alone. An `nn.TransformerEncoderLayer` does not take its fast path
    while it is watched, which may change the last bits of one batch of a fit that only
    validates.

    Args:
        file: where to print to; standard output, as it is then, by default.

    Attributes:
        rows: a LayerSummary for each layer, in the order of `model.named_modules()`; none
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

    order = 90  # after whatever changes the model or the batch

    def __init__(self, file: TextIO | None = None) -> None:
        self.file = file
        self.rows: tuple[LayerSummary, ...] = ()
        self._done = False
        self._watch: _Watch | None = None

    @property
    def total_params(self) -> int:
        """Numbers in all parameters."""
        return sum(row.params for row in self.rows)

    @property
    def trainable_params(self) -> int:
        """Numbers in the parameters that require grad."""
        return sum(row.trainable_params for row in self.rows)

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of the forward pass of the batch."""
        return sum(row.multiply_adds for row in self.rows)

    def before_fit(self, event: BeforeFit) -> None:
        self._done = False

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
    """Records what the modules of one model do in one thread, until it is closed.

    Not `FlopCounterMode`: that sets hooks on all modules of the process, those of other fits
    too, replaces composite operations by their parts (other random numbers for a dropout in
    inference mode), and runs eagerly what was compiled. This one only looks, while a module
    of the model runs.
    """

    supports_higher_order_operators = True

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # otherwise what is compiled would run eagerly while we watch

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._thread = threading.get_ident()
        self._running: list[nn.Module] = []
        self._calls: Counter[nn.Module] = Counter()
        self._flops: Counter[nn.Module] = Counter()
        self._shapes: dict[nn.Module, Any] = {}
        # With hooks it would be compiled anew, and once more when they are gone.
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
        """Not while tracing: the compiled code would keep the hook for good. And a model may
        be shared with another thread."""
        return not torch.compiler.is_compiling() and threading.get_ident() == self._thread

    def _enter_module(self, module: nn.Module, inputs: object) -> None:
        if self._is_ours():
            if not self._running:
                # Not `with self`: that saves and restores flags of the whole process, which
                # fits at the same time would leave in disorder. The stack is the thread's.
                _push_mode(self)
            self._running.append(module)

    def _leave_module(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self._is_ours() or not self._running:
            return
        while self._running.pop() is not module:
            pass  # one that raised, where its parent caught it
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
            with suppress(Exception):  # no formula for such operands: no reason to end the fit
                self._flops[self._running[-1]] += formula(*args, **kwargs, out_val=out)
        return out


def _compiled(module: nn.Module) -> bool:
    """Whether by `module.compile()`, or as what `torch.compile(module)` returns."""
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

"""SummaryCB: the table of the layers, from one real batch."""

from __future__ import annotations

import io
import itertools
import math
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import LayerSummary, SingleBatchCB, SummaryCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import (
    AfterPredict,
    BeforeBatch,
    Callback,
    CancelBatchException,
    CancelEpochException,
    CancelFitException,
    CleanupBatch,
    Predict,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils.flop_counter import FlopCounterMode

from tests.support.waiting import GUARD

Backend = dict[str, Any]


def hooks_of(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def summarise(model: nn.Module, *shape: int, train: bool = True) -> SummaryCB:
    """The summary of one batch of ones of this shape."""
    summary, hooks = SummaryCB(io.StringIO()), hooks_of(model)
    batches = [(torch.ones(shape), torch.zeros(()))]
    learner = TrainLearner(
        model, DataLoaders(batches, batches), lambda preds, _: as_scalar(preds), lr=0.0
    )
    learner.run(train=train, valid=not train, cbs=summary)
    assert hooks_of(model) <= hooks  # lazy layers had hooks of their own
    return summary


def as_scalar(preds: Any) -> torch.Tensor:
    if isinstance(preds, torch.Tensor):
        return preds.sum()
    values = preds.values() if isinstance(preds, dict) else preds
    return torch.stack([as_scalar(value) for value in values]).sum()


def test_the_cnn_of_the_post_is_counted_as_by_hand(
    make_cnn: Callable[[], nn.Module], backend: Backend, capsys: pytest.CaptureFixture[str]
) -> None:
    batch = (torch.zeros(64, 1, 28, 28), torch.zeros(64, dtype=torch.long))
    learner = TrainLearner(
        make_cnn(), DataLoaders([batch] * 2, [batch]), nn.functional.cross_entropy
    )
    summary = SummaryCB()
    assert str(summary) == "no batch seen yet"
    learner.run(1, cbs=[summary, SingleBatchCB()], **backend)

    # A 3x3 kernel has 9 weights for each of its input channels, and one bias for each output;
    # each output pixel takes one multiply-add a weight. Images shrink by 2: 28, 26, 24, 22.
    layers = [
        ("0", "Conv2d", (64, 8, 26, 26), 8 * (1 * 9 + 1), 64 * 26 * 26 * 8 * 1 * 9),
        ("1", "ReLU", (64, 8, 26, 26), 0, 0),
        ("2", "Conv2d", (64, 16, 24, 24), 16 * (8 * 9 + 1), 64 * 24 * 24 * 16 * 8 * 9),
        ("3", "ReLU", (64, 16, 24, 24), 0, 0),
        ("4", "Conv2d", (64, 32, 22, 22), 32 * (16 * 9 + 1), 64 * 22 * 22 * 32 * 16 * 9),
        ("5", "ReLU", (64, 32, 22, 22), 0, 0),
        ("6", "AdaptiveAvgPool2d", (64, 32, 1, 1), 0, 0),
        ("7", "Flatten", (64, 32), 0, 0),
        ("8", "Linear", (64, 10), 10 * (32 + 1), 64 * 10 * 32),
    ]
    assert summary.rows == tuple(
        LayerSummary(name, kind, shape, params, params, multiply_adds, 1)
        for name, kind, shape, params, multiply_adds in layers
    )
    assert summary.total_params == summary.trainable_params == 80 + 1168 + 4640 + 330
    assert summary.multiply_adds == 3_115_008 + 42_467_328 + 142_737_408 + 20_480
    assert capsys.readouterr().out == f"{summary}\n"
    assert str(summary) == (
        "layer  type               output            parameters  trainable  multiply-adds\n"
        "0      Conv2d             (64, 8, 26, 26)           80         80      3,115,008\n"
        "1      ReLU               (64, 8, 26, 26)            0          0              0\n"
        "2      Conv2d             (64, 16, 24, 24)       1,168      1,168     42,467,328\n"
        "3      ReLU               (64, 16, 24, 24)           0          0              0\n"
        "4      Conv2d             (64, 32, 22, 22)       4,640      4,640    142,737,408\n"
        "5      ReLU               (64, 32, 22, 22)           0          0              0\n"
        "6      AdaptiveAvgPool2d  (64, 32, 1, 1)             0          0              0\n"
        "7      Flatten            (64, 32)                   0          0              0\n"
        "8      Linear             (64, 10)                 330        330         20,480\n"
        "total                                            6,218      6,218    188,340,224"
    )


@settings(max_examples=20)
@given(
    batch=st.integers(1, 5),
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    frozen=st.integers(0, 3),
)
def test_a_stack_of_lines_takes_inputs_times_outputs_a_sample(
    batch: int, widths: list[int], frozen: int
) -> None:
    lines = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    for line in lines[: min(frozen, len(lines) - 1)]:
        line.requires_grad_(False)
    model = nn.Sequential(*lines)
    summary = summarise(model, batch, widths[0])
    assert [(row.output_shape, row.multiply_adds) for row in summary.rows] == [
        ((batch, line.out_features), batch * line.in_features * line.out_features) for line in lines
    ]
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    assert summary.trainable_params == sum(p.numel() for p in model.parameters() if p.requires_grad)


class Tangle(nn.Module):
    """Calls one layer twice, ties a weight, and has a parameter and products of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.twice = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.twice.weight
        self.again = self.twice
        self.idle = nn.Linear(6, 2)
        self.parts = nn.ModuleDict({"act": nn.Tanh()})

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        x, weights = self.attention(x, x, x)
        y = self.twice(self.twice(x) * self.scale)
        return {"y": self.tied(y), "more": [y @ y.mT, (self.parts["act"](weights),)]}


def test_shared_nested_and_unused_modules_are_listed_once_and_counted_once() -> None:
    model = Tangle()
    summary = summarise(model, 2, 5, 6)
    square = 2 * 5 * 6 * 6  # multiply-adds of one 6x6 layer on (2, 5, 6)
    heads = 2 * 2 * 5 * 5 * 3  # of one product over 2 heads of width 3 on (2, 5, 6)
    assert summary.rows == (
        LayerSummary(
            "",
            "Tangle",
            {"y": (2, 5, 6), "more": ((2, 5, 5), ((2, 5, 5),))},
            6,
            6,
            2 * 5 * 5 * 6,
            1,
        ),
        # Four projections, the scores and their product with the values: all of its own, for
        # it uses the weight of its child without calling it.
        LayerSummary(
            "attention",
            "MultiheadAttention",
            ((2, 5, 6), (2, 5, 5)),
            3 * 6 * 6 + 3 * 6,
            3 * 6 * 6 + 3 * 6,
            4 * square + 2 * heads,
            1,
        ),
        LayerSummary("attention.out_proj", "NonDynamicallyQuantizableLinear", None, 42, 42, 0, 0),
        LayerSummary("twice", "Linear", (2, 5, 6), 42, 42, 2 * square, 2),
        LayerSummary("tied", "Linear", (2, 5, 6), 6, 6, square, 1),
        LayerSummary("idle", "Linear", None, 14, 14, 0, 0),
        LayerSummary("parts.act", "Tanh", (2, 5, 5), 0, 0, 0, 1),
    )
    assert summary.total_params == sum(p.numel() for p in model.parameters())
    lines = str(summary).splitlines()
    assert lines[1].startswith("(model)  ")
    assert lines[3].split()[:3] == ["attention.out_proj", "NonDynamicallyQuantizableLinear", "-"]
    assert lines[4].split()[:3] == ["twice", "Linear", "x2"]
    with FlopCounterMode(display=False) as counter:
        model(torch.ones(2, 5, 6))
    assert summary.multiply_adds == counter.get_total_flops() // 2


class Odd(nn.Module):
    """Has a lazy layer it calls and one it does not, a failing child, and a nested tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.LazyLinear(2)
        self.unused = nn.LazyLinear(2)
        self.fails = nn.Linear(7, 2)
        self.ragged = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        try:
            x = self.fails(x)
        except RuntimeError:
            ragged = torch.nested.nested_tensor([x[:1], x[1:]])
            self.ragged(ragged)
            torch.bmm(ragged, ragged.transpose(1, 2))
        return self.used(x)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_odd_modules_do_not_end_the_fit() -> None:
    summary = summarise(Odd(), 4, 3, train=False)
    assert summary.rows == (
        LayerSummary("used", "Linear", (4, 2), 8, 8, 4 * 3 * 2, 1),
        LayerSummary("unused", "LazyLinear", None, 0, 0, 0, 0),
        LayerSummary("fails", "Linear", None, 16, 16, 0, 0),
        LayerSummary("ragged", "Linear", None, 8, 8, 0, 1),
    )


def test_a_model_that_is_one_layer_is_one_row() -> None:
    summary = summarise(nn.Linear(3, 1), 4, 3)
    assert summary.rows == (LayerSummary("", "Linear", (4, 1), 4, 4, 12, 1),)


def test_a_validating_fit_is_summarised_too(dls: DataLoaders, backend: Backend) -> None:
    summary = SummaryCB(io.StringIO())
    TrainLearner(nn.Linear(3, 1), dls).run(train=False, cbs=summary, **backend)
    assert summary.multiply_adds == 12


def test_it_is_printed_once_a_fit_and_anew_in_the_next(
    dls: DataLoaders, make_batches: Callable[..., Any]
) -> None:
    out = io.StringIO()
    summary = SummaryCB(out)
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=summary)
    learner.run(2)
    first = str(summary)
    assert out.getvalue() == f"{first}\n"
    learner.dls = DataLoaders(make_batches(1, size=7))
    learner.run(valid=False)
    assert "(7, 1)" in str(summary)
    assert out.getvalue() == f"{first}\n{summary}\n"


@pytest.mark.parametrize("cancel", [CancelBatchException, CancelEpochException])
def test_the_first_batch_that_gets_to_its_predictions_is_the_one(
    dls: DataLoaders, backend: Backend, cancel: type[BaseException]
) -> None:
    hooks: list[int] = []
    summary = SummaryCB(io.StringIO())
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=summary)

    @learner.on(BeforeBatch, order=95, once=True)
    def skip(event: BeforeBatch) -> None:
        hooks.append(hooks_of(learner.model))
        raise cancel

    @learner.on(CleanupBatch, order=95)
    def look(event: CleanupBatch) -> None:
        hooks.append(hooks_of(learner.model))
        if event.iter == 0 and event.training:
            assert summary.rows == ()

    learner.run(1, **backend)
    assert hooks[:2] == [2, 0]
    assert set(hooks[2:]) == {0}
    assert summary.rows == (LayerSummary("", "Linear", (4, 1), 4, 4, 12, 1),)


class Leaves(nn.Module):
    def __init__(self, error: BaseException) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)
        self.error = error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.line(x)
        raise self.error


@pytest.mark.parametrize("error", [CancelFitException("enough"), ValueError("broken")])
def test_nothing_is_left_behind_when_the_forward_pass_is_left(
    dls: DataLoaders, backend: Backend, error: BaseException
) -> None:
    """G9: hooks removed and no mode left on, in the thread and in the process."""
    summary = SummaryCB(io.StringIO())
    learner = TrainLearner(Leaves(error), dls, cbs=summary)
    modes: list[int] = []

    @learner.on(CleanupBatch, order=95)
    def look(event: CleanupBatch) -> None:
        modes.append(torch._C._len_torch_dispatch_stack())

    if isinstance(error, ValueError):
        with pytest.raises(ValueError, match="broken"):
            learner.run(1, **backend)
    else:
        assert learner.run(1, **backend).reason == "enough"
    assert modes == [0]
    assert hooks_of(learner.model) == 0
    assert summary.rows == ()
    assert str(summary) == "no batch seen yet"


def test_training_is_the_same_to_the_bit_with_a_summary(backend: Backend) -> None:
    """G11: also with random numbers in the model and statistics of the batch."""

    def weights(*cbs: Callback) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        model = nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.Dropout(), nn.Flatten(), nn.Linear(16, 1)
        )
        batches = [(torch.randn(5, 2, 6), torch.randn(5, 1)) for _ in range(3)]
        TrainLearner(model, DataLoaders(batches, batches), cbs=cbs).run(2, **backend)
        return model.state_dict() | {"next random number": torch.rand(1)}

    plain, watched = weights(), weights(SummaryCB(io.StringIO()))
    assert plain.keys() == watched.keys()
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


def test_another_thread_that_uses_the_model_meanwhile_is_not_counted(dls: DataLoaders) -> None:
    """G10: the hooks are this model's alone, and listen to this fit's thread alone."""
    summary = SummaryCB(io.StringIO())
    learner = TrainLearner(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1)), dls, cbs=summary)
    elsewhere = nn.Linear(3, 1)
    outputs: list[torch.Tensor] = []

    def use() -> None:
        outputs.append(learner.model(torch.ones(9, 3)))
        outputs.append(elsewhere(torch.ones(9, 3)))

    @learner.on(BeforeBatch, order=95, once=True)
    def beside(event: BeforeBatch) -> None:
        assert hooks_of(learner.model) == 6
        assert hooks_of(elsewhere) == 0
        assert not nn.modules.module._global_forward_hooks
        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    learner.run(1)
    assert len(outputs) == 2
    assert [(row.output_shape, row.calls) for row in summary.rows] == [((4, 3), 1), ((4, 1), 1)]


class Meets(nn.Module):
    """Waits in its forward pass for the one of another fit, once on the way in and once out."""

    def __init__(self, width: int, barrier: threading.Barrier) -> None:
        super().__init__()
        self.line = nn.Linear(3, width)
        self.barrier = barrier

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.barrier.wait(GUARD)
        x = self.line(x)
        self.barrier.wait(GUARD)
        return x.sum(1, keepdim=True)


async def test_two_fits_at_the_same_time_count_their_own(make_batches: Callable[..., Any]) -> None:
    """G10: two summaries whose forward passes overlap."""
    barrier = threading.Barrier(2)
    summaries = [SummaryCB(io.StringIO()), SummaryCB(io.StringIO())]
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            for summary, width in zip(summaries, (2, 5), strict=True):
                learner = TrainLearner(
                    Meets(width, barrier), DataLoaders(make_batches(2)), cbs=summary
                )
                tasks.start_soon(learner.fit, 1, True, False)
    assert [summary.rows for summary in summaries] == [
        (LayerSummary("line", "Linear", (4, width), 4 * width, 4 * width, 12 * width, 1),)
        for width in (2, 5)
    ]
    assert not is_in_torch_dispatch_mode()


@pytest.mark.parametrize("in_place", [True, False])
def test_a_summary_does_not_change_what_is_compiled(dls: DataLoaders, in_place: bool) -> None:
    torch._dynamo.reset()
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    def compiled() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))
        if in_place:
            model.compile(backend=backend, fullgraph=True)
            return model
        return torch.compile(model, backend=backend, fullgraph=True)

    plain, watched = compiled(), compiled()
    TrainLearner(plain, dls).run(1, valid=False)
    without = graphs.copy()
    graphs.clear()
    torch._dynamo.reset()
    summary = SummaryCB(io.StringIO())
    TrainLearner(watched, dls).run(1, valid=False, cbs=summary)
    assert graphs == without
    assert all(map(torch.equal, plain.parameters(), watched.parameters()))
    assert [(row.output_shape, row.params, row.calls) for row in summary.rows] == [
        (None, 16, 0),
        (None, 0, 0),
        (None, 5, 0),
    ]
    torch._dynamo.reset()


def test_a_layer_inside_a_compiled_function_is_traced_without_its_hook(dls: DataLoaders) -> None:
    torch._dynamo.reset()
    calls = []

    def backend(graph: Any, inputs: Any) -> Any:
        ops = [node.op for node in graph.graph.nodes]
        calls.append([op for op in ops if op.startswith("call")])
        return graph.forward

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(3, 4)
            self.two = nn.Linear(4, 1)
            self.inner = torch.compile(
                lambda x: self.one(x).relu(), backend=backend, fullgraph=True
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(self.inner(x))

    summary = SummaryCB(io.StringIO())
    TrainLearner(Half(), dls).run(1, valid=False, cbs=summary)
    assert calls  # and each time the line and its relu, in one graph
    assert all(ops == ["call_function", "call_method"] for ops in calls)
    by_name = {row.name: row for row in summary.rows}
    assert by_name["one"].output_shape is None
    assert by_name["two"] == LayerSummary("two", "Linear", (4, 1), 5, 5, 16, 1)
    torch._dynamo.reset()


def test_the_model_and_the_batch_are_those_that_other_callbacks_made(dls: DataLoaders) -> None:
    class Replace(Callback):
        order = 80

        def before_batch(self, event: BeforeBatch) -> None:
            if event.iter == 0:
                event.learner.model = nn.Sequential(event.learner.model, nn.Linear(1, 2))
            x, y = event.learner.batch
            event.learner.batch = (torch.cat([x, x]), torch.cat([y, y]).expand(-1, 2))

    summary = SummaryCB(io.StringIO())
    TrainLearner(nn.Linear(3, 1), dls, cbs=[summary, Replace()]).run(1, valid=False)
    assert [(row.name, row.output_shape) for row in summary.rows] == [
        ("0", (8, 1)),
        ("1", (8, 2)),
    ]


def test_only_the_work_of_the_model_is_counted(dls: DataLoaders) -> None:
    summary = SummaryCB(io.StringIO())
    learner = TrainLearner(nn.Linear(3, 1), dls, cbs=summary)

    @learner.on(Predict)
    def predict(event: Predict) -> None:
        learner.preds = learner.model(learner.batch[0]) @ torch.ones(1, 50) @ torch.ones(50, 1)

    @learner.on(AfterPredict)
    def more(event: AfterPredict) -> None:
        torch.ones(50, 50) @ torch.ones(50, 50)

    learner.run(1)
    assert summary.multiply_adds == math.prod((4, 3, 1))

"""CompileCB: the model compiled for the length of a fit, and no trace of it after."""

from __future__ import annotations

import copy
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    ChannelLastCB,
    CheckpointCB,
    CompileCB,
    DeviceCB,
    GradientAccumulationCB,
    GradientClippingCB,
    LayerSummary,
    MetricsCB,
    MixedTrainingCB,
    SummaryCB,
)
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import AfterBatch, BeforeBatch, BeforeFit, Callback, CancelFitException
from structlog.testing import capture_logs
from torch import nn
from torch._inductor import config as inductor
from torch.nn import functional as F
from torch.utils import _python_dispatch
from torch.utils.data import DataLoader, TensorDataset
from torcheval.metrics import MulticlassAccuracy

from tests.support.training import weights

Digits = tuple[torch.Tensor, torch.Tensor]
one_loop = pytest.mark.parametrize("anyio_backend", ["asyncio"])
"""For what a loop makes no difference to: what runs in the thread of the fit."""


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    """What torch has compiled is one per process, and so is the state of accelerate."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    if "accelerate" in sys.modules:
        forget_accelerate()


class Graphs:
    """A backend that compiles nothing, and counts what it is given."""

    def __init__(self) -> None:
        self.n = 0

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.n += 1
        return graph.forward


def make_model(hidden: int = 8) -> nn.Module:
    torch.manual_seed(42)
    return nn.Sequential(nn.Linear(3, hidden), nn.ReLU(), nn.Dropout(0.2), nn.Linear(hidden, 1))


def make_dls() -> DataLoaders:
    """Batches of 4, and one of 2 at the end of the training."""
    x = torch.randn(14, 3, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(x, x.sum(1, keepdim=True))
    train = DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1))
    return DataLoaders(train, DataLoader(data, 7))


def make_learner(model: nn.Module | None = None, cbs: Any = ()) -> TrainLearner:
    torch.manual_seed(7)
    return TrainLearner(make_model() if model is None else model, make_dls(), lr=0.05, cbs=cbs)


# ------------------------------------------------------------------------- beside other callbacks

CASES: dict[str, Callable[[], list[Callback]]] = {
    "nothing": lambda: [],
    "metrics": lambda: [MetricsCB()],
    "bf16": lambda: [MixedTrainingCB("bf16")],
    "fp16": lambda: [MixedTrainingCB("fp16")],
    "device, channels last": lambda: [DeviceCB("cpu"), ChannelLastCB()],
    "accumulation, clipping": lambda: [GradientAccumulationCB(2), GradientClippingCB(0.5)],
    "accelerate": lambda: [accelerate("no")],
    "accelerate in bf16": lambda: [accelerate("bf16")],
}
"""In no order of theirs: they go behind CompileCB in the list."""

COUNTS = {case: [3, 3, 3] for case in CASES} | {"accelerate in bf16": [3, 6, 9]}
"""Graphs after each fit: training, its smaller batch, validation. That accelerate wraps `forward`
anew in every fit makes three more each time, and nine are more than torch keeps of one function."""


def accelerate(precision: str) -> Callback:
    pytest.importorskip("accelerate")
    forget_accelerate()
    return AccelerateCB(precision)


def forget_accelerate() -> None:
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_the_same_to_the_bit_where_nothing_is_compiled(case: str) -> None:
    """Fit after fit; and each graph is made once."""
    ends, graphs, counts = [], Graphs(), []
    for compiled in (False, True):
        torch.manual_seed(7)
        cbs = [CompileCB(graphs)] if compiled else []
        learner = MomentumLearner(make_model(), make_dls(), lr=0.05, cbs=[*cbs, *CASES[case]()])
        for _ in range(3):
            result = learner.run(1)
            assert (result.status, result.valid_batches) == ("completed", 2)
            counts.append(graphs.n)
        ends.append(weights(learner.model))
        assert learner.model._compiled_call_impl is None
    assert torch.equal(*ends)
    assert counts == [0, 0, 0, *COUNTS[case]]


def make_line() -> nn.Module:
    """Without dropout, which draws other numbers where it is compiled."""
    torch.manual_seed(42)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


def test_it_trains_on_every_event_loop(backend: dict[str, Any]) -> None:
    plain, compiled = make_learner(make_line()), make_learner(make_line(), CompileCB("aot_eager"))
    for learner in (plain, compiled):
        assert learner.run(2, **backend).status == "completed"
    assert torch.allclose(weights(compiled.model), weights(plain.model), atol=1e-6)


def test_with_dropout_too_it_trains_the_same_again() -> None:
    """G11."""
    one, two = (make_learner(cbs=CompileCB("aot_eager")) for _ in range(2))
    for learner in (one, two):
        torch.manual_seed(7)
        learner.run(2)
    assert torch.equal(weights(one.model), weights(two.model))


def test_a_summary_has_the_parameters_of_what_is_compiled() -> None:
    summary, graphs = SummaryCB(io.StringIO()), Graphs()
    make_learner(cbs=[summary, CompileCB(graphs)]).run(1)
    assert summary.rows[0] == LayerSummary("0", "Linear", None, 32, 32, 0, 0)
    assert summary.total_params == 41
    assert graphs.n == 3


@one_loop
async def test_lr_find_validate_and_get_preds_run_it_too() -> None:
    graphs = Graphs()
    plain, learner = make_learner(), make_learner(cbs=CompileCB(graphs))
    counts = []
    with anyio.fail_after(60):
        for one in (plain, learner):
            torch.manual_seed(7)
            finder = await one.lr_find(max_epochs=3)
            counts.append(graphs.n)
            loss = await one.validate()
            preds = await one.get_preds()
            counts.append(graphs.n)
            assert one.model._compiled_call_impl is None
            if one is plain:
                expected = finder.losses, loss, preds
    assert counts == [0, 0, 2, 3]  # in training also the smaller batch
    assert (finder.losses, loss) == expected[:2]
    assert torch.equal(preds, expected[2])


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_checkpoint_is_resumed_with_and_without(tmp_path: Path, compiled_first: bool) -> None:
    alone = make_learner()
    expected = alone.run(3)
    first = make_learner(cbs=[CompileCB("eager")] if compiled_first else [])
    again = make_learner(cbs=[] if compiled_first else [CompileCB("eager")])
    with capture_logs() as logs:
        first.run(1, cbs=CheckpointCB(tmp_path))
        result = again.run(3, resume=tmp_path, cbs=CheckpointCB(tmp_path))
    assert logs == []  # no doubt that all of the callback is saved
    assert result.resumed_from is not None
    assert result.history == expected.history
    assert torch.equal(weights(again.model), weights(alone.model))


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.usefixtures("one_process")
def test_what_distributed_data_parallel_wraps_is_compiled() -> None:
    """As AccelerateCB has it in several processes: in every fit another one, of the same model."""
    inner, graphs = make_model(), Graphs()
    for _ in range(2):
        make_learner(nn.parallel.DistributedDataParallel(inner), CompileCB(graphs)).run(1)
        assert inner._compiled_call_impl is None
    assert graphs.n == 3
    plain = make_learner()
    for _ in range(2):
        torch.manual_seed(7)
        plain.dls = make_dls()
        plain.run(1)
    assert torch.equal(weights(inner), weights(plain.model))


# ------------------------------------------------------------------------------- what it compiles


def test_models_of_one_kind_share_what_is_compiled() -> None:
    graphs = Graphs()
    for _ in range(3):
        make_learner(cbs=CompileCB(graphs)).run(1)
    assert graphs.n == 3


def write_anew(_: int) -> nn.Module:
    """As when the cell of a notebook is run again."""

    class Line(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(3, 1)

        def forward(self, x: torch.Tensor) -> Any:
            return self.line(x)

    return Line()


@pytest.mark.parametrize(
    "make",
    [
        make_model,
        lambda i: nn.Sequential(nn.Linear(3, 1), nn.Dropout(i / 10)),
        write_anew,
    ],
    ids=["sizes", "dropout", "a class written anew"],
)
def test_models_of_many_kinds_are_all_compiled(make: Callable[[int], nn.Module]) -> None:
    """torch keeps eight graphs of one function, and then goes on without compiling."""
    graphs, counts = Graphs(), []
    for i in (1, 2, 3):
        make_learner(make(i), CompileCB(graphs)).run(1)
        counts.append(graphs.n)
    assert counts == [3, 6, 9]


def test_sizes_of_one_kind_do_not_make_those_of_another_variable() -> None:
    fixed = []

    def backend(graph: Any, inputs: Any) -> Any:
        fixed.append(all(isinstance(n, int) for x in inputs for n in getattr(x, "shape", [x])))
        return graph.forward

    for hidden in (2, 5):
        make_learner(make_model(hidden), CompileCB(backend)).run(1, valid=False)
    assert fixed == [True, False] * 2


def test_frozen_layers_are_compiled_as_such() -> None:
    """Of one model, fit after fit, more graphs than torch keeps of a function."""
    graphs, counts = Graphs(), []
    model = make_model()
    parameters = list(model.parameters())
    for frozen in range(3):
        parameters[frozen - 1].requires_grad_(frozen == 0)
        make_learner(model, CompileCB(graphs)).run(1)
        counts.append(graphs.n)
    assert counts == [3, 6, 9]


def test_a_model_whose_sizes_are_not_known_yet_is_compiled() -> None:
    graphs = Graphs()
    learner = make_learner(nn.Sequential(nn.LazyLinear(1)), CompileCB(graphs))
    learner.opt, learner.opt_func = torch.optim.SGD(learner.model.parameters(), 0.05), None
    learner.run(1)
    assert graphs.n == 3
    assert next(learner.model.parameters()).shape == (1, 3)


def test_each_setting_has_its_graphs_and_options_are_left_as_they_were_given() -> None:
    seen = []

    def backend(graph: Any, inputs: Any, options: Any) -> Any:
        seen.append(options["level"])
        return graph.forward

    for level in (1, 2, 3):
        options = {"use_aoti": False, "level": level}
        make_learner(cbs=CompileCB(backend, options=options)).run(1)
        assert options == {"use_aoti": False, "level": level}  # torch takes the first one out
    assert seen == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@one_loop
async def test_fits_at_the_same_time_are_as_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """G10: some compile, while others compile too, or run as they are."""
    for flag in (
        "_is_in_torch_dispatch_mode",
        "_is_in_non_infra_torch_dispatch_mode",
        "_is_in_any_mode_without_ignore_compile_internals",
    ):  # torch has one of each per process, which threads that compile leave in disorder
        monkeypatch.setattr(_python_dispatch, flag, False)

    def make(i: int) -> TrainLearner:
        torch.manual_seed(i)
        model = nn.Sequential(nn.Linear(3, 2 + i), nn.ReLU(), nn.Linear(2 + i, 1))
        cbs = [CompileCB(("eager", "aot_eager")[i // 3])] if i % 3 else []
        return TrainLearner(model, make_dls(), lr=0.05, cbs=cbs)

    alone, together = [make(i) for i in range(6)], [make(i) for i in range(6)]
    with anyio.fail_after(120):
        for learner in alone:
            await learner.fit(3)
        torch.compiler.reset()
        async with anyio.create_task_group() as tasks:
            for learner in together:
                tasks.start_soon(learner.fit, 3)
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(weights(one.model), weights(two.model))


def test_inductor_trains_the_same_model_but_for_rounding(digits: Digits) -> None:
    """The one test that runs a C++ compiler: seconds, or a minute where it never ran before."""
    images, labels = digits
    batches = [(images[i : i + 16], labels[i : i + 16]) for i in (0, 16, 32)]

    def make(*cbs: Callback) -> TrainLearner:
        torch.manual_seed(42)
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 10))
        cbs = (MetricsCB(), *cbs)
        return TrainLearner(model, DataLoaders(batches, batches), F.cross_entropy, 0.1, cbs)

    plain, compiled = make(), make(CompileCB(fullgraph=True))
    expected, result = plain.run(2), compiled.run(2)
    assert torch.allclose(weights(compiled.model), weights(plain.model), atol=1e-5)
    losses = [row["loss"] for row in result.history]
    assert losses == pytest.approx([row["loss"] for row in expected.history], rel=1e-4)
    assert len(losses) == 4


# -------------------------------------------------------------------------------- what it leaves


class Ends(Callback):
    """Ends the fit at one event, in a way."""

    def __init__(self, event_type: type, error: type[BaseException], order: float) -> None:
        self.event_type, self.error, self.order = event_type, error, order

    def before_fit(self, event: BeforeFit) -> None:
        self._end(event)

    def before_batch(self, event: BeforeBatch) -> None:
        self._end(event)

    def after_batch(self, event: AfterBatch) -> None:
        self._end(event)

    def _end(self, event: Any) -> None:
        if type(event) is self.event_type:
            raise self.error("the end")


@pytest.mark.parametrize(
    ("event_type", "order", "error"),
    [
        (BeforeFit, -100, ZeroDivisionError),
        (BeforeFit, 100, CancelFitException),
        (BeforeBatch, 0, CancelFitException),
        (AfterBatch, 0, ZeroDivisionError),
    ],
)
def test_the_model_is_given_back_however_the_fit_ends(
    event_type: type, order: float, error: type[BaseException]
) -> None:
    """G9: compiled by hand before, it is so again."""
    model, theirs = make_model(), Graphs()
    model.compile(backend=theirs)
    before = {**vars(model), "training": None}
    learner = make_learner(model, CompileCB("eager"))
    ended = pytest.raises(error) if error is ZeroDivisionError else nullcontext()
    with ended:
        learner.run(1, cbs=Ends(event_type, error, order))
    assert {**vars(model), "training": None} == before
    assert learner.run(1).status == "completed"
    assert {**vars(model), "training": None} == before
    assert theirs.n == 0
    model(torch.ones(4, 3))
    assert theirs.n == 1


def test_the_model_is_the_same_object_with_the_same_names_and_can_be_copied() -> None:
    model, graphs = make_model(), Graphs()
    names = list(model.state_dict())
    learner = make_learner(model, CompileCB(graphs))
    copies = []

    @learner.on(AfterBatch, once=True)
    def look(event: AfterBatch) -> None:
        assert learner.model is model
        assert list(model.state_dict()) == names
        assert model._compiled_call_impl is not None
        copies.append(copy.deepcopy(model))
        copies.append(pickle.loads(pickle.dumps(model)))

    learner.run(1, valid=False)
    n = graphs.n
    assert len(copies) == 2
    for one in copies:
        one(torch.ones(3, 3))
        assert list(one.state_dict()) == names
    assert graphs.n == n == 2


def test_a_model_that_another_callback_put_in_its_place_is_left_alone() -> None:
    own, other = make_model(), make_model()
    learner = make_learner(own, CompileCB("eager"))
    learner.subscribe(BeforeBatch, lambda _: setattr(learner, "model", other), once=True)
    learner.run(1)
    assert own._compiled_call_impl is None
    assert other._compiled_call_impl is None


# ------------------------------------------------------------------------------------- what fails


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "inducter"}, "Invalid backend: 'inducter'"),
        ({"mode": "fast"}, "Unrecognized mode=fast"),
        ({"options": {"fst": 1}}, "option fst"),
        ({"mode": "default", "options": {"debug": True}}, "[Ee]ither mode or options"),
    ],
)
def test_settings_that_torch_does_not_have_are_told_before_the_first_batch(
    settings: dict[str, Any], message: str
) -> None:
    learner = make_learner(cbs=CompileCB(**settings))
    with pytest.raises(RuntimeError, match=message) as caught:
        learner.run(1)
    assert caught.value.__notes__ == ["raised by CompileCB.before_fit on BeforeFit"]
    assert learner.model._compiled_call_impl is None


def test_two_of_them_are_refused() -> None:
    learner = make_learner(cbs=[CompileCB("eager"), CompileCB("aot_eager")])
    with pytest.raises(ValueError, match="two CompileCBs"):
        learner.run(1)
    assert learner.model._compiled_call_impl is None


def test_a_compiler_that_is_not_there_is_told_by_the_first_batch() -> None:
    learner = make_learner(cbs=CompileCB())
    message = r"No working C\+\+ compiler found .*\('no-such-compiler',\)"
    with inductor.patch({"cpp.cxx": ("no-such-compiler",)}):
        with pytest.raises(RuntimeError, match=message) as caught:
            learner.run(1)
    assert caught.value.__notes__ == ["raised by TrainLearner.predict on Predict, epoch 0, iter 0"]
    assert learner.model._compiled_call_impl is None


class Breaks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> Any:
        x = x * 2
        torch._dynamo.graph_break()
        return self.line(x)


def test_several_graphs_are_an_error_only_where_one_is_asked_for() -> None:
    graphs = Graphs()
    make_learner(Breaks(), CompileCB(graphs)).run(1, valid=False)
    assert graphs.n == 4  # two, and two for the smaller batch
    learner = make_learner(Breaks(), CompileCB(graphs, fullgraph=True))
    with pytest.raises(Exception, match="graph_break") as caught:
        learner.run(1)
    assert (
        caught.value.__notes__[-1] == "raised by TrainLearner.predict on Predict, epoch 0, iter 0"
    )
    assert learner.model._compiled_call_impl is None


# ---------------------------------------------------------------------------------- on a real GPU

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that CUDA can use")


def train_digits(digits: Digits, *cbs: Callback) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    images, labels = digits
    batches = [(images[i : i + 32], labels[i : i + 32]) for i in range(0, 144, 32)]
    torch.manual_seed(42)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    metrics = MetricsCB(MulticlassAccuracy())
    learner = TrainLearner(
        model,
        DataLoaders(batches[:4], batches),
        F.cross_entropy,
        0.1,
        [DeviceCB("cuda"), metrics, *cbs],
    )
    learner.run(3)
    assert model._compiled_call_impl is None
    return weights(model), metrics.history


@on_cuda
@pytest.mark.parametrize("dtype", [None, "bf16", "fp16"])
def test_on_cuda_weights_are_the_same_to_the_bit_where_nothing_is_compiled(
    digits: Digits, dtype: str | None
) -> None:
    def mixed() -> list[Callback]:
        return [MixedTrainingCB(dtype, 1024.0)] if dtype else []

    plain, expected = train_digits(digits, *mixed())
    traced, history = train_digits(digits, CompileCB("eager"), *mixed())
    assert torch.equal(traced, plain)
    assert history == expected


@on_cuda
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_on_cuda_inductor_trains_the_same_model_but_for_rounding(
    digits: Digits, mode: str | None
) -> None:
    """With CUDA graphs the metrics see each batch before its memory is written to again."""
    pytest.importorskip("triton")
    plain, expected = train_digits(digits)
    compiled, history = train_digits(digits, CompileCB(mode=mode))
    assert torch.allclose(compiled, plain, atol=1e-3)
    assert [row["loss"] for row in history] == pytest.approx(
        [row["loss"] for row in expected], rel=1e-2
    )

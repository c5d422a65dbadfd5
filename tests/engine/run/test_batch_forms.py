"""Batches in any form, and losses that the model returns: as a plain PyTorch loop, to the bit."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import (
    AccelerateCB,
    CompileCB,
    GradientAccumulationCB,
    MetricsCB,
    MixedTrainingCB,
    SummaryCB,
    TrainCB,
)
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from torch import nn
from torch.nn import functional as F
from torcheval.metrics import MeanSquaredError

from tests.support.training import weights
from tests.support.waiting import GUARD

LR = 0.05
X = torch.linspace(-1, 1, 54).reshape(18, 3)
Z = X.flip(0)
Y = X.sum(1, keepdim=True)
ROWS = [slice(0, 4), slice(4, 8), slice(8, 12), slice(12, 18)]  # the last one is larger


class Output(OrderedDict[str, Any]):
    """As the ModelOutput of transformers: a mapping with attributes, without what is None."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


@dataclass
class DataOutput:
    loss: torch.Tensor | None
    logits: torch.Tensor


class Model(nn.Module):
    """Two inputs; returns predictions or, if it is given labels, an output with its loss."""

    def __init__(self, output: Callable[..., Any] = Output) -> None:
        super().__init__()
        torch.manual_seed(42)
        self.one, self.other = nn.Linear(3, 1), nn.Linear(3, 1)
        self.output = output

    def forward(self, x: torch.Tensor, z: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.one(x) + self.other(z)
        if labels is None:
            return logits
        return self.output(loss=F.mse_loss(logits, labels), logits=logits)


class Weighted(nn.Module):
    """A loss with two targets."""

    def forward(self, preds: Any, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return (w * (preds - y) ** 2).mean()


def by_hand(
    loss_of: Callable[[nn.Module, slice], torch.Tensor], n_epochs: int = 2, group: int = 1
) -> tuple[nn.Module, float]:
    """The trained model, and its loss over all samples, each batch with the weight of its own."""
    model = Model()
    opt = torch.optim.SGD(model.parameters(), LR)
    for _ in range(n_epochs):
        for start in range(0, len(ROWS), group):
            for rows in ROWS[start : start + group]:
                (loss_of(model, rows) / group).backward()
            opt.step()
            opt.zero_grad()
    with torch.no_grad():
        sizes = [rows.stop - rows.start for rows in ROWS]
        losses = [loss_of(model, rows).item() for rows in ROWS]
    return model, sum(n * loss for n, loss in zip(sizes, losses, strict=True)) / sum(sizes)


def mse(model: nn.Module, rows: slice) -> torch.Tensor:
    return F.mse_loss(model(X[rows], Z[rows]), Y[rows])


def weighted(model: nn.Module, rows: slice) -> torch.Tensor:
    return Weighted()(model(X[rows], Z[rows]), Y[rows], X[rows].abs())


FORMS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "tuple": (lambda x, z, y: (x, z, y), {"n_inp": 2}),
    "list": (lambda x, z, y: [x, z, y], {"n_inp": 2}),
    "dict": (lambda x, z, y: {"x": x, "z": z, "y": y}, {}),
    "dict, targets first": (lambda x, z, y: {"y": y, "z": z, "x": x}, {}),
    "mapping": (lambda x, z, y: UserDict({"x": x, "z": z, "y": y}), {}),
    "object": (lambda x, z, y: SimpleNamespace(x=x, z=z, y=y), {}),
    "names": (lambda x, z, y: {"x": x, "z": z, "labels": y}, {"n_inp": ("x", "z")}),
    "names of an object": (lambda x, z, y: DataOutput2(x, z, y), {"n_inp": ["x", "z"]}),
    "own loss": (lambda x, z, y: {"x": x, "z": z, "labels": y}, {"loss_func": None}),
    "own loss of an object": (
        lambda x, z, y: SimpleNamespace(x=x, z=z, labels=y),
        {"loss_func": None},
    ),
    "own loss of a tuple": (lambda x, z, y: (x, z, y), {"loss_func": None, "n_inp": 3}),
}


@dataclass
class DataOutput2:
    x: torch.Tensor
    z: torch.Tensor
    labels: torch.Tensor


def batches(make: Callable[..., Any]) -> list[Any]:
    return [make(X[rows], Z[rows], Y[rows]) for rows in ROWS]


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> tuple[list[Any], dict[str, Any]]:
    make, options = FORMS[request.param]
    return batches(make), options


def learner_of(form: Any, *cbs: Any, kind: Any = TrainLearner, **more: Any) -> Any:
    loader, options = form
    return kind(Model(), DataLoaders(loader, loader), lr=LR, cbs=cbs, **{**options, **more})


# ------------------------------------------------------------------- the same weights and numbers


def test_every_form_trains_and_validates_as_by_hand(form: Any, backend: dict[str, Any]) -> None:
    learner = learner_of(form, MetricsCB())
    result = learner.run(2, **backend)
    model, loss = by_hand(mse)
    assert torch.equal(weights(learner.model), weights(model))
    assert result.history[-1]["loss"] == pytest.approx(loss, rel=1e-6)


async def test_validate_and_get_preds_read_every_form(form: Any) -> None:
    learner = learner_of(form)
    with anyio.fail_after(GUARD):
        numbers = await learner.validate()
        keep = "logits" if "loss_func" in form[1] else None
        preds = await learner.get_preds(keep=keep)
    model, loss = by_hand(mse, n_epochs=0)
    assert numbers["loss"] == pytest.approx(loss, rel=1e-6)
    assert torch.equal(preds, torch.cat([model(X[rows], Z[rows]).detach() for rows in ROWS]))


async def test_get_preds_returns_the_targets_of_every_form_that_has_some(form: Any) -> None:
    learner = learner_of(form)
    with anyio.fail_after(GUARD):
        if "loss_func" in form[1]:
            with pytest.raises(TypeError, match="this batch has no targets"):
                await learner.get_preds(keep="logits", with_targets=True)
        else:
            _, targets = await learner.get_preds(with_targets=True)
            assert torch.equal(targets, Y)


def test_accumulation_mixed_precision_and_a_summary_work_with_every_form(form: Any) -> None:
    summary = SummaryCB()
    learner = learner_of(form, GradientAccumulationCB(2), summary)
    learner.run(2, valid=False)
    assert torch.equal(weights(learner.model), weights(by_hand(mse, group=2)[0]))
    assert [row.name for row in summary.rows] == ["one", "other"]

    mixed = learner_of(form, MixedTrainingCB("bf16"))
    mixed.run(1, valid=False)
    model = Model()
    opt = torch.optim.SGD(model.parameters(), LR)
    for rows in ROWS:
        with torch.autocast("cpu", torch.bfloat16):
            loss = mse(model, rows)
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert torch.equal(weights(mixed.model), weights(model))


async def test_the_learning_rate_is_found_with_every_form(form: Any) -> None:
    learner = learner_of(form)
    with anyio.fail_after(GUARD):
        finder = await learner.lr_find(lr_mult=2.0, start_lr=1e-3, max_epochs=1)
    assert torch.equal(weights(learner.model), weights(Model()))
    model, losses = Model(), []
    opt = torch.optim.SGD(model.parameters(), 1e-3)
    for rows in ROWS:
        loss = mse(model, rows)
        losses.append(loss.item())
        loss.backward()
        opt.step()
        opt.zero_grad()
        opt.param_groups[0]["lr"] *= 2
    assert finder.losses == losses


def test_metrics_are_updated_with_the_targets_of_every_form(
    form: Any, backend: dict[str, Any]
) -> None:
    if "loss_func" in form[1]:  # the output is an object, and the model takes the targets

        def logits_and_labels(learner: Any) -> tuple[Any, Any]:
            batch = learner.batch
            by_name = batch.get if isinstance(batch, dict) else partial(getattr, batch)
            targets = batch[2] if isinstance(batch, tuple) else by_name("labels")
            return learner.preds["logits"], targets

        metrics = MetricsCB(mse=(MeanSquaredError(), logits_and_labels))
    else:
        metrics = MetricsCB(mse=MeanSquaredError())
    result = learner_of(form, metrics).run(1, train=False, **backend)
    whole = F.mse_loss(Model()(X, Z), Y).item()
    assert result.history[0]["mse"] == pytest.approx(whole, rel=1e-6)
    assert result.history[0]["loss"] == pytest.approx(whole, rel=1e-6)


def test_accelerate_and_compiled_models_take_the_same_keywords(form: Any) -> None:
    for cb in (AccelerateCB("no"), CompileCB("eager")):
        learner = learner_of(form, cb)
        learner.run(2, valid=False)
        assert torch.equal(weights(learner.model), weights(by_hand(mse)[0]))


def test_a_wrapper_takes_the_keywords_of_the_model_inside(form: Any) -> None:
    class Parallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    learner = learner_of(form)
    learner.model = Parallel(learner.model)
    learner.run(2, valid=False)
    assert torch.equal(weights(learner.model), weights(by_hand(mse)[0]))


def test_momentum_learners_and_train_cb_read_every_form(form: Any) -> None:
    momentum = learner_of(form, kind=MomentumLearner, mom=0.0)
    momentum.run(2)
    options = {key: value for key, value in form[1].items() if key != "n_inp"}
    n_inp = form[1].get("n_inp")
    model, loss = by_hand(mse)
    assert torch.equal(weights(momentum.model), weights(model))
    for train in (TrainCB(n_inp), AccelerateCB("no", n_inp=n_inp)):
        assert train.n_inp == (tuple(n_inp) if isinstance(n_inp, list) else n_inp)
        metrics = MetricsCB()
        learner = learner_of((form[0], options), train, metrics, kind=Learner)
        learner.run(2)
        assert torch.equal(weights(learner.model), weights(model))
        assert metrics.history[-1]["loss"] == pytest.approx(loss, rel=1e-6)
        assert learner.n_inp is None  # as before the fit


@pytest.mark.parametrize("output", [Output, DataOutput, SimpleNamespace, dict])
def test_the_loss_is_taken_from_every_kind_of_output(output: Any) -> None:
    loader, _ = FORMS["own loss"][0], None
    learner = TrainLearner(Model(output), DataLoaders(batches(loader)), None, LR)
    learner.run(2, valid=False)
    assert torch.equal(weights(learner.model), weights(by_hand(mse)[0]))


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda x, z, y: (x, z, y, x.abs()), {"n_inp": 2}),
        (lambda x, z, y: {"z": z, "y": y, "x": x, "w": x.abs()}, {}),
    ],
)
async def test_several_targets_are_passed_in_their_order(make: Any, options: Any) -> None:
    learner = learner_of((batches(make), options), loss_func=Weighted())
    with anyio.fail_after(GUARD):
        await learner.fit(2)
        assert torch.equal(weights(learner.model), weights(by_hand(weighted)[0]))
        _, (y, w) = await learner.get_preds(with_targets=True)
    assert torch.equal(y, Y)
    assert torch.equal(w, X.abs())


def test_n_inp_can_be_changed_between_fits() -> None:
    learner = learner_of((batches(lambda x, z, y: (x, z, y)), {}))
    learner.n_inp = 2
    learner.run(2, valid=False)
    assert torch.equal(weights(learner.model), weights(by_hand(mse)[0]))


# ------------------------------------------------------------------------------- as it was before


class Seen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        self.seen = batch
        return self.line(batch["x"] if isinstance(batch, dict) else batch.x)


@pytest.mark.parametrize("make", [dict, SimpleNamespace])
def test_a_model_that_takes_a_whole_batch_gets_it(make: Any) -> None:
    """As graph networks do: `forward(self, data)`."""

    class OwnLoss(TrainLearner):
        def get_loss(self) -> None:
            self.loss = self.preds.mean()

    batch = make(x=X, y=Y)
    learner = OwnLoss(Seen(), DataLoaders([batch]))
    learner.run(1, valid=False)
    assert learner.model.seen is batch


def test_without_n_inp_a_third_part_is_for_neither() -> None:
    """Such as the index of a sample: the third parameter of many losses is not a target."""
    with_index = [(X[rows], Y[rows], torch.arange(len(X))[rows]) for rows in ROWS]
    without = [(x, y) for x, y, _ in with_index]
    trained = []
    for loader in (with_index, without):
        torch.manual_seed(0)
        learner = TrainLearner(nn.Linear(3, 1), DataLoaders(loader))
        learner.run(1, valid=False)
        trained.append(weights(learner.model))
    assert torch.equal(*trained)


# ---------------------------------------------------------------------------------- first errors


class ModelOfAnything(nn.Linear):
    def forward(self, **kwargs: torch.Tensor) -> Any:  # type: ignore[override]
        return super().forward(kwargs["x"])


def error_of(model: nn.Module, batch: Any, **options: Any) -> str:
    learner = TrainLearner(model, DataLoaders([batch]), **options)
    with pytest.raises((TypeError, ValueError)) as raised:
        learner.run(1, valid=False)
    return str(raised.value)


def contains(text: str, words: Iterable[str]) -> bool:
    return all(word in text for word in words)


def test_a_dict_that_the_model_does_not_take_is_told_with_both_names() -> None:
    text = error_of(nn.Linear(3, 1), {"x": X, "y": Y})
    assert contains(text, ["Linear.forward(input)", "needs 'input'", "'x', 'y'", "predict()"])
    text = error_of(Model(), {"x": X, "z": Z, "labels": Y, "idx": Y}, loss_func=None)
    assert contains(text, ["does not take 'idx'", "n_inp=('x', 'z', 'labels')"])


def test_a_dict_without_targets_says_how_targets_are_told() -> None:
    """The default loss of a learner, with a model that has its own: of transformers, say."""
    text = error_of(Model(), {"x": X, "z": Z, "labels": Y})
    assert contains(text, ["no targets", "Model takes all", "loss_func=None", "n_inp=('x', ...)"])
    text = error_of(ModelOfAnything(3, 1), {"x": X, "y": Y})
    assert contains(text, ["ModelOfAnything takes all of its parts (x, y)", "n_inp=('x', ...)"])


@pytest.mark.parametrize("batch", [(X,), [X], X])
def test_a_batch_of_inputs_alone_says_what_to_do(batch: Any) -> None:
    assert contains(
        error_of(nn.Linear(3, 1), batch), ["this batch has no targets", "loss_func=None"]
    )


def test_more_inputs_than_parts_are_told_with_both_numbers() -> None:
    text = error_of(Model(), (X, Y), n_inp=3)
    assert contains(text, ["n_inp=3", "a tuple of 2 part(s)"])
    text = error_of(Model(), (X, Z), n_inp=2)
    assert contains(text, ["it has 2 part(s)", "n_inp=2 gives them all", "loss_func=None"])


@pytest.mark.parametrize(
    ("batch", "n_inp", "words"),
    [
        ({"x": X, "y": Y}, 2, ["n_inp=2 counts", "a dict", "n_inp=('name', ...)"]),
        (X, 2, ["n_inp=2 counts", "a Tensor"]),
        ((X, Y), ("x",), ["n_inp=('x',) names", "a tuple"]),
        ({"x": X, "y": Y}, ("x", "z"), ["has no 'z', but 'x', 'y'"]),
    ],
)
def test_an_n_inp_for_another_form_says_which_form_the_batch_has(
    batch: Any, n_inp: Any, words: list[str]
) -> None:
    assert contains(error_of(Model(), batch, n_inp=n_inp), words)


@pytest.mark.parametrize("n_inp", [0, -1, True, 1.0, "x", (), [1], {"x": 1}])
@pytest.mark.parametrize("make", [lambda n: TrainLearner(Model(), n_inp=n), lambda n: TrainCB(n)])
def test_an_n_inp_that_is_neither_number_nor_names_is_refused(make: Any, n_inp: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"n_inp=.*: give the number of parts"):
        make(n_inp)


def test_a_plain_learner_says_where_n_inp_belongs() -> None:
    with pytest.raises(TypeError, match=r"write TrainLearner\(..., n_inp=...\), or cbs=TrainCB"):
        Learner(Model(), n_inp=2)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("preds", "named"),
    [(Y, "Tensor"), ({"logits": Y}, "dict of 'logits'"), (DataOutput(None, Y), "DataOutput")],
)
def test_an_output_without_a_loss_says_what_the_loss_is_taken_from(preds: Any, named: str) -> None:
    class Returns(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return preds

    text = error_of(Returns(3, 1), (X, Y), loss_func=None)
    assert contains(text, ["loss_func=None", "preds.loss or preds['loss']", named, "'labels'"])


def notes_of(model: nn.Module, batch: Any, **options: Any) -> str:
    """The notes of the error of PyTorch itself."""
    learner = TrainLearner(model, DataLoaders([batch]), **options)
    with pytest.raises((TypeError, AttributeError, RuntimeError)) as raised:
        learner.run(1, valid=False)
    return "".join(raised.value.__notes__)


@pytest.mark.parametrize(
    ("batch", "n_inp", "given"),
    [
        (SimpleNamespace(x=X, y=Y), None, "a SimpleNamespace of 'x', 'y', by n_inp=None"),
        ((X, Y), 2, "a Tensor of shape (18, 3), a Tensor of shape (18, 1), by n_inp=2"),
        ({"x": X, "y": Y}, ("x",), "x=a Tensor of shape (18, 3), by n_inp=('x',)"),
    ],
)
def test_a_model_that_fails_is_told_with_what_it_was_called(
    batch: Any, n_inp: Any, given: str
) -> None:
    text = notes_of(nn.Linear(3, 1), batch, n_inp=n_inp)
    assert f"Linear.forward(input) was called with {given}" in text


def test_a_loss_that_fails_is_told_with_what_it_was_called() -> None:
    class TwoHeads(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x), x

    text = notes_of(TwoHeads(3, 1), (X, Y))
    assert "called with the predictions and all targets: a tuple of 2, a Tensor of shape" in text
    text = notes_of(nn.Linear(3, 1), (X, Y, Z), n_inp=1)
    assert "(18, 1), a Tensor of shape (18, 1), a Tensor of shape (18, 3)" in text


def test_the_usual_call_has_no_note_of_ours() -> None:
    text = notes_of(nn.Linear(4, 1), (X, Y))
    assert text == "raised by TrainLearner.predict on Predict, epoch 0, iter 0"


def test_inputs_alone_with_a_loss_of_the_model_say_nothing_of_loss_func() -> None:
    learner = TrainLearner(Model(), DataLoaders(valid=[(X, Z)]), None, n_inp=2)
    with pytest.raises(TypeError, match="no targets") as raised:
        learner.run_get_preds(with_targets=True)
    assert "loss_func" not in str(raised.value)


class OfTwo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)

    def forward(self, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return self.line(one - other)  # type: ignore[no-any-return]


def test_a_model_of_two_inputs_is_told_of_n_inp() -> None:
    x, y = torch.ones(4, 3), torch.ones(4, 1)
    learner = TrainLearner(OfTwo(), DataLoaders([(x, -x, y)]))
    with pytest.raises(TypeError, match="missing 1 required positional argument") as raised:
        learner.run(1, valid=False)
    assert (
        "the model needs 2 inputs, and was called with the first of the 3 parts of the batch:"
        " n_inp=2 gives it the first 2" in raised.value.__notes__
    )
    learner.n_inp = 2
    assert learner.run(1, valid=False).status == "completed"

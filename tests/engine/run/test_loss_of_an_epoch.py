"""The loss of an epoch is that of all its samples, or it is said to be a guess."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, TrainLearner
from eventrain.events import AfterBatch
from structlog.testing import capture_logs
from torch import nn
from torch.nn import functional as F

CLASSES = torch.tensor([0.2, 1.0, 3.0])
X = torch.linspace(-2, 2, 30).reshape(10, 3)
Y = torch.arange(10) % 3
SOFT = F.one_hot(Y, 3).float() * 0.8 + 0.2 / 3
PADDED = torch.where(torch.arange(10) < 6, Y, -100)
PADDED[9] = 1


def split(*columns: torch.Tensor) -> list[Any]:
    return list(zip(*(column.split(4) for column in columns), strict=True))


def line() -> nn.Module:
    torch.manual_seed(3)
    return nn.Linear(3, 3)


def run(loss_func: Any, batches: Any, *cbs: Any, kind: Any = TrainLearner, n: int = 2) -> Any:
    learner = kind(line(), DataLoaders(valid=batches), loss_func, cbs=cbs)
    with capture_logs() as logs:
        result = learner.run(n, train=False)
    return result, [log for log in logs if log["event"] == "loss_is_a_guess"]


def log_softmax_nll(**options: Any) -> Any:
    inner = nn.NLLLoss(**options)
    return lambda preds, y: inner(preds.log_softmax(1), y)


@pytest.mark.parametrize(
    ("loss_func", "targets", "why"),
    [
        (nn.CrossEntropyLoss(weight=CLASSES), Y, "weights of classes"),
        (nn.NLLLoss(weight=CLASSES), Y, "weights of classes"),
        (partial(F.cross_entropy, weight=CLASSES), Y, "weights of classes"),
        (nn.CrossEntropyLoss(), PADDED, "targets of -100 are ignored"),
        (nn.NLLLoss(), PADDED, "targets of -100 are ignored"),
        (F.cross_entropy, PADDED, "targets of -100 are ignored"),
        (lambda p, y: F.cross_entropy(p, y), PADDED, "targets of -100 are ignored"),
        (nn.CrossEntropyLoss(ignore_index=0), Y, "targets of 0 are ignored"),
        (partial(F.nll_loss, ignore_index=2), Y, "targets of 2 are ignored"),
        (nn.CrossEntropyLoss(ignore_index=-1), PADDED.clamp(min=-1), "targets of -1 are ignored"),
    ],
)
def test_a_mean_over_something_else_is_told_once_per_fit(
    loss_func: Any, targets: torch.Tensor, why: str, backend: dict[str, Any]
) -> None:
    learner = TrainLearner(line(), DataLoaders(valid=split(X, targets)), loss_func)
    learner.add_cbs(MetricsCB())
    with capture_logs() as logs:
        learner.run(3, train=False, **backend)
        learner.run(1, train=False, **backend)
    lines = [log for log in logs if log["event"] == "loss_is_a_guess"]
    assert len(lines) == 2
    assert why in lines[0]["reason"]
    assert "MetricsCB(weight=lambda learner:" in lines[0]["hint"]


async def test_validate_says_it_too() -> None:
    learner = TrainLearner(line(), DataLoaders(valid=split(X, PADDED)), F.cross_entropy)
    with capture_logs() as logs:
        await learner.validate()
    assert [log["event"] for log in logs].count("loss_is_a_guess") == 1


@pytest.mark.parametrize(
    ("loss_func", "targets"),
    [
        (F.cross_entropy, Y),
        (nn.CrossEntropyLoss(), Y),
        (nn.CrossEntropyLoss(label_smoothing=0.1), Y),
        (nn.CrossEntropyLoss(weight=CLASSES), SOFT),  # divides by the number of samples
        (nn.CrossEntropyLoss(ignore_index=7), Y),
        (nn.CrossEntropyLoss(weight=CLASSES, reduction="sum"), Y),
        (nn.MSELoss(), X),
        (nn.BCEWithLogitsLoss(weight=CLASSES, pos_weight=CLASSES), SOFT),
        (nn.MultiMarginLoss(weight=CLASSES), Y),
        (nn.MultiLabelMarginLoss(), torch.tensor([[0, -1, -1]] * 10)),
        (nn.HingeEmbeddingLoss(), torch.where(X > 0, 1, -1)),
        (lambda p, y: F.soft_margin_loss(p, y), torch.where(X > 0, 1, -1)),
        (lambda p, y: F.cross_entropy(p, y), Y),
    ],
)
def test_a_mean_over_samples_is_not_doubted(loss_func: Any, targets: torch.Tensor) -> None:
    """Nor is it another number than that of all samples at once."""
    result, lines = run(loss_func, split(X, targets), MetricsCB())
    assert lines == []
    whole = loss_func(line()(X), targets).item()
    if getattr(loss_func, "reduction", "") == "sum":
        whole /= len(X)
    assert result.history[-1]["loss"] == pytest.approx(whole, rel=1e-6)


def test_targets_of_another_number_per_sample_are_told() -> None:
    """A mean over the tokens of batches of different lengths."""
    batches = [(torch.ones(2, n, 3), torch.ones(2, n, 3)) for n in (3, 5)]
    _, lines = run(F.mse_loss, batches, MetricsCB())
    assert len(lines) == 1
    assert "(3, 3) and (5, 3)" in lines[0]["reason"]


def test_training_and_validation_may_have_targets_of_different_shapes() -> None:
    loaders = [[(torch.ones(2, n, 3), torch.ones(2, n, 3))] * 2 for n in (3, 5)]
    learner = TrainLearner(line(), DataLoaders(*loaders), cbs=MetricsCB())
    with capture_logs() as logs:
        learner.run(2)
    assert "loss_is_a_guess" not in [log["event"] for log in logs]


def test_labels_that_a_model_ignores_are_told() -> None:
    """As those of transformers, with loss_func=None."""

    class OwnLoss(nn.Linear):
        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:  # type: ignore[override]
            return {"loss": F.cross_entropy(super().forward(x), labels)}

    batches = [{"x": x, "labels": y} for x, y in split(X, PADDED)]
    learner = TrainLearner(OwnLoss(3, 3), DataLoaders(valid=batches), None, cbs=MetricsCB())
    with capture_logs() as logs:
        learner.run(1, train=False)
    assert [log["event"] for log in logs].count("loss_is_a_guess") == 1


def test_one_batch_is_not_a_guess() -> None:
    _, lines = run(F.cross_entropy, [(X, PADDED)], MetricsCB())
    assert lines == []


def test_a_learner_that_counts_its_targets_is_believed() -> None:
    class Counts(TrainLearner):
        def batch_size(self, batch: Any) -> int:
            return int((batch[1] != -100).sum())

    result, lines = run(F.cross_entropy, split(X, PADDED), MetricsCB(), kind=Counts)
    assert lines == []
    whole = F.cross_entropy(line()(X), PADDED).item()
    assert result.history[-1]["loss"] == pytest.approx(whole, rel=1e-6)


# ------------------------------------------------------------------------------ the right number


@pytest.mark.parametrize(
    ("loss_func", "targets", "weight"),
    [
        (nn.CrossEntropyLoss(CLASSES), Y, lambda learner: CLASSES[learner.batch[1]].sum()),
        (nn.CrossEntropyLoss(), PADDED, lambda learner: (learner.batch[1] != -100).sum()),
        (F.cross_entropy, PADDED, lambda learner: int((learner.batch[1] != -100).sum())),
    ],
)
def test_with_the_weight_of_a_batch_it_is_the_loss_of_all_samples(
    loss_func: Any, targets: torch.Tensor, weight: Any
) -> None:
    result, lines = run(loss_func, split(X, targets), MetricsCB(weight=weight))
    assert lines == []
    whole = loss_func(line()(X), targets).item()
    assert result.history[-1]["loss"] == pytest.approx(whole, rel=1e-6)
    unweighted, _ = run(loss_func, split(X, targets), MetricsCB())
    assert unweighted.history[-1]["loss"] != pytest.approx(whole, rel=1e-3)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_a_batch_of_ignored_targets_alone_has_no_weight(as_tensor: bool) -> None:
    """Its loss is NaN."""
    targets = torch.where(torch.arange(10) < 4, -100, Y)

    def weight(learner: Any) -> Any:
        n = (learner.batch[1] != -100).sum()
        return n if as_tensor else n.item()

    result, _ = run(F.cross_entropy, split(X, targets), MetricsCB(weight=weight))
    whole = F.cross_entropy(line()(X), targets).item()
    assert result.history[-1]["loss"] == pytest.approx(whole, rel=1e-6)


def test_the_sum_of_losses_is_divided_by_the_sum_of_weights() -> None:
    metrics = MetricsCB(weight=lambda learner: (learner.batch[1] != -100).sum())
    result, _ = run(nn.CrossEntropyLoss(reduction="sum"), split(X, PADDED), metrics)
    whole = F.cross_entropy(line()(X), PADDED).item()
    assert result.history[-1]["loss"] == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "returned a NoneType: return a number"),
        (torch.ones(2), r"returned a Tensor of shape \(2,\): return a number"),
        (-1, "returned -1: a weight is not negative"),
    ],
)
def test_a_weight_that_is_not_a_number_is_told(value: Any, words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        run(F.cross_entropy, split(X, Y), MetricsCB(weight=lambda learner: value))


def test_a_weight_that_is_not_a_function_is_refused() -> None:
    with pytest.raises(TypeError, match="weight=2: give a function of the learner"):
        MetricsCB(weight=2)  # type: ignore[arg-type]


def test_the_weights_so_far_are_resumed() -> None:
    """As of a checkpoint in the middle of an epoch."""
    metrics = MetricsCB(weight=lambda learner: (learner.batch[1] != -100).sum())
    states = []
    learner = TrainLearner(line(), DataLoaders(valid=split(X, PADDED)), F.cross_entropy)
    learner.add_cbs(metrics)
    learner.subscribe(AfterBatch, lambda event: states.append(metrics.state_dict()), order=9)
    learner.run(1, train=False)
    other = MetricsCB()
    other.load_state_dict(states[-1])
    assert other.measured()["loss"] == metrics.history[0]["loss"]

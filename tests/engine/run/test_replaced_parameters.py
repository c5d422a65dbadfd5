"""An optimizer that would step parameters that the model does not have is an error, and said."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from eventrain.callbacks import AccelerateCB, CheckpointCB, CompileCB, DeviceCB, MetricsCB
from eventrain.engine import DataLoaders, MomentumLearner, TrainLearner
from eventrain.events import BeforeBatch, BeforeFit
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune

from tests.support.training import weights

ADVICE = (
    "Some devices get new parameters from model.to(device): move the model, or replace it, before"
    " the optimizer is made; or make the optimizer again in BeforeFit, and set learner.opt"
)


def net() -> nn.Module:
    torch.manual_seed(42)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 1))


@pytest.fixture
def _moving_replaces() -> Iterator[None]:
    """Let `module.to(...)` make new parameters, as it does for some devices."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.usefixtures("_moving_replaces")
def test_a_model_whose_parameters_are_replaced_when_it_is_moved(
    dls: DataLoaders, backend: dict[str, Any]
) -> None:
    learner = TrainLearner(net(), dls, cbs=DeviceCB("cpu"))
    seen: list[object] = []
    learner.subscribe(BeforeBatch, seen.append)
    with pytest.raises(RuntimeError) as caught:
        learner.run(1, **backend)
    assert str(caught.value) == (
        "a receiver of BeforeFit has replaced 4 parameters (0.weight, 0.bias, 2.weight, ...) of the"
        " model, and the optimizer still has the old ones, so training would not change the new"
        f" ones. {ADVICE}"
    )
    assert seen == []
    assert learner.result is not None
    assert learner.result.status == "failed"
    learner.remove_cbs(learner.cbs)  # it has been moved: a fit makes an optimizer for it now
    before = weights(learner.model)
    learner.run(1)
    assert not torch.equal(weights(learner.model), before)


@pytest.mark.usefixtures("_moving_replaces")
def test_what_the_error_advises_works(dls: DataLoaders) -> None:
    moved_before = TrainLearner(net().to("cpu"), dls)
    moved_before.run(1)
    made_again = TrainLearner(net(), dls, cbs=DeviceCB("cpu"))

    @made_again.on(BeforeFit)
    def make_again(event: BeforeFit) -> None:
        made_again.opt = torch.optim.SGD(made_again.model.parameters(), 0.1)

    made_again.run(1)
    assert torch.equal(weights(made_again.model), weights(moved_before.model))
    assert not torch.equal(weights(made_again.model), weights(net()))


@pytest.mark.usefixtures("_moving_replaces")
def test_what_does_not_train_may_be_moved(dls: DataLoaders) -> None:
    result = TrainLearner(net(), dls, cbs=[DeviceCB("cpu"), MetricsCB()]).run(1, train=False)
    assert result.status == "completed"


def replace_model(learner: TrainLearner) -> None:
    learner.model = net()


def replace_head(learner: TrainLearner) -> None:
    learner.model[2] = nn.Linear(4, 1)


@pytest.mark.parametrize(
    ("replace", "what"),
    [
        (replace_model, "4 parameters (0.weight, 0.bias, 2.weight, ...)"),
        (replace_head, "2 parameters (2.weight, 2.bias)"),
    ],
)
def test_a_receiver_that_replaces_the_model_or_a_part(
    replace: Callable[[Any], None], what: str, dls: DataLoaders
) -> None:
    learner = TrainLearner(net(), dls)
    learner.subscribe(BeforeFit, lambda _: replace(learner))
    with pytest.raises(RuntimeError) as caught:
        learner.run(1)
    assert str(caught.value).startswith(f"a receiver of BeforeFit has replaced {what} of the model")


@pytest.mark.parametrize("kept", [True, False])
def test_an_optimizer_of_another_copy_of_the_model(kept: bool, dls: DataLoaders) -> None:
    model = net()
    opt = torch.optim.SGD(copy.deepcopy(model).parameters(), 0.1)
    learner = TrainLearner(model, dls, opt_func=None if kept else lambda params, lr: opt)
    learner.opt = opt
    with pytest.raises(RuntimeError) as caught:
        learner.run(1)
    assert str(caught.value) == (
        "the optimizer has 4 parameters (0.weight, 0.bias, 2.weight, ...) of the same shapes as the"
        f" model's, but none of the model's own, so training would not change the model. {ADVICE}"
    )


# ------------------------------------------------------------------- what is rightly not an error


class Weighted(nn.Module):
    """A loss with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, preds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(preds * self.scale, targets)


def test_an_optimizer_may_have_parameters_of_other_modules_or_only_some(dls: DataLoaders) -> None:
    loss = Weighted()
    extra = nn.Parameter(torch.ones(2))  # on no module at all
    model = net()

    def opt_func(params: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD([*model[2].parameters(), *loss.parameters(), extra], lr)

    learner = TrainLearner(model, dls, loss, opt_func=opt_func)
    assert learner.run(1).status == "completed"
    alone = TrainLearner(net(), dls, loss, opt_func=lambda _, lr: torch.optim.SGD([extra], lr))
    assert alone.run(1).status == "completed"


def test_a_part_that_a_receiver_keeps_elsewhere_on_the_learner(dls: DataLoaders) -> None:
    class InTwoParts(TrainLearner):
        head: nn.Module

        def predict(self) -> None:
            self.preds = self.head(self.model(self.batch[0]))

    learner = InTwoParts(net(), dls)

    @learner.on(BeforeFit, once=True)
    def split(event: BeforeFit) -> None:
        learner.head, learner.model = learner.model[2], learner.model[:2]

    assert learner.run(1).status == "completed"


def prune_first(learner: Any) -> None:
    prune.l1_unstructured(learner.model[0], "weight", 0.5)


def normalize_first(learner: Any) -> None:
    parametrizations.weight_norm(learner.model[0])


def parametrize_first(learner: Any) -> None:
    parametrize.register_parametrization(learner.model[0], "weight", nn.Identity())


def wrap(learner: Any) -> None:
    learner.model = nn.Sequential(learner.model, nn.Identity())


def to_double_and_back(learner: Any) -> None:
    learner.model.double().float()


@pytest.mark.parametrize("change", [prune_first, parametrize_first, wrap, to_double_and_back])
def test_a_receiver_may_change_the_model_around_its_parameters(
    change: Callable[[Any], None], dls: DataLoaders
) -> None:
    learner = TrainLearner(net(), dls)
    learner.subscribe(BeforeFit, lambda _: change(learner))
    assert learner.run(1).status == "completed"


def test_weight_norm_makes_new_parameters_which_would_not_be_trained(dls: DataLoaders) -> None:
    learner = TrainLearner(net(), dls)
    learner.subscribe(BeforeFit, lambda _: normalize_first(learner))
    with pytest.raises(RuntimeError, match=r"1 parameter \(0.weight\) of the model"):
        learner.run(1)


@pytest.mark.parametrize("cb", [AccelerateCB, lambda: CompileCB(backend="eager")])
def test_wrapped_models_have_the_same_parameters(cb: Callable[[], Any], dls: DataLoaders) -> None:
    learner = TrainLearner(net(), dls, cbs=cb())
    assert learner.run(1).status == "completed"


def test_a_lazy_model_and_a_momentum_learner(dls: DataLoaders) -> None:
    lazy = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyLinear(1))
    assert TrainLearner(lazy, dls).run(1).status == "completed"
    assert MomentumLearner(net(), dls).run(1).status == "completed"


def test_a_fit_that_resumes_is_checked_too(dls: DataLoaders, tmp_path: Path) -> None:
    TrainLearner(net(), dls, cbs=CheckpointCB(tmp_path)).run(1)
    learner = TrainLearner(net(), dls, cbs=CheckpointCB(tmp_path))
    learner.subscribe(BeforeFit, lambda _: replace_model(learner))
    with pytest.raises(RuntimeError, match="has replaced 4 parameters"):
        learner.run(2, resume="last")

"""The async methods in a script: their own forms, and the warning of those who forget to await."""

from __future__ import annotations

import asyncio
import gc
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable
from typing import Any

import anyio
import pytest
import torch
from eventrain.engine import DataLoaders, TrainLearner
from torch import nn

from tests.support.waiting import GUARD

MakeModel = Callable[[], nn.Module]

FORMS = {"fit": "run", "validate": "run_validate"}
FORMS |= {"get_preds": "run_get_preds", "lr_find": "run_lr_find"}
METHODS = pytest.mark.parametrize("method", FORMS)


def outcome_of(method: str, returned: Any) -> Any:
    """What a method returned, as something that can be compared."""
    if method == "fit":
        return returned.status, returned.epochs, returned.steps
    if method == "lr_find":
        return returned.lrs, returned.losses
    return returned.tolist() if isinstance(returned, torch.Tensor) else returned


@METHODS
def test_each_async_method_has_a_form_for_scripts(
    method: str, make_model: MakeModel, dls: DataLoaders, backend: dict[str, Any]
) -> None:
    awaited = anyio.run(getattr(TrainLearner(make_model(), dls), method), **backend)
    returned = getattr(TrainLearner(make_model(), dls), FORMS[method])(**backend)
    assert outcome_of(method, returned) == outcome_of(method, awaited)


def test_the_forms_take_the_arguments_of_their_methods(
    learner: TrainLearner, make_model: MakeModel
) -> None:
    x = torch.ones(5, 3)
    loader = [(x, torch.zeros(5, 1))]
    expected = make_model()(x)
    preds, targets = learner.run_get_preds(loader, with_targets=True)
    assert torch.equal(preds, expected)
    assert torch.equal(targets, torch.zeros(5, 1))
    assert learner.run_validate(loader) == {"loss": pytest.approx(expected.square().mean().item())}
    finder = learner.run_lr_find(lr_mult=2.0, start_lr=1e-3, max_epochs=1)
    assert finder.lrs == pytest.approx([1e-3, 2e-3, 4e-3])


@METHODS
async def test_inside_an_event_loop_a_form_for_scripts_says_what_to_await(
    method: str, learner: TrainLearner
) -> None:
    told = rf"^{FORMS[method]}\(\) starts an event loop.* `await learner\.{method}\(\.\.\.\)` here$"
    with pytest.raises(RuntimeError, match=told):
        getattr(learner, FORMS[method])()
    assert not learner.fitting


@METHODS
def test_a_method_that_is_not_awaited_warns_with_its_form_for_scripts(
    method: str, learner: TrainLearner
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        getattr(learner, method)()
        gc.collect()
    said = f"'Learner.{method} (in a script: learner.{FORMS[method]}(...))' was never awaited"
    assert [str(w.message).split(" ", 1)[1].split("\n")[0] for w in caught] == [said]
    assert caught[0].category is RuntimeWarning
    assert not learner.fitting


def test_that_warning_says_so_as_an_error_too(
    learner: TrainLearner, monkeypatch: pytest.MonkeyPatch
) -> None:
    caught: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", caught.append)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner.fit(3)
        gc.collect()
    assert [type(error.exc_value) for error in caught] == [RuntimeWarning]
    assert "(in a script: learner.run(...))" in str(caught[0].exc_value)


@METHODS
def test_hosts_recognise_the_methods_as_coroutine_functions(
    method: str, learner: TrainLearner
) -> None:
    assert inspect.iscoroutinefunction(getattr(learner, method))
    coroutine = getattr(learner, method)()
    assert inspect.iscoroutine(coroutine)
    coroutine.close()


def test_the_errors_of_python_name_the_method_as_it_is_written(learner: TrainLearner) -> None:
    with pytest.raises(TypeError, match=r"^Learner\.fit\(\) got an unexpected keyword argument"):
        learner.fit(epochs=3)  # type: ignore[call-arg]
    assert list(inspect.signature(learner.fit).parameters)[:2] == ["n_epochs", "train"]
    assert pickle.loads(pickle.dumps(TrainLearner.fit)) is TrainLearner.fit


class Doubled(TrainLearner):
    """Overrides a method that has a form for scripts."""

    async def fit(self, n_epochs: int = 1, *args: Any, **kwargs: Any) -> Any:
        return await super().fit(2 * n_epochs, *args, **kwargs)


def test_a_subclass_may_override_the_method(make_model: MakeModel, dls: DataLoaders) -> None:
    assert Doubled(make_model(), dls).run(1).epochs == 2


async def test_the_fit_may_be_started_in_a_task_group(learner: TrainLearner) -> None:
    with anyio.fail_after(GUARD):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(learner.fit, 2, True, False)
    assert learner.result is not None
    assert learner.result.steps == 6


def test_the_fit_may_be_a_task_of_asyncio(learner: TrainLearner) -> None:
    async def main() -> Any:
        return await asyncio.wait_for(asyncio.create_task(learner.fit(2)), GUARD)

    assert asyncio.run(main()).steps == 6
    assert asyncio.run(learner.fit(1)).steps == 3

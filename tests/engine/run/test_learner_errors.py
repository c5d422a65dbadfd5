"""Errors name the argument, its value and the way out, before any work where possible."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import anyio
import pytest
import torch
from eventrain.callbacks import MetricsCB, TrainCB
from eventrain.engine import DataLoaders, Learner, MomentumLearner, TrainLearner
from eventrain.events import (
    AfterBatch,
    AfterLoss,
    BeforeBatch,
    Callback,
    GetLoss,
    record_events,
)
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from tests.support.waiting import GUARD

MakeModel = Callable[[], nn.Module]


@contextmanager
def refused(
    learner: Learner, error: type[Exception], *parts: str
) -> Iterator[pytest.ExceptionInfo[Exception]]:
    """The error comes, says all `parts`, and comes before anything has happened."""

    def state() -> list[Any]:
        kept = [learner.opt, learner.result, learner.run_id, learner.dls, learner.cbs]
        return [*kept, learner.bus.subscriptions(), learner.fitting, learner.model.training]

    with record_events(learner) as recorded:
        before = state()
        weights = [p.clone() for p in learner.model.parameters()]
        with pytest.raises(error) as raised:
            yield raised
        assert state() == before
    assert recorded == []
    assert all(map(torch.equal, weights, learner.model.parameters()))
    for part in parts:
        assert part in str(raised.value)


def notes_of(raised: pytest.ExceptionInfo[BaseException]) -> str:
    return "\n".join(getattr(raised.value, "__notes__", []))


CUT_IN_THE_FIRST_EPOCH = ["BeforeFit", "BeforeEpoch", "CleanupEpoch", "CleanupFit"]
CUT_IN_THE_FIRST_BATCH = ["CleanupBatch", "CleanupEpoch", "CleanupFit"]

# ---------------------------------------------------------------------------------------- data

PHASES = pytest.mark.parametrize("phase", ["train", "valid"])


def only(phase: str) -> dict[str, bool]:
    return {"train": phase == "train", "valid": phase == "valid"}


@PHASES
@pytest.mark.parametrize(
    "dls", [None, DataLoaders(), object(), [1, 2]], ids=["None", "DataLoaders", "object", "list"]
)
def test_no_data_for_a_phase_is_refused_with_the_way_out(
    phase: str, dls: Any, learner: TrainLearner
) -> None:
    learner.dls = dls
    with refused(learner, ValueError, f"{phase}=True", f"dls.{phase} is missing"):
        learner.run(1, **only(phase))


@PHASES
def test_the_way_out_of_missing_data_is_one(phase: str, learner: TrainLearner) -> None:
    setattr(learner.dls, phase, None)
    with refused(learner, ValueError, f"Give DataLoaders a {phase} loader", f"fit({phase}=False)"):
        learner.run(1)
    assert learner.run(1, **{phase: False}).status == "completed"


@pytest.mark.parametrize("method", ["validate", "get_preds"])
async def test_inference_without_data_names_its_own_way_out(
    method: str, learner: TrainLearner
) -> None:
    """`fit(valid=False)` is not suggested to a caller who did not call fit."""
    learner.dls.valid = None
    with refused(learner, ValueError, "dls.valid is missing") as raised:
        await getattr(learner, method)()
    assert "fit(" not in str(raised.value)


@PHASES
@pytest.mark.parametrize("loader", [[], (), {}], ids=repr)
def test_an_empty_loader_is_refused(phase: str, loader: Any, learner: TrainLearner) -> None:
    setattr(learner.dls, phase, loader)
    with refused(learner, ValueError, f"dls.{phase} is empty: it has no batches", repr(loader)):
        learner.run(1)


def test_a_loader_emptied_by_drop_last_is_refused_with_the_reason(learner: TrainLearner) -> None:
    data = TensorDataset(torch.ones(3, 3), torch.ones(3, 1))
    learner.dls.train = DataLoader(data, batch_size=4, drop_last=True)
    with refused(learner, ValueError, "dls.train is empty", "drop_last=True", "batch_size"):
        learner.run(1)


@PHASES
@pytest.mark.parametrize("loader", [5, None.__class__, print, 1.5], ids=repr)
def test_a_loader_that_cannot_be_iterated_is_refused(
    phase: str, loader: Any, learner: TrainLearner
) -> None:
    setattr(learner.dls, phase, loader)
    with refused(learner, TypeError, f"dls.{phase} cannot be iterated", repr(loader)):
        learner.run(1)


class Unsized:
    """An iterable without a length."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


@PHASES
async def test_a_loader_that_turns_out_empty_fails_the_epoch(
    phase: str, learner: TrainLearner
) -> None:
    setattr(learner.dls, phase, Unsized([]))
    with record_events(learner) as recorded, anyio.fail_after(GUARD):
        with pytest.raises(ValueError, match=f"dls.{phase} is empty: it has no batches"):
            await learner.fit(1, **only(phase))
    assert recorded.names == CUT_IN_THE_FIRST_EPOCH


def test_an_iterator_is_refused_for_two_epochs_before_any_work(learner: TrainLearner) -> None:
    learner.dls.train = iter(learner.dls.train)
    with refused(learner, ValueError, "an iterator, which can be read only once", "epoch_length="):
        learner.run(2, valid=False)


@PHASES
@pytest.mark.parametrize("junk", [None, 7, "text", True, 1.5, b"x"], ids=repr)
def test_an_invalid_batch_is_named_with_its_place(
    phase: str, junk: Any, learner: TrainLearner
) -> None:
    good = (torch.ones(4, 3), torch.ones(4, 1))
    setattr(learner.dls, phase, [good, junk])
    with (
        record_events(learner) as recorded,
        pytest.raises(TypeError, match="not a batch") as raised,
    ):
        learner.run(1, **only(phase))
    assert f"dls.{phase} yielded {junk!r} as batch 1" in str(raised.value)
    assert f"raised while reading batch 1 of dls.{phase}" in notes_of(raised)
    assert recorded.names[-3:] == ["CleanupBatch", "CleanupEpoch", "CleanupFit"]
    assert recorded.names.count("BeforeBatch") == 1


def test_an_error_of_the_loader_is_its_own_with_the_place_in_a_note(learner: TrainLearner) -> None:
    """G5."""

    def broken() -> Iterator[Any]:
        yield torch.ones(4, 3), torch.ones(4, 1)
        raise OSError("disk gone")

    learner.dls.train = broken()
    with pytest.raises(OSError, match="disk gone") as raised:
        learner.run(1)
    assert notes_of(raised) == "raised while reading batch 1 of dls.train"


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        ((torch.ones(4, 3),), "1 part(s)"),
        ([torch.ones(4, 3)], "1 part(s)"),
        (torch.ones(4, 3), "Tensor"),
    ],
    ids=["tuple", "list", "tensor"],
)
@pytest.mark.parametrize("cls", [TrainLearner, Learner])
def test_a_batch_without_targets_is_reported(
    batch: Any, what: str, cls: type[Learner], make_model: MakeModel
) -> None:
    learner = cls(make_model(), DataLoaders([batch]), cbs=TrainCB())
    with record_events(learner) as recorded, pytest.raises(TypeError, match="targets") as raised:
        learner.run(1, valid=False)
    assert "this batch has no targets: it " in str(raised.value)
    assert what in str(raised.value)
    assert "perform Predict and GetLoss yourself" in str(raised.value)
    assert "on GetLoss, epoch 0, iter 0" in notes_of(raised)
    assert recorded.names[-3:] == CUT_IN_THE_FIRST_BATCH


# ---------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize(
    ("loss_func", "error", "says"),
    [
        (lambda p, y: (p - y) ** 2, ValueError, "must be a scalar: its shape is (4, 1)"),
        (lambda p, y: 0.5, TypeError, "must be a tensor: 0.5 is a float"),
        (lambda p, y: None, TypeError, "must be a tensor: None is a NoneType"),
        (lambda p, y: F.mse_loss(p, y).detach(), ValueError, "does not require grad"),
    ],
    ids=["not a scalar", "a number", "nothing", "detached"],
)
@pytest.mark.parametrize("cls", [TrainLearner, Learner])
def test_a_loss_without_a_backward_pass_is_reported_with_the_reason(
    loss_func: Callable[..., Any],
    error: type[Exception],
    says: str,
    cls: type[Learner],
    make_model: MakeModel,
    dls: DataLoaders,
) -> None:
    learner = cls(make_model(), dls, loss_func, cbs=TrainCB())
    with record_events(learner) as recorded, pytest.raises(error) as raised:
        learner.run(1)
    assert says in str(raised.value)
    assert "raised by TrainCB.backward on Backward, epoch 0, iter 0" in notes_of(raised)
    assert recorded.names[-4:] == ["AfterLoss", *CUT_IN_THE_FIRST_BATCH]


def test_a_frozen_model_is_reported_by_its_loss(learner: TrainLearner) -> None:
    learner.model.requires_grad_(False)
    with pytest.raises(ValueError, match="all are frozen") as raised:
        learner.run(1)
    assert "raised by TrainLearner.backward on Backward" in notes_of(raised)


@pytest.mark.parametrize(
    ("loss_func", "says"),
    [
        (lambda p, y: (p - y) ** 2, "must be a scalar: its shape is (4, 1)"),
        (lambda p, y: 0.5, "must be a tensor: 0.5 is a float"),
    ],
    ids=["not a scalar", "a number"],
)
async def test_a_loss_that_cannot_be_averaged_is_reported_in_validation_too(
    loss_func: Callable[..., Any], says: str, learner: TrainLearner
) -> None:
    learner.loss_func = loss_func
    with pytest.raises((TypeError, ValueError)) as raised, anyio.fail_after(GUARD):
        await learner.validate()
    assert says in str(raised.value)


def test_an_error_of_the_model_is_its_own_and_the_next_fit_is_possible(
    learner: TrainLearner,
) -> None:
    """G5, G9."""
    learner.dls.train.append((torch.ones(4, 5), torch.ones(4, 1)))
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as raised:
        learner.run(1)
    assert notes_of(raised) == "raised by TrainLearner.predict on Predict, epoch 0, iter 3"
    learner.dls.train.pop()
    assert learner.run(1).steps == 3


def test_an_error_of_a_script_stands_alone(learner: TrainLearner) -> None:
    """G5: `run` puts nothing of its own in front of it."""
    learner.loss_func = lambda p, y: 1 / 0
    with pytest.raises(ZeroDivisionError) as raised:
        learner.run(1)
    assert raised.value.__cause__ is None
    assert raised.value.__context__ is None


# ----------------------------------------------------------------------------------- optimizer


@pytest.mark.parametrize("lr", [-0.1, float("nan"), -1, float("-inf")], ids=repr)
@pytest.mark.parametrize("where", ["learner", "fit"])
def test_a_learning_rate_below_zero_or_not_a_number_is_refused(
    lr: float, where: str, learner: TrainLearner
) -> None:
    if where == "learner":
        learner.lr = lr
    with refused(learner, ValueError, f"lr={lr!r}", "0 or more"):
        learner.run(1, lr=lr if where == "fit" else None)
    assert learner.run(1, lr=0.1).steps == 3


def test_an_opt_func_that_raises_is_named(learner: TrainLearner) -> None:
    """G5: its own error, with how it was called in a note."""

    def picky(parameters: Any, lr: float) -> Any:
        raise KeyError("momentum")

    learner.opt_func = picky
    with refused(learner, KeyError, "momentum") as raised:
        learner.run(1)
    assert f"raised by opt_func={picky!r}" in notes_of(raised)
    assert "called as opt_func(model.parameters(), 0.1)" in notes_of(raised)


def test_an_opt_func_with_other_arguments_is_named(learner: TrainLearner) -> None:
    learner.opt_func = lambda: None
    with refused(learner, TypeError, "takes 0 positional arguments") as raised:
        learner.run(1)
    assert f"raised by opt_func={learner.opt_func!r}" in notes_of(raised)


def test_an_opt_func_with_its_own_lr_is_told_where_to_give_it(learner: TrainLearner) -> None:
    learner.opt_func = partial(torch.optim.AdamW, lr=3e-4)
    with refused(learner, TypeError, "multiple values for argument 'lr'") as raised:
        learner.run(1)
    assert "give the learning rate to the learner instead: lr=..." in notes_of(raised)


@pytest.mark.parametrize("where", ["Learner", "attribute"])
@pytest.mark.parametrize(
    ("opt_func", "says"),
    [
        ("AdamW", ["opt_func='AdamW'", "such as torch.optim.AdamW"]),
        ("sgd", ["opt_func='sgd'", "such as torch.optim.SGD"]),
        (3, ["opt_func=3", "a function of (params, lr)"]),
        (
            torch.optim.AdamW([nn.Parameter(torch.ones(1))]),
            [
                "opt_func is an optimizer, AdamW",
                "write opt=... to keep it over all fits",
                "opt_func=AdamW or",
                "opt_func=lambda params, lr: AdamW(params, lr, ...)",
            ],
        ),
    ],
    ids=["name", "other name", "number", "optimizer"],
)
def test_an_opt_func_that_cannot_be_called_is_refused_with_what_to_write(
    opt_func: Any, says: list[str], where: str, learner: TrainLearner
) -> None:
    with refused(learner, TypeError, *says):
        if where == "Learner":
            TrainLearner(learner.model, learner.dls, opt_func=opt_func)
        learner.opt_func = opt_func
        learner.run(1)


def test_a_model_without_parameters_is_reported_by_its_optimizer(dls: DataLoaders) -> None:
    learner = TrainLearner(nn.Identity(), dls)
    with refused(learner, ValueError, "empty parameter list") as raised:
        learner.run(1)
    assert "raised by opt_func=" in notes_of(raised)


@pytest.mark.parametrize("junk", [None, 3, "opt", nn.Linear(1, 1)], ids=lambda x: type(x).__name__)
def test_an_opt_func_that_returns_no_optimizer_is_refused(junk: Any, learner: TrainLearner) -> None:
    learner.opt_func = lambda parameters, lr: junk
    with refused(learner, TypeError, "opt_func=", f"returned {junk!r}", "not an optimizer"):
        learner.run(1)


def sgd(learner: TrainLearner) -> torch.optim.Optimizer:
    return torch.optim.SGD(learner.model.parameters(), 0.1)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        (
            lambda learner: (sgd(learner), sgd(learner)),
            ["returned a tuple of SGD, SGD", "name several in a mapping, such as {'G': ..."],
        ),
        (
            lambda learner: (sgd(learner), "scheduler"),
            ["returned a tuple of SGD, str", "cbs=SchedulerCB(lambda opt: ...)"],
        ),
        (lambda learner: None, ["returned None", "add a return statement"]),
    ],
    ids=["two", "with a scheduler", "nothing"],
)
def test_what_an_opt_func_may_not_return_is_refused_with_what_to_write(
    returned: Any, says: list[str], learner: TrainLearner
) -> None:
    learner.opt_func = lambda params, lr: returned(learner)
    with refused(learner, TypeError, "opt_func=", "not an optimizer", *says):
        learner.run(1)


def test_no_opt_func_and_no_optimizer_is_refused(learner: TrainLearner) -> None:
    learner.opt_func = None
    with refused(learner, ValueError, "opt_func is None", "learner.opt", "not set"):
        learner.run(1)
    assert learner.run(1, train=False).valid_batches == 2


def test_a_failed_fit_keeps_the_optimizer_of_the_last_one(learner: TrainLearner) -> None:
    learner.run(1)
    opt = learner.opt
    learner.opt_func = lambda parameters, lr: None
    with refused(learner, TypeError, "not an optimizer"):
        learner.run(1)
    assert learner.opt is opt


# ------------------------------------------------------------------------------------ arguments


def test_a_rate_beside_an_optimizer_is_refused(learner: TrainLearner) -> None:
    opt = torch.optim.SGD(learner.model.parameters(), 0.2)
    with pytest.raises(ValueError, match=r"lr=0\.5 has no effect with opt=..."):
        TrainLearner(learner.model, learner.dls, lr=0.5, opt=opt)


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (lambda p, y: p, "subscribe a function with learner.on(AfterBatch)"),
        (
            StepLR(torch.optim.SGD([torch.ones(1)], 0.1), 1),
            "give SchedulerCB(lambda opt: ...) for a scheduler",
        ),
    ],
)
def test_what_is_not_a_callback_is_told_its_place(
    wrong: Any, hint: str, learner: TrainLearner
) -> None:
    with pytest.raises(TypeError) as raised:
        learner.add_cbs([wrong])
    assert hint in str(raised.value)


def test_streamed_predictions_in_a_plain_loop_name_both_ways(learner: TrainLearner) -> None:
    with pytest.raises(TypeError, match=r"`async for`; in a script, use run_iter_preds"):
        list(learner.iter_preds())


@pytest.mark.parametrize("n_epochs", [-1, 1.0, 0.5, True, False, "3"], ids=repr)
def test_an_invalid_number_of_epochs_is_refused(n_epochs: Any, learner: TrainLearner) -> None:
    with refused(learner, ValueError, f"n_epochs={n_epochs!r}", "0 or more"):
        learner.run(n_epochs)


def test_the_same_callback_twice_is_refused_and_neither_stays(learner: TrainLearner) -> None:
    metrics = MetricsCB()
    with refused(
        learner, ValueError, "this MetricsCB is attached already", "an instance is attached once"
    ):
        learner.add_cbs([metrics, metrics])
    with refused(learner, ValueError, "MetricsCB is attached already"):
        learner.run(1, cbs=[metrics, metrics])
    with pytest.raises(ValueError, match="MetricsCB is attached already"):
        TrainLearner(learner.model, learner.dls, cbs=[metrics, metrics])
    assert learner.run(1, cbs=metrics).status == "completed"


def test_a_callback_of_the_learner_given_to_fit_again_is_refused(learner: TrainLearner) -> None:
    """G9: and it stays the learner's."""
    metrics = MetricsCB()
    learner.add_cbs(metrics)
    with refused(learner, ValueError, "MetricsCB is attached already", "not to both"):
        learner.run(1, cbs=metrics)
    with refused(learner, ValueError, "MetricsCB is attached already"):
        learner.run(1, cbs=[TrainCB(), metrics])
    assert learner.cbs == (metrics,)
    learner.run(1)
    assert [row["train"] for row in metrics.history] == ["train", "eval"]


def test_two_instances_of_one_class_are_fine(learner: TrainLearner) -> None:
    first, second = MetricsCB(), MetricsCB()
    learner.run(1, cbs=[first, second])
    assert first.history == second.history != []


@pytest.mark.parametrize("wrap", [lambda cb: cb, lambda cb: [MetricsCB(), cb]], ids=["", "list"])
@pytest.mark.parametrize("where", ["Learner", "add_cbs", "fit"])
@pytest.mark.parametrize(
    ("junk", "says"),
    [
        (TrainCB, "TrainCB'> is not a Callback: pass an instance"),
        (Callback, "Callback'> is not a Callback: pass an instance"),
        (7, "7 is not a Callback"),
        (print, "<built-in function print> is not a Callback"),
        ("TrainCB", "'TrainCB' is not a Callback"),
    ],
    ids=["a class", "the base class", "a number", "a function", "a name"],
)
def test_an_object_that_is_not_a_callback_is_refused(
    junk: Any, says: str, where: str, wrap: Callable[[Any], Any], learner: TrainLearner
) -> None:
    with refused(learner, TypeError, says):
        if where == "Learner":
            TrainLearner(learner.model, learner.dls, cbs=wrap(junk))
        elif where == "add_cbs":
            learner.add_cbs(wrap(junk))
        else:
            learner.run(1, cbs=wrap(junk))


def test_none_among_the_callbacks_is_refused(learner: TrainLearner) -> None:
    with refused(learner, TypeError, "None is not a Callback"):
        learner.add_cbs([None])  # type: ignore[list-item]


def test_removing_what_is_not_attached_is_refused(learner: TrainLearner) -> None:
    with refused(learner, ValueError, "MetricsCB", "is not attached to this learner"):
        learner.remove_cbs(MetricsCB())


class Hen(Callback):
    """Waits for the egg."""

    run_after = ("Egg",)

    def before_fit(self, event: Any) -> None: ...


class Egg(Callback):
    """Waits for the hen."""

    run_after = (Hen,)

    def before_fit(self, event: Any) -> None: ...


def test_callbacks_that_wait_for_each_other_are_refused(learner: TrainLearner) -> None:
    with refused(learner, ValueError, "run_after and run_before of", "Hen", "Egg", "cycle"):
        learner.add_cbs([Hen(), Egg()])
    hen = Hen()
    learner.add_cbs(hen)
    with refused(learner, ValueError, "Hen", "Egg", "cycle"):
        learner.run(1, cbs=Egg())
    assert learner.cbs == (hen,)
    assert learner.run(1).status == "completed"


# ------------------------------------------------------------------------- subscribers and stop


@pytest.mark.parametrize("event_type", ["AfterBatch", int, None, Callback, 3], ids=repr)
@pytest.mark.parametrize("how", ["on", "subscribe", "events", "observe"])
def test_a_class_that_is_not_an_event_is_refused(
    event_type: Any, how: str, learner: TrainLearner
) -> None:
    with refused(learner, TypeError, f"{event_type!r} is not an event class", "eventrain.events"):
        if how == "on":
            learner.on(event_type)(print)
        elif how == "subscribe":
            learner.subscribe(event_type, print)
        elif how == "events":
            learner.events(event_type)
        else:
            learner.observe(print, event_type)
    assert learner.streams == []


class Listener:
    """Has receivers with too few arguments, and with too many."""

    def without(self) -> None: ...

    def with_two(self, event: Any, other: Any) -> None: ...


@pytest.mark.parametrize(
    ("receiver", "name"),
    [
        (Listener().without, "Listener.without()"),
        (Listener().with_two, "Listener.with_two(event: 'Any', other: 'Any')"),
        (Listener, "Listener()"),
    ],
    ids=["none", "two", "a class"],
)
def test_a_receiver_that_cannot_take_one_argument_is_refused(
    receiver: Any, name: str, learner: TrainLearner
) -> None:
    with refused(learner, TypeError, name, "cannot receive AfterBatch", "one argument, the event"):
        learner.on(AfterBatch)(receiver)


def test_a_callback_method_without_its_argument_is_refused(learner: TrainLearner) -> None:
    class Forgetful(Callback):
        def before_fit(self, event: Any) -> None: ...

        def after_batch(self) -> None: ...

    with refused(learner, TypeError, "Forgetful.after_batch()", "one argument, the event"):
        learner.add_cbs([MetricsCB(), Forgetful()])
    with refused(learner, TypeError, "Forgetful.after_batch()"):
        learner.run(1, cbs=Forgetful())


def test_a_receiver_must_be_callable(learner: TrainLearner) -> None:
    with refused(learner, TypeError, "a receiver of AfterBatch must be callable: 3"):
        learner.subscribe(AfterBatch, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"every": 0}, "every=0"),
        ({"every": True}, "every=True"),
        ({"every": 1.5}, "every=1.5"),
        ({"order": float("nan")}, "order=nan"),
        ({"order": "first"}, "order='first'"),
    ],
    ids=repr,
)
def test_wrong_options_of_a_subscription_are_refused(
    option: dict[str, Any], says: str, learner: TrainLearner
) -> None:
    with refused(learner, ValueError, says):
        learner.on(AfterBatch, **option)(print)


@pytest.mark.parametrize("scope", ["x", "step", "Fit", None, ""], ids=repr)
def test_an_unknown_scope_to_stop_is_refused(scope: Any, learner: TrainLearner) -> None:
    with refused(learner, ValueError, f"stop(scope={scope!r})", "'fit', 'epoch' or 'batch'"):
        learner.stop(scope)


# ------------------------------------------------------------------------------ one at a time


class Gate(Callback):
    """Holds the training in its second batch until it is opened."""

    def __init__(self) -> None:
        self._token = anyio.lowlevel.current_token()
        self.reached = anyio.Event()
        self._open = threading.Event()

    def before_batch(self, event: BeforeBatch) -> None:
        if event.training and event.epoch == 0 and event.iter == 1:
            anyio.from_thread.run_sync(self.reached.set, token=self._token)
            assert self._open.wait(GUARD)

    def open(self) -> None:
        self._open.set()


CALLS: dict[str, Callable[[TrainLearner], Any]] = {
    "fit": lambda learner: learner.fit(1),
    "fit with callbacks": lambda learner: learner.fit(1, cbs=MetricsCB(), lr=5.0),
    "validate": lambda learner: learner.validate(),
    "validate another": lambda learner: learner.validate([(torch.ones(4, 3), torch.ones(4, 1))]),
    "get_preds": lambda learner: learner.get_preds([(torch.ones(4, 3),)]),
    "lr_find": lambda learner: learner.lr_find(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
async def test_a_second_fit_is_refused_and_leaves_the_first_alone(
    call: Callable[[TrainLearner], Any], learner: TrainLearner, make_model: MakeModel
) -> None:
    """G9: its model, data, callbacks and optimizer are as if nobody had asked."""
    undisturbed = TrainLearner(make_model(), learner.dls)
    results = [await undisturbed.fit(2)]
    gate = Gate()

    async def fit() -> None:
        results.append(await learner.fit(2, cbs=gate))

    with anyio.fail_after(GUARD), record_events(learner) as recorded:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fit)
            await gate.reached.wait()
            before = (learner.dls, learner.opt, learner.run_id, learner.cbs, list(recorded))
            with pytest.raises(RuntimeError) as raised:
                await call(learner)
            after = (learner.dls, learner.opt, learner.run_id, learner.cbs, list(recorded))
            assert after == before
            assert learner.fitting
            assert learner.model.training
            gate.open()
    assert f"fitting already (run {learner.run_id})" in str(raised.value)
    assert "await that fit, or use another learner" in str(raised.value)
    assert [(r.status, r.epochs, r.steps) for r in results] == [("completed", 2, 6)] * 2
    for p, q in zip(learner.model.parameters(), undisturbed.model.parameters(), strict=True):
        assert torch.equal(p, q)
    assert not learner.fitting


async def test_a_receiver_that_fits_its_own_learner_is_refused(learner: TrainLearner) -> None:
    errors: list[RuntimeError] = []

    @learner.on(AfterBatch, once=True)
    async def again(event: AfterBatch) -> None:
        try:
            await event.learner.fit(1)
        except RuntimeError as exc:
            errors.append(exc)

    @learner.on(AfterBatch, once=True)
    def and_again(event: AfterBatch) -> None:
        try:
            event.learner.run(1)
        except RuntimeError as exc:
            errors.append(exc)

    with anyio.fail_after(GUARD):
        result = await learner.fit(1)
    assert len(errors) == 2
    assert all(f"fitting already (run {result.run_id})" in str(error) for error in errors)
    assert (result.status, result.steps) == ("completed", 3)


async def test_run_inside_an_event_loop_says_what_to_call_there(learner: TrainLearner) -> None:
    with refused(learner, RuntimeError, "run() starts an event loop", "await learner.fit(...)"):
        learner.run(1)


# ------------------------------------------------------------------------------ first mistakes


@pytest.mark.parametrize("cls", [Learner, TrainLearner, MomentumLearner])
@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"optim": torch.optim.SGD([nn.Parameter(torch.ones(1))])}, "opt=... for an optimizer"),
        ({"optimizer": torch.optim.Adam}, "opt_func=torch.optim.AdamW"),
        ({"callbacks": [MetricsCB()]}, "cbs=..."),
        ({"loss": F.mse_loss}, "loss_func=..."),
        ({"criterion": F.mse_loss}, "loss_func=..."),
        ({"metrics": []}, "cbs=MetricsCB(accuracy=...)"),
        ({"device": "cpu"}, "cbs=DeviceCB(...)"),
        ({"scheduler": None}, "cbs=SchedulerCB(lambda opt: ...)"),
        ({"train": []}, "dls=DataLoaders(train, valid)"),
        ({"epochs": 3}, "learner.fit(n_epochs)"),
        ({"colour": 3}, None),
    ],
    ids=lambda wrong: next(iter(wrong)) if isinstance(wrong, dict) else "",
)
def test_an_argument_by_another_name_is_told_its_own(
    wrong: dict[str, Any], says: str | None, cls: Any, make_model: MakeModel, dls: DataLoaders
) -> None:
    with pytest.raises(TypeError) as raised:
        cls(make_model(), dls, **wrong)
    start = f"{cls.__name__}() got an unexpected keyword argument '{next(iter(wrong))}'"
    assert str(raised.value).startswith(start)
    assert (says or start) in str(raised.value)


@pytest.mark.parametrize(
    ("method", "keyword", "says"),
    [
        ("run", "epochs", ": write n_epochs=..."),
        ("run", "steps", ": write max_steps=..."),
        ("run", "limit_val_batches", ": write valid_length=..."),
        ("run", "val_check_interval", ": write cbs=ValidateCB(loader, every_steps=...)"),
        ("run", "colour", ""),
        ("fit", "callbacks", ": write cbs=..."),
        ("run_lr_find", "gamma", ": write lr_mult=..."),
        ("lr_find", "num_iter", ": write lr_mult=... and end_lr=..., which say how many"),
    ],
)
def test_an_argument_of_a_method_by_another_name_is_told_its_own(
    method: str, keyword: str, says: str, learner: TrainLearner
) -> None:
    with pytest.raises(TypeError) as raised:
        getattr(learner, method)(**{keyword: 3})  # at the call, not when it is awaited
    start = f"Learner.{method}() got an unexpected keyword argument '{keyword}'{says}"
    assert str(raised.value).startswith(start)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"model": nn.ReLU}, "is a class: pass an instance"),
        ({"model": lambda x: x}, "is not a torch.nn.Module"),
        ({"loss_func": nn.MSELoss}, "loss_func=MSELoss is a class: pass an instance, MSELoss()"),
        ({"loss_func": "mse"}, "loss_func='mse' cannot be called"),
    ],
    ids=["model class", "function", "loss class", "loss name"],
)
def test_a_model_or_loss_that_cannot_be_used_is_refused_when_the_learner_is_made(
    wrong: dict[str, Any], says: str, make_model: MakeModel, dls: DataLoaders
) -> None:
    with pytest.raises(TypeError) as raised:
        TrainLearner(**{"model": make_model(), "dls": dls, **wrong})
    assert says in str(raised.value)


@pytest.mark.parametrize("lr", ["1e-3", torch.optim.SGD], ids=["text", "class"])
def test_a_learning_rate_that_is_text_or_a_class_is_refused(lr: Any, learner: TrainLearner) -> None:
    learner.lr = lr
    with refused(learner, TypeError, f"lr={lr!r}: give a number"):
        learner.run(1)


def test_a_callback_or_a_loader_in_the_place_of_train_is_refused(learner: TrainLearner) -> None:
    with refused(learner, TypeError, "train is a MetricsCB: give True or False", "cbs=..."):
        learner.run(1, MetricsCB())  # type: ignore[arg-type]
    with refused(learner, TypeError, "valid is a list: give True or False"):
        learner.run(1, True, learner.dls.valid)


def test_a_loader_in_the_place_of_dls_is_refused_with_the_way_out(learner: TrainLearner) -> None:
    learner.dls = DataLoader(TensorDataset(torch.ones(3, 3), torch.ones(3, 1)))
    with refused(learner, ValueError, "dls is a DataLoader. Give DataLoaders(train, valid)"):
        learner.run(1)


def test_on_without_its_event_is_refused(learner: TrainLearner) -> None:
    """`@learner.on` would make a decorator of the function, which then is never called."""
    with refused(learner, TypeError, "is not an event class"):
        learner.on(lambda event: None)  # type: ignore[arg-type]


class PerformsItself(TrainLearner):
    def get_loss(self) -> None:
        self.perform(GetLoss)


class PerformsItselfCB(Callback):
    def get_loss(self, event: GetLoss) -> None:
        event.learner.perform(GetLoss)


class EmitsItselfCB(Callback):
    def after_loss(self, event: AfterLoss) -> None:
        event.learner.emit(AfterLoss)


@pytest.mark.parametrize(
    ("cls", "cbs", "who", "says"),
    [
        (PerformsItself, None, "PerformsItself.get_loss", "super().get_loss()"),
        (TrainLearner, PerformsItselfCB(), "PerformsItselfCB.get_loss", "event.proceed()"),
        (TrainLearner, EmitsItselfCB(), "EmitsItselfCB.after_loss", "emit another event"),
    ],
    ids=["learner", "callback", "emits"],
)
def test_a_receiver_that_calls_itself_without_end_is_one_clear_error(
    cls: Any, cbs: Any, who: str, says: str, make_model: MakeModel, dls: DataLoaders
) -> None:
    learner = cls(make_model(), dls)
    with pytest.raises(RecursionError) as raised:
        learner.run(1, cbs=cbs)
    assert str(raised.value).startswith(f"{who} ")
    assert "which calls it again, without end" in str(raised.value)
    assert says in str(raised.value)
    assert len(raised.value.__notes__) == 1
    assert len("".join(traceback.format_exception(raised.value)).splitlines()) < 80
    assert learner.result is not None
    assert learner.result.who == who

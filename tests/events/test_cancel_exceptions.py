"""The cancels as exceptions; what they end is the engine's part."""

from __future__ import annotations

import copy
import pickle

import pytest
from eventrain.events import (
    CancelBatchException,
    CancelEpochException,
    CancelException,
    CancelFitException,
    CancelStepException,
)
from eventrain.events.errors import most_severe, unwrap

CANCELS = [CancelStepException, CancelBatchException, CancelEpochException, CancelFitException]

each_cancel = pytest.mark.parametrize("cancel", CANCELS)


@each_cancel
def test_an_except_exception_does_not_eat_a_cancel(cancel: type[CancelException]) -> None:
    """G3: a receiver's own error handling lets it through."""

    def careful() -> None:
        try:
            raise cancel("enough")
        except Exception:
            pytest.fail("eaten")

    with pytest.raises(cancel):
        careful()


@each_cancel
def test_any_cancel_is_caught_by_their_base(cancel: type[CancelException]) -> None:
    with pytest.raises(CancelException):
        raise cancel
    assert not any(issubclass(cancel, other) for other in CANCELS if other is not cancel)


@each_cancel
def test_a_cancel_says_why(cancel: type[CancelException]) -> None:
    with_reason, without = cancel("loss is good enough"), cancel()
    assert (str(with_reason), with_reason.reason) == ("loss is good enough",) * 2
    assert (str(without), without.reason) == ("", None)
    assert with_reason.who is None


@each_cancel
def test_a_cancel_survives_copying_and_pickling(cancel: type[CancelException]) -> None:
    original = cancel("enough")
    original.who = "Stopper.after_loss"
    for twin in (copy.copy(original), pickle.loads(pickle.dumps(original))):
        assert type(twin) is cancel
        assert (twin.reason, twin.who, twin.args) == ("enough", "Stopper.after_loss", ("enough",))


def test_a_subclass_may_add_what_it_likes() -> None:
    class LossTooHigh(CancelFitException):
        def __init__(self, loss: float) -> None:
            super().__init__(f"the loss is {loss}")
            self.loss = loss

    cancel = LossTooHigh(9.5)
    assert (cancel.reason, cancel.loss, cancel.width) == ("the loss is 9.5", 9.5, 4)


def test_of_several_cancels_the_widest_weighs_most_and_an_error_more() -> None:
    """G5: and of equals the first."""
    cancels = [cancel() for cancel in CANCELS]
    assert [most_severe(cancels[:n]) for n in range(1, 5)] == cancels
    assert most_severe(reversed(cancels)) is cancels[-1]
    first, second = ValueError(), KeyboardInterrupt()
    assert most_severe([*cancels, first, second]) is first
    one, other = CancelBatchException(), CancelBatchException()
    assert most_severe([one, other]) is one


def test_an_error_outside_a_group_is_left_as_it_is() -> None:
    for exc in (ValueError(), CancelFitException(), KeyboardInterrupt()):
        assert unwrap(exc) is exc

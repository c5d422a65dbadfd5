"""Fixtures: events made by hand, and event classes that end with the test that defines them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
from eventrain.events import Bus, Event, ScopeEnd
from eventrain.events.base import HOOKS

MakeEvent = Callable[..., Any]


@pytest.fixture
def bus() -> Bus:
    return Bus()


@pytest.fixture
def make_event() -> MakeEvent:
    """Make an event of any class; fields that are not given get a plain value."""
    plain = {
        "learner": None,
        "run_id": "r1",
        "time": 0.0,
        "purpose": "fit",
        "n_epochs": 2,
        "n_steps": 10,
        "epoch": 1,
        "training": True,
        "n_iter": 5,
        "iter": 3,
        "following": (),
        "n_samples": 16,
        "steps": 8,
        "lr": 0.1,
        "lrs": (0.1,),
        "loss": None,
        "opt": None,
        "end": ScopeEnd("completed"),
        "metrics": {},
        "all_read": True,
        "name": "clean",
        "seconds": 0.5,
    }

    def make(event_type: type[Event], **given: Any) -> Event:
        values = plain | given
        return event_type(**{field.name: values[field.name] for field in fields(event_type)})

    return make


@pytest.fixture(autouse=True)
def _forget_event_classes_of_the_test() -> Iterator[None]:
    before = dict(HOOKS)
    yield
    HOOKS.clear()
    HOOKS.update(before)

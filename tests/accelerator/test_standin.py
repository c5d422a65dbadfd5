"""The stand-in itself is what the other tests of this folder take it for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.accelerator import DEVICE, NOT_ARRIVED, counted, uploads, waits


def test_it_is_the_accelerator_of_its_process() -> None:
    assert str(torch.accelerator.current_accelerator(check_available=True)) == DEVICE


def test_tensors_of_two_devices_do_not_mix() -> None:
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=DEVICE) + torch.ones(3)


def test_reading_a_number_and_a_copy_to_the_host_are_waits() -> None:
    x = torch.arange(3.0).to(DEVICE)
    with counted(waits) as found:
        total = x.sum() * 2
        assert found.total() == 0
        assert total.item() == 6
        assert x.cpu().tolist() == [0, 1, 2]
        x[x > 0]
        torch.Event(DEVICE).synchronize()
    assert found == {"host: test_reading_a_number_and_a_copy_to_the_host_are_waits": 4}


def test_a_blocking_copy_to_the_device_is_counted() -> None:
    with counted(uploads) as found:
        torch.ones(3).to(DEVICE, non_blocking=True)
        torch.ones(3).to(DEVICE)
    assert found.total() == 1


def test_an_asynchronous_copy_arrives_with_an_event() -> None:
    x = torch.arange(3.0).to(DEVICE)
    copy = torch.empty(3).copy_(x, non_blocking=True)
    event = torch.Event(DEVICE)
    event.record(torch.accelerator.current_stream(DEVICE))
    x.zero_()
    assert copy.tolist() == [NOT_ARRIVED] * 3
    assert not event.query()
    assert event.query()
    assert copy.tolist() == [0, 1, 2]


def test_it_has_no_pinned_memory() -> None:
    for pin in (
        lambda: torch.empty(2, pin_memory=True),
        lambda: torch.ones(2).pin_memory(),
        lambda: torch.ones(2, device=DEVICE).to("cpu", non_blocking=True),
    ):
        with pytest.raises(NotImplementedError):
            pin()


def test_it_draws_random_numbers_of_its_own() -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    there = torch.rand(3, device=DEVICE)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, device=DEVICE).cpu(), there.cpu())


def test_a_module_keeps_its_parameters_when_it_is_moved() -> None:
    model = nn.Linear(3, 2)
    before = list(model.parameters())
    model.to(DEVICE)
    assert all(p is q for p, q in zip(model.parameters(), before, strict=True))
    assert {p.device.type for p in before} == {DEVICE}

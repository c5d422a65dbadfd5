"""Runs over HTTP: started, shown, stopped, refused, each like a fit of its own."""

from __future__ import annotations

import io
import json
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from eventrain.callbacks import MetricsCB
from eventrain.engine import DataLoaders, MomentumLearner
from httpx_sse import connect_sse
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torcheval.metrics import MulticlassAccuracy

from examples.datasets import digits_in_memory, get_model
from tests.service.running import Gate, Serve, Service


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the service has for each of so many runs: the order of sums depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("one_thread")
def test_a_run_trains_what_a_fit_trains(service: Service) -> None:
    """To the bit: the same weights and the same history as the learner in a script."""
    run_id = service.start(epochs=2, lr=0.05, seed=7)
    state = service.wait(run_id)

    torch.manual_seed(7)
    model = get_model()
    generator = torch.Generator().manual_seed(7)
    train, valid = digits_in_memory()
    dls = DataLoaders(
        DataLoader(train, 64, shuffle=True, generator=generator),
        DataLoader(valid, 64, generator=generator),
    )
    metrics = MetricsCB(accuracy=MulticlassAccuracy())
    MomentumLearner(model, dls, F.cross_entropy, lr=0.05, cbs=metrics).run(2)

    assert state["status"] == "completed"
    assert (state["who"], state["reason"], state["steps"]) == (None, None, 46)
    assert state["history"] == metrics.history
    assert state["request"] == {
        "dataset": "digits",
        "epochs": 2,
        "lr": 0.05,
        "batch_size": 64,
        "seed": 7,
    }
    answer = service.client.get(f"/runs/{run_id}/weights")
    assert answer.headers["content-disposition"] == f'attachment; filename="{run_id}.pt"'
    weights = torch.load(io.BytesIO(answer.content), weights_only=True)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_run_that_runs_says_so_and_has_no_weights_yet(service: Service) -> None:
    run_id = service.start(epochs=1000)
    assert service.state(run_id)["status"] == "running"
    assert service.client.get(f"/runs/{run_id}/weights").status_code == 409
    service.client.post(f"/runs/{run_id}/stop", json={})
    assert service.wait(run_id)["status"] == "cancelled"
    assert service.client.get(f"/runs/{run_id}/weights").status_code == 200


def test_runs_on_fashion_mnist_found_in_the_folder(service: Service, fashion_mnist: Any) -> None:
    run_id = service.start(dataset="fashion-mnist", epochs=1, batch_size=256)
    state = service.wait(run_id)
    assert state["status"] == "completed"
    assert [row["train"] for row in state["history"]] == ["train", "eval"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("dataset", "imagenet"),
        ("epochs", 0),
        ("epochs", 1001),
        ("epochs", 1.5),
        ("lr", -0.1),
        ("lr", 0),
        ("lr", 1e9),
        ("batch_size", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("momentum", 0.9),
    ],
)
def test_a_field_that_cannot_be_is_named(service: Service, field: str, value: Any) -> None:
    before = len(service.client.get("/runs").json())
    answer = service.client.post("/runs", json={field: value})
    assert answer.status_code == 422
    assert [error["loc"] for error in answer.json()["detail"]] == [["body", field]]
    assert len(service.client.get("/runs").json()) == before


def test_data_that_is_not_there_is_named(serve: Serve) -> None:
    service = serve("--data", "/nowhere")
    answer = service.client.post("/runs", json={"dataset": "fashion-mnist"})
    assert answer.status_code == 422
    (error,) = answer.json()["detail"]
    assert error["loc"] == ["body", "dataset"]
    assert "--data" in error["msg"]
    assert "/nowhere" not in answer.text


@pytest.mark.parametrize(
    ("scope", "ends"),
    [
        ("fit", ["cancelled"] * 2),
        ("epoch", ["cancelled"] + ["completed"] * 4),
        ("batch", ["completed"] * 5),
    ],
)
def test_stop_leaves_the_scope_it_names(
    serve: Serve, gate: Gate, scope: str, ends: list[str]
) -> None:
    """And no other: the fit, its first training epoch, or one batch of that."""
    service = serve("--interval", 0, module="tests.service.faulty", GATE=str(gate.path))
    run_id = service.start(dataset="fashion-mnist", epochs=2, batch_size=1)
    gate.let_through(2)  # that the first batch is over, is known when the second is read
    stop = {"scope": scope, "reason": f"enough of this {scope}"}
    records: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with connect_sse(service.client, "GET", f"/runs/{run_id}/events") as source:
        for message in source.iter_sse():
            if message.data:
                records[message.event].append(json.loads(message.data))
            if message.event == "batch" and len(records["batch"]) == 1:
                answer = service.client.post(f"/runs/{run_id}/stop", json=stop)
                assert answer.status_code == 202
                gate.open()

    ended = records["epoch"] + records["fit_ended"]
    assert [each["status"] for each in ended] == ends
    left = [each for each in ended if each["status"] == "cancelled"]
    assert all((each["who"], each["reason"]) == ("Learner.stop", stop["reason"]) for each in left)
    first, second = (
        [each["iter"] for each in records["batch"] if each["epoch"] == epoch] for epoch in (0, 1)
    )
    assert second == ([] if scope == "fit" else list(range(8)))
    if scope == "batch":
        assert len(first) == 7
    else:
        assert len(first) < 8
        assert first == list(range(len(first)))
    state = service.state(run_id)
    assert (state["status"], state["steps"]) == (ends[-1], len(first + second))
    assert service.client.post(f"/runs/{run_id}/stop", json={}).status_code == 409


def test_stopping_twice_is_harmless(service: Service) -> None:
    run_id = service.start(epochs=1000)
    first, second = (service.client.post(f"/runs/{run_id}/stop", json={}) for _ in range(2))
    assert first.status_code == 202
    assert second.status_code in (202, 409)
    state = service.wait(run_id)
    assert (state["status"], state["reason"]) == ("cancelled", "stopped by a client")


def test_a_scope_that_is_none_is_named(service: Service) -> None:
    run_id = service.start(epochs=1)
    answer = service.client.post(f"/runs/{run_id}/stop", json={"scope": "world"})
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "scope"]
    service.wait(run_id)


def test_more_runs_than_allowed_are_refused_until_one_ends(serve: Serve) -> None:
    service = serve("--max-concurrent", 2)
    first, second = (service.start(epochs=1000) for _ in range(2))
    answer = service.client.post("/runs", json={})
    assert answer.status_code == 429
    assert answer.headers["retry-after"]
    service.client.post(f"/runs/{first}/stop", json={})
    service.wait(first)
    third = service.start(epochs=1)
    assert [run["id"] for run in service.client.get("/runs").json()] == [third, second, first]
    service.client.post(f"/runs/{second}/stop", json={})


def test_the_oldest_that_have_ended_are_forgotten_never_one_that_runs(serve: Serve) -> None:
    service = serve("--max-concurrent", 3, "--max-kept", 2)
    running = service.start(epochs=1000)
    ended = []
    for _ in range(3):
        ended.append(service.start(epochs=1))
        service.wait(ended[-1])
    assert [run["id"] for run in service.client.get("/runs").json()] == [ended[-1], running]
    answer = service.client.get(f"/runs/{ended[0]}")
    assert answer.status_code == 404
    assert ended[0] in answer.json()["detail"]


def test_a_run_that_fails_says_so_and_harms_no_other(serve: Serve) -> None:
    service = serve("--max-concurrent", 2, module="tests.service.faulty", SECONDS="0.01")
    other = service.start(dataset="fashion-mnist", epochs=30)
    broken = service.start(dataset="digits", epochs=3)
    state = service.wait(broken)
    assert state["status"] == "failed"
    assert state["reason"] == "OSError: the disk is gone\nand with it the data"
    (line,) = (line for line in service.lines() if line["event"] == "run_failed")
    assert line["run_id"] == broken
    assert "the disk is gone" in line["exception"]
    assert service.wait(other)["status"] == "completed"


def test_concurrent_runs_have_the_weights_they_have_alone(service: Service) -> None:
    alone = [_weights(service, service.start(epochs=2, seed=seed)) for seed in range(4)]
    together = [service.start(epochs=2, seed=seed) for seed in range(4)]
    assert [_weights(service, run_id) for run_id in together] == alone
    assert len(set(alone)) == 4


def _weights(service: Service, run_id: str) -> bytes:
    assert service.wait(run_id)["status"] == "completed"
    weights: bytes = service.client.get(f"/runs/{run_id}/weights").content
    return weights


def test_its_interface_is_described_and_loads_no_script(service: Service) -> None:
    paths = service.client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/runs",
        "/runs/{run_id}",
        "/runs/{run_id}/events",
        "/runs/{run_id}/stop",
        "/runs/{run_id}/weights",
        "/session",
    }
    assert service.client.get("/docs").status_code == 404


@pytest.mark.parametrize("path", ["/", "/page/page.js", "/page/vendor/uPlot.iife.min.js"])
def test_the_pages_files_are_asked_for_anew(service: Service, path: str) -> None:
    answer = service.client.get(path)
    assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-cache")
    again = service.client.get(path, headers={"if-none-match": answer.headers["etag"]})
    assert again.status_code == (200 if path == "/" else 304)

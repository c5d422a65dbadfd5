"""Train on what clients send: uvicorn examples.train_from_queue:app"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated

import anyio
import torch
from eventrain.engine import AsyncLoader, DataLoaders, TrainLearner
from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, Field
from torch import nn

WAITING, AHEAD, PATIENCE = 8, 2, 1.0
"""Batches that wait in the queue, and those read ahead of the training; seconds for room."""

Number = Annotated[float, Field(allow_inf_nan=False)]
Features = Annotated[list[Number], Field(min_length=3, max_length=3)]


class Samples(BaseModel):
    """A batch: as many rows of three features as targets."""

    inputs: Annotated[list[Features], Field(min_length=1, max_length=1024)]
    targets: Annotated[list[Number], Field(min_length=1, max_length=1024)]


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Train while the app runs; at its end, on what is still waiting."""
    app.state.batches, received = anyio.create_memory_object_stream[object](WAITING)
    torch.manual_seed(0)
    source = AsyncLoader(received, buffer=AHEAD)
    app.state.learner = TrainLearner(nn.Linear(3, 1), DataLoaders(source), lr=0.01)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(train, app)
        yield
        app.state.batches.close()  # the fit ends when it has trained on what is waiting


async def train(app: FastAPI) -> None:
    """Train until the queue is closed."""
    learner = app.state.learner
    with suppress(Exception):  # it is in learner.result, and must not end the app
        await learner.fit(valid=False)
    print(f"{learner.result.status}: {learner.result.batches} batches", flush=True)


app = FastAPI(lifespan=lifespan)


@app.post("/batches", status_code=202)
async def add(samples: Samples) -> int:
    """Queue a batch; 503 if there is no room, because the training is behind."""
    if len(samples.inputs) != len(samples.targets):
        raise HTTPException(422, "inputs and targets differ in length")
    batch = torch.tensor(samples.inputs), torch.tensor(samples.targets)[:, None]
    try:
        with anyio.fail_after(PATIENCE):
            await app.state.batches.send(batch)
    except TimeoutError:
        raise HTTPException(503, "the training is behind", {"Retry-After": "1"}) from None
    except (anyio.BrokenResourceError, anyio.ClosedResourceError):
        raise HTTPException(503, "the training has ended") from None
    return int(app.state.batches.statistics().current_buffer_used)


@app.get("/model")
async def model() -> tuple[int, list[float]]:
    """How many batches the model was trained on, and its weights."""
    learner = app.state.learner
    return learner.progress[True].batches, learner.model.weight.flatten().tolist()

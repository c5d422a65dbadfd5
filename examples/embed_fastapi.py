"""A minimal FastAPI app that runs fits: uvicorn examples.embed_fastapi:app"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import anyio
from eventrain.callbacks import MetricsCB
from eventrain.engine import Learner, MomentumLearner
from eventrain.events import CleanupEpoch
from fastapi import FastAPI, HTTPException, Response
from pydantic import PositiveFloat, PositiveInt
from pydantic_core import to_json
from sse_starlette import EventSourceResponse
from torch.nn import functional as F

from .datasets import digits, get_model

dls, fits = digits(), dict[int, Learner]()


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with anyio.create_task_group() as app.state.tasks:
        yield
        app.state.tasks.cancel_scope.cancel()  # each fit ends at its next event


app = FastAPI(lifespan=lifespan)


async def train(learner: Learner, epochs: int) -> None:
    with suppress(Exception):  # it is in learner.result, and must not end other fits
        await learner.fit(epochs)


@app.post("/fits", status_code=202)
async def start(epochs: PositiveInt = 10, lr: PositiveFloat = 0.1) -> int:
    if sum(learner.fitting for learner in fits.values()) >= 2:
        raise HTTPException(429, "two fits are running: wait, or stop one")
    learner = fits[len(fits)] = MomentumLearner(get_model(), dls, F.cross_entropy, lr, MetricsCB())
    app.state.tasks.start_soon(train, learner, epochs)
    return len(fits) - 1


@app.post("/fits/{number}/stop")
async def stop(number: int) -> bool:
    return number in fits and fits[number].stop(reason="stopped by a client")


@app.get("/fits/{number}/events", response_model=None)
async def events(number: int) -> Response:
    async def epochs(learner: Learner) -> AsyncIterator[str]:
        async with learner.events(CleanupEpoch) as stream:
            if learner.fitting:  # it may have ended in the meantime
                async for event in stream:
                    yield to_json([event.epoch, dict(event.metrics)], inf_nan_mode="null").decode()

    ended = number not in fits or not fits[number].fitting
    return Response(status_code=204) if ended else EventSourceResponse(epochs(fits[number]))

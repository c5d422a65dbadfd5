"""The application: routes behind a guard, and the task group that the runs live in."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .guard import Guard, Sessions
from .routes import PAGE, router
from .runs import Data, Runs
from .settings import Settings


def create_app(settings: Settings, data: Mapping[str, Data]) -> FastAPI:
    """Make the application.

    Args:
        settings: the settings of the service.
        data: the datasets that runs may train on, by name.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            app.state.runs = Runs(tasks, data, settings)
            yield
            await app.state.runs.close(settings.deadline)
            tasks.cancel_scope.cancel()

    # FastAPI's own documentation pages load scripts from other sites.
    app = FastAPI(title="eventrain", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.settings = settings
    app.state.sessions = Sessions(settings.token)
    app.state.open_streams = set()
    app.include_router(router)
    app.add_exception_handler(RequestValidationError, name_fields)
    app.mount("/page", PageFiles(directory=PAGE))
    app.add_middleware(
        Guard, sessions=app.state.sessions, max_body=settings.max_body, private="/runs"
    )
    app.add_middleware(
        TrustedHostMiddleware, allowed_hosts=settings.allowed_hosts, www_redirect=False
    )
    return app


class PageFiles(StaticFiles):
    """The files of the page. Browsers check on each request that theirs are up to date."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers["cache-control"] = "no-cache"
        return response


async def name_fields(request: Request, exc: Exception) -> JSONResponse:
    """Answer 422 without the invalid values: they may be a token, or not representable in JSON."""
    assert isinstance(exc, RequestValidationError)
    detail = [{key: error[key] for key in ("loc", "msg", "type")} for error in exc.errors()]
    return JSONResponse({"detail": detail}, 422)

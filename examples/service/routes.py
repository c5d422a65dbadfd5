"""The routes of the API and the page."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, HTTPException, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field
from sse_starlette import EventSourceResponse

from .guard import SESSION_SECONDS, cookie_name
from .runs import NewRun, Run, Runs, RunState, RunSummary
from .stream import EventStream

PAGE = FilePath(__file__).parent / "page"


class Refused(BaseModel):
    """Why a request was refused."""

    detail: str


router = APIRouter(
    responses={
        401: {"model": Refused, "description": "The token is missing or wrong"},
        403: {"model": Refused, "description": "The request comes from another site"},
        404: {"model": Refused, "description": "There is no such run"},
        409: {"model": Refused, "description": "The state of the run does not allow this"},
        429: {"model": Refused, "description": "The limit is reached: try again later"},
        503: {"model": Refused, "description": "The service is shutting down"},
    }
)


class Stop(BaseModel):
    """The scope to stop, and the reason."""

    model_config = ConfigDict(extra="forbid")

    scope: Literal["fit", "epoch", "batch"] = "fit"
    reason: Annotated[str, Field(min_length=1, max_length=200)] = "stopped by a client"


class Token(BaseModel):
    """The token that the service was started with."""

    token: Annotated[str, Field(max_length=1000)]


async def all_runs(request: Request) -> Runs:
    """Return the runs of the service."""
    runs: Runs = request.app.state.runs
    return runs


AllRuns = Annotated[Runs, Depends(all_runs)]


async def one_run(runs: AllRuns, run_id: Annotated[str, Path(pattern="^[0-9a-f]{16}$")]) -> Run:
    """Return the run with the id in the path."""
    if run := runs.get(run_id):
        return run
    raise HTTPException(404, f"no run {run_id}: it never existed, or was forgotten")


OneRun = Annotated[Run, Depends(one_run)]


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """Serve the page."""
    return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})


@router.post("/runs", status_code=201)
async def start(new: NewRun, runs: AllRuns, response: Response) -> RunState:
    """Start a run, and answer immediately."""
    if new.dataset not in runs.data:
        there = f"not on this server, which has {', '.join(runs.data)}; see its option --data"
        detail = {"loc": ("body", "dataset"), "msg": there, "type": "missing_data"}
        raise RequestValidationError([detail])
    if runs.closing:
        raise HTTPException(503, "the service is shutting down")
    if runs.full:
        raise HTTPException(
            429, f"{len(runs.active)} runs are running: try again later", {"retry-after": "10"}
        )
    run = await runs.start(new)
    response.headers["location"] = f"/runs/{run.id}"
    return run.state()


@router.get("/runs")
async def list_runs(runs: AllRuns) -> list[RunSummary]:
    """List the remembered runs, newest first."""
    return [run.summary() for run in runs]


@router.get("/runs/{run_id}")
async def show(run: OneRun) -> RunState:
    """Show the progress and the history of a run, and how it ended."""
    return run.state()


@router.post("/runs/{run_id}/stop", status_code=202)
async def stop(run: OneRun, what: Stop) -> RunState:
    """Ask a run to leave its fit, epoch or batch at its next event."""
    if not run.stop(what.scope, what.reason):
        raise HTTPException(409, f"run {run.id} is not running")
    return run.state()


@router.get("/runs/{run_id}/weights")
async def weights(run: OneRun) -> Response:
    """Return the `state_dict` of a run that has ended, for `torch.load(weights_only=True)`."""
    if run.weights is None:
        raise HTTPException(409, f"run {run.id} has no weights{'' if run.ended else ' yet'}")
    as_file = {"content-disposition": f'attachment; filename="{run.id}.pt"'}
    return Response(run.weights, media_type="application/octet-stream", headers=as_file)


@router.get("/runs/{run_id}/events", response_class=EventSourceResponse)
async def events(
    request: Request, run: OneRun, last_event_id: Annotated[int, Header(ge=0)] = 0
) -> Response:
    """Stream the events of a run as server-sent events; `Last-Event-ID` resumes."""
    if last_event_id > run.journal.last:
        raise HTTPException(409, f"there is no event {last_event_id} yet")
    if run.journal.ended and last_event_id == run.journal.last:
        return Response(status_code=204)  # makes an EventSource not reconnect
    state = request.app.state
    return EventStream(run, last_event_id, state.settings, state.open_streams)


@router.post("/session", status_code=204)
async def log_in(given: Token, request: Request, response: Response) -> None:
    """Exchange the token for a cookie."""
    cookie = request.app.state.sessions.open(given.token)
    if cookie is None:
        raise HTTPException(401, "the token is wrong")
    response.set_cookie(
        cookie_name(request.scope),
        cookie,
        max_age=SESSION_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )

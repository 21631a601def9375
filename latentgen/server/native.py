"""Our own API: `/jobs`."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request
from fastapi.responses import FileResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from .drawing import FORMATS, Drawing
from .jobs import JobState, Status
from .service import Service

__all__ = ["ProgressView", "pictures_of", "router", "service_of", "view"]

router = APIRouter(tags=["jobs"])

# of endpoints that answer with something else than JSON
NO_SUCH: dict[int | str, dict[str, Any]] = {
    404: {"description": "There is no such one", "content": {"application/json": {}}}
}
PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {f"image/{form}": {} for form in FORMATS}}
}


def service_of(request: Request) -> Service:
    """The server's jobs, for endpoints."""
    return request.app.state.service


TheService = Annotated[Service, Depends(service_of)]


class Accepted(BaseModel):
    id: str
    status: Status


class ProgressView(BaseModel):
    """How far a running job is."""

    index: int = Field(description="steps that are done")
    total: int
    fraction: float = Field(description="from 0 to 1")
    seconds_left: float | None = Field(description="None before the first step is done")


class ImageView(BaseModel):
    url: str = Field(description="a path on this server")
    seed: int


class JobView(BaseModel):
    """All about a job. Times are seconds since 1970."""

    id: str
    status: Status
    created: float
    ended: float | None
    model: str
    request: dict[str, Any] = Field(description="with every default filled in")
    seeds: list[int]
    output_format: str
    progress: ProgressView | None
    images: list[ImageView] = Field(description="of a job that is done; without those deleted")
    seconds: float | None = Field(description="that drawing took")
    error: str | None = Field(description="why it failed")


class JobList(BaseModel):
    jobs: list[JobView]


class Deleted(BaseModel):
    deleted: str = Field(description="the id")


class Page(BaseModel):
    """Which part of a list is asked for."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(50, ge=1, le=200)
    offset: int = Field(0, ge=0, le=2**31)


class JobPage(Page):
    status: Status | None = None


class GalleryView(BaseModel):
    images: list[str] = Field(description="paths on this server")


def view(service: Service, state: JobState) -> JobView:
    """A job's state as clients see it."""
    progress = service.live.running.get(state.id) if state.ended is None else None
    names = state.result["files"] if state.result is not None else []
    job = state.job
    return JobView(
        id=state.id,
        status=state.status,
        created=job.created,
        ended=state.ended,
        model=job.model,
        request=job.request,
        seeds=job.seeds,
        output_format=job.output_format,
        progress=None
        if progress is None
        else ProgressView(
            index=progress.index,
            total=progress.total,
            fraction=progress.fraction,
            seconds_left=progress.seconds_left,
        ),
        images=[
            ImageView(url=f"/images/{name}", seed=seed)
            for name, seed in zip(names, job.seeds, strict=False)
            if service.picture(name) is not None
        ],
        seconds=state.result["seconds"] if state.result is not None else None,
        error=None if state.error is None else service.settings.told(state.error),
    )


def pictures_of(service: Service, state: JobState) -> list[tuple[int, bytes]]:
    """The pictures of a job that is done, each with its seed; without those that somebody deleted
    meanwhile. It reads files: not for the event loop."""
    found = []
    for seed, file in zip(state.job.seeds, service.pictures(state), strict=False):
        with contextlib.suppress(FileNotFoundError):
            found.append((seed, file.read_bytes()))
    return found


@router.post("/jobs", status_code=202)
async def submit(drawing: Drawing, service: TheService) -> Accepted:
    """Put a drawing into the queue."""
    job = await service.submit(lambda: (drawing, {}))
    return Accepted(id=job.id, status="queued")


@router.get("/jobs")
def list_jobs(service: TheService, page: Annotated[JobPage, Query()]) -> JobList:
    """Jobs, the newest first."""
    states = service.jobs.newest(page.limit, page.offset, page.status)
    return JobList(jobs=[view(service, state) for state in states])


def the_job(id: str, service: TheService) -> JobState:
    state = service.jobs.get(id)
    if state is None:
        raise HTTPException(404, f"there is no job {id[:80]!r}")
    return state


TheJob = Annotated[JobState, Depends(the_job)]


@router.get("/jobs/{id}")
def get_job(state: TheJob, service: TheService) -> JobView:
    """Look at a job."""
    return view(service, state)


@router.get("/jobs/{id}/events", response_class=EventSourceResponse, responses=NO_SUCH)
async def follow_job(state: TheJob, service: TheService) -> AsyncIterator[ServerSentEvent]:
    """Follow a job: `status` (the job) when it changes and when it has ended, `progress` after each
    step, `preview` (`number`, `png` in base64) as often as the drawing's `previews` says."""
    status: str | None = None
    shown, index = 0, -1
    async for now in service.live.follow(state.id):
        progress = service.live.running.get(now.id)
        if progress is not None and now.ended is None:
            for number, png in enumerate(progress.previews[shown:], shown):
                shown = number + 1
                facts = {"number": number, "png": base64.b64encode(png).decode()}
                yield ServerSentEvent(event="preview", data=facts)
            if progress.index != index:
                index = progress.index
                yield ServerSentEvent(event="progress", data=view(service, now).progress)
        if now.status != status:
            status = now.status
            yield ServerSentEvent(event="status", data=view(service, now))


@router.post("/jobs/{id}/cancel")
async def cancel_job(state: TheJob, service: TheService) -> JobView:
    """Cancel a job that has not ended; one that has stays as it is."""
    after = await service.live.cancel(state.id)
    return view(service, after if after is not None else state)


@router.delete("/jobs/{id}")
async def delete_job(state: TheJob, service: TheService) -> Deleted:
    """Cancel a job if it has not ended, and delete it with its pictures."""
    await service.delete(state)
    return Deleted(deleted=state.id)


@router.get("/images")
def list_images(service: TheService, page: Annotated[Page, Query()]) -> GalleryView:
    """Finished pictures, the newest first, by their files alone."""
    names = service.gallery(page.limit, page.offset)
    return GalleryView(images=[f"/images/{name}" for name in names])


@router.get("/images/{day}/{name}", response_class=FileResponse, responses=PICTURE | NO_SUCH)
def get_image(day: str, name: str, service: TheService) -> FileResponse:
    """A picture, with its metadata inside."""
    file = service.picture(f"{day}/{name}")
    if file is None:
        raise HTTPException(404, "there is no such picture")
    return FileResponse(file, media_type=f"image/{file.suffix[1:]}")

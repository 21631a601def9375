"""The application: what is served where, and what goes wrong in which words."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import InvalidRequest
from . import native, openai, page, webui
from .drawing import first_of
from .guard import Guard
from .jobs import QueueFull
from .service import Gone, Service
from .settings import Settings

__all__ = ["create_app"]

METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}  # anybody can invent more


class Problem(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = Field(description="the field that is wrong")
    code: str | None


class Refusal(BaseModel):
    """The shape of OpenAI's errors, and of ours."""

    error: Problem


class WebuiRefusal(BaseModel):
    """The shape of the WebUI's errors."""

    error: str
    detail: str
    body: str
    errors: str


REFUSALS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Refusal}, "5XX": {"model": Refusal}}
WEBUI_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": WebuiRefusal},
    "5XX": {"model": WebuiRefusal},
}


def create_app(settings: Settings) -> FastAPI:
    """The server as an ASGI application; its worker lives as long as it does."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service = app.state.service = Service(settings)
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="latentgen",
        version=__version__,
        summary="Pictures from text with latent diffusion.",
        lifespan=lifespan,
        max_body_size=settings.max_body,
        docs_url=None,  # their scripts would come from elsewhere
        redoc_url=None,
    )
    app.include_router(native.router, responses=REFUSALS)
    app.include_router(openai.router, responses=REFUSALS)
    app.include_router(webui.router, responses=WEBUI_REFUSALS)
    _add_errors(app, settings)
    _add_watching(app, settings)
    app.add_middleware(Guard, settings=settings)
    return page.mount(app, settings)


def _add_errors(app: FastAPI, settings: Settings) -> None:
    """Every refusal is JSON, says what would work, and has the shape of the API it belongs to."""

    def answer(
        request: Request, status: int, message: str, field: str | None = None
    ) -> JSONResponse:
        body: BaseModel
        message = settings.told(message)
        if request.url.path.startswith(webui.router.prefix):
            body = WebuiRefusal(error="HTTPException", detail=message, body="", errors="")
        else:
            kind = "invalid_request_error" if status < 500 else "server_error"
            problem = Problem(message=message, type=kind, param=field, code=None)
            body = Refusal(error=problem)
        headers = {}
        if status == 429:
            live = request.app.state.service.live
            headers["Retry-After"] = str(min(60, max(1, math.ceil(live.mean_seconds))))
        elif status >= 500:
            headers["x-should-retry"] = "false"  # it would fail again
        return JSONResponse(body.model_dump(), status, headers)

    def in_their_words(request: Request, field: str) -> str:
        for api in (openai, webui):
            if request.url.path.startswith(api.router.prefix):
                return api.NAMES.get(field, field)
        return field

    @app.exception_handler(InvalidRequest)
    async def invalid(request: Request, error: InvalidRequest) -> JSONResponse:
        field = in_their_words(request, error.field)
        message = str(error).replace(error.field, field, 1)
        unknown_model = error.field == "model" and request.url.path.startswith("/v1/")
        return answer(request, 404 if unknown_model else 400, message, field)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> JSONResponse:
        field, hint = first_of(error.errors())
        field = field.partition(".")[2]  # without "body"
        return answer(request, 400, f"{field}: {hint}" if field else hint, field)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return answer(request, error.status_code, str(error.detail))

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        return answer(request, 429, "as many jobs wait as may wait; come again later")

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> JSONResponse:
        return answer(request, 499, "nobody waits for the answer any more")

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> JSONResponse:
        return answer(request, 500, "something went wrong here; the log tells what")


def _add_watching(app: FastAPI, settings: Settings) -> None:
    """/health, and /metrics for Prometheus."""
    registry = CollectorRegistry()
    requests = Counter(
        "latentgen_http_requests", "Answers", ["method", "path", "status"], registry=registry
    )
    seconds = Histogram(
        "latentgen_http_seconds", "Until an answer began", ["path"], registry=registry
    )
    jobs = Gauge("latentgen_jobs_open", "Jobs that have not ended", registry=registry)
    running = Gauge("latentgen_jobs_running", "Jobs being drawn", registry=registry)
    deaths = Gauge("latentgen_worker_deaths", "Times that the worker died", registry=registry)
    ready = Gauge("latentgen_worker_ready", "Whether the worker takes jobs", registry=registry)
    started = time.time()
    Gauge("latentgen_start_time_seconds", "Since 1970", registry=registry).set(started)

    class Count:
        def __init__(self, app: ASGIApp) -> None:
            self.app = app

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await self.app(scope, receive, send)
            begin = time.perf_counter()

            async def count(message: Message) -> None:
                if message["type"] == "http.response.start":
                    path = getattr(scope.get("route"), "path", "other")
                    method = scope["method"] if scope["method"] in METHODS else "other"
                    requests.labels(method, path, message["status"]).inc()
                    seconds.labels(path).observe(time.perf_counter() - begin)
                await send(message)

            await self.app(scope, receive, count)

    app.add_middleware(Count)

    @app.get("/health", tags=["operation"])
    async def health(request: Request) -> dict[str, Any]:
        """Whether the server answers and its worker is ready."""
        live = request.app.state.service.live
        return {"status": "ok", "worker": "ready" if live.ready.is_set() else "starting"}

    @app.get("/metrics", tags=["operation"], response_class=PlainTextResponse)
    async def metrics(request: Request) -> PlainTextResponse:
        """For Prometheus."""
        service = request.app.state.service
        jobs.set(service.open)
        running.set(len(service.live.running))
        deaths.set(service.live.deaths)
        ready.set(service.live.ready.is_set())
        return PlainTextResponse(
            generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

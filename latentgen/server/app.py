"""The application: what is served where, and what goes wrong in which words."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import sqlalchemy as sa
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.security import HTTPBasic, HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .. import __version__
from ..errors import InvalidRequest
from . import controlunit, native, openai, page, webui
from .bodies import Bodies
from .drawing import first_of
from .guard import Guard
from .jobs import QueueFull
from .log import without_values
from .refusals import JSON_REFUSALS, REFUSALS, WEBUI_REFUSALS, refusal
from .service import Gone, Leaving, Service
from .settings import Settings

__all__ = ["create_app"]

METHODS = ("DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT")  # anybody can invent more
OURS = (
    "/v1",
    "/sdapi",
    "/controlnet",
    "/jobs",
    "/images",
    "/health",
    "/metrics",
)  # the rest is the page

log = logging.getLogger(__name__)


class Bearer(HTTPBearer):
    """For the OpenAPI document: the guard asks for the token, and these for nothing more."""

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        return None


class Basic(HTTPBasic):
    """The same; FastAPI's own would refuse what is not ASCII."""

    async def __call__(self, request: Request) -> None:  # type: ignore[override]
        return None


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
        docs_url=None,  # their scripts would come from elsewhere
        redoc_url=None,
    )
    doors = (Bearer(scheme_name="HTTPBearer"), Basic(scheme_name="HTTPBasic"))
    locks = [Depends(door) for door in doors if settings.token is not None]
    app.include_router(native.router, responses=JSON_REFUSALS, dependencies=locks)
    app.include_router(openai.router, responses=REFUSALS, dependencies=locks)
    app.include_router(webui.router, responses=WEBUI_REFUSALS, dependencies=locks)
    app.include_router(controlunit.router, responses=REFUSALS, dependencies=locks)
    _add_errors(app, settings)
    app.add_middleware(Bodies, settings=settings)
    app.add_middleware(Guard, settings=settings)
    _add_watching(app, settings, locks)
    for prefix in OURS:
        for path in (prefix, f"{prefix}/{{rest:path}}"):
            app.router.routes.append(Route(path, Stray(app), include_in_schema=False))
    return page.mount(app, settings)


class Stray:
    """Answers what no endpoint of the APIs does, in their words and not the page's."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self._endpoints = list(app.routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = [method for method in METHODS if self._is_answered({**scope, "method": method})]
        if scope["method"] == "HEAD" and "GET" in allowed:  # the same without the body
            return await self.app.router({**scope, "method": "GET"}, receive, send)
        if not allowed:
            raise HTTPException(404, "there is nothing here")
        allowed += ["HEAD"] * ("GET" in allowed)
        hint = f"{scope['method'][:20]} does not work here; these do: {', '.join(allowed)}"
        raise HTTPException(405, hint, {"Allow": ", ".join(allowed)})

    def _is_answered(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self._endpoints)


def _add_errors(app: FastAPI, settings: Settings) -> None:
    """Every refusal is JSON, says what would work, and has the shape of the API it belongs to."""

    def answer(
        request: Request, status: int, message: str, field: str | None = None
    ) -> JSONResponse:
        headers = {}
        if status == 429:
            live = request.app.state.service.live
            headers["Retry-After"] = str(min(60, max(1, math.ceil(live.mean_seconds))))
        elif status >= 500:
            headers["x-should-retry"] = "false"  # it would fail again
        return refusal(request.url.path, status, settings.told(message), field, headers)

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
        field = "" if field.isdecimal() else field  # where JSON is broken is no field
        return answer(request, 400, f"{field}: {hint}" if field else hint, field)

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        told = answer(request, error.status_code, str(error.detail))
        told.headers.update(error.headers or {})
        return told

    @app.exception_handler(QueueFull)
    async def full(request: Request, error: QueueFull) -> JSONResponse:
        return answer(request, 429, "as many jobs wait as may wait; come again later")

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> JSONResponse:
        return answer(request, 499, "nobody waits for the answer any more")

    @app.exception_handler(Leaving)
    async def leaving(request: Request, error: Leaving) -> JSONResponse:
        return answer(request, 503, str(error))

    @app.exception_handler(sa.exc.OperationalError)
    @app.exception_handler(OSError)
    async def stuck(request: Request, error: sa.exc.OperationalError | OSError) -> JSONResponse:
        """A full disk, most of the time, or a database that went away."""
        log.error("an answer failed: %s", without_values(error))
        reason = error.strerror if isinstance(error, OSError) else error.orig
        reason = reason or type(error).__name__
        return answer(request, 503, f"the server cannot read or write its files: {reason}")


def _add_watching(app: FastAPI, settings: Settings, locks: list[Any]) -> None:
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
            answered = False

            async def count(message: Message) -> None:
                nonlocal answered
                if message["type"] == "http.response.start":
                    answered = True
                    path = getattr(scope.get("route"), "path", "other")
                    method = scope["method"] if scope["method"] in METHODS else "other"
                    requests.labels(method, path, message["status"]).inc()
                    seconds.labels(path).observe(time.perf_counter() - begin)
                await send(message)

            try:
                await self.app(scope, receive, count)
            except Exception as error:
                log.error("an answer failed: %s", without_values(error))
                if not answered:
                    text = "something went wrong here; the log tells what"
                    retry = {"x-should-retry": "false"}  # it would fail again
                    told = refusal(scope["path"], 500, text, headers=retry)
                    await told(scope, receive, count)

    app.add_middleware(Count)

    @app.get("/health", tags=["operation"], responses=REFUSALS)
    async def health(request: Request) -> dict[str, Any]:
        """Whether the server answers and its worker is ready."""
        live = request.app.state.service.live
        return {"status": "ok", "worker": "ready" if live.ready.is_set() else "starting"}

    @app.get(
        "/metrics",
        tags=["operation"],
        response_class=PlainTextResponse,
        responses=JSON_REFUSALS,
        dependencies=locks,
    )
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

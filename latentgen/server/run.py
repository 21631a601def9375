"""Start a server: check what it would do, then listen."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket

import h11
import uvicorn
from fastapi import FastAPI
from filelock import FileLock, Timeout
from uvicorn.protocols.http.h11_impl import H11Protocol

from .. import startup
from ..errors import InvalidRequest
from .app import create_app
from .guard import check_exposure
from .jobs import alone
from .log import log_as_json
from .settings import Settings

__all__ = ["serve"]

CONNECTIONS = 512  # beyond them, requests are answered 503
STOPPED = 5  # seconds after which whoever still waits is cut off


class Patient(H11Protocol):
    """A connection. uvicorn closes one on which nothing comes after an answer; this one also if
    there never comes the whole head of a request."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        later, end = self.timeout_keep_alive, self.timeout_keep_alive_handler
        self.timeout_keep_alive_task = self.loop.call_later(later, end)

    def data_received(self, data: bytes) -> None:
        waiting, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        super().data_received(data)  # ends the waiting with the first byte
        if waiting is not None and self.conn.their_state is h11.IDLE:
            self.timeout_keep_alive_task = waiting
        elif waiting is not None:
            waiting.cancel()


class Server(uvicorn.Server):
    """uvicorn's, which tells the service that it is being stopped, and which stops if the worker
    says that it can draw nothing as it was told to."""

    def __init__(self, app: FastAPI, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._app = app
        self.refused: InvalidRequest | None = None

    async def on_tick(self, counter: int) -> bool:
        self.refused = self._app.state.service.live.refused
        return await super().on_tick(counter) or self.refused is not None

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.service.leave()
        await super().shutdown(sockets)


def serve(settings: Settings) -> None:
    """Serve until somebody stops it.

    Raises:
        InvalidRequest: there is no such model, device or address, others could reach it without a
            token, or another server keeps its things in the same folder or database.
    """
    check_exposure(settings)
    settings.models()
    try:
        settings.data_dir.mkdir(parents=True, exist_ok=True)
        lock = FileLock(settings.data_dir / "server.lock")
        lock.acquire(timeout=0)
    except Timeout:
        hint = "another server uses it; stop that one, or give another LATENTGEN_HOME"
        raise InvalidRequest("data_dir", str(settings.data_dir), hint) from None
    except OSError as error:
        hint = f"cannot be written ({error.strerror}); set LATENTGEN_HOME"
        raise InvalidRequest("data_dir", str(settings.data_dir), hint) from None
    with alone(settings.database):
        log_as_json()
        name = f"[{settings.host}]" if ":" in settings.host else settings.host
        app = create_app(settings)
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            http=Patient,
            timeout_keep_alive=30,
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=STOPPED,
            h11_max_incomplete_event_size=64 * 1024,
            server_header=False,
        )
        server = Server(app, config)
        sockets = listen(settings)
        startup.end()
        print(f"latentgen: http://{name}:{settings.port}  (Ctrl-C stops it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, once everything has ended
            server.run(sockets)
    if server.refused is not None:
        raise server.refused


def listen(settings: Settings) -> list[socket.socket]:
    """The addresses of the host's name, taken before anything is said of them."""
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        for family, _, _, _, address in found:
            try:
                sockets.append(socket.create_server(address, family=family, backlog=2048))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL or len(found) == 1:
                    raise  # else IPv6, most likely, which this machine has not
    except OSError as error:
        reason = str(error.strerror).partition(" (")[0]  # Python tells the address once more
        hint = f"nothing can listen there ({reason}); try another --port or --host"
        raise InvalidRequest("address", f"{settings.host}:{settings.port}", hint) from None
    return sockets

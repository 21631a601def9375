"""Start a server: check what it would do, then listen."""

from __future__ import annotations

import uvicorn
from filelock import FileLock, Timeout

from ..errors import InvalidRequest
from .app import create_app
from .guard import check_exposure
from .log import log_as_json
from .settings import Settings

__all__ = ["serve"]


def serve(settings: Settings) -> None:
    """Serve until somebody stops it.

    Raises:
        InvalidRequest: there is no such model, others could reach it without a token, or another
            server keeps its things in the same folder.
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
    log_as_json()
    name = f"[{settings.host}]" if ":" in settings.host else settings.host
    print(f"latentgen: http://{name}:{settings.port}  (Ctrl-C stops it)", flush=True)
    uvicorn.run(
        create_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=5,
        h11_max_incomplete_event_size=64 * 1024,
        server_header=False,
    )

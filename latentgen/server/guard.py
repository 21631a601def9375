"""Who may talk to the server: checks of Host, Origin and token, before anything else runs."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import logging
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..errors import InvalidRequest
from .refusals import refusal
from .settings import Settings

__all__ = ["Guard", "check_exposure", "is_loopback"]

HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'self'",
    "X-Frame-Options": "SAMEORIGIN",
    "X-Content-Type-Options": "nosniff",
}
OPEN = {"/health"}  # paths that need no token

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_exposure(settings: Settings) -> None:
    """Refuse to listen for others without a token.

    Raises:
        InvalidRequest: says what would work.
    """
    if not is_loopback(settings.host) and not settings.token:
        hint = "others can reach it there: give a --token (or LATENTGEN_TOKEN), or use 127.0.0.1"
        raise InvalidRequest("host", settings.host, hint)


class Guard:
    """ASGI middleware.

    - The Host header must be a name of this server, so that a page elsewhere cannot rebind its
      name to this address.
    - An Origin header must be this server itself: pages of other sites get nothing.
    - No page of another site may show this one in a frame, where people would click unseen.
    - With a token, it must come as `Authorization: Bearer TOKEN` or as the password of Basic.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self._token = settings.token
        self._any_address = not is_loopback(settings.host)
        self._names = {"localhost", settings.host.strip("[]").lower()}
        self._names |= {name.lower() for name in settings.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self.app(scope, receive, send)
        if scope["type"] == "http":
            send = _unframed(send)
        refused = self._refused(scope["path"], Headers(scope=scope))
        if refused is None:
            return await self.app(scope, receive, send)
        status, message, headers = refused
        client = scope.get("client")
        log.warning("%s was refused: %s", client[0] if client else "a client", message)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        answer = refusal(scope["path"], status, message, headers=headers)
        await answer(scope, receive, send)

    def _refused(self, path: str, headers: Headers) -> tuple[int, str, dict[str, str]] | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return 403, "this server is not called that; start it with --allowed-host", {}
        if not _comes_from(headers.get("origin"), host):
            return 403, "requests from pages of other sites are refused", {}
        if self._token is not None and path not in OPEN and not self._has_token(headers):
            ask = {"WWW-Authenticate": 'Basic realm="latentgen", charset="UTF-8"'}
            return 401, "send the token: 'Authorization: Bearer TOKEN', or as password", ask
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self._any_address or address.is_loopback  # addresses cannot be rebound

    def _has_token(self, headers: Headers) -> bool:
        kind, _, value = headers.get("authorization", "").partition(" ")
        if kind.lower() == "basic":
            try:
                decoded = base64.b64decode(value, validate=True).decode()
            except (binascii.Error, UnicodeDecodeError, ValueError):
                return False
            value = decoded.partition(":")[2]
        elif kind.lower() != "bearer":
            return False
        assert self._token is not None
        value = value.strip(" \t")  # and no byte of a letter
        sent = [value.encode()]
        if kind.lower() == "bearer":  # headers are read as Latin-1; most clients send UTF-8
            sent.append(value.encode("latin-1"))
        return any(secrets.compare_digest(one, self._token.encode()) for one in sent)


def _unframed(send: Send) -> Send:
    async def add_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(HEADERS)
        await send(message)

    return add_headers


def _comes_from(origin: str | None, host: str) -> bool:
    """Whether a request is of a page of this server, or of no page at all."""
    try:
        return origin is None or urlsplit(origin).netloc == host
    except ValueError:
        return False

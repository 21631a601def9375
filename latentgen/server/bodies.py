"""How large, how slow and how tangled what clients send may be, before anything looks into it."""

from __future__ import annotations

import asyncio
from collections import deque

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .refusals import refusal
from .settings import Settings

__all__ = ["Bodies"]

SMALL = 2**20  # bytes of a body without pictures
WITH_PICTURES = {
    "/jobs",
    "/v1/images/edits",
    "/v1/images/variations",
    "/sdapi/v1/txt2img",
    "/sdapi/v1/img2img",
    "/sdapi/v1/png-info",
    "/gradio_api/upload",
}
TOGETHER = 4  # times the largest body: what all requests may hold at once
ALWAYS = 2**16  # bytes of a body that is taken however much the others hold
SECONDS = 60.0  # in which a body must be here
MARKS = b",[{&"  # there is one before nearly every value of a JSON text or a form
MOST_MARKS = 100_000  # a text is parsed while everybody else waits


class Bodies:
    """ASGI middleware: it receives the whole body, and only then asks the application."""

    def __init__(self, app: ASGIApp, settings: Settings, seconds: float = SECONDS) -> None:
        self.app = app
        self._largest = settings.max_body
        self._left = TOGETHER * settings.max_body  # bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = Headers(scope=scope)
        marks = b"" if headers.get("content-type", "").startswith("multipart/") else MARKS
        pieces: deque[bytes] = deque()
        size = found = 0

        async def again() -> Message:
            if not pieces:
                return await receive()
            piece = pieces.popleft()
            return {"type": "http.request", "body": piece, "more_body": bool(pieces)}

        try:
            self._check(scope["path"], _told(headers), 0)
            more = True
            async with asyncio.timeout(self._seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return
                    piece, more = message.get("body", b""), message.get("more_body", False)
                    pieces.append(piece)
                    size += len(piece)
                    self._left -= len(piece)
                    found += sum(map(piece.count, marks))
                    self._check(scope["path"], size, found)
        except (HTTPException, TimeoutError) as error:
            if isinstance(error, TimeoutError):
                error = HTTPException(408, f"a body must be here within {self._seconds:g} seconds")
            answer = refusal(scope["path"], error.status_code, error.detail, headers=error.headers)
            await answer(scope, receive, send)
        else:
            await self.app(scope, again, send)
        finally:
            self._left += size

    def _check(self, path: str, size: int, found: int) -> None:
        most = self._largest if path in WITH_PICTURES else min(SMALL, self._largest)
        if size > most:
            raise HTTPException(413, f"at most {most} bytes here")
        if found > MOST_MARKS:
            raise HTTPException(413, f"at most {MOST_MARKS} values and commas in all")
        if size > ALWAYS and self._left < 0:
            hint = "others are sending as much as can be held; come again later"
            raise HTTPException(503, hint, {"Retry-After": "5"})


def _told(headers: Headers) -> int:
    """How long a body calls itself; 0 if it does not."""
    told = headers.get("content-length", "")
    return int(told) if told.isdecimal() and len(told) < 20 else 0

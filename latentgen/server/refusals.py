"""What a request is answered that is refused: JSON in the shape of the API that it asked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

__all__ = ["JSON_REFUSALS", "REFUSALS", "WEBUI_REFUSALS", "refusal"]


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
# the same where an endpoint answers with something else: FastAPI would say that this does, too
JSON_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": description,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Refusal"}}},
    }
    for status, description in (("4XX", "Client Error"), ("5XX", "Server Error"))
}
WEBUI_REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": WebuiRefusal},
    "5XX": {"model": WebuiRefusal},
}


def refusal(
    path: str,
    status: int,
    message: str,
    field: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An answer for who asked for a path.

    Args:
        message: what is wrong and what would work.
        field: that is wrong.
    """
    body: BaseModel
    message = _sendable(message)
    if path.startswith("/sdapi/"):
        body = WebuiRefusal(error="HTTPException", detail=message, body="", errors="")
    else:
        kind = "invalid_request_error" if status < 500 else "server_error"
        kind = "authentication_error" if status == 401 else kind
        param = None if field is None else _sendable(field)
        body = Refusal(error=Problem(message=message, type=kind, param=param, code=None))
    return JSONResponse(body.model_dump(), status, headers)


def _sendable(text: str) -> str:
    """A text that may quote half a surrogate pair, which JSON can name and UTF-8 cannot."""
    return text.encode("utf-8", "backslashreplace").decode()

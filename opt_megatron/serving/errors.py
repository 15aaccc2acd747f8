"""`ApiError`: an error in the form of OpenAI's API, and how errors are described in /openapi.json."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_STATUSES: dict[int | str, str] = {
    400: "The request is not valid",
    401: "The API key is missing or wrong",
    403: "The Host is not one of this server's names",
    404: "There is no such model",
    408: "The body arrived too slowly",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    429: "Too many requests wait; see Retry-After",
    503: "The model is being loaded, the server shuts down, or it has no memory for the body",
    "default": "Any other error",
}


class ErrorInfo(BaseModel):
    """The value of `error`."""

    message: str
    type: str
    param: str | None  # the field that is wrong
    code: str | None  # a word for programs


class ErrorResponse(BaseModel):
    """The body of every response with an error."""

    error: ErrorInfo


# For `FastAPI(responses=...)`.
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text} for status, text in _STATUSES.items()
}


class ApiError(Exception):
    """An error that is the response to a request.

    Args:
        status: of HTTP.
        message: one sentence that says what is wrong and what to do.
        param: the field that is wrong, if it is one.
        code: a word for programs.
        headers: additional ones for the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        """The body of the response (`ErrorResponse`)."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_response(self) -> Response:
        """The response. It is pure ASCII, because a message may quote text that UTF-8 cannot represent."""
        return Response(json.dumps(self.to_json()), self.status, self.headers, "application/json")


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A 400: the client can correct the request."""
    return ApiError(400, message, param=param, code=code)


def field_of(message: str) -> str | None:
    """The field that a sentence is about ("n is 0, but ...", "prompt 2: logit_bias has ..."), or None."""
    match = re.match(r"(?:(?:the )?prompt(?: \d+)?: )?(\w+) (?:is|has) ", message)
    return match[1] if match else None

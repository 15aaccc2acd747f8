"""Errors as OpenAI's API tells them: `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from starlette.responses import Response

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that is answered with an error.

    Args:
        status: of HTTP.
        message: one sentence: what is wrong, and what to do.
        param: the field that is wrong, where it is one.
        code: a word for programs.
        headers: that the answer has beside the usual ones.
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

    def to_json(self) -> dict[str, object]:
        """The body."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def to_response(self) -> Response:
        """The answer. Escaped to ASCII: a message may quote what cannot be written as UTF-8."""
        return Response(json.dumps(self.to_json()), self.status, self.headers, "application/json")


def field_of(message: str) -> str | None:
    """The field that a sentence begins with ("n is 0, but ...", "prompt 2: logit_bias has ..."), if it does."""
    match = re.match(r"(?:(?:the )?prompt(?: \d+)?: )?(\w+) (?:is|has) ", message)
    return match[1] if match else None


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """What the client can mend."""
    return ApiError(400, message, param=param, code=code)

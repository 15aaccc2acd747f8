"""From the errors of FastAPI and pydantic about a request body to one sentence of this API."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from fastapi.exceptions import RequestValidationError

from .errors import ApiError, bad_request, field_of

_JSON_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
_MAX_DIGITS = 300  # of a number that a message may quote; a double has at most 309


def parse_error(cause: BaseException) -> ApiError:
    """The response to a body that Python's JSON parser refused with `cause`."""
    if isinstance(cause, UnicodeDecodeError):
        return bad_request(f"the body is not UTF-8: byte {cause.start} cannot be read")
    if isinstance(cause, RecursionError):
        return bad_request("the body is nested too deeply")
    # Not JSON, or an integer of more digits than Python converts.
    return bad_request(f"the body is not JSON: {str(cause).partition(';')[0]}")


def validation_error(error: RequestValidationError) -> ApiError:
    """The response to a body that is not JSON, or that is not what the route expects: its first error."""
    if isinstance(error.__cause__, ValueError):
        return parse_error(error.__cause__)
    first = error.errors()[0]
    path = first["loc"][1:]  # behind "body"
    if not path and first["type"] == "missing":
        # FastAPI before 0.151 reports a body of null as a missing one.
        return bad_request("the body must be a JSON object, not empty or null")
    if not path and first["type"] == "model_attributes_type":
        return bad_request(f"the body must be a JSON object, not {_JSON_KINDS.get(type(first['input']), 'a number')}")
    field = ascii(".".join(map(str, path)))[1:-1][:80]
    if first["type"] == "extra_forbidden":
        return bad_request(f"there is no field {field!r}", field, "unknown_field")
    if first["type"] == "missing":
        return bad_request(f"{field} is missing", field)
    message = _sentence(first["msg"]) + _unusual_value(first["input"])
    if not field:  # a check of several fields: its message begins with the one that is wrong
        return bad_request(message, field_of(message))
    return bad_request(f"{field}: {message}", field)


def _sentence(message: str) -> str:
    """pydantic's message in the style of this package's."""
    message = message.removeprefix("Value error, ").replace("Input should be", "must be")
    return re.sub(r"^\w+ should have", "must have", message).replace(" after validation", "")


def _unusual_value(value: Any) -> str:
    """Names the value where the rest of the message does not show why it was refused."""
    if isinstance(value, float) and not math.isfinite(value):
        return f", not {json.dumps(value)}"
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        return f", not a number of {len(str(abs(value)))} digits"
    return ""

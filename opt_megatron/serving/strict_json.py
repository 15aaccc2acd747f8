"""Bodies as JSON in the narrow sense of RFC 8259: UTF-8, no NaN, no Infinity, objects outermost."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from .errors import bad_request

_MOST_DIGITS = 300  # of a number: enough for any double


def parse_object(body: bytes) -> dict[str, Any]:
    """The object that the body holds.

    Raises:
        ApiError: it holds none.
    """
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, parse_int=_integer)
    except UnicodeDecodeError as error:
        raise bad_request(f"the body is not UTF-8: byte {error.start} cannot be read") from None
    except RecursionError:
        raise bad_request("the body is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise bad_request(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise bad_request(f"the body must be a JSON object, not {_KINDS.get(type(value), 'a number')}")
    return value


_KINDS = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}


def _refuse_constant(name: str) -> NoReturn:
    raise bad_request(f"the body holds {name}, which is no JSON: numbers must be finite")


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:
        raise bad_request(f"the body holds a number of {len(digits)} digits")
    return int(digits)

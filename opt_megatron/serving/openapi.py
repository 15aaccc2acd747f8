"""/openapi.json: the bodies are read by this package and not by FastAPI, which therefore is told about them."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from .protocol import Body, CompletionBody, DetokenizeBody, MetaseqBody, TokenizeBody

_BODIES: tuple[type[Body], ...] = (CompletionBody, MetaseqBody, TokenizeBody, DetokenizeBody)
_REFERENCE = "#/components/schemas/{model}"
_STATUSES = {
    "400": "What is wrong with the request",
    "401": "No key, or another one",
    "404": "No such model",
    "408": "The body was too slow",
    "413": "The body is too large",
    "415": "The body is not JSON",
    "429": "Too much is waiting; see Retry-After",
    "503": "Not ready, or shutting down",
}


def takes(kind: type[Body]) -> dict[str, Any]:
    """What a route that reads such a body adds to its description."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def gives(*kinds: str) -> dict[int | str, dict[str, Any]]:
    """What a route's answer may be, by its content types."""
    return {200: {"content": {kind: {} for kind in kinds}}}


def describe(app: FastAPI) -> None:
    """Let the application's description hold the bodies and the errors."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = plain()
            _, definitions = models_json_schema([(kind, "validation") for kind in _BODIES], ref_template=_REFERENCE)
            schemas = {name: _with_nulls(schema) for name, schema in definitions["$defs"].items()}
            document.setdefault("components", {}).setdefault("schemas", {}).update(schemas)
            for operations in document["paths"].values():
                for operation in operations.values():
                    _add_errors(operation["responses"])
        return app.openapi_schema

    app.openapi = described


def _with_nulls(schema: dict[str, Any]) -> dict[str, Any]:
    """A field that is null has its default, if it has one."""
    required = schema.get("required", ())
    fields = {
        name: field if name in required else {"anyOf": [field, {"type": "null"}]}
        for name, field in schema["properties"].items()
    }
    return {**schema, "properties": fields}


def _add_errors(responses: dict[str, Any]) -> None:
    responses.pop("422", None)  # FastAPI's own; ours are 400
    for status, text in _STATUSES.items():
        responses.setdefault(status, {"description": text})

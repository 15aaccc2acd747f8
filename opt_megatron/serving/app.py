"""`make_app`: the FastAPI application, and the responses to errors that its routes raise."""

from __future__ import annotations

import logging
from collections.abc import Collection
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from ..version import __version__
from .allowed_hosts import AllowedHostsMiddleware
from .async_engine import AsyncEngine
from .errors import ERROR_RESPONSES, ApiError
from .middleware import AuthenticationMiddleware, BodyLimitMiddleware, HttpMetricsMiddleware
from .routes import add_completion_routes, add_status_routes, add_tokenizer_routes
from .validation import parse_error, validation_error
from .web_page import add_web_page

_LOGGER = logging.getLogger(__name__)


def make_app(
    async_engine: AsyncEngine,
    api_key: str | None = None,
    *,
    allowed_hosts: Collection[str] = ("*",),
    allowed_origins: Collection[str] = (),
) -> FastAPI:
    """The application.

    Args:
        api_key: that clients must send; None takes every request.
        allowed_hosts: see `AllowedHostsMiddleware`.
        allowed_origins: of pages that may send requests, besides the server's own; `*` for all (CORS).
    """
    app = FastAPI(title="opt_megatron", version=__version__, docs_url=None, redoc_url=None, responses=ERROR_RESPONSES)
    app.add_middleware(BodyLimitMiddleware, limits=async_engine.limits)
    app.add_middleware(AuthenticationMiddleware, api_key=api_key)
    if allowed_origins:  # before the key, which a browser's preflight request does not have
        app.add_middleware(CORSMiddleware, allow_origins=[*allowed_origins], allow_methods=["*"], allow_headers=["*"])
    app.add_middleware(AllowedHostsMiddleware, allowed_hosts=allowed_hosts)
    app.add_middleware(HttpMetricsMiddleware, metrics=async_engine.metrics)  # the middleware added last runs first
    add_error_handlers(app)
    add_completion_routes(app, async_engine)
    add_tokenizer_routes(app, async_engine)
    add_status_routes(app, async_engine)
    add_web_page(app)
    return app


def add_error_handlers(app: FastAPI) -> None:
    """Let every error become a response in the form of OpenAI's API."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return error.to_response()

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        return validation_error(error).to_response()

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _from_http_exception(request, error).to_response()

    @app.exception_handler(Exception)
    async def unexpected_error(request: Request, error: Exception) -> Response:
        _LOGGER.error("%s %s failed", request.method, ascii(request.url.path), exc_info=error)
        return ApiError(500, "an error of the server; its log has the details", code="internal_error").to_response()


def _from_http_exception(request: Request, error: HTTPException) -> ApiError:
    if error.status_code == 400 and error.__cause__ is not None:
        return parse_error(error.__cause__)  # FastAPI's answer to whatever the JSON parser raises
    if error.status_code == 404:
        message = f"there is no {ascii(request.url.path)[:200]}; /openapi.json lists what there is"
    elif error.status_code == 405:
        message = f"{request.method} is not possible here; see the header Allow"
    else:
        message = str(error.detail or HTTPStatus(error.status_code).phrase)
    return ApiError(error.status_code, message, headers=error.headers)

"""The routes."""

from __future__ import annotations

import json
import logging
import time
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from ..version import __version__
from .async_engine import AsyncEngine, EngineState
from .engine_requests import decode, encode, make_engine_requests
from .errors import ApiError, bad_request
from .metrics import CONTENT_TYPE
from .middleware import AuthenticationMiddleware, BodyLimitMiddleware
from .openapi import describe, gives, takes
from .protocol import CompletionBody, DetokenizeBody, MetaseqBody, TokenizeBody, read
from .request_output import OutputCollector
from .response import ResponseBuilder, to_metaseq
from .streaming import EventStreamResponse, collect_response
from .web_page import add_web_page

_LOGGER = logging.getLogger(__name__)
_NO_CHAT = (
    "OPT is a base model and has no chat template: write the whole text that is to be continued and send it to "
    "/v1/completions"
)


def make_app(async_engine: AsyncEngine, api_key: str | None = None) -> FastAPI:
    """The application.

    Args:
        api_key: what clients must show; None lets everybody in.
    """
    app = FastAPI(title="opt_megatron", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(BodyLimitMiddleware, limits=async_engine.limits)
    app.add_middleware(AuthenticationMiddleware, api_key=api_key)  # the last one added runs first
    app.add_exception_handler(ApiError, _told)
    app.add_exception_handler(HTTPException, _http_told)
    app.add_exception_handler(Exception, _unforeseen)
    _add_completions(app, async_engine)
    _add_tokens(app, async_engine)
    _add_state(app, async_engine)
    add_web_page(app)
    describe(app)
    return app


def _add_completions(app: FastAPI, async_engine: AsyncEngine) -> None:
    @app.post(
        "/v1/completions",
        openapi_extra=takes(CompletionBody),
        responses=gives("application/json", "text/event-stream"),
        summary="Continue prompts (OpenAI)",
    )
    async def completions(request: Request) -> Response:
        body = read(CompletionBody, await request.body())
        async_engine.model.check_name(body.model)
        output, builder = await _begin(async_engine, body, logprobs=body.logprobs is not None)
        seconds = async_engine.limits.request_seconds
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStreamResponse(output, builder, seconds, include_usage=usage)
        return _json(await collect_response(output, builder, request.receive, seconds))

    async def metaseq_completions(request: Request) -> Response:
        body = read(MetaseqBody, await request.body())
        output, builder = await _begin(async_engine, body, logprobs=True)
        whole = await collect_response(output, builder, request.receive, async_engine.limits.request_seconds)
        return _json(to_metaseq(whole))

    @app.post("/completions", openapi_extra=takes(MetaseqBody), summary="Continue prompts (metaseq)")
    async def plain(request: Request) -> Response:
        return await metaseq_completions(request)

    for prefix in ("", "/v1", "/v2"):

        @app.post(
            f"{prefix}/engines/{{engine}}/completions",
            openapi_extra=takes(MetaseqBody),
            summary="Continue prompts (metaseq); whatever the engine is called",
        )
        async def with_engine(engine: str, request: Request) -> Response:
            return await metaseq_completions(request)

    @app.post("/v1/chat/completions", summary="Refused: a base model has no chat template")
    @app.post("/chat/completions", include_in_schema=False)
    async def chat(request: Request) -> Response:
        raise bad_request(_NO_CHAT, "messages", "no_chat_template")


async def _begin(
    async_engine: AsyncEngine, body: CompletionBody | MetaseqBody, *, logprobs: bool
) -> tuple[OutputCollector, ResponseBuilder]:
    model = async_engine.model
    async_engine.check_queue(len(body.prompt) * max(body.n, body.best_of or 1))
    requests = await make_engine_requests(model, body)
    return async_engine.submit(requests), ResponseBuilder(model, requests, logprobs=logprobs)


def _add_tokens(app: FastAPI, async_engine: AsyncEngine) -> None:
    @app.post("/tokenize", openapi_extra=takes(TokenizeBody), summary="A text's token ids")
    async def tokenize(request: Request) -> Response:
        body = read(TokenizeBody, await request.body())
        model = async_engine.model
        model.check_name(body.model)
        tokens = await encode(model, body.prompt, body.add_special_tokens)
        return _json({"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens})

    @app.post("/detokenize", openapi_extra=takes(DetokenizeBody), summary="The text of token ids")
    async def detokenize(request: Request) -> Response:
        body = read(DetokenizeBody, await request.body())
        model = async_engine.model
        model.check_name(body.model)
        strange = [token for token in body.tokens if token >= model.config.vocab_size]
        if strange:
            raise bad_request(
                f"tokens holds the id {strange[0]}, but ids go from 0 to {model.config.vocab_size - 1}", "tokens"
            )
        return _json({"prompt": await decode(model, body.tokens)})


def _add_state(app: FastAPI, async_engine: AsyncEngine) -> None:
    began = int(time.time())

    def entry(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": began,
            "owned_by": "opt_megatron",
            "root": async_engine.model.name,
            "parent": None,
            "max_model_len": async_engine.model.max_model_len,
        }

    @app.get("/v1/models", summary="What is served")
    async def models() -> Response:
        return _json({"object": "list", "data": [entry(name) for name in async_engine.model.names]})

    @app.get("/v1/models/{name:path}", summary="One model")
    async def model(name: str) -> Response:
        async_engine.model.check_name(name)
        return _json(entry(name))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="200 when requests are taken, else 503")
    async def health() -> Response:
        return _json({"status": async_engine.state.value}, 200 if async_engine.state is EngineState.READY else 503)

    @app.get("/metrics", responses=gives("text/plain"), summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(async_engine.metrics.to_text(), headers={"Content-Type": CONTENT_TYPE})


def _json(value: dict[str, Any], status: int = 200) -> Response:
    # A text that the model wrote is always valid: its half characters are U+FFFD.
    return Response(json.dumps(value, ensure_ascii=False).encode(), status, media_type="application/json")


async def _told(request: Request, error: ApiError) -> Response:
    return error.to_response()


async def _http_told(request: Request, error: HTTPException) -> Response:
    if error.status_code == 404:
        message = f"there is no {ascii(request.url.path)[:200]}; /openapi.json lists what there is"
    elif error.status_code == 405:
        message = f"{request.method} is not possible here; see the header Allow"
    else:
        message = str(error.detail or HTTPStatus(error.status_code).phrase)
    return ApiError(error.status_code, message, headers=error.headers).to_response()


async def _unforeseen(request: Request, error: Exception) -> Response:
    _LOGGER.error("%s %s failed", request.method, ascii(request.url.path), exc_info=error)
    return ApiError(500, "an error of the server; its log has the details", code="internal_error").to_response()

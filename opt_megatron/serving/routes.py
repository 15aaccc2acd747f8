"""The routes: completions of OpenAI's and metaseq's API, vLLM's tokenizer routes, models, health and metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from ..version import __version__
from .async_engine import AsyncEngine, EngineState
from .engine_requests import decode, encode, make_engine_requests
from .errors import bad_request
from .fields import MAX_NAME_LENGTH
from .metrics import CONTENT_TYPE
from .protocol import CompletionRequest, DetokenizeRequest, MetaseqRequest, StreamOptions, TokenizeRequest
from .request_output import OutputCollector
from .response import ResponseBuilder, to_metaseq
from .streaming import EventStreamResponse, collect_response

_NO_CHAT = (
    "OPT is a base model and has no chat template: write the whole text that is to be continued and send it to "
    "/v1/completions"
)


def add_completion_routes(app: FastAPI, async_engine: AsyncEngine) -> None:
    """Add /v1/completions, metaseq's routes, and the refusal of /v1/chat/completions."""

    @app.post(
        "/v1/completions",
        responses=_content_types("application/json", "text/event-stream"),
        summary="Continue prompts (OpenAI)",
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        async_engine.model.check_name(body.model)
        output, builder = await _submit(
            async_engine,
            body,
            request_id=_request_id(request) or body.request_id,
            returns_token_ids=body.return_token_ids,
            names_ids=body.return_tokens_as_token_ids,
        )
        seconds = async_engine.limits.request_seconds
        if body.stream:
            return EventStreamResponse(output, builder, seconds, body.stream_options or StreamOptions())
        return JSONResponse(await collect_response(output, builder, request.receive, seconds))

    @app.post("/completions", summary="Continue prompts (metaseq)")
    async def metaseq_completions(body: MetaseqRequest, request: Request) -> Response:
        output, builder = await _submit(async_engine, body)
        seconds = async_engine.limits.request_seconds
        return JSONResponse(to_metaseq(await collect_response(output, builder, request.receive, seconds)))

    for prefix in ("", "/v1", "/v2"):

        @app.post(
            f"{prefix}/engines/{{engine}}/completions",
            summary="Continue prompts (metaseq); whatever the engine is called",
        )
        async def metaseq_engine_completions(engine: str, body: MetaseqRequest, request: Request) -> Response:
            return await metaseq_completions(body, request)

    @app.post("/v1/chat/completions", summary="Refused: a base model has no chat template")
    @app.post("/chat/completions", include_in_schema=False)
    async def chat_completions() -> Response:
        raise bad_request(_NO_CHAT, "messages", "no_chat_template")


async def _submit(
    async_engine: AsyncEngine, body: CompletionRequest | MetaseqRequest, **of_response: Any
) -> tuple[OutputCollector, ResponseBuilder]:
    """Queue the engine requests of a body; `of_response` are arguments of `ResponseBuilder`."""
    model = async_engine.model
    async_engine.check_queue(body.num_continuations)  # before the work of encoding the prompts
    requests = await make_engine_requests(model, body)
    return async_engine.submit(requests), ResponseBuilder(model, requests, **of_response)


def _request_id(request: Request) -> str:
    """The header X-Request-Id, as long as the field may be."""
    request_id = request.headers.get("x-request-id", "")
    if len(request_id) > MAX_NAME_LENGTH:
        raise bad_request(f"the header X-Request-Id has {len(request_id):,} characters; {MAX_NAME_LENGTH} are the most")
    return request_id


def add_tokenizer_routes(app: FastAPI, async_engine: AsyncEngine) -> None:
    """Add /tokenize and /detokenize."""

    @app.post("/tokenize", responses=_content_types("application/json"), summary="A text's token ids")
    async def tokenize(body: TokenizeRequest) -> Response:
        model = async_engine.model
        model.check_name(body.model)
        tokens = await encode(model, body.prompt, body.add_special_tokens)
        strings = model.token_strings(tokens) if body.return_token_strs else None
        sizes = {"count": len(tokens), "max_model_len": model.max_model_len}
        return JSONResponse({**sizes, "tokens": tokens, "token_strs": strings})

    @app.get("/tokenizer_info", responses=_content_types("application/json"), summary="The tokenizer's settings")
    async def tokenizer_info() -> Response:
        return JSONResponse(async_engine.model.tokenizer_info())

    @app.post("/detokenize", responses=_content_types("application/json"), summary="The text of token ids")
    async def detokenize(body: DetokenizeRequest) -> Response:
        model = async_engine.model
        model.check_name(body.model)
        unknown = [token for token in body.tokens if token >= model.config.vocab_size]
        if unknown:
            raise bad_request(
                f"tokens holds the id {unknown[0]}, but ids go from 0 to {model.config.vocab_size - 1}", "tokens"
            )
        return JSONResponse({"prompt": await decode(model, body.tokens)})


def add_status_routes(app: FastAPI, async_engine: AsyncEngine) -> None:
    """Add /v1/models, /health, /ping, /version, /load and /metrics."""
    created = int(time.time())

    def model_card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": created,
            "owned_by": "opt_megatron",
            "root": async_engine.model.name,
            "parent": None,
            "max_model_len": async_engine.model.max_model_len,
        }

    @app.get("/v1/models", summary="What is served")
    async def list_models() -> Response:
        return JSONResponse({"object": "list", "data": [model_card(name) for name in async_engine.model.names]})

    @app.get("/v1/models/{name:path}", summary="One model")
    async def get_model(name: str) -> Response:
        async_engine.model.check_name(name)
        return JSONResponse(model_card(name))

    @app.head("/health", include_in_schema=False)
    @app.get("/health", summary="200 when requests are taken, else 503")
    @app.post("/ping", include_in_schema=False)
    @app.get("/ping", summary="/health under SageMaker's name")
    async def health() -> Response:
        status = 200 if async_engine.state is EngineState.READY else 503
        return JSONResponse({"status": async_engine.state.value}, status)

    @app.get("/version", summary="The version of opt_megatron")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @app.get("/load", summary="How many prompts are waiting or running")
    async def load() -> Response:
        return JSONResponse({"server_load": async_engine.num_requests})

    @app.get("/metrics", responses=_content_types("text/plain"), summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(async_engine.metrics.to_text(), headers={"Content-Type": CONTENT_TYPE})


def _content_types(*content_types: str) -> dict[int | str, dict[str, Any]]:
    """What /openapi.json says of a route's response."""
    return {200: {"content": {content_type: {} for content_type in content_types}}}

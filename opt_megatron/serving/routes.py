"""The routes: completions of OpenAI's and metaseq's API, vLLM's tokenizer routes, models, health and metrics."""

from __future__ import annotations

import time
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from .async_engine import AsyncEngine, EngineState
from .engine_requests import decode, encode, make_engine_requests
from .errors import bad_request
from .metrics import CONTENT_TYPE
from .protocol import CompletionRequest, DetokenizeRequest, MetaseqRequest, TokenizeRequest
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
        output, builder = await _submit(async_engine, body)
        seconds = async_engine.limits.request_seconds
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return EventStreamResponse(output, builder, seconds, include_usage=include_usage)
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
    async_engine: AsyncEngine, body: CompletionRequest | MetaseqRequest
) -> tuple[OutputCollector, ResponseBuilder]:
    model = async_engine.model
    async_engine.check_queue(body.num_continuations)  # before the work of encoding the prompts
    requests = await make_engine_requests(model, body)
    return async_engine.submit(requests), ResponseBuilder(model, requests)


def add_tokenizer_routes(app: FastAPI, async_engine: AsyncEngine) -> None:
    """Add /tokenize and /detokenize."""

    @app.post("/tokenize", responses=_content_types("application/json"), summary="A text's token ids")
    async def tokenize(body: TokenizeRequest) -> Response:
        model = async_engine.model
        model.check_name(body.model)
        tokens = await encode(model, body.prompt, body.add_special_tokens)
        return JSONResponse({"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens})

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
    """Add /v1/models, /health and /metrics."""
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
    async def health() -> Response:
        status = 200 if async_engine.state is EngineState.READY else 503
        return JSONResponse({"status": async_engine.state.value}, status)

    @app.get("/metrics", responses=_content_types("text/plain"), summary="Prometheus metrics")
    async def metrics() -> Response:
        return Response(async_engine.metrics.to_text(), headers={"Content-Type": CONTENT_TYPE})


def _content_types(*content_types: str) -> dict[int | str, dict[str, Any]]:
    """What /openapi.json says of a route's response."""
    return {200: {"content": {content_type: {} for content_type in content_types}}}

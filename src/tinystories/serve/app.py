"""The ASGI application: which path answers what. Pages and other endpoints join by `extra_routes` and `open_paths`."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from tinystories.data.tokenizer import END
from tinystories.serve.access import BodyGuard, HostGuard, KeyGuard, OriginGuard, RequestLog
from tinystories.serve.answer import Answer
from tinystories.serve.errors import ApiError, invalid
from tinystories.serve.planning import Plan, plan_chat, plan_completion
from tinystories.serve.requests import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
    check_model,
    decode_request,
)
from tinystories.serve.responses import ChatFormat, ResponseFormat
from tinystories.serve.service import Service

OPEN_PATHS = ("/health", "/healthz")  # need no key, and hold no data
MAX_INLINE_BYTES = 4096  # larger bodies are tokenized in a thread, so that the event loop goes on

Result = TypeVar("Result")


def build_app(service: Service, *, extra_routes: Sequence[Route] = (), open_paths: Sequence[str] = ()) -> ASGIApp:
    """Return the application.

    `extra_routes` are served beside the API, behind the same guards. `open_paths` need no key: static files only.
    """
    routes = [*Endpoints(service).routes(), *extra_routes]
    starlette = Starlette(
        routes=routes,
        exception_handlers={ApiError: answer_api_error, HTTPException: answer_http_error, Exception: answer_bug},
    )
    starlette.router.redirect_slashes = False
    config = service.config
    app: ASGIApp = BodyGuard(starlette, config, routes)
    app = KeyGuard(app, config.keys, (*OPEN_PATHS, *open_paths))
    app = OriginGuard(app, config.allow_origins)
    app = HostGuard(app, config)
    return RequestLog(app, service.metrics, [route.path for route in routes])


class Endpoints:
    """The endpoints of the API."""

    def __init__(self, service: Service) -> None:
        self.service, self.model = service, service.model

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.list_models, methods=["GET"]),
            Route("/v1/models/{name:path}", self.show_model, methods=["GET"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
            Route("/health", self.health, methods=["GET"]),
            Route("/healthz", self.health, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
        ]

    async def complete(self, request: Request) -> Any:
        """POST /v1/completions."""
        body = await request.body()
        fields = decode_request(body, CompletionRequest)
        plan = await run(len(body), lambda: plan_completion(fields, self.model))
        return self.answer(request, plan, ResponseFormat)

    async def chat(self, request: Request) -> Any:
        """POST /v1/chat/completions."""
        body = await request.body()
        fields = decode_request(body, ChatRequest)
        plan = await run(len(body), lambda: plan_chat(fields, self.model))
        return self.answer(request, plan, ChatFormat)

    def answer(self, request: Request, plan: Plan, format_type: type[ResponseFormat]) -> Answer:
        """Return the ASGI response that runs a plan."""
        state = request.scope["state"]
        response_format = format_type(self.model, plan)
        return Answer(self.service, response_format, client=state["client"], request_id=state["request_id"])

    async def list_models(self, _request: Request) -> Response:
        """GET /v1/models."""
        return json_response({"object": "list", "data": [self.model.as_dict()]})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        check_model(request.path_params["name"], self.model.name)
        return json_response(self.model.as_dict())

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize."""
        body = await request.body()
        fields = decode_request(body, TokenizeRequest)
        check_model(fields.model, self.model.name)
        if (fields.prompt is None) == (fields.content is None):
            raise invalid("give the text as prompt (or as content, llama.cpp's name for it)", "prompt")
        is_vllm = fields.prompt is not None
        text = fields.prompt or fields.content or ""
        add_end = fields.add_special_tokens if fields.add_special is None else fields.add_special
        parse_special = fields.parse_special is not False
        ids = await run(len(body), lambda: self.model.encode(text, parse_special=parse_special))
        if add_end or (add_end is None and is_vllm):
            ids = [self.model.tokenizer.end_id, *ids]
        tokens: list[Any] = list(ids)
        if fields.with_pieces:
            tokens = [{"id": token, "piece": self.piece(token)} for token in ids]
        return json_response({"tokens": tokens, "count": len(ids), "max_model_len": self.model.n_ctx})

    def piece(self, token: int) -> str | list[int]:
        """Return the text of a token, or its bytes if they are not whole characters."""
        if token in self.model.special_texts:
            return self.model.special_texts[token]
        data = self.model.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return list(data)

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        body = await request.body()
        fields = decode_request(body, DetokenizeRequest)
        check_model(fields.model, self.model.name)
        if bad_ids := [token for token in fields.tokens if token >= self.model.vocab_size]:
            raise invalid(f"tokens: {bad_ids[0]} is not a token id from 0 to {self.model.vocab_size - 1}", "tokens")
        text = await run(len(body), lambda: self.model.decode(fields.tokens))
        return json_response({"prompt": text, "content": text})

    async def tokenizer_info(self, _request: Request) -> Response:
        """GET /tokenizer_info: what lm-eval asks instead of loading a tokenizer."""
        special = {"bos_token": END, "eos_token": END, "pad_token": END}
        return json_response(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                **special,
                "chat_template": None,
                "vocab_size": self.model.vocab_size,
                "model_max_length": self.model.n_ctx,
            }
        )

    async def health(self, _request: Request) -> Response:
        """GET /health."""
        status, facts = self.service.health
        return json_response(facts, status)

    async def metrics(self, _request: Request) -> Response:
        """GET /metrics."""
        return Response(self.service.metrics.as_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, _request: Request) -> Response:
        """GET /openapi.json."""
        from tinystories.serve.openapi import build_schema  # few ask for it, and it takes 8 ms

        return json_response(build_schema())


async def run(n_bytes: int, function: Callable[[], Result]) -> Result:
    """Run a function on a body of this size: a large one in a thread."""
    return function() if n_bytes <= MAX_INLINE_BYTES else await asyncio.to_thread(function)


def json_response(data: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON response."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


async def answer_api_error(_request: Request, error: Exception) -> Response:
    """Answer an `ApiError`."""
    assert isinstance(error, ApiError), "registered for this class only"
    return json_response(error.as_dict(), error.status, error.headers)


async def answer_http_error(request: Request, error: Exception) -> Response:
    """Answer what Starlette raises: 404 and 405."""
    assert isinstance(error, HTTPException), "registered for this class only"
    message = error.detail
    if error.status_code == 404:
        message = "this path does not exist on this server; /openapi.json lists those that do"
    elif error.status_code == 405:
        message = f"this path does not answer {request.method}"
    api_error = ApiError(error.status_code, message, headers=dict(error.headers or {}))
    return json_response(api_error.as_dict(), api_error.status, api_error.headers)


async def answer_bug(_request: Request, _error: Exception) -> Response:
    """Answer any other exception, which the server logs with its traceback."""
    error = ApiError(500, "the server failed to answer this request", code="internal_error")
    return json_response(error.as_dict(), error.status)

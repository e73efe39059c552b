"""/lab/api: what the lab page asks about a text."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinystories.config import SamplingConfig
from tinystories.engine.protocol import TraceableEngine
from tinystories.errors import UserError
from tinystories.explain.text_trace import TextTrace
from tinystories.serve.app import json_response, run
from tinystories.serve.errors import invalid
from tinystories.serve.lab import answers
from tinystories.serve.lab.experiments import ExperimentEndpoints
from tinystories.serve.lab.requests import (
    MAX_POSITIONS,
    AblateRequest,
    AttentionRequest,
    IdsRequest,
    LensRequest,
    NextRequest,
    StepRequest,
    TokensRequest,
)
from tinystories.serve.lab.traces import TraceWorker
from tinystories.serve.lab.training import TrainingEndpoints
from tinystories.serve.requests import SamplingNumbers, decode_request
from tinystories.serve.service import Service

Fields = TypeVar("Fields", NextRequest, StepRequest, IdsRequest, AttentionRequest, LensRequest, AblateRequest)


class LabEndpoints:
    """The endpoints of the lab page."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self.model, self.engine = service.model, service.scheduler.engine
        self.worker = TraceWorker(self.engine, self.model.tokenizer)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/lab/api/model", self.show_model, methods=["GET"]),
            Route("/lab/api/tokens", self.tokens, methods=["POST"]),
            Route("/lab/api/score", self.score, methods=["POST"]),
            Route("/lab/api/next", self.next, methods=["POST"]),
            Route("/lab/api/step", self.step, methods=["POST"]),
            Route("/lab/api/attention", self.attention, methods=["POST"]),
            Route("/lab/api/heads", self.heads, methods=["POST"]),
            Route("/lab/api/lens", self.lens, methods=["POST"]),
            Route("/lab/api/ablate", self.ablate, methods=["POST"]),
            *TrainingEndpoints(self.service).routes(),
            *ExperimentEndpoints(self.service, self.worker).routes(),
        ]

    async def show_model(self, _request: Request) -> Response:
        """GET /lab/api/model."""
        self.worker.prepare()
        facts = answers.describe_model(self.engine.config, self.model)
        return json_response(facts | {"is_traceable": isinstance(self.engine, TraceableEngine)})

    async def tokens(self, request: Request) -> Response:
        """POST /lab/api/tokens."""
        body = await request.body()
        fields = decode_request(body, TokensRequest)
        tokenizer, n_ctx = self.model.tokenizer, self.model.n_ctx
        if bad_ids := [token for token in fields.append if token >= self.model.vocab_size]:
            raise invalid(f"append: {bad_ids[0]} is not a token id from 0 to {self.model.vocab_size - 1}", "append")
        return json_response(
            await run(len(body), lambda: answers.describe_tokens(tokenizer, fields.text, fields.append, n_ctx))
        )

    async def score(self, request: Request) -> Response:
        """POST /lab/api/score."""
        return await self.answer(request, IdsRequest, lambda _fields, trace: answers.score(trace))

    async def next(self, request: Request) -> Response:
        """POST /lab/api/next."""
        return await self.answer(
            request,
            NextRequest,
            lambda fields, trace: answers.describe_next(
                trace, self.sampling(fields), fields.top, with_logits=fields.logits
            ),
        )

    async def step(self, request: Request) -> Response:
        """POST /lab/api/step."""
        return await self.answer(
            request,
            StepRequest,
            lambda fields, trace: answers.draw(trace, self.sampling(fields), fields.seed, fields.index),
        )

    async def attention(self, request: Request) -> Response:
        """POST /lab/api/attention."""
        fields = decode_request(await request.body(), AttentionRequest)
        data = await self.worker.ask(fields.ids, lambda trace: answers.attention(trace, fields.layer, fields.head))
        return Response(data, media_type="application/octet-stream")

    async def heads(self, request: Request) -> Response:
        """POST /lab/api/heads."""
        return await self.answer(request, IdsRequest, lambda _fields, trace: answers.summarize_heads(trace))

    async def lens(self, request: Request) -> Response:
        """POST /lab/api/lens."""

        def answer(fields: LensRequest, trace: TextTrace) -> dict[str, Any]:
            if not 0 < fields.stop - fields.start <= MAX_POSITIONS:
                raise UserError(f"the logit lens takes 1 to {MAX_POSITIONS} positions: start to stop - 1")
            return answers.logit_lens(trace, fields.start, fields.stop, fields.top)

        return await self.answer(request, LensRequest, answer)

    async def ablate(self, request: Request) -> Response:
        """POST /lab/api/ablate."""
        return await self.answer(request, AblateRequest, lambda fields, trace: answers.ablate(trace, [*fields.heads]))

    async def answer(
        self,
        request: Request,
        request_type: type[Fields],
        function: Callable[[Fields, TextTrace], dict[str, Any]],
    ) -> Response:
        """Return the JSON of a function of the request and its trace, computed in the worker's thread."""
        fields = decode_request(await request.body(), request_type)
        return json_response(await self.worker.ask(fields.ids, lambda trace: function(fields, trace)))

    def sampling(self, fields: SamplingNumbers) -> SamplingConfig:
        """Return the settings of a request; those that are missing are the model's own. `UserError` if one is wrong."""
        return dataclasses.replace(self.model.sampling, **fields.overrides())

"""What the experiments pane asks, and the checkpoints of the training pane: other texts, models and tokenizers.

What only the quiz and GPT-2's tokenizer need is imported when they are asked for, in the worker's thread: a fifth of
the server's start.
"""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinystories.data.tokenizer import Tokenizer
from tinystories.serve.app import json_response
from tinystories.serve.errors import invalid
from tinystories.serve.lab import comparisons
from tinystories.serve.lab.other_models import OtherModels, TracedModel
from tinystories.serve.lab.requests import CompareRequest, QuizRequest, ScoreRunRequest, Side, SplitRequest
from tinystories.serve.lab.run_metrics import RunProblemError
from tinystories.serve.lab.runs import find_run
from tinystories.serve.lab.traces import TraceWorker
from tinystories.serve.requests import decode_request
from tinystories.serve.service import Service

if TYPE_CHECKING:
    from tinystories.evaluate.items import Item

Result = TypeVar("Result")


class ExperimentEndpoints:
    """The endpoints that compare texts, models and tokenizers. All of it is computed in the worker's thread."""

    def __init__(self, service: Service, worker: TraceWorker) -> None:
        self.served, self.engine, self.worker = service.model, service.scheduler.engine, worker
        self.root = service.config.runs_folder
        self.others = OtherModels(service.config.compare_model)

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/lab/api/compare", self.show_compared, methods=["GET"]),
            Route("/lab/api/compare", self.compare, methods=["POST"]),
            Route("/lab/api/runs/{name}/score", self.score_run, methods=["POST"]),
            Route("/lab/api/quiz", self.list_quiz, methods=["GET"]),
            Route("/lab/api/quiz", self.answer_quiz, methods=["POST"]),
            Route("/lab/api/split", self.split, methods=["POST"]),
        ]

    async def show_compared(self, _request: Request) -> Response:
        """GET /lab/api/compare: the name of the model of --compare, or null."""
        folder = self.others.compare_model
        return json_response({"name": None if folder is None else folder.resolve().name})

    async def compare(self, request: Request) -> Response:
        """POST /lab/api/compare."""
        fields = decode_request(await request.body(), CompareRequest)

        def answer() -> dict[str, Any]:
            a, b = self.load(fields.a), self.load(fields.b)
            texts = (fields.a.text, fields.b.text)
            traces = (a.trace(texts[0]), b.trace(texts[1]))
            return comparisons.compare_sides((a.name, b.name), traces, texts, fields.top)

        return json_response(await self.compute(answer))

    async def score_run(self, request: Request) -> Response:
        """POST /lab/api/runs/NAME/score: a text as a checkpoint reads it."""
        fields = decode_request(await request.body(), ScoreRunRequest)
        side = Side(text=fields.text, run=request.path_params["name"], step=fields.step)

        def answer() -> dict[str, Any]:
            model = self.load(side)
            return comparisons.describe_side(model.name, model.trace(fields.text), fields.text, fields.top)

        return json_response(await self.compute(answer))

    async def list_quiz(self, _request: Request) -> Response:
        """GET /lab/api/quiz."""

        def answer() -> list[dict[str, Any]]:
            from tinystories.serve.lab.quiz import list_items

            return list_items(self.quiz_items)

        return json_response({"items": await self.compute(answer)})

    async def answer_quiz(self, request: Request) -> Response:
        """POST /lab/api/quiz."""
        fields = decode_request(await request.body(), QuizRequest)
        self.worker.check_traceable()

        def answer() -> dict[str, Any]:
            if fields.item >= len(self.quiz_items):
                raise invalid(f"item: the quiz has {len(self.quiz_items)} items, numbered from 0", "item")
            from tinystories.serve.lab.quiz import answer_item

            return answer_item(self.engine, self.served.tokenizer, self.quiz_items[fields.item][1])

        return json_response(await self.compute(answer))

    async def split(self, request: Request) -> Response:
        """POST /lab/api/split: how tokenizers split a text."""
        fields = decode_request(await request.body(), SplitRequest)

        def answer() -> dict[str, Any]:
            tokenizers: list[tuple[str, Tokenizer]] = [(self.served.name, self.served.tokenizer)]
            if fields.model is not None:
                other = self.load(fields.model)
                tokenizers.append((other.name, other.tokenizer))
            if (gpt2 := self.gpt2) is not None:
                tokenizers.append(("gpt2", gpt2))
            rows = [comparisons.split_text(name, tokenizer, fields.text) for name, tokenizer in tokenizers]
            return {"tokenizers": rows, "has_gpt2": gpt2 is not None}

        return json_response(await self.compute(answer))

    @functools.cached_property
    def gpt2(self) -> Tokenizer | None:
        """GPT-2's tokenizer, if another program has downloaded it."""
        from tinystories.data.gpt2_cache import load_cached_gpt2

        return load_cached_gpt2()

    @functools.cached_property
    def quiz_items(self) -> list[tuple[str, "Item"]]:
        """The questions of the quiz, made when they are first asked for."""
        from tinystories.serve.lab.quiz import build_quiz

        return build_quiz()

    def load(self, side: Side) -> TracedModel:
        """Return the model of a side. Call it in the worker's thread only."""
        if side.run is not None:
            return self.others.load_checkpoint(find_run(self.root, side.run), side.step)
        if side.compare:
            return self.others.load_compared()
        self.worker.check_traceable()
        return TracedModel(self.served.name, self.served.tokenizer, self.worker.load())

    async def compute(self, function: Callable[[], Result]) -> Result:
        """Return the result of a function, called in the worker's thread."""
        try:
            return await self.worker.run(function)
        except RunProblemError as error:
            raise invalid(str(error), code="model_not_usable") from None

"""/lab/api/runs: what the training pane asks about runs."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tinystories.serve.app import json_response
from tinystories.serve.errors import invalid
from tinystories.serve.lab.live import MAX_FEEDS, Feed, LiveMetrics, Watchers
from tinystories.serve.lab.runs import find_run, list_runs
from tinystories.serve.service import Service

MAX_FIND_CHARS = 255


class TrainingEndpoints:
    """The endpoints of the training pane. They read the folder of --runs, in threads, and nothing else."""

    def __init__(self, service: Service) -> None:
        self.service, self.root = service, service.config.runs_folder
        self.watchers = Watchers()

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route("/lab/api/runs", self.list_runs, methods=["GET"]),
            Route("/lab/api/runs/{name}", self.show_run, methods=["GET"]),
            Route("/lab/api/runs/{name}/metrics", self.watch, methods=["GET"]),
        ]

    async def list_runs(self, request: Request) -> Response:
        """GET /lab/api/runs?find=TEXT."""
        contains = request.query_params.get("find", "")[:MAX_FIND_CHARS]
        return json_response(await asyncio.to_thread(list_runs, self.root, contains))

    async def show_run(self, request: Request) -> Response:
        """GET /lab/api/runs/NAME: samples and checkpoints."""
        name = request.path_params["name"]
        return json_response(await asyncio.to_thread(lambda: find_run(self.root, name).describe()))

    async def watch(self, request: Request) -> Any:
        """GET /lab/api/runs/NAME/metrics?after=N: a stream. `also=NAME` and `also_after=N` add runs to the same one."""
        query = request.query_params
        names = [request.path_params["name"], *query.getlist("also")]
        offsets = [query.get("after", "0"), *query.getlist("also_after")]
        offsets += ["0"] * (len(names) - len(offsets))
        if len(names) > MAX_FEEDS or len(offsets) > len(names) or len(set(names)) < len(names):
            raise invalid(f"one stream shows 1 to {MAX_FEEDS} different runs", "also")
        runs = await asyncio.to_thread(lambda: [find_run(self.root, name) for name in names])
        feeds = [Feed(run, parse_offset(offset)) for run, offset in zip(runs, offsets, strict=True)]
        return LiveMetrics(self.service, self.watchers, feeds)


def parse_offset(text: str) -> int:
    """Return a number of bytes. `ApiError` (400) if it is not one."""
    if not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise invalid("after must be a number of bytes, as events of this stream name it", "after")
    return int(text)

"""Run an exported page, in Node.js or a headless browser, and compare its ids with the CPU engine's."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tinystories.data.tokenizer import sanitize
from tinystories.errors import UserError
from tinystories.generate.batching import Request
from tinystories.generate.storyteller import Storyteller

NODES = ("node", "nodejs")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
TIMEOUT_S = 600
RESULT_START, RESULT_END = '<script id="check" type="application/json">', "</script>"

Results = list[dict[str, Any]]


def describe_request(request: Request) -> dict[str, Any]:
    """Return a request as the page's own program takes it."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "repetition_window", "penalize_names")
    settings = {name: getattr(request.settings, name) for name in names}
    seed = str(request.seed)  # which may have more bits than a number of JavaScript
    return {"prompt": request.prompt, "seed": seed, "settings": settings, "maxTokens": request.max_tokens} | (
        {"story": request.number} if request.number else {}
    )


def find_runner() -> tuple[str, str] | None:
    """Return ("node" or "browser", program): what this machine can run a page with; None if nothing."""
    for kind, names in (("node", NODES), ("browser", BROWSERS)):
        for name in names:
            if program := shutil.which(name):
                return kind, program
    return None


def run_page(path: Path, requests: Sequence[Request], runner: tuple[str, str], *, plain: bool = False) -> Results:
    """Generate stories with an exported page; return {"ids", "text"} of each.

    `plain`: without WebAssembly. `UserError` if the page cannot be run.
    """
    kind, program = runner
    questions = {"requests": [describe_request(request) for request in requests], "plain": plain}
    try:
        output = run_in_node(program, path, questions) if kind == "node" else run_in_browser(program, path, questions)
        results = json.loads(output)
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or error
        raise UserError(
            f"verification failed: {Path(program).name} cannot run the page, which needs at least Node.js 16 or"
            f" Chromium 91: {sanitize(detail)}"
        ) from None
    assert len(results) == len(requests)
    return list(results)


def run_in_node(program: str, path: Path, questions: dict[str, Any]) -> str:
    """Return the JSON that the page's program prints in Node.js."""
    command = [program, str(Path(__file__).with_name("run.js")), str(path)]
    process = subprocess.run(
        command, input=json.dumps(questions), capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=True
    )
    return process.stdout


def run_in_browser(program: str, path: Path, questions: dict[str, Any]) -> str:
    """Return the JSON that the page writes into itself in a headless browser."""
    with tempfile.TemporaryDirectory() as profile:
        command = [program, "--headless", "--disable-gpu", f"--user-data-dir={profile}", "--dump-dom"]
        if hasattr(os, "geteuid") and os.geteuid() == 0:  # Chromium's sandbox does not start for root
            command.append("--no-sandbox")
        url = f"{path.resolve().as_uri()}#check={quote(json.dumps(questions))}"
        process = subprocess.run([*command, url], capture_output=True, encoding="utf-8", timeout=TIMEOUT_S, check=True)
    _, start, rest = process.stdout.partition(RESULT_START)
    if not start:
        raise ValueError("the page shows no result")
    return rest.partition(RESULT_END)[0]


def check_stories(path: Path, storyteller: Storyteller, requests: Sequence[Request]) -> str | None:
    """Compare the stories of a page with the engine's; return what was compared, None if nothing here runs a page.

    `UserError` if they differ.
    """
    runner = find_runner()
    if runner is None:
        return None
    results = run_page(path, requests, runner)
    with contextlib.closing(storyteller.events(requests)) as events:
        stories = sorted((index, item) for index, item in events if not isinstance(item, str))
    for (index, story), result in zip(stories, results, strict=True):
        if list(story.ids) != result["ids"] or story.continuation != result["text"]:
            temperature = requests[index].settings.temperature
            raise UserError(
                f"verification failed: with seed {story.seed} and temperature {temperature:g} the page tells another"
                " story than the engine; nothing was written"
            )
    n_ids = sum(len(story.ids) for _, story in stories)
    return f"{n_ids} ids of {len(stories)} stories equal the engine's, in {Path(runner[1]).name}"

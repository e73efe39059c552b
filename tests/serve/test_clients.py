"""Programs that use the server, in an environment of their own: `make clients` creates it.

What takes a minute or more is marked interop.
"""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serve_helpers import GatedEngine, Running, serving, wait_until

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.select import load_engine
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.serve.model import ServedModel

Serve = Callable[..., contextlib.AbstractContextManager[Running]]
ROOT = Path(__file__).parents[2]
SCRIPTS = Path(__file__).parent / "clients"
LM_EVAL_SECONDS = 1200  # half a minute on quiet cores
FOLDER = Path(os.environ.get("TINYSTORIES_CLIENTS", ROOT / ".venv-clients")) / "bin"

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the environment of the clients: make clients"),
]


def run_client(script: str, *arguments: str) -> Any:
    """Return what a script of the clients' environment prints."""
    result = subprocess.run(
        [FOLDER / "python", SCRIPTS / script, *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def ask_openai(check: str, running: Running) -> Any:
    return run_client("openai_client.py", check, f"http://127.0.0.1:{running.port}")


@pytest.fixture(scope="module")
def lively(serve_chaotic: Serve) -> Iterator[Running]:
    """A server whose stories end somewhere."""
    with serve_chaotic(end=0.02, n_ctx=96, n_slots=4) as running:
        yield running


def test_openai_reads_a_story_whole_and_streamed(lively: Running) -> None:
    facts = ask_openai("stream_and_whole", lively)
    assert facts["model"] == "test-model"
    assert facts["object"] == "text_completion"
    assert facts["streamed_text"] == facts["text"] != ""
    assert facts["streamed_reasons"] == [facts["finish_reason"]]
    assert facts["streamed_tokens"] == facts["logprobs"]["tokens"]
    assert facts["streamed_token_logprobs"] == facts["logprobs"]["token_logprobs"]
    assert facts["streamed_offsets"] == facts["logprobs"]["text_offset"]
    assert "".join(facts["streamed_tokens"]) == facts["text"]
    assert facts["usages"][-1] == facts["usage"]
    assert set(map(bool, facts["usages"][:-1])) == {False}
    assert facts["last_choices"] == []
    assert facts["ids"] == ["cmpl-"]
    assert facts["n_ids"] == 1
    assert facts["text"] == lively.client.complete(prompt="The cat", seed=7, max_tokens=20)["text"]


def test_openai_sends_every_form_of_prompt(lively: Running) -> None:
    facts = ask_openai("prompts", lively)
    assert facts["indices"] == [[0, 1], [0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]
    assert facts["models"] == [facts["model"]] == ["test-model"]


def test_openai_chats(lively: Running) -> None:
    facts = ask_openai("chat", lively)
    assert [facts["role"]] == facts["streamed_roles"] == ["assistant"]
    assert facts["content"] == facts["streamed"] == facts["completion"] != ""
    assert facts["finish_reasons"][0] == facts["finish_reasons"][1] in ("stop", "length")
    assert facts["tokens"] == facts["streamed_tokens"]
    assert set(facts["top"]) == {2}


def test_openai_raises_the_exception_of_each_mistake(serve_chaotic: Serve) -> None:
    with serve_chaotic(keys=("a-long-secret",)) as running:
        facts = ask_openai("errors", running)
    assert facts == {
        "range": ["BadRequestError", 400, None, "temperature"],
        "unsupported": ["BadRequestError", 400, "unsupported_parameter", "suffix"],
        "misspelled": ["BadRequestError", 400, "unknown_parameter", "temprature"],
        "long": ["BadRequestError", 400, "context_length_exceeded", "prompt"],
        "model": ["NotFoundError", 404, "model_not_found", "model"],
        "path": ["NotFoundError", 404, None, None],
        "tools": ["BadRequestError", 400, "unsupported_parameter", "tools"],
        "key": ["AuthenticationError", 401, "invalid_api_key", None],
        "origin": ["PermissionDeniedError", 403, "bad_origin", None],
    }


def test_openai_says_that_the_server_is_full(serve_chaotic: Serve) -> None:
    with serve_chaotic(n_slots=1, n_queued=0) as running, running.client.open_stream(max_tokens=10_000):
        assert ask_openai("refused", running) == {"error": ["RateLimitError", 429, "queue_full", None]}


def test_openai_tries_again_after_retry_after(serve_chaotic: Serve) -> None:
    """The only slot is free after the first refusal; the second try comes when the server has asked for it."""
    with serve_chaotic(n_slots=1, n_queued=0) as running:
        refused = running.service.metrics.refused
        with running.client.open_stream(max_tokens=10_000):
            answers: list[Any] = []
            thread = threading.Thread(target=lambda: answers.append(ask_openai("retries", running)))
            thread.start()
            wait_until(lambda: refused.collect()[0].samples[0].value == 1)
        thread.join()
        assert answers[0]["finish_reason"] == "length"
        assert answers[0]["seconds"] >= 1  # its own first pause is half a second
        assert refused.collect()[0].samples[0].value == 1


def test_openai_gives_up_at_the_deadline(serve_chaotic: Serve) -> None:
    with serve_chaotic(timeout_s=0.3) as running:
        assert isinstance(running.engine, GatedEngine)
        running.engine.close_gate()
        facts = ask_openai("deadline", running)
        assert facts == {
            "whole": ["InternalServerError", 504, "timeout", None],
            "stream": ["APIError", None, "timeout", None],
        }
        running.engine.open_gate()
        wait_until(lambda: running.endings() == {"deadline": 2})  # it has not tried again
        assert not running.scheduler.n_open


def test_openai_leaves_and_the_slots_are_free(serve_chaotic: Serve) -> None:
    with serve_chaotic() as running:
        facts = ask_openai("cancel", running)
        assert len(facts["texts"]) == 3
        assert facts["texts"][2] == "timeout"
        wait_until(lambda: running.endings() == {"client_gone": 3})
        assert running.scheduler.n_busy == 0


def test_litellm_reads_stories_and_chats(lively: Running) -> None:
    facts = run_client("litellm_client.py", f"http://127.0.0.1:{lively.port}")
    assert facts["text"] == facts["streamed_text"] == facts["chat"] == facts["streamed_chat"] != ""
    assert facts["usage"] == facts["chat_usage"][0] == facts["chat_usage"][1] > 0
    assert facts["finish_reasons"][0] == facts["finish_reasons"][1] in ("stop", "length")
    assert facts["range"] == "BadRequestError"
    assert facts["model"] == "NotFoundError"


@pytest.mark.interop
def test_schemathesis_finds_nothing(serve_chaotic: Serve, tmp_path: Path) -> None:
    """Every operation of the schema, with right and wrong bodies: no 500, only documented answers."""
    with serve_chaotic(end=0.5, timeout_s=0.2, n_slots=4) as running:
        command = [FOLDER / "schemathesis", "--config-file", SCRIPTS / "schemathesis.toml", "run"]
        command += [f"http://127.0.0.1:{running.port}/openapi.json", "--no-color", "--continue-on-failure"]
        command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "15", "--no-shrink"]
        command += ["--generation-deterministic"]  # a fixed seed, and more
        result = subprocess.run(command, capture_output=True, text=True, timeout=280, cwd=tmp_path)  # for its cache
        assert result.returncode == 0, result.stdout[-6000:]
        wait_until(lambda: running.scheduler.n_busy == 0)


@pytest.mark.interop
@pytest.mark.timeout(2 * LM_EVAL_SECONDS)
def test_lm_eval_finds_the_likelihoods_that_transformers_finds(tmp_path: Path) -> None:
    """`local-completions` with the tokenizer of the server against `hf` on the export, for some stories."""
    if not (FOLDER / "lm_eval").exists():
        pytest.skip("needs lm-eval in the environment of the clients: make test-interop")
    files, engine = load_engine(BUNDLED_MODEL, EngineConfig(engine="cpu", precision="fp32", n_slots=8))
    model = ServedModel.describe(files, name="model", engine_name="cpu", precision="fp32")
    exported = tmp_path / "hf"
    export(ModelBundle.read(BUNDLED_MODEL), "hf", exported)
    with serving(engine, model) as running:
        options = f"model=model,base_url=http://127.0.0.1:{running.port}/v1/completions,tokenizer_backend=remote"
        served = evaluate("local-completions", f"{options},max_length={model.n_ctx},num_concurrent=8", tmp_path / "a")
    transformers = evaluate("hf", f"pretrained={exported},dtype=float32,add_bos_token=False", tmp_path / "b")
    assert served["acc"] == transformers["acc"]
    for ours, theirs, answers in zip(served["logprobs"], transformers["logprobs"], served["docs"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)
        ids = [model.tokenizer.encode(answers["beginning"] + ending) for ending in answers["endings"]]
        begin = len(model.tokenizer.encode(answers["beginning"]))
        scores = [logprobs[begin - 1 :].sum() for logprobs in engine.logprobs(ids)]
        assert ours == pytest.approx(scores, rel=1e-4)


def evaluate(model: str, options: str, out: Path) -> dict[str, Any]:
    """Run lm-eval; return the accuracy, and the log-probabilities of the endings of each story."""
    command = [FOLDER / "lm_eval", "--model", model, "--model_args", options, "--tasks", "story_endings"]
    command += ["--include_path", ROOT / "benchmarks" / "endings", "--limit", "6", "--log_samples"]
    command += ["--output_path", out, "--device", "cpu"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LM_EVAL_SECONDS, cwd=ROOT)
    assert result.returncode == 0, result.stderr[-3000:]
    (samples,) = out.rglob("samples_*.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    return {
        "acc": [line["acc"] for line in lines],
        "docs": [line["doc"] for line in lines],
        "logprobs": [[float(answer[0]) for answer in line["filtered_resps"]] for line in lines],
    }

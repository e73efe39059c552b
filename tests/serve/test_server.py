"""The server beside the 27 complaints: other endpoints, fairness, the prefix cache, slow clients, and the command."""

import contextlib
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_helpers import GatedEngine, Running, post, wait_until

import tinystories.cli.write.serve as serve_command
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.cli import cli
from tinystories.cli.common import run
from tinystories.data.tokenizer import END, Tokenizer
from tinystories.errors import UserError
from tinystories.generate.batching import Request
from tinystories.serve import connection
from tinystories.serve.app import Endpoints, build_app
from tinystories.serve.jobs import FairQueue, Generation, Inbox, Job
from tinystories.serve.openapi import build_schema
from tinystories.serve.settings import ServerConfig, read_keys
from tinystories.serve.slots import SlotCache

Serve = Callable[..., contextlib.AbstractContextManager[Running]]


def engine_of(running: Running) -> GatedEngine:
    assert isinstance(running.engine, GatedEngine)
    return running.engine


def test_a_chat_continues_the_last_user_message(serve_script: Serve, tokenizer: Tokenizer) -> None:
    with serve_script("The cat sat.") as running:
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": "You are a storyteller."},
            {"role": "user", "content": [{"type": "text", "text": "Once "}, {"type": "text", "text": "upon"}]},
        ]
        answer = post(running, "/v1/chat/completions", messages=messages, logprobs=True, top_logprobs=2)
        assert answer["object"] == "chat.completion"
        choice = answer["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": "The cat sat.", "refusal": None}
        assert choice["finish_reason"] == "stop"
        entries = choice["logprobs"]["content"]
        assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "The cat sat."
        assert [len(entry["top_logprobs"]) for entry in entries] == [2] * len(entries)
        assert engine_of(running).content[0][: len(tokenizer.encode("Once upon")) + 1] == [
            tokenizer.end_id,
            *tokenizer.encode("Once upon"),
        ]
        messages += [choice["message"], {"role": "user", "content": "a dog"}]
        post(running, "/v1/chat/completions", messages=messages, max_completion_tokens=1)
        prompt = tokenizer.encode("Once uponThe cat sat.\na dog")
        assert [tokenizer.end_id, *prompt] in engine_of(running).content.values()
        image = {"role": "user", "content": [{"type": "image_url"}]}
        for param, bad in [
            ("messages", {"messages": []}),
            ("messages", {"messages": messages[:-1]}),
            ("messages", {"messages": [image]}),
            ("tools", {"messages": messages, "tools": [{"type": "function"}]}),
            ("top_logprobs", {"messages": messages, "top_logprobs": 2}),
            ("max_tokens", {"messages": messages, "max_tokens": 1, "max_completion_tokens": 2}),
            ("messages", {}),
            ("messages[0].role", {"messages": [{"role": "narrator"}]}),
        ]:
            status, error, _ = running.client.request("POST", "/v1/chat/completions", bad)
            assert (status, error["error"]["param"]) == (400, param)


def test_a_streamed_chat_begins_with_the_role(serve_script: Serve) -> None:
    with serve_script("The cat sat.") as running:
        messages = [{"role": "user", "content": "a"}]
        with running.client.open_stream("/v1/chat/completions", messages=messages) as stream:
            deltas = [event["choices"][0]["delta"] for event in stream.events()]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert "".join(delta.get("content", "") for delta in deltas) == "The cat sat."
        assert stream.is_done


def test_models(chaotic: Running) -> None:
    listed = chaotic.client.request("GET", "/v1/models")[1]
    assert [model["id"] for model in listed["data"]] == ["test-model"]
    assert chaotic.client.request("GET", "/v1/models/test-model")[1] == listed["data"][0]
    for status, answer, _ in (
        chaotic.client.request("GET", "/v1/models/gpt-4"),
        chaotic.client.request("POST", "/v1/completions", {"model": "gpt-4", "prompt": "a"}),
    ):
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


def test_tokenize_and_detokenize_are_inverse(chaotic: Running, tokenizer: Tokenizer) -> None:
    text = f"The naïve 🐈{END}sat"
    ids = [*tokenizer.encode("The naïve 🐈"), tokenizer.end_id, *tokenizer.encode("sat")]
    vllm = post(chaotic, "/tokenize", prompt=text)
    assert (vllm["tokens"], vllm["count"]) == ([tokenizer.end_id, *ids], len(ids) + 1)
    assert post(chaotic, "/tokenize", prompt=text, add_special_tokens=False)["tokens"] == ids
    assert post(chaotic, "/tokenize", content=text)["tokens"] == ids
    assert post(chaotic, "/tokenize", content=END, parse_special=False)["tokens"] == tokenizer.encode(END)
    assert post(chaotic, "/tokenize", prompt=END, add_special_tokens=False)["tokens"] == [tokenizer.end_id]
    assert post(chaotic, "/detokenize", tokens=ids) == {"prompt": text, "content": text}
    pieces = [token["piece"] for token in post(chaotic, "/tokenize", content=text, with_pieces=True)["tokens"]]
    data = b"".join(piece.encode() if isinstance(piece, str) else bytes(piece) for piece in pieces)
    assert data.decode() == text
    info = chaotic.client.request("GET", "/tokenizer_info")[1]
    assert info["eos_token"] == info["bos_token"] == END
    for path, fields in (("/detokenize", {"tokens": [300]}), ("/detokenize", {}), ("/tokenize", {})):
        assert chaotic.client.request("POST", path, fields)[0] == 400


def test_best_of_returns_the_likeliest(serve_chaotic: Serve) -> None:
    with serve_chaotic(n_slots=4) as running:
        fields: dict[str, object] = {"prompt": "The cat", "seed": 3, "max_tokens": 8}
        six = running.client.ask(**fields, n=6, logprobs=0)["choices"]
        means = {np.mean(choice["logprobs"]["token_logprobs"]): choice["text"] for choice in six}
        best = running.client.ask(**fields, n=2, best_of=6)
        assert [choice["text"] for choice in best["choices"]] == [means[m] for m in sorted(means, reverse=True)[:2]]
        assert [choice["index"] for choice in best["choices"]] == [0, 1]
        assert best["choices"][0]["logprobs"] is None
        assert best["usage"]["completion_tokens"] == 48
        assert running.client.refuse(**fields, best_of=2, stream=True)[1]["param"] == "best_of"


def test_errors_have_openais_form(chaotic: Running) -> None:
    for method, path, status in [
        ("POST", "/v1/embeddings", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("GET", "/nowhere", 404),
    ]:
        got, answer, headers = chaotic.client.request(method, path)
        assert (got, set(answer["error"])) == (status, {"message", "type", "param", "code"})
        assert headers["content-type"] == "application/json"


def test_requests_have_ids_and_logs_have_no_prompts(chaotic: Running, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    fields = {"prompt": "The secret cat", "max_tokens": 2}
    headers = chaotic.client.request("POST", "/v1/completions", fields, {"X-Request-Id": "my-id.7"})[2]
    assert headers["x-request-id"] == "my-id.7"
    forged = chaotic.client.request("GET", "/v1/models?prompt=secret", headers={"X-Request-Id": "a b"})[2]
    assert re.fullmatch("[0-9a-f]{16}", forged["x-request-id"])
    wait_until(lambda: "/v1/models 200" in caplog.text)
    assert "my-id.7 POST /v1/completions 200" in caplog.text
    assert "secret" not in caplog.text


def test_a_prompt_that_a_slot_holds_is_not_computed_again(serve_chaotic: Serve) -> None:
    with serve_chaotic(n_slots=2) as running:
        fields: dict[str, object] = {"prompt": [5, 6, 7, 8, 9, 10, 11, 12], "seed": 1, "max_tokens": 6}
        engine = engine_of(running)
        first = running.client.complete(**fields)
        assert engine.calls[0] == ("extend", 8)
        engine.calls.clear()
        assert running.client.complete(**fields) == first
        assert engine.calls[0] == ("extend", 1)
        engine.calls.clear()
        running.client.complete(prompt=[5, 6, 7, 8, 1, 2], max_tokens=1)
        assert engine.calls[0] == ("extend", 2)
        # A prompt that is scored needs the logits of all its positions.
        engine.calls.clear()
        running.client.complete(**fields | {"echo": True, "logprobs": 1})
        assert engine.calls[0] == ("extend", 8)


def test_a_cached_prefix_gives_the_same_bits(serve_model: Serve) -> None:
    with serve_model(n_slots=1) as running:
        fields = {"prompt": "Once upon a time there was a dog", "seed": 2, "max_tokens": 40, "logprobs": 5}
        first = running.client.complete(**fields)
        assert running.client.complete(**fields) == first
        running.client.complete(prompt="The sun", max_tokens=3)
        assert running.client.complete(**fields) == first


def test_a_full_context_is_scored_and_continued(chaotic: Running, caplog: pytest.LogCaptureFixture) -> None:
    ids, engine = list(range(1, 66)), engine_of(chaotic)
    choice = chaotic.client.complete(prompt=ids[:64], max_tokens=3)
    assert choice["finish_reason"] == "length"
    assert engine.calls == [("extend", 64), ("extend", 32), ("step", 1)]
    scored = chaotic.client.complete(prompt=ids, max_tokens=0, echo=True, logprobs=0)["logprobs"]
    assert len(scored["token_logprobs"]) == 65
    shorter = chaotic.client.complete(prompt=ids[:64], max_tokens=1, echo=True, logprobs=0)["logprobs"]
    assert shorter["token_logprobs"][:64] == scored["token_logprobs"][:64]
    for fields in (
        {"prompt": ids, "max_tokens": 1, "echo": True},
        {"prompt": [*ids, 1], "max_tokens": 0, "echo": True},
    ):
        assert chaotic.client.refuse(**fields)[1]["code"] == "context_length_exceeded"
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_the_torch_engine_serves_as_well(serve_model: Serve) -> None:
    fields = {"prompt": "Once upon a time", "seed": 2, "max_tokens": 120, "echo": True, "logprobs": 3}
    answers = []
    for name in ("cpu", "torch"):
        with serve_model(engine=name, precision="fp32") as running:
            answers.append(running.client.complete(**fields))
            unlogged = running.client.complete(**fields | {"logprobs": None, "logit_bias": {"3": 0}})
            assert unlogged["text"] == answers[-1]["text"]
    scores = [answer["logprobs"]["token_logprobs"] for answer in answers]
    np.testing.assert_allclose(*scores, rtol=1e-3)
    assert answers[0]["text"] == answers[1]["text"]


def test_the_longest_prefix_wins_then_the_oldest() -> None:
    slots = SlotCache(4)
    for ids in ([1, 2, 3], [1, 2, 9, 9], [7]):
        slot, _ = slots.take([])
        slots.give_back(slot, ids)
    assert len(slots) == 4
    assert slots.take([1, 2, 9, 5]) == (1, 3)
    assert slots.take([1, 2, 9, 5]) == (0, 2)
    assert slots.take([4]) == (3, 0)  # never used
    assert slots.take([4]) == (2, 0)
    assert len(slots) == 0
    slots.give_back(2, [])
    with pytest.raises(AssertionError):
        slots.give_back(2, [])


def job_of(client: str, names: str) -> Job:
    inbox = object.__new__(Inbox)
    generations = [Generation(index=i, request=Request(), context=[ord(name)]) for i, name in enumerate(names)]
    return Job(id=names, client=client, generations=generations, inbox=inbox)


def pop_all(queue: FairQueue) -> str:
    return "".join(chr(queue.pop()[1].context[0]) for _ in range(len(queue)))


def test_clients_take_turns_and_so_do_their_requests() -> None:
    queue = FairQueue()
    queue.push(job_of("greedy", "abcdef"))
    queue.push(job_of("greedy", "g"))
    queue.push(job_of("modest", "x"))
    queue.push(job_of("third", "uvw"))
    assert queue.n_prompt_tokens == 11
    assert pop_all(queue) == "axugvbwcdef"
    assert (queue.n_sequences, queue.n_tokens, queue.n_prompt_tokens) == (0, 0, 0)


def test_a_removed_request_leaves_the_order_of_the_others() -> None:
    queue = FairQueue()
    jobs = [job_of("a", "abc"), job_of("b", "x"), job_of("a", "de")]
    for job in jobs:
        queue.push(job)
    assert queue.pop()[0] is jobs[0]
    assert [queue.remove(jobs[1]), queue.remove(jobs[1]), queue.remove(jobs[0])] == [1, 0, 2]
    assert pop_all(queue) == "de"
    assert queue.n_tokens == 0


def test_a_client_that_does_not_read_is_dropped(serve_chaotic: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with serve_chaotic(n_slots=8, n_ctx=512, send_timeout_s=0.05) as running:
        engine, scheduler = engine_of(running), running.scheduler
        engine.close_gate()
        body = json.dumps({"prompt": "a", "n": 8, "max_tokens": 500, "logprobs": 20, "stream": True}).encode()
        running.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # small buffers of the system
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", running.port))
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            sock.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            engine.allow(400)

            def is_dropped() -> bool:
                if scheduler.canceled and engine.is_waiting:
                    engine.allow(1)
                return running.endings() == {"slow_client": 8}

            wait_until(is_dropped)
            assert scheduler.n_busy == 0
            sock.settimeout(60)
            data = bytearray()
            with contextlib.suppress(ConnectionError):
                while part := sock.recv(65536):
                    data += part
            assert b"[DONE]" not in data
        assert not [record for record in caplog.records if record.levelname == "ERROR"]
        engine.open_gate()
        assert running.client.complete(prompt="a", max_tokens=1)["finish_reason"] == "length"


def test_a_request_ends_at_its_deadline(serve_chaotic: Serve) -> None:
    with serve_chaotic(timeout_s=0.05) as running:
        engine_of(running).close_gate()
        status, answer, headers = running.client.request("POST", "/v1/completions", {"prompt": "a"})
        assert (status, answer["error"]["code"], headers["x-should-retry"]) == (504, "timeout", "false")
        with running.client.open_stream(prompt="a") as stream:
            assert [event["error"]["code"] for event in stream.events()] == ["timeout"]
        assert not stream.is_done
        wait_until(lambda: not running.service.inboxes)  # both have been canceled
        engine_of(running).open_gate()
        wait_until(lambda: running.endings() == {"deadline": 2})
        assert running.scheduler.n_open == 0


def test_a_stream_that_waits_says_so_now_and_then(serve_chaotic: Serve) -> None:
    with serve_chaotic(ping_s=0.01) as running:
        engine_of(running).close_gate()
        with running.client.open_stream(prompt="a", max_tokens=1) as stream:
            assert [stream.response.readline() for _ in range(4)] == [b": waiting\n", b"\n"] * 2
            engine_of(running).open_gate()
            assert [event["choices"][0]["finish_reason"] for event in stream.events()] == ["length"]
        assert stream.is_done


def test_a_header_that_does_not_come_closes_the_connection(
    serve_chaotic: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.05)
    with serve_chaotic() as running:
        with running.client.connect() as silent, contextlib.suppress(ConnectionError):
            assert silent.recv(10) == b""
        with running.client.connect() as slow, contextlib.suppress(ConnectionError):
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            assert slow.recv(10) == b""
        monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 60)
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)) as later:
            later.request("GET", "/health")
            assert later.getresponse().read()
            monkeypatch.setattr(connection, "HEADER_TIMEOUT_S", 0.05)
            later.sock.sendall(b"GET /health HTTP/1.1\r\nHost: loc")
            with contextlib.suppress(ConnectionError):
                assert later.sock.recv(10) == b""


def test_a_client_that_offers_http2_is_answered(chaotic: Running) -> None:
    """Java's HttpClient does with every first request; the body follows as if it had not."""
    offer = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAAQAoAAAAAIAAAAA"}
    status, answer, _ = chaotic.client.request("POST", "/v1/completions", {"max_tokens": 2, "seed": 1}, offer)
    assert status == 200
    assert answer["choices"][0] == chaotic.client.complete(max_tokens=2, seed=1)


def test_the_schema_describes_every_endpoint(chaotic: Running) -> None:
    schema = chaotic.client.request("GET", "/openapi.json")[1]
    assert schema == json.loads(json.dumps(build_schema()))
    routes = Endpoints(chaotic.service).routes()
    assert {route.path.replace(":path", "") for route in routes} == set(schema["paths"])
    references = set(re.findall('"#/components/schemas/([^"]*)"', json.dumps(schema)))
    assert references <= set(schema["components"]["schemas"])
    request = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert json.dumps(request["n"]).count("32")
    assert len(request["prompt"]["anyOf"]) == 5


def test_other_routes_can_join(chaotic: Running) -> None:
    from starlette.responses import PlainTextResponse
    from starlette.routing import Route

    async def page(_request: Any) -> PlainTextResponse:
        return PlainTextResponse("hello")

    routes = [Route("/page", page), Route("/data", page)]
    config = ServerConfig(keys=("a-long-secret",))
    chaotic.service.config = config
    app = build_app(chaotic.service, extra_routes=routes, open_paths=["/page"])
    chaotic.server.config.loaded_app = app
    assert chaotic.client.request("GET", "/page")[:2] == (200, b"hello")
    assert chaotic.client.request("GET", "/data")[0] == 401


def test_metrics_count_tokens_and_endings(serve_script: Serve) -> None:
    with serve_script("The cat sat.") as running:
        n_generated = running.client.ask(prompt="a dog", n=2)["usage"]["completion_tokens"]
        text = running.client.request("GET", "/metrics")[1].decode()
        assert f"tinystories_tokens_predicted_total {n_generated}.0" in text
        assert 'tinystories_endings_total{reason="end"} 2.0' in text
        assert 'tinystories_requests_total{path="/v1/completions",status="200"} 1.0' in text
        assert "tinystories_requests_processing 0.0" in text
        assert "tinystories_time_to_first_token_seconds_count 1.0" in text


def test_keys_come_from_a_file_or_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("first-long-key\n\n second-long-key \n")
    assert read_keys(file, {"TINYSTORIES_API_KEY": "other"}) == ("first-long-key", "second-long-key")
    assert read_keys(None, {"TINYSTORIES_API_KEY": "other-long-key"}) == ("other-long-key",)
    assert read_keys(None, {}) == ()
    file.write_text("\n")
    with pytest.raises(UserError, match="has no key"):
        read_keys(file, {})
    with pytest.raises(UserError, match="cannot be read"):
        read_keys(tmp_path / "missing", {})
    for settings, message in [
        ({"keys": ("short",)}, "at least 8 ASCII characters"),
        ({"keys": ("a-long-secret",), "no_key": True}, "--no-key contradicts"),
        ({"allow_origins": ("example.org",)}, "is not an origin"),
        ({"allow_origins": ("https://example.org/path",)}, "is not an origin"),
        ({"port": 70000}, "port must be"),
        ({"timeout_s": 0}, "timeout must be"),
    ]:
        with pytest.raises(UserError, match=message):
            ServerConfig(**settings)  # type: ignore[arg-type]


def test_the_server_imports_only_what_it_starts_with() -> None:
    """Imports are most of its start; these are for single requests or other commands."""
    late = ["rich", "numba", "torch", "tinystories.cli.measure.bench", "tinystories.evaluate.tasks"]
    late += ["tinystories.serve.openapi", "tinystories.serve.lab.quiz", "tinystories.data.build_tokenizer"]
    program = f"""
import sys, tinystories.cli.write.serve, tinystories.serve.server
from tinystories.engine.select import load_engine
from tinystories.engine.engine_config import EngineConfig
load_engine({str(BUNDLED_MODEL)!r}, EngineConfig(engine="cpu"))
print(*[name for name in {late!r} if name in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "\n"


def test_the_command_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve_command, "SERVE_MODULES", ("starlette", "no_such_package"))
    assert run(cli, ["serve"]) == 2
    assert capsys.readouterr().err == (
        'error: this command needs no_such_package; run: pip install "tinystories-gpt[serve]"\n'
    )


def test_the_command_refuses_an_open_door_and_a_port_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("TINYSTORIES_API_KEY", raising=False)
    assert run(cli, ["serve", "--host", "0.0.0.0"]) == 2
    assert "set a key with --api-key-file FILE" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        assert run(cli, ["serve", "--port", str(taken.getsockname()[1])]) == 2
    assert "choose another with --port" in capsys.readouterr().err


@pytest.mark.extended
def test_the_command_prints_its_url_and_ends_by_a_signal(model_folder: Path) -> None:
    command = [sys.executable, "-m", "tinystories", "serve", str(model_folder), "--port", "0", "--engine", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    url = process.stdout.readline().strip()
    port = int(url.rpartition(":")[2])
    deadline = time.monotonic() + 60
    answer = b""
    while not answer:
        assert time.monotonic() < deadline
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=60)) as client:
            client.request("POST", "/v1/completions", b'{"max_tokens": 3}', {"Content-Type": "application/json"})
            answer = client.getresponse().read()
    assert json.loads(answer)["usage"]["completion_tokens"] <= 3
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert f"curl {url}/v1/completions" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(("method", "path", "status"), [("TRACE", "/health", 405), ("POST", "/v1/models", 405)])
def test_a_wrong_method_is_405_whatever_the_body(chaotic: Running, method: str, path: str, status: int) -> None:
    for headers in ({"Content-Type": "text/plain"}, {}):
        answer_status, answer, answer_headers = chaotic.client.request(method, path, b"x" * 10, headers)
        assert answer_status == status
        assert answer["error"]["message"] == f"this path does not answer {method}"
        assert answer_headers["connection"] == "close"  # the body stays unread
    assert chaotic.client.request("DELETE", "/nowhere", b"x" * 10, {"Content-Type": "text/plain"})[0] == 404

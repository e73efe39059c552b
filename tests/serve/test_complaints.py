"""What users of other servers have complained of, as one test each.

The numbers are those of the table in docs/serve.md. Everything goes over real sockets: an in-process transport collects
whole streams and cannot show a client that leaves.
"""

import contextlib
import itertools
import json
import random
import socket
import struct
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_helpers import Client, GatedEngine, Running, describe, serving, wait_until

from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError
from tinystories.generate.storyteller import Storyteller
from tinystories.serve import scheduler as scheduler_module
from tinystories.serve.running import Running as RunningSequence
from tinystories.serve.settings import ServerConfig

Serve = Callable[..., contextlib.AbstractContextManager[Running]]
LONG = {"max_tokens": 500, "temperature": 1}
HELLO = "“Hello”, said the 🐈 to the naïve dog."


def text_of(chunks: list[dict[str, Any]]) -> str:
    """The text of a stream with one choice."""
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def engine_of(running: Running) -> GatedEngine:
    assert isinstance(running.engine, GatedEngine)
    return running.engine


@pytest.mark.parametrize("stream", [True, False])
def test_01_a_client_that_leaves_frees_its_slot_within_one_step(chaotic: Running, stream: bool) -> None:
    engine, scheduler = engine_of(chaotic), chaotic.scheduler
    engine.close_gate()
    sock = chaotic.client.send(prompt="The cat", stream=stream, **LONG)
    engine.allow(3)
    wait_until(lambda: len(engine.calls) == 3 and engine.is_waiting)
    assert scheduler.n_busy == 1
    sock.close()
    wait_until(lambda: scheduler.canceled)
    engine.allow(1)
    wait_until(lambda: scheduler.n_busy == 0)
    assert len(engine.calls) == 4
    wait_until(lambda: chaotic.endings() == {"client_gone": 1})
    assert scheduler.n_open == 0


def test_02_a_queued_request_of_a_client_that_left_is_never_computed(serve_chaotic: Serve) -> None:
    with serve_chaotic(n_slots=1) as running:
        engine, scheduler = engine_of(running), running.scheduler
        engine.close_gate()
        first = running.client.send(prompt="The cat", max_tokens=5)
        wait_until(lambda: engine.is_waiting)
        running.client.send(prompt="dog dog dog", max_tokens=5).close()
        wait_until(lambda: running.endings() == {"client_gone": 1})
        assert len(scheduler.queue) == 0
        engine.open_gate()
        wait_until(lambda: scheduler.n_open == 0)
        assert len(engine.calls) == 5
        first.close()


def test_03_a_queued_clients_cancel_leaves_the_others_alone(serve_chaotic: Serve) -> None:
    fields = {"prompt": "The cat", "seed": 3, "max_tokens": 12}
    with serve_chaotic(n_slots=1) as running:
        expected = running.client.complete(**fields)["text"]
        engine = engine_of(running)
        engine.close_gate()
        with running.client.open_stream(**fields) as stream:
            engine.allow(2)
            wait_until(lambda: len(engine.calls) > 12)
            running.client.send(prompt="dog", **LONG).close()
            wait_until(lambda: running.endings().get("client_gone") == 1)
            engine.open_gate()
            assert text_of(list(stream.events())) == expected


def test_04_a_broken_connection_ends_one_request_only(chaotic: Running) -> None:
    with chaotic.client.open_stream(prompt="The cat", seed=1, **LONG) as stream:
        next(stream.events())
        # Close with a reset, so that the server's next write fails.
        stream.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_until(lambda: chaotic.scheduler.n_open == 0)
    assert chaotic.client.request("GET", "/health")[0] == 200
    assert chaotic.client.complete(prompt="The cat", max_tokens=3)["finish_reason"] == "length"


def test_05_requests_with_and_without_processors_share_a_batch(serve_chaotic: Serve) -> None:
    variants: list[dict[str, object]] = [
        {},
        {"logit_bias": {"5": 3.5, "7": -100}},
        {"frequency_penalty": 1.5, "presence_penalty": 0.5},
        {"repetition_penalty": 1.3, "top_k": 20},
        {"logprobs": 3, "top_p": 0.9},
        {"temperature": 0, "stop": ["qqq"]},
        {"echo": True, "logprobs": 0, "min_p": 0.1},
    ]
    requests = [{"prompt": "The cat", "seed": 5, "max_tokens": 20} | variant for variant in variants]
    with serve_chaotic(n_slots=7) as running, ThreadPoolExecutor(7) as pool:
        alone = [running.client.complete(**fields) for fields in requests]
        engine = engine_of(running)
        engine.close_gate()
        together = pool.map(lambda fields: running.client.complete(**fields), requests)
        wait_until(lambda: running.scheduler.n_open == 7)
        engine.open_gate()
        assert list(together) == alone
        assert len({choice["text"] for choice in alone}) >= 6


def test_05_an_error_in_one_request_is_that_requests_alone(
    chaotic: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add_token = RunningSequence.add_token

    def fail_for_one(self: RunningSequence, token: int, raw_logits: Any) -> Any:
        if self.generation.request.prompt == "dog" and len(self.sequence.generated_ids) == 3:
            raise ZeroDivisionError
        return add_token(self, token, raw_logits)

    monkeypatch.setattr(RunningSequence, "add_token", fail_for_one)
    with chaotic.client.open_stream(prompt="The cat", max_tokens=30) as stream:
        status, error = chaotic.client.refuse(prompt="dog", max_tokens=30)
        assert (status, error["type"]) == (500, "server_error")
        events = list(stream.events())
    assert events[-1]["choices"][0]["finish_reason"] == "length"
    with chaotic.client.open_stream(prompt="dog", max_tokens=30) as stream:
        events = list(stream.events())
    assert events[-1]["error"]["code"] == "internal_error"
    assert not stream.is_done
    assert chaotic.scheduler.n_open == 0
    assert "dog" not in caplog.text


def test_05_a_dead_engine_ends_the_process(serve_chaotic: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with serve_chaotic() as running:
        engine_of(running).error = RuntimeError("broken")
        assert running.client.refuse(prompt="The cat", max_tokens=3)[1]["code"] == "engine_failed"
        running.thread.join(60)
        assert not running.thread.is_alive()
        assert running.server.exit_code == 1
    assert "the engine's thread has ended by an error" in caplog.text


def test_06_aborts_retries_and_mixed_lengths_leave_nothing_behind(serve_chaotic: Serve) -> None:
    def visit(number: int) -> str:
        choose = random.Random(number)
        fields = {"prompt": "The cat " * choose.randint(0, 8), "max_tokens": choose.randint(1, 60), "seed": number}
        if number % 3 == 0:
            running.client.send(stream=bool(number % 2), **fields).close()
            return "left"
        while True:
            status, answer, headers = running.client.request("POST", "/v1/completions", fields)
            if status == 200:
                return str(answer["choices"][0]["finish_reason"])
            assert status == 429
            assert int(headers["retry-after"]) >= 1

    with serve_chaotic(n_slots=3, n_queued=4, end=0.03) as running, ThreadPoolExecutor(12) as pool:
        results = list(pool.map(visit, range(90)))
        wait_until(lambda: running.scheduler.n_open == 0)
        assert results.count("left") == 30
        assert set(results) == {"left", "stop", "length"}
        assert running.client.request("GET", "/health")[1] == {"status": "ok", "slots": 3, "busy": 0, "queued": 0}
        assert len(running.scheduler.slots) == 3
        assert not running.service.inboxes


def test_07_an_idle_server_sleeps(serve_chaotic: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "IDLE_SECONDS", 3600)
    with serve_chaotic() as running:
        n_waits, wait = itertools.count(1), running.scheduler.changed.wait
        counts = []

        def counted_wait(timeout: float) -> bool:
            counts.append(next(n_waits))
            return wait(timeout)

        running.scheduler.changed.wait = counted_wait  # type: ignore[method-assign]
        for _ in range(5):
            running.client.complete(prompt="The cat", max_tokens=2)
            wait_until(lambda: not running.scheduler.running)
        time.sleep(0.2)  # it could wake up by itself in the meantime
        # Each request wakes it up once, when it is queued, and once more when its end is told.
        assert len(counts) <= 10


def test_08_the_queue_is_bounded_by_default_and_n_counts_n(serve_chaotic: Serve) -> None:
    with serve_chaotic(n_slots=2) as running:
        client, engine = running.client, engine_of(running)
        assert running.scheduler.capacity == 2 + 8
        engine.close_gate()
        sockets = [client.send(prompt="The cat", n=9, max_tokens=50)]
        wait_until(lambda: running.scheduler.n_open == 9)
        status, answer, headers = client.request("POST", "/v1/completions", {"prompt": ["a", "b"]})
        assert (status, answer["error"]["type"]) == (429, "rate_limit_error")
        assert 1 <= int(headers["retry-after"]) <= 60
        status, error = client.refuse(prompt="The cat", n=11)
        assert (status, "more than this server's 10" in error["message"]) == (400, True)
        for sock in sockets:
            sock.close()


@pytest.mark.parametrize("n_queued", [0, 3])
def test_09_one_request_too_many_is_exactly_one_429(serve_chaotic: Serve, n_queued: int) -> None:
    with serve_chaotic(n_slots=2, n_queued=n_queued) as running, ThreadPoolExecutor(8) as pool:
        engine = engine_of(running)
        engine.close_gate()
        answers = [
            pool.submit(running.client.request, "POST", "/v1/completions", {"prompt": "a", "max_tokens": 2})
            for _ in range(2 + n_queued + 1)
        ]
        wait_until(lambda: sum(answer.done() for answer in answers) == 1)
        engine.open_gate()
        assert sorted(answer.result()[0] for answer in answers) == [200] * (2 + n_queued) + [429]


def test_10_health_answers_while_a_long_prompt_is_tokenized_and_sees_a_stuck_engine(
    chaotic: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, is_encoding, may_encode = Tokenizer.encode, threading.Event(), threading.Event()

    def slow_encode(self: Tokenizer, text: str) -> list[int]:
        if len(text) > 5000:
            is_encoding.set()
            assert may_encode.wait(60)
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "encode", slow_encode)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(chaotic.client.request, "POST", "/tokenize", {"prompt": "The cat " * 2000})
        assert is_encoding.wait(60)
        assert chaotic.client.request("GET", "/health")[0] == 200
        assert not long.done()
        may_encode.set()
        assert long.result()[1]["count"] > 2000
    engine_of(chaotic).close_gate()
    sock = chaotic.client.send(prompt="The cat")
    wait_until(lambda: engine_of(chaotic).is_waiting)
    assert chaotic.client.request("GET", "/health")[:2] == (200, {"status": "ok", "slots": 2, "busy": 1, "queued": 0})
    monkeypatch.setattr(scheduler_module, "STUCK_SECONDS", 0.0)
    status, body, _ = chaotic.client.request("GET", "/health")
    assert (status, body["status"]) == (503, "the engine does not respond")
    sock.close()


def test_11_a_long_prompt_stops_nobody(serve_chaotic: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler_module, "PREFILL_TOKENS", 8)
    with serve_chaotic(n_ctx=128) as running:
        engine = engine_of(running)
        engine.close_gate()
        sock = running.client.send(prompt="a", max_tokens=120)
        engine.allow(3)
        wait_until(lambda: len(engine.calls) == 3 and engine.is_waiting)
        other = running.client.send(prompt=[[5] * 60], max_tokens=1)
        wait_until(lambda: len(running.scheduler.queue) == 1)
        engine.open_gate()
        wait_until(lambda: running.scheduler.n_busy == 0)
        during = engine.calls[3 : 3 + 17]
        # Pieces of at most 8 ids, and between two of them a step of the first stream.
        assert [name for name, _ in during[1:16]] == ["extend", "step"] * 7 + ["extend"]
        assert [size for name, size in during if name == "extend"] == [8] * 7 + [4]
        sock.close()
        other.close()


def test_12_echoed_log_probabilities_are_those_of_score(serve_model: Serve, model_folder: Path) -> None:
    text = "Once upon a time there was a little dog named Max. He loved to play."
    storyteller = Storyteller.load(model_folder, EngineConfig(engine="cpu", precision="fp32", threads=1))
    expected = [score.logprob for score in storyteller.score(text)][:-1]
    ids = [storyteller.tokenizer.end_id, *storyteller.tokenizer.encode(text)]
    with serve_model(precision="fp32") as running:
        by_text = running.client.complete(prompt=text, echo=True, max_tokens=0, logprobs=1)["logprobs"]
        by_ids = running.client.complete(prompt=ids, echo=True, max_tokens=1, logprobs=1, temperature=0)["logprobs"]
    np.testing.assert_allclose(by_text["token_logprobs"], expected, rtol=1e-4)
    assert by_ids["token_logprobs"][0] is None
    assert by_ids["top_logprobs"][0] is None
    assert by_ids["token_logprobs"][1:-1] == by_text["token_logprobs"]
    assert len(by_ids["tokens"]) == len(ids) + 1
    for logprob, top in zip(by_text["token_logprobs"], by_text["top_logprobs"], strict=True):
        assert logprob in top.values()  # the same number, bit for bit
        assert len(top) <= 2
        assert logprob <= max(top.values())


def test_12_log_probabilities_near_0_are_those_of_score(serve_model: Serve, certain_folder: Path) -> None:
    """Of a token that is nearly certain: the sum of all others, which fp32 loses beside it."""
    storyteller = Storyteller.load(certain_folder, EngineConfig(engine="cpu", precision="fp32", threads=1))
    story = storyteller.generate("Once", temperature=0, repetition_penalty=1.0, max_tokens=60, ignore_end=True)
    ids = [storyteller.tokenizer.end_id, *storyteller.tokenizer.encode("Once"), *story.ids]
    (scores,) = storyteller.engine.logprobs([ids])
    logits = np.array(storyteller.engine.extend(0, ids[:-1], start=0, all_logits=True), dtype=np.float64)
    exact = logits[np.arange(len(ids) - 1), ids[1:]] - np.logaddexp.reduce(logits, axis=1)
    near_0 = (exact > -1e-4) & (exact < -1e-8)
    assert near_0.sum() >= 3, "the model must be nearly certain of some tokens"
    with serve_model(precision="fp32", folder=certain_folder) as running:
        choice = running.client.complete(prompt=ids, echo=True, max_tokens=0, logprobs=1)
    np.testing.assert_allclose(scores, exact, rtol=1e-4, atol=1e-14)
    np.testing.assert_allclose(choice["logprobs"]["token_logprobs"][1:], scores, rtol=1e-4, atol=1e-14)


@pytest.mark.parametrize("form", ["text", "ids"])
@pytest.mark.parametrize("max_tokens", [0, 1, 30])
def test_13_the_texts_of_tokens_join_to_the_text(
    serve_script: Serve, tokenizer: Tokenizer, form: str, max_tokens: int
) -> None:
    prompt = "The naïve 🐈 sat"
    with serve_script(HELLO) as running:
        fields: dict[str, object] = {"echo": True, "logprobs": 2, "max_tokens": max_tokens, "seed": 1}
        fields["prompt"] = prompt if form == "text" else [tokenizer.end_id, *tokenizer.encode(prompt)]
        whole = running.client.complete(**fields)
        chunks = running.client.stream(**fields)
    streamed: dict[str, list[Any]] = {}
    for chunk in chunks:
        for name, values in chunk["choices"][0]["logprobs"].items():
            streamed.setdefault(name, []).extend(values)
    assert streamed == whole["logprobs"]
    for choice in (whole, {"text": text_of(chunks), "logprobs": streamed}):
        tokens = choice["logprobs"]["tokens"]
        assert "".join(tokens) == choice["text"]
        assert choice["logprobs"]["text_offset"] == [len("".join(tokens[:i])) for i in range(len(tokens))]
        assert len({len(values) for values in choice["logprobs"].values()}) == 1
    assert whole["text"].startswith(prompt)
    n_prompt = len(tokenizer.encode(prompt)) + (form == "ids")
    n_said = min(max_tokens, len(tokenizer.encode(HELLO)) + 1)
    assert len(whole["logprobs"]["tokens"]) == n_prompt + n_said


def test_14_log_probabilities_are_those_of_the_raw_distribution(chaotic: Running) -> None:
    fields: dict[str, object] = {"prompt": "The cat sat", "echo": True, "logprobs": 5, "max_tokens": 1, "seed": 2}
    settings: list[dict[str, object]] = [
        {},
        {"temperature": 0.1, "top_k": 1, "repetition_penalty": 2},
        {"top_p": 0.01, "min_p": 1, "presence_penalty": 2},
        {"logit_bias": {"3": 100}},
    ]
    answers = [chaotic.client.complete(**fields | one)["logprobs"] for one in settings]
    for answer in answers:
        assert answer["token_logprobs"][:-1] == answers[0]["token_logprobs"][:-1]
        top = answer["top_logprobs"][-1]
        assert set(answers[0]["top_logprobs"][-1].values()) & set(top.values())
        assert sum(np.exp(list(top.values()))) < 0.5  # no filter has made one of 300 tokens certain


@pytest.mark.parametrize("bad", [-np.inf, np.nan], ids=["minus infinity", "not a number"])
def test_15_infinities_and_nan_do_not_reach_json(tokenizer: Tokenizer, bad: float) -> None:
    def rule(ids: list[int]) -> np.ndarray:
        logits = np.full(tokenizer.vocab_size, -np.inf if bad == -np.inf else 0, dtype=np.float32)
        logits[50 + len(ids) % 7] = 1
        if bad != -np.inf and 99 in ids:
            logits[60] = bad
        return logits

    engine = GatedEngine(rule, tokenizer.vocab_size)
    with serving(engine, describe(tokenizer, engine)) as running:
        choice = running.client.complete(prompt=[50, 51, 70], max_tokens=2, echo=True, logprobs=5)
        if bad == -np.inf:
            assert choice["logprobs"]["token_logprobs"] == [None, 0.0, None, 0.0, 0.0]
            assert [top and len(top) for top in choice["logprobs"]["top_logprobs"]] == [None, 1, 1, 1, 1]
            return
        for fields in ({}, {"logprobs": 1}, {"echo": True, "logprobs": 1}, {"temperature": 0}):
            status, error = running.client.refuse(prompt=[50, 99], max_tokens=2, **fields)
            assert (status, "not finite" in error["message"]) == (500, True)
        assert running.client.complete(prompt=[50], max_tokens=2)["finish_reason"] == "length"


def test_16_finish_reasons_are_openais(serve_script: Serve) -> None:
    with serve_script("The cat sat.") as running:
        for fields, reason in [
            ({}, "stop"),
            ({"stop": "sat"}, "stop"),
            ({"max_tokens": 2}, "length"),
            ({"ignore_eos": True, "max_tokens": 30}, "length"),
            ({"echo": True, "max_tokens": 0}, "length"),
        ]:
            assert running.client.complete(prompt="a", **fields)["finish_reason"] == reason
            chunks = running.client.stream(prompt="a", **fields)
            reasons = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
            assert reasons == [None] * (len(reasons) - 1) + [reason]
        assert min(running.client.complete(prompt="a", logprobs=1)["logprobs"]["text_offset"]) == 0


def test_17_characters_of_several_tokens_arrive_whole(serve_script: Serve, tokenizer: Tokenizer) -> None:
    with serve_script(HELLO) as running:
        for max_tokens in range(1, len(tokenizer.encode(HELLO)) + 2):
            whole = running.client.complete(prompt="a", max_tokens=max_tokens)["text"]
            pieces = [c["choices"][0]["text"] for c in running.client.stream(prompt="a", max_tokens=max_tokens)]
            assert "".join(pieces) == whole
            assert HELLO.startswith(whole.rstrip("\N{REPLACEMENT CHARACTER}"))
            assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[:-1])
        assert whole == HELLO
        for body in (b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xed\xa0\x80"}', b'{"prompt": "\\ud800"}'):
            assert running.client.request("POST", "/v1/completions", body)[0] == 400


@pytest.mark.parametrize("stop", ["cat", " cat sat", "t on a m", ["mat.", "sat on"], "🐈", "at", ["zzz", "T"]], ids=str)
def test_18_stop_strings_never_leak(serve_script: Serve, stop: str | list[str]) -> None:
    said = "The cat sat on a mat. 🐈 sat too."
    stops = [stop] if isinstance(stop, str) else stop
    expected = said[: min(said.find(one) for one in stops if one in said)]
    with serve_script(said) as running:
        for logprobs in (None, 1):
            whole = running.client.complete(prompt="a", stop=stop, logprobs=logprobs)
            pieces = running.client.stream(prompt="a", stop=stop, logprobs=logprobs)
            assert whole["text"] == text_of(pieces) == expected
            assert whole["finish_reason"] == pieces[-1]["choices"][0]["finish_reason"] == "stop"
            if logprobs:
                assert "".join(whole["logprobs"]["tokens"]) == expected


def test_19_usage_comes_in_a_chunk_of_its_own(serve_script: Serve, tokenizer: Tokenizer) -> None:
    n_said = len(tokenizer.encode(HELLO)) + 1
    usage = {"prompt_tokens": 2, "completion_tokens": 2 * n_said, "total_tokens": 2 + 2 * n_said}
    with serve_script(HELLO) as running:
        assert running.client.ask(prompt="a", n=2)["usage"] == usage
        plain = running.client.stream(prompt="a", n=2)
        assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in plain)
        chunks = running.client.stream(prompt="a", n=2, stream_options={"include_usage": True})
        assert [chunk["usage"] for chunk in chunks] == [None] * (len(chunks) - 1) + [usage]
        assert [bool(chunk["choices"]) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
        assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
        options = {"include_usage": True, "continuous_usage_stats": True}
        counts = [
            c["usage"]["completion_tokens"] for c in running.client.stream(prompt="a", n=2, stream_options=options)
        ]
        assert counts == sorted(counts)
        assert counts[-1] == 2 * n_said


def test_20_a_seeded_story_is_the_same_alone_among_others_and_on_the_command_line(
    serve_model: Serve, model_folder: Path
) -> None:
    fields = {"prompt": "Once upon a time", "seed": 11, "max_tokens": 120}  # longer than the context of 96
    storyteller = Storyteller.load(model_folder, EngineConfig(engine="cpu", threads=1))
    options = {"temperature": 1.5, "seed": 11, "max_tokens": 120}
    stories = storyteller.generate("Once upon a time", num=3, **options)  # type: ignore[call-overload]
    with serve_model(n_slots=6, n_queued=100) as running, ThreadPoolExecutor(16) as pool:
        client = running.client
        assert client.complete(**fields)["text"] == stories[0].continuation
        assert [c["text"] for c in client.ask(**fields, n=3)["choices"]] == [s.continuation for s in stories]
        others = [
            pool.submit(client.complete, prompt="The dog " * (i % 9), seed=i, max_tokens=100, logprobs=i % 3)
            for i in range(15)
        ]
        wait_until(lambda: running.scheduler.n_open > 3)
        assert client.complete(**fields)["text"] == stories[0].continuation
        assert text_of(client.stream(**fields)) == stories[0].continuation
        together = [other.result()["text"] for other in others]
        again = [client.complete(prompt="The dog " * (i % 9), seed=i, max_tokens=100)["text"] for i in (0, 7, 14)]
        assert again == [together[i] for i in (0, 7, 14)]
        unseeded = client.ask(prompt=["Once"] * 3, n=2, max_tokens=20)["choices"]
        assert len({choice["text"] for choice in unseeded}) == 6


def test_21_what_is_asked_is_done_or_refused(chaotic: Running, tokenizer: Tokenizer) -> None:
    the = tokenizer.encode("The")[0]
    forced = chaotic.client.complete(prompt="a", max_tokens=3, logit_bias={str(the): 100})
    assert forced["text"] == "TheTheThe"
    # Of two tokens that are always likely, a penalty of 2 for each use takes them in turns.
    bias = {str(the): 100, str(the + 1): 99.5}
    penalized = chaotic.client.complete(prompt="a", max_tokens=6, temperature=0, logit_bias=bias, frequency_penalty=2)
    assert penalized["text"].count("The") == 3
    for field, value in [
        ("suffix", "the end"),
        ("response_format", {"type": "json_object"}),
        ("min_tokens", 5),
        ("stop_token_ids", [3]),
        ("prompt_logprobs", 1),
        ("grammar", "root ::= x"),
        ("use_beam_search", True),
        ("temprature", 0.5),
    ]:
        status, error = chaotic.client.refuse(prompt="a", **{field: value})
        assert (status, error["param"]) == (400, field)
        assert field in error["message"]
    neutral = {"suffix": None, "min_tokens": 0, "typical_p": 1.0, "user": "x", "something_else": 1}
    assert chaotic.client.complete(prompt="a", max_tokens=1, **neutral)["finish_reason"] == "length"


ALL_PATHS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/test-model"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/nothing/here"),
    ("GET", "/health/"),
    ("GET", "//health"),
    ("GET", "/HEALTH"),
]


def test_22_the_key_guards_everything_but_health(serve_chaotic: Serve) -> None:
    with serve_chaotic(keys=("a-long-secret", "another-secret")) as running:
        stranger = Client(running.port)
        for method, path in ALL_PATHS:
            for headers in ({}, {"Authorization": "Bearer a-long-secre"}, {"Authorization": "Basic a-long-secret"}):
                status, answer, answer_headers = stranger.request(method, path, {}, headers)
                assert (status, answer["error"]["type"]) == (401, "authentication_error"), path
                assert answer_headers["www-authenticate"] == "Bearer"
            assert running.client.request(method, path, {})[0] != 401
        assert stranger.request("GET", "/health")[0] == stranger.request("GET", "/healthz")[0] == 200
        assert stranger.request("GET", "/v1/models", headers={"Authorization": "bearer another-secret"})[0] == 200


def test_22_another_host_needs_a_key() -> None:
    assert ServerConfig().host == "127.0.0.1"
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(UserError, match="--api-key-file FILE or TINYSTORIES_API_KEY"):
            ServerConfig(host=host)
        assert ServerConfig(host=host, no_key=True).keys == ()
        assert ServerConfig(host=host, keys=("long enough".replace(" ", "-"),)).host == host


def test_23_web_pages_cannot_use_the_server(serve_chaotic: Serve) -> None:
    with serve_chaotic(allow_origins=("https://good.example",), allow_hosts=("stories.example",)) as running:
        client, port = running.client, running.port

        def status(**headers: str) -> int:
            return client.request("GET", "/v1/models", headers={k.replace("_", "-"): v for k, v in headers.items()})[0]

        assert [status(Host=h) for h in ("localhost", f"127.0.0.1:{port}", "[::1]:80", "Stories.Example:443")] == [
            200
        ] * 4
        assert [status(Host=h) for h in ("evil.example", "127.0.0.1.evil.example", "", "1.2.3.4")] == [403] * 4
        own = f"http://127.0.0.1:{port}"
        assert [status(Origin=o) for o in ("https://good.example", own)] == [200, 200]
        bad = ("https://evil.example", "null", "http://good.example", "https://good.example.evil.example", own + "0")
        assert [status(Origin=o) for o in bad] == [403] * 5
        headers = client.request("GET", "/health", headers={"Origin": "https://good.example"})[2]
        assert headers["access-control-allow-origin"] == "https://good.example"
        assert "access-control-allow-origin" not in client.request("GET", "/health")[2]
        # What a form of any page can send without asking.
        for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
            body = json.dumps({"prompt": "a"}).encode()
            assert client.request("POST", "/v1/completions", body, {"Content-Type": content_type})[0] == 415


def test_24_preflight_requests_may_ask_for_authorization(serve_chaotic: Serve) -> None:
    with serve_chaotic(allow_origins=("https://good.example",), keys=("a-long-secret",)) as running:
        asked = {
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization, content-type, x-stainless-os",
        }
        stranger = Client(running.port)
        good = asked | {"Origin": "https://good.example"}
        status, _, headers = stranger.request("OPTIONS", "/v1/completions", None, good)
        assert status == 204
        assert headers["access-control-allow-origin"] == "https://good.example"
        assert headers["access-control-allow-headers"] == "authorization, content-type, x-stainless-os"
        assert "POST" in headers["access-control-allow-methods"]
        evil = asked | {"Origin": "https://evil.example"}
        status, _, headers = stranger.request("OPTIONS", "/v1/completions", None, evil)
        assert (status, "access-control-allow-origin" in headers) == (403, False)
        # Errors can be read by the page, too.
        status, _, headers = stranger.request("POST", "/v1/completions", {}, {"Origin": "https://good.example"})
        assert (status, headers["access-control-allow-origin"]) == (401, "https://good.example")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, 33, 10**9, 1.5, "2", True]),
        ("best_of", [0, 33]),
        ("max_tokens", [-1, 32769, 10**30, 0]),
        ("logprobs", [-1, 21, 300]),
        ("top_k", [-2, 2**31, 2**80]),
        ("temperature", [-0.1, 101, 1e300, "hot"]),
        ("top_p", [0, 1.1]),
        ("min_p", [-1, 2]),
        ("repetition_penalty", [0, -1, 1e9]),
        ("presence_penalty", [3]),
        ("frequency_penalty", [-2.1]),
        ("seed", [-1, 2**63]),
        ("logit_bias", [{"300": 1}, {"x": 1}, {"5": 101}, {"-1": 1}, {str(i): 1 for i in range(1025)}, [1]]),
        ("stop", ["", [""], ["a"] * 17, "a" * 257, 5]),
        ("prompt", ["cat " * 100, [[5] * 65], ["a"] * 257, 5, {"a": 1}, [None]]),
        ("stream_options", [5, {"include_usage": 1}, {"include_usage": True}]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_25_every_number_is_bounded_before_work_begins(chaotic: Running, field: str, values: list[object]) -> None:
    for value in values:
        status, error = chaotic.client.refuse(**{"prompt": "a", field: value})
        assert status == 400
        assert (error["param"] or "").partition("[")[0].partition(".")[0] == field, (value, error)
    assert not engine_of(chaotic).calls


def test_25_no_request_is_larger_than_the_server(serve_chaotic: Serve) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serve_chaotic(receive_timeout_s=0.05) as running, running.client.connect() as sock:
        sock.sendall(head + b"Content-Length: 100\r\n\r\n{")  # a body that does not come
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
    with serve_chaotic(max_body_bytes=20_000, n_queued=300) as running:
        client = running.client
        status, error = client.refuse(prompt="a", n=32, max_tokens=32_768)
        assert (status, "may cost 1,048,6" in error["message"]) == (400, True)
        assert client.refuse(prompt="a" * 20_000)[0] == 413
        for body in (b"[" * 15_000, b'{"prompt":' * 1500, b"[1]", b"5", b"null", b'"a"', b"", b"{", b'{"n": NaN}'):
            status, answer, _ = client.request("POST", "/v1/completions", body)
            assert (status, answer["error"]["type"]) == (400, "invalid_request_error"), body[:20]
        with client.connect() as sock, contextlib.suppress(OSError):  # a flood of headers
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + b"X-A: b\r\n" * 100_000)
            assert b" 200 " not in sock.recv(100)
        with client.connect() as sock:  # a body without an announced size that does not end
            sock.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
            with contextlib.suppress(OSError):
                for _ in range(100):
                    sock.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
            answer = b""
            with contextlib.suppress(OSError):
                answer = sock.recv(100)
            assert answer.startswith(b"HTTP/1.1 413 ") or not answer
        assert not engine_of(running).calls
        assert client.request("GET", "/health")[0] == 200


def test_26_all_four_forms_of_prompts(chaotic: Running, tokenizer: Tokenizer) -> None:
    texts = ["The cat", "a dog"]
    ids = [[tokenizer.end_id, *tokenizer.encode(text)] for text in texts]
    fields: dict[str, object] = {"seed": 4, "max_tokens": 9}

    def texts_of(prompt: object) -> list[str]:
        choices = chaotic.client.ask(prompt=prompt, **fields)["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        return [choice["text"] for choice in choices]

    first, second = texts_of(texts)
    assert first != second
    assert texts_of(texts[0]) == texts_of(ids[0]) == texts_of([ids[0]]) == [first]
    assert texts_of(ids) == [first, second]
    assert texts_of(None) == texts_of("") == texts_of([tokenizer.end_id])
    for bad in ([300], [-1], [2**40], [1.5], [True], [[]], [], [1, "a"], [[1], ["a"]]):
        status, error = chaotic.client.refuse(prompt=bad, **fields)
        assert (status, error["param"]) == (400, "prompt"), bad
    assert chaotic.client.request("GET", "/health")[0] == 200


def test_27_a_shutdown_lets_streams_finish_then_tells_the_rest(serve_chaotic: Serve) -> None:
    with serve_chaotic(n_slots=2, drain_s=0.05) as running:
        engine = engine_of(running)
        engine.close_gate()
        with running.client.open_stream(prompt="The cat", **LONG) as stream:
            running.signal()
            wait_until(lambda: running.service.is_draining)
            engine.allow(1)
            events = list(stream.events())
        assert events[-1]["error"]["code"] == "shutting_down"
        assert not stream.is_done
        engine.open_gate()
        running.thread.join(60)
        assert not running.thread.is_alive()
        assert running.server.exit_code == 130
        assert running.endings() == {"shutdown": 1}


def test_27_during_a_shutdown_new_requests_are_refused_and_running_ones_end_well(serve_chaotic: Serve) -> None:
    with serve_chaotic(drain_s=600) as running:
        engine = engine_of(running)
        engine.close_gate()
        with running.client.open_stream(prompt="The cat", max_tokens=3) as stream:
            running.signal()
            wait_until(lambda: running.service.is_draining)
            assert running.client.request("GET", "/health")[0] == 503
            status, _, headers = running.client.request("POST", "/v1/completions", {"prompt": "a"})
            assert (status, "retry-after" in headers) == (503, True)
            engine.open_gate()
            assert list(stream.events())[-1]["choices"][0]["finish_reason"] == "length"
        running.thread.join(60)
        assert not running.thread.is_alive()


def test_27_a_second_signal_ends_at_once(serve_chaotic: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with serve_chaotic(drain_s=600) as running:
        engine_of(running).close_gate()
        with running.client.open_stream(prompt="The cat", **LONG) as stream:
            running.signal()
            running.signal()
            assert [event["error"]["code"] for event in stream.events()] == ["shutting_down"]
        running.thread.join(60)
        assert not running.thread.is_alive()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]

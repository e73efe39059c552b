"""A server over real sockets in this process, an engine whose steps a test allows one by one, and an HTTP client."""

import asyncio
import contextlib
import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.protocol import Engine, Ids
from tinystories.serve.model import ServedModel
from tinystories.serve.server import Server, bind, build_server
from tinystories.serve.service import Service
from tinystories.serve.settings import ServerConfig

PATIENCE_S = 60.0  # only for tests that fail


def wait_until(condition: Callable[[], object]) -> None:
    """Return once the condition holds."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition has not come true"
        time.sleep(0.002)


class GatedEngine:
    """Logits that depend on the content of a slot only. Closed, it stops before each call until `allow`."""

    def __init__(
        self, rule: Callable[[list[int]], np.ndarray], vocab_size: int, *, n_ctx: int = 64, n_slots: int = 2
    ) -> None:
        self.config = ModelConfig(vocab_size=vocab_size, n_ctx=n_ctx)
        self.n_slots, self.rule = n_slots, rule
        self.content: dict[int, list[int]] = {}
        self.calls: list[tuple[str, int]] = []  # (extend, ids) and (step, slots)
        self.is_closed = False
        self.is_waiting = False
        self.permits = threading.Semaphore(0)
        self.error: Exception | None = None

    def close_gate(self) -> None:
        self.is_closed = True

    def allow(self, n_calls: int = 1) -> None:
        for _ in range(n_calls):
            self.permits.release()

    def open_gate(self) -> None:
        self.is_closed = False
        self.permits.release()

    def _begin(self, name: str, size: int) -> None:
        if self.is_closed:
            self.is_waiting = True
            self.permits.acquire()
            self.is_waiting = False
        self.calls.append((name, size))
        if self.error is not None:
            raise self.error

    def prefill(self, slot: int, ids: Ids) -> np.ndarray:
        return self.extend(slot, ids, start=0)

    def extend(self, slot: int, ids: Ids, *, start: int | None = None, all_logits: bool = False) -> np.ndarray:
        self._begin("extend", len(ids))
        held = self.content.get(slot, [])
        first = len(held) if start is None else start
        assert 0 <= first <= len(held)
        assert 1 <= len(ids) <= self.config.n_ctx - first
        content = self.content[slot] = [*held[:first], *map(int, ids)]
        if not all_logits:
            return self.rule(content)
        return np.stack([self.rule(content[: i + 1]) for i in range(first, len(content))])

    def step(self, slots: Sequence[int], ids: Ids) -> np.ndarray:
        self._begin("step", len(slots))
        assert len(set(slots)) == len(slots) == len(ids) > 0
        for slot, token in zip(slots, ids, strict=True):
            assert 0 < len(self.content[slot]) < self.config.n_ctx
            self.content[slot].append(int(token))
        return np.stack([self.rule(self.content[slot]) for slot in slots])

    def free(self, slot: int) -> None:
        self.content.pop(slot, None)

    def logprobs(self, sequences: Sequence[Ids]) -> list[np.ndarray]:
        raise NotImplementedError


class Client:
    """An HTTP client of one server, with a connection for each request."""

    def __init__(self, port: int, key: str | None = None) -> None:
        self.port = port
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def request(
        self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Return status, body (parsed if it is JSON) and headers, whose names are in lower case."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)) as connection:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, data, self.headers | (headers or {}))
            response = connection.getresponse()
            raw = response.read()
            answer_headers = {name.lower(): value for name, value in response.getheaders()}
            is_json = answer_headers.get("content-type", "").startswith("application/json")
            return response.status, json.loads(raw) if is_json else raw, answer_headers

    def complete(self, **fields: object) -> dict[str, Any]:
        """Return the only choice of a completion that must succeed."""
        answer = self.ask(**fields)
        assert len(answer["choices"]) == 1
        return answer["choices"][0]

    def ask(self, **fields: object) -> dict[str, Any]:
        """Return the answer of a completion that must succeed."""
        status, answer, _ = self.request("POST", "/v1/completions", fields)
        assert status == 200, answer
        return answer

    def refuse(self, **fields: object) -> tuple[int, dict[str, Any]]:
        """Return status and error of a completion that must fail."""
        status, answer, _ = self.request("POST", "/v1/completions", fields)
        assert status >= 400, answer
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]

    @contextlib.contextmanager
    def open_stream(self, path: str = "/v1/completions", **fields: object) -> Iterator["Stream"]:
        """Start a request with stream: true."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", path, json.dumps({"stream": True} | fields).encode(), self.headers)
            sock = connection.sock
            response = connection.getresponse()
            assert response.status == 200, response.read()
            yield Stream(response, sock)
        finally:
            connection.close()

    def stream(self, **fields: object) -> list[dict[str, Any]]:
        """Return the chunks of a stream that must be whole."""
        with self.open_stream(**fields) as stream:
            chunks = list(stream.events())
        assert stream.is_done
        return chunks

    def connect(self) -> socket.socket:
        """Return a bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)

    def send(self, **fields: object) -> socket.socket:
        """Send a completion without waiting for its answer; closing the socket is leaving."""
        body = json.dumps(fields).encode()
        sock = self.connect()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        sock.sendall((head + "Content-Type: application/json\r\n\r\n").encode() + body)
        return sock


class Stream:
    """The events of an open stream."""

    def __init__(self, response: http.client.HTTPResponse, sock: socket.socket) -> None:
        self.response, self.sock = response, sock
        self.is_done = False  # [DONE] has been read

    def events(self) -> Iterator[dict[str, Any]]:
        while line := self.response.readline():
            if line.startswith(b"data: [DONE]"):
                self.is_done = True
            elif line.startswith(b"data: "):
                yield json.loads(line.removeprefix(b"data: "))
            else:
                assert line == b"\n" or line.startswith(b":"), line


class Running:
    """A server that runs in a thread."""

    def __init__(self, engine: Engine, model: ServedModel, config: ServerConfig) -> None:
        self.engine, self.config = engine, config
        self.service = Service(engine, model, config)
        self.scheduler = self.service.scheduler
        self.server: Server = build_server(self.service)
        self.listener = bind(config)
        self.port: int = self.listener.getsockname()[1]
        self.client = Client(self.port, config.keys[0] if config.keys else None)
        self.thread = threading.Thread(target=lambda: asyncio.run(self.server.serve([self.listener])))

    def start(self) -> None:
        self.thread.start()
        wait_until(lambda: self.server.started)

    def signal(self) -> None:
        """Do what a first or second Ctrl-C does."""
        assert self.server.loop is not None
        self.server.loop.call_soon_threadsafe(self.server.handle_exit, 2, None)

    def stop(self) -> None:
        if isinstance(self.engine, GatedEngine):
            self.engine.open_gate()
        if self.thread.is_alive():
            self.signal()
            self.signal()
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.service.close()
        self.listener.close()

    def endings(self) -> dict[str, float]:
        """How many sequences have ended, by reason."""
        samples = next(iter(self.service.metrics.endings.collect())).samples
        return {s.labels["reason"]: s.value for s in samples if s.name.endswith("_total") and s.value}


Serve = Callable[..., contextlib.AbstractContextManager[Running]]


def post(running: Running, path: str, **fields: object) -> Any:
    """Return the answer to a request that succeeds."""
    status, answer, _ = running.client.request("POST", path, fields)
    assert status == 200, answer
    return answer


def post_to_lab(running: Running, name: str, **fields: object) -> Any:
    """Return the answer of an endpoint of the lab."""
    return post(running, f"/lab/api/{name}", **fields)


@contextlib.contextmanager
def serving(engine: Engine, model: ServedModel, **settings: Any) -> Iterator[Running]:
    """Run a server on a free port inside the block."""
    running = Running(engine, model, ServerConfig(**({"port": 0} | settings)))
    running.start()
    try:
        yield running
    finally:
        running.stop()


def describe(tokenizer: Tokenizer, engine: Engine, sampling: SamplingConfig | None = None) -> ServedModel:
    """A served model without files."""
    return ServedModel(
        name="test-model",
        tokenizer=tokenizer,
        sampling=sampling or SamplingConfig(temperature=1, min_p=0),
        n_ctx=engine.config.n_ctx,
        vocab_size=engine.config.vocab_size,
        fingerprint="fp_test",
        meta={},
    )


def wait_for_script(page: Any, expression: str, arg: object = None) -> None:
    """Wait until JavaScript is true. Playwright's own wait evaluates text in the page, which its policy forbids."""
    deadline = time.monotonic() + PATIENCE_S
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, expression
        page.wait_for_timeout(20)


class Watch:
    """What a page has asked for, and what it complains of."""

    def __init__(self, page: Any) -> None:
        self.origins: set[str] = set()
        self.errors: list[str] = []
        page.on("request", lambda request: self.origins.add("{0.scheme}://{0.netloc}".format(urlsplit(request.url))))
        page.on("console", lambda message: message.type in ("error", "warning") and self.errors.append(message.text))
        page.on("pageerror", lambda error: self.errors.append(str(error)))

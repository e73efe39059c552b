"""A server in a process of its own, and many clients in one event loop: patient, slow, impatient ones.

The clients read raw bytes and parse them at the end, so that they cost little beside the server. `stream_all`, which
measures how fast a server is, costs least: bare sockets that wake this process only for BATCH_BYTES or for the end.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import re
import selectors
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from tinystories.errors import UserError

START_SECONDS = 300.0  # a busy machine that compiles the CPU engine for the first time
READ_BYTES = 65_536
BATCH_BYTES = 16_384  # a socket of `stream_all` is read when it holds this much, or has ended
SLOW_BYTES, SLOW_PAUSE = 512, 0.05  # what a slow client reads at once, and how long it waits then
SLOW_BUFFER = 4096
MAX_TRIES = 100
RETRY_AFTER = re.compile(rb"\r\nretry-after: (\d+)\r\n", re.IGNORECASE)
Fields = dict[str, Any]


class RefusedError(UserError):
    """A client has given up after MAX_TRIES refusals."""


@dataclasses.dataclass
class Reply:
    """An answer as it came in. Times are of `time.perf_counter`."""

    status: int
    head: bytes
    body: bytes
    sent_at: float
    first_at: float | None  # the first event, or the first byte of a body without events
    ended_at: float
    n_tries: int = 1

    @property
    def events(self) -> list[dict[str, Any]]:
        """The objects of a stream."""
        lines = re.findall(rb"^data: (\{.*)$", self.body, re.MULTILINE)
        return [json.loads(line) for line in lines]

    @property
    def is_whole(self) -> bool:
        """Whether the stream has come to its proper end."""
        return self.status == 200 and b"data: [DONE]" in self.body and self.finish_reason is not None

    @property
    def finish_reason(self) -> str | None:
        """Why the story of a stream ended."""
        reasons = [choice["finish_reason"] for event in self.events for choice in event.get("choices", [])]
        return next((reason for reason in reversed(reasons) if reason), None)

    @property
    def text(self) -> str:
        """The text of a stream with one choice."""
        return "".join(choice["text"] for event in self.events for choice in event.get("choices", []))

    @property
    def n_tokens(self) -> int:
        """The generated tokens; the request must have asked for the usage."""
        return int(next(event["usage"]["completion_tokens"] for event in reversed(self.events) if event.get("usage")))

    @property
    def retry_after(self) -> float:
        """How many seconds to wait before the next try."""
        match = RETRY_AFTER.search(self.head)
        if self.status != 429 or match is None:
            raise UserError(f"status {self.status} without Retry-After: {self.body[:200]!r}")
        return float(match[1])


def write_request(port: int, fields: Fields, path: str = "/v1/completions") -> bytes:
    """Return a request after whose answer the connection closes."""
    data = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def post(
    port: int, fields: Fields, *, path: str = "/v1/completions", leave_after: float | None = None, slowly: bool = False
) -> Reply | None:
    """Send a request and return the answer; None if the client has left after `leave_after` seconds."""
    sock = socket.socket()
    if slowly:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SLOW_BUFFER)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=sock, limit=SLOW_BUFFER if slowly else READ_BYTES)
    sent_at = time.perf_counter()
    writer.write(write_request(port, fields, path))
    try:
        async with asyncio.timeout(leave_after):
            head = await reader.readuntil(b"\r\n\r\n")
            first_at, parts = None, []
            while part := await reader.read(SLOW_BYTES if slowly else READ_BYTES):
                if first_at is None and not part.endswith(b": waiting\n\n\r\n"):
                    first_at = time.perf_counter()
                parts.append(part)
                if slowly:
                    await asyncio.sleep(SLOW_PAUSE)
    except TimeoutError:
        return None
    finally:
        writer.close()
    return Reply(int(head.split(b" ", 2)[1]), head, b"".join(parts), sent_at, first_at, time.perf_counter())


async def post_patiently(port: int, fields: Fields, **options: Any) -> Reply | None:
    """Send a request until it is accepted, after the pauses that the server asks for."""
    for n_tries in range(1, MAX_TRIES + 1):
        reply = await post(port, fields, **options)
        if reply is None or reply.status == 200:
            if reply is not None:
                reply.n_tries = n_tries
            return reply
        await asyncio.sleep(reply.retry_after)
    raise RefusedError(f"refused {MAX_TRIES} times")


def stream_all(port: int, requests: Sequence[Fields], n_streams: int) -> list[Reply]:
    """Send requests over `n_streams` connections at once; return the answers in the order of the requests.

    Works for whole answers too. The answers are neither parsed nor checked.
    """
    requests_bytes = [write_request(port, fields) for fields in requests]
    waiting = iter(enumerate(requests_bytes))
    replies: dict[int, Reply] = {}
    with selectors.DefaultSelector() as selector:

        def begin() -> None:
            for index, data in waiting:
                sock = socket.create_connection(("127.0.0.1", port))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, BATCH_BYTES)
                sent_at = time.perf_counter()
                sock.sendall(data)
                sock.setblocking(False)
                selector.register(sock, selectors.EVENT_READ, (index, [], sent_at))
                return

        for _ in range(n_streams):
            begin()
        while selector.get_map():
            for key, _ in selector.select():
                sock, (index, parts, sent_at) = key.fileobj, key.data
                assert isinstance(sock, socket.socket), "what has been registered"
                if part := sock.recv(READ_BYTES):
                    parts.append(part)
                    continue
                selector.unregister(sock)
                sock.close()
                begin()
                head, _, body = b"".join(parts).partition(b"\r\n\r\n")
                status = int(head.split(b" ", 2)[1]) if head else 0
                replies[index] = Reply(status, head, body, sent_at, None, time.perf_counter())
    return [replies[index] for index in range(len(requests))]


def check_whole(replies: Sequence[Reply]) -> None:
    """Raise `UserError` unless all streams have come to their proper end."""
    for reply in replies:
        if not reply.is_whole:
            raise UserError(f"a stream is not whole: status {reply.status}, {reply.body[-200:]!r}")


@contextlib.asynccontextmanager
async def endless_streams(port: int, n_streams: int, fields: Fields) -> AsyncIterator[list["asyncio.Task[Any]"]]:
    """Keep `n_streams` clients reading inside the block; canceling one of the tasks is leaving."""

    async def loop(number: int) -> None:
        for seed in range(1_000_000 * number, 1_000_000 * (number + 1)):
            await post_patiently(port, fields | {"seed": seed})

    tasks = [asyncio.create_task(loop(number)) for number in range(n_streams)]
    try:
        yield tasks
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class ServerProcess:
    """A running server. `errors` is what it has written to stderr."""

    def __init__(self, process: "subprocess.Popen[str]", url: str, log: Path, seconds: float) -> None:
        self.process, self.url, self.log = process, url, log
        self.port = int(url.rpartition(":")[2])
        self.start_seconds = seconds

    @property
    def rss_mb(self) -> float:
        """The resident memory."""
        return float(psutil.Process(self.process.pid).memory_info().rss) / 1e6

    @property
    def cpu_seconds(self) -> float:
        """The processor time used so far."""
        times = psutil.Process(self.process.pid).cpu_times()
        return float(times.user + times.system)

    @property
    def errors(self) -> str:
        """What the server has written to stderr."""
        return self.log.read_text(errors="replace")

    def health(self) -> dict[str, Any]:
        """Return the answer of /health."""
        with urllib.request.urlopen(f"{self.url}/health", timeout=30) as answer:
            result: dict[str, Any] = json.load(answer)
            return result

    async def wait_for(self, condition: Callable[[dict[str, Any]], bool], seconds: float = 120) -> float:
        """Ask for the health until the condition holds; return how long that took."""
        started_at = time.perf_counter()
        while not condition(await asyncio.to_thread(self.health)):
            if time.perf_counter() - started_at > seconds:
                raise UserError(f"the server is not where it should be after {seconds:g} s: {self.health()}")
            await asyncio.sleep(0.001)
        return time.perf_counter() - started_at


@contextlib.contextmanager
def running(command: Sequence[str], *, port: int | None = None) -> Iterator[ServerProcess]:
    """Run a server inside the block: one that prints its URL, or another that listens on `port`."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        started_at = time.perf_counter()
        with log.open("w") as errors:
            out = subprocess.PIPE if port is None else errors
            process = subprocess.Popen(command, stdout=out, stderr=errors, text=True)
        try:
            if port is None:
                assert process.stdout is not None, "stdout is a pipe"
                url = process.stdout.readline().strip()
                if not url:
                    raise UserError(f"the server has not started: {log.read_text()[-500:]}")
            else:
                url = f"http://127.0.0.1:{port}"
                wait_for_health(url, process)
            yield ServerProcess(process, url, log, time.perf_counter() - started_at)
        finally:
            process.terminate()
            try:
                process.wait(timeout=30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            if process.stdout is not None:
                process.stdout.close()


def wait_for_health(url: str, process: "subprocess.Popen[str]") -> None:
    """Return once /health answers 200."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except (urllib.error.URLError, OSError):
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"{process.args!r} has not started") from None
            time.sleep(0.1)
        else:
            return


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def soak(server: ServerProcess, *, seconds: float, n_clients: int, seed: int = 0) -> dict[str, int]:
    """Let clients of all kinds come and go; return how many answers of each kind there were.

    A quarter leaves, some read slowly, some send batches, chats or nonsense; those that are refused try again.
    `UserError` if an answer is neither whole nor the error that is due.
    """
    counts: dict[str, int] = {}
    deadline = time.perf_counter() + seconds

    async def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        while time.perf_counter() < deadline:
            try:
                kind = await one_visit(server.port, rng)
            except RefusedError:  # several stories at once seldom find as many free places in a crowd
                kind = "given up"
            counts[kind] = counts.get(kind, 0) + 1

    await asyncio.gather(*[client(number) for number in range(n_clients)])
    return counts


async def one_visit(port: int, rng: random.Random) -> str:
    """Send one random request; return its kind. `UserError` if the answer is not what it should be."""
    fields: Fields = {"prompt": f"{rng.choice(NAMES)} went", "seed": rng.randrange(2**31), "stream": True}
    fields["max_tokens"] = rng.randint(1, 300)
    draw = rng.random()
    if draw < 0.05:
        reply = await post(port, fields | {"temperature": -1})
        kind, is_right = "wrong", reply is not None and reply.status == 400
    elif draw < 0.30:
        reply = await post_patiently(port, fields, leave_after=rng.uniform(0, 2))
        kind, is_right = ("left", True) if reply is None else ("whole", reply.is_whole)
    elif draw < 0.35:
        reply = await post_patiently(port, fields | {"logprobs": 5}, slowly=True)
        kind, is_right = "slow", reply is not None and reply.is_whole
    elif draw < 0.50:
        batch = {"prompt": ["Tom", "Lily"], "n": 2, "stream": False, "logprobs": 2, "echo": True}
        reply = await post_patiently(port, fields | batch)
        kind, is_right = "batch", reply is not None and len(json.loads(whole_body(reply))["choices"]) == 4
    elif draw < 0.60:
        chat = {"messages": [{"role": "user", "content": fields.pop("prompt")}], "stream": False}
        reply = await post_patiently(port, fields | chat, path="/v1/chat/completions")
        kind, is_right = (
            "chat",
            reply is not None and "content" in json.loads(whole_body(reply))["choices"][0]["message"],
        )
    else:
        reply = await post_patiently(port, fields)
        kind, is_right = "whole", reply is not None and reply.is_whole
    if not is_right:
        raise UserError(f"a wrong answer to a request of kind {kind}: {reply}")
    return kind if reply is None or reply.n_tries == 1 else f"{kind} after refusals"


def whole_body(reply: Reply) -> bytes:
    """Return the body of an answer that is no stream."""
    return reply.body


NAMES = ("Lily", "Tom", "The little fox", "A brave mouse", "Mia", "Ben", "The old bear", "Sara", "Max", "A tiny bird")

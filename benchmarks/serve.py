"""`tinystories serve` under load: throughput, times to the first token, cancellation, 200 clients, llama.cpp's server.

    python benchmarks/serve.py --rounds 5 --peer llama.cpp/build/bin/llama-server

The server runs in a process of its own with 16 slots, all clients in this one, both on the same cores.

* throughput: 64 stories over 16 streams, and as 16 whole answers at a time, against the same stories by the Python API
  with 16 slots, which is what `tinystories generate --num 64` does; they take turns, the texts must be equal. The
  processor time of each side is shown: that of the clients is not the server's, but takes its cores;
* first token: one client alone; one more than 16 that tell story after story;
* cancel: from closing a connection to the free slot, as /health says it;
* start: from the command to the first connection;
* load: clients of mixed lengths that all come at once; some leave, some read slowly, the others come again after
  Retry-After. Every story of those that stay must be the one that the Python API tells. A first load warms up, memory
  is compared around a second one;
* peer: llama.cpp's `llama-server -np 16 -cb` with a GGUF export of the same weights, with each number of threads, and
  ours take turns: 16 streams of equally many tokens, the same sampling. The number is both its `-t` and its `-tb`; a
  step of several streams uses the latter. Beside other work its threads spin, and two may take minutes for a round.

Prints the numbers beside the goals, then a JSON line. On a machine that does other work, only ratios mean something.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from http_load import (
    NAMES,
    Fields,
    Reply,
    ServerProcess,
    check_whole,
    endless_streams,
    free_port,
    post,
    post_patiently,
    running,
    stream_all,
)
from script import run_main

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.engine.engine_config import EngineConfig
from tinystories.errors import UserError
from tinystories.generate.batching import Request
from tinystories.generate.storyteller import Storyteller

N_STREAMS = 16
N_STORIES = 64
N_PROBES = 10
MAX_TOKENS = 400  # as `tinystories generate`
WHOLE = {"stream": False, "stream_options": None}  # instead of a stream
PEER_TOKENS = 200  # of a stream beside llama.cpp
LEAVING, SLOW = 0.20, 0.05  # shares of the clients
PARTS = ("throughput", "latency", "start", "load", "peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=BUNDLED_MODEL, help="model directory (default: the bundled one)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--peer", type=Path, help="llama.cpp's llama-server")
    parser.add_argument("--peer-threads", default="1,2", help="numbers of threads to try, comma-separated")
    parser.add_argument("--peer-precision", default="q8_0", help="of the GGUF export")
    parser.add_argument("--server-threads", type=int, help="of the server's engine (default: those of serve)")
    parser.add_argument("--parts", default=",".join(PARTS), help="which to measure, comma-separated")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        raise UserError(f"--parts: unknown part {', '.join(sorted(unknown))}; choose from {', '.join(PARTS)}")
    storyteller = Storyteller.load(options.model, EngineConfig(engine="cpu", n_slots=N_STREAMS))
    results: dict[str, Any] = {}
    with running(serve_command(options.model, options.server_threads)) as server:
        stream_all(server.port, story_requests(N_STREAMS, seed=0), N_STREAMS)  # warms up
        measurements: dict[str, Callable[[], dict[str, Any]]] = {
            "throughput": lambda: measure_throughput(server, storyteller, options.rounds),
            "latency": lambda: asyncio.run(measure_latency(server)),
            "start": lambda: {"start_s": measure_start(options.model, options.rounds)},
            "load": lambda: measure_load(server, storyteller, options.clients),
            "peer": lambda: {} if options.peer is None else measure_peer(server, options),
        }
        for part in parts:
            measured = measurements[part]()
            results |= measured
            print_table(measured)
        if "Traceback" in server.errors:
            raise UserError(f"the server has failed: {server.errors[-2000:]}")
    machine = {
        "server_threads": options.server_threads,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps({"benchmark": "serve", "model": options.model.name, "rounds": options.rounds} | machine | results))


def serve_command(model: Path, threads: int | None = None) -> list[str]:
    command = [sys.executable, "-m", "tinystories", "serve", str(model), "--port", "0", "--engine", "cpu"]
    command += ["--slots", str(N_STREAMS), "--log-level", "warning", "--model-name", "model"]
    return command if threads is None else [*command, "--threads", str(threads)]


def story_requests(n_stories: int, *, seed: int) -> list[Fields]:
    """Return requests for stories without a prompt, each with a seed of its own."""
    options = {"max_tokens": MAX_TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    return [{"prompt": "", "seed": 1000 * seed + number} | options for number in range(n_stories)]


def tell(storyteller: Storyteller, requests: list[Fields]) -> tuple[list[str], int]:
    """Return the stories of the same requests by the Python API, and their number of tokens."""
    texts, n_tokens = [""] * len(requests), 0
    stories = (
        Request(
            prompt=fields["prompt"], settings=storyteller.settings, max_tokens=fields["max_tokens"], seed=fields["seed"]
        )
        for fields in requests
    )
    with contextlib.closing(storyteller.events(stories)) as events:
        for index, item in events:
            if not isinstance(item, str):
                texts[index] = item.continuation
                n_tokens += len(item.ids)
    return texts, n_tokens


def measure_throughput(server: ServerProcess, storyteller: Storyteller, n_rounds: int) -> dict[str, Any]:
    """Return tokens per second of generate, of streams and of whole answers, and the medians of their ratios.

    The clients' processor time is part of what is measured: `client_us_per_token` says how much it is, beside
    `server_us_per_token` and `generate_us_per_token`.
    """
    rates: dict[str, list[float]] = {"generate": [], "serve": [], "whole": []}
    cpu: dict[str, list[float]] = {"generate": [], "server": [], "client": []}
    for seed in range(1, n_rounds + 1):
        requests = story_requests(N_STORIES, seed=seed)
        started_at, cpu_before = time.perf_counter(), time.process_time()
        texts, n_tokens = tell(storyteller, requests)
        rates["generate"].append(n_tokens / (time.perf_counter() - started_at))
        cpu["generate"].append((time.process_time() - cpu_before) / n_tokens)
        started_at, cpu_before, server_before = time.perf_counter(), time.process_time(), server.cpu_seconds
        replies = stream_all(server.port, requests, N_STREAMS)
        rates["serve"].append(n_tokens / (time.perf_counter() - started_at))
        cpu["client"].append((time.process_time() - cpu_before) / n_tokens)
        cpu["server"].append((server.cpu_seconds - server_before) / n_tokens)
        check_whole(replies)
        check_texts([reply.text for reply in replies], texts)
        if (n_served := sum(reply.n_tokens for reply in replies)) != n_tokens:
            raise UserError(f"the server counts {n_served} tokens, the Python API {n_tokens}")
        started_at = time.perf_counter()
        replies = stream_all(server.port, [fields | WHOLE for fields in requests], N_STREAMS)
        rates["whole"].append(n_tokens / (time.perf_counter() - started_at))
        check_texts([json.loads(reply.body)["choices"][0]["text"] for reply in replies], texts)
    return {
        **{f"{name}_tokens_per_s": statistics.median(values) for name, values in rates.items()},
        **{f"{name}_us_per_token": 1e6 * statistics.median(values) for name, values in cpu.items()},
        "serve_to_generate": median_ratio(rates["serve"], rates["generate"]),
        "whole_to_generate": median_ratio(rates["whole"], rates["generate"]),
    }


def median_ratio(numerators: list[float], denominators: list[float]) -> float:
    """Return the median of the ratios of interleaved runs."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def check_texts(served: list[str], texts: list[str]) -> None:
    """Raise `UserError` unless the server has told the same stories as the Python API."""
    n_different = sum(a != b for a, b in zip(served, texts, strict=True))
    if n_different:
        raise UserError(f"{n_different} of {len(texts)} stories differ from those of the Python API")


async def measure_latency(server: ServerProcess) -> dict[str, Any]:
    """Return medians of the time to the first token and of the time from leaving to a free slot."""

    async def time_to_first_token(number: int) -> float:
        prompt = f"{NAMES[number % len(NAMES)]} had {number} apples"
        reply = await post_patiently(server.port, {"prompt": prompt, "max_tokens": 8, "stream": True, "seed": number})
        assert reply is not None, "the client stays"
        assert reply.first_at is not None, "a story has text"
        return reply.first_at - reply.sent_at

    idle = [await time_to_first_token(number) for number in range(N_PROBES)]
    stories = {"prompt": "", "max_tokens": MAX_TOKENS, "stream": True}
    async with endless_streams(server.port, N_STREAMS, stories):
        await asyncio.sleep(2)  # so that the streams are at different places of their stories
        busy = [await time_to_first_token(N_PROBES + number) for number in range(N_PROBES)]
    await server.wait_for(lambda health: health["busy"] == 0)
    freed: list[float] = []
    endless = {"prompt": "", "max_tokens": 10_000, "ignore_eos": True, "stream": True}
    async with endless_streams(server.port, N_STREAMS, endless) as tasks:
        await server.wait_for(lambda health: health["busy"] == N_STREAMS)
        for n_left, task in zip(range(N_STREAMS - 1, 5, -1), tasks, strict=False):
            task.cancel()
            freed.append(await server.wait_for(lambda health, n=n_left: health["busy"] == n))
    await server.wait_for(lambda health: health["busy"] == 0)
    names = ("first_token_idle_s", "first_token_busy_s", "cancel_to_free_s")
    medians = {name: statistics.median(values) for name, values in zip(names, (idle, busy, freed), strict=True)}
    return medians | {"first_token_busy_worst_s": max(busy), "cancel_to_free_worst_s": max(freed)}


def measure_start(model: Path, n_rounds: int) -> float:
    """Return the median time from the command to the first connection."""
    seconds = []
    for _ in range(n_rounds):
        with running(serve_command(model)) as server:
            seconds.append(server.start_seconds)
    return statistics.median(seconds)


@dataclasses.dataclass
class Visitor:
    """A client of the load."""

    fields: Fields
    leave_after: float | None
    is_slow: bool
    reply: Reply | None = None


def make_visitors(n_clients: int, seed: int) -> list[Visitor]:
    """Return clients of mixed lengths; exactly the given shares leave, and read slowly."""
    rng = random.Random(seed)
    visitors = []
    for number in range(n_clients):
        place = number / n_clients
        fields: Fields = {"prompt": f"{rng.choice(NAMES)} saw", "seed": rng.randrange(2**31), "stream": True}
        fields |= {"max_tokens": rng.choice((20, 60, 120, 250)), "stream_options": {"include_usage": True}}
        is_slow = LEAVING <= place < LEAVING + SLOW
        if is_slow:
            fields["logprobs"] = 5  # more to read
        if place < LEAVING:
            fields |= {"max_tokens": 5000, "ignore_eos": True}  # not done before they leave
        visitors.append(Visitor(fields, rng.uniform(0, 10) if place < LEAVING else None, is_slow))
    rng.shuffle(visitors)
    return visitors


async def visit_all(port: int, visitors: list[Visitor]) -> None:
    async def visit(visitor: Visitor) -> None:
        visitor.reply = await post_patiently(
            port, visitor.fields, leave_after=visitor.leave_after, slowly=visitor.is_slow
        )

    await asyncio.gather(*map(visit, visitors))


def measure_load(server: ServerProcess, storyteller: Storyteller, n_clients: int) -> dict[str, Any]:
    """Return what became of the clients."""
    asyncio.run(visit_all(server.port, make_visitors(n_clients, seed=1)))
    before_mb, started_at = server.rss_mb, time.perf_counter()
    visitors = make_visitors(n_clients, seed=2)
    asyncio.run(visit_all(server.port, visitors))
    seconds = time.perf_counter() - started_at
    asyncio.run(server.wait_for(lambda health: health["busy"] == health["queued"] == 0))
    patient = [visitor for visitor in visitors if visitor.leave_after is None]
    whole = [v.reply for v in patient if v.reply is not None and v.reply.is_whole]
    if len(whole) != len(patient):
        raise UserError(f"{len(patient) - len(whole)} of {len(patient)} patient clients did not get a whole story")
    check_texts([reply.text for reply in whole], tell(storyteller, [visitor.fields for visitor in patient])[0])
    # A slow reader's time is its own choice; of a very short story the rate says little.
    per_token = [
        (reply.ended_at - (reply.first_at or 0)) / reply.n_tokens
        for reply, visitor in zip(whole, patient, strict=True)
        if not visitor.is_slow and reply.n_tokens >= 20
    ]
    return {
        "clients": n_clients,
        "patient": len(patient),
        "whole": len(whole),
        "left": sum(visitor.reply is None for visitor in visitors),
        "refusals": sum(reply.n_tries - 1 for reply in whole),
        "most_tries": max(reply.n_tries for reply in whole),
        "load_seconds": seconds,
        "slowest_to_median": max(per_token) / statistics.median(per_token),
        "rss_mb": server.rss_mb,
        "rss_growth_mb": server.rss_mb - before_mb,
    }


def measure_peer(server: ServerProcess, options: argparse.Namespace) -> dict[str, Any]:
    """Return tokens per second of both at 16 streams, and the ratio to the peer's best number of threads."""
    if not options.peer.is_file():
        raise UserError(f"--peer: {options.peer} does not exist; build llama.cpp's target llama-server")
    sampling = {"temperature": 0.8, "min_p": 0.05, "top_p": 1.0, "top_k": 0}
    ours = sampling | {"repetition_penalty": 1.0, "ignore_eos": True}
    theirs = sampling | {"repeat_penalty": 1.0, "ignore_eos": True, "samplers": ["min_p", "temperature"]}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        gguf = Path(folder) / "model.gguf"
        export = ["export", str(options.model), "--format", "gguf", "--precision", options.peer_precision]
        subprocess.run(
            [sys.executable, "-m", "tinystories", *export, "--out", str(gguf)], check=True, stdout=sys.stderr
        )
        n_ctx = str(N_STREAMS * server_context(server))
        ports = {"ours": server.port}
        for threads in options.peer_threads.split(","):
            port = free_port()
            command = [str(options.peer), "-m", str(gguf), "-np", str(N_STREAMS), "-cb", "-c", n_ctx]
            command += ["--port", str(port), "--host", "127.0.0.1", "-t", threads, "-tb", threads]
            stack.enter_context(running(command, port=port))
            ports[f"llama-server, {threads} threads"] = port
        rates: dict[str, list[float]] = {name: [] for name in ports}
        for round_number in itertools.count():
            for name, port in ports.items():
                rate = peer_rate(port, ours if name == "ours" else theirs, seed=round_number)
                if round_number:  # the first one warms up
                    rates[name].append(rate)
            if round_number == options.rounds:
                break
    medians = {name: statistics.median(values) for name, values in rates.items()}
    best = max((name for name in rates if name != "ours"), key=lambda name: medians[name])
    ratio = median_ratio(rates["ours"], rates[best])
    return {"peer_tokens_per_s": medians, "peer_best": best, "ours_to_peer": ratio}


def server_context(server: ServerProcess) -> int:
    """Return the context length of the served model."""
    reply = asyncio.run(post(server.port, {"prompt": "a", "model": "model"}, path="/tokenize"))
    assert reply is not None, "the client stays"
    return int(json.loads(reply.body)["max_model_len"])


def peer_rate(port: int, fields: Fields, *, seed: int) -> float:
    """Return tokens per second of 16 streams of PEER_TOKENS tokens."""
    fields = fields | {"max_tokens": PEER_TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    requests = [
        fields | {"prompt": f"{NAMES[number % len(NAMES)]} and", "seed": 100 * seed + number}
        for number in range(N_STREAMS)
    ]
    started_at = time.perf_counter()
    replies = stream_all(port, requests, N_STREAMS)
    seconds = time.perf_counter() - started_at
    check_whole(replies)
    if any(reply.n_tokens != PEER_TOKENS for reply in replies):
        raise UserError("a stream has not the tokens that were asked for")
    return N_STREAMS * PEER_TOKENS / seconds


GOALS = (
    ("serve_to_generate", "16 streams, share of generate", ">=", 0.9),
    ("whole_to_generate", "16 whole answers, share of generate", ">=", 0.9),
    ("first_token_idle_s", "first token, idle (s)", "<=", 0.15),
    ("first_token_busy_s", "first token, all slots busy (s)", "<=", 1.5),
    ("cancel_to_free_s", "cancel to free slot (s)", "<=", 0.05),
    ("start_s", "start to listening (s)", "<=", 0.6),
    ("slowest_to_median", "slowest per token, of the median", "<=", 3.0),
    ("rss_growth_mb", "growth of memory after warmup (MB)", "<=", 5.0),
    ("ours_to_peer", "16 streams, of llama-server's", ">=", 1.5),
)


def print_table(results: dict[str, Any]) -> None:
    """Print what has been measured beside its goal."""
    for name in ("generate_us_per_token", "server_us_per_token", "client_us_per_token"):
        if name in results:
            print(f"{name:36} {results[name]:8.3f}", flush=True)
    for name in ("clients", "refusals", "peer_tokens_per_s"):
        if name in results:
            print(f"{name:36} {results[name]}", flush=True)
    for name, label, sign, goal in GOALS:
        if name in results:
            value = results[name]
            is_met = value >= goal if sign == ">=" else value <= goal
            line = f"{label:36} {value:8.3f}   goal {sign} {goal:<5g} {'' if is_met else 'MISSED'}"
            print(line.rstrip(), flush=True)


if __name__ == "__main__":
    run_main(main)

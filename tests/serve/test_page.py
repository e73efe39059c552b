"""The pages and the lab's endpoints: what is served to whom, and that every number is one of the Python API."""

import base64
import gzip
import hashlib
import re
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serve_helpers import Client, Running, Serve, post_to_lab

import tinystories
from tinystories.serve.lab import traces
from tinystories.serve.static import MEDIA_TYPES, PAGE, StaticFile, build_page_routes

KEY = "a-long-enough-key"
TEXT = "Once upon a time there was a cat."
FILES = sorted(route.path for route in build_page_routes())
POSTS = ("tokens", "score", "next", "step", "attention", "heads", "lens", "ablate")


@pytest.fixture(scope="module")
def server(serve_model: Serve) -> Iterator[Running]:
    with serve_model(precision="fp32") as running:
        yield running


@pytest.fixture(scope="module")
def locked(serve_chaotic: Serve) -> Iterator[Running]:
    with serve_chaotic(keys=(KEY,)) as running:
        yield running


@pytest.fixture(scope="module")
def storyteller(model_folder: Path) -> tinystories.Storyteller:
    return tinystories.load(model_folder, engine="cpu", precision="fp32", threads=1)


def encode(storyteller: tinystories.Storyteller, text: str = TEXT) -> list[int]:
    return [storyteller.tokenizer.end_id, *storyteller.tokenizer.encode(text)]


def test_every_file_is_served_with_a_policy(server: Running) -> None:
    assert {"/", "/lab", "/page/story.js", "/page/lab.js", "/page/style.css", "/page/vendor/preact.mjs"} <= set(FILES)
    for path in FILES:
        status, body, headers = server.client.request("GET", path)
        name = {"/": "index.html", "/lab": "lab.html"}.get(path, path.removeprefix("/page/"))
        assert (status, body) == (200, (PAGE / name).read_bytes())
        assert headers["content-type"] == MEDIA_TYPES[Path(name).suffix]
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_files_load_nothing_from_elsewhere_and_nothing_inline() -> None:
    for path in PAGE.rglob("*"):
        if path.suffix not in MEDIA_TYPES or path.suffix == ".txt":
            continue
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/", "")
        text = text.removeprefix("/*! https://github.com/leeoniya/uPlot (v1.6.32) */")
        assert not re.search(r"https?://", text), path
        assert not re.search(r"<script(?![^>]*\bsrc=)|<style|\bon\w+=\"|\beval\(|new Function", text), path
        for name in re.findall(r"(?:from |import |import\()'(\./[^']+)'|(?:src|href)=\"(/page/[^\"]+)\"", text):
            file = path.parent / name[0] if name[0] else PAGE / name[1].removeprefix("/page/")
            assert file.is_file(), f"{path}: {name}"


@pytest.mark.parametrize(("document", "entry"), [("lab.html", "lab.js"), ("index.html", "story.js")])
def test_a_page_loads_all_its_modules_at_once(document: str, entry: str) -> None:
    """Without the list, the browser would learn file by file what it needs."""

    def list_imports(path: str) -> set[str]:
        text = (PAGE / path).read_text(encoding="utf-8")
        names = {f"{Path(path).parent / name}" for name in re.findall(r"""from\s*["']\./([^"']+)["']""", text)}
        return names.union(*(list_imports(name) for name in names))

    text = (PAGE / document).read_text(encoding="utf-8")
    assert set(re.findall(r'rel="modulepreload" href="/page/([^"]+)"', text)) == list_imports(entry)


def test_libraries_are_those_of_the_table() -> None:
    table = (PAGE / "vendor" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| `(\w+\.(?:mjs|js))` \|.*\| ([\d,]+) \| `(\w{64})` \| (?:the same|`(\w{64})`) \|", table)
    libraries = [path for path in (PAGE / "vendor").iterdir() if path.suffix in (".mjs", ".js")]
    assert {row[0] for row in rows} == {path.name for path in libraries}
    for name, n_bytes, published, changed in rows:
        data = (PAGE / "vendor" / name).read_bytes()
        assert len(data) == int(n_bytes.replace(",", ""))
        assert hashlib.sha256(data).hexdigest() == (changed or published)
        original = data.replace(b'from"./preact.mjs"', b'from"preact"')
        assert hashlib.sha256(original).hexdigest() == published


def list_loaded(document: str, entry: str, *, later: bool = False) -> set[str]:
    """The files that a page loads; with `later`, also those of all that can be opened in it."""

    def list_imports(path: str) -> set[str]:
        text = (PAGE / path).read_text(encoding="utf-8")
        pattern = r"""(?:from\s*|import\()["']\./([^"']+)["']""" if later else r"""from\s*["']\./([^"']+)["']"""
        names = {f"{Path(path).parent / name}" for name in re.findall(pattern, text)}
        return names.union(*(list_imports(name) for name in names))

    text = (PAGE / document).read_text(encoding="utf-8")
    linked = re.findall(r'(?:href|src)="/page/([^"]+)"', text)
    return {document, *linked, *list_imports(entry), *(["vendor/uplot.js"] if later and document == "lab.html" else [])}


# Bytes of the files, and bytes that travel to a browser. `later`: with every pane, the tour and the curves.
@pytest.mark.parametrize(
    ("document", "entry", "later", "n_plain", "n_sent"),
    [
        ("index.html", "story.js", False, 100_000, 37_000),
        ("lab.html", "lab.js", False, 190_000, 70_000),
        ("lab.html", "lab.js", True, 300_000, 115_000),
    ],
)
def test_pages_are_small(server: Running, document: str, entry: str, later: bool, n_plain: int, n_sent: int) -> None:
    names = list_loaded(document, entry, later=later)
    sizes = []
    for name in names:
        url = {"index.html": "/", "lab.html": "/lab"}.get(name, f"/page/{name}")
        _, _, headers = server.client.request("GET", url, headers={"Accept-Encoding": "gzip"})
        sizes.append(((PAGE / name).stat().st_size, int(headers["content-length"])))
    plain, sent = map(sum, zip(*sizes, strict=True))
    assert plain < n_plain
    assert sent < n_sent
    if not later:
        assert not names & {"vendor/uplot.js", "training.js", "experiments.js", "quiz.js", "tour.js"}


def test_files_are_compressed_for_those_who_can_read_that(server: Running) -> None:
    for path in FILES:
        _, plain, plain_headers = server.client.request("GET", path)
        status, data, headers = server.client.request("GET", path, headers={"Accept-Encoding": "gzip, deflate, br"})
        assert status == 200
        assert int(headers["content-length"]) == len(data) <= len(plain)
        is_compressed = headers.get("content-encoding") == "gzip"
        assert is_compressed == (data != plain)
        assert (gzip.decompress(data) if is_compressed else data) == plain
        assert is_compressed or len(gzip.compress(plain, 9, mtime=0)) >= len(plain)
        assert "content-encoding" not in plain_headers
        assert headers["vary"] == plain_headers["vary"] == "Accept-Encoding"
        assert (headers["etag"] == plain_headers["etag"]) == (data == plain)
        assert headers["content-type"] == plain_headers["content-type"]


@pytest.mark.parametrize(
    ("accepted", "is_compressed"),
    [
        ("gzip", True),
        ("GZIP;Q=0.5", True),
        ("deflate, gzip;q=1.0, *;q=0.5", True),
        ("*", True),
        ("identity", False),
        ("", False),
        ("gzip;q=0", False),
        ("gzip; q=0.0, *", False),
        ("*;q=0", False),
        ("gzip;q=nonsense", False),
        ("x-gzip-like", False),
    ],
)
def test_a_client_says_what_it_can_read(server: Running, accepted: str, is_compressed: bool) -> None:
    _, data, headers = server.client.request("GET", "/page/lab.js", headers={"Accept-Encoding": accepted})
    assert (headers.get("content-encoding") == "gzip") == is_compressed
    assert (gzip.decompress(data) if is_compressed else data) == (PAGE / "lab.js").read_bytes()


def test_what_a_browser_has_is_not_sent_again(server: Running) -> None:
    zipped = {"Accept-Encoding": "gzip"}
    tags = [server.client.request("GET", "/lab", headers=kind)[2]["etag"] for kind in ({}, zipped)]
    assert len(set(tags)) == 2
    for kind, tag, other in (({}, *tags), (zipped, *tags[::-1])):
        for known in (tag, f'"x", W/{tag}', "*"):
            status, data, headers = server.client.request("GET", "/lab", headers=kind | {"If-None-Match": known})
            assert (status, data, headers["etag"], headers["vary"]) == (304, b"", tag, "Accept-Encoding")
        for unknown in (other, '"x"', ""):
            assert server.client.request("GET", "/lab", headers=kind | {"If-None-Match": unknown})[0] == 200
    status, data, headers = server.client.request("HEAD", "/lab", headers=zipped)
    assert (status, data, headers["etag"]) == (200, b"", tags[1])


def test_only_files_are_compressed_and_once(server: Running) -> None:
    for path in ("/lab/api/model", "/v1/models", "/health"):
        status, _, headers = server.client.request("GET", path, headers={"Accept-Encoding": "gzip"})
        assert (status, headers.get("content-encoding")) == (200, None)
    file = StaticFile(PAGE / "lab.js")
    assert file.compressed is file.compressed


def test_with_a_key_files_are_open_and_data_is_not(locked: Running) -> None:
    stranger = Client(locked.port)
    for path in [*FILES, "/health"]:
        assert stranger.request("GET", path)[0] == 200
    assert stranger.request("GET", "/lab/api/model")[0] == 401
    for name in POSTS:
        assert stranger.request("POST", f"/lab/api/{name}", {"text": "a", "ids": [1]})[0] == 401
    assert locked.client.request("GET", "/lab/api/model")[0] == 200


@pytest.mark.parametrize(
    "path", ["/page/../server.py", "/page/%2e%2e/server.py", "/page//style.css", "/page/", "/page/vendor", "/lab/"]
)
def test_no_other_file_can_be_read(server: Running, path: str) -> None:
    assert server.client.request("GET", path)[0] == 404


def test_model(server: Running, storyteller: tinystories.Storyteller) -> None:
    _, answer, _ = server.client.request("GET", "/lab/api/model")
    config = storyteller.engine.config
    assert (answer["n_layer"], answer["n_head"], answer["n_ctx"]) == (config.n_layer, config.n_head, config.n_ctx)
    assert answer["sampling"]["temperature"] == storyteller.settings.temperature
    assert answer["is_traceable"]


def test_tokens_join_to_the_text(server: Running, storyteller: tinystories.Storyteller) -> None:
    text = "The naïve 🐈 sat.\nIt was <|endoftext|> happy."
    answer = post_to_lab(server, "tokens", text=text)
    assert answer["ids"] == encode(storyteller, text)
    assert answer["text"] == text
    units = text.encode("utf-16-le")
    parts = [units[2 * piece["start"] : 2 * piece["end"]].decode("utf-16-le") for piece in answer["pieces"]]
    assert "".join(parts) == text
    appended = post_to_lab(server, "tokens", text=TEXT, append=[5, 6])
    assert appended["ids"] == [*encode(storyteller), 5, 6]


def test_a_long_text_keeps_its_end(server: Running, storyteller: tinystories.Storyteller) -> None:
    answer = post_to_lab(server, "tokens", text=TEXT * 60)
    n_ctx = storyteller.engine.config.n_ctx
    assert answer["ids"] == encode(storyteller, TEXT * 60)[-n_ctx:]
    assert answer["n_dropped"] == answer["n_tokens"] - n_ctx > 0
    assert len(post_to_lab(server, "score", ids=answer["ids"])["ranks"]) == n_ctx


def test_score(server: Running, storyteller: tinystories.Storyteller) -> None:
    trace = storyteller.trace(TEXT)
    answer = post_to_lab(server, "score", ids=encode(storyteller))
    np.testing.assert_allclose(answer["surprise_bits"][1:], trace.surprise_bits[1:], atol=1e-4)
    assert answer["surprise_bits"][0] is None
    assert answer["ranks"] == trace.ranks.tolist()
    assert answer["bits_per_byte"] == pytest.approx(trace.bits_per_byte, abs=1e-4)
    for i in range(1, len(trace.ids)):
        assert [token for token, _ in answer["top"][i]] == trace.predictions.top_ids[0, i - 1].tolist()
    assert answer["labels"][str(answer["top"][1][0][0])]


def test_next(server: Running, storyteller: tinystories.Storyteller) -> None:
    settings = {"temperature": 0.7, "top_k": 30, "top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.5}
    answer = post_to_lab(server, "next", ids=encode(storyteller), top=20, **settings)
    step = storyteller.next_token(TEXT, **settings)
    for candidate in answer["candidates"]:
        assert candidate["model_prob"] == pytest.approx(float(step.model_probs[candidate["id"]]), abs=1e-5)
        assert candidate["final_prob"] == pytest.approx(float(step.final_probs[candidate["id"]]), abs=1e-4)
    assert answer["n_kept"] == step.n_kept
    assert {c["cut_by"] for c in answer["candidates"]} >= {None, "top_p"}
    assert answer["end_id"] in [c["id"] for c in answer["candidates"]]


def test_next_sends_what_the_page_needs_to_apply_other_settings(
    server: Running, storyteller: tinystories.Storyteller
) -> None:
    answer = post_to_lab(server, "next", ids=encode(storyteller), logits=True)
    trace = storyteller.trace(TEXT)
    logits = np.frombuffer(base64.b64decode(answer["logits"]), "<f4")
    np.testing.assert_allclose(logits, trace.logits()[-1], atol=1e-4)
    seen = set(storyteller.tokenizer.encode(TEXT))
    assert set(answer["seen"]) == seen
    assert "logits" not in post_to_lab(server, "next", ids=encode(storyteller))


def test_drawing_with_a_seed_tells_the_story_of_that_seed(
    server: Running, storyteller: tinystories.Storyteller
) -> None:
    ids = encode(storyteller)
    for index in range(6):
        step = post_to_lab(server, "step", ids=ids, seed=7, index=index)
        assert step["below"] <= step["u"] + 1e-6
        assert step["u"] <= step["below"] + step["final_prob"] + 1e-6
        ids.append(step["id"])
    story = storyteller.generate(TEXT, seed=7, max_tokens=6, ignore_end=True)
    assert storyteller.tokenizer.decode(ids[1:]) == story.text


def test_attention(server: Running, storyteller: tinystories.Storyteller) -> None:
    trace = storyteller.trace(TEXT)
    n = len(trace.ids)
    rows, columns = np.tril_indices(n)
    data = post_to_lab(server, "attention", ids=encode(storyteller), layer=1)
    assert struct.unpack("<III", data[:12]) == (1, 4, n)
    assert data[12:] == trace.attention_bytes(1)[:, rows, columns].tobytes()
    one = post_to_lab(server, "attention", ids=encode(storyteller), layer=1, head=2)
    assert one[12:] == trace.attention_bytes(1)[2, rows, columns].tobytes()
    all_heads = post_to_lab(server, "attention", ids=encode(storyteller))
    assert struct.unpack("<III", all_heads[:12]) == (2, 8, n)
    assert all_heads[12:] == np.concatenate([trace.attention_bytes(0), trace.attention_bytes(1)]).tobytes()


def test_thumbnails_of_a_long_text_are_bounded(server: Running, storyteller: tinystories.Storyteller) -> None:
    ids = encode(storyteller, TEXT * 60)[-96:]
    data = post_to_lab(server, "attention", ids=ids)
    trace = storyteller.trace(ids)
    assert struct.unpack("<III", data[:12]) == (2, 8, 48)
    blocks = trace.attention_bytes(0)[0].reshape(48, 2, 48, 2).max(axis=(1, 3))
    assert data[12 : 12 + 48 * 48] == blocks.tobytes()


def test_heads(server: Running, storyteller: tinystories.Storyteller) -> None:
    trace = storyteller.trace(TEXT)
    answer = post_to_lab(server, "heads", ids=encode(storyteller))
    probs, n = trace.attention[1, 2], len(trace.ids)
    expected = {
        "first": np.mean([probs[i, 0] for i in range(2, n)]),
        "previous": np.mean([probs[i, i - 1] for i in range(2, n)]),
        "self": np.mean([probs[i, i] for i in range(2, n)]),
        "same": np.mean([sum(probs[i, j] for j in range(i) if trace.ids[j] == trace.ids[i]) for i in range(2, n)]),
    }
    assert {name: answer[name][1][2] for name in expected} == pytest.approx(expected, abs=1e-4)


def test_lens(server: Running, storyteller: tinystories.Storyteller) -> None:
    lens = storyteller.trace(TEXT).logit_lens(top=3, positions=range(2, 7))
    answer = post_to_lab(server, "lens", ids=encode(storyteller), start=2, stop=7, top=3)
    assert answer["stages"] == ["embedding", "layer 0", "layer 1"]
    assert [[[token for token, _ in cell] for cell in row] for row in answer["top"]] == lens.top_ids.tolist()
    assert answer["final_ranks"] == lens.final_ranks.tolist()
    np.testing.assert_allclose(answer["kl_bits"], lens.kl_bits, atol=1e-4)


def test_ablate(server: Running, storyteller: tinystories.Storyteller) -> None:
    trace = storyteller.trace(TEXT)
    ablated = trace.ablate([(0, 1), (1, 3)])
    answer = post_to_lab(server, "ablate", ids=encode(storyteller), heads=[[0, 1], [1, 3]])
    assert answer["mean_bits"] == pytest.approx(trace.mean_bits, abs=1e-4)
    assert answer["ablated_mean_bits"] == pytest.approx(ablated.mean_bits, abs=1e-4)
    assert answer["ablated_top"][0][0] == ablated.predictions.top_ids[0, -1, 0]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("score", {}),
        ("score", {"ids": []}),
        ("score", {"ids": [-1]}),
        ("score", {"ids": [400]}),
        ("score", {"ids": [2**31 - 1]}),
        ("score", {"ids": [1] * 97}),
        ("score", {"ids": "1"}),
        ("score", {"ids": [1.5]}),
        ("score", {"ids": [1] * 40_000}),
        ("tokens", {"text": 5}),
        ("tokens", {"text": "a", "append": [400]}),
        ("next", {"ids": [1], "top": 41}),
        ("next", {"ids": [1], "temperature": -1}),
        ("next", {"ids": [1], "top_p": 0}),
        ("step", {"ids": [1], "seed": -1, "index": 0}),
        ("step", {"ids": [1], "seed": 1, "index": 10**9}),
        ("attention", {"ids": [1], "layer": 2}),
        ("attention", {"ids": [1], "layer": 0, "head": 4}),
        ("attention", {"ids": [1], "head": 0}),
        ("lens", {"ids": [1], "start": 0, "stop": 2}),
        ("lens", {"ids": [1] * 90, "start": 0, "stop": 80}),
        ("lens", {"ids": [1], "start": 1, "stop": 1}),
        ("ablate", {"ids": [1], "heads": [[9, 0]]}),
        ("ablate", {"ids": [1], "heads": [[0]]}),
    ],
)
def test_what_is_out_of_range_is_refused(server: Running, name: str, fields: dict[str, object]) -> None:
    status, answer, _ = server.client.request("POST", f"/lab/api/{name}", fields)
    assert status == 400
    assert answer["error"]["message"]


def test_one_token_alone_has_answers_too(server: Running) -> None:
    assert post_to_lab(server, "score", ids=[1])["surprise_bits"] == [None]
    assert post_to_lab(server, "heads", ids=[1])["first"] == []
    assert post_to_lab(server, "ablate", ids=[1], heads=[[0, 0]])["mean_bits"] is None
    assert len(post_to_lab(server, "attention", ids=[1])) == 12 + 8
    assert post_to_lab(server, "tokens", text="")["text"] == ""


def test_other_origins_and_forms_are_refused(server: Running) -> None:
    body = {"ids": [1]}
    assert server.client.request("POST", "/lab/api/score", body, {"Origin": "http://evil.example"})[0] == 403
    assert server.client.request("POST", "/lab/api/score", body, {"Host": "evil.example"})[0] == 403
    assert server.client.request("POST", "/lab/api/score", body, {"Content-Type": "text/plain"})[0] == 415


def test_an_engine_without_weights_is_told_apart(serve_chaotic: Serve) -> None:
    with serve_chaotic() as running:
        assert running.client.request("GET", "/lab/api/model")[1]["is_traceable"] is False
        status, answer, _ = running.client.request("POST", "/lab/api/score", {"ids": [1]})
        assert (status, "weights" in answer["error"]["message"]) == (501, True)


def test_traces_are_kept_and_bounded(storyteller: tinystories.Storyteller, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = traces.TraceWorker(storyteller.engine, storyteller.tokenizer)
    first = worker.trace([1, 2])
    assert worker.trace([1, 2]) is first
    for token in range(40):
        worker.trace([token])
    assert len(worker.traces) == traces.MAX_TRACES
    assert worker.trace([1, 2]) is not first
    monkeypatch.setattr(traces, "MAX_TRACE_BYTES", 3 * first.hidden.nbytes)
    worker.trace([3, 4])
    assert worker.n_bytes <= 3 * first.hidden.nbytes


def test_typing_continues_the_trace_of_the_text_before(
    storyteller: tinystories.Storyteller, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = traces.TraceWorker(storyteller.engine, storyteller.tokenizer)
    ids = encode(storyteller, TEXT * 3)
    n_known: list[int] = []
    original = traces.trace_text

    def count(*arguments: Any, known: Any) -> Any:
        n_known.append(0 if known is None else known.shape[1])
        return original(*arguments, known=known)

    monkeypatch.setattr(traces, "trace_text", count)
    texts = [ids[:20], ids[:30], ids[:25], [*ids[:15], 5, 6], ids[:5], [1, 2, 3]]
    for text in texts:
        trace = worker.trace(text)
        np.testing.assert_allclose(trace.hidden, storyteller.trace(text).hidden, atol=2e-5)
    assert n_known == [0, 20, 24, 15, 0, 0]  # few tokens in common are not worth it


def test_a_slow_trace_delays_nothing_and_too_many_are_refused(
    serve_model: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = threading.Event()
    original = traces.trace_text

    def wait(*arguments: Any, **options: Any) -> Any:
        gate.wait()
        return original(*arguments, **options)

    monkeypatch.setattr(traces, "trace_text", wait)
    statuses: list[int] = []
    with serve_model() as running:

        def ask() -> None:
            statuses.append(running.client.request("POST", "/lab/api/score", {"ids": [1, 2]})[0])

        threads = [threading.Thread(target=ask) for _ in range(traces.MAX_WAITING + 1)]
        for thread in threads:
            thread.start()
        while 429 not in statuses:  # one too many
            assert any(thread.is_alive() for thread in threads)
        assert running.client.request("GET", "/health")[0] == 200
        assert running.client.complete(prompt="A", max_tokens=3, ignore_eos=True)["finish_reason"] == "length"
        gate.set()
        for thread in threads:
            thread.join()
    assert sorted(statuses) == [200] * traces.MAX_WAITING + [429]

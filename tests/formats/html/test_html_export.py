"""Pages as files: what is in them, what is refused, and that none is kept that tells other stories than the engine."""

import base64
import dataclasses
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import one_line_error, tinystories
from format_helpers import Build
from page_helpers import NODE, OWN_SETTINGS, engine_storyteller, needs_node

from tinystories.checkpoint import BUNDLED_MODEL, INT8_WEIGHTS
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.errors import UserError
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.formats.html import document
from tinystories.formats.html import format as html_format
from tinystories.formats.html.check import run_page
from tinystories.formats.html.document import PACKAGE, PAGE_SCRIPT, PROGRAM, find_license, render_card
from tinystories.formats.html.model_data import load_int8
from tinystories.generate.batching import Request
from tinystories.single_page import join_modules
from tinystories.weights.names import expected_shapes

HOSTILE = "</title></script><script>alert('1')</script><!-- {{weights}} {{program}} \" & \u2028 \N{GRINNING FACE}"


class Elements(HTMLParser):
    """The elements of a page: (tag, attributes, text)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], str]] = []
        self.is_inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs), ""))
        self.is_inside = True

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self.is_inside = False

    def handle_data(self, data: str) -> None:
        if self.is_inside:
            tag, attributes, text = self.elements[-1]
            self.elements[-1] = tag, attributes, text + data

    def of(self, tag: str) -> list[tuple[dict[str, str | None], str]]:
        return [(attributes, text) for name, attributes, text in self.elements if name == tag]


@pytest.fixture
def no_runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine with neither Node.js nor a browser."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


@needs_node
@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_fifty_seeds_tell_the_engines_stories(portable: Build, tmp_path: Path, kind: str) -> None:
    """With all kinds of settings, and stories far longer than the context; and a seed of more than 64 bits."""
    model = dataclasses.replace(portable(kind, True), sampling=OWN_SETTINGS)
    export(model, "html", tmp_path / "story.html", require_check=True)
    prompts = ("Once upon a time", "", 'Lily 🙂 said: "é" ', "Tom and Lily went to the park. " * 12)
    settings = (
        OWN_SETTINGS,
        dataclasses.replace(OWN_SETTINGS, temperature=1.5, top_k=7, min_p=0.0, repetition_window=0),
        dataclasses.replace(OWN_SETTINGS, top_k=40, top_p=0.8, penalize_names=True),
        SamplingConfig(temperature=1e-3, top_p=0.5),
        SamplingConfig(temperature=1.0, min_p=0.0, repetition_penalty=0.8, repetition_window=3),
    )
    requests = [
        Request(prompt=prompts[seed % 4], settings=settings[seed % 5], seed=seed, max_tokens=40, number=seed % 3)
        for seed in range(48)
    ]
    greedy = dataclasses.replace(OWN_SETTINGS, temperature=0.0)
    requests += [
        Request(prompt="Once", settings=OWN_SETTINGS, seed=2**90 + 1, max_tokens=300),
        Request(prompt="Once", settings=greedy, seed=1, max_tokens=300),
    ]
    assert NODE is not None
    results = run_page(tmp_path / "story.html", requests, ("node", NODE))
    stories = {i: item for i, item in engine_storyteller(model).events(requests) if not isinstance(item, str)}
    assert len({tuple(story.ids) for story in stories.values()}) > 30
    for i, result in enumerate(results):
        assert result == {"ids": list(stories[i].ids), "text": stories[i].continuation}, requests[i]


@pytest.mark.usefixtures("no_runner")
def test_a_page_is_whole_and_loads_nothing(model: ModelBundle, tmp_path: Path) -> None:
    out = tmp_path / "story.html"
    assert export(model, "html", out).paths == [out]
    page = Elements(out.read_text(encoding="utf-8"))
    scripts = page.of("script")
    (policy,) = [one["content"] for one, _ in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert not re.search(r"unsafe-(inline|eval\b(?<!wasm-unsafe-eval))|https?:|\*|'self'|connect-src", policy)
    running = [text for attributes, text in scripts if attributes.get("type") in (None, "module")]
    hashes = {base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in running}
    assert hashes == set(re.findall(r"'sha256-([^']+)'", policy.split("script-src")[1].split(";")[0]))
    ((_, style),) = page.of("style")
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy.split("style-src")[1]
    for tag, attributes, _ in page.elements:  # the policy would forbid them
        assert "src" not in attributes, tag
        assert not [name for name in attributes if name == "style" or name.startswith("on")], tag
        assert tag == "a" or not str(attributes.get("href", "data:")).startswith("http")
    weights = b"".join(base64.b64decode(text) for one, text in scripts if one.get("class") == "weights")
    ((_, header_text),) = [one for one in scripts if one[0].get("id") == "model"]
    header = json.loads(header_text)
    assert len(weights) == header["weight_bytes"]
    for name, array in load_int8(model).items():
        place = header["tensors"][name]
        assert weights[place["start"] : place["start"] + place["n_bytes"]] == array.tobytes(), name


@pytest.mark.usefixtures("no_runner")
def test_a_hostile_title_stays_text(model: ModelBundle, tmp_path: Path) -> None:
    plain, hostile = tmp_path / "plain.html", tmp_path / "hostile.html"
    export(model, "html", plain)
    export(dataclasses.replace(model, title=HOSTILE, license=HOSTILE), "html", hostile)
    pages = [Elements(path.read_text(encoding="utf-8")) for path in (plain, hostile)]
    tags = [[tag for tag, _, _ in page.elements] for page in pages]
    assert tags[0] == tags[1]
    assert pages[1].of("title")[0][1].strip() == HOSTILE
    (header,) = [text for one, text in pages[1].of("script") if one.get("id") == "model"]
    assert json.loads(header)["title"] == HOSTILE
    assert document.DEFAULT_TITLE in pages[0].of("title")[0][1]


@needs_node
def test_a_page_with_a_hostile_title_tells_stories(model: ModelBundle, tmp_path: Path) -> None:
    export(dataclasses.replace(model, title=HOSTILE), "html", tmp_path / "story.html", require_check=True)


@pytest.mark.usefixtures("no_runner")
def test_where_nothing_runs_a_page_a_line_says_so(model: ModelBundle, tmp_path: Path) -> None:
    model.write(tmp_path / "model")
    command = ["export", str(tmp_path / "model"), "--format", "html", "--out", str(tmp_path / "story.html")]
    result = tinystories(*command)
    assert result.returncode == 0, result.stderr
    assert "\nnot run here: install Node.js or Chromium to verify it\n" in result.stdout
    (tmp_path / "story.html").unlink()
    message = one_line_error(tinystories(*command, "--require-check"))
    assert "not run here: install Node.js or Chromium to verify it; --require-check" in message
    assert not (tmp_path / "story.html").exists()


@pytest.mark.usefixtures("no_runner")
@pytest.mark.parametrize("name", ["node", "chromium"])
def test_a_runner_that_fails_is_named(model: ModelBundle, tmp_path: Path, name: str) -> None:
    program = tmp_path / "empty" / name
    program.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 3\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match=f"{name} cannot run the page, which needs at least Node.js 16 .*no such flag"):
        export(model, "html", tmp_path / "story.html")
    assert not (tmp_path / "story.html").exists()


@pytest.mark.usefixtures("no_runner")
def test_a_browser_that_shows_nothing_is_named(model: ModelBundle, tmp_path: Path) -> None:
    program = tmp_path / "empty" / "chromium"
    program.write_text("#!/bin/sh\necho '<html></html>'\n")
    program.chmod(0o755)
    with pytest.raises(UserError, match=r"chromium cannot run the page, .*: the page shows no result"):
        export(model, "html", tmp_path / "story.html")


@needs_node
def test_a_page_that_tells_another_story_is_not_kept(
    model: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(*arguments: Any) -> None:
        *others, weights = arguments
        weights[:8192] = bytes(8192)
        document.write_document(*others, weights)

    monkeypatch.setattr(html_format, "write_document", damage)
    with pytest.raises(UserError, match="the page tells another story than the engine; nothing was written"):
        export(model, "html", tmp_path / "story.html")
    assert list(tmp_path.iterdir()) == []


def test_what_a_browser_does_not_bear_is_refused(model: ModelBundle, tmp_path: Path) -> None:
    """With the size that it would have, before anything is read or written."""
    large = ModelConfig(n_layer=24, n_embd=1024, n_head=16, n_ff=2816, n_ctx=512, vocab_size=400, tied=True)
    long = ModelConfig(n_layer=4, n_embd=64, n_head=4, n_ff=64, n_ctx=1 << 20, vocab_size=400, tied=True)
    for config, message in (
        (large, r"a page of this model would have 4\d\d MB, more than a browser can handle \(250 MB\); use --format"),
        (long, r"would need 2,147 MB for a context of 1,048,576 tokens, more than a browser can handle \(500 MB\)"),
    ):
        with pytest.raises(UserError, match=message):
            export(dataclasses.replace(model, config=config, weights={}), "html", tmp_path / "story.html")
    assert list(tmp_path.iterdir()) == []


def test_the_limit_is_on_the_size_of_the_file(model: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is estimated from the parameters: a byte for each, and a third more as base64."""
    config = dataclasses.replace(model.config, n_embd=512, n_ff=2048, n_layer=4)
    monkeypatch.setattr(html_format, "MAX_FILE_BYTES", config.n_params)
    with pytest.raises(UserError) as raised:
        html_format.check_size(config)
    (size,) = re.findall(r"have ([\d,]+) MB", str(raised.value))
    assert int(size) == pytest.approx(config.n_params * 4 / 3 / 1e6, rel=0.05)
    monkeypatch.setattr(html_format, "MAX_FILE_BYTES", 1.5 * config.n_params)
    html_format.check_size(config)


def test_title_and_license_need_a_page(tmp_path: Path) -> None:
    for option in ("--title", "--license"):
        command = ["export", "--format", "onnx", "--out", str(tmp_path / "x.onnx"), option, "x"]
        assert "--title and --license are for --format html" in one_line_error(tinystories(*command))


def test_a_title_that_is_no_text_is_refused(model: ModelBundle, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the title is not valid text"):
        export(dataclasses.replace(model, title="\udcff"), "html", tmp_path / "story.html")


def test_the_card_has_license_data_and_limits(model: ModelBundle, tmp_path: Path) -> None:
    card = render_card(dataclasses.replace(model, provenance={"data_source": "sample"}))
    assert "172 short stories that come with the program; license: CC0-1.0" in card
    assert "not stated; ask whoever made this model" in card
    assert "Nothing filters what it writes" in card
    card = render_card(dataclasses.replace(model, provenance={"data_source": "/home/ada/<b>my</b> stories.txt"}))
    assert "ada" not in card
    assert "&lt;b&gt;" in card or "b&gt; stories.txt" in card
    bundled = ModelBundle.read(BUNDLED_MODEL)
    card = render_card(bundled)
    assert "roneneldan/TinyStories" in card
    assert "license: CDLA-Sharing-1.0" in card
    assert "<b>License of the weights.</b> mit." in card
    assert find_license(dataclasses.replace(bundled, license="cc0-1.0")) == "cc0-1.0"
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text('---\nlanguage: en\nlicense: "apache-2.0"\n---\ntext\nlicense: other\n---\n')
    assert find_license(dataclasses.replace(model, folder=folder)) == "apache-2.0"
    (folder / "README.md").write_text("# A model\n\nlicense: none\n---\n")
    assert find_license(dataclasses.replace(model, folder=folder)) == ""


@pytest.mark.usefixtures("no_runner")
def test_the_bundled_page_is_at_most_1_4_times_the_weights(tmp_path: Path) -> None:
    export(ModelBundle.read(BUNDLED_MODEL), "html", tmp_path / "story.html")
    weights = (BUNDLED_MODEL / INT8_WEIGHTS).stat().st_size
    assert (tmp_path / "story.html").stat().st_size <= 1.4 * weights + 300_000


@pytest.mark.usefixtures("no_runner")
def test_a_large_vocabulary_takes_little_space(tmp_path: Path) -> None:
    """50,257 ids of 6 characters, as GPT-2 has, in a model of the size of `nano`."""
    parts = json.loads(Tokenizer.load(BUNDLED_MODEL).json_text)
    vocab, merges = parts["model"]["vocab"], parts["model"]["merges"]
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [a + b + c for a in letters for b in letters for c in letters]
    for word in pieces + [left + right for left in pieces[:200] for right in pieces[:200]]:
        for n in range(2, len(word) + 1):
            if len(vocab) < 50_256 and word[:n] not in vocab:
                vocab[word[:n]] = len(vocab)
                merges.append([word[: n - 1], word[n - 1]])
    tokenizer = Tokenizer(json.dumps(parts))
    assert tokenizer.vocab_size == 50_257
    config = ModelConfig(n_layer=4, n_head=4, n_embd=128, n_ff=352, n_ctx=256, vocab_size=50_257, tied=True)
    weights = {name: np.zeros(shape, np.float32) for name, shape in expected_shapes(config).items()}
    model = ModelBundle(config=config, weights=weights, tokenizer=tokenizer)
    export(model, "html", tmp_path / "story.html")
    n_bytes = sum(array.nbytes for array in load_int8(model).values())
    assert (tmp_path / "story.html").stat().st_size <= 1.4 * n_bytes + 300_000


def test_modules_import_what_others_export_and_ask_for_nothing() -> None:
    for entry in (PROGRAM, PAGE_SCRIPT):
        script = join_modules(PACKAGE, entry)
        exported = {
            path: {pair.split(":")[0].strip() for pair in pairs.split(",")}
            for path, pairs in re.findall(r'^modules\["([^"]+)"\] = \{(.*)\};$', script, re.MULTILINE)
        }
        for names, path in re.findall(r'^const \{(.+)\} = modules\["([^"]+)"\];$', script, re.MULTILINE):
            assert {name.split(":")[0].strip() for name in names.split(",")} <= exported[path], path
        assert list(exported)[-1] == entry
        assert not re.search(
            r"\beval\(|new Function|\bfetch\(|XMLHttpRequest|WebSocket|importScripts|innerHTML", script
        )

"""`tinystories lab --text ... --out page.html`: what the file holds, and that it asks for nothing."""

import base64
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import one_line_error
from command_line import tinystories as run_command
from serve_helpers import Serve

import tinystories
from tinystories import UserError
from tinystories.checkpoint import read_model
from tinystories.serve.lab import recording
from tinystories.serve.lab.recording import record
from tinystories.serve.lab.single_file import PAGE, build_page
from tinystories.serve.model import ServedModel
from tinystories.single_page import join_modules

TEXT = 'Once upon a time "there" was <a> cat & a naïve 🐈.'


@pytest.fixture(scope="module")
def storyteller(model_folder: Path) -> tinystories.Storyteller:
    return tinystories.load(model_folder, engine="cpu", precision="fp32", threads=1)


@pytest.fixture(scope="module")
def served(model_folder: Path) -> ServedModel:
    return ServedModel.describe(read_model(model_folder), name="small", engine_name="cpu", precision="fp32")


@pytest.fixture(scope="module")
def recorded(storyteller: tinystories.Storyteller, served: ServedModel) -> dict[str, Any]:
    return record(storyteller, served, TEXT)


def test_a_recording_has_the_answers_of_the_server(recorded: dict[str, Any], serve_model: Serve) -> None:
    def compare(answer: object, expected: object) -> None:
        """Equal, apart from the rounding of numbers that were computed in another order."""
        if isinstance(answer, dict) and isinstance(expected, dict):
            assert answer.keys() == expected.keys()
            for key in answer.keys() - {"logits", "is_traceable"}:
                compare(answer[key], expected[key])
        elif isinstance(answer, list) and isinstance(expected, list):
            assert len(answer) == len(expected)
            for one, other in zip(answer, expected, strict=True):
                compare(one, other)
        elif isinstance(answer, float):
            assert answer == pytest.approx(expected, abs=2e-4)
        else:
            assert answer == expected

    answers = json.loads(json.dumps(recorded))
    with serve_model(precision="fp32") as running:

        def post(name: str, **fields: object) -> Any:
            status, answer, _ = running.client.request("POST", f"/lab/api/{name}", fields)
            assert status == 200, answer
            return answer

        model = running.client.request("GET", "/lab/api/model")[1]
        assert model.pop("is_traceable")
        compare(answers["model"], model)
        for path, both in answers["paths"].items():
            append = [int(part) for part in path.split(",") if part]
            assert both["tokens"] == post("tokens", text=TEXT, append=append)
            compare(both["next"], post("next", ids=both["tokens"]["ids"], top=40, logits=True))
        ids = answers["paths"][""]["tokens"]["ids"]
        compare(answers["score"], post("score", ids=ids))
        compare(answers["heads"], post("heads", ids=ids))
        compare(answers["lens"], post("lens", ids=ids, start=0, stop=len(ids)))
        compare(answers["ablations"]["1.2"], post("ablate", ids=ids, heads=[[1, 2]]))
        assert base64.b64decode(answers["thumbnails"]) == post("attention", ids=ids)
        assert base64.b64decode(answers["attention"]["1.3"]) == post("attention", ids=ids, layer=1, head=3)
        settings = {name: answers["model"]["sampling"][name] for name in ("temperature", "top_k", "top_p", "min_p")}
        for index in range(3):
            step = post("step", ids=ids, seed=answers["seed"], index=index, **settings)
            assert step["u"] == answers["uniforms"][0][index]
        step = post("step", ids=ids, seed=answers["seed"] + 5, index=2, **settings)
        assert step["u"] == answers["uniforms"][5][2]


def test_paths_can_be_followed_for_two_tokens(recorded: dict[str, Any], storyteller: tinystories.Storyteller) -> None:
    first = [candidate["id"] for candidate in recorded["paths"][""]["next"]["candidates"][:12]]
    assert {str(token) for token in [*first, storyteller.tokenizer.end_id]} <= recorded["paths"].keys()
    second = recorded["paths"][f"{first[0]}"]["next"]["candidates"][2]["id"]
    end = recorded["paths"][f"{first[0]},{second}"]
    assert end["tokens"]["ids"][-2:] == [first[0], second]
    logits = np.frombuffer(base64.b64decode(end["next"]["logits"]), "<f4")
    trace = storyteller.trace(end["tokens"]["ids"])
    np.testing.assert_allclose(logits, trace.logits()[-1], atol=1e-4)


def test_endings_are_those_of_the_command_line(recorded: dict[str, Any], storyteller: tinystories.Storyteller) -> None:
    stories = storyteller.generate(TEXT, num=8, seed=1, max_tokens=400)
    assert recorded["endings"] == [story.continuation for story in stories]


def test_a_text_beyond_the_context_is_recorded_from_its_end(
    storyteller: tinystories.Storyteller, served: ServedModel
) -> None:
    answers = record(storyteller, served, TEXT * 20)
    assert len(answers["paths"][""]["tokens"]["ids"]) == storyteller.engine.config.n_ctx
    assert answers["paths"][""]["tokens"]["n_dropped"] > 0
    assert answers["endings"] == []
    assert len(answers["score"]["ranks"]) == storyteller.engine.config.n_ctx


def test_attention_that_no_page_could_hold_is_refused(
    storyteller: tinystories.Storyteller, served: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "MAX_ATTENTION_BYTES", 100)
    with pytest.raises(UserError, match="shorten --text"):
        record(storyteller, served, TEXT)


def test_the_page_holds_everything_and_may_ask_for_nothing(recorded: dict[str, Any]) -> None:
    page = build_page(recorded)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None
    scripts = re.findall(r'<script type="module">(.*?)</script>', page, re.DOTALL)
    styles = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    for directive, (content,) in (("script-src", scripts), ("style-src", styles)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}';" in policy[1]
    assert policy[1].startswith("default-src 'none';")
    assert "unsafe" not in policy[1]
    assert "'self'" not in policy[1]
    outside = page.replace(scripts[0], "").replace(styles[0], "")
    assert not re.search(r"\bsrc=|https?:|href=\"(?!data:)", outside)
    assert not re.search(r"\bon\w+=\"", outside)
    data = re.search(r'<script id="recording"[^>]*>([^<]+)</script>', page)
    assert data is not None
    assert json.loads(zlib.decompress(base64.b64decode(data[1]))) == json.loads(json.dumps(recorded))


def test_modules_are_joined_in_the_order_of_their_use() -> None:
    script = join_modules(PAGE, "lab.js")
    assert not re.search(r"^\s*(?:import|export)\b|\bfrom\s*[\"']\.", script, re.MULTILINE)
    joined = re.findall(r'^modules\["([^"]+)"\] = ', script, re.MULTILINE)
    assert joined[-1] == "lab.js"
    assert len(joined) == len(set(joined))
    assert set(joined) == {
        path.relative_to(PAGE).as_posix() for path in PAGE.rglob("*js") if path.name not in ("story.js", "uplot.js")
    }
    for name, user in re.findall(r'= modules\["([^"]+)"\];(?=(.*))', script):
        assert name in joined, user


def test_the_command_writes_the_page(model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    words = ("lab", str(model_folder), "--text", TEXT, "--out", str(path), "--threads", "1")
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
    assert str(path) in result.stdout
    first = path.read_bytes()
    assert first.startswith(b"<!doctype html>")
    assert run_command(*words).returncode == 0  # replaces it
    assert path.read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "A"], "belong together"),
        (["--out", "page.html"], "belong together"),
        (["--text", "A", "--out", "nowhere/page.html"], "does not exist"),
        (["--text", "a\udc80", "--out", "page.html"], "--text"),
    ],
)
def test_mistakes_are_one_line(model_folder: Path, tmp_path: Path, words: list[str], message: str) -> None:
    assert message in one_line_error(run_command("lab", str(model_folder), *words, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []

"""The lab's endpoints for experiments: two texts, two models, the quiz, tokenizers. Numbers are the Python API's."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from serve_helpers import Running, Serve, post_to_lab

import tinystories
from tinystories.data import gpt2_cache
from tinystories.evaluate.tasks import score_items
from tinystories.serve.lab.other_models import MAX_KEPT, OtherModels
from tinystories.serve.lab.quiz import CHOSEN, build_quiz
from tinystories.serve.lab.run_metrics import RunProblemError
from tinystories.serve.lab.runs import Run

SHARED_GPT2 = Path(__file__).parents[2].parent / "shared" / "gpt2"
BOY, GIRL = "Once there was a boy. The boy", "Once there was a girl. The girl"


@pytest.fixture(scope="module")
def server(serve_model: Serve, trained_run: Path) -> Iterator[Running]:
    newest = trained_run / "checkpoints" / "step-0000012"
    with serve_model(precision="fp32", runs_folder=trained_run.parent, compare_model=newest) as running:
        yield running


@pytest.fixture(scope="module")
def storyteller(model_folder: Path) -> tinystories.Storyteller:
    return tinystories.load(model_folder, engine="cpu", precision="fp32", threads=1)


def test_two_texts_side_by_side(server: Running, storyteller: tinystories.Storyteller) -> None:
    answer = post_to_lab(server, "compare", a={"text": BOY}, b={"text": GIRL}, top=6)
    assert answer["same_tokens"]
    steps = [storyteller.next_token(text) for text in (BOY, GIRL)]
    best = {token for step in steps for token in np.argsort(-step.model_probs)[:6].tolist()}
    assert {row["id"] for row in answer["next"]} == best
    for row in answer["next"]:
        assert row["a"] == pytest.approx(float(steps[0].model_probs[row["id"]]), abs=1e-5)
        assert row["b"] == pytest.approx(float(steps[1].model_probs[row["id"]]), abs=1e-5)
    overlap = float(np.minimum(steps[0].model_probs, steps[1].model_probs).sum())
    assert answer["overlap"] == pytest.approx(overlap, abs=1e-3)
    assert [max(row["a"], row["b"]) for row in answer["next"]] == sorted(
        (max(row["a"], row["b"]) for row in answer["next"]), reverse=True
    )
    assert answer["a"]["text"] == BOY
    assert answer["b"]["next_entropy_bits"] == pytest.approx(steps[1].entropy_bits, abs=1e-3)
    same = post_to_lab(server, "compare", a={"text": BOY}, b={"text": BOY})
    assert same["overlap"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("other", [{"run": "tiny", "step": 12}, {"compare": True}, {"run": "tiny"}])
def test_two_models_side_by_side(
    server: Running, storyteller: tinystories.Storyteller, trained_run: Path, other: dict[str, object]
) -> None:
    answer = post_to_lab(server, "compare", a={"text": BOY}, b={"text": BOY} | other)
    second = tinystories.load(trained_run, engine="cpu", precision="fp32", threads=1)
    for side, reader in (("a", storyteller), ("b", second)):
        trace = reader.trace(BOY)
        assert answer[side]["surprise_bits"][1:] == pytest.approx(trace.surprise_bits[1:].tolist(), abs=1e-3)
        assert answer[side]["bits_per_byte"] == pytest.approx(trace.bits_per_byte, abs=1e-3)
    assert answer["a"]["name"] == "small"
    assert answer["b"]["name"] != "small"
    assert answer["same_tokens"]  # both have the tokenizer of the bundled stories


def test_models_with_other_tokens_have_no_common_list(serve_model: Serve) -> None:
    from tinystories.checkpoint import BUNDLED_MODEL

    with serve_model(precision="fp32", compare_model=BUNDLED_MODEL) as running:
        assert running.client.request("GET", "/lab/api/compare")[1] == {"name": "bundled"}
        answer = post_to_lab(running, "compare", a={"text": BOY}, b={"text": BOY, "compare": True})
    assert (answer["same_tokens"], answer["next"]) == (False, None)
    assert len(answer["a"]["ids"]) > len(answer["b"]["ids"])
    assert answer["a"]["next"][0][1]


def test_a_text_beyond_the_context_and_none_at_all(server: Running) -> None:
    answer = post_to_lab(server, "compare", a={"text": BOY * 40}, b={"text": ""})
    assert answer["a"]["n_dropped"] > 0
    assert len(answer["a"]["surprise_bits"]) == len(answer["a"]["pieces"]) == 96
    assert answer["b"]["surprise_bits"] == [None]
    assert answer["b"]["bits_per_byte"] is None


@pytest.mark.parametrize(
    ("name", "fields", "status"),
    [
        ("compare", {"a": {"text": "x"}}, 400),
        ("compare", {"a": {"text": "x"}, "b": {"text": 5}}, 400),
        ("compare", {"a": {"text": "x"}, "b": {"text": "x", "run": "nothing"}}, 404),
        ("compare", {"a": {"text": "x"}, "b": {"text": "x", "run": "../tiny"}}, 404),
        ("compare", {"a": {"text": "x"}, "b": {"text": "x", "run": "tiny", "step": 7}}, 400),
        ("compare", {"a": {"text": "x"}, "b": {"text": "x", "run": "tiny", "step": -1}}, 400),
        ("compare", {"a": {"text": "x"}, "b": {"text": "x"}, "top": 41}, 400),
        ("runs/nothing/score", {"text": "x"}, 404),
        ("runs/tiny/score", {}, 400),
        ("quiz", {"item": -1}, 400),
        ("quiz", {"item": 20}, 400),
        ("split", {"text": "x" * 20_001}, 400),
        ("split", {"text": "x", "model": {"run": "nothing"}}, 404),
    ],
)
def test_what_is_wrong_is_refused(server: Running, name: str, fields: dict[str, object], status: int) -> None:
    got, answer, _ = server.client.request("POST", f"/lab/api/{name}", fields)
    assert (got, bool(answer["error"]["message"])) == (status, True)


def test_without_a_second_model_that_is_said(serve_model: Serve) -> None:
    with serve_model() as running:
        assert running.client.request("GET", "/lab/api/compare")[1] == {"name": None}
        fields = {"a": {"text": "x"}, "b": {"text": "x", "compare": True}}
        status, answer, _ = running.client.request("POST", "/lab/api/compare", fields)
        assert (status, "--compare MODEL" in answer["error"]["message"]) == (400, True)


def test_an_engine_without_weights_is_told_apart(serve_chaotic: Serve) -> None:
    with serve_chaotic() as running:
        for name, fields in (("compare", {"a": {"text": "x"}, "b": {"text": "x"}}), ("quiz", {"item": 0})):
            assert running.client.request("POST", f"/lab/api/{name}", fields)[0] == 501
        assert post_to_lab(running, "split", text="The cat")["tokenizers"]


def test_the_quiz_asks_without_its_answers(server: Running) -> None:
    status, answer, _ = server.client.request("GET", "/lab/api/quiz")
    assert status == 200
    assert len(answer["items"]) == len(CHOSEN)
    for item, (task, original) in zip(answer["items"], build_quiz(), strict=True):
        assert set(item) == {"task", "context", "before", "after", "words"}
        assert item["task"] == task
        assert item["words"] == sorted((original.answer, original.distractor))
        assert item["context"] == original.context


def test_the_quiz_has_the_scores_of_the_tasks(server: Running, storyteller: tinystories.Storyteller) -> None:
    items = [item for _, item in build_quiz()]
    scores = score_items(storyteller.engine, storyteller.tokenizer, items)
    for number in (0, 7, len(items) - 1):
        answer = post_to_lab(server, "quiz", item=number)
        assert (answer["answer"], answer["distractor"]) == (items[number].answer, items[number].distractor)
        log_odds = float(scores.in_story[number])
        assert answer["log_odds"] == pytest.approx(log_odds, abs=1e-3)
        assert answer["prob"] == pytest.approx(1 / (1 + np.exp(-log_odds)), abs=1e-3)
        assert answer["prob_alone"] == pytest.approx(1 / (1 + np.exp(-scores.sentence_alone[number])), abs=1e-3)
        assert answer["is_model_right"] == (log_odds > 0)


def test_a_text_is_split_as_each_tokenizer_splits_it(server: Running, storyteller: tinystories.Storyteller) -> None:
    text = "The naïve 🐈 sat.\nUnbelievable!"
    answer = post_to_lab(server, "split", text=text, model={"compare": True})
    own, second, *_ = answer["tokenizers"]
    assert own["n_tokens"] == len(storyteller.tokenizer.encode(text)) == second["n_tokens"]
    assert (own["name"], own["vocab_size"], own["n_bytes"]) == ("small", 400, len(text.encode()))
    units = text.encode("utf-16-le")
    parts = [units[2 * piece["start"] : 2 * piece["end"]].decode("utf-16-le") for piece in own["pieces"]]
    assert "".join(parts) == text
    assert len(post_to_lab(server, "split", text="a b " * 4000)["tokenizers"][0]["pieces"]) == 4096


def test_gpt2_is_read_only_from_files_that_are_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    environment = {"HF_HOME": str(tmp_path), "TIKTOKEN_CACHE_DIR": str(tmp_path / "cache")}
    assert gpt2_cache.load_cached_gpt2(environment) is None
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / gpt2_cache.CACHED_MERGES).write_text("#version\na b\n")  # not the published file
    assert gpt2_cache.load_cached_gpt2(environment) is None
    assert sorted(os.listdir(tmp_path / "cache")) == [gpt2_cache.CACHED_MERGES]


def test_a_small_table_of_merges_is_a_tokenizer() -> None:
    tokenizer = gpt2_cache.build_gpt2("#version: 0.2\nt h\nth e\nĠ the\n")
    assert tokenizer.encode("the the") == [257, 258]
    assert tokenizer.end_id == 259


def test_the_cached_gpt2_is_the_one_that_tiktoken_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", str(SHARED_GPT2))
    if not (Path(folder) / gpt2_cache.CACHED_MERGES).is_file():
        pytest.skip("needs ../shared/gpt2 or TIKTOKEN_CACHE_DIR")
    from tinystories.data.build_tokenizer import load_gpt2

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", folder)
    cached = gpt2_cache.load_cached_gpt2()
    assert cached is not None
    assert cached.sha256 == load_gpt2().sha256


def test_models_are_kept_until_others_are_used(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = OtherModels(None)
    run = Run(trained_run.parent, trained_run.name)
    first = models.load_checkpoint(run, 4)
    assert models.load_checkpoint(run, 4) is first
    assert models.load_checkpoint(run, 8) is not first
    assert len(models.kept) == 2 <= MAX_KEPT
    monkeypatch.setattr("tinystories.serve.lab.other_models.MAX_KEPT", 1)
    models.load_checkpoint(run, 12)
    assert len(models.kept) == 1
    monkeypatch.setattr("tinystories.serve.lab.other_models.MAX_MODEL_BYTES", 1000)
    with pytest.raises(RunProblemError, match="too large for the lab"):
        models.load_checkpoint(run, 4)

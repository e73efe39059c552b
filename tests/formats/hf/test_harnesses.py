"""Exported models in programs that measure and take apart: lm-evaluation-harness and TransformerLens."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from format_helpers import bundle_of

from tinystories.config import ModelConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.exports import export
from tinystories.model import GPT

pytestmark = [pytest.mark.interop, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module", params=["modern", "classic"])
def exported(
    request: pytest.FixtureRequest,
    tiny: Callable[..., ModelConfig],
    awake: Callable[[ModelConfig], GPT],
    sample_data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[ModelBundle, Path]:
    """A model, and the folder that transformers reads."""
    tokenizer = Tokenizer.load(sample_data)
    gpt = awake(tiny(architecture=request.param, vocab_size=tokenizer.vocab_size, n_ctx=256))
    model = bundle_of(gpt, tokenizer)
    out = tmp_path_factory.mktemp("hf") / request.param
    export(model, "hf", out)
    return model, out


def test_lm_eval_finds_the_likelihoods_that_we_find(
    exported: tuple[ModelBundle, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which of four endings is likeliest, for some stories of the task in benchmarks/endings."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    model, folder = exported
    monkeypatch.chdir(ROOT)
    found: Any = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder), "device": "cpu", "dtype": "float32", "add_bos_token": False},
        tasks=["story_endings"],
        task_manager=TaskManager(include_path=str(ROOT / "benchmarks" / "endings"), include_defaults=False),
        limit=3,
        bootstrap_iters=0,
    )
    for sample in found["samples"]["story_endings"]:
        begin = model.tokenizer.encode(sample["doc"]["beginning"])
        for ending, answer in zip(sample["doc"]["endings"], sample["filtered_resps"], strict=True):
            end = model.tokenizer.encode(ending)
            assert begin + end == model.tokenizer.encode(sample["doc"]["beginning"] + ending)
            assert answer[0] == pytest.approx(loglikelihood(model, begin, end), rel=1e-4)
    assert 0 <= found["results"]["story_endings"]["acc,none"] <= 1


def loglikelihood(model: ModelBundle, begin: list[int], end: list[int]) -> float:
    """Of `end` after `begin`, in nats; what the context cannot hold is left out at the front."""
    ids = (begin + end)[-model.config.n_ctx - 1 :]
    logits = model.logits(ids[:-1]).astype(np.float64)[-len(end) :]
    logprobs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    return float(logprobs[np.arange(len(end)), end].sum())


def test_the_endings_are_those_of_the_bundled_stories(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "endings")
    import json

    import make

    assert [json.loads(line) for line in make.OUT.read_text(encoding="utf-8").splitlines()] == list(make.tasks())


def test_transformer_lens_hooks_a_model_that_says_the_same(exported: tuple[ModelBundle, Path]) -> None:
    pytest.importorskip("transformer_lens")
    from transformer_lens.model_bridge import TransformerBridge

    model, folder = exported
    lens: Any = TransformerBridge.boot_transformers(str(folder), device="cpu")
    ids = model.tokenizer.encode("Once upon a time there was a little bear.")
    with torch.no_grad():
        logits, cache = lens.run_with_cache(torch.tensor([ids]))
    assert np.abs(logits[0].numpy() - model.logits(ids)).max() <= 1e-4
    for layer in range(model.config.n_layer):
        pattern = cache["pattern", layer][0]
        assert pattern.shape == (model.config.n_head, len(ids), len(ids))
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:2]))
        assert not pattern.triu(1).any()

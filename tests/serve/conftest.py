"""Servers with engines whose next token is known, and some with real models; a browser."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from serve_helpers import GatedEngine, Running, Serve, Watch, describe, serving

import tinystories
from tinystories import checkpoint
from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.config import Config, DataConfig, ModelConfig, SamplingConfig, TrainConfig
from tinystories.data.build_tokenizer import build_from_spec
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.select import load_engine
from tinystories.files import atomic_directory
from tinystories.model import GPT
from tinystories.serve.model import ServedModel
from tinystories.train.run import train

TEXT = "Once upon a time there was a cat. The cat sat on a mat and was happy. “Hello”, said the 🐈 to the naïve dog."
CERTAINTY = 30  # what the logits of a random model are multiplied by


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return build_from_spec("bpe:300", lambda: [TEXT] * 3)


@pytest.fixture(scope="session")
def serve_chaotic(tokenizer: Tokenizer) -> Serve:
    """Random logits, others for every content of a slot; END is as likely as `end` says."""

    def start(*, end: float = 0.0, n_ctx: int = 64, n_slots: int = 2, **settings: Any) -> Any:
        def rule(ids: list[int]) -> np.ndarray:
            logits = np.random.default_rng(ids).normal(size=tokenizer.vocab_size).astype(np.float32)
            logits[tokenizer.end_id] = np.log(max(end, 1e-30) * tokenizer.vocab_size)
            return logits

        engine = GatedEngine(rule, tokenizer.vocab_size, n_ctx=n_ctx, n_slots=n_slots)
        return serving(engine, describe(tokenizer, engine), **settings)

    return start


@pytest.fixture
def chaotic(serve_chaotic: Serve) -> Iterator[Running]:
    with serve_chaotic() as running:
        yield running


@pytest.fixture(scope="session")
def serve_script(tokenizer: Tokenizer) -> Serve:
    """Says a text after any prompt, and then END; the prompt must not begin like the text."""

    def start(text: str, *, n_ctx: int = 512, n_slots: int = 2, **settings: Any) -> Any:
        script = tokenizer.encode(text)

        def rule(ids: list[int]) -> np.ndarray:
            n_said = next((n for n in range(len(script), 0, -1) if ids[-n:] == script[:n]), 0)
            logits = np.random.default_rng(len(ids)).normal(size=tokenizer.vocab_size).astype(np.float32)
            logits[script[n_said] if n_said < len(script) else tokenizer.end_id] = 40
            return logits

        engine = GatedEngine(rule, tokenizer.vocab_size, n_ctx=n_ctx, n_slots=n_slots)
        return serving(engine, describe(tokenizer, engine), **settings)

    return start


@pytest.fixture(scope="session")
def model_folder(
    awake: Callable[[ModelConfig], GPT], sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small random model."""
    model = awake(ModelConfig(vocab_size=400, n_ctx=96, n_layer=2, n_head=4, n_embd=32, n_ff=48, tied=False))
    folder = tmp_path_factory.mktemp("serve") / "model"
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(sample_data), SamplingConfig(temperature=1.5), {})
    return folder


@pytest.fixture(scope="session")
def certain_folder(
    awake: Callable[[ModelConfig], GPT], sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A small random model that is often nearly certain of the next token."""
    model = awake(ModelConfig(vocab_size=400, n_ctx=96, n_layer=2, n_head=4, n_embd=32, n_ff=48, tied=False))
    with torch.no_grad():
        model.lm_head.weight *= CERTAINTY
    folder = tmp_path_factory.mktemp("serve") / "certain"
    with atomic_directory(folder) as draft:
        checkpoint.write_model(draft, model, Tokenizer.load(sample_data), SamplingConfig(), {})
    return folder


@pytest.fixture(scope="session")
def serve_model(model_folder: Path) -> Serve:
    """An engine on the small model, or on another one."""

    def start(
        *,
        engine: str = "cpu",
        precision: str = "int8",
        n_slots: int = 4,
        folder: Path = model_folder,
        **settings: Any,
    ) -> Any:
        threads = 1 if engine == "cpu" else None
        config = EngineConfig(engine=engine, device="cpu", precision=precision, n_slots=n_slots, threads=threads)
        files, loaded = load_engine(folder, config)
        model = ServedModel.describe(files, name="small", engine_name=config.engine, precision=precision)
        return serving(loaded, model, **settings)

    return start


@pytest.fixture(scope="session")
def trained_run(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps with all of its checkpoints: 4, 8 and 12. It is alone in its folder."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    config = Config(
        model=ModelConfig(n_ctx=48, n_layer=2, n_head=2, n_embd=16, n_ff=32),
        data=DataConfig(dir=str(sample_data)),
        train=TrainConfig(
            steps=12,
            batch_size=4,
            micro_batch=4,
            log_every=2,
            eval_every=4,
            eval_stories=3,
            checkpoint_every=4,
            keep_checkpoints=9,
            sample_prompts=("The cat", "A dog"),
            sample_tokens=6,
            device="cpu",
            precision="fp32",
        ),
    )
    train(config, run)
    return run


@pytest.fixture(scope="session")
def serve_folder(
    awake: Callable[[ModelConfig], GPT], sample_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Serve:
    """A random model of given sizes."""

    def start(**sizes: Any) -> Any:
        folder = tmp_path_factory.mktemp("sized") / "model"
        with atomic_directory(folder) as draft:
            model = awake(ModelConfig(vocab_size=400, **sizes))
            checkpoint.write_model(draft, model, Tokenizer.load(sample_data), SamplingConfig(), {})
        config = EngineConfig(engine="cpu", device="cpu", precision="fp32", n_slots=2, threads=1)
        files, engine = load_engine(folder, config)
        return serving(engine, ServedModel.describe(files, name="sized", engine_name="cpu", precision="fp32"))

    return start


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a path of a server. Afterwards no request went to another origin, and the console holds no errors but those
    of requests that were meant to fail (`allow`). The lab's tour is over unless this is the `first_visit`."""
    watches: list[tuple[Watch, str, str | None]] = []
    contexts = []

    def start(
        running: Running, path: str = "/", *, allow: str | None = None, first_visit: bool = False, **options: Any
    ) -> Any:
        origin = f"http://127.0.0.1:{running.port}"
        if path.startswith("/lab") and not first_visit:
            visited = {"origin": origin, "localStorage": [{"name": "tour", "value": "done"}]}
            options = {"storage_state": {"cookies": [], "origins": [visited]}} | options
        context = browser.new_context(**({"viewport": {"width": 1200, "height": 850}} | options))
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        watches.append((Watch(page), origin, allow))
        page.goto(f"{origin}{path}")
        return page

    yield start
    for context in contexts:
        context.close()
    for watch, origin, allow in watches:
        assert {one for one in watch.origins if not one.startswith(("blob:", "data:"))} <= {origin}
        assert [error for error in watch.errors if allow is None or allow not in error] == []


@pytest.fixture(scope="module")
def storyteller() -> tinystories.Storyteller:
    """The bundled model, as the server of `lab_server` has it."""
    return tinystories.load(engine="cpu", precision="int8", threads=1)


@pytest.fixture(scope="module")
def lab_server() -> Iterator[Running]:
    """A server with the bundled model."""
    config = EngineConfig(engine="cpu", device="cpu", precision="int8", n_slots=8, threads=1)
    files, engine = load_engine(BUNDLED_MODEL, config)
    with serving(engine, ServedModel.describe(files, name="bundled", engine_name="cpu", precision="int8")) as running:
        yield running

"""What all tests share: tiny shapes, and the bundled stories as prepared data."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser_helpers import is_missing
from hypothesis import HealthCheck, settings

from tinystories.config import ModelConfig
from tinystories.data.prepare import prepare
from tinystories.model import GPT

os.environ.setdefault("PYTEST_TIMEOUT", "300")  # not an option: pytest must run where pytest-timeout is missing

# Hypothesis tries the same examples in every run, however slow the machine is.
settings.register_profile("certain", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("certain")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by Playwright: one for all tests, since a process can have only one Playwright."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        is_missing("playwright")
    executable = shutil.which("chromium")
    if executable is None:
        is_missing("chromium")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Seed torch before each test: what it draws does not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def sample_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled stories prepared with a vocabulary of 400; some are held out."""
    out = tmp_path_factory.mktemp("data") / "sample"
    prepare("sample", out, tokenizer="bpe:400", val_fraction=0.05, progress=False)
    return out


@pytest.fixture(scope="session")
def awake() -> Callable[[ModelConfig], GPT]:
    """A model in eval mode with random norms and biases and large matrices: nothing is near zero or one."""

    def build(config: ModelConfig) -> GPT:
        generator = torch.Generator().manual_seed(5)
        model = GPT(config).eval()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim == 1:
                    weight.uniform_(0.5, 1.5, generator=generator)
                else:
                    weight.normal_(std=weight.shape[1] ** -0.5, generator=generator)
        return model

    return build


@pytest.fixture(scope="session")
def trained(sample_data: Path) -> Callable[[ModelConfig], tuple[GPT, np.ndarray]]:
    """A model after a few steps on the bundled stories (vocabulary of 400), and 512 ids of these."""
    ids = np.fromfile(sample_data / "train.bin", dtype=np.uint16).astype(np.int64)

    def build(config: ModelConfig) -> tuple[GPT, np.ndarray]:
        torch.manual_seed(0)
        model = GPT(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        losses = []
        for step in range(30):
            rows = np.stack([ids[at : at + 129] for at in range(step * 64, step * 64 + 8 * 400, 400)])
            tokens = torch.from_numpy(rows)
            logits = model.logits(model(tokens[:, :-1]))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0] - 1, "it must have learned something"
        return model.eval(), ids[:512]

    return build


@pytest.fixture(scope="session")
def tiny() -> Callable[..., ModelConfig]:
    """The smallest config that has more than one of everything; any setting can be changed."""

    def build(**changes: object) -> ModelConfig:
        small: dict[str, object] = {"vocab_size": 61, "n_ctx": 24, "n_layer": 2, "n_head": 4, "n_embd": 24, "n_ff": 40}
        return ModelConfig(**(small | changes))  # type: ignore[arg-type]

    return build

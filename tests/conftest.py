"""What all tests share: tiny shapes, and the bundled stories as prepared data."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tinystories.config import ModelConfig
from tinystories.data.prepare import prepare
from tinystories.model import GPT


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
def tiny() -> Callable[..., ModelConfig]:
    """The smallest config that has more than one of everything; any setting can be changed."""

    def build(**changes: object) -> ModelConfig:
        small: dict[str, object] = {"vocab_size": 61, "n_ctx": 24, "n_layer": 2, "n_head": 4, "n_embd": 24, "n_ff": 40}
        return ModelConfig(**(small | changes))  # type: ignore[arg-type]

    return build

"""A run small enough for a test: two layers of 16, a few steps."""

from pathlib import Path

import pytest

from tinystories.config import Config, DataConfig, ModelConfig, TrainConfig


@pytest.fixture
def config(sample_data: Path) -> Config:
    return Config(
        model=ModelConfig(n_ctx=32, n_layer=2, n_head=2, n_embd=16, n_ff=32, dropout=0.1),
        data=DataConfig(dir=str(sample_data)),
        train=TrainConfig(
            steps=12,
            batch_size=8,
            micro_batch=4,
            log_every=2,
            eval_every=5,
            eval_stories=3,
            checkpoint_every=4,
            sample_prompts=("The cat",),
            sample_tokens=5,
            device="cpu",
            precision="fp32",
        ),
    )

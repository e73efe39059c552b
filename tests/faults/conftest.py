"""A run of a second: one layer of 16."""

from pathlib import Path

import pytest

from tinystories.config import Config, DataConfig, ModelConfig, TrainConfig


@pytest.fixture
def config(sample_data: Path) -> Config:
    return Config(
        model=ModelConfig(n_ctx=32, n_layer=1, n_head=2, n_embd=16, n_ff=32),
        data=DataConfig(dir=str(sample_data)),
        train=TrainConfig(
            steps=4,
            batch_size=2,
            micro_batch=2,
            log_every=1,
            eval_every=2,
            eval_stories=2,
            checkpoint_every=2,
            sample_prompts=("The cat",),
            sample_tokens=4,
            device="cpu",
            precision="fp32",  # spares the measurement of routes
        ),
    )

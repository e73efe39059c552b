"""Automatic learning rates scale with the model width and the batch size."""

import dataclasses

import pytest

from tinystories.config import Config, ModelConfig, OptimConfig, TrainConfig
from tinystories.config_file import load_config
from tinystories.train.optimizer.learning_rate import resolve_auto_rates


def rates(n_embd: int = 192, batch_size: int = 8, **optim: object) -> tuple[float, float]:
    """Return the learning rates of AdamW and of Muon."""
    config = Config(
        model=ModelConfig(n_embd=n_embd, n_head=2),
        optim=OptimConfig(**optim),  # type: ignore[arg-type]
        train=TrainConfig(batch_size=batch_size, micro_batch=1),
    )
    optim_config = resolve_auto_rates(config).optim
    assert isinstance(optim_config.learning_rate, float)
    assert isinstance(optim_config.muon_rate, float)
    return optim_config.learning_rate, optim_config.muon_rate


@pytest.mark.parametrize("kind", ["muon", "adamw"])
def test_rates_grow_with_the_root_of_the_batch_but_not_without_end(kind: str) -> None:
    small, large, huge = (rates(batch_size=rows, kind=kind) for rows in (8, 32, 4096))
    assert large == pytest.approx([2 * rate for rate in small], rel=0.01)
    assert huge == large


@pytest.mark.parametrize(("kind", "ratio"), [("muon", 2.0), ("adamw", 4.0)])
def test_wider_models_take_a_smaller_rate_of_adamw_and_the_same_of_muon(kind: str, ratio: float) -> None:
    narrow, wide = rates(n_embd=128, kind=kind), rates(n_embd=512, kind=kind)
    assert narrow[0] == pytest.approx(ratio * wide[0], rel=0.01)
    assert narrow[1] == wide[1]


def test_numbers_that_were_asked_for_stay() -> None:
    assert rates(learning_rate=0.123456, muon_rate=7.0) == (0.123456, 7.0)
    assert rates(n_embd=64, learning_rate=0.123456)[1] == rates(n_embd=64)[1]


def test_rates_that_are_numbers_are_left_alone() -> None:
    config = resolve_auto_rates(load_config("small"))
    assert resolve_auto_rates(config) == config
    more = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=64))
    assert resolve_auto_rates(more).optim == config.optim, "a resumed run keeps its rates"

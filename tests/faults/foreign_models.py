"""Model folders as other programs write them, with tokenizers of any special tokens."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from tinystories import checkpoint
from tinystories.config import ModelConfig
from tinystories.formats.hf.mapping import to_hf_config_and_weights
from tinystories.model import GPT

STORY = "the cat saw the dog and ran to the house to hide"
LLAMA: dict[str, Any] = {"qk_norm": False, "norm_eps": 1e-5}
GPT2: dict[str, Any] = {"architecture": "classic", "learned_positions": True, "activation": "gelu_tanh"}
SIZES: dict[str, Any] = {"n_ctx": 64, "n_layer": 1, "n_head": 2, "n_embd": 32, "n_ff": 64}
Awake = Callable[[ModelConfig], GPT]


def byte_level(*special_tokens: str, first: bool = True) -> tokenizers.Tokenizer:
    """A byte-level BPE of 300 ids or fewer; its special tokens have the first ids, or else the last ones."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(special_tokens) if first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([STORY] * 20, trainer)
    if not first:
        backend.add_special_tokens(list(special_tokens))
    return backend


def write_folder(
    folder: Path, backend: tokenizers.Tokenizer, model: GPT, files: dict[str, dict[str, Any]] | None = None
) -> Path:
    """Write a model and a tokenizer as transformers does; `files` are changes of its JSON files."""
    weights = {name: weight.numpy(force=True) for name, weight in checkpoint.state_dict_to_save(model).items()}
    settings, hf_weights = to_hf_config_and_weights(model.config, weights)
    folder.mkdir()
    checkpoint.save_weights(folder / "model.safetensors", hf_weights)
    backend.save(str(folder / "tokenizer.json"))
    for name, values in ({"config.json": {}} | (files or {})).items():
        (folder / name).write_text(json.dumps((settings if name == "config.json" else {}) | values))
    return folder


def bundle_weights(model: GPT) -> dict[str, np.ndarray]:
    return {name: weight.numpy(force=True) for name, weight in checkpoint.state_dict_to_save(model).items()}

"""`modern` as a GGUF file, which llama.cpp reads (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from tinystories.config import ModelConfig
from tinystories.errors import UserError

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(config: ModelConfig, weights: Mapping[str, npt.NDArray[Any]], path: Path) -> None:
    """The model in fp32, as architecture `qwen3`, without a vocabulary: it is given ids and gives ids."""
    if config.architecture == "classic":
        raise UserError("a GGUF file is only made of models with model.architecture = modern")
    if not config.qk_norm:
        raise UserError("a GGUF file needs a model with QK-norm (model.qk_norm = true)")
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells every step
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_name("TinyStories")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_base)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    for name, weight in weights.items():
        writer.add_tensor(gguf_name(name), np.ascontiguousarray(weight))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_name(name: str) -> str:
    top = {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}
    top["lm_head.weight"] = "output.weight"
    if name in top:
        return top[name]
    _, layer, rest = name.split(".", 2)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def write(model: "Portable", path: Path, precision: str) -> None:
    raise NotImplementedError


def logits(path: Path, ids: list[int]) -> npt.NDArray[Any]:
    raise NotImplementedError


def read(path: Path, tokenizer: Path | None) -> "Portable":
    raise NotImplementedError

"""`TraceModel`: both architectures in NumPy, to be read and to be looked into. `model/gpt.py` is the same in torch.

Letters in shapes: T tokens, C = n_embd, H = n_head, D = head_dim, V vocabulary.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from tinystories.checkpoint import ModelFiles
from tinystories.config import ModelConfig
from tinystories.engine.trace.layers import (
    Floats,
    activate,
    apply_rope,
    causal_mask,
    layer_norm,
    rms_norm,
    silu,
    softmax,
)
from tinystories.position_tables import build_rope_tables, build_sinusoid_table
from tinystories.weights.load import Precision, dequantize_weights, load_fp32, load_or_quantize
from tinystories.weights.names import EMBEDDING, LM_HEAD, POSITION_EMBEDDING

Array = npt.NDArray[Any]


class TraceModel:
    """A GPT that computes one sequence from position 0, block by block, in fp32.

    The methods are functions of their arguments and may be called from any thread.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, Array]) -> None:
        """Quantized weights (of `load_or_quantize`) are dequantized; those of `load_fp32` are used where they are."""
        self.config = config
        self.weights = dequantize_weights(config, weights)

    @classmethod
    def load(cls, files: ModelFiles, precision: Precision = "fp32") -> "TraceModel":
        """Load a model directory; with precision int8 or int4, its weights are rounded to these first."""
        weights = load_fp32(files) if precision == "fp32" else load_or_quantize(files, precision)
        return cls(files.config, weights)

    def embed(self, ids: npt.NDArray[np.int64]) -> Floats:
        """Return the token embeddings (T, C); `classic` adds position embeddings to them."""
        config, x = self.config, self.weights[EMBEDDING][ids]
        if config.learned_positions:
            return x + self.weights[POSITION_EMBEDDING][: len(ids)]
        if config.architecture == "classic":
            return x + build_sinusoid_table(len(ids), config.n_embd)
        return x

    def block(self, x: Floats, layer: int, ablated_heads: Collection[int] = (), first: int = 0) -> Floats:
        """Return the hidden states (T - first, C) of the tokens from `first` on after a block, from those of all T
        tokens before it.

        The outputs of `ablated_heads` are replaced by zeros.
        """
        new = x[first:] + self.attention(x, layer, ablated_heads, first)
        return new + self.feed_forward(new, layer)

    def attention(self, x: Floats, layer: int, ablated_heads: Collection[int] = (), first: int = 0) -> Floats:
        """Return what the attention of a block adds to the hidden states x (T, C), for the tokens from `first` on."""
        config, name, n_new = self.config, f"layers.{layer}.self_attn", len(x) - first
        normed = self.norm(x, f"layers.{layer}.input_layernorm")
        q_HTD, k_HTD = self.queries_and_keys(normed, layer, first)
        v_HTD = self.split_heads(self.linear(normed, f"{name}.v_proj"))
        y_THD = np.zeros((n_new, config.n_head, config.head_dim), dtype=np.float32)
        mask = causal_mask(len(x), config.layer_window(layer))[first:]
        for head in range(config.n_head):
            if head not in ablated_heads:
                y_THD[:, head] = self.head_attention(q_HTD, k_HTD, head, mask) @ v_HTD[self.kv_head(head)]
        return self.linear(y_THD.reshape(n_new, -1), f"{name}.o_proj")

    def attention_probs(self, x: Floats, layer: int) -> Floats:
        """Return the attention probabilities (H, T, T) of a block from the hidden states x (T, C) before it.

        Row i of a head says how much token i takes from each token; it sums to 1.
        """
        q_HTD, k_HTD = self.queries_and_keys(self.norm(x, f"layers.{layer}.input_layernorm"), layer)
        mask = causal_mask(len(x), self.config.layer_window(layer))
        return np.stack([self.head_attention(q_HTD, k_HTD, head, mask) for head in range(self.config.n_head)])

    def queries_and_keys(self, normed: Floats, layer: int, first: int = 0) -> tuple[Floats, Floats]:
        """Return the queries (H, T - first, D) of the tokens from `first` on, and the keys (KV heads, T, D) of all T,
        of a block, with their norms and rotations.

        `normed` (T, C): the hidden states before the block, after its first norm.
        """
        config, name = self.config, f"layers.{layer}.self_attn"
        q = self.split_heads(self.linear(normed[first:], f"{name}.q_proj"))
        k = self.split_heads(self.linear(normed, f"{name}.k_proj"))
        if config.architecture == "modern":
            if config.qk_norm:
                q, k = self.norm(q, f"{name}.q_norm"), self.norm(k, f"{name}.k_norm")
            cos, sin = build_rope_tables(len(normed), config.head_dim, config.rope_base)
            q, k = apply_rope(q, cos[first:], sin[first:]), apply_rope(k, cos, sin)
        return q, k

    def head_attention(self, q_HTD: Floats, k_HTD: Floats, head: int, mask: Floats) -> Floats:
        """Return the attention probabilities (queries, T) of one head."""
        scale = self.config.head_dim**-0.5 if self.config.scaled_scores else 1.0
        scores: Floats = (q_HTD[head] * scale) @ k_HTD[self.kv_head(head)].T
        scores += mask
        return softmax(scores)

    def kv_head(self, head: int) -> int:
        """Return the KV head of a head: with grouped-query attention, several heads share one."""
        return head * self.config.kv_heads // self.config.n_head

    def feed_forward(self, x: Floats, layer: int) -> Floats:
        """Return what the MLP of a block adds to the hidden states x (T, C)."""
        name = f"layers.{layer}.mlp"
        normed = self.norm(x, f"layers.{layer}.post_attention_layernorm")
        up = self.linear(normed, f"{name}.up_proj")
        if self.config.architecture == "classic":
            inner = activate(up, self.config.activation)
        else:
            inner = silu(self.linear(normed, f"{name}.gate_proj")) * up  # SwiGLU
        return self.linear(inner, f"{name}.down_proj")

    def logits(self, hidden: Floats) -> Floats:
        """Return the next-token logits (n, V) of hidden states (n, C) after any block.

        For the last block these are the model's logits; for others, the logit lens.
        """
        head = self.weights[EMBEDDING if self.config.tied else LM_HEAD]
        return self.norm(hidden, "norm") @ head.T

    def norm(self, x: Floats, name: str) -> Floats:
        """Apply a norm of the model over the last axis."""
        weight, eps = self.weights[f"{name}.weight"], self.config.norm_eps
        if self.config.architecture == "classic":
            return layer_norm(x, weight, self.weights[f"{name}.bias"], eps)
        return rms_norm(x, weight, eps)

    def linear(self, x: Floats, name: str) -> Floats:
        """Multiply x (T, in) by a weight matrix (out, in) and add its bias, if it has one."""
        y: Floats = x @ self.weights[f"{name}.weight"].T
        return y + self.weights[f"{name}.bias"] if f"{name}.bias" in self.weights else y

    def split_heads(self, x: Floats) -> Floats:
        """Reshape x (T, heads * D) to (heads, T, D)."""
        return x.reshape(len(x), -1, self.config.head_dim).transpose(1, 0, 2)

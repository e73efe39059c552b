"""The GPT model: two architectures that share one pre-norm transformer skeleton.

`classic`: sinusoidal positions, LayerNorm, ReLU, no bias on q, k, v, as in the original program. It also covers
GPT-2 (learned positions, GELU, biases) and GPT-Neo (unscaled attention scores, sliding window in every second block).
`modern`: rotary position embeddings (RoPE), RMSNorm (also on q and k), SwiGLU, grouped-query attention, no biases; the
layout of Qwen3.

Parameters have Hugging Face's names. This module is independent of files, text and devices.
Letters in shapes: B batch, T tokens in this call, S tokens visible to them, C = n_embd, H heads, D = head_dim, V vocab.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tinystories.config import ModelConfig
from tinystories.model.cache import KVCache, causal_mask
from tinystories.model.norm import RMSNorm
from tinystories.model.positional_encoding import apply_rope, build_rope_tables, build_sinusoid_table
from tinystories.model.recompute import gated_silu, gelu, recompute_in_backward, relu

CosSin = tuple[Tensor, Tensor]


def build_norm(config: ModelConfig, width: int) -> nn.Module:
    """Return the architecture's norm over the last axis: LayerNorm (`classic`) or RMSNorm (`modern`)."""
    if config.architecture == "classic":
        return nn.LayerNorm(width, eps=config.norm_eps)
    return RMSNorm(width, eps=config.norm_eps)


def fused_linear(x: Float[Tensor, "B T C"], *projections: nn.Linear) -> Tensor:
    """Apply several projections to x with a single matmul over their concatenated weights; do not split the result.

    Either all of them have a bias or none has.
    """
    weight = torch.cat([project.weight for project in projections])
    biases = tuple(project.bias for project in projections if project.bias is not None)
    bias = torch.cat(biases) if biases else None
    return F.linear(x, weight, bias)


class Attention(nn.Module):
    """Causal multi-head self-attention over the tokens of this call and, with a KV cache, over all earlier tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        is_classic = config.architecture == "classic"
        self.head_dim = config.head_dim
        self.enable_gqa = config.kv_heads < config.n_head
        self.scale = None if config.scaled_scores else 1.0  # None: PyTorch's default, 1/sqrt(D)
        self.q_proj = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=is_classic)
        use_qk_norm = config.qk_norm and not is_classic
        self.q_norm = build_norm(config, config.head_dim) if use_qk_norm else nn.Identity()
        self.k_norm = build_norm(config, config.head_dim) if use_qk_norm else nn.Identity()
        # In training: q, k and v from their joint projection, and attention. Set by `use_cpu_training_kernels`.
        self.training_split: Callable[[Tensor, CosSin], tuple[Tensor, Tensor, Tensor]] | None = None
        self.training_attention: Callable[..., Tensor] | None = None

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        cos_sin: CosSin | None,
        cache: KVCache | None,
        layer: int,
        positions: Int[Tensor, "B T"] | None,
        mask: Bool[Tensor, "#B 1 T S"] | None,
    ) -> Float[Tensor, "B T C"]:
        B, T, _ = x.shape
        if self.training and self.training_split is not None and cos_sin is not None and cache is None:
            qkv = fused_linear(x, self.q_proj, self.k_proj, self.v_proj)
            q_BHTD, k_BHTD, v_BHTD = self.training_split(qkv, cos_sin)
        else:
            q_BHTD, k_BHTD, v_BHTD = self.project_heads(x, cos_sin, with_cache=cache is not None)
        if cache is not None and positions is not None:
            k_BHTD, v_BHTD = cache.write(layer, k_BHTD, v_BHTD, positions)
        if self.training and self.training_attention is not None and mask is None:
            y_BHTD = self.training_attention(q_BHTD, k_BHTD, v_BHTD, self.scale)
        else:
            y_BHTD = F.scaled_dot_product_attention(
                q_BHTD,
                k_BHTD,
                v_BHTD,
                attn_mask=mask,
                is_causal=mask is None,
                scale=self.scale,
                enable_gqa=self.enable_gqa,
            )
        return self.o_proj(y_BHTD.transpose(1, 2).reshape(B, T, -1))

    def project_heads(
        self, x: Float[Tensor, "B T C"], cos_sin: CosSin | None, *, with_cache: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values (B, H, T, D); the first two normed and rotated."""
        B, T, _ = x.shape
        projections = self.q_proj, self.k_proj, self.v_proj
        # Training and scoring (many tokens): one wide matmul is faster than three narrow ones. Decoding (few tokens):
        # concatenating the weights would cost more than it saves.
        if with_cache:
            q, k, v = [project(x) for project in projections]
        else:
            sizes = [project.out_features for project in projections]
            q, k, v = fused_linear(x, *projections).split(sizes, dim=-1)
        q_BHTD = self.q_norm(q.view(B, T, -1, self.head_dim)).transpose(1, 2)
        k_BHTD = self.k_norm(k.view(B, T, -1, self.head_dim)).transpose(1, 2)
        v_BHTD = v.view(B, T, -1, self.head_dim).transpose(1, 2)
        if cos_sin is not None:
            q_BHTD, k_BHTD = apply_rope(q_BHTD, *cos_sin), apply_rope(k_BHTD, *cos_sin)
        return q_BHTD, k_BHTD, v_BHTD


class ClassicMLP(nn.Module):
    """Feed-forward of `classic`: activation(x W_up) W_down, with biases. The activation is ReLU or GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.up_proj = nn.Linear(config.n_embd, config.n_ff)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        hidden = self.up_proj(x)
        if self.activation == "relu":
            return self.down_proj(relu(hidden))
        activated = gelu(hidden, self.activation)
        with recompute_in_backward(activated, partial(gelu, hidden.detach(), self.activation)):
            return self.down_proj(activated)


class SwiGLU(nn.Module):
    """Feed-forward of `modern`: (silu(x W_gate) * (x W_up)) W_down (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.up_proj = nn.Linear(config.n_embd, config.n_ff, bias=False)
        self.down_proj = nn.Linear(config.n_ff, config.n_embd, bias=False)
        self.training_activation: Callable[[Tensor, Tensor], Tensor] | None = None  # see `use_cpu_training_kernels`

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        gate, up = self.gate_proj(x), self.up_proj(x)
        activation = self.training_activation if self.training and self.training_activation is not None else gated_silu
        hidden = activation(gate, up)
        with recompute_in_backward(hidden, partial(activation, gate.detach(), up.detach())):
            return self.down_proj(hidden)


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x)).

    In training both norms are recomputed in the backward pass instead of stored (activation checkpointing).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = build_norm(config, config.n_embd)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = build_norm(config, config.n_embd)
        self.mlp = ClassicMLP(config) if config.architecture == "classic" else SwiGLU(config)
        self.dropout: nn.Module = nn.Dropout(config.dropout) if config.dropout else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        cos_sin: CosSin | None,
        cache: KVCache | None,
        layer: int,
        positions: Int[Tensor, "B T"] | None,
        mask: Bool[Tensor, "#B 1 T S"] | None,
    ) -> Float[Tensor, "B T C"]:
        attention, mlp, norm_1, norm_2 = self.self_attn, self.mlp, self.input_layernorm, self.post_attention_layernorm
        normed = norm_1(x)
        with recompute_in_backward(normed, partial(norm_1, x.detach())):
            x = x + self.dropout(attention(normed, cos_sin, cache, layer, positions, mask))
        normed = norm_2(x)
        with recompute_in_backward(normed, partial(norm_2, x.detach())):
            return x + self.dropout(mlp(normed))


class GPT(nn.Module):
    """Decoder-only transformer. Call `hidden = model(tokens, cache)`, then `model.logits(hidden)`.

    The two are separate so that logits are computed only for the positions that need them.
    """

    # Dtype of cos and sin in training, where it differs from that of x; set by `use_cpu_training_kernels`.
    training_rope_dtype: torch.dtype | None = None
    sinusoid: Tensor
    rope_cos: Tensor
    rope_sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        assert config.vocab_size > 0, "vocab_size must be set before the model is built"
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.n_embd)
        self.dropout: nn.Module = nn.Dropout(config.dropout) if config.dropout else nn.Identity()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = build_norm(config, config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.lm_head.weight = self.embed_tokens.weight
        if config.learned_positions:
            self.embed_positions = nn.Embedding(config.n_ctx, config.n_embd)
        elif config.architecture == "classic":
            self.register_buffer("sinusoid", build_sinusoid_table(config.n_ctx, config.n_embd), persistent=False)
        else:
            cos, sin = build_rope_tables(config.n_ctx, config.head_dim, config.rope_base)
            self.register_buffer("rope_cos", cos, persistent=False)
            self.register_buffer("rope_sin", sin, persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize the weights as GPT-2 does; logits start near zero, so the first loss is ln(V).

        An untied embedding gets unit variance if sinusoids are added to it, to match their scale. A tied embedding is
        also the head, and a token's initial logit for itself is about std * C, so wide models get less than GPT-2's.
        """
        config = self.config
        if config.tied:
            embedding_std = min(0.02, 4 / config.n_embd)
        else:
            embedding_std = 1.0 if config.architecture == "classic" and not config.learned_positions else 0.02
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)
            elif name == "embed_tokens.weight":
                weight.normal_(std=embedding_std)
            elif name == "lm_head.weight":
                weight.normal_(std=1.0 / config.n_embd)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):  # each block adds two of these to the residual
                weight.normal_(std=0.02 / math.sqrt(2 * config.n_layer))
            else:
                weight.normal_(std=0.02)

    def forward(self, tokens: Int[Tensor, "B T"], cache: KVCache | None = None) -> Float[Tensor, "B T C"]:
        """Return the final hidden states of `tokens`, which continue the cached tokens; advance the cache by T.

        Without a cache the tokens are at positions 0..T-1. T plus the cached length must not exceed n_ctx.
        """
        T = tokens.shape[1]
        assert self.config.n_ctx >= T, "more tokens than fit in the context"
        positions = cache.next_positions(T) if cache is not None else None
        kv_len = T if cache is None else cache.kv_len
        mask = local_mask = None if positions is None else causal_mask(positions, kv_len)  # None: is_causal
        if 0 < self.config.window < kv_len:
            query_positions = torch.arange(T, device=tokens.device)[None] if positions is None else positions
            local_mask = causal_mask(query_positions, kv_len, self.config.window)
        x = self.embed_tokens(tokens)
        cos_sin = None
        if self.config.architecture == "classic":
            table = self.embed_positions.weight if self.config.learned_positions else self.sinusoid
            x = x + (table[:T] if positions is None else table[positions])
        elif positions is None:
            cos_sin = (self.rope_cos[:T], self.rope_sin[:T])
        else:
            cos_sin = (self.rope_cos[positions][:, None], self.rope_sin[positions][:, None])
        if cos_sin is not None:
            rope_dtype = self.training_rope_dtype if self.training and self.training_rope_dtype is not None else x.dtype
            cos_sin = (cos_sin[0].to(rope_dtype), cos_sin[1].to(rope_dtype))
        x = self.dropout(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos_sin, cache, i, positions, local_mask if self.config.layer_window(i) else mask)
        if cache is not None:
            cache.advance(T)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "*rest C"]) -> Float[Tensor, "*rest V"]:
        """Return the next-token logits of `hidden`, the output of `forward` at any selection of positions."""
        return self.lm_head(hidden)

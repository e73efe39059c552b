"""One token at a time on a CPU: a model's weights, packed for products of few rows.

Such a product reads its matrix once and does little else, so its layout and the number of cores that read decide.
Letters: B rows, C = n_embd, D = head_dim, H heads, F = n_ff, V vocab, S tokens visible.
"""

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from tinystories.model import GPT, KVCache
from tinystories.model.gpt import Block, ReluMLP, SwiGLU
from tinystories.model.positions import rotate

PARTS_PER_THREAD = 2


@dataclasses.dataclass(frozen=True)
class Product:
    """x @ matrix + bias, of one linear layer or of several with the same input side by side.

    The inner side is cut into parts whose products are summed: all cores then read at once, which they do not in a
    product of one row (docs/log.md has the rates). A part is a slice of the whole matrix, not a copy.
    """

    matrix: Float[Tensor, "parts inner_of_part outer"]
    bias: Float[Tensor, " outer"] | None

    def __call__(self, x: Float[Tensor, "B inner"]) -> Float[Tensor, "B outer"]:
        n_parts, inner, _ = self.matrix.shape
        y = torch.bmm(x.view(len(x), n_parts, inner).transpose(0, 1), self.matrix).sum(0)
        return y if self.bias is None else y + self.bias


def pack(*layers: nn.Linear) -> Product:
    """The layers' weights in one matrix, contiguous along its outer side; the layers become views of it."""
    matrix = torch.cat([layer.weight.detach() for layer in layers]).t().contiguous()
    for layer, part in zip(layers, matrix.split([layer.out_features for layer in layers], dim=1), strict=True):
        layer.weight = nn.Parameter(part.t(), requires_grad=False)
    n_parts = math.gcd(len(matrix), PARTS_PER_THREAD * torch.get_num_threads())
    biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "packed layers have a bias all or none"
    return Product(matrix.view(n_parts, -1, matrix.shape[1]), torch.cat(biases) if biases else None)


class Decoder:
    """The same function as `model.logits(model(tokens, cache))` for one token in each row, within fp32 rounding.

    Repacks the model in place: it goes on giving the same results, but should not be trained or saved any more.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.config = model.config
        self.layers = [DecoderLayer(block) for block in model.layers if isinstance(block, Block)]
        self.head = pack(model.lm_head)

    def __call__(self, tokens: Int[Tensor, " B"], cache: KVCache, positions: Sequence[int]) -> Float[Tensor, "B V"]:
        """Logits after one token in each row of the cache, written at the given positions (the rows' lengths)."""
        where = Places(cache, positions)
        x = self.model.embed_tokens(tokens)
        rotation = None
        if self.config.architecture == "classic":
            x = x + self.model.get_buffer("sinusoid")[where.positions]
        else:
            tables = (self.model.get_buffer(name) for name in ("rope_cos", "rope_sin"))
            cos, sin = (table[where.positions][:, None, None] for table in tables)
            rotation = (cos, sin)
        for i, layer in enumerate(self.layers):
            q, k, v = layer.heads(x, rotation)
            keys, values = where.write(i, k, v)
            y = F.scaled_dot_product_attention(
                q, keys, values, attn_mask=where.mask, enable_gqa=self.config.kv_heads < self.config.n_head
            )
            x = x + layer.o(y.reshape(x.shape))
            x = x + layer.feed_forward(x)
        return self.head(self.model.norm(x))


class DecoderLayer:
    """The packed weights of a `Block`."""

    def __init__(self, block: Block) -> None:
        attention, mlp = block.self_attn, block.mlp
        assert isinstance(mlp, ReluMLP | SwiGLU), "the decoder knows these two"
        self.block = block
        self.qkv = pack(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o = pack(attention.o_proj)
        self.up = pack(mlp.gate_proj, mlp.up_proj) if isinstance(mlp, SwiGLU) else pack(mlp.up_proj)
        self.down = pack(mlp.down_proj)

    def heads(self, x: Float[Tensor, "B C"], rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, 1, D), keys and values (B, Hkv, 1, D) of the new tokens."""
        attention = self.block.self_attn
        heads_BHTD = self.qkv(self.block.input_layernorm(x)).view(len(x), -1, 1, attention.head_dim)
        sizes = [layer.out_features // attention.head_dim for layer in (attention.q_proj, attention.k_proj)]
        q, k, v = heads_BHTD.split([*sizes, sizes[1]], dim=1)
        q, k = attention.q_norm(q), attention.k_norm(k)
        return (q, k, v) if rotation is None else (rotate(q, *rotation), rotate(k, *rotation), v)

    def feed_forward(self, x: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
        up = self.up(self.block.post_attention_layernorm(x))
        if isinstance(self.block.mlp, ReluMLP):
            return self.down(F.relu(up))
        gate, up = up.chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class Places:
    """Where the new token of each row goes in the cache. Rows of equal length (one row, say) need no mask."""

    def __init__(self, cache: KVCache, positions: Sequence[int]) -> None:
        self.cache = cache
        self.end = max(positions) + 1
        self.positions = torch.tensor(positions)
        self.mask: Tensor | None = None
        if min(positions) + 1 < self.end:
            self.rows = torch.arange(len(positions))
            hidden = torch.arange(self.end) > self.positions[:, None]
            self.mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf"))[:, None, None]

    def write(
        self, layer: int, k: Float[Tensor, "B Hkv 1 D"], v: Float[Tensor, "B Hkv 1 D"]
    ) -> tuple[Float[Tensor, "B Hkv S D"], Float[Tensor, "B Hkv S D"]]:
        keys, values = self.cache.k[layer], self.cache.v[layer]
        if self.mask is None:
            keys[:, :, self.end - 1 : self.end], values[:, :, self.end - 1 : self.end] = k, v
        else:
            keys[self.rows, :, self.positions] = k[:, :, 0].to(keys.dtype)
            values[self.rows, :, self.positions] = v[:, :, 0].to(values.dtype)
        return keys[:, :, : self.end], values[:, :, : self.end]

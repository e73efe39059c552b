"""One token at a time on a CPU in fp32: a torch model's own weights, through the kernels of `engine.cpu`."""

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tinystories.engine.cpu import kernels
from tinystories.model import GPT, KVCache
from tinystories.model.gpt import Block, SwiGLU

NONE = np.empty(0, dtype=np.float32)


class Decoder:
    """The same function as `model.logits(model(tokens, cache))` for one token in each row, within fp32 rounding.

    Shares the memory of the model's weights: training in place is seen, replaced tensors are not.
    """

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.blocks = [weights_of(block) for block in model.layers if isinstance(block, Block)]
        self.head = array(model.lm_head.weight)
        threads = torch.get_num_threads()
        with torch.inference_mode():  # a first token compiles the kernels or loads them: no story should wait for it
            self(torch.zeros(1, dtype=torch.long), KVCache(model.config, 1), [0])
        torch.set_num_threads(threads)  # Numba has started its own, and OpenMP's default, which torch uses, with them

    def __call__(self, tokens: Int[Tensor, " B"], cache: KVCache, positions: Sequence[int]) -> Float[Tensor, "B V"]:
        """Logits after one token in each row of the cache, written at the given positions (the rows' lengths)."""
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        config, where = self.model.config, np.array(positions, dtype=np.int64)
        layers = zip(self.blocks, cache.k.numpy(), cache.v.numpy(), strict=True)
        x = self.model.embed_tokens(tokens).numpy()
        if config.architecture == "classic":
            x += array(self.model.get_buffer("sinusoid"))[where]
            for weights, keys, values in layers:
                kernels.classic_block(x, weights, config.norm_eps, keys, values, where)
        else:
            cos, sin = (array(self.model.get_buffer(name)) for name in ("rope_cos", "rope_sin"))
            for weights, keys, values in layers:
                kernels.modern_block(x, weights, config.norm_eps, cos, sin, keys, values, where)
        hidden = self.model.norm(torch.from_numpy(x)).numpy()
        return torch.from_numpy(kernels.linear(hidden, self.head))


def weights_of(block: Block) -> kernels.ClassicWeights | kernels.ModernWeights:
    w = {name.removesuffix(".weight"): array(parameter) for name, parameter in block.named_parameters()}
    norms = w["input_layernorm"], w["post_attention_layernorm"]
    q, k, v, o = (w[f"self_attn.{name}_proj"] for name in "qkvo")
    up, down = w["mlp.up_proj"], w["mlp.down_proj"]
    if isinstance(block.mlp, SwiGLU):
        q_norm, k_norm = (w.get(f"self_attn.{name}_norm", NONE) for name in "qk")
        return kernels.ModernWeights(norms[0], q, k, v, q_norm, k_norm, o, norms[1], w["mlp.gate_proj"], up, down)
    norm_biases = w["input_layernorm.bias"], w["post_attention_layernorm.bias"]
    o_bias, up_bias, down_bias = (w[f"{name}_proj.bias"] for name in ("self_attn.o", "mlp.up", "mlp.down"))
    first, second = zip(norms, norm_biases, strict=True)
    return kernels.ClassicWeights(*first, q, k, v, o, o_bias, *second, up, up_bias, down, down_bias)


def array(tensor: Tensor) -> npt.NDArray[np.float32]:
    values: npt.NDArray[np.float32] = tensor.detach().numpy()
    return values

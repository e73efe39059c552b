"""Switch a model to the kernels that are faster in training on a CPU."""

from functools import partial

import torch
from torch import Tensor, nn

from tinystories.model.cpu_attention import causal_attention
from tinystories.model.cpu_functions import gated_silu, rms_norm, split_heads
from tinystories.model.dropout import FastDropout
from tinystories.model.gpt import GPT, Attention, Block, CosSin, SwiGLU
from tinystories.model.norm import RMSNorm


def use_cpu_training_kernels(model: GPT, *, bf16: bool, attention: bool = True) -> None:
    """Make the training steps of a model on a CPU use our kernels; with `bf16`, norms return bf16.

    With `bf16`, call the model under autocast. Inference and evaluation (eval mode) stay as they are. `attention`
    False keeps PyTorch's attention; grouped-query attention and sliding windows always do.
    """
    dtype = torch.bfloat16 if bf16 else torch.float32
    model.training_rope_dtype = dtype
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.training_function = partial(rms_norm, dtype=dtype)
        if isinstance(module, SwiGLU):
            module.training_activation = gated_silu
        if isinstance(module, Attention) and attention and not module.enable_gqa:
            module.training_attention = causal_attention
            if isinstance(module.q_norm, RMSNorm) and isinstance(module.k_norm, RMSNorm):
                module.training_split = partial(norm_and_rotate, module.q_norm, module.k_norm)
                model.training_rope_dtype = torch.float32  # as its kernel takes them
        if isinstance(module, GPT | Block) and isinstance(module.dropout, nn.Dropout):
            module.dropout = FastDropout(module.dropout.p).train(module.dropout.training)


def norm_and_rotate(q_norm: RMSNorm, k_norm: RMSNorm, qkv: Tensor, cos_sin: CosSin) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values (B, H, T, D) from their joint projection, with the norms of an `Attention`."""
    return split_heads(qkv, q_norm.weight, k_norm.weight, q_norm.eps or 0.0, *cos_sin)


def use_cpu_teacher_kernels(teacher: GPT, *, bf16: bool) -> None:
    """Make a frozen model predict with the kernels of `use_cpu_training_kernels`, without dropout.

    The kernels apply in training mode only, so the model is switched to it: use it for nothing else.
    """
    use_cpu_training_kernels(teacher, bf16=bf16)
    for module in teacher.modules():
        if isinstance(module, GPT | Block):
            module.dropout = nn.Identity()
    teacher.train()

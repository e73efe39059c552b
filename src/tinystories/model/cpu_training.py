"""Switch a model to the kernels that are faster in training on a CPU."""

import torch
from torch import nn

from tinystories.model.dropout import FastDropout
from tinystories.model.gpt import GPT, Attention, Block
from tinystories.model.norm import RMSNorm


def use_cpu_training_kernels(model: GPT, *, bf16: bool, attention: bool = True) -> None:
    """Make the training steps of a model on a CPU use our attention and dropout; with `bf16`, norms return bf16.

    With `bf16`, call the model under autocast. Inference and evaluation (eval mode) stay as they are. `attention`
    False keeps PyTorch's attention; grouped-query attention and sliding windows always do.
    """
    training_dtype = torch.bfloat16 if bf16 else None
    model.training_dtype = training_dtype
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.training_dtype = training_dtype
        if isinstance(module, Attention):
            module.use_cpu_attention = attention and not module.enable_gqa
        if isinstance(module, GPT | Block) and isinstance(module.dropout, nn.Dropout):
            module.dropout = FastDropout(module.dropout.p).train(module.dropout.training)


def use_cpu_teacher_kernels(teacher: GPT, *, bf16: bool) -> None:
    """Make a frozen model predict with the kernels of `use_cpu_training_kernels`, without dropout.

    The kernels apply in training mode only, so the model is switched to it: use it for nothing else.
    """
    use_cpu_training_kernels(teacher, bf16=bf16)
    for module in teacher.modules():
        if isinstance(module, GPT | Block):
            module.dropout = nn.Identity()
    teacher.train()

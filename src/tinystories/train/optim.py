"""The optimizer: AdamW with decay on matrices only."""

import torch

from tinystories.config import OptimConfig
from tinystories.model import GPT


def build_optimizer(model: GPT, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101); norms and biases are not decayed.

    The learning rate of every group is set anew before each step.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in weights if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    fused = weights[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=fused
    )


def optimizer_tensors(model: GPT, optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """The optimizer's state by name ("exp_avg/layers.0...."), for safetensors."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    tensors = {}
    for weight, state in optimizer.state.items():
        for key, value in state.items():
            tensors[f"{key}/{names[id(weight)]}"] = value.contiguous()
    return tensors


def restore_optimizer(model: GPT, optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`, onto the devices of the weights."""
    weights = dict(model.named_parameters())
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        device = "cpu" if key == "step" and weights[name].device.type == "cpu" else weights[name].device
        optimizer.state[weights[name]][key] = value.to(device)

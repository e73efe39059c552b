"""The optimizers: Muon for the matrices of the blocks, AdamW for everything else; or AdamW for all."""

from collections.abc import Sequence

import torch

from tinystories.config import OptimConfig
from tinystories.model import GPT
from tinystories.train.muon import Muon

Optimizers = Sequence[torch.optim.Optimizer]


def build_optimizers(model: GPT, config: OptimConfig) -> Optimizers:
    """Optimizers over all weights; `peak` of each group is its highest learning rate, `lr` is set before each step.

    Only matrices are decayed. AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101.
    """
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    inner = [w for name, w in weights.items() if config.kind == "muon" and w.ndim == 2 and name.startswith("layers.")]
    taken = {id(w) for w in inner}
    rest = [w for w in weights.values() if id(w) not in taken]
    groups = [
        {"params": [w for w in rest if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in rest if w.ndim < 2], "weight_decay": 0.0},
    ]
    fused = rest[0].device.type in ("cpu", "cuda")
    betas = config.beta1, config.beta2
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.eps, fused=fused)
    ]
    if inner:
        optimizers.append(Muon(inner, lr=config.muon_rate, momentum=config.momentum, weight_decay=config.weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def optimizer_tensors(model: GPT, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """The optimizers' state by name ("exp_avg/layers.0...."), for safetensors."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        for weight, state in optimizer.state.items():
            for key, value in state.items():
                tensors[f"{key}/{names[id(weight)]}"] = value.contiguous()
    return tensors


def restore_optimizers(model: GPT, optimizers: Optimizers, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`, onto the devices of the weights."""
    weights = dict(model.named_parameters())
    owner = {id(w): optimizer for optimizer in optimizers for group in optimizer.param_groups for w in group["params"]}
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        weight = weights[name]
        device = "cpu" if key == "step" and weight.device.type == "cpu" else weight.device
        owner[id(weight)].state[weight][key] = value.to(device)

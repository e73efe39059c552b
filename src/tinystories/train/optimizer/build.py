"""Optimizers: Muon for the matrices of the transformer blocks and AdamW for all other weights, or AdamW for all."""

from collections.abc import Sequence
from typing import Any

import torch

from tinystories.config import OptimConfig
from tinystories.model import GPT
from tinystories.train.optimizer.muon import Muon

Optimizers = Sequence[torch.optim.Optimizer]


def build_optimizers(
    model: GPT, config: OptimConfig, sharded: bool = False, *, cpu_kernels: bool = False
) -> Optimizers:
    """Return optimizers that together hold every weight once; "peak" in each group is its peak learning rate.

    The training loop sets "lr" from "peak" before each step. Weight decay applies to matrices only. `config` must have
    numeric rates, not "auto". AdamW: Loshchilov and Hutter 2017, arXiv 1711.05101. `sharded`: each rank stores only the
    optimizer state of its share of the weights (ZeRO stage 1, Rajbhandari et al. 2019, arXiv 1910.02054).
    `cpu_kernels`: Muon orthogonalizes in bf16 on a CPU too, and uses kernels for the rest.
    """
    assert isinstance(config.learning_rate, float), "call resolve_auto_rates first"
    assert isinstance(config.muon_rate, float), "call resolve_auto_rates first"
    block_matrices: list[torch.Tensor] = []
    other_weights: list[torch.Tensor] = []
    for name, weight in model.named_parameters():
        uses_muon = config.kind == "muon" and weight.ndim == 2 and name.startswith("layers.")
        (block_matrices if uses_muon else other_weights).append(weight)
    groups = [
        {"params": [w for w in other_weights if w.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [w for w in other_weights if w.ndim < 2], "weight_decay": 0.0},
    ]
    # On resuming, ZeroRedundancyOptimizer loads step counts to the CPU, but fused AdamW on CUDA needs them on the GPU.
    fused = other_weights[0].device.type == "cpu" or (other_weights[0].device.type == "cuda" and not sharded)
    betas = config.beta1, config.beta2
    adamw_settings = {"lr": config.learning_rate, "betas": betas, "eps": config.eps, "fused": fused}
    optimizers = [build_optimizer(torch.optim.AdamW, groups, sharded, **adamw_settings)]
    if block_matrices:
        muon_settings = {"lr": config.muon_rate, "momentum": config.momentum, "weight_decay": config.weight_decay}
        optimizers.append(build_optimizer(Muon, block_matrices, sharded, cpu_kernels=cpu_kernels, **muon_settings))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


def build_optimizer(
    optimizer_class: type[torch.optim.Optimizer], params: Any, sharded: bool, **settings: Any
) -> torch.optim.Optimizer:
    if not sharded:
        return optimizer_class(params, **settings)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(params, optimizer_class, **settings)


def consolidate_state(optimizers: Optimizers) -> None:
    """Gather sharded optimizer state on rank 0, where `flatten_optimizer_state` needs it. All ranks must call this."""
    for optimizer in optimizers:
        if hasattr(optimizer, "consolidate_state_dict"):
            optimizer.consolidate_state_dict(0)


def flatten_optimizer_state(model: GPT, optimizers: Optimizers) -> dict[str, torch.Tensor]:
    """Return the optimizer state as tensors named "KEY/WEIGHT", e.g. "exp_avg/layers.0...", for safetensors."""
    names = {id(weight): name for name, weight in model.named_parameters()}
    tensors = {}
    for optimizer in optimizers:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        for index, state in optimizer.state_dict()["state"].items():
            for key, value in state.items():
                tensors[f"{key}/{names[id(weights[index])]}"] = value.contiguous()
    return tensors


def load_optimizer_state(model: GPT, optimizers: Optimizers, tensors: dict[str, torch.Tensor]) -> None:
    """Load the result of `flatten_optimizer_state` onto the devices of the weights.

    A sharded optimizer loads its own share. `KeyError` if there is state of weights that the model lacks.
    """
    state_by_name: dict[str, dict[str, torch.Tensor]] = {}
    for full_name, value in tensors.items():
        key, _, name = full_name.partition("/")
        state_by_name.setdefault(name, {})[key] = value
    names = {id(weight): name for name, weight in model.named_parameters()}
    for optimizer in optimizers:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        index_of = {id(weight): index for index, weight in enumerate(weights)}
        groups = [group | {"params": [index_of[id(w)] for w in group["params"]]} for group in optimizer.param_groups]
        states = {i: state_by_name.pop(names[id(w)]) for i, w in enumerate(weights) if names[id(w)] in state_by_name}
        optimizer.load_state_dict({"state": states, "param_groups": groups})
    if state_by_name:
        raise KeyError(f"optimizer state of unknown weights {sorted(state_by_name)[:3]}")

"""What a run will need, told before it starts: floating-point work, time and memory."""

import time

import psutil
import torch

from tinystories.config import Config, ModelConfig
from tinystories.errors import UserError
from tinystories.model.loss import chunk_rows


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations to train on one token: 6 for each weight in a matrix product, plus causal attention."""
    embedding = config.vocab_size * config.n_embd
    weights = config.n_params - embedding * (1 if config.tied else 2)
    attention = config.n_layer * config.n_ctx * config.n_embd  # q k and p v, half of it masked
    return 6.0 * (weights + embedding) + 6.0 * attention


def train_bytes(config: Config) -> int:
    """Peak memory of one optimizer step in fp32: weights, gradients, AdamW's two moments, activations, loss chunks.

    Activations are counted per token and layer as the tensors autograd keeps; measured peaks lie within a third of it.
    """
    model = config.model
    wide = 3 if model.architecture == "modern" else 2
    kept = model.n_layer * (14 * model.n_embd + wide * model.n_ff) + 4 * model.n_embd
    tokens = config.train.micro_batch * model.n_ctx
    head = 2 * 4 * model.vocab_size * model.n_embd
    logits = 2 * 4 * model.vocab_size * min(tokens, chunk_rows(model.vocab_size))
    return 16 * model.n_params + head + 4 * tokens * kept + logits


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def require_memory(config: Config, device: torch.device) -> None:
    """Refuse a run that cannot fit, before it starts."""
    needed, free = train_bytes(config), free_bytes(device)
    if needed > free:
        raise UserError(
            f"this run needs about {needed / 1e9:.1f} GB of memory and {device} has {free / 1e9:.1f} GB free;"
            f" lower train.micro_batch={config.train.micro_batch} or model.n_ctx={config.model.n_ctx},"
            " or choose a smaller preset"
        )


def matmul_flops_per_s(device: torch.device, seconds: float = 0.3) -> float:
    """The device's rate on 1024 x 1024 matrix products, by measuring for about `seconds`."""
    a = torch.randn(1024, 1024, device=device)
    wait = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    a @ a
    wait()
    start, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        a @ a
        wait()
        products += 1
    return products * 2 * 1024**3 / elapsed


def train_seconds(config: Config, device: torch.device, share: float = 0.5) -> float:
    """Estimated duration of a run that reaches `share` of the device's matrix-product rate."""
    tokens = config.train.steps * config.train.batch_size * config.model.n_ctx
    return tokens * flops_per_token(config.model) / (share * matmul_flops_per_s(device))

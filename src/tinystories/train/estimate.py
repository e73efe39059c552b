"""Estimates made before a run starts: floating-point operations, memory and time."""

import time

import psutil
import torch

from tinystories.config import Config, ModelConfig
from tinystories.errors import UserError
from tinystories.model.loss import chunk_rows
from tinystories.train.distributed import SINGLE, World

# Tokens in a micro-batch on a CPU, at most: more take memory and are not faster.
MAX_TOKENS_CPU = 8192
# Fraction of the free memory that micro_batch = "auto" plans with, because the estimate is not exact.
MEMORY_FRACTION = 0.75


def estimate_flops_per_token(config: ModelConfig) -> float:
    """Return the floating-point operations to train on one token: 6 per matmul weight, plus causal attention."""
    n_embedding = config.vocab_size * config.n_embd
    n_weights = config.n_params - n_embedding * (1 if config.tied else 2)
    if config.learned_positions:
        n_weights -= config.n_ctx * config.n_embd
    attention = config.n_layer * config.n_ctx * config.n_head * config.head_dim  # q k^T and p v, half of each masked
    return 6.0 * (n_weights + n_embedding) + 6.0 * attention


def estimate_train_bytes(config: Config, micro_batch: int, device: str = "cpu") -> int:
    """Return the peak memory in bytes of one fp32 optimizer step, with `micro_batch` rows on a device type ("cuda").

    Counts weights, gradients, AdamW's two moments, activations and loss chunks. Activations are the tensors that
    autograd stores per token and layer (after activation checkpointing, model/recompute.py), plus those of one layer's
    backward pass. results/ has measured peaks.
    """
    model = config.model
    n_embd_tensors, n_ff_tensors = (8, 2) if model.architecture == "modern" else (6, 1)
    activations_per_token = (
        model.n_layer * (n_embd_tensors * model.n_embd + n_ff_tensors * model.n_ff) + 4 * model.n_embd + 2 * model.n_ff
    )
    tokens = micro_batch * model.n_ctx
    # Two more copies of the head, for the fused loss; and two of one chunk of logits.
    head_bytes = 2 * 4 * model.vocab_size * model.n_embd
    logits_bytes = 2 * 4 * model.vocab_size * min(tokens, chunk_rows(model.vocab_size, device))
    return 16 * model.n_params + head_bytes + 4 * tokens * activations_per_token + logits_bytes


def get_free_bytes(device: torch.device) -> int:
    """Return the free memory of the GPU, or of the machine for other devices."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def auto_micro_batch(config: Config, device: torch.device, previous_micro_batch: int = 0, world: World = SINGLE) -> int:
    """Return the rows per micro-batch on this rank: a divisor of its share of the batch.

    That is the largest one up to train.micro_batch, or for "auto" the largest one that fits into memory. A resumed run
    keeps `previous_micro_batch` if that still fits, so that the order of its sums stays the same. `UserError` if the
    number (for "auto": a single row) does not fit.
    """
    requested = config.train.micro_batch
    rank_batch_size = world.batch_size_per_rank(config.train.batch_size)
    available_bytes = get_free_bytes(device) // (world.local_size if device.type == "cpu" else 1)
    divisors = [rows for rows in range(rank_batch_size, 0, -1) if rank_batch_size % rows == 0]
    if requested == "auto":
        max_rows = max(1, MAX_TOKENS_CPU // config.model.n_ctx) if device.type == "cpu" else rank_batch_size
        candidates = [rows for rows in divisors if rows <= max_rows]
        if previous_micro_batch in candidates:
            candidates.insert(0, previous_micro_batch)
        usable_bytes = MEMORY_FRACTION * available_bytes
        fitting = (rows for rows in candidates if estimate_train_bytes(config, rows, device.type) <= usable_bytes)
        micro_batch = next(fitting, 1)
    else:
        micro_batch = next(rows for rows in divisors if rows <= requested)
    needed_bytes = estimate_train_bytes(config, micro_batch, device.type)
    if needed_bytes > available_bytes:
        raise UserError(
            f"this run needs about {needed_bytes / 1e9:.1f} GB of memory, but {device} has only"
            f" {available_bytes / 1e9:.1f} GB free; lower train.micro_batch={micro_batch}"
            f" or model.n_ctx={config.model.n_ctx}, or choose a smaller preset"
        )
    return micro_batch


def measure_matmul_flops_per_s(device: torch.device, seconds: float = 0.3) -> float:
    """Measure floating-point operations per second on 1024 x 1024 fp32 matmuls, for about `seconds`."""
    a = torch.randn(1024, 1024, device=device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    a @ a
    synchronize()
    start, n_products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        a @ a
        synchronize()
        n_products += 1
    return n_products * 2 * 1024**3 / elapsed


def estimate_train_seconds(config: Config, device: torch.device, utilization: float = 0.5) -> float:
    """Return the estimated duration in seconds of a run at `utilization` times the device's measured matmul rate."""
    tokens = config.train.steps * config.train.batch_size * config.model.n_ctx
    return tokens * estimate_flops_per_token(config.model) / (utilization * measure_matmul_flops_per_s(device))

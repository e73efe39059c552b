"""What a run will need, told before it starts: floating-point work, time and memory."""

import time

import psutil
import torch

from tinystories.config import Config, ModelConfig
from tinystories.errors import UserError
from tinystories.model.loss import chunk_rows
from tinystories.train.distributed import SINGLE, World

MAX_TOKENS_CPU = 8192  # in a micro-batch on a CPU: more are no faster, and only take memory
MEMORY_FRACTION = 0.75  # of the free memory that `auto` counts on: the estimate is not exact


def estimate_flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations to train on one token: 6 for each weight in a matrix product, plus causal attention."""
    n_embedding = config.vocab_size * config.n_embd
    n_weights = config.n_params - n_embedding * (1 if config.tied else 2)
    if config.learned_positions:
        n_weights -= config.n_ctx * config.n_embd
    attention = config.n_layer * config.n_ctx * config.n_head * config.head_dim  # q k and p v, half of it masked
    return 6.0 * (n_weights + n_embedding) + 6.0 * attention


def estimate_train_bytes(config: Config, micro_batch: int, device: str = "cpu") -> int:
    """Peak memory of one optimizer step in fp32 with `micro_batch` rows at once on a `device` of this type.

    Weights, gradients, two moments of AdamW, activations, loss chunks. Activations are counted per token and layer as
    the tensors autograd keeps (`model/recompute.py` saves it some), with those of one layer's backward pass;
    results/ has measured peaks.
    """
    model = config.model
    n_embd_tensors, n_ff_tensors = (8, 2) if model.architecture == "modern" else (6, 1)
    activations_per_token = (
        model.n_layer * (n_embd_tensors * model.n_embd + n_ff_tensors * model.n_ff) + 4 * model.n_embd + 2 * model.n_ff
    )
    tokens = micro_batch * model.n_ctx
    head_bytes = 2 * 4 * model.vocab_size * model.n_embd
    logits_bytes = 2 * 4 * model.vocab_size * min(tokens, chunk_rows(model.vocab_size, device))
    return 16 * model.n_params + head_bytes + 4 * tokens * activations_per_token + logits_bytes


def get_free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def auto_micro_batch(config: Config, device: torch.device, previous_micro_batch: int = 0, world: World = SINGLE) -> int:
    """The rows of `train.micro_batch`, or of this rank's whole share of the batch where that is less.

    For `auto` the largest divisor of the share that fits. A run that goes on keeps what it `used_before` where that
    still fits, so that its sums stay the same. `UserError` when not even the number asked for, or one row, fits.
    """
    requested, rank_batch_size, available_bytes = (
        config.train.micro_batch,
        world.batch_size_per_rank(config.train.batch_size),
        get_free_bytes(device),
    )
    if device.type == "cpu":
        available_bytes //= world.local_size
    divisors = [rows for rows in range(rank_batch_size, 0, -1) if rank_batch_size % rows == 0]
    if requested != "auto":
        rows = next(rows for rows in divisors if rows <= requested)
        check_memory(config, rows, available_bytes, device)
        return rows
    if device.type == "cpu":
        divisors = [rows for rows in divisors if rows <= max(1, MAX_TOKENS_CPU // config.model.n_ctx)]
    if previous_micro_batch in divisors:
        divisors.insert(0, previous_micro_batch)
    for rows in divisors:
        if estimate_train_bytes(config, rows, device.type) <= MEMORY_FRACTION * available_bytes:
            return rows
    check_memory(config, 1, available_bytes, device)
    return 1


def check_memory(config: Config, micro_batch: int, available_bytes: int, device: torch.device) -> None:
    """Refuse a run that cannot fit, before it starts."""
    needed_bytes = estimate_train_bytes(config, micro_batch, device.type)
    if needed_bytes > available_bytes:
        raise UserError(
            f"this run needs about {needed_bytes / 1e9:.1f} GB of memory and {device} has {available_bytes / 1e9:.1f} GB free;"
            f" lower train.micro_batch={micro_batch} or model.n_ctx={config.model.n_ctx},"
            " or choose a smaller preset"
        )


def measure_matmul_flops_per_s(device: torch.device, seconds: float = 0.3) -> float:
    """The device's rate on 1024 x 1024 matrix products, by measuring for about `seconds`."""
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
    """Estimated duration of a run that reaches `share` of the device's matrix-product rate."""
    tokens = config.train.steps * config.train.batch_size * config.model.n_ctx
    return tokens * estimate_flops_per_token(config.model) / (utilization * measure_matmul_flops_per_s(device))

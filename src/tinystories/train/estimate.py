"""What a run will need, told before it starts: floating-point work, time and memory."""

import time

import psutil
import torch

from tinystories.config import Config, ModelConfig
from tinystories.errors import UserError
from tinystories.model.loss import chunk_rows
from tinystories.train.distributed import ALONE, World

ENOUGH_TOKENS = 8192  # in a micro-batch on a CPU: more are no faster, and only take memory
FREE_SHARE = 0.75  # of the free memory that `auto` counts on: the estimate is not exact


def flops_per_token(config: ModelConfig) -> float:
    """Floating-point operations to train on one token: 6 for each weight in a matrix product, plus causal attention."""
    embedding = config.vocab_size * config.n_embd
    weights = config.n_params - embedding * (1 if config.tied else 2)
    if config.learned_positions:
        weights -= config.n_ctx * config.n_embd
    attention = config.n_layer * config.n_ctx * config.n_head * config.head_dim  # q k and p v, half of it masked
    return 6.0 * (weights + embedding) + 6.0 * attention


def train_bytes(config: Config, micro_batch: int, device: str = "cpu") -> int:
    """Peak memory of one optimizer step in fp32 with `micro_batch` rows at once on a `device` of this type.

    Weights, gradients, two moments of AdamW, activations, loss chunks. Activations are counted per token and layer as
    the tensors autograd keeps (`model/recompute.py` saves it some), with those of one layer's backward pass;
    results/ has measured peaks.
    """
    model = config.model
    narrow, wide = (8, 2) if model.architecture == "modern" else (6, 1)
    kept = model.n_layer * (narrow * model.n_embd + wide * model.n_ff) + 4 * model.n_embd + 2 * model.n_ff
    tokens = micro_batch * model.n_ctx
    head = 2 * 4 * model.vocab_size * model.n_embd
    logits = 2 * 4 * model.vocab_size * min(tokens, chunk_rows(model.vocab_size, device))
    return 16 * model.n_params + head + 4 * tokens * kept + logits


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def fitting_micro_batch(config: Config, device: torch.device, used_before: int = 0, world: World = ALONE) -> int:
    """The rows of `train.micro_batch`, or of this rank's whole share of the batch where that is less.

    For `auto` the largest divisor of the share that fits. A run that goes on keeps what it `used_before` where that
    still fits, so that its sums stay the same. `UserError` when not even the number asked for, or one row, fits.
    """
    asked, share, free = config.train.micro_batch, world.share(config.train.batch_size), free_bytes(device)
    if device.type == "cpu":
        free //= world.local_size
    divisors = [rows for rows in range(share, 0, -1) if share % rows == 0]
    if asked != "auto":
        rows = next(rows for rows in divisors if rows <= asked)
        require_memory(config, rows, free, device)
        return rows
    if device.type == "cpu":
        divisors = [rows for rows in divisors if rows <= max(1, ENOUGH_TOKENS // config.model.n_ctx)]
    if used_before in divisors:
        divisors.insert(0, used_before)
    for rows in divisors:
        if train_bytes(config, rows, device.type) <= FREE_SHARE * free:
            return rows
    require_memory(config, 1, free, device)
    return 1


def require_memory(config: Config, micro_batch: int, free: int, device: torch.device) -> None:
    """Refuse a run that cannot fit, before it starts."""
    needed = train_bytes(config, micro_batch, device.type)
    if needed > free:
        raise UserError(
            f"this run needs about {needed / 1e9:.1f} GB of memory and {device} has {free / 1e9:.1f} GB free;"
            f" lower train.micro_batch={micro_batch} or model.n_ctx={config.model.n_ctx},"
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

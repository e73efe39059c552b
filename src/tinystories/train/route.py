"""Routes: in which precision, and by which kernels, a run computes. Decided once, recorded, and kept on resuming.

With `train.precision = "auto"` on a CPU, the processor says which routes are possible, and a measurement of one block
of the model says which one is fastest. A run that is resumed stays on its route, so that it ends with the same bits.
"""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from tinystories.config import Config
from tinystories.engine.device import Precision, has_native_bf16, read_cpu_info, select_precision
from tinystories.errors import UserError
from tinystories.model import GPT
from tinystories.model.cpu_loss import cpu_linear_cross_entropy
from tinystories.model.cpu_training import use_cpu_training_kernels
from tinystories.model.loss import Objective, fused_linear_cross_entropy
from tinystories.train.distributed import SINGLE, World

log = logging.getLogger(__name__)

# oneDNN multiplies fp32 matrices by its AVX-512 kernels only if the processor has these.
AVX512_FLAGS = {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
# With AMX, oneDNN would round fp32 operands to bf16 in the mode that the route fp32-onednn uses.
AMX_PREFIX = "amx_"
# Of the vocabulary, this many columns are measured, at most. The tokens are as many as these operations allow.
MAX_PROBE_VOCAB = 4096
PROBE_FLOPS = 2.5e9
MEASURE_SECONDS = 1.0  # at most, unless the processor needs longer to do everything twice
# A route must be this much faster than the plain one: it computes other bits, and the measurement is not exact.
MIN_SPEEDUP = 1.05


@dataclasses.dataclass(frozen=True)
class Route:
    """How the steps of a run are computed.

    `precision` is that of the matmuls. `onednn`: fp32 matmuls by oneDNN instead of PyTorch's default (MKL on x86).
    `cpu_kernels`: our kernels instead of PyTorch's for all but the matmuls, and what `has_bf16_kernels` says.
    """

    name: str
    precision: Precision
    onednn: bool = False
    cpu_kernels: bool = False

    @property
    def has_bf16_kernels(self) -> bool:
        """Whether norms return bf16, and loss and Muon have kernels for bf16, on a CPU."""
        return self.cpu_kernels and self.precision == "bf16"

    @contextlib.contextmanager
    def matmuls(self) -> Iterator[None]:
        """Use this route's kernels for fp32 matmuls inside the block. This is a setting of the whole process."""
        if not self.onednn:
            yield
            return
        settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        previous = settings.fp32_precision
        # The name of the mode is misleading: where `is_onednn_exact` holds, operands and sums are fp32.
        settings.fp32_precision = "bf16"
        try:
            yield
        finally:
            settings.fp32_precision = previous


# By portability: ranks whose processors differ use the last one that any of them selected.
ROUTES = {
    route.name: route
    for route in (
        Route("bf16-cpu", "bf16", cpu_kernels=True),
        Route("bf16", "bf16"),
        Route("fp32-onednn", "fp32", onednn=True, cpu_kernels=True),
        Route("fp32-cpu", "fp32", cpu_kernels=True),
        Route("fp32", "fp32"),
    )
}


def select_route(config: Config, device: torch.device, previous: str | None = None, world: World = SINGLE) -> Route:
    """Return the route of a run, which is the same on all ranks, and log it.

    `previous` is the route of the run being resumed (None: a new run); "" means that it was begun by a version without
    routes, with precision "auto". It is kept if `train.precision` and the processor allow it; a run that was begun in
    bf16 continues in fp32 where bf16 is not native. `UserError` if a new run asks for bf16 where it is not native.
    """
    if previous and previous not in ROUTES:
        raise UserError(f"the checkpoint was written on the route {previous!r}, which this version does not have")
    names = list_routes(config, device, previous)
    name = names[0]
    if len(names) > 1:
        with torch.random.fork_rng(devices=[]):
            rates = measure_routes(names, config)
        name = max(names, key=lambda name: rates[name] / (1.0 if name == "fp32" else MIN_SPEEDUP))
        log.info(
            "one block of this model, in tokens/s: %s", ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
        )
    if world.size > 1:
        order = list(ROUTES)
        name = order[world.all_reduce_max(order.index(name))]
    route = ROUTES[name]
    if previous and route.name != previous:
        log.warning("the run was on route %s and continues on route %s, which rounds differently", previous, route.name)
    log.info("route: %s", route.name)
    return route


def list_routes(config: Config, device: torch.device, previous: str | None = None) -> list[str]:
    """Return the names of the routes that a run may take; if there are several, the fastest is to be chosen."""
    precision = config.train.precision
    if previous == "":
        return [select_precision(device, precision)]
    possible = list_possible_routes(config, device)
    if previous is not None and precision in ("auto", ROUTES[previous].precision):
        if previous in possible:
            return [previous]
        # The run was begun on another processor. It keeps its precision if that is possible here.
        return [name for name in possible if ROUTES[name].precision == ROUTES[previous].precision] or possible
    chosen = select_precision(device, precision)  # raises if bf16 is asked for and not native
    if precision == "fp32" or not has_cpu_kernels(config, device):
        return [chosen]
    # Until its quality is measured (docs/training.md), bf16 on a CPU must be asked for.
    return ["bf16-cpu"] if precision == "bf16" else [name for name in possible if ROUTES[name].precision == "fp32"]


def list_possible_routes(config: Config, device: torch.device) -> list[str]:
    """Return the names of all routes that compute what their name says on this device."""
    cpu_info, with_cpu_kernels = read_cpu_info(), has_cpu_kernels(config, device)
    is_bf16_native = has_native_bf16(cpu_info) if device.type == "cpu" else select_precision(device, "auto") == "bf16"
    names = ["fp32", "fp32-cpu"] if with_cpu_kernels else ["fp32"]
    if with_cpu_kernels and may_use_onednn(cpu_info) and is_onednn_exact(config):
        names.append("fp32-onednn")
    if is_bf16_native:
        names.append("bf16")
    if is_bf16_native and with_cpu_kernels:
        names.append("bf16-cpu")
    return names


def has_cpu_kernels(config: Config, device: torch.device) -> bool:
    """Return whether our kernels can be used: on a CPU, and not under torch.compile, which makes its own."""
    return device.type == "cpu" and config.train.compile != "on"


def may_use_onednn(cpu_info: str) -> bool:
    """Return whether the processor is one on which oneDNN multiplies fp32 faster than MKL, and in fp32.

    That is an AMD processor with AVX-512, but without AMX; on Intel's, MKL takes its fast path. `cpu_info` has the
    format of /proc/cpuinfo.
    """
    lines = [line.partition(":") for line in cpu_info.splitlines()]
    vendors = {value.strip() for name, _, value in lines if name.strip() == "vendor_id"}
    flags = {flag for name, _, value in lines if name.strip() == "flags" for flag in value.split()}
    has_amx = any(flag.startswith(AMX_PREFIX) for flag in flags)
    return vendors == {"AuthenticAMD"} and flags >= AVX512_FLAGS and not has_amx


def list_shapes(config: Config) -> list[tuple[int, int, int]]:
    """Return (rows, inner, columns) of the matmuls of one block and of the head, limited in size."""
    model = config.model
    qkv = (model.n_head + 2 * model.kv_heads) * model.head_dim
    vocab = min(model.vocab_size, MAX_PROBE_VOCAB)
    weights = [(model.n_embd, qkv), (model.n_embd, model.n_ff), (model.n_ff, model.n_embd), (model.n_embd, vocab)]
    rows = int(PROBE_FLOPS / (6 * sum(inner * columns for inner, columns in weights)))
    rows = max(64, min(rows, config.train.batch_size * model.n_ctx))
    return [(rows, inner, columns) for inner, columns in weights]


def is_onednn_exact(config: Config) -> bool:
    """Return whether the route fp32-onednn multiplies this model's matrices without rounding their elements."""
    if not hasattr(torch.backends.mkldnn, "matmul"):
        return False
    with torch.random.fork_rng(devices=[]), ROUTES["fp32-onednn"].matmuls():
        torch.manual_seed(0)
        # Forward pass, gradient of the input, gradient of the weight.
        shapes = {shape for n, k, m in list_shapes(config) for shape in ((n, k, m), (n, m, k), (m, n, k))}
        return all(keeps_operands(torch.mm, *shape) for shape in shapes)


def keeps_operands(multiply: Callable[[Tensor, Tensor], Tensor], rows: int, inner: int, columns: int) -> bool:
    """Return whether `multiply` uses all 24 bits of both fp32 operands of a (rows, inner) x (inner, columns) product.

    One operand has random mantissas, which no shorter format can hold; the other one selects its rows or columns: it
    has a single 1 in each of its own. So every element of the product must be an element of the first, bit for bit.
    """
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    chosen_columns, chosen_rows = torch.randint(inner, (columns,)), torch.randint(inner, (rows,))
    select_columns = torch.zeros(inner, columns).scatter_(0, chosen_columns[None], 1.0)
    select_rows = torch.zeros(rows, inner).scatter_(1, chosen_rows[:, None], 1.0)
    return torch.equal(multiply(left, select_columns), left[:, chosen_columns]) and torch.equal(
        multiply(select_rows, right), right[chosen_rows]
    )


def measure_routes(names: Sequence[str], config: Config) -> dict[str, float]:
    """Measure for about a second: the tokens per second of forward and backward passes of one block and the head.

    The routes take turns, so that a change of the machine's speed affects all of them; the fastest turn of each counts.
    The first turn is not counted: it may compile kernels.
    """
    probes = {name: build_probe(config, ROUTES[name]) for name in names}
    best_seconds = dict.fromkeys(names, float("inf"))
    for probe in probes.values():
        time_probe(probe)
    started_at, last_turn_seconds = time.perf_counter(), 0.0
    while not last_turn_seconds or time.perf_counter() - started_at + last_turn_seconds < MEASURE_SECONDS:
        turn_started_at = time.perf_counter()
        for name, probe in probes.items():
            best_seconds[name] = min(best_seconds[name], time_probe(probe))
        last_turn_seconds = time.perf_counter() - turn_started_at
    return {name: probe.tokens.numel() / best_seconds[name] for name, probe in probes.items()}


@dataclasses.dataclass(frozen=True)
class Probe:
    """What is measured of a route: the objective of a model with one block, and its inputs."""

    route: Route
    objective: Objective
    tokens: Tensor


def build_probe(config: Config, route: Route) -> Probe:
    model = config.model
    model = dataclasses.replace(model, n_layer=1, vocab_size=min(model.vocab_size, MAX_PROBE_VOCAB))
    n_tokens = int(PROBE_FLOPS / (6 * model.n_params))
    row_length = min(model.n_ctx, max(64, n_tokens))
    n_rows = max(1, min(n_tokens // row_length, config.train.batch_size))
    tokens = torch.randint(model.vocab_size, (n_rows, row_length))
    return Probe(route, build_objective(GPT(model).train(), route), tokens)


def time_probe(probe: Probe) -> float:
    """Return the seconds of a forward and a backward pass."""
    started_at = time.perf_counter()
    with probe.route.matmuls():
        with torch.autocast("cpu", torch.bfloat16, enabled=probe.route.precision == "bf16"):
            loss = probe.objective(probe.tokens, probe.tokens)
        loss.backward()
    probe.objective.zero_grad(set_to_none=True)
    return time.perf_counter() - started_at


def build_objective(model: GPT, route: Route) -> Objective:
    """Make the model train with the kernels of a route, and return its objective."""
    if route.cpu_kernels:
        use_cpu_training_kernels(model, bf16=route.has_bf16_kernels)
    return Objective(model, cpu_linear_cross_entropy if route.has_bf16_kernels else fused_linear_cross_entropy)

"""Attention of the CPU engine bit for bit, its KV cache, and the elementwise kernels against NumPy."""

import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from engines import Build, fp32, opened, saved

from tinystories.config import ModelConfig
from tinystories.engine.cpu.engine import CpuEngine, CpuKVCache
from tinystories.engine.cpu.kernels import attention_simd, elementwise
from tinystories.engine.cpu.kernels.lanes import make_elementwise

IDS = np.random.default_rng(5).integers(0, 61, 150).tolist()


def open_engine(build: Build, data: Path, folder: Path, precision: str, changes: dict[str, object]) -> CpuEngine:
    model = build(**changes | {"n_ctx": 150, "vocab_size": 400})
    return opened(saved(folder / "model", model, data), precision, n_slots=3)


@pytest.mark.parametrize("precision", ["fp32", "int8", "int8-a8", "int4"])
def test_every_way_to_the_same_context_gives_the_same_bits(
    build: Build, sample_data: Path, tmp_path: Path, precision: str, shape: dict[str, object]
) -> None:
    """A prompt in one pass (tiles of rows, two calls), a part of it and steps, and steps beside other streams."""
    engine = open_engine(build, sample_data, tmp_path, precision, shape)
    chunks = engine.forward_chunks(engine.kv_cache, 0, np.array(IDS), all_logits=True)
    expected = np.concatenate([logits for _, logits in chunks])
    for start in (1, 6, 67, 128):
        assert (engine.prefill(0, IDS[:start]) == expected[start - 1]).all()
        engine.prefill(2, IDS[3:40])
        for i in range(start, start + 22):
            if i % 2:
                assert (engine.step([0], [IDS[i]])[0] == expected[i]).all()
            else:
                assert (engine.step([2, 0], [7, IDS[i]])[1] == expected[i]).all()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_what_a_slot_held_before_changes_nothing(
    build: Build, sample_data: Path, tmp_path: Path, precision: str, shape: dict[str, object]
) -> None:
    engine = open_engine(build, sample_data, tmp_path, precision, shape)
    expected = [engine.prefill(0, IDS[:21]), *engine.step([0], [3])]
    for array in (engine.kv_cache.keys, engine.kv_cache.values):
        array[:] = 0xFF  # NaN in fp16 and fp32
    for logits, before in zip([engine.prefill(0, IDS[:21]), *engine.step([0], [3])], expected, strict=True):
        assert np.isfinite(logits).all()
        assert (logits == before).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_grows_with_what_is_written(build: Build) -> None:
    def resident_mb() -> float:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024

    engine = fp32(build(n_ctx=4096, n_layer=4), n_slots=32)
    engine.prefill(0, IDS[:9])
    before = resident_mb()
    for slot in range(32):
        engine.prefill(slot, IDS[:9])
    assert 2 * engine.kv_cache.keys.nbytes >= 128 * 2**20
    assert resident_mb() - before < 20


def test_quantized_weights_have_a_cache_of_16_bits(build: Build, sample_data: Path, tmp_path: Path) -> None:
    folder = saved(tmp_path / "model", build(vocab_size=400, n_ctx=32), sample_data)
    n_bytes = {precision: opened(folder, precision).kv_cache.keys.nbytes for precision in ("fp32", "int8", "int4")}
    assert n_bytes["int8"] == n_bytes["int4"] == n_bytes["fp32"] // 2
    config = ModelConfig(vocab_size=61, n_ctx=24, n_layer=2, n_head=4, n_embd=32, n_ff=48)
    assert CpuKVCache(config, 3).keys.nbytes == 4 * 3 * 2 * 24 * 32
    assert CpuKVCache(config, 3, np.float16).keys.nbytes == 2 * 3 * 2 * 32 * 32  # two blocks of positions


def apply(kernel: Any, x: np.ndarray, dtype: type) -> np.ndarray:
    """Run an elementwise kernel of one input."""
    y = np.zeros(len(x), dtype)

    @numba.njit
    def run(y: int, x: int, n: int) -> None:
        kernel((y,), (x,), n, ())

    run(y.ctypes.data, x.ctypes.data, len(x))
    return y


@numba.njit
def narrow(target: int, source: int, n: int) -> None:
    attention_simd.narrow_to_f16(source, target, n)


@pytest.mark.parametrize("by", ["instructions", "arithmetic"])
def test_fp16_is_rounded_as_in_numpy(by: str) -> None:
    rng = np.random.default_rng(0)
    every_f16 = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every_f16[np.isfinite(every_f16)].astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        between = np.concatenate([np.nextafter(finite, np.float32(s)) for s in (-np.inf, np.inf)])
        ties = (np.sort(finite)[:-1] + np.sort(finite)[1:]) / 2
        random = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
        x = np.concatenate([every_f16.astype(np.float32), between, ties, random, [65519, 65520, 65536, -1e38]])
        x = x.astype(np.float32)
        expected = x.astype(np.float16)
    if by == "instructions":  # if this processor has them
        result = np.zeros(len(x), np.float16)
        narrow(result.ctypes.data, x.ctypes.data, len(x))
    else:
        result = apply(make_elementwise(elementwise.to_f16), x, np.uint16).view(np.float16)
    assert (np.isnan(result) == np.isnan(expected)).all()
    is_number = ~np.isnan(expected)
    assert (result.view(np.uint16) == expected.view(np.uint16))[is_number].all()


def test_fp16_is_widened_exactly_without_instructions_for_it() -> None:
    # An elementwise kernel has fp32 inputs: the 16 bits are in the low half of each.
    bits = np.arange(2**16, dtype=np.uint32)
    kernel = make_elementwise(lambda x: elementwise.from_f16(x.bits().truncate(elementwise.I16)))
    result = apply(kernel, bits.view(np.float32), np.float32)
    expected = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    assert (np.isnan(result) == np.isnan(expected)).all()
    assert (result.view(np.uint32) == expected.view(np.uint32))[~np.isnan(expected)].all()


def test_the_softmax_is_the_exponentials_and_their_sum_in_sixteen_lanes() -> None:
    """What is outside the bounds becomes 0, even what is not a number."""

    @numba.njit
    def run(x: int, n_blocks: int, lo: int, hi: int, maximum: float, scale: float) -> float:
        return attention_simd.exp_and_sum(x, n_blocks, lo, hi, np.float32(maximum), np.float32(scale))

    rng = np.random.default_rng(3)
    for lo, hi in [(0, 1), (0, 16), (3, 48), (15, 33), (17, 18), (40, 41)]:
        x = rng.standard_normal(48).astype(np.float32)
        maximum = x[lo:hi].max()
        expected = np.zeros(48, np.float32)
        expected[lo:hi] = apply(make_elementwise(elementwise.exp), (x[lo:hi] - maximum) * np.float32(0.5), np.float32)
        x[:lo], x[hi:] = np.nan, np.inf
        total = run(x.ctypes.data, 3, lo, hi, maximum, 0.5)
        assert (x == expected).all()
        lanes = expected.reshape(3, 16)
        lanes = lanes[0] + lanes[1] + lanes[2]
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        assert np.float32(total) == lanes[0]


def test_exp_is_accurate_and_passes_nan_on() -> None:
    x = np.concatenate([np.linspace(-87, 88, 100_001), [-1e30, 1e30, -np.inf, np.inf, np.nan, 0]]).astype(np.float32)
    result = apply(make_elementwise(elementwise.exp), x, np.float32)
    exact = np.exp(np.clip(x, -87.3, 88).astype(np.float64))
    assert np.isnan(result[-2])
    is_number = ~np.isnan(exact)
    assert (np.abs(result - exact) / exact)[is_number].max() < 2e-7
    assert result[-1] == 1


@pytest.mark.parametrize("n", [0, 1, 3, 4, 15, 16, 17, 37, 240])
def test_reductions_take_every_number_once(n: int) -> None:
    @numba.njit
    def run(x: int, n: int) -> tuple[float, int]:
        return elementwise.sum_f32(x, n, ()), elementwise.max_magnitude_bits(x, n, ())

    x = np.random.default_rng(n).integers(-99, 99, n + 5).astype(np.float32)  # sums of these are exact
    x[n:] = 1000
    total, bits = run(x.ctypes.data, n)
    assert total == x[:n].sum()
    assert np.int32(bits).view(np.float32) == np.abs(x[:n]).max(initial=0)

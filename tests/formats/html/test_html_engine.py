"""The page's engine computes the CPU engine's logits bit for bit, in WebAssembly and in plain JavaScript."""

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from format_helpers import bundle_of
from page_helpers import OPEN, needs_node, page_data, run_script
from shapes import SHAPES

from tinystories.checkpoint import BUNDLED_MODEL
from tinystories.config import ModelConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.formats.bundle import ModelBundle
from tinystories.formats.html.model_data import describe_positions, find_fixes, load_int8
from tinystories.model import GPT
from tinystories.position_tables import build_rope_tables, build_sinusoid_table
from tinystories.weights.names import expected_shapes

LOGITS = """
function answer(data) {
  const { engine } = openStoryteller(data);
  const rows = data.ids.map((id) => Buffer.from(Float32Array.from(engine.readToken(id)).buffer).toString('base64'));
  return { rows, kind: engine.kernels.kind };
}
"""
TABLES = """
function answer({ n, positions: { frequencies, cos_fixes, sin_fixes } }) {
  const table = (f, fixes) => {
    const numbers = fillSinusoid(new Float32Array(n * frequencies.length), n, frequencies, f, fixes);
    return Buffer.from(numbers.buffer).toString('base64');
  };
  return [table(Math.cos, cos_fixes), table(Math.sin, sin_fixes)];
}
"""
HALVES = (
    "const answer = (numbers) => numbers.map((x) => (Object.is(roundToHalf(x), -0) ? '-0' : String(roundToHalf(x))));"
)


def bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, "<f4").view(np.uint32)


def compare_with_engine(model: ModelBundle, ids: list[int], *, plain: bool) -> None:
    """The logits after each id are the CPU engine's, bit for bit."""
    engine = CpuEngine(model.config, load_int8(model), EngineConfig(n_slots=1, threads=1))
    expected = engine.extend(0, ids, all_logits=True, start=0)
    answer = run_script(OPEN + LOGITS, page_data(model) | {"ids": ids, "plain": plain})
    logits = np.stack([np.frombuffer(base64.b64decode(row), "<f4") for row in answer["rows"]])
    assert answer["kind"] == ("plain JavaScript" if plain else "WebAssembly SIMD")
    assert np.isfinite(expected).all()
    assert logits.shape == expected.shape
    assert (bits(logits) == bits(expected)).all()


@needs_node
@pytest.mark.parametrize("plain", [False, True], ids=["wasm", "plain"])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_are_the_engines_bit_for_bit(
    awake: Callable[[ModelConfig], GPT], sample_data: Path, name: str, plain: bool
) -> None:
    """Sizes that are no multiples of 4, 8 or 16, and more positions than two chunks of a softmax."""
    sizes = {"vocab_size": 403, "n_ctx": 40, "n_layer": 2, "n_head": 4, "n_embd": 40, "n_ff": 54}
    config = ModelConfig(**(sizes | SHAPES[name]))  # type: ignore[arg-type]
    model = bundle_of(awake(config), Tokenizer.load(sample_data))
    ids = np.random.default_rng(3).integers(0, config.vocab_size, config.n_ctx).tolist()
    compare_with_engine(model, ids, plain=plain)


@needs_node
def test_logits_of_the_bundled_model_are_the_engines_bit_for_bit() -> None:
    model = ModelBundle.read(BUNDLED_MODEL)
    ids = [model.tokenizer.end_id, *model.tokenizer.encode("Once upon a time, Lily and Tom found a big red ball. " * 4)]
    compare_with_engine(model, ids, plain=False)


@needs_node
@pytest.mark.parametrize("negative", [0.0, 0.5])
def test_sums_of_products_that_nearly_overflow_are_exact(sample_data: Path, negative: float) -> None:
    """Weights and activations at the ends of their ranges, in a model wide enough to narrow that of activations."""
    config = ModelConfig(vocab_size=400, n_ctx=8, n_layer=1, n_head=2, n_embd=24, n_ff=600, tied=True)
    rng = np.random.default_rng(8)
    weights = {
        name: np.where(rng.random(shape) < negative, -1, 1).astype(np.float32)
        for name, shape in expected_shapes(config).items()
    }
    model = ModelBundle(config=config, weights=weights, tokenizer=Tokenizer.load(sample_data))
    for plain in (False, True):
        compare_with_engine(model, [3, 1, 4, 1, 5, 9, 2, 6], plain=plain)


@needs_node
@pytest.mark.parametrize("sizes", [{"n_embd": 254, "architecture": "classic"}, {"n_embd": 120, "rope_base": 1e6}])
def test_position_tables_are_the_engines_bit_for_bit(
    tiny: Callable[..., ModelConfig], sizes: dict[str, object]
) -> None:
    config = tiny(n_ctx=1500, n_head=1, **sizes)
    data = {"n": config.n_ctx, "positions": describe_positions(config)}
    cos, sin = (np.frombuffer(base64.b64decode(table), "<f4") for table in run_script(TABLES, data))
    if config.architecture == "classic":
        table = build_sinusoid_table(config.n_ctx, config.n_embd)
        expected = table[:, 1::2], table[:, ::2]
    else:
        expected = build_rope_tables(config.n_ctx, config.head_dim, config.rope_base)
    assert (bits(cos) == bits(expected[0].ravel())).all()
    assert (bits(sin) == bits(expected[1].ravel())).all()


def test_numbers_near_the_middle_of_two_others_are_fixed() -> None:
    """A sine that another library might round to the neighbor is written out; others are not."""
    middle = (np.float64(np.float32(0.3)) + np.nextafter(np.float32(0.3), np.float32(1))) / 2
    values = np.array([[0.3, middle], [np.nextafter(-middle, 0), 1.0], [0.0, middle * (1 + 1e-9)]])
    assert find_fixes(values) == [(i, float(np.float32(values.flat[i]))) for i in (1, 2)]


@needs_node
def test_numbers_are_rounded_to_16_bits_as_numpy_does() -> None:
    rng = np.random.default_rng(9)
    numbers = np.concatenate(
        [
            rng.integers(0, 2**32, 20000, dtype=np.uint32).view(np.float32),
            (2.0 ** rng.uniform(-27, 17, 20000) * rng.choice([-1, 1], 20000)).astype(np.float32),
            np.array([0.0, -0.0, 65519.99, 65520, 2**-25, 3 * 2.0**-26, 2.0**-14], np.float32),
        ]
    )
    numbers = numbers[np.isfinite(numbers)]
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16).astype(np.float32)
    for x, half, text in zip(numbers, expected, run_script(HALVES, numbers.tolist()), strict=True):
        assert bits(np.array([float(text)], np.float32)) == bits(half[None]), x

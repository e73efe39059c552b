"""`extend`: a context that arrives in pieces, or replaces the end of another, gives the logits of one prefill."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engines import IDS, Build, close, fp32, opened, saved, uncached
from hypothesis import given, settings
from hypothesis import strategies as st
from shapes import SHAPES

from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.protocol import Engine
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError

PRECISIONS = ["fp32", "int8", "int8-a8", "int4"]
N_CTX = 150  # more than two calls of the kernels (64 rows each)
CONTEXT = np.random.default_rng(4).integers(0, 61, N_CTX).tolist()
EngineOf = Callable[[str, int], CpuEngine]


@pytest.fixture(scope="module")
def engine_of(build: Build, sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineOf:
    """Return the CPU engine of one model in any precision with any number of threads; each is loaded once."""
    folder = saved(tmp_path_factory.mktemp("extend") / "model", build(vocab_size=400, n_ctx=N_CTX), sample_data)
    engines: dict[tuple[str, int], CpuEngine] = {}

    def get(precision: str, threads: int) -> CpuEngine:
        if (precision, threads) not in engines:
            engines[precision, threads] = opened(folder, precision, threads=threads, n_slots=2)
        return engines[precision, threads]

    return get


def extend_in_pieces(engine: Engine, slot: int, cuts: list[int], *, all_logits: bool) -> list[np.ndarray]:
    """Replace the content of a slot by CONTEXT, cut at these positions; return what each call returned."""
    bounds = [0, *sorted(cuts), N_CTX]
    return [
        np.asarray(engine.extend(slot, CONTEXT[low:high], start=low, all_logits=all_logits))
        for low, high in itertools.pairwise(bounds)
    ]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(1, N_CTX - 1), unique=True, max_size=6))
def test_any_split_gives_the_bits_of_one_prefill(
    engine_of: EngineOf, precision: str, threads: int, cuts: list[int]
) -> None:
    engine, whole = engine_of(precision, threads), engine_of(precision, 1)
    expected = whole.extend(1, CONTEXT, start=0, all_logits=True)
    assert (whole.prefill(1, CONTEXT) == expected[-1]).all()
    assert (np.concatenate(extend_in_pieces(engine, 0, cuts, all_logits=True)) == expected).all()
    last = extend_in_pieces(engine, 0, cuts, all_logits=False)
    for end, logits in zip([*sorted(cuts), N_CTX], last, strict=True):
        assert (logits == expected[end - 1]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=8, deadline=None)
@given(n_kept=st.integers(0, 100), n_new=st.integers(1, 40))
def test_a_slot_that_drops_its_end_keeps_nothing_of_it(
    engine_of: EngineOf, precision: str, n_kept: int, n_new: int
) -> None:
    """Also after steps, and with a full slot: what was behind `start` leaves no trace."""
    engine = engine_of(precision, 1)
    engine.prefill(0, CONTEXT)
    new = [399 - i for i in range(n_new)]
    expected = engine.prefill(1, [*CONTEXT[:n_kept], *new])
    assert (engine.extend(0, new, start=n_kept) == expected).all()
    assert (engine.step([0, 1], [5, 5])[0] == engine.extend(1, [5], start=n_kept + n_new)).all()


def test_extend_follows_steps(engine_of: EngineOf) -> None:
    engine = engine_of("int8", 1)
    engine.prefill(0, CONTEXT[:3])
    for token in CONTEXT[3:9]:
        engine.step([0], [token])
    assert (engine.extend(0, CONTEXT[9:20]) == engine.prefill(1, CONTEXT[:20])).all()


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=5, deadline=None)
@given(cuts=st.lists(st.integers(1, 23), unique=True, max_size=4))
def test_torch_gives_the_same_up_to_rounding(build: Build, name: str, cuts: list[int]) -> None:
    model = build(**SHAPES[name])
    engine = TorchEngine(model, device="cpu", n_slots=3)
    expected, bounds = uncached(model, IDS), [0, *sorted(cuts), 24]
    engine.prefill(0, IDS[:7])
    engine.prefill(2, IDS[:5])
    for low, high in itertools.pairwise(bounds):
        close(engine.extend(1, IDS[low:high], start=low, all_logits=True), expected[low:high])
        close(engine.step([0, 2], [IDS[7], IDS[5]]), expected[[7, 5]])  # computes slot 1 too, with a dummy token
        engine.prefill(0, IDS[:7])
        engine.prefill(2, IDS[:5])
    close(engine.extend(1, IDS[10:], start=10), expected[-1])  # a full slot


def test_fp32_equals_the_model(build: Build, shape: dict[str, object]) -> None:
    engine = fp32(build(**shape))
    expected = uncached(build(**shape), IDS)
    close(engine.extend(0, IDS[:9], all_logits=True), expected[:9])
    close(engine.extend(0, IDS[9:], all_logits=True), expected[9:])


@pytest.mark.parametrize("kind", ["cpu", "torch"])
def test_what_does_not_fit_is_refused_and_changes_nothing(build: Build, kind: str) -> None:
    engine: Engine = fp32(build()) if kind == "cpu" else TorchEngine(build(), device="cpu")
    engine.prefill(0, IDS[:20])
    for slot, ids, message in [
        (0, IDS[:5], "5 token ids do not fit after 20 others: a slot holds at most 24"),
        (0, [], "0 token ids do not fit"),
        (0, [61], "token id 61 is outside"),
        (1, [1], "slot 1 does not exist"),
    ]:
        with pytest.raises(UserError, match=message):
            engine.extend(slot, ids)
    with pytest.raises(AssertionError, match="must hold the ids"):
        engine.extend(0, [1], start=21)
    close(engine.extend(0, IDS[20:]), uncached(build(), IDS)[-1])

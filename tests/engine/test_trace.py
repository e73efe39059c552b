"""The NumPy forward pass against the torch model and the CPU engine, and what a trace derives from hidden states.

Tolerances: fp32 logits within 2e-5 (relative and absolute) of torch and of the CPU engine on the same weights. With
int8 and int4 weights the CPU engine also rounds activations: within 3 % and 20 % of the standard deviation of the
logits.
"""

import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from engines import IDS, Build, arrays_of, close, fp32, opened, saved, uncached

from tinystories import checkpoint
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.torch_engine import TorchEngine
from tinystories.engine.trace import trace as trace_module
from tinystories.engine.trace.model import TraceModel
from tinystories.engine.trace.trace import Trace, compute_trace
from tinystories.errors import UserError
from tinystories.model import GPT
from tinystories.weights import load
from tinystories.weights.load import write_int8_model

ROUNDED_TOLERANCE = {"int8": 0.03, "int4": 0.2}  # of the standard deviation of the logits


def traced(model: GPT, ids: list[int] = IDS) -> Trace:
    return compute_trace(TraceModel(model.config, arrays_of(model)), ids)


def test_logits_are_those_of_torch_and_of_the_cpu_engine(build: Build, shape: dict[str, object]) -> None:
    model = build(**shape)
    logits = traced(model).logits()
    assert logits.dtype == np.float32
    close(logits, uncached(model, IDS))
    close(logits[-1], fp32(model).prefill(0, IDS))


@pytest.mark.parametrize("n_known", [1, 3, len(IDS) - 1])
def test_hidden_states_that_are_known_are_not_computed_again(
    build: Build, shape: dict[str, object], n_known: int
) -> None:
    trace = traced(build(**shape))
    changed = trace.hidden[:, :n_known, ::-1]  # only the tokens after them can show it
    for known in (trace.hidden[:, :n_known], changed):
        ids, hidden = trace_module.compute_hidden(trace.model, IDS, known=known)
        assert ids.tolist() == IDS
        assert (hidden[:, :n_known] == known).all()
    close(trace_module.compute_hidden(trace.model, IDS, known=trace.hidden[:, :n_known])[1], trace.hidden)
    assert not np.allclose(hidden[-1, n_known:], trace.hidden[-1, n_known:], atol=1e-3)


def test_all_activations_and_sizes_that_are_multiples_of_nothing(build: Build) -> None:
    for activation in ("relu", "gelu_tanh", "gelu_erf"):
        model = build(architecture="classic", activation=activation, n_embd=30, n_head=3, n_ff=37, vocab_size=53)
        ids = [i % 53 for i in IDS]
        close(traced(model, ids).logits(), uncached(model, ids))


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_quantized_weights_are_those_that_the_cpu_engine_uses(
    build: Build, shape: dict[str, object], sample_data: Path, tmp_path: Path, precision: load.Precision
) -> None:
    folder = saved(tmp_path / "model", build(**shape | {"vocab_size": 400}), sample_data)
    model = TraceModel.load(checkpoint.read_model(folder), precision)
    engine = opened(folder, precision)
    for name, weight in engine.fp32_weights().items():
        assert (weight == model.weights[name]).all(), name
    logits = compute_trace(model, IDS).logits([23])[0]
    exact = CpuEngine(model.config, model.weights, EngineConfig(n_slots=1)).prefill(0, IDS)
    close(logits, exact)
    assert np.abs(logits - engine.prefill(0, IDS)).max() < ROUNDED_TOLERANCE[precision] * logits.std()


def test_a_directory_with_int8_weights_only_and_one_with_fp32_weights(
    build: Build, sample_data: Path, tmp_path: Path
) -> None:
    folder = saved(tmp_path / "model", build(vocab_size=400, tied=False), sample_data)
    write_int8_model(checkpoint.read_model(folder), tmp_path / "int8")
    rounded = TraceModel.load(checkpoint.read_model(folder), "int8").weights
    for name, weight in TraceModel.load(checkpoint.read_model(tmp_path / "int8")).weights.items():
        assert (weight == rounded[name]).all()
    whole = TraceModel.load(checkpoint.read_model(folder))
    close(compute_trace(whole, IDS).logits([23])[0], opened(folder, "fp32").prefill(0, IDS))


def test_torch_engine_hands_its_weights_over(build: Build) -> None:
    model = build(tied=True)
    weights = TorchEngine(model, device="cpu").fp32_weights()
    expected = arrays_of(model)
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert (weight == expected[name]).all()


def test_hidden_states_and_attention_are_those_inside_the_torch_model(
    build: Build, shape: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(**shape)
    hidden: list[torch.Tensor] = []
    attention: list[torch.Tensor] = []
    for block in model.layers:
        block.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0]))
    model.norm.register_forward_pre_hook(lambda _, inputs: hidden.append(inputs[0][0]))

    def reveal(q, k, v, *, attn_mask, is_causal, scale, **_):  # type: ignore[no-untyped-def]
        T, groups = q.shape[2], q.shape[1] // k.shape[1]
        mask = torch.ones(T, T, dtype=torch.bool).tril() if is_causal else attn_mask
        scores = q @ k.repeat_interleave(groups, 1).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
        probs = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        attention.append(probs[0])
        return probs @ v.repeat_interleave(groups, 1)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", reveal)
    uncached(model, IDS)
    trace = traced(model)
    assert trace.hidden.shape == (3, 24, 32)
    close(trace.hidden, torch.stack(hidden))
    assert trace.attention.shape == (2, 4, 24, 24)
    close(trace.attention, torch.stack(attention))
    close(trace.attention.sum(-1), np.ones((2, 4, 24)))


def test_attention_as_bytes_keeps_small_probabilities(build: Build) -> None:
    trace = traced(build())
    for layer in range(2):
        as_bytes = trace.attention_bytes(layer)
        assert as_bytes.dtype == np.uint8
        assert np.abs((as_bytes / 255.0) ** 2 - trace.attention[layer]).max() < 0.004
    assert not as_bytes[:, 0, 1:].any()
    with pytest.raises(UserError, match="layer 2 does not exist: the model has 2"):
        trace.attention_bytes(2)


def test_surprise_is_what_the_engine_scores(build: Build, shape: dict[str, object]) -> None:
    model = build(**shape)
    trace = traced(model)
    (logprobs,) = fp32(model).logprobs([IDS])
    assert np.isnan(trace.surprise_bits[0])
    np.testing.assert_allclose(trace.surprise_bits[1:], -logprobs / np.log(2), atol=1e-4)
    assert trace.mean_bits == pytest.approx(float(-logprobs.mean() / np.log(2)), abs=1e-4)


def test_ranks_count_the_ids_that_are_more_likely(build: Build) -> None:
    trace = traced(build())
    logits = trace.logits()
    assert trace.ranks[0] == 0
    for i in range(1, 24):
        assert trace.ranks[i] == 1 + sum(logits[i - 1] > logits[i - 1, IDS[i]])


def test_predictions_list_the_most_likely_ids_in_order(build: Build) -> None:
    trace = traced(build())
    probs = torch.from_numpy(trace.logits()).double().softmax(-1).numpy()
    best = np.argsort(-probs, axis=1)[:, :8]
    assert (trace.predictions.top_ids[0] == best).all()
    np.testing.assert_allclose(trace.predictions.top_probs[0], np.take_along_axis(probs, best, 1), rtol=1e-4)
    np.testing.assert_allclose(trace.predictions.entropy_bits[0], -(probs * np.log2(probs)).sum(1), rtol=1e-4)


def test_lens_reads_every_stage_through_the_last_norm_and_head(build: Build, shape: dict[str, object]) -> None:
    model = build(**shape)
    trace = traced(model)
    lens = trace.logit_lens(top=3, positions=[5, 23])
    with torch.no_grad():
        logits = model.logits(model.norm(torch.from_numpy(trace.hidden[:, [5, 23]])))
    logprobs = logits.double().log_softmax(-1).numpy()
    probs, final = np.exp(logprobs), logprobs[-1].argmax(-1)
    assert (lens.stages == [0, 1, 2]).all()
    assert lens.top_ids.shape == lens.top_probs.shape == (3, 2, 3)
    assert (lens.top_ids == np.argsort(-probs, axis=-1)[..., :3]).all()
    assert (lens.final_ids == final).all()
    for column, position in enumerate((5, 23)):
        close(lens.final_probs[:, column], probs[:, column, final[column]], 1e-4)
        kl = (probs[-1, column] * (logprobs[-1, column] - logprobs[:, column])).sum(-1) / np.log(2)
        close(lens.kl_bits[:, column], kl, 1e-4)
        if position < 23:
            close(lens.next_probs[:, column], probs[:, column, IDS[position + 1]], 1e-4)
            ranks = 1 + (probs[:, column] > probs[:, column, [IDS[position + 1]]]).sum(-1)
            assert (lens.next_ranks[:, column] == ranks).all()
    assert np.isnan(lens.next_probs[:, 1]).all(), "nothing follows the last id"
    assert (lens.next_ranks[:, 1] == 0).all()
    assert (lens.final_ranks[-1] == 1).all()
    assert (lens.kl_bits[-1] == 0).all()


def test_lens_does_not_depend_on_how_many_logits_are_in_memory(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = traced(build())
    whole = trace.logit_lens()
    monkeypatch.setattr(trace_module, "LOGITS_PER_CHUNK", 61 * 5)
    parts = trace.logit_lens()
    close(parts.top_probs, whole.top_probs)
    close(parts.kl_bits, whole.kl_bits)
    assert (parts.next_ranks == whole.next_ranks).all()
    assert (parts.final_ids == whole.final_ids).all()
    assert (parts.final_ranks == whole.final_ranks).all()


def test_ablating_heads_is_cutting_their_columns_of_the_output_projection(
    build: Build, shape: dict[str, object]
) -> None:
    model = build(**shape)
    trace = traced(model)
    ablated = trace.ablate([(1, 2)]).ablate([(0, 3)])
    D = model.config.head_dim
    with torch.no_grad():
        model.layers[1].self_attn.o_proj.weight[:, 2 * D : 3 * D] = 0
        model.layers[0].self_attn.o_proj.weight[:, 3 * D : 4 * D] = 0
    assert ablated.ablated == ((0, 3), (1, 2))
    close(ablated.logits(), uncached(model, IDS))
    assert np.abs(ablated.logits() - trace.logits()).max() > 0.01
    assert ablated.mean_bits != trace.mean_bits
    assert (trace.ablate([]).hidden == trace.hidden).all()
    assert trace.ablated == ()


@pytest.mark.parametrize("pair", [(2, 0), (-1, 0), (0, 4), (0, -1)], ids=str)
def test_heads_that_do_not_exist_are_refused(build: Build, pair: tuple[int, int]) -> None:
    with pytest.raises(UserError, match=r"does not exist: .*numbered from 0"):
        traced(build()).ablate([pair])


def test_too_many_ids_are_refused_or_cut_to_the_last_ones(build: Build) -> None:
    model = build()
    numpy_model = TraceModel(model.config, arrays_of(model))
    with pytest.raises(UserError, match=r"26 token ids .* 1 to 24 \(model.n_ctx\).*window=True \(--window\)"):
        compute_trace(numpy_model, [7, 8, *IDS])
    assert (compute_trace(numpy_model, [7, 8, *IDS], window=True).hidden == traced(model).hidden).all()
    assert compute_trace(numpy_model, IDS[:3], window=True).hidden.shape == (3, 3, 32)


@pytest.mark.parametrize("ids", [[], [61], [-1, 3]], ids=str)
def test_ids_outside_the_vocabulary_and_no_ids_are_refused(build: Build, ids: list[int]) -> None:
    with pytest.raises(UserError, match="token id"):
        traced(build(), ids)


def test_a_single_id_has_no_surprise(build: Build) -> None:
    trace = traced(build(), IDS[:1])
    assert np.isnan(trace.surprise_bits).tolist() == [True]
    assert np.isnan(trace.mean_bits)
    assert trace.attention[0, 0].tolist() == [[1.0]]


def test_positions_of_the_lens_outside_the_text_are_refused(build: Build) -> None:
    with pytest.raises(UserError, match="outside the text of 24 tokens"):
        traced(build()).logit_lens(positions=[24])


@pytest.mark.extended
def test_memory_of_12_layers_of_12_heads_at_512_tokens(build: Build) -> None:
    """The forward pass has the hidden states and a few (T, T) matrices in memory, not those of all heads at once."""
    T = 512
    model = build(n_ctx=T, n_layer=12, n_head=12, n_embd=48, n_ff=64)
    numpy_model = TraceModel(model.config, arrays_of(model))
    ids = np.random.default_rng(1).integers(0, 61, T)
    tracemalloc.start()
    try:
        trace = compute_trace(numpy_model, ids)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < trace.hidden.nbytes + 4 * T * (6 * T + 2 * 64 + 8 * 48)
    assert trace.attention_bytes(11).shape == (12, T, T)


def test_tracing_imports_neither_torch_nor_numba() -> None:
    program = (
        "import sys\n"
        "from tinystories.checkpoint import BUNDLED_MODEL, read_model\n"
        "from tinystories.engine.trace.model import TraceModel\n"
        "from tinystories.engine.trace.trace import compute_trace\n"
        "trace = compute_trace(TraceModel.load(read_model(BUNDLED_MODEL)), [4095, 423, 433])\n"
        "assert trace.surprise_bits.shape == (3,)\n"
        "sys.exit(len({'torch', 'numba', 'matplotlib'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0

"""The CPU engine against the torch engine, packed weights against what they stand for, and files that are not whole."""

import importlib.metadata
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import IDS, Build, arrays_of, close, exercise, fp32, opened, saved, uncached
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load_file, save_file

from tinystories import checkpoint
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.engine.cpu import jit, thread_pool, weight_table
from tinystories.engine.cpu.engine import CpuEngine
from tinystories.engine.cpu.kernels.layout import MODEL
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.select import has_cuda, select_engine
from tinystories.engine.torch_engine import TorchEngine
from tinystories.errors import UserError
from tinystories.files import sha256, write_json
from tinystories.generate.batching import Request, generate_all
from tinystories.model import GPT
from tinystories.weights import load, quantize
from tinystories.weights.names import expected_shapes
from tinystories.weights.safetensors_file import SafetensorsFile, write_safetensors

PRECISIONS: list[load.Precision] = ["fp32", "int8", "int4"]
ENGINE_PRECISIONS = [*PRECISIONS, "int8-a8"]


@pytest.fixture
def folder(build: Build, sample_data: Path, tmp_path: Path) -> Path:
    return saved(tmp_path / "model", build(vocab_size=400, tied=False), sample_data)


def test_steps_equal_one_pass_up_to_the_last_place(build: Build, shape: dict[str, object]) -> None:
    expected = uncached(build(**shape), IDS)
    engine = fp32(build(**shape))
    close(engine.prefill(0, IDS[:5]), expected[4])
    for i in range(5, 24):
        close(engine.step([0], [IDS[i]]), expected[i : i + 1])


@pytest.mark.parametrize("sizes", [(30, 3, 37, 53), (32, 4, 100, 8), (48, 12, 31, 131)], ids=str)
def test_sizes_need_not_be_multiples_of_anything(
    build: Build, sizes: tuple[int, ...], shape: dict[str, object]
) -> None:
    n_embd, n_head, n_ff, vocab_size = sizes
    if shape.get("n_kv_head"):
        shape = shape | {"n_kv_head": 1}
    model = build(**shape | {"n_embd": n_embd, "n_head": n_head, "n_ff": n_ff, "vocab_size": vocab_size})
    if model.config.head_dim % 2 and model.config.architecture == "modern":
        pytest.skip("rotations need pairs")
    ids = [i % vocab_size for i in IDS]
    engine = fp32(model, threads=3)
    close(engine.prefill(0, ids[:-1]), uncached(model, ids)[-2])
    close(engine.step([0], ids[-1:])[0], uncached(model, ids)[-1])


@pytest.mark.parametrize("changes", [{}, {"architecture": "classic", "window": 70}], ids=str)
def test_a_prompt_longer_than_one_call_is_read_in_parts(build: Build, changes: dict[str, object]) -> None:
    model = build(n_ctx=200, **changes)
    ids = np.random.default_rng(3).integers(0, 61, 200).tolist()
    close(fp32(model).prefill(0, ids), uncached(model, ids)[-1])


@pytest.mark.parametrize("name", ["classic", "modern"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_slots_do_not_touch_each_other(build: Build, name: str, seed: int) -> None:
    """Any order of prefills, frees and steps of any set of slots, in any order, gives what each slot alone would."""
    rng = np.random.default_rng(seed)
    model = build(architecture=name, n_ctx=6, n_layer=1, vocab_size=11)
    engine = fp32(model, n_slots=4)
    exercise(engine, rng, lambda ids: uncached(model, ids)[-1])


@pytest.mark.parametrize("precision", ENGINE_PRECISIONS)
def test_neither_threads_nor_other_rows_change_a_logit(
    build: Build, sample_data: Path, tmp_path: Path, precision: str, shape: dict[str, object]
) -> None:
    """Bit for bit."""
    folder = saved(tmp_path / "model", build(**shape | {"vocab_size": 400}), sample_data)
    found = []
    for threads, n_slots in ((1, 1), (2, 1), (3, 1), (2, 7), (1, 4)):
        engine = opened(folder, precision, threads=threads, n_slots=n_slots)
        before = [engine.prefill(slot, IDS[: 9 - slot]) for slot in range(n_slots)]
        found.append((before[0], engine.step(range(n_slots), [5] * n_slots)[0]))
    for one in found[1:]:
        assert (one[0] == found[0][0]).all()
        assert (one[1] == found[0][1]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_read_from_memory_give_the_same_bits_as_from_caches(
    folder: Path, precision: load.Precision, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for cache_bytes in (0, 10**9):
        monkeypatch.setattr(weight_table, "CACHE_BYTES", cache_bytes)
        engine = opened(folder, precision)
        assert engine.runtime.weight_table.table[MODEL.exceeds_caches] == (cache_bytes == 0)
        found.append(np.stack([engine.prefill(0, IDS[:9]), *(engine.step([0], [i])[0] for i in range(3))]))
    assert (found[0] == found[1]).all()


def test_the_caller_may_keep_what_it_was_given(build: Build) -> None:
    engine = fp32(build(), n_slots=2)
    first = engine.prefill(0, IDS[:3])
    kept = first.copy()
    engine.prefill(1, IDS[4:9])
    second = engine.step([0, 1], [1, 2])
    kept_too = second.copy()
    engine.step([0, 1], [3, 4])
    assert (kept == first).all()
    assert (kept_too == second).all()


def test_more_streams_than_rows_of_a_call_step_together(build: Build) -> None:
    model = build(n_ctx=6, n_layer=1)
    engine = fp32(model, n_slots=70)
    for slot in range(70):
        engine.prefill(slot, [slot % 61])
    logits = engine.step(range(70), [3] * 70)
    close(logits[69], uncached(model, [69 % 61, 3])[-1])


def test_logprobs_equal_those_of_torch_and_leave_slots_alone(build: Build, shape: dict[str, object]) -> None:
    model = build(**shape)
    engine = fp32(model)
    engine.prefill(0, IDS[:5])
    sequences = [IDS[:2], [*IDS, 3], IDS[3:9], np.array(IDS[4:16], dtype=np.uint16)]
    for a, b in zip(engine.logprobs(sequences), TorchEngine(model, device="cpu").logprobs(sequences), strict=True):
        close(a, b)
    close(engine.step([0], [7])[0], uncached(model, [*IDS[:5], 7])[-1])


def test_300_greedy_tokens_are_those_of_torch(build: Build, shape: dict[str, object], sample_data: Path) -> None:
    model = build(**shape | {"vocab_size": 400})
    request = Request(prompt="Once", settings=SamplingConfig(temperature=0), max_tokens=300, ignore_end=True)
    stories = [
        generate_all(engine, Tokenizer.load(sample_data), [request])[0].ids
        for engine in (fp32(model), TorchEngine(model, device="cpu"))
    ]
    assert len(stories[0]) == 300
    assert stories[0] == stories[1]


@pytest.mark.parametrize(
    "shape",
    [
        {"architecture": "classic", "tied": False},
        {"architecture": "classic", "tied": True},
        {"architecture": "modern", "tied": False},
        {"architecture": "modern", "tied": True, "n_kv_head": 2},
    ],
    ids=str,
)
def test_a_trained_model_reads_and_writes_as_torch_does(
    shape: dict[str, object], trained: Callable[[ModelConfig], tuple[GPT, np.ndarray]], sample_data: Path
) -> None:
    """Logits within 1e-4 at each of 512 positions of stories, and 300 greedy ids."""
    config = ModelConfig(vocab_size=400, n_ctx=512, n_layer=2, n_embd=64, n_head=4, n_ff=96, **shape)  # type: ignore[arg-type]
    model, ids = trained(config)
    engine = fp32(model)
    found = np.concatenate([logits for _, logits in engine.forward_chunks(engine.kv_cache, 0, ids, all_logits=True)])
    assert np.abs(found - uncached(model, ids.tolist())).max() <= 1e-4
    request = Request(
        prompt="Once upon a time", settings=SamplingConfig(temperature=0), max_tokens=300, ignore_end=True
    )
    stories = [
        generate_all(one, Tokenizer.load(sample_data), [request])[0].ids
        for one in (engine, TorchEngine(model, device="cpu"))
    ]
    assert len(stories[0]) == 300
    assert stories[0] == stories[1]


MATRICES = arrays.arrays(
    np.float32,
    st.tuples(st.integers(1, 20), st.integers(1, 70)),
    elements=st.floats(-4, 4, width=32, allow_subnormal=False),
)


@settings(max_examples=60, deadline=None)
@given(weight=MATRICES)
@example(weight=np.array([[7.901605e-29]], dtype=np.float32))
@example(weight=np.array([[1.2e-28, -1.2e-28]], dtype=np.float32))
def test_packing_changes_no_weight_by_more_than_half_a_step(weight: np.ndarray) -> None:
    rows, inner = weight.shape
    back = quantize.dequantize_int8(*quantize.quantize_int8(weight), rows, inner)
    zero = 128 * quantize.MIN_SCALE  # at most this large, a weight may count as zero
    assert (np.abs(back - weight) <= np.abs(weight).max(axis=1, keepdims=True) / 127 * 0.501 + zero).all()
    back = quantize.dequantize_int4(*quantize.quantize_int4(weight), rows, inner)
    whole = np.zeros((rows, quantize.round_up(inner, 32)), dtype=np.float32)
    whole[:, :inner] = weight
    largest = np.abs(whole).reshape(rows, -1, 32).max(axis=2).repeat(32, axis=1)[:, :inner]
    assert (np.abs(back - weight) <= largest / 8 * 1.05 + zero).all()


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_packed_products_are_those_of_the_unpacked_matrices(
    build: Build, sample_data: Path, tmp_path: Path, precision: load.Precision, shape: dict[str, object]
) -> None:
    """An engine makes of packed weights what fp32 makes of their values.

    Except for the integers of x, which have 16 bits or 8, and the keys and values, which have 16.
    """
    files = checkpoint.read_model(saved(tmp_path / "model", build(**shape | {"vocab_size": 400}), sample_data))
    shapes = expected_shapes(files.config)
    load.load_or_quantize(files, precision)  # which writes them
    packed = load.load_or_quantize(files, precision)
    plain = {}
    for name, size in shapes.items():
        if name in packed:
            plain[name] = packed[name]
        elif f"{name}.rows" in packed:
            plain[name] = packed[f"{name}.rows"].reshape(size) * packed[f"{name}.scales"][:, None]
        elif f"{name}.int8" in packed:
            plain[name] = quantize.dequantize_int8(packed[f"{name}.int8"], packed[f"{name}.scales"], *size)
        else:
            plain[name] = quantize.dequantize_int4(packed[f"{name}.int4"], packed[f"{name}.scales"], *size)
        plain[name] = np.ascontiguousarray(plain[name], dtype=np.float32)
    a, b = CpuEngine(files.config, packed), CpuEngine(files.config, plain)
    tolerance = 4e-3 if precision == "int8" else 0.25
    close(a.prefill(0, IDS), b.prefill(0, IDS), tolerance=tolerance)
    for i in range(1, 5):
        a.prefill(0, IDS[:i])
        b.prefill(0, IDS[:i])
        found, expected = a.step([0], [i]), b.step([0], [i])
        close(found, expected, tolerance=tolerance)
        assert np.corrcoef(found[0], expected[0])[0, 1] > 0.998


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_of_the_largest_4_bit_products_fit(build: Build, sign: int) -> None:
    """All inputs equal, nearly all weights the largest: nothing comes nearer to the end of 16 bits."""
    model = build(n_embd=64, n_layer=1, vocab_size=61, tied=False)
    plain = arrays_of(model)
    for name in plain:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            plain[name] = np.zeros_like(plain[name])
    plain["embed_tokens.weight"] = np.full((61, 64), sign, dtype=np.float32)
    plain["norm.weight"] = np.ones(64, dtype=np.float32)
    head = np.full((61, 64), 7, dtype=np.float32)
    head[:, ::32] = -8
    plain["lm_head.weight"] = head
    for name in [name for name in plain if name == "lm_head.weight" or name.endswith("_proj.weight")]:
        plain[f"{name}.int4"], plain[f"{name}.scales"] = quantize.quantize_int4(plain.pop(name))
    close(CpuEngine(model.config, plain).prefill(0, [1, 2, 3]), np.full(61, sign * (62 * 7 - 2 * 8)), tolerance=1e-4)


def test_weights_of_two_precisions_are_refused(build: Build) -> None:
    model = build(n_embd=64, n_layer=1, vocab_size=61, tied=False)
    mixed = arrays_of(model)
    head = mixed.pop("lm_head.weight")
    mixed["lm_head.weight.int4"], mixed["lm_head.weight.scales"] = quantize.quantize_int4(head)
    with pytest.raises(UserError, match=r"q_proj is in fp32, and others are in int4"):
        CpuEngine(model.config, mixed)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("precision", ["int8", "int8-a8", "int4"])
def test_packed_weights_are_near_the_models(
    build: Build, sample_data: Path, tmp_path: Path, precision: str, tied: bool
) -> None:
    model = build(vocab_size=400, tied=tied)
    engine = opened(saved(tmp_path / "model", model, sample_data), precision)
    found, expected = engine.prefill(0, IDS), uncached(model, IDS)[-1]
    correlation = np.corrcoef(found, expected)[0, 1]
    assert correlation > {"int8": 0.9995, "int8-a8": 0.999, "int4": 0.95}[precision]


def test_activations_of_8_bits_use_the_file_of_int8(folder: Path) -> None:
    first = opened(folder).prefill(0, IDS)
    packed = (folder / "packed-int8.safetensors").stat().st_mtime_ns
    found = opened(folder, "int8-a8").prefill(0, IDS)
    assert (found != first).all()
    assert [(path.name, path.stat().st_mtime_ns) for path in folder.glob("packed-*")] == [
        ("packed-int8.safetensors", packed)
    ]


def test_activations_of_8_bits_need_int8_weights(build: Build, sample_data: Path, tmp_path: Path) -> None:
    files = checkpoint.read_model(saved(tmp_path / "model", build(vocab_size=400), sample_data))
    weights = load.load_or_quantize(files, "int4")
    with pytest.raises(UserError, match="precision int8-a8 needs other weights than int4"):
        CpuEngine(files.config, weights, EngineConfig(precision="int8-a8"))


def test_a_packed_file_is_made_once_and_read_by_others(folder: Path) -> None:
    first = opened(folder).prefill(0, IDS)
    path = folder / "packed-int8.safetensors"
    made = path.stat().st_mtime_ns
    assert (opened(folder).prefill(0, IDS) == first).all()
    assert path.stat().st_mtime_ns == made
    assert {name for name in load_file(path) if name.endswith(".int8")}, "a safetensors file like any other"


def damaged(data: bytes, how: str) -> bytes:
    match how:
        case "truncated":
            return data[: len(data) // 2]
        case "empty":
            return b""
        case "a bit":
            return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]
        case "huge header":
            return (2**62).to_bytes(8, "little") + data[8:]
        case "no json":
            return data[:8] + b"x" + data[9:]
        case "no object":
            return (9).to_bytes(8, "little") + b'"a story"' + data[8:]
        case "no metadata":
            return (2).to_bytes(8, "little") + b"{}" + data[8:]
        case "odd metadata":
            return (20).to_bytes(8, "little") + b'{"__metadata__": []} '[:20] + data[8:]
    raise AssertionError(how)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_packed_file_of_another_size_with_true_checksums_is_made_again(
    build: Build, sample_data: Path, tmp_path: Path, precision: load.Precision, tied: bool
) -> None:
    """The machine code would read past its end."""
    files = checkpoint.read_model(saved(tmp_path / "model", build(vocab_size=400, tied=tied), sample_data))
    path = load.quantized_path(files, precision)
    whole = dict(load.load_or_quantize(files, precision))
    facts = SafetensorsFile(path).metadata
    write_safetensors(path, whole | {"layers.0.self_attn.q_proj.bias": np.zeros(1, np.float32)}, facts)
    assert dict(load.load_or_quantize(files, precision)).keys() == whole.keys()
    for name in [name for name in whole if not name.endswith(".filling")]:
        for cut in (whole[name].reshape(-1)[:-1], whole[name].reshape(-1).view(np.uint8), None):
            changed = {k: v for k, v in whole.items() if not k.endswith(".filling")} | {name: cut}
            write_safetensors(path, {k: v for k, v in changed.items() if v is not None}, facts)
            if cut is not None and cut.dtype == whole[name].dtype and cut.size == whole[name].size:
                continue
            load.load_or_quantize(files, precision)
            assert SafetensorsFile(path)[name].size == whole[name].size
    assert dict(load.load_or_quantize(files, precision)).keys() == whole.keys()


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "a bit", "huge header", "no json", "no object", "no metadata", "odd metadata"]
)
def test_a_damaged_packed_file_is_made_again(folder: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    first = opened(folder).prefill(0, IDS)
    path = folder / "packed-int8.safetensors"
    whole = path.read_bytes()
    path.write_bytes(damaged(whole, how))
    assert (opened(folder).prefill(0, IDS) == first).all()
    assert "quantizing the weights again" in caplog.text
    assert path.read_bytes() == whole


def test_a_packed_file_in_an_earlier_layout_is_made_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = opened(folder).prefill(0, IDS)
    path = folder / "packed-int8.safetensors"
    current = path.read_bytes()
    file = SafetensorsFile(path)
    tensors = {name: array for name, array in file.items() if not name.endswith(".filling")}
    write_safetensors(path, tensors, {k: v for k, v in file.metadata.items() if k != "sha256"} | {"layout": "2"})
    assert (opened(folder).prefill(0, IDS) == first).all()
    assert "by another version of tinystories): quantizing the weights again" in caplog.text
    assert path.read_bytes() == current


def test_other_weights_are_packed_again(build: Build, folder: Path, sample_data: Path) -> None:
    first = opened(folder).prefill(0, IDS)
    packed = (folder / "packed-int8.safetensors").read_bytes()
    model = build(vocab_size=400, tied=False, n_ff=40)
    saved(folder, model, sample_data)
    (folder / "packed-int8.safetensors").write_bytes(packed)
    found = opened(folder).prefill(0, IDS)
    assert not np.allclose(found, first)
    assert np.corrcoef(found, uncached(model, IDS)[-1])[0, 1] > 0.999


def test_a_folder_that_cannot_be_written_to_is_no_obstacle(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(os, "replace", refuse)
    assert np.isfinite(opened(folder).prefill(0, IDS)).all()
    assert "read-only file system" in caplog.text
    assert not [path for path in folder.iterdir() if "packed" in path.name]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_altered_weights_are_refused(folder: Path, precision: load.Precision) -> None:
    opened(folder, precision)
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-7] + b"\x01" + data[-6:])
    with pytest.raises(UserError, match="does not match its checksum"):
        opened(folder, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w | {"norm.weight": np.full(32, np.nan, np.float32)}, "norm.weight .*not finite"),
        (lambda w: w | {"lm_head.weight": w["lm_head.weight"] * np.float32(np.inf)}, "lm_head.weight .*not finite"),
        (lambda w: w | {"norm.weight": w["norm.weight"][:-1]}, "norm.weight .*shape"),
        (lambda w: w | {"norm.weight": w["norm.weight"].astype(np.float64)}, "cannot be read|not fp32"),
        (lambda w: w | {"more": w["norm.weight"]}, "more' is unknown"),
        (lambda w: {k: v for k, v in w.items() if k != "norm.weight"}, "norm.weight' is missing"),
    ],
    ids=["nan", "inf", "shape", "type", "unknown", "missing"],
)
def test_invalid_weights_are_refused_by_name(
    folder: Path, precision: load.Precision, change: Callable[[Any], Any], message: str
) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path)
    described = checkpoint.read_json(folder / "config.json")
    described["files"]["model.safetensors"] = sha256(path)
    write_json(folder / "config.json", described)
    with pytest.raises(UserError, match=message):
        opened(folder, precision)
    assert not list(folder.glob("packed*"))


def test_requests_out_of_range_are_refused(build: Build) -> None:
    engine = fp32(build(), n_slots=2)
    with pytest.raises(UserError, match="token id 61 is outside"):
        engine.prefill(0, [1, 61])
    with pytest.raises(UserError, match="token id -1 is outside"):
        engine.logprobs([[1, -1]])
    with pytest.raises(UserError, match="do not fit: the model takes 1 to 24"):
        engine.prefill(0, [1] * 25)
    with pytest.raises(UserError, match="slot 2 does not exist"):
        engine.prefill(2, [1])
    with pytest.raises(UserError, match="number of slots"):
        fp32(build(), n_slots=0)
    for threads in (0, 100_000):
        with pytest.raises(UserError, match="number of threads"):
            fp32(build(), threads=threads)
    with pytest.raises(UserError, match=r"slots need .* GB of memory"):
        fp32(build(), n_slots=10**10).prefill(0, [1])


@pytest.mark.parametrize("precision", ENGINE_PRECISIONS)
def test_logits_that_overflow_are_an_error(build: Build, sample_data: Path, tmp_path: Path, precision: str) -> None:
    model = build(vocab_size=400, architecture="classic")
    with torch.no_grad():
        model.layers[0].mlp.up_proj.weight.mul_(1e30)  # type: ignore[operator, union-attr]
        model.layers[0].mlp.down_proj.weight.mul_(1e30)  # type: ignore[operator, union-attr]
    engine = opened(saved(tmp_path / "model", model, sample_data), precision)
    with pytest.raises(UserError, match="not finite"):
        generate_all(engine, Tokenizer.load(sample_data), [Request(prompt="Once", max_tokens=3)])


def test_gates_far_below_zero_close(build: Build) -> None:
    """e^x of a gate leaves the range of fp32 and must not come back as something else."""
    model = build(n_layer=1)
    with torch.no_grad():
        model.layers[0].mlp.gate_proj.weight.mul_(60)  # type: ignore[operator, union-attr]
    expected = uncached(model, IDS)[-1]
    close(fp32(model).prefill(0, IDS), expected, tolerance=1e-4 * np.abs(expected).max())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(folder: Path) -> None:
    program = (
        "import os, tinystories\n"
        f"teller = tinystories.load({str(folder)!r}, engine='cpu', threads=2)\n"
        "first = teller.generate('Once', max_tokens=5, seed=1)\n"
        "child = os.fork()\n"
        "again = teller.generate('Once', max_tokens=5, seed=1)\n"
        "assert again.ids == first.ids\n"
        "if child == 0: os._exit(0)\n"
        "assert os.waitpid(child, 0)[1] == 0\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)


def test_callers_in_several_threads_wait_for_each_other(build: Build) -> None:
    model = build()
    engines = [fp32(model, threads=2), fp32(model, threads=2)]
    sequences = [IDS[:20], IDS[2:24], IDS[1:9]]
    expected = engines[0].logprobs(sequences)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda i: engines[i % 2].logprobs(sequences), range(40)):
            for a, b in zip(found, expected, strict=True):
                assert (a == b).all()


@pytest.mark.skipif(os.name == "nt", reason="permissions are others there")
def test_a_packed_file_may_be_read_by_others(folder: Path) -> None:
    opened(folder)
    umask = os.umask(0)
    os.umask(umask)
    assert (folder / "packed-int8.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_copied_model_is_not_packed_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    first = opened(folder).prefill(0, IDS)
    caplog.clear()
    os.utime(folder / "model.safetensors", (1, 1))
    assert (opened(folder).prefill(0, IDS) == first).all()
    assert not caplog.text


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, np.inf),
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, np.inf),
        ({"cpu.max": "?"}, np.inf),
        ({}, np.inf),
    ],
    ids=str,
)
def test_a_container_has_the_cores_it_was_given(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert thread_pool.cgroup_cpu_quota(tmp_path) == expected
    assert 1 <= thread_pool.count_physical_cores() <= 16


@pytest.mark.parametrize("package", ["numba", "llvmlite", "numpy"])
def test_versions_are_those_of_the_metadata(package: str) -> None:
    assert jit.installed_version(package) == importlib.metadata.version(package)


def test_a_package_that_is_not_installed_has_no_version() -> None:
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        jit.installed_version("no-such-package")


def test_damaged_machine_code_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("TINYSTORIES_CACHE", str(tmp_path / "cache"))
    made: list[bytes] = []
    monkeypatch.setattr(jit, "compile_object", lambda _: made.append(b"code") or b"code")
    assert jit.load_or_compile("int8") == jit.load_or_compile("int8") == b"code"
    assert len(made) == 1
    assert "compiling the CPU engine" in caplog.text
    path = jit.cache_path("int8")
    path.write_bytes(path.read_bytes()[:-1])
    assert jit.load_or_compile("int8") == b"code"
    assert len(made) == 2
    assert "is damaged" in caplog.text
    (tmp_path / "cache").rename(tmp_path / "former")
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert jit.load_or_compile("int8") == b"code"
    assert "the next start compiles again" in caplog.text


def test_the_name_of_the_machine_code_depends_on_all_that_is_compiled() -> None:
    """The kernels take nothing else from the package than two constants, which are in the key too."""
    program = (
        "import sys, tinystories.engine.cpu as cpu\n"
        "before = set(sys.modules)\n"
        "import tinystories.engine.cpu.kernels.forward\n"
        "names = {name for name in set(sys.modules) - before if name.startswith('tinystories')}\n"
        "names -= {'tinystories.weights', 'tinystories.weights.quantize'}\n"
        "compiled = {sys.modules[name].__file__ for name in names}\n"
        "from tinystories.engine.cpu import objects\n"
        "assert compiled and compiled <= set(map(str, objects.SOURCE_FILES)), compiled\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_a_second_start_imports_neither_torch_nor_numba(folder: Path) -> None:
    opened(folder)
    program = (
        "import sys, tinystories\n"
        f"story = tinystories.load({str(folder)!r}, engine='cpu').generate('Once', max_tokens=5, seed=1)\n"
        "assert story.text.startswith('Once')\n"
        "sys.exit(len({'torch', 'numba'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_numba_still_works_after_the_machine_code_was_loaded_without_it(folder: Path) -> None:
    opened(folder)
    program = (
        "import sys, tinystories\n"
        f"teller = tinystories.load({str(folder)!r}, engine='cpu')\n"
        "import numba, numpy as np\n"
        "double = numba.njit(lambda n: np.ones(n) * 2)\n"
        "assert double(5).sum() == 10\n"
        "del double\n"
        "assert teller.generate('Once', max_tokens=5, seed=1).text\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "torch" if has_cuda() else "cpu"),
        ({"device": "cpu"}, "cpu"),
        ({"device": "cuda"}, "torch"),
        ({"device": torch.device("cpu")}, "cpu"),
        ({"precision": "int4"}, "cpu"),
        ({"precision": "bf16"}, "torch"),
        ({"engine": "torch"}, "torch"),
        ({"engine": "cpu", "precision": "fp32"}, "cpu"),
    ],
    ids=str,
)
def test_auto_selects_the_engine_that_the_settings_need(given: dict[str, Any], expected: str) -> None:
    assert select_engine(EngineConfig(**given)) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "gpu"}, "engine gpu"),
        ({"precision": "int3"}, "precision int3"),
        ({"engine": "cpu", "device": "cuda"}, "device cuda"),
        ({"engine": "cpu", "precision": "bf16"}, "bf16"),
        ({"engine": "torch", "precision": "int8"}, "int8"),
        ({"engine": "torch", "precision": "int8-a8"}, "does not support int8-a8"),
        ({"engine": "torch", "shortlist": True}, "--shortlist is for the CPU engine"),
        ({"engine": "torch", "threads": 2}, "--threads is for the CPU engine"),
        ({"n_slots": 0}, "number of slots must be at least 1, not 0"),
        ({"threads": 0}, "number of threads must be from 1"),
    ],
    ids=str,
)
def test_settings_that_no_engine_supports_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig(**given)

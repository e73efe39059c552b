import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engines import IDS, Build, close, exercise, saved, uncached
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tinystories import checkpoint
from tinystories.engine import torch_engine
from tinystories.engine.engine_config import EngineConfig
from tinystories.engine.torch_engine import TorchEngine, group_by_length
from tinystories.errors import UserError
from tinystories.model import GPT


def on_cpu(model: GPT, decoder: bool, n_slots: int = 1) -> TorchEngine:
    """An engine that steps by the kernels for few rows, or by the model itself as it does for many."""
    engine = TorchEngine(model, n_slots=n_slots, device="cpu")
    if not decoder:
        engine.native_step = None
    return engine


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
def test_steps_equal_one_pass_up_to_the_last_place(build: Build, shape: dict[str, object], decoder: bool) -> None:
    expected = uncached(build(**shape), IDS)
    engine = on_cpu(build(**shape), decoder)
    close(engine.prefill(0, IDS[:5]), expected[4])
    for i in range(5, 24):
        close(engine.step([0], [IDS[i]]), expected[i : i + 1])


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
@pytest.mark.parametrize("name", ["classic", "modern"])
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_slots_do_not_touch_each_other(build: Build, name: str, decoder: bool, seed: int) -> None:
    """Any order of prefills, frees and steps of any set of slots, in any order, gives what each slot alone would."""
    rng = np.random.default_rng(seed)
    model = build(architecture=name, n_ctx=6, n_layer=1, vocab_size=11)
    engine = on_cpu(model, decoder, n_slots=4)
    exercise(engine, rng, lambda ids: uncached(model, ids)[-1])


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
def test_a_full_slot_may_stand_between_two_that_step(build: Build, decoder: bool) -> None:
    engine = on_cpu(build(), decoder, n_slots=3)
    contents = [IDS[:3], IDS, IDS[5:12]]
    for slot, ids in enumerate(contents):
        engine.prefill(slot, ids)
    expected = [uncached(build(), [*contents[slot], 9])[-1] for slot in (2, 0)]
    close(engine.step([2, 0], [9, 9]), expected)


@pytest.mark.parametrize("decoder", [False, True], ids=["model", "decoder"])
def test_the_caller_may_keep_what_a_step_returned(build: Build, decoder: bool) -> None:
    engine = on_cpu(build(), decoder, n_slots=2)
    first = engine.prefill(0, IDS[:3])
    kept = np.array(first)
    engine.prefill(1, IDS[4:9])
    second = engine.step([0, 1], [1, 2])
    kept_too = np.array(second)
    engine.step([0, 1], [3, 4])
    assert (kept == np.asarray(first)).all()
    assert (kept_too == np.asarray(second)).all()


def test_neither_threads_nor_other_rows_change_a_step(build: Build, shape: dict[str, object]) -> None:
    """Bit for bit: the kernels make each sum in one order."""
    model, threads = build(**shape), torch.get_num_threads()
    steps = []
    try:
        for n_threads, n_slots in ((2, 1), (1, 1), (2, 3)):
            torch.set_num_threads(1)  # the prefill is BLAS's, whose sums do depend on it
            engine = TorchEngine(model, n_slots=n_slots, device="cpu")
            for slot in range(n_slots):
                engine.prefill(slot, IDS[: 7 - slot])
            torch.set_num_threads(n_threads)
            steps.append(np.array(engine.step(range(n_slots), [5] * n_slots))[0])
    finally:
        torch.set_num_threads(threads)
    assert (steps[0] == steps[1]).all()
    assert (steps[0] == steps[2]).all()


def test_logprobs_equal_log_softmax_in_the_order_given(build: Build, shape: dict[str, object]) -> None:
    model = build(**shape)
    engine = TorchEngine(model, device="cpu")
    sequences = [IDS[:2], [*IDS, 3], IDS[3:9], np.array(IDS[4:16], dtype=np.uint16)]
    for ids, scored in zip(sequences, engine.logprobs(sequences), strict=True):
        expected = torch.tensor(uncached(model, list(map(int, ids[:-1])))).log_softmax(-1)
        close(scored, expected[range(len(ids) - 1), list(map(int, ids[1:]))])


def test_nothing_to_score_is_nothing(build: Build) -> None:
    assert TorchEngine(build(), device="cpu").logprobs([]) == []


class Largest(TorchDispatchMode):
    """Records the most elements of any tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.size = max(self.size, out.numel())
        return out


def test_scoring_many_takes_no_more_memory_than_a_batch(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(vocab_size=1000)
    sequences = [IDS[i % 20 :] for i in range(9)]
    engine = TorchEngine(model, device="cpu")
    expected = engine.logprobs(sequences)
    monkeypatch.setattr(torch_engine, "SCORE_BATCH_TOKENS_CPU", 70)
    monkeypatch.setattr(torch_engine, "SCORE_LOGITS_BYTES_CPU", 4 * 1000 * 8)
    with Largest() as largest:
        scored = engine.logprobs(sequences)
    assert largest.size <= max(70 * 4 * 32, 8 * 1000)  # attention's own work space, and eight rows of logits
    for one, other in zip(scored, expected, strict=True):
        close(one, other)


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_hold_each_once_within_the_budget(sizes: list[int], budget: int) -> None:
    groups = list(group_by_length(sizes, budget))
    assert sorted(i for group in groups for i in group) == list(range(len(sizes)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(sizes[i] for i in group) <= budget


def test_a_model_in_training_is_left_as_it_was(build: Build) -> None:
    """Its mode, weights and gradients; and dropout is off inside the engine."""
    model = build(dropout=0.5).train()
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    engine = TorchEngine(model, n_slots=2, device="cpu", precision="fp32")
    first, again = engine.logprobs([IDS])[0], engine.logprobs([IDS])[0]
    assert (first == again).all()
    close(engine.prefill(0, IDS[:4]), engine.prefill(1, IDS[:4]))
    assert model.training
    assert all((weight == state[name]).all() for name, weight in model.state_dict().items())
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())
    model.logits(model(torch.tensor([IDS]))).sum().backward()
    assert model.embed_tokens.weight.grad is not None


def test_the_mode_is_restored_after_an_error(build: Build) -> None:
    model = build().train()
    model.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TorchEngine(model, device="cpu").logprobs([IDS])
    assert model.training


def test_scoring_needs_no_cache(build: Build) -> None:
    engine = TorchEngine(build(), n_slots=1000, device="cpu")
    engine.logprobs([IDS])
    assert "kv_cache" not in vars(engine)


def test_later_training_steps_are_seen(build: Build) -> None:
    model = build(tied=False)
    engine = TorchEngine(model, device="cpu")
    before = engine.prefill(0, IDS[:3]).copy()
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    close(engine.prefill(0, IDS[:3]), 2 * before)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda engine: engine.prefill(0, []),
        lambda engine: engine.prefill(0, [1] * 25),
        lambda engine: engine.prefill(0, [61]),
        lambda engine: engine.prefill(0, [-1]),
        lambda engine: engine.prefill(2, [1]),
        lambda engine: engine.prefill(-1, [1]),
        lambda engine: engine.step([0], [61]),
        lambda engine: engine.step([7], [1]),
        lambda engine: engine.free(2),
        lambda engine: engine.logprobs([[1]]),
        lambda engine: engine.logprobs([[1, 2], [1] * 26]),
        lambda engine: engine.logprobs([[1, 61]]),
    ],
)
def test_wrong_calls_are_refused_and_change_nothing(build: Build, wrong: Callable[[TorchEngine], object]) -> None:
    engine = TorchEngine(build(), n_slots=2, device="cpu")
    engine.prefill(0, IDS[:3])
    with pytest.raises(UserError):
        wrong(engine)
    close(engine.step([0], [IDS[3]]), uncached(build(), IDS[:4])[-1:])


@pytest.mark.parametrize("full", [True, False])
def test_stepping_a_full_or_an_empty_slot_fails_an_assertion(build: Build, full: bool) -> None:
    engine = TorchEngine(build(), device="cpu")
    if full:
        engine.prefill(0, IDS)
    with pytest.raises(AssertionError):
        engine.step([0], [1])


def test_an_engine_without_slots_is_refused(build: Build) -> None:
    with pytest.raises(UserError, match="at least 1"):
        TorchEngine(build(), n_slots=0, device="cpu")


@pytest.mark.parametrize("own", [False, True], ids=["borrowed", "own"])
def test_bf16_is_near_fp32(build: Build, monkeypatch: pytest.MonkeyPatch, shape: dict[str, object], own: bool) -> None:
    monkeypatch.setattr(torch_engine, "select_precision", lambda *_: "bf16")
    expected = uncached(build(**shape), IDS[:8])
    engine = TorchEngine(build(**shape), device="cpu", owns_model=own)
    logits = [engine.prefill(0, IDS[:5]), *(engine.step([0], [i])[0] for i in IDS[5:8])]
    assert logits[0].dtype == np.float32
    close(logits, expected[4:], tolerance=0.06)
    assert np.abs(np.array(logits) - expected[4:]).max() > 1e-4, "this was not computed in bf16"
    (scored,) = engine.logprobs([IDS[:9]])
    close(scored, torch.tensor(expected).log_softmax(-1)[range(8), IDS[1:9]], tolerance=0.06)


def test_a_model_directory_is_loaded_as_written(
    build: Build, shape: dict[str, object], sample_data: Path, tmp_path: Path
) -> None:
    model = build(**shape | {"vocab_size": 400})
    files = checkpoint.read_model(saved(tmp_path / "model", model, sample_data))
    engine = TorchEngine.load(files, EngineConfig(n_slots=2, device="cpu"))
    close(engine.prefill(1, IDS[:5]), uncached(model, IDS)[4])
    close(engine.step([1], [IDS[5]]), uncached(model, IDS)[5:6])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-3), ("bf16", 0.1)])
def test_cuda_gives_the_logits_of_the_cpu(
    build: Build, shape: dict[str, object], precision: str, tolerance: float
) -> None:
    """Prefills, recorded steps of several widths with holes, and scores."""
    cpu = TorchEngine(build(**shape), n_slots=5, device="cpu", precision="fp32")
    gpu = TorchEngine(build(**shape), n_slots=5, device="cuda", precision=precision, owns_model=True)
    for slot in (0, 1, 4, 0):
        ids = IDS[slot : 2 * slot + 3]
        close(gpu.prefill(slot, ids).cpu(), cpu.prefill(slot, ids), tolerance)
    for slots in ([0], [1, 0], [4, 1], [0, 1, 4], [1]):
        close(gpu.step(slots, IDS[: len(slots)]).cpu(), cpu.step(slots, IDS[: len(slots)]), tolerance)
    for one, other in zip(gpu.logprobs([IDS, IDS[:5]]), cpu.logprobs([IDS, IDS[:5]]), strict=True):
        close(one, other, tolerance)


def test_the_kernels_threads_leave_torchs_as_they_were() -> None:
    """Else training would go on with another number of threads after its first sample story."""
    program = (
        "import torch; from tinystories.config import ModelConfig; from tinystories.model import GPT;"
        " from tinystories.engine.torch_engine import TorchEngine;"
        " before = torch.get_num_threads(); engine = TorchEngine(GPT(ModelConfig(vocab_size=99, n_embd=16, n_ctx=8)));"
        " engine.prefill(0, [1]); engine.step([0], [2]);"
        " assert torch.get_num_threads() == before == 1, torch.get_num_threads()"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "3"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)

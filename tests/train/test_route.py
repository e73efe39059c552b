"""Routes: which one a processor gets, that it is recorded and kept, and that a resumed run ends with the same bits."""

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import changed, read_records
from safetensors.torch import load_file

from tinystories import checkpoint
from tinystories.config import Config, ModelConfig
from tinystories.engine import device as device_module
from tinystories.errors import UserError
from tinystories.train import route as route_module
from tinystories.train.loop import Interrupted, Trainer
from tinystories.train.route import (
    ROUTES,
    Probe,
    build_probe,
    keeps_operands,
    list_routes,
    may_use_onednn,
    measure_routes,
    select_route,
)
from tinystories.train.run import train

CPU = torch.device("cpu")
AVX512 = "avx512f avx512bw avx512vl avx512dq"
PROCESSORS = {
    "amd zen 5": f"vendor_id : AuthenticAMD\nflags : avx2 {AVX512} avx512_bf16\n",
    "amd avx-512 without bf16": f"vendor_id : AuthenticAMD\nflags : avx2 {AVX512}\n",
    "amd avx2": "vendor_id : AuthenticAMD\nflags : avx2\n",
    "amd with amx": f"vendor_id : AuthenticAMD\nflags : avx2 {AVX512} avx512_bf16 amx_tile amx_bf16\n",
    "intel with amx": f"vendor_id : GenuineIntel\nflags : avx2 {AVX512} avx512_bf16 amx_tile amx_bf16\n",
    "intel avx-512": f"vendor_id : GenuineIntel\nflags : avx2 {AVX512}\n",
    "arm": "Features : fp asimd bf16\n",
    "unknown": "",
}


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that simulates a processor of `PROCESSORS`; oneDNN is taken to be exact."""

    def simulate(name: str) -> None:
        for module in (device_module, route_module):
            monkeypatch.setattr(module, "read_cpu_info", lambda: PROCESSORS[name])

    monkeypatch.setattr(route_module, "is_onednn_exact", lambda _: True)
    return simulate


def with_rates(monkeypatch: pytest.MonkeyPatch, **rates: float) -> None:
    monkeypatch.setattr(
        route_module, "measure_routes", lambda names, _: {name: rates[name.replace("-", "_")] for name in names}
    )


@pytest.mark.parametrize(
    ("name", "auto", "bf16"),
    [
        ("amd zen 5", ["fp32", "fp32-cpu", "fp32-onednn"], ["bf16-cpu"]),
        ("amd avx-512 without bf16", ["fp32", "fp32-cpu", "fp32-onednn"], None),
        ("amd avx2", ["fp32", "fp32-cpu"], None),
        ("amd with amx", ["fp32", "fp32-cpu"], ["bf16-cpu"]),
        ("intel with amx", ["fp32", "fp32-cpu"], ["bf16-cpu"]),
        ("intel avx-512", ["fp32", "fp32-cpu"], None),
        ("arm", ["fp32", "fp32-cpu"], ["bf16-cpu"]),
        ("unknown", ["fp32", "fp32-cpu"], None),
    ],
)
def test_the_processor_decides_what_is_possible(
    name: str, auto: list[str], bf16: list[str] | None, config: Config, processor: Callable[[str], None]
) -> None:
    processor(name)
    assert list_routes(changed(config, "train", precision="auto"), CPU) == auto
    assert list_routes(changed(config, "train", precision="fp32"), CPU) == ["fp32"]
    explicit = changed(config, "train", precision="bf16")
    if bf16 is None:
        with pytest.raises(UserError, match="does not support bf16 natively"):
            list_routes(explicit, CPU)
    else:
        assert list_routes(explicit, CPU) == bf16


def test_the_onednn_route_is_refused_if_it_rounds(
    config: Config, processor: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor("amd zen 5")
    monkeypatch.setattr(route_module, "is_onednn_exact", lambda _: False)
    assert list_routes(changed(config, "train", precision="auto"), CPU) == ["fp32", "fp32-cpu"]


def test_compiled_steps_and_other_devices_use_the_plain_routes(
    config: Config, processor: Callable[[str], None]
) -> None:
    processor("amd zen 5")
    compiled = changed(config, "train", compile="on", precision="auto")
    assert list_routes(compiled, CPU) == ["fp32"]
    assert list_routes(changed(compiled, "train", precision="bf16"), CPU) == ["bf16"]
    assert list_routes(changed(config, "train", precision="auto"), torch.device("mps")) == ["fp32"]


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({"fp32": 100.0, "fp32_cpu": 110.0, "fp32_onednn": 250.0}, "fp32-onednn"),
        ({"fp32": 100.0, "fp32_cpu": 110.0, "fp32_onednn": 90.0}, "fp32-cpu"),
        ({"fp32": 100.0, "fp32_cpu": 104.0, "fp32_onednn": 104.0}, "fp32"),
    ],
)
def test_the_fastest_is_chosen_but_not_for_a_few_percent(
    rates: dict[str, float],
    chosen: str,
    config: Config,
    processor: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    processor("amd zen 5")
    with_rates(monkeypatch, **rates)
    with caplog.at_level("INFO"):
        assert select_route(changed(config, "train", precision="auto"), CPU).name == chosen
    assert f"route: {chosen}" in caplog.text


@pytest.mark.parametrize(
    ("previous", "name", "precision", "expected"),
    [
        *((route, "amd zen 5", "auto", [route]) for route in ROUTES),
        ("", "amd zen 5", "auto", ["fp32"]),
        ("fp32", "amd zen 5", "bf16", ["bf16-cpu"]),
        ("bf16-cpu", "amd zen 5", "fp32", ["fp32"]),
        ("bf16-cpu", "amd avx2", "auto", ["fp32", "fp32-cpu"]),
        ("bf16-cpu", "amd avx2", "bf16", ["fp32", "fp32-cpu"]),
        ("bf16-cpu", "amd avx-512 without bf16", "auto", ["fp32", "fp32-cpu", "fp32-onednn"]),
        ("fp32-onednn", "intel with amx", "auto", ["fp32", "fp32-cpu"]),
        ("fp32", "intel with amx", "auto", ["fp32"]),
    ],
)
def test_a_resumed_run_stays_on_its_route_where_that_exists(
    previous: str, name: str, precision: str, expected: list[str], config: Config, processor: Callable[[str], None]
) -> None:
    processor(name)
    assert list_routes(changed(config, "train", precision=precision), CPU, previous) == expected


def test_a_route_of_a_later_version_is_an_error_of_one_line(config: Config) -> None:
    with pytest.raises(UserError, match="route 'fp4'"):
        select_route(config, CPU, "fp4")


def test_the_measurement_is_of_this_model_and_ends_before_its_limit(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stops before the turn that would take it over its limit, and its first turn does not count."""
    model = ModelConfig(n_embd=48, n_ff=80, n_head=4, n_kv_head=2, vocab_size=9000, n_layer=7, n_ctx=128)
    config = dataclasses.replace(config, model=model)
    now, turns = [0.0], []

    def time_probe(probe: Probe) -> float:
        turns.append(probe.route.name)
        seconds = 30.0 if len(turns) <= 2 else 0.04 if probe.route.name == "fp32" else 0.02
        now[0] += seconds
        return seconds

    monkeypatch.setattr(route_module, "time_probe", time_probe)
    monkeypatch.setattr(route_module.time, "perf_counter", lambda: now[0])
    rates = measure_routes(["fp32", "bf16-cpu"], config)
    assert 60.9 < now[0] < 61
    assert turns[:4] == ["fp32", "bf16-cpu"] * 2
    assert rates["bf16-cpu"] == pytest.approx(2 * rates["fp32"])


def test_what_is_measured_has_the_shapes_of_the_model(config: Config) -> None:
    model = ModelConfig(n_embd=48, n_ff=80, n_head=4, n_kv_head=2, vocab_size=9000, n_layer=7, n_ctx=128)
    probe = build_probe(changed(dataclasses.replace(config, model=model), "train", batch_size=4), ROUTES["fp32"])
    shapes = {name: tuple(weight.shape) for name, weight in probe.objective.named_parameters()}
    assert {name.split(".")[2] for name in shapes if ".layers." in name} == {"0"}
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (80, 48)
    assert shapes["model.lm_head.weight" if not model.tied else "model.embed_tokens.weight"] == (4096, 48)
    assert probe.tokens.shape == (4, 128)
    small = changed(changed(config, "model", vocab_size=400), "train", batch_size=4 * 10**6)
    assert build_probe(small, ROUTES["fp32"]).tokens.numel() < 10**6


def test_a_measurement_on_this_processor_gives_a_rate_for_every_route(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route_module, "PROBE_FLOPS", 1e6)
    monkeypatch.setattr(route_module, "MEASURE_SECONDS", 0.01)
    config = changed(config, "model", vocab_size=400)
    assert all(0 < rate < 1e12 for rate in measure_routes(["fp32", "fp32-cpu", "fp32-onednn"], config).values())


def test_choosing_a_route_draws_no_random_numbers(
    config: Config, processor: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    processor("amd avx2")
    monkeypatch.setattr(route_module, "PROBE_FLOPS", 1e6)
    monkeypatch.setattr(route_module, "MEASURE_SECONDS", 0.01)
    before = torch.random.get_rng_state()
    select_route(changed(changed(config, "model", vocab_size=400), "train", precision="auto"), CPU)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("kept_bits", [8, 11, 16])
def test_a_product_that_rounds_either_operand_is_noticed(kept_bits: int) -> None:
    """bf16 holds 8 bits of a mantissa, TF32 11, and two bf16 numbers 16."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        mantissa, exponent = torch.frexp(x)
        return torch.ldexp(torch.round(mantissa * 2**kept_bits) / 2**kept_bits, exponent)

    assert keeps_operands(torch.mm, 16, 32, 24)
    assert not keeps_operands(lambda a, b: rounded(a) @ b, 16, 32, 24)
    assert not keeps_operands(lambda a, b: a @ rounded(b), 16, 32, 24)


@pytest.mark.skipif(not may_use_onednn(device_module.read_cpu_info()), reason="the processor does not have this route")
@pytest.mark.parametrize("product", ["mm", "linear", "linear backward", "bmm", "baddbmm", "addmm"])
def test_on_the_onednn_route_no_operand_is_rounded(product: str) -> None:
    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        zeros = torch.zeros(a.shape[0], b.shape[1])
        if product == "linear backward":
            x = torch.zeros(a.shape[0], b.shape[1], requires_grad=True)
            return torch.autograd.grad(torch.nn.functional.linear(x, b), x, a)[0]
        return {
            "mm": lambda: torch.mm(a, b),
            "linear": lambda: torch.nn.functional.linear(a, b.t().contiguous()),
            "bmm": lambda: torch.bmm(a[None], b[None])[0],
            "baddbmm": lambda: torch.baddbmm(zeros[None], a[None], b[None])[0],
            "addmm": lambda: torch.addmm(zeros, a, b),
        }[product]()

    with ROUTES["fp32-onednn"].matmuls():
        assert keeps_operands(multiply, 256, 240, 320)


def test_the_onednn_mode_ends_with_its_block() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with ROUTES["fp32-onednn"].matmuls():
        assert torch.backends.mkldnn.matmul.fp32_precision != before
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    with contextlib.suppress(ZeroDivisionError), ROUTES["fp32-onednn"].matmuls():
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == before


def on_route(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Let new runs take a route; every route computes something useful on any processor, only slowly."""
    monkeypatch.setattr(
        route_module, "list_routes", lambda _config, _device, previous=None: [name if previous is None else previous]
    )


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("name", ROUTES)
def test_a_resumed_run_ends_with_the_same_bits_on_every_route(
    name: str, kind: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_route(monkeypatch, name)
    config = changed(changed(config, "train", steps=6, eval_every=10), "optim", kind=kind)
    train(config, tmp_path / "straight")
    step = Trainer.train_step

    def stopping(self: Trainer, at: int) -> object:
        self.received_signal = 15 if at == 3 else 0
        return step(self, at)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stopping)
        with pytest.raises(Interrupted):
            train(config, tmp_path / "broken")
    train(config, tmp_path / "broken", resume=True)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("straight", "broken")]
    assert weights[0] == weights[1]
    state = json.loads((tmp_path / "broken" / "checkpoints" / "step-0000006" / "state" / "clock.json").read_text())
    assert state["route"] == name
    assert not any("route" in record for record in read_records(tmp_path / "broken"))


def test_bf16_keeps_weights_moments_and_loss_in_fp32(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_route(monkeypatch, "bf16-cpu")
    trainer = Trainer(changed(config, "train", steps=2), tmp_path)
    result = trainer.train_step(0)
    assert result.loss.dtype == torch.float32
    assert {weight.dtype for weight in trainer.model.parameters()} == {torch.float32}
    moments = [
        value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()
    ]
    assert {value.dtype for value in moments} == {torch.float32}
    weight = trainer.model.layers[0].mlp.down_proj.weight
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("name", ["bf16-cpu", "fp32-cpu", "fp32-onednn"])
def test_the_routes_train_the_same_model(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their losses differ by rounding, and by the activations that dropout drops."""
    config = changed(changed(config, "train", steps=30, eval_every=100, checkpoint_every=100), "model", dropout=0.0)
    train(config, tmp_path / "plain")
    on_route(monkeypatch, name)
    train(config, tmp_path / "route")
    losses = [[r["loss"] for r in read_records(tmp_path / run) if "loss" in r] for run in ("plain", "route")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)
    assert losses[1] != losses[0], "it is another route"
    assert losses[1][-1] < losses[1][0] - 0.3


def test_a_run_begun_in_bf16_continues_in_fp32_with_a_mark(
    config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    processor: Callable[[str], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = changed(config, "train", precision="auto", steps=4, checkpoint_every=2, eval_every=10)
    with monkeypatch.context() as patch:
        on_route(patch, "bf16-cpu")
        train(config, tmp_path / "run")
    finished = read_records(tmp_path / "run")
    processor("amd avx2")
    with_rates(monkeypatch, fp32=100.0, fp32_cpu=90.0)
    train(config, tmp_path / "run", resume=True)
    assert read_records(tmp_path / "run") == finished, "a finished run has nothing left to do on any processor"
    train(changed(config, "train", steps=6), tmp_path / "run", resume=True)
    assert "the run was on route bf16-cpu and continues on route fp32" in caplog.text
    marks = [record for record in read_records(tmp_path / "run") if "route" in record]
    assert [(mark["step"], mark["left_route"], mark["route"]) for mark in marks] == [(4, "bf16-cpu", "fp32")]
    caplog.clear()
    train(changed(config, "train", steps=8), tmp_path / "run", resume=True)
    assert "continues on route" not in caplog.text
    assert sum("route" in record for record in read_records(tmp_path / "run")) == 1
    assert checkpoint.read_model(tmp_path / "run").provenance["step"] == 8


@pytest.mark.parametrize(
    ("precision", "name", "expected", "left"),
    [
        ("auto", "amd zen 5", "fp32", None),
        ("fp32", "amd zen 5", "fp32", None),
        ("bf16", "amd zen 5", "bf16", None),
        ("bf16", "amd avx2", "fp32", "bf16"),
    ],
)
def test_a_run_of_a_version_without_routes_keeps_computing_as_it_did(
    precision: str,
    name: str,
    expected: str,
    left: str | None,
    config: Config,
    tmp_path: Path,
    processor: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor(name)
    with_rates(monkeypatch, fp32=100.0, fp32_cpu=90.0)
    config = changed(config, "train", steps=2, checkpoint_every=2)
    train(config, tmp_path / "run")
    state_dir = tmp_path / "run" / "checkpoints" / "step-0000002" / "state"
    state = json.loads((state_dir / "clock.json").read_text())
    del state["route"]
    (state_dir / "clock.json").write_text(json.dumps(state))
    settings = (state_dir / "config.toml").read_text().replace('precision = "fp32"', f'precision = "{precision}"')
    (state_dir / "config.toml").write_text(settings)
    trainer = Trainer(changed(config, "train", precision=precision), tmp_path / "run", state_dir.parent)
    assert trainer.take_step.route.name == expected
    assert trainer.left_route == left


def test_weights_of_a_bf16_run_are_saved_in_fp32(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_route(monkeypatch, "bf16-cpu")
    train(changed(config, "train", steps=2), tmp_path / "run")
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}

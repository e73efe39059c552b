import pytest
import torch

from tinystories.engine import device as module
from tinystories.engine.device import has_native_bf16, select_device, select_precision
from tinystories.errors import UserError

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with nothing but a CPU without bf16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(module, "read_cpu_info", lambda: "flags : fpu avx2")
    return monkeypatch


def test_auto_prefers_cuda_then_mps_then_the_cpu(machine: pytest.MonkeyPatch) -> None:
    assert select_device("auto") == CPU
    machine.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("auto") == torch.device("mps")
    machine.setattr(torch.cuda, "is_available", lambda: True)
    assert select_device("auto") == CUDA


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "gpu", "", "cpu:x", "cuda:-1", "xla", "meta"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"^device .*cpu"):
        select_device(name)


def test_a_cuda_number_too_high_is_refused(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: True)
    machine.setattr(torch.cuda, "device_count", lambda: 2)
    assert select_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="only 2 CUDA"):
        select_device("cuda:2")


@pytest.mark.usefixtures("machine")
def test_a_device_may_be_given_as_such() -> None:
    assert select_device(CPU) == CPU


@pytest.mark.usefixtures("machine")
def test_a_cpu_without_native_bf16_never_gets_it() -> None:
    assert select_precision(CPU) == "fp32"
    with pytest.raises(UserError, match="fp32"):
        select_precision(CPU, "bf16")


def test_a_cpu_with_native_bf16_gets_it_when_asked(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(module, "read_cpu_info", lambda: "flags : fpu amx_bf16")
    assert select_precision(CPU) == "fp32"
    assert select_precision(CPU, "bf16") == "bf16"


@pytest.mark.parametrize("native", [True, False])
def test_cuda_takes_bf16_where_the_device_has_it(machine: pytest.MonkeyPatch, native: bool) -> None:
    machine.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert select_precision(CUDA) == ("bf16" if native else "fp32")
    assert select_precision(CUDA, "fp32") == "fp32"
    if not native:
        with pytest.raises(UserError, match="fp32"):
            select_precision(CUDA, "bf16")


@pytest.mark.usefixtures("machine")
def test_mps_is_fp32() -> None:
    assert select_precision(torch.device("mps")) == "fp32"


@pytest.mark.parametrize("name", ["int8", "fp16", "", "BF16"])
def test_an_unknown_precision_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="auto, fp32 or bf16"):
        select_precision(CPU, name)


@pytest.mark.parametrize(
    ("description", "native"),
    [
        ("processor\t: 0\nflags\t\t: fpu sse2 avx512_bf16 avx2\n", True),
        ("flags\t\t: fpu amx_tile amx_bf16\n", True),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("flags\t\t: fpu avx2 avx512f\nmodel name\t: bf16 wonder\nbugs : avx512_bf16\n", False),
        ("Features\t: fp asimd\n", False),
        ("", False),
        ("no colon here\nflags", False),
    ],
)
def test_native_bf16_is_read_from_the_flags_alone(description: str, native: bool) -> None:
    assert has_native_bf16(description) is native

"""The first start in Python says why it takes long, without any configuration of logging."""

from collections.abc import Callable
from pathlib import Path

from command_line import run_python

from tinystories.checkpoint import write_model
from tinystories.config import ModelConfig, SamplingConfig
from tinystories.data.tokenizer import Tokenizer
from tinystories.files import atomic_directory
from tinystories.model import GPT

# The compiler is replaced by one that does nothing.
SETUP = (
    "from tinystories.engine.cpu import jit\n"
    "jit.compile_object = lambda name: b'code'\n"
    "jit.load_object = lambda target, name: None\n"
)
LINE = "compiling the CPU engine for this machine (int8, once, about 10 s) ..."


def test_the_first_load_in_python_says_that_it_compiles(tmp_path: Path) -> None:
    first = run_python("-c", SETUP + "jit.load_or_compile('int8')", TINYSTORIES_CACHE=str(tmp_path))
    assert first.stderr == LINE + "\n"
    assert first.stdout == ""
    second = run_python("-c", SETUP + "jit.load_or_compile('int8')", TINYSTORIES_CACHE=str(tmp_path))
    assert second.stderr == ""


def test_a_program_may_silence_it(tmp_path: Path) -> None:
    silence = "import logging\nlogging.getLogger('tinystories').setLevel(logging.ERROR)\n"
    result = run_python("-c", silence + SETUP + "jit.load_or_compile('int8')", TINYSTORIES_CACHE=str(tmp_path))
    assert result.stderr == ""


def test_the_command_line_says_it_once(tmp_path: Path) -> None:
    program = SETUP + "from tinystories.cli import main\nmain(['warmup'])\n"
    result = run_python("-c", program, TINYSTORIES_CACHE=str(tmp_path))
    assert result.stderr.count(LINE) == 1
    assert result.stdout.startswith("ready: ")


def test_the_first_load_of_a_trained_model_says_that_it_quantizes(
    tmp_path: Path, tiny: Callable[..., ModelConfig], sample_data: Path
) -> None:
    with atomic_directory(tmp_path / "model") as draft:
        model = GPT(tiny(vocab_size=400))
        write_model(draft, model, Tokenizer.load(sample_data), SamplingConfig(), {})
    program = f"import tinystories\ntinystories.load({str(tmp_path / 'model')!r}, engine='cpu')\n"
    assert "quantizing the weights to int8 (once)" in run_python("-c", program).stderr
    assert run_python("-c", program).stderr == ""

"""What a benchmark needs before it starts: the weights in a folder, who takes part, and the files of each program."""

import dataclasses
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tinystories.bench.competitors import SHAPE_FILE, WEIGHTS_FILE, read_model_files, silence_log
from tinystories.checkpoint import read_model, save_weights
from tinystories.config import ModelConfig
from tinystories.errors import UserError
from tinystories.files import sha256, write_json
from tinystories.formats.gguf import format as gguf
from tinystories.weights.load import load_fp32, load_or_quantize
from tinystories.weights.names import expected_shapes

log = logging.getLogger(__name__)

# The precisions of each program, and the Python packages that it needs; `tinystories` itself needs none.
PRECISIONS: dict[str, tuple[str, ...]] = {
    "tinystories": ("fp32", "int8", "int8-a8", "int4"),
    "torch": ("fp32",),
    "transformers": ("fp32",),
    "ctranslate2": ("fp32", "int8"),
    "llama.cpp": ("fp32", "int8", "int4"),
}
REQUIRED_PACKAGES = {
    "tinystories": (),
    "torch": ("torch", "jaxtyping"),
    "transformers": ("torch", "transformers"),
    "ctranslate2": ("torch", "transformers", "ctranslate2"),
    "llama.cpp": ("llama_cpp", "gguf"),
}
LLAMA_FILE_TYPES = {"fp32": 0, "int8": 7, "int4": 2}  # LLAMA_FTYPE_ALL_F32, _MOSTLY_Q8_0, _MOSTLY_Q4_0


class Competitor(NamedTuple):
    """A program in one of its precisions; `shortlist`: see `Workload`."""

    name: str
    precision: str
    shortlist: int = 0

    def __str__(self) -> str:
        return f"{self.name} {self.precision}" + (f", {self.shortlist:,} ids" if self.shortlist else "")


def parse_competitors(text: str) -> list[Competitor]:
    """Parse NAME or NAME:PRECISION, separated by commas. A name alone means all its precisions."""
    selected: list[Competitor] = []
    for part in map(str.strip, text.split(",")):
        name, _, precision = part.partition(":")
        matches = [Competitor(name, p) for p in PRECISIONS.get(name, ()) if precision in ("", p)]
        if not matches:
            available = ", ".join(f"{n} ({', '.join(p)})" for n, p in PRECISIONS.items())
            raise UserError(f"--only {part}: unknown program or precision; available: {available}")
        selected += matches
    return selected


def link_weights(folder: Path, model: Path) -> ModelConfig:
    """Put the weights of a model directory into `folder` and return their config: a link, or int8 ones dequantized."""
    files = read_model(model)
    if files.is_int8_only:
        log.info("%s has only int8 weights: every program starts from them dequantized to fp32", model)
        save_weights(folder / WEIGHTS_FILE, load_fp32(files))
    else:
        (folder / WEIGHTS_FILE).symlink_to(files.weights_path.resolve())
    return files.config


def write_random_weights(folder: Path, config: ModelConfig) -> None:
    """Write random weights into `folder`, the same on every call; speed does not depend on their values.

    Matrices are normal with standard deviation 1 / sqrt(fan-in), which preserves the scale of activations; norm weights
    are 1 and biases 0.
    """
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in expected_shapes(config).items():
        if len(shape) == 2:
            weights[name] = rng.standard_normal(shape, dtype=np.float32) / np.float32(shape[1] ** 0.5)
        else:
            weights[name] = np.full(shape, 0 if name.endswith("bias") else 1, dtype=np.float32)
    save_weights(folder / WEIGHTS_FILE, weights)


def prepare_competitors(
    folder: Path, config: ModelConfig, only: Sequence[Competitor], *, peers: bool
) -> list[Competitor]:
    """Write the files of all programs that take part, from the weights in `folder`, and return who does.

    These are those in `only`; if it is empty, `tinystories` and, with `peers`, every other program. One that cannot run
    is skipped with a note; if `only` names it, it is a `UserError`.
    """
    write_json(folder / SHAPE_FILE, {"config": dataclasses.asdict(config), "sha256": sha256(folder / WEIGHTS_FILE)})
    names = PRECISIONS if peers else ["tinystories"]
    candidates = only or [Competitor(name, precision) for name in names for precision in PRECISIONS[name]]
    reasons = {name: unavailable_reason(name, config) for name in dict.fromkeys(c.name for c in candidates)}
    for name, reason in reasons.items():
        if reason and only:
            raise UserError(f"{name} {reason}")
        if reason:
            log.info("skipping %s: it %s", name, reason)
    selected = [competitor for competitor in candidates if not reasons[competitor.name]]
    for competitor in selected:
        log.info("preparing the files of %s", competitor)
        prepare_files(folder, competitor.name, competitor.precision)
    return selected


def unavailable_reason(name: str, config: ModelConfig) -> str | None:
    """Return why program `name` cannot run `config` (continues a sentence: "it ..."); None if it can."""
    missing = [package for package in REQUIRED_PACKAGES[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"needs {' and '.join(missing)}: pip install 'tinystories-gpt[bench]'"
    if name == "llama.cpp":
        return gguf.unsupported_reason(config)
    if name == "ctranslate2" and not config.qk_norm and config.architecture != "classic":
        return "is only built for models with QK-norm"
    if name == "ctranslate2" and not config.scaled_scores:
        return "scales attention scores"
    return None


def package_version(name: str) -> str:
    """Return the installed version of the Python package behind program `name`."""
    package = {"tinystories": "tinystories-gpt", "llama.cpp": "llama-cpp-python"}.get(name, name)
    return importlib.metadata.version(package)


def prepare_files(folder: Path, name: str, precision: str) -> None:
    """Convert the weights in `folder` to the files that program `name` loads; call it once per precision."""
    if name == "tinystories" and precision != "fp32":
        load_or_quantize(read_model_files(folder), "int4" if precision == "int4" else "int8")
    elif name == "llama.cpp":
        prepare_gguf(folder, precision)
    elif name in ("transformers", "ctranslate2"):
        if not (folder / "hf").exists():
            prepare_hf(folder)
        if name == "ctranslate2":
            from ctranslate2.converters import TransformersConverter

            quantization = "float32" if precision == "fp32" else precision
            converter = TransformersConverter(str(folder / "hf"))
            converter.convert(str(folder / f"ct2-{precision}"), quantization=quantization)


def prepare_gguf(folder: Path, precision: str) -> None:
    """Write `fp32.gguf` and let llama.cpp itself quantize it to `precision`."""
    fp32_path = folder / "fp32.gguf"
    if not fp32_path.exists():
        files = read_model_files(folder)
        gguf.write_gguf(files.config, load_fp32(files), fp32_path)
    if precision == "fp32":
        return
    import llama_cpp

    silence_log(llama_cpp)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread = LLAMA_FILE_TYPES[precision], os.cpu_count() or 1
    params.pure = precision == "int4"  # otherwise the head is stored in 6 bits, which is slower
    if llama_cpp.llama_model_quantize(str(fp32_path).encode(), str(folder / f"{precision}.gguf").encode(), params):
        raise UserError(f"llama.cpp could not quantize these weights to {precision}")


def prepare_hf(folder: Path) -> None:
    """Write `folder/hf` for transformers, with a tokenizer that maps "17" to id 17, which CTranslate2 requires."""
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    from tinystories.formats.hf.mapping import to_transformers

    disable_progress_bar()
    config = read_model_files(folder).config
    to_transformers(config, load_file(folder / WEIGHTS_FILE)).save_pretrained(folder / "hf")
    id_tokenizer = Tokenizer(WordLevel({str(i): i for i in range(config.vocab_size)}, unk_token="0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=id_tokenizer, unk_token="0", bos_token="0", eos_token="0")
    tokenizer.save_pretrained(folder / "hf")

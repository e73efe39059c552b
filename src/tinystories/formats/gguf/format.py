"""GGUF export and import, for llama.cpp and Ollama.

`modern` with QK-norm maps to llama.cpp's architecture `qwen3`, `modern` without it to `llama`, and `classic` with
GPT-2's settings to `gpt2`.
"""

import dataclasses
import shlex
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinystories.config import MAX_CONTEXT, ModelConfig, SamplingConfig
from tinystories.config_file import build_dataclass
from tinystories.data.tokenizer import END
from tinystories.errors import UserError, error_context, quoted
from tinystories.formats.bundle import Array, ModelBundle, parse_sampling
from tinystories.formats.gguf import tokenizer as gguf_tokenizer
from tinystories.formats.gguf.mapping import (
    QKV_BIAS_NAME,
    TOP_NAMES,
    from_gguf_tensors,
    select_tensor_type,
    to_gguf_tensors,
)
from tinystories.formats.gguf.reader import MAGIC, GgufFile, import_gguf
from tinystories.formats.protocol import Format, starts_with
from tinystories.formats.split_files import is_one_model, list_parts
from tinystories.weights.names import EMBEDDING, LM_HEAD

ARCHITECTURES = ("qwen3", "llama", "gpt2")
FILE_TYPES = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
MAX_F16 = 65504.0  # largest finite float16
# Metadata keys that our config has a field for, and for others the value that has no effect. Any other key is refused.
SIZE_KEYS = {
    "vocab_size": "vocab_size",
    "context_length": "n_ctx",
    "embedding_length": "n_embd",
    "block_count": "n_layer",
    "feed_forward_length": "n_ff",
    "attention.head_count": "n_head",
}
HEAD_KEYS = ("attention.key_length", "attention.value_length", "rope.dimension_count")  # all are the head dimension
FLOAT_KEYS = {
    "classic": {"attention.layer_norm_epsilon": "norm_eps"},
    "modern": {"rope.freq_base": "rope_base", "attention.layer_norm_rms_epsilon": "norm_eps"},
}
KNOWN_KEYS = {*SIZE_KEYS, *HEAD_KEYS, *FLOAT_KEYS["classic"], *FLOAT_KEYS["modern"], "attention.head_count_kv"}
NEUTRAL_VALUES = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.type": "none"}
SAMPLING_KEYS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def write(model: ModelBundle, path: Path, precision: str) -> None:
    """Write a GGUF file with its tokenizer, and a Modelfile for Ollama beside it.

    In q8_0 and q4_0 each tensor has the type that llama.cpp's own quantizer would choose (`select_tensor_type`).
    """

    def add_metadata(writer: Any) -> None:
        writer.add_name(str(model.provenance.get("name") or path.stem))
        for key, add_value in (("license", writer.add_license), ("description", writer.add_description)):
            if isinstance(text := model.provenance.get(key), str):
                add_value(text)
        # Larger values of top_k mean the same, and GGUF has 32 bits for it.
        sampling = dataclasses.replace(model.sampling, top_k=min(model.sampling.top_k, model.config.vocab_size))
        for field_name, gguf_key in SAMPLING_KEYS.items():
            getattr(writer, f"add_sampling_{gguf_key}")(getattr(sampling, field_name))
        writer.add_sampling_penalty_repeat(model.sampling.repetition_penalty)
        writer.add_sampling_penalty_last_n(model.sampling.repetition_window or -1)
        gguf_tokenizer.write_tokenizer(writer, model.tokenizer, model.config.vocab_size)

    write_gguf(model.config, model.weights, path, precision, add_metadata)
    sidecars(path)[0].write_text(render_modelfile(model, path.with_suffix("").name, path.name), encoding="utf-8")


def sidecars(path: Path) -> list[Path]:
    return [path.with_suffix(".Modelfile")]


def next_steps(path: Path) -> str:
    file, modelfile_name = shlex.quote(str(path)), shlex.quote(sidecars(path)[0].name)
    return (
        f'next: llama-completion -m {file} -no-cnv -p "Once upon a time"\n'
        f'or, in its folder: ollama create stories -f {modelfile_name}; ollama run stories "Once upon a time"'
    )


def logits(path: Path, ids: list[int]) -> Array:
    """Return (T, V) logits of our own engine with the file's dequantized weights."""
    return read(path, None).logits(ids)


def find_file(path: Path) -> Path:
    """Return `path`, or the GGUF file (or a part of it) in it if it is a folder that has no other weights."""
    if not path.is_dir():
        return path
    weights = [file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf") and file.is_file()]
    return weights[0] if len(weights) == 1 or (is_one_model(weights) and weights[0].suffix == ".gguf") else path


def can_read(path: Path) -> bool:
    return starts_with(find_file(path), MAGIC)


def read(path: Path, tokenizer: Path | None) -> ModelBundle:
    """Read a GGUF file of architecture qwen3, llama or gpt2, in any type that the `gguf` package can dequantize.

    `tokenizer`: a tokenizer.json that replaces the file's own. `UserError` if the file is damaged or has settings that
    our architectures do not have.
    """
    path, *other_parts = list_parts(find_file(path))
    file = GgufFile(path)
    for part in other_parts:
        file.add_part(GgufFile(part))
    if not other_parts and file.get("split.count", int, 1) != 1:
        raise UserError(
            f"{path} is one part of a split model, but not named like one (stories-00001-of-00003.gguf); rename all"
            " parts, or merge them with: llama-gguf-split --merge"
        )
    architecture = file.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path} has architecture {quoted(architecture)}; only qwen3, llama and gpt2 are supported")
    names = {key: file.metadata.get(f"general.{key}") for key in ("name", "license")}
    with error_context(path):
        config = read_config(file, architecture)
        return ModelBundle(
            config=config,
            weights=from_gguf_tensors(file, config),
            tokenizer=gguf_tokenizer.read_tokenizer(file, tokenizer, config.vocab_size),
            sampling=read_sampling(file),
            provenance={"imported_from": path.name, "format": f"GGUF {architecture}"}
            | {key: text for key, text in names.items() if isinstance(text, str)},
        )


def unsupported_reason(config: ModelConfig) -> str | None:
    """Return why llama.cpp cannot run a model (continues a sentence: "llama.cpp ..."); None if it can."""
    has_gelu = config.activation == "gelu_tanh"
    if config.architecture == "modern" or (
        config.learned_positions and has_gelu and config.scaled_scores and not config.window
    ):
        return None
    return (
        "cannot run this classic model: its gpt2 has learned positions, gelu_tanh, scaled attention scores and no"
        " sliding window"
    )


def write_gguf(
    config: ModelConfig,
    weights: Mapping[str, Array],
    path: Path,
    precision: str = "f32",
    add_metadata: Callable[[Any], None] = lambda writer: writer.add_tokenizer_model("no_vocab"),
) -> None:
    """Write config and weights as GGUF.

    `add_metadata(writer)` adds the tokenizer and other metadata; by default the file has none, so llama.cpp takes and
    returns ids. `UserError` if llama.cpp cannot run the model, or a weight or a setting overflows its type.
    """
    if reason := unsupported_reason(config):
        raise UserError(f"llama.cpp {reason}; use --format hf or onnx")
    gguf = import_gguf()
    architecture = "gpt2" if config.architecture == "classic" else "qwen3" if config.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, architecture)
    add_metadata(writer)
    sizes = {key: getattr(config, name) for key, name in SIZE_KEYS.items()}
    if config.architecture == "modern":
        sizes |= {"attention.head_count_kv": config.kv_heads} | dict.fromkeys(HEAD_KEYS, config.head_dim)
    for key, size in sizes.items():
        writer.add_uint32(f"{architecture}.{key}", size)
    for key, name in FLOAT_KEYS[config.architecture].items():
        writer.add_float32(f"{architecture}.{key}", getattr(config, name))
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[precision]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in to_gguf_tensors(config, weights):
        tensor_type = gguf.GGMLQuantizationType[select_tensor_type(config, name, tensor.shape, precision)]
        if tensor_type.name != "F32" and np.abs(tensor).max() > MAX_F16:
            raise UserError(f"weights of {name} exceed the range of --precision {precision}; use --precision f32")
        writer.add_tensor(name, gguf.quants.quantize(tensor, tensor_type), raw_dtype=tensor_type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    except (struct.error, OverflowError) as error:
        raise UserError(f"a setting of the model is a number that GGUF cannot hold: {error}") from None
    finally:
        writer.close()


def read_config(file: GgufFile, architecture: str) -> ModelConfig:
    """Build our config from the metadata; `UserError` if a key is missing, invalid or unsupported."""

    def get_int(key: str, default: int | None = None) -> int:
        return file.get(f"{architecture}.{key}", int, default)

    for name in file.metadata:
        key = name.removeprefix(f"{architecture}.")
        is_neutral = key in NEUTRAL_VALUES and file.get(name, type(NEUTRAL_VALUES[key])) == NEUTRAL_VALUES[key]
        if key != name and key not in KNOWN_KEYS and not is_neutral:
            raise UserError(f"{quoted(name)} is set, but our architectures do not support it")
    sizes: dict[str, Any] = {name: get_int(key) for key, name in SIZE_KEYS.items() if key != "vocab_size"}
    n_head, n_layer, n_ctx = sizes["n_head"], sizes["n_layer"], sizes["n_ctx"]
    if TOP_NAMES[EMBEDDING] not in file.tensors or n_layer > len(file.tensors) or n_ctx > MAX_CONTEXT:
        raise UserError(
            f"implausible sizes: block_count={n_layer:,}, context_length={n_ctx:,}, {len(file.tensors):,} tensors"
            f"{'' if TOP_NAMES[EMBEDDING] in file.tensors else f' without {TOP_NAMES[EMBEDDING]}'}"
        )
    n_kv_head, default_head_dim = get_int("attention.head_count_kv", n_head), sizes["n_embd"] // max(n_head, 1)
    sizes["n_kv_head"] = 0 if n_kv_head == n_head else n_kv_head
    sizes["vocab_size"] = file.tensors[TOP_NAMES[EMBEDDING]].shape[0]
    sizes["tied"] = TOP_NAMES[LM_HEAD] not in file.tensors
    if architecture == "gpt2":
        bias_names = (QKV_BIAS_NAME.format(i) for i in range(n_layer))
        sizes |= {"architecture": "classic", "learned_positions": True, "activation": "gelu_tanh"}
        sizes["qkv_bias"] = any(file.load_tensor(name).any() for name in bias_names if name in file.tensors)
    else:
        head_dim = get_int("attention.key_length", default_head_dim)
        sizes |= {"architecture": "modern", "qk_norm": architecture == "qwen3"}
        sizes["head_size"] = 0 if head_dim == default_head_dim else head_dim
    for key, name in FLOAT_KEYS[sizes["architecture"]].items():
        sizes[name] = file.get(f"{architecture}.{key}", float, 10000.0 if name == "rope_base" else None)
    config = build_dataclass(ModelConfig, sizes, str(file.path))
    for key in HEAD_KEYS:
        if get_int(key, config.head_dim) != config.head_dim:
            raise UserError(f"{architecture}.{key}={get_int(key)} must equal the head dimension, {config.head_dim}")
    return config


def read_sampling(file: GgufFile) -> SamplingConfig:
    """Return the file's sampling settings, with our defaults for those it lacks."""
    names = SAMPLING_KEYS | {"repetition_penalty": "penalty_repeat"}
    file_settings = {field: file.metadata.get(f"general.sampling.{key}") for field, key in names.items()}
    look_back = file.metadata.get("general.sampling.penalty_last_n")
    if look_back != -1:  # the whole context, our 0
        file_settings["repetition_window"] = look_back
    return parse_sampling(file_settings, file.path)


def render_modelfile(model: ModelBundle, name: str, file: str) -> str:
    """Return the text of an Ollama Modelfile: template, context length, sampling and stop token.

    Format: https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx
    """
    sampling = model.sampling
    settings = {
        "num_ctx": model.config.n_ctx,
        **{key: getattr(sampling, key) for key in SAMPLING_KEYS},
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": sampling.repetition_window or -1,  # -1: the whole context
        "stop": f'"{END}"',
    }
    parameters = (f"PARAMETER {key} {value}" for key, value in settings.items())
    header = f'# ollama create {name} -f {name}.Modelfile\nFROM ./{file}\nTEMPLATE "{{{{ .Prompt }}}}"\n'
    return header + "\n".join(parameters) + "\n"


GGUF = Format(
    name="gguf",
    can_read=can_read,
    read=read,
    write=write,
    logits=logits,
    max_divergence={"f32": 0, "f16": 1e-4, "q8_0": 0.01, "q4_0": 0.5},
    sidecars=sidecars,
    next_steps=next_steps,
)

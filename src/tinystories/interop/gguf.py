"""Models as GGUF files, which llama.cpp and Ollama read, and models of llama.cpp as ours.

`modern` with QK-norm is their architecture `qwen3`, without it `llama`; `classic` with GPT-2's settings is `gpt2`.
"""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinystories.config import ModelConfig, SamplingConfig, build
from tinystories.data.tokenizer import END
from tinystories.engine.cpu.plan import EMBEDDING, HEAD
from tinystories.errors import UserError, naming, shown
from tinystories.interop import gguf_vocabulary
from tinystories.interop.gguf_file import GgufFile, package
from tinystories.interop.gguf_tensors import QKV_BIAS, TOP, Array, kind_of, tensors_of, weights_of
from tinystories.interop.portable import MOST_CONTEXT, Portable

ARCHITECTURES = ("qwen3", "llama", "gpt2")
PRECISIONS = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0", "q4_0": "MOSTLY_Q4_0"}
LARGEST_F16 = 65504.0
# Of an architecture's settings, those that are ours, and the values by which others change nothing.
SETTINGS = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"),
    *("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "rope.freq_base", "rope.dimension_count"),
)
NEUTRAL = {"expert_count": 0, "expert_used_count": 0, "attention.causal": True, "rope.scaling.type": "none"}
SAMPLING = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p"}


def write(model: Portable, path: Path, precision: str) -> None:
    """The file with its tokenizer, and a Modelfile for Ollama beside it.

    In q8_0 and q4_0 the tensors are of the types that llama.cpp's own quantiser chooses (see `kind_of`).
    """

    def describe(writer: Any) -> None:
        writer.add_name(str(model.provenance.get("name") or path.stem))
        for key, add in (("license", writer.add_license), ("description", writer.add_description)):
            if isinstance(text := model.provenance.get(key), str):
                add(text)
        for ours, theirs in SAMPLING.items():
            getattr(writer, f"add_sampling_{theirs}")(getattr(model.sampling, ours))
        writer.add_sampling_penalty_repeat(model.sampling.repetition_penalty)
        writer.add_sampling_penalty_last_n(-1)
        gguf_vocabulary.add_to(writer, model.tokenizer, model.config.vocab_size)

    write_gguf(model.config, model.weights, path, precision, describe)
    companions(path)[0].write_text(modelfile(model, path.with_suffix("").name, path.name), encoding="utf-8")


def companions(path: Path) -> list[Path]:
    return [path.with_suffix(".Modelfile")]


def hint(path: Path) -> str:
    file, recipe = shlex.quote(str(path)), shlex.quote(companions(path)[0].name)
    return (
        f'next: llama-completion -m {file} -no-cnv -p "Once upon a time"\n'
        f'or, in its folder: ollama create stories -f {recipe}; ollama run stories "Once upon a time"'
    )


def logits(path: Path, ids: list[int]) -> Array:
    """(T, V) logits of our own engine with the file's weights, out of the precision they are stored in."""
    return read(path, None).logits(ids)


def read(path: Path, tokenizer: Path | None) -> Portable:
    """A model of llama.cpp's architectures qwen3, llama and gpt2, in any precision that the `gguf` package reads."""
    file = GgufFile(path)
    architecture = file.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise UserError(f"{path} is of architecture {shown(architecture)}; only qwen3, llama and gpt2 can be read")
    with naming(path):
        config = config_of(file, architecture)
        model = Portable(
            config=config,
            weights=weights_of(file, config),
            tokenizer=gguf_vocabulary.read(file, tokenizer),
            sampling=sampling_of(file),
            provenance={"imported_from": path.name, "format": f"GGUF {architecture}"}
            | {key: text for key in ("name", "license") if isinstance(text := file.values.get(f"general.{key}"), str)},
        )
        model.check()
    return model


def why_not(config: ModelConfig) -> str | None:
    """Why llama.cpp cannot run a model; None if it can."""
    gpt2 = config.learned_positions and config.activation == "gelu_tanh" and config.scaled_scores and not config.window
    if config.architecture == "classic" and not gpt2:
        return "has no model like this classic one: its gpt2 has learned positions, tanh-GELU, scaled scores, no window"
    return None


def write_gguf(
    config: ModelConfig,
    weights: Mapping[str, Array],
    path: Path,
    precision: str = "f32",
    describe: Callable[[Any], None] = lambda writer: writer.add_tokenizer_model("no_vocab"),
) -> None:
    """The model; `describe(writer)` adds what is known of it besides (without: it is given ids and gives ids)."""
    if reason := why_not(config):
        raise UserError(f"llama.cpp {reason}; use --format hf or onnx")
    gguf = package()
    modern = config.architecture == "modern"
    writer = gguf.GGUFWriter(path, ("qwen3" if config.qk_norm else "llama") if modern else "gpt2")
    describe(writer)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.n_ctx)
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.n_ff)
    writer.add_head_count(config.n_head)
    if modern:
        writer.add_head_count_kv(config.kv_heads)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_rope_freq_base(config.rope_base)
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    writer.add_file_type(gguf.LlamaFileType[PRECISIONS[precision]])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for name, tensor in tensors_of(config, weights):
        kind = gguf.GGMLQuantizationType[kind_of(config, name, tensor.shape, precision)]
        if kind.name != "F32" and np.abs(tensor).max() > LARGEST_F16:
            raise UserError(f"weights of {name} are too large for {precision}; use --precision f32")
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def config_of(file: GgufFile, architecture: str) -> ModelConfig:
    """`UserError` where a setting is missing, impossible, or one that our architectures do not have."""

    def whole(key: str, default: int | None = None) -> int:
        return file.get(f"{architecture}.{key}", int, default)

    for name in file.values:
        key = name.removeprefix(f"{architecture}.")
        neutral = key in NEUTRAL and file.get(name, type(NEUTRAL[key])) == NEUTRAL[key]
        if key != name and key not in SETTINGS and not neutral:
            raise UserError(f"{shown(name)} is set, which our architectures do not have")
    n_head, n_embd, n_layer, n_ctx = (
        whole(key) for key in ("attention.head_count", "embedding_length", "block_count", "context_length")
    )
    if TOP[EMBEDDING] not in file.tensors or n_layer > len(file.tensors) or n_ctx > MOST_CONTEXT:
        raise UserError(f"{n_layer:,} blocks, a context of {n_ctx:,} and {len(file.tensors):,} tensors cannot be")
    n_kv_head, usual = whole("attention.head_count_kv", n_head), n_embd // max(n_head, 1)
    sizes: dict[str, Any] = {
        "vocab_size": file.tensors[TOP[EMBEDDING]].shape[0],
        "n_ctx": n_ctx,
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": 0 if n_kv_head == n_head else n_kv_head,
        "n_embd": n_embd,
        "n_ff": whole("feed_forward_length"),
        "tied": TOP[HEAD] not in file.tensors,
    }
    if architecture == "gpt2":
        biases = (QKV_BIAS.format(i) for i in range(n_layer))
        sizes |= {
            "architecture": "classic",
            "learned_positions": True,
            "activation": "gelu_tanh",
            "qkv_bias": any(file.weight(name).any() for name in biases if name in file.tensors),
            "norm_eps": file.get("gpt2.attention.layer_norm_epsilon", float),
        }
    else:
        head_dim = whole("attention.key_length", usual)
        sizes |= {
            "architecture": "modern",
            "head_size": 0 if head_dim == usual else head_dim,
            "qk_norm": architecture == "qwen3",
            "rope_base": file.get(f"{architecture}.rope.freq_base", float, 10000.0),
            "norm_eps": file.get(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        }
    config = build(ModelConfig, sizes, str(file.path))
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if whole(key, config.head_dim) != config.head_dim:
            raise UserError(f"{architecture}.{key}={whole(key)}, but heads of {config.head_dim} have no other width")
    return config


def sampling_of(file: GgufFile) -> SamplingConfig:
    """The file's own settings, where it has some; ours for the rest."""
    names = SAMPLING | {"repetition_penalty": "penalty_repeat"}
    found = {ours: file.values.get(f"general.sampling.{theirs}") for ours, theirs in names.items()}
    return build(SamplingConfig, {name: value for name, value in found.items() if value is not None}, str(file.path))


def modelfile(model: Portable, name: str, file: str) -> str:
    """What Ollama must know besides (https://github.com/ollama/ollama/blob/main/docs/modelfile.mdx)."""
    sampling = model.sampling
    settings = {
        "num_ctx": model.config.n_ctx,
        **{key: getattr(sampling, key) for key in SAMPLING},
        "repeat_penalty": sampling.repetition_penalty,
        "repeat_last_n": -1,  # all of the story, as ours
        "stop": f'"{END}"',
    }
    lines = (f"PARAMETER {key} {value}" for key, value in settings.items())
    head = f'# ollama create {name} -f {name}.Modelfile\nFROM ./{file}\nTEMPLATE "{{{{ .Prompt }}}}"\n'
    return head + "\n".join(lines) + "\n"
